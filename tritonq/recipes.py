"""Learning rates and schedules for training with rounding: one recipe for eight bits, one for fewer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.float_fake_quantize import FloatFakeQuantize
from tritonq.qconfig import QConfig
from tritonq.qconfig_mapping import QConfigMapping


@dataclass(frozen=True)
class TrainingRecipe:
    """A schedule for fine-tuning a trained float model with rounding.

    Attributes:
        learning_rate: of SGD with momentum 0.9 at the first step; half a cosine takes it to 0 at the end.
        weight_decay: of weights and biases; :func:`tritonq.parameter_groups` leaves scales and normalizations out.
        frozen_share: the fraction (0 to 1) of the training steps, at the end, in which ranges and BatchNorm statistics
            stay as they are; 0: none.

    Examples:
        >>> TrainingRecipe(learning_rate=0.01, weight_decay=0.0, frozen_share=0.5).frozen_share
        0.5
    """

    learning_rate: float
    weight_decay: float
    frozen_share: float


# Eight bits move little: a low rate, and the last quarter on the numbers that will be deployed. Trained scales at few
# bits need a higher one, and frozen statistics would be those of weights that still flip: so none freeze.
EIGHT_BITS = TrainingRecipe(learning_rate=0.005, weight_decay=1e-4, frozen_share=0.25)
FEW_BITS = TrainingRecipe(learning_rate=0.02, weight_decay=1e-4, frozen_share=0.0)
# Fewer bits than this are few.
_FEW = 5


def recipe_for(qconfig: QConfig | QConfigMapping) -> TrainingRecipe:
    """Return the recipe for a qconfig, or for a mapping by the fewest bits of its rules.

    :data:`FEW_BITS` where some weight or activation has fewer than five bits, else :data:`EIGHT_BITS` (also where all
    is left in float): what ``python -m tritonq train`` does unless its options say otherwise. They are starting points:
    the rates were chosen on 5,000 held-out images of Fashion-MNIST for a residual net, with two epochs and batches of
    100. Where evaluation falls behind training all the same, :func:`tritonq.reestimate_batch_norm` helps.

    Raises:
        TypeError: neither a QConfig nor a QConfigMapping.

    Examples:
        >>> import tritonq
        >>> recipe_for(tritonq.get_qconfig()).learning_rate
        0.005
        >>> recipe_for(tritonq.get_qconfig_mapping("lsq_w2a4")).frozen_share
        0.0
    """
    if not isinstance(qconfig, (QConfig, QConfigMapping)):
        raise TypeError(f"qconfig must be a QConfig or a QConfigMapping, got {type(qconfig).__name__}")
    found = (
        [qconfig] if isinstance(qconfig, QConfig) else [choice for choice in qconfig.qconfigs() if choice is not None]
    )
    widths = [bits for choice in found for make in (choice.activation, choice.weight) if (bits := _bits(make()))]
    return FEW_BITS if min(widths, default=_FEW) < _FEW else EIGHT_BITS


def _bits(quantizer: nn.Module) -> int | None:
    if isinstance(quantizer, FloatFakeQuantize):
        return quantizer.element_format.bits
    qtype = getattr(quantizer, "qtype", None)
    return qtype.bits if isinstance(quantizer, FakeQuantizeBase) and qtype is not None else None
