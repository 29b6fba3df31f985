"""Print what tritonq finds on this machine: versions, GPUs, the backend of calls and its reason, launch tables."""

from __future__ import annotations

import argparse
import importlib.util
import platform
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from tritonq.backend import has_triton, is_interpreting, select
from tritonq.deploy.onnx_session import products_saturate
from tritonq.version import __version__

# Distributions and what needs them. Which versions are required stands in the metadata of tritonq.
_PACKAGES = {
    "torch": "everything",
    "triton": "kernels; without it everything runs on PyTorch",
    "numpy": "everything",
    "onnx": "export_onnx: pip install 'tritonq[onnx]'",
    "onnxscript": "export_onnx: pip install 'tritonq[onnx]'",
    "onnxruntime": "verify of ONNX files: pip install 'tritonq[onnx]'",
    "matplotlib": "plots: pip install 'tritonq[report]'",
    "tqdm": "train, report, bench: pip install 'tritonq[report]'",
    "scikit-learn": "the digits: pip install 'tritonq[demo]'",
    "pillow": "folders of images: pip install 'tritonq[demo]'",
}
_REQUIRED = ("torch", "numpy")


@dataclass(frozen=True)
class Finding:
    """One line of what `doctor` prints.

    Attributes:
        topic: heading that it stands under, such as "versions".
        name: what was looked at, such as "torch".
        value: what was found, such as "2.13.0+cpu".
        problem: why that is wrong, such as "at least 2.11 is needed"; "" if it is not.
    """

    topic: str
    name: str
    value: str
    problem: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Say in the help of ``python -m tritonq doctor`` that it takes no options."""
    parser.epilog = "Takes no options. Ends with status 1 where something is broken; an extra that is absent is not."


def main(arguments: argparse.Namespace) -> int:
    """Print the findings under their topics, then how many are problems; return the exit status: 1 if any, else 0."""
    findings = list(examine())
    width = max(len(finding.name) for finding in findings)
    topic = ""
    for finding in findings:
        if finding.topic != topic:
            topic = finding.topic
            print(topic)
        print(
            f"  {finding.name:{width}}  {finding.value}"
            + (f"  [problem: {finding.problem}]" if finding.problem else "")
        )
    problems = sum(bool(finding.problem) for finding in findings)
    print(f"{problems} problem{'s' if problems != 1 else ''} found" if problems else "no problem found")
    return 1 if problems else 0


def examine() -> Iterator[Finding]:
    """Yield every finding, in the order in which it is printed.

    Topics are versions, devices, the backend of calls, ONNX Runtime, and tables of launch sizes.
    """
    yield from _versions()
    yield from _devices()
    yield from _backends()
    yield from _engines()
    yield from _tables()


def _versions() -> Iterator[Finding]:
    yield Finding("versions", "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding("versions", "tritonq", __version__)
    oldest = _oldest_versions()
    for name, needed_for in _PACKAGES.items():
        version = _installed(name)
        if version is None:
            absent = "required" if name in _REQUIRED else ""
            yield Finding("versions", name, f"not installed; for {needed_for}", absent)
            continue
        least = oldest.get(name)
        old = least is not None and TorchVersion(version) < least
        yield Finding("versions", name, version, f"at least {least} is needed" if old else "")


def _installed(name: str) -> str | None:
    """Return the version of an installed distribution, or None if it is not installed."""
    if name == "torch":
        return str(torch.__version__)  # names the build too ("2.13.0+cpu"), which the metadata of PyPI's wheels do not
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _oldest_versions() -> dict[str, str]:
    """Return the lower bounds of tritonq's requirements, by package.

    ``{}`` if tritonq is not installed but only importable.
    """
    try:
        requirements = metadata.requires("tritonq") or []
    except metadata.PackageNotFoundError:
        return {}
    bounds = (re.match(r"([\w.-]+)\s*>=\s*([\w.]+)", requirement) for requirement in requirements)
    return {bound[1]: bound[2] for bound in bounds if bound}


def _devices() -> Iterator[Finding]:
    build = (torch.version.cuda and f"CUDA {torch.version.cuda}") or (torch.version.hip and f"HIP {torch.version.hip}")
    yield Finding("devices", "torch was built for", build or "CPU only")
    yield Finding("devices", "CPU threads", str(torch.get_num_threads()))
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors"
        yield Finding(
            "devices", f"cuda:{index}", f"{properties.name}, sm_{properties.major}{properties.minor}, {memory}"
        )
    if not torch.cuda.device_count():
        yield Finding("devices", "GPU", "none that torch can use")


def _backends() -> Iterator[Finding]:
    if is_interpreting():
        yield Finding("backend", "TRITON_INTERPRET", "1: kernels run in Triton's interpreter, on CPU tensors, slowly")
    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for device in devices:
        x = torch.zeros(1, device=device)
        wrong = "kernels would be faster here" if device != "cpu" and select(x) == "torch" else ""
        yield Finding("backend", f"float32 on {device}", _choice(x), wrong)
    yield Finding("backend", "float64 anywhere", _choice(torch.zeros(1, device=devices[-1], dtype=torch.float64)))


def _engines() -> Iterator[Finding]:
    """Yield a finding about ONNX Runtime.

    It tells whether its integer sums are exact on this CPU, or with which option they are.
    """
    exact = "exact"
    if products_saturate():
        exact = 'x86 without VNNI: exact only where the session\'s option "session.x64quantprecision" is "1"'
    yield Finding("ONNX Runtime", "int8 sums on cpu", exact)


def _choice(x: Tensor) -> str:
    """Return the backend of a call on ``x`` with the reason, such as ``"triton: the tensor is on a GPU"``."""
    chosen = select(x)
    if chosen == "triton":
        return "triton: the tensor is on a GPU" if x.is_cuda else "triton: its interpreter is switched on"
    try:
        select(x, "triton")
    except RuntimeError as error:
        return f"torch: {str(error).partition(': ')[2]}"
    return "torch: use_backend asks for it"


def _tables() -> Iterator[Finding]:
    if not has_triton() or importlib.util.find_spec("tritonq.kernels") is None:
        yield Finding("launch sizes", "tables", "not used: no kernels without triton")
        return
    from tritonq.kernels.launch_sizes import TABLES, gpu_file_stem, load_table

    names = {torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())}
    for name in sorted(names):
        path = TABLES / f"{gpu_file_stem(name)}.json"
        if not path.exists():
            yield Finding(
                "launch sizes", name, f"no {path.name}: defaults are used; `python -m tritonq tune` makes one"
            )
    paths = sorted(TABLES.glob("*.json"))
    for path in paths:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            load_table.cache_clear()
            table = load_table(path)
        entries = sum(len(sizes) for sizes in table.values())
        used = "used here" if path.stem in map(gpu_file_stem, names) else "for another GPU"
        damaged = str(caught[0].message) if caught else ""
        yield Finding("launch sizes", path.name, f"{entries} entries for {len(table)} kernels, {used}", damaged)
    if not paths:
        yield Finding("launch sizes", "tables", f"none in {TABLES}: defaults are used")
