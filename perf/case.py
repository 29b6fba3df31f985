"""What a benchmark case is: inputs, implementations of one operation, least traffic, and how far results may differ."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
Step = Callable[[Inputs], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Tolerance:
    """How far an output may be from the reference.

    An element agrees when ``|out - ref| <= atol + rtol * |ref|``; at most ``fraction`` of the elements of each output
    may disagree, and none may be NaN where the reference is not. With ``distance``, the relative distance
    ``‖out - ref‖ / ‖ref‖`` of each output decides instead.

    Attributes:
        reason: why it is not zero (or why it is).
    """

    reason: str
    atol: float = 0.0
    rtol: float = 0.0
    fraction: float = 0.0
    distance: float | None = None


@dataclass(frozen=True)
class Implementation:
    """One way to do what the case describes.

    Attributes:
        build: receives one set of inputs (shapes, device, qparams) and returns the step that is checked and timed.
            Imports of optional packages belong here.
        distribution: package index name of the library, for its version and for "not installed".
        module: top-level module whose absence means "not installed".
        tolerance: replaces the case's, with its own reason.
        quick: False keeps it out of ``--quick`` (compilers that need tens of seconds).
        devices: device types it can run on.
        for_check: brings what a step returns into the reference's form; None where it has that. Not timed.
        leaves_out: which parts of what tritonq does it doesn't do, or does otherwise; one line, shown with its time.
    """

    build: Callable[[Inputs], Step]
    distribution: str = "torch"
    module: str = "torch"
    tolerance: Tolerance | None = None
    quick: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")
    for_check: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] | None = None
    leaves_out: str = ""

    def check(self, step: Step, inputs: Inputs, expected: tuple[Tensor, ...], tolerance: Tolerance) -> str | None:
        """Run a step of this implementation; return in words how it differs from ``expected``, or None if it does not.

        ``tolerance`` is the case's, and counts if this implementation has none of its own.
        """
        outputs = step(inputs)
        if self.for_check is not None:
            outputs = self.for_check(outputs)
        return disagreement(outputs, expected, self.tolerance or tolerance)

    def library_version(self) -> str | None:
        """Return the installed version of the library; None if it is not installed."""
        try:
            return version(self.distribution)
        except PackageNotFoundError:
            return None


@dataclass(frozen=True)
class Case:
    """One operation on one kind of input, and everything that can do it.

    Attributes:
        name: ``family/what/shape/dtype/…``, unique in the table.
        family: the group it is plotted in.
        make_inputs: seeded generator and device to one set of inputs; called with several seeds, so that timing can
            rotate through more memory than the caches hold.
        reference: the specification, written in plain operators; what every implementation is checked against.
        implementations: by name.
        baseline: the implementation that ratios are taken against.
        bytes_moved: bytes that the best possible implementation reads and writes.
        operations: arithmetic operations that it needs, roughly; for the roofline.
        tolerance: for every implementation that has none of its own.
        devices: device types the case makes sense on.
        quick: part of ``--quick``.
        memory: bytes that one step of a built implementation keeps for its backward; None where it says nothing.
    """

    name: str
    family: str
    make_inputs: Callable[[torch.Generator, torch.device], Inputs]
    reference: Step
    implementations: Mapping[str, Implementation]
    baseline: str
    bytes_moved: int
    operations: int
    tolerance: Tolerance
    devices: tuple[str, ...] = ("cpu", "cuda")
    quick: bool = False
    memory: Callable[[Step, Inputs], int] | None = None

    def __post_init__(self) -> None:
        if self.baseline not in self.implementations:
            raise ValueError(f"{self.name}: baseline {self.baseline!r} is not among its implementations")


def disagreement(outputs: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: Tolerance) -> str | None:
    """Return in words how ``outputs`` differ from ``expected`` beyond ``tolerance``; None if they don't."""
    if len(outputs) != len(expected):
        return f"{len(outputs)} outputs, expected {len(expected)}"
    for index, pair in enumerate(zip(outputs, expected, strict=True)):
        difference = _difference(*pair, tolerance)
        if difference is not None:
            return f"output {index} {difference}"
    return None


def _difference(out: Tensor, ref: Tensor, tolerance: Tolerance) -> str | None:
    if out.shape != ref.shape:
        return f"has shape {tuple(out.shape)}, expected {tuple(ref.shape)}"
    if out.dtype != ref.dtype:
        return f"is {out.dtype}, expected {ref.dtype}"
    out, ref = out.detach().float(), ref.detach().float()
    if bool((out.isnan() & ~ref.isnan()).any()):
        return "has NaN where the reference has none"
    if tolerance.distance is not None:
        distance = float((out - ref).norm() / ref.norm())
        return None if distance <= tolerance.distance else f"is at relative distance {distance:.3g} from the reference"
    error = (out - ref).abs()
    agrees = (error <= tolerance.atol + tolerance.rtol * ref.abs()) | (out == ref) | (out.isnan() & ref.isnan())
    wrong = out.numel() - int(agrees.sum())
    if wrong <= tolerance.fraction * out.numel():
        return None
    return f"differs in {wrong} of {out.numel()} elements, by up to {float(error.nan_to_num().max()):.3g}"
