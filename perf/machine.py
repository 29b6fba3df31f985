"""What a measurement was taken on: device, versions, commit."""

from __future__ import annotations

import platform
import re
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tritonq.version import __version__

SOURCE = Path(__file__).resolve().parent

# Used where the operating system does not tell: larger than the last-level cache of most CPUs.
_UNKNOWN_CACHE = 64 << 20


def device_name(device: torch.device) -> str:
    """Return the name of the processor behind ``device``, as its driver or operating system gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_slug(device: torch.device) -> str:
    """Return ``device_name`` as a folder or file name: lower case words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def last_level_cache(device: torch.device) -> int:
    """Return the size, in bytes, of the last cache before the memory of ``device``."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [_cache_bytes(_read(path)) for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max(sizes, default=_UNKNOWN_CACHE)


def environment(device: torch.device) -> dict[str, Any]:
    """Return everything a reader needs to judge or repeat a measurement; one flat, JSON-ready dict."""
    commit, dirty = source_state()
    return {
        "device": device_name(device),
        "device_type": device.type,
        "driver": _driver(device),
        "threads": torch.get_num_threads(),
        "cache_bytes": last_level_cache(device),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "tritonq": __version__,
        "commit": commit,
        "dirty": dirty,
    }


@cache
def source_state() -> tuple[str, bool]:
    """Return the commit of the source tree, and whether files other than results differ from it.

    Outside of a clone: ``("unknown", True)``.
    """
    return _source_state()


def source_name(*results: str) -> str:
    """Return the first digits of the commit now, with "-dirty" behind them where files differ from it.

    ``results`` are paths of results beside those of ``perf/results``.
    """
    commit, dirty = _source_state(*results)
    return commit[:7] + ("-dirty" if dirty else "")


def _source_state(*results: str) -> tuple[str, bool]:
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return "unknown", True
    excluded = [f":(top,exclude){path}" for path in ("perf/results", *results)]
    changes = _git("status", "--porcelain", "--", ":/", *excluded)
    return commit, changes != ""


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(SOURCE), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _driver(device: torch.device) -> str | None:
    """Return the driver version of a GPU; None for a CPU."""
    if device.type != "cuda":
        return None
    if torch.version.hip is not None:
        return f"HIP {torch.version.hip}"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return f"{driver}, CUDA {torch.version.cuda}"


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _cache_bytes(text: str) -> int:
    """Return the bytes that a size in the Linux kernel's notation stands for: 33554432 for ``32768K``."""
    match = re.fullmatch(r"(\d+)([KMG]?)", text.strip())
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]] if match else 0
