"""Entry point: ``python -m tritonq.perf.gpu``, or ``python perf/gpu`` in a checkout that is not installed.

The second form needs torch, triton and numpy, and no installation: it imports tritonq through a temporary folder of
links, which child processes find through ``PYTHONPATH``.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path


def link_checkout(checkout: Path, folder: Path) -> None:
    """Fill ``folder`` with links, so that ``folder`` on the import path offers ``checkout`` as if it were installed."""
    package = folder / "tritonq"
    package.mkdir()
    for entry in (checkout / "tritonq").iterdir():
        if entry.name not in ("__pycache__", "kernels", "perf"):
            (package / entry.name).symlink_to(entry)
    for name in ("kernels", "perf"):
        (package / name).symlink_to(checkout / name)


def _run() -> int:
    from tritonq.perf.gpu.command import main

    return main()


if __name__ == "__main__":
    if __package__:
        sys.exit(_run())
    with tempfile.TemporaryDirectory(prefix="tritonq-checkout-") as name:
        link_checkout(Path(__file__).resolve().parents[2], Path(name))
        sys.path[0] = name
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (name, os.environ.get("PYTHONPATH"))))
        sys.exit(_run())
