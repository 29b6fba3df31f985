"""Clips that are not the ReLU of a layer or join: Hardtanh, clamps, or a ReLU6 that became part of nothing.

FQ in formulas is fake quantization: rounding to a grid, as a float tensor. A *join* has two or more input tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tritonq.functional.functions import requantized
from tritonq.grid import Grid
from tritonq.nn.functions import ElementwiseLayer
from tritonq.nn.fusable import bound_of_clip
from tritonq.qconfig import QConfig
from tritonq.reference.functions import Function


@dataclass(frozen=True)
class Clipping:
    """The bounds of a clip, ReLUs included: ``min(max(x, low), high)``.

    Attributes:
        low: lower bound; -infinity: there is none.
        high: upper bound; infinity: there is none.
    """

    low: float
    high: float

    @property
    def ceiling(self) -> float | None:
        """The upper bound if the clip is a ReLU (infinity for a plain one), None if it is none.

        A clip is a ReLU if its lower bound is 0 and its upper bound is positive.
        """
        return bound_of_clip(self.low, self.high)

    def then(self, other: Clipping) -> Clipping:
        """Return the one clip that computes this clip and then ``other``.

        Its bounds are those of this clip, each clipped by ``other``.
        """
        return Clipping(*(min(max(bound, other.low), other.high) for bound in (self.low, self.high)))

    @property
    def function(self) -> Function:
        """The clip as the `Function` ``Function("clip", (low, high))``, which clips a tensor when called with it."""
        return Function("clip", (self.low, self.high))


class Clip(ElementwiseLayer):
    """``FQ(min(max(x, low), high))``: what `prepare_qat` makes of ``nn.Hardtanh(-1, 1)`` or ``x.clamp(-1, 1)``.

    ``low`` and ``high`` are the bounds of the one clip that does what ``earlier`` and then ``own`` do; the attribute
    ``clipping`` has them. Behind a layer without an output quantizer, the clip's quantizer serves the layer, too: in
    eval mode the layer's sums are rounded to the clip's grid at once, and the bounds are applied to their codes.

    Args:
        own: the bounds of the clip that the module replaces.
        earlier: bounds of a clip before it, which is applied first; None: there is none.
        qconfig: makes the quantizer of the output; None: the module has none of its own.
        source_type: name of the class of torch.nn that it replaces, such as "Hardtanh"; None: it replaces a function.

    Examples:
        >>> Clip(Clipping(-1.0, 1.0))(torch.tensor([-4.0, 0.5, 3.0]))
        tensor([-1.0000,  0.5000,  1.0000])
    """

    def __init__(
        self,
        own: Clipping,
        *,
        earlier: Clipping | None = None,
        qconfig: QConfig | None = None,
        source_type: str | None = None,
    ) -> None:
        super().__init__()
        self.own, self.source_type = own, source_type
        self.absorb(earlier)
        self.attach_quantizers(qconfig)

    @classmethod
    def from_float(cls, module: nn.Module, qconfig: QConfig | None = None) -> Clip:
        """Return a Clip to replace a Hardtanh, ReLU6 or ReLU: in the same mode (training or eval), without its hooks.

        Args:
            module: the float module.
            qconfig: makes the quantizer of the output; None: the module has none of its own.

        Raises:
            TypeError: another module, or one of a subclass of these.
        """
        clipping = clipping_of(module)
        if clipping is None:
            raise TypeError(f"{type(module).__name__} is no clip that has a quantized form")
        return cls(clipping, qconfig=qconfig, source_type=type(module).__name__).train(module.training)

    def absorb(self, earlier: Clipping | None) -> None:
        """Let the module compute an earlier clip, too: its bounds are those of ``earlier`` followed by ``own``.

        ``earlier`` has the bounds of the clip that stood before it; None: there was none. It takes the place of the one
        that the constructor or the last call got.
        """
        self.earlier = earlier
        self.clipping = self.own if earlier is None else earlier.then(self.own)
        self.function = self.clipping.function

    @property
    def ceiling(self) -> float | None:
        """The upper bound if ``earlier`` and ``own`` together are a ReLU (infinity for a plain one), else None."""
        return self.clipping.ceiling

    def exact(self, x: Tensor, source: Grid, output: Grid) -> Tensor:
        """Return the clip as integer runtimes do: ``clip(round(x / s_out) · s_out)``, float32, without gradient.

        ``x`` has values of the grid ``source``; those that float16 or bfloat16 changed become exact first. ``output``
        is the grid of the quantizer behind the clip, s_out its scale. Both grids are per tensor. ``low`` and ``high``
        need not be values of ``output``, and results may lie beyond it: the quantizer then rounds and clips them.
        """
        with torch.no_grad():
            return self.function(requantized(x, source, output))

    def traced(self, x: Tensor, source: Grid, output: Grid) -> Tensor:
        """Return the result for ``torch.compile``, in the dtype of ``x``, without gradient.

        ``source`` and ``output`` are the grids of input and result, per tensor. While both are switched on, which the
        graph reads when it runs, it is what :meth:`exact` returns; else it is ``min(max(x, low), high)`` in float.
        """
        from tritonq.functional.traced import eval_mode

        return self.function(eval_mode.on_grid(x, output, source))

    def extra_repr(self) -> str:
        """Return the text for ``repr``: ``low`` and ``high``, an earlier clip included, such as ``"-1, 1"``."""
        return f"{self.clipping.low:g}, {self.clipping.high:g}"


CLIP_MODULES: tuple[type[nn.Module], ...] = (nn.Hardtanh, nn.ReLU6, nn.ReLU)


def clipping_of(module: object) -> Clipping | None:
    """Return the bounds of a Hardtanh, ReLU6 or ReLU; None for anything else, subclasses of these included."""
    if type(module) is nn.ReLU:
        return Clipping(0.0, math.inf)
    if type(module) not in CLIP_MODULES or not isinstance(module, nn.Hardtanh):
        return None
    return Clipping(float(module.min_val), float(module.max_val))
