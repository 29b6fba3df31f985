"""The two kinds of integers that the demo deploys, and how it trains each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class FineTuning:
    """How the demo fine-tunes for one kind of integers, and what it calls the result.

    Attributes:
        label: text of the progress bar.
        trained: name of the fine-tuned model, in eval mode, in the table, such as "QAT (eval)".
        converted: name of the converted model in the table, such as "converted".
        learning_rate: at the start of the fine-tuning.
        frozen_epochs: in so many epochs at the end, ranges and BatchNorm statistics stay as they will be deployed; 0:
            in none.
        examples: how many training images `prepare_qat` gets as example inputs.
    """

    label: str
    trained: str
    converted: str
    learning_rate: float
    frozen_epochs: int
    examples: int


# Codes with scales; and 8-bit fixed point, whose first fractional length comes from the example images.
INT8 = FineTuning("QAT", "QAT (eval)", "converted", learning_rate=0.005, frozen_epochs=2, examples=2)
FIXED_POINT = FineTuning(
    "fixed point", "fixed point (eval)", "integers", learning_rate=0.01, frozen_epochs=0, examples=64
)
