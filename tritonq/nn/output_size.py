"""Transposed convolutions whose callers say how large the result is to be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn


class TakesOutputSize(nn.Module):
    """Mixin of transposed convolutions: a call may name the size of its result, as torch's may.

    The size decides how much is added at the end of each axis, in this call alone. Forwards never see it, so that
    whatever replaces a layer's forward has nothing to do for it.
    """

    output_padding: tuple[int, ...]

    def __call__(self, input: Tensor, *others: Any, output_size: Sequence[int] | None = None, **named: Any) -> Any:
        """Run the layer; ``output_size`` may come by position, as in torch, where weights are not given."""
        if others and not isinstance(others[0], (Tensor, type(None))):
            output_size, *others = others  # type: ignore[assignment]
        padding = self.output_padding if output_size is None else self._padding_for(input, output_size)
        layer = self if padding == self.output_padding else self._padded(padding)
        return nn.Module.__call__(layer, input, *others, **named)

    def _padding_for(self, input: Tensor, output_size: Sequence[int]) -> tuple[int, ...]:
        """Return the output padding that gives a size.

        Raises:
            ValueError: there is none.
        """
        conv = cast(Any, self)
        sizes = conv.stride, conv.padding, conv.kernel_size, len(conv.kernel_size), conv.dilation
        return tuple(conv._output_padding(input, list(output_size), *sizes))

    def _padded(self, padding: tuple[int, ...]) -> TakesOutputSize:
        """Return this layer with another output padding, all else shared; threads and replicas do not meet there.

        Raises:
            ValueError: the layer is being exported, with one padding.
        """
        if "forward" in vars(self):
            raise ValueError(
                f"a transposed convolution is exported with output padding {self.output_padding} and is called with an "
                f"output_size that needs {padding}: a file holds one size of its result"
            )
        layer = type(self).__new__(type(self))
        layer.__dict__.update(vars(self), output_padding=padding)
        return layer
