"""Compiles the C++ sources beside this file, once for each machine and version, and loads the result."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path
from typing import Any

import torch

_log = logging.getLogger("tritonq")
_SOURCES = ("conv_bn.cpp", "eval_codes.cpp", "fake_quant.cpp", "histogram.cpp", "residual.cpp", "weight.cpp")
_HEADERS = ("common.h",)
_COMPILERS = ("c++", "g++", "clang++")
# Sums may be reordered where the code says so (`omp simd`), and nothing else: no fast math, no contraction.
_FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-fopenmp"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
)
_lock = threading.Lock()


@cache
def compiler() -> str | None:
    """Return the path of the C++ compiler: ``CXX`` of the environment, without that c++, g++ or clang++ on the path.

    ``CXX`` is a name or path without options. None if it is not found, or if none of the three is. The answer is kept
    for the process.
    """
    named = os.environ.get("CXX")
    return next((found for name in ([named] if named else _COMPILERS) if (found := shutil.which(name))), None)


def obstacle() -> str | None:
    """Return why compiled code can't run here, such as "it needs a C++ compiler: …"; None on Linux with a compiler.

    Nothing is compiled, so that a compiler that fails is not found out.
    """
    if sys.platform != "linux":
        return f"compiled code runs on Linux, this is {sys.platform}"
    if compiler() is None:
        return "it needs a C++ compiler: c++, g++ or clang++ on the path, or the environment variable CXX"
    return None


@cache
def library() -> Any:
    """Return the compiled functions as attributes of a ctypes library, the same one in each call.

    They are compiled if the user's cache folder (``~/.cache/tritonq``) lacks them.

    Raises:
        RuntimeError: they can't run here (not Linux, or no compiler), can't be compiled (the message has the
            compiler's), or neither the cache folder nor one for temporary files can be written to.
    """
    with _lock:
        return _load()


@cache
def _load() -> Any:
    loaded = ctypes.CDLL(str(_compiled()))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype = result
        function.argtypes = [_TYPES[letter] for letter in arguments]
    return loaded


def _compiled() -> Path:
    """Return the path of the compiled library, ``operators-<key>.so`` in the cache folder; compiles it if missing.

    Raises:
        RuntimeError: as :func:`library` says.
    """
    blocked = obstacle()
    if blocked is not None:
        raise RuntimeError(f"backend 'compiled' cannot run here: {blocked}")
    # PyTorch's vector code rounds a product and a sum once where the processor can, unless it is told not to use that.
    fuses = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    command = [str(compiler()), *_FLAGS, f"-DTRITONQ_FMA={int(fuses)}"]
    file = _cache_folder() / f"operators-{_key(command)}.so"
    if file.exists():
        return file
    _log.info("tritonq: compiling operators for this CPU, once: %s", file)
    folder = Path(__file__).parent
    # Written beside its place and moved there whole: other processes may do the same at the same time.
    with tempfile.TemporaryDirectory(dir=file.parent) as work:
        made = Path(work) / file.name
        done = subprocess.run(
            [*command, *(str(folder / name) for name in _SOURCES), "-o", str(made)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"tritonq's operators can't be compiled by {command[0]}:\n{done.stderr}")
        made.replace(file)
    return file


def _cache_folder() -> Path:
    """Return a folder that this user owns and can write to, made if it is missing.

    It is ``tritonq`` in ``XDG_CACHE_HOME`` (without that ``~/.cache``), else ``tritonq-<user number>`` in the system's
    folder for temporary files.

    Raises:
        RuntimeError: neither can be written to.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for folder in (base / "tritonq", Path(tempfile.gettempdir()) / f"tritonq-{os.getuid()}"):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK) and folder.stat().st_uid == os.getuid():
            return folder
    raise RuntimeError(f"backend 'compiled' needs a folder to keep compiled code in: {base} can't be written")


def _key(command: list[str]) -> str:
    """Return 16 hexadecimal digits, a hash of sources, compiler ``command`` and version, and processor.

    They name the compiled file, so that a change of any of these compiles anew.
    """
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True, check=False).stdout
    parts = [*command, version, platform.machine(), _processor()]
    parts += [(Path(__file__).parent / name).read_text() for name in (*_HEADERS, *_SOURCES)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """Return the processor's instruction sets as Linux lists them; machines that share a home folder may differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


# p: address, q: int64, i: int, f: float, d: double.
_TYPES: dict[str, Any] = {
    "p": ctypes.c_void_p,
    "q": ctypes.c_int64,
    "i": ctypes.c_int,
    "f": ctypes.c_float,
    "d": ctypes.c_double,
}
_SIGNATURES: dict[str, tuple[Any, str]] = {
    "tail_of": (None, "ppifpp"),
    "tail_forward": (ctypes.c_int, "pqqqipppppppffpiifppppp"),
    "tail_apply": (None, "pqqqipppp"),
    "tail_backward": (None, "ppqqqippppppp"),
    "nonzero_fold": (None, "ppqffpp"),
    "gamma_gradient": (None, "ppppppqfp"),
    "weight_extremes": (ctypes.c_int, "pqqppp"),
    "weight_ranges": (ctypes.c_int, "ppqipppp"),
    "step_weight": (ctypes.c_int, "pqqppffppppipp"),
    "step_weight_backward": (None, "ppqqpppppppfiffpp"),
    "weight_codes": (None, "pqqppqiffp"),
    "weight_backward": (None, "ppqqpppqiffpp"),
    "join_forward": (ctypes.c_int, "ppqqpiifpppppp"),
    "join_backward": (None, "ppqqp"),
    "codes_of_values": (ctypes.c_int, "pqfffip"),
    "values_of_codes": (None, "pqffp"),
    "eval_codes_of_sums": (ctypes.c_int, "pqpqifpp"),
    "eval_codes_of_values": (ctypes.c_int, "pqfiffpp"),
    "eval_values": (None, "pqffp"),
    "eval_codes_of_sum": (None, "ppqfffffpp"),
    "eval_codes_of_product": (None, "pqqqpffffpp"),
    "eval_look_up": (None, "pqpp"),
    "fake_quantize": (None, "pqqqpppffpp"),
    "fake_quantize_backward": (None, "ppqqqppffp"),
    "prefix_counts": (ctypes.c_int64, "pqiiiippp"),
}
