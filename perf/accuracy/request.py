"""What a method gets and what describes it: a trained float model to be prepared for so many bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor, nn

FurtherLoss: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Request:
    """A float model to be prepared for training with rounding.

    Attributes:
        net: name in :data:`tritonq.perf.accuracy.nets.NETS`.
        classes: of its last layer.
        model: the trained float model; a method may change it.
        weights: bits of weights; first and last layer's have 8.
        activations: bits of activations; images and the last layer's input have 8.
        images: a batch to record a model or to calibrate ranges with.
        calibration: more images, for methods that are not trained.
    """

    net: str
    classes: int
    model: nn.Module
    weights: int
    activations: int
    images: Tensor
    calibration: Tensor


@dataclass(frozen=True)
class Method:
    """A way to train with rounding.

    Attributes:
        library: whose it is.
        make: returns the model that is trained.
        revision: raised when a change of the method alters its numbers; results of an earlier one are measured anew.
        at_all_widths: whether it is measured at W4A8, W3A3 and W2A2 as well.
        widths: the only bits of weights and activations at which it is measured; None: those of the plan.
        distributions: packages whose versions a result records.
        modules: top-level modules without which it is "not installed".
        differs: what it does otherwise than a tritonq preset, in one line.
        is_trained: whether the model is trained; else it is evaluated as it is made.
        further_loss: makes, of the prepared and the float model, what adds to the loss, given outputs and images.
        end_search: changes the model and its parameters after four fifths of the steps, with which the further loss
            ends; None: nothing changes.
    """

    library: str
    make: Callable[[Request], nn.Module]
    revision: int = 1
    at_all_widths: bool = False
    widths: tuple[tuple[int, int], ...] | None = None
    distributions: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    differs: str = ""
    is_trained: bool = True
    further_loss: Callable[[nn.Module, nn.Module], FurtherLoss] | None = None
    end_search: Callable[[nn.Module], object] | None = None
