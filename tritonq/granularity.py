"""How many elements of a tensor share one scale."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Granularity:
    """Which elements of a tensor share a scale, as a value.

    Attributes:
        axis: one scale per index of this axis; None: one scale for the whole tensor.

    Examples:
        >>> Granularity(axis=1).scale_shape((8, 3, 5))
        (3,)
        >>> Granularity().scale_shape((8, 3, 5))
        ()
    """

    axis: int | None = None

    @property
    def is_per_tensor(self) -> bool:
        """Whether one scale serves the whole tensor."""
        return self.axis is None

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the scales of a tensor of this shape."""
        return () if self.axis is None else (shape[self.axis],)

    def align(self, values: Tensor, dimensions: int) -> Tensor:
        """Return a view of ``values``, one per scale, that broadcasts against a tensor of so many dimensions."""
        shape = [1] * dimensions
        if self.axis is not None:
            shape[self.axis] = -1
        return values.view(shape)
