"""Clips that are no ReLU of a layer or join: Hardtanh, clamps with one or two bounds, a ReLU6 that nothing absorbed."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tritonq.grid import Grid
from tritonq.nn.functions import ElementwiseLayer
from tritonq.qconfig import QConfig
from tritonq.reference.functions import Function, onto_output


@dataclass(frozen=True)
class Clipping:
    """Bounds of a clip.

    Attributes:
        low: the lower one; -infinity: none.
        high: the upper one; infinity: none.
    """

    low: float
    high: float

    @property
    def ceiling(self) -> float | None:
        """The upper bound of the ReLU that the clip is; None where it is none."""
        return self.high if self.low == 0 and self.high > 0 else None

    def then(self, other: Clipping) -> Clipping:
        """Return the bounds of this clip and another one behind it, as those of one."""
        return Clipping(*(min(max(bound, other.low), other.high) for bound in (self.low, self.high)))

    @property
    def function(self) -> Function:
        """The clip as a function of one tensor."""
        return Function("clip", (self.low, self.high))


class Clip(ElementwiseLayer):
    """``FQ(min(max(x, low), high))``: what `prepare_qat` makes of ``nn.Hardtanh(-1, 1)`` or ``x.clamp(-1, 1)``.

    Behind a layer the clip's quantizer is the layer's, too: in eval mode sums go onto its grid at once, and the clip
    moves codes.

    Args:
        own: the bounds.
        earlier: those of clips before it that it makes superfluous; None without any.
        qconfig: quantizer of the output; None: none of its own.
        source_type: name of the class of torch.nn in whose place the module stands; None: it stands for a function.

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
        """Return the quantized form of a Hardtanh, ReLU6 or ReLU, in its mode; hooks are not moved.

        Raises:
            TypeError: another module.
        """
        clipping = clipping_of(module)
        if clipping is None:
            raise TypeError(f"{type(module).__name__} is no clip that has a quantized form")
        return cls(clipping, qconfig=qconfig, source_type=type(module).__name__).train(module.training)

    def absorb(self, earlier: Clipping | None) -> None:
        """Take over the bounds of the clip that stood before this one; None: there was none."""
        self.earlier = earlier
        self.clipping = self.own if earlier is None else earlier.then(self.own)
        self.function = self.clipping.function

    @property
    def ceiling(self) -> float | None:
        """The upper bound of the ReLU that it is; None where it is none."""
        return self.clipping.ceiling

    def exact(self, x: Tensor, source: Grid, output: Grid) -> Tensor:
        """See base class: values go onto the output's grid, then the bounds apply, which a clip on codes does, too."""
        with torch.no_grad():
            values = (x.float() / source.scale).round_().mul_(source.scale)
            return self.function(onto_output(values, output))

    def traced(self, x: Tensor, source: Grid, output: Grid) -> Tensor:
        """See base class."""
        from tritonq.functional.traced import eval_mode

        return self.function(eval_mode.on_grid(x, output))

    def extra_repr(self) -> str:
        """Return the bounds."""
        return f"{self.clipping.low:g}, {self.clipping.high:g}"


CLIP_MODULES: tuple[type[nn.Module], ...] = (nn.Hardtanh, nn.ReLU6, nn.ReLU)


def clipping_of(module: object) -> Clipping | None:
    """Return the bounds of a Hardtanh, ReLU6 or ReLU; None for any other module."""
    if type(module) is nn.ReLU:
        return Clipping(0.0, math.inf)
    if type(module) not in CLIP_MODULES or not isinstance(module, nn.Hardtanh):
        return None
    return Clipping(float(module.min_val), float(module.max_val))
