"""Compile a CUDA runtime and a CUDA driver that need no GPU, for the CUDA build of torch in this environment.

    python tools/fake_cuda/build.py FOLDER

FOLDER then holds ``libcudart.so.13`` and ``libcuda.so.1``. ``run.py`` preloads them.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path

SITE = Path(sysconfig.get_path("purelib"))
RUNTIME, DRIVER = "libcudart.so.13", "libcuda.so.1"
_SOURCE = Path(__file__).with_name("runtime.c")


def build(folder: Path) -> None:
    """Write ``libcudart.so.13`` and ``libcuda.so.1`` into ``folder``.

    Raises:
        FileNotFoundError: no CUDA build of torch, or none of CUDA 13.
        CalledProcessError: no C compiler, or it failed.
    """
    libraries = [*SITE.glob("torch/lib/*.so*"), *SITE.glob("nvidia/*/lib/*.so*")]
    needed = {name for path in libraries for name in _undefined(path) if name.partition("@")[2].lstrip("@") == RUNTIME}
    if not needed:
        raise FileNotFoundError(f"no library in {SITE} needs {RUNTIME}: install a build of torch for CUDA 13")
    include = next(SITE.glob("nvidia/*/include/driver_types.h")).parent
    # Triton ships the headers that the runtime's own include.
    flags = ["-I", str(include), "-I", str(SITE / "triton" / "backends" / "nvidia" / "include")]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        compiled, versions = Path(scratch, "runtime.o"), Path(scratch, "versions")
        _compile("-c", *flags, "-o", str(compiled), str(_SOURCE))
        versions.write_text(f"{RUNTIME} {{ global: *; }};\n")
        others = {name.partition("@")[0] for name in needed} - _defined(compiled)
        written = f"-Wl,--version-script={versions}"
        _link(folder / RUNTIME, [str(compiled), str(_succeeding(others, Path(scratch, "others.c")))], written)
        # torch looks the driver's functions up by name when CUDA starts.
        asked = {name for path in SITE.glob("torch/lib/*cuda*.so") for name in _driver_names(path)}
        _link(folder / DRIVER, [str(_succeeding(asked, Path(scratch, "driver.c")))])


def _compile(*arguments: str) -> None:
    subprocess.run(["cc", "-w", "-fPIC", "-fno-builtin", *arguments], check=True)


def _link(library: Path, sources: Iterable[str], *flags: str) -> None:
    _compile("-shared", f"-Wl,-soname,{library.name}", *flags, "-o", str(library), *sources)


def _undefined(library: Path) -> list[str]:
    return [line.split()[-1] for line in _symbols("-D", "--undefined-only", str(library))]


def _defined(compiled: Path) -> set[str]:
    return {line.split()[-1] for line in _symbols("--defined-only", str(compiled))}


def _symbols(*arguments: str) -> list[str]:
    return subprocess.run(["nm", *arguments], capture_output=True, text=True, check=False).stdout.splitlines()


def _driver_names(library: Path) -> set[str]:
    return {name.decode() for name in re.findall(rb"\0(cu[A-Z]\w+)(?=\0)", library.read_bytes())}


def _succeeding(names: Iterable[str], path: Path) -> Path:
    """Write C functions of these names, which do nothing and return 0 (success), to ``path``; return ``path``."""
    path.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(names)))
    return path


if __name__ == "__main__":
    build(Path(sys.argv[1]))
