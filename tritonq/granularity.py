"""How many elements of a tensor share one scale."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

from tritonq.arithmetic import keep_whole_numbers, whole_number


@dataclass(frozen=True)
class Granularity:
    """Which elements of a tensor share a scale; immutable, and equal if axis and group are.

    Attributes:
        axis: one scale per index of this axis, which may count from the end (-1); None: one scale for the whole tensor.
        group: one scale per so many consecutive elements along ``axis``, at each index of all other axes; None: no
            groups.

    Raises:
        TypeError: an axis or group that is no int of Python or NumPy, or is a bool.
        ValueError: groups without an axis, or of less than one element.

    Examples:
        >>> Granularity(axis=1).scale_shape((8, 3, 5))
        (3,)
        >>> Granularity(axis=1, group=32).scale_shape((8, 64, 3, 3))
        (8, 2, 3, 3)
        >>> Granularity().scale_shape((8, 3, 5))
        ()
    """

    axis: int | None = None
    group: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("axis", self.axis), ("group", self.group)):
            if value is not None and whole_number(value) is None:
                raise TypeError(f"{name} must be an int or None, got {value!r}")
        keep_whole_numbers(self, axis=self.axis, group=self.group)
        if self.group is not None and (self.axis is None or self.group < 1):
            raise ValueError(f"groups of at least one element lie along an axis, got {self.group} along {self.axis}")

    @property
    def is_per_tensor(self) -> bool:
        """Whether there is one scale for the whole tensor."""
        return self.axis is None

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the scales of a tensor of this shape.

        Per tensor it is ``()``, per channel ``(shape[axis],)``, and with groups ``shape`` with ``shape[axis]`` divided
        by ``group``.

        Raises:
            ValueError: the shape lacks the axis, or the axis has a size that ``group`` does not divide.
        """
        if self.axis is not None and not -len(shape) <= self.axis < len(shape):
            raise ValueError(f"a tensor of shape {tuple(shape)} has no axis {self.axis} for its scales")
        if self.axis is not None and self.group is not None:
            groups, rest = divmod(shape[self.axis], self.group)
            if rest:
                raise ValueError(f"axis {self.axis} of {tuple(shape)} is no multiple of groups of {self.group}")
            return tuple(groups if axis == self.axis % len(shape) else size for axis, size in enumerate(shape))
        return () if self.axis is None else (shape[self.axis],)

    def count(self, shape: tuple[int, ...]) -> int:
        """Return how many scales a tensor of this shape has: 1 per tensor.

        Raises:
            ValueError: the shape lacks the axis, or the axis has a size that ``group`` does not divide.
        """
        return prod(self.scale_shape(shape))

    def align(self, values: Tensor, dimensions: int) -> Tensor:
        """Return a view of ``values`` that broadcasts against a tensor of so many dimensions.

        ``values`` has one element per scale, such as zero points: (n,), or per tensor one element in any shape. For
        axis 1 of 4 the view is (1, n, 1, 1), per tensor (1, 1, 1, 1).

        Raises:
            ValueError: there are groups, whose scales no view broadcasts.
            IndexError: a tensor of so many dimensions lacks the axis.
        """
        if self.group is not None:
            raise ValueError(f"no view of the scales of groups broadcasts, got {self}")
        shape = [1] * dimensions
        if self.axis is not None:
            shape[self.axis] = -1
        return values.view(shape)


def describe_granularity(granularity: Granularity) -> str:
    """Return a granularity in a few words: ``"tensor"``, ``"channel (axis 0)"``, ``"group of 32 (axis 1)"``."""
    if granularity.axis is None:
        return "tensor"
    size = "channel" if granularity.group is None else f"group of {granularity.group}"
    return f"{size} (axis {granularity.axis})"


def granularity_of(quantizer: nn.Module) -> Granularity:
    """Return which elements of the tensor that ``quantizer`` rounds share a scale, as its attribute ``qtype`` says.

    Without a ``qtype``, or if that is None, it is ``Granularity()``: one scale for the whole tensor.
    """
    qtype = getattr(quantizer, "qtype", None)
    return Granularity() if qtype is None else qtype.granularity


def describe_span(values: Tensor) -> str:
    """Return the range of a tensor's elements as text: ``"0.1..0.4"``, or ``"0.25"`` if all are equal.

    The two numbers are the smallest and the largest element. Numbers have up to six significant digits, as ``:.6g``
    writes them. A tensor without elements gives ``"unset"``, one with a NaN ``"nan..nan"``. Waits for a GPU.
    """
    if values.numel() == 0:
        return "unset"
    low, high = float(values.min()), float(values.max())
    return f"{low:.6g}" if low == high else f"{low:.6g}..{high:.6g}"
