"""Choose the computation of a layer's forward from the layer's state alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast, get_args

from tritonq.qconfig import Folding

Mode = Folding

Path = Literal[
    "train",
    "train_frozen",
    "train_operator",
    "train_approximate",
    "train_exact",
    "train_corrected",
    "train_scale",
    "eval_traced",
    "eval_integers",
    "eval_float",
]


@dataclass(frozen=True)
class LayerState:
    """The state of a layer that decides which computation its forward is.

    Attributes:
        training: whether the layer is in training mode.
        tracing: whether ``torch.compile`` traces it.
        knows_grids: whether input and weight have known grids of integers that are switched on, the input's per
            tensor, the weight's per tensor or per channel. False in training and while ``torch.compile`` traces.
        mode: how training folds its BatchNorm: ``"approximate"``, ``"exact"``, ``"corrected"`` or ``"scale"``, whose
            formulas :class:`tritonq.nn.batch_norm_layer.QATBatchNormLayer` has; None without a BatchNorm.
        frozen: whether its BatchNorm normalises with running statistics in training too.
        fits_operator: whether one operator can do a training step in mode ``"approximate"``: it can stand for the
            BatchNorm and the weight's quantizer, if there is one. False in other modes and in eval mode.
    """

    training: bool
    tracing: bool = False
    knows_grids: bool = False
    mode: Mode | None = None
    frozen: bool = False
    fits_operator: bool = False


def choose_path(state: LayerState) -> Path:
    """Return the name of the computation for a layer in this state: the first of the following that fits.

    - ``"train"``: training without a BatchNorm: the weight is rounded, and the layer runs in float.
    - ``"train_frozen"``: training with a ``frozen`` BatchNorm, in any mode: it is folded by its running statistics.
    - ``"train_operator"``, ``"train_approximate"``: training in mode "approximate", in one operator if the state
      ``fits_operator``, else in several.
    - ``"train_exact"``, ``"train_corrected"``, ``"train_scale"``: training in mode "exact", "corrected" or "scale".
    - ``"eval_traced"``: eval mode while ``tracing``: a graph that reads on the device whether grids are switched on.
    - ``"eval_integers"``: eval mode that ``knows_grids``: exact integers, as in the converted layer.
    - ``"eval_float"``: eval mode otherwise: the weight is rounded, and the layer runs in float.
    """
    if not state.training:
        if state.tracing:
            return "eval_traced"
        return "eval_integers" if state.knows_grids else "eval_float"
    if state.mode is None:
        return "train"
    if state.frozen:
        return "train_frozen"
    if state.mode == "exact":
        return "train_exact"
    if state.mode == "corrected":
        return "train_corrected"
    if state.mode == "scale":
        return "train_scale"
    return "train_operator" if state.fits_operator else "train_approximate"


def check_mode(mode: str) -> Mode:
    """Return ``mode`` if it is a mode of folding a BatchNorm: "approximate", "exact", "corrected" or "scale".

    Raises:
        ValueError: it is none.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"unknown mode {mode!r} of folding a BatchNorm; known: {', '.join(get_args(Mode))}")
    return cast(Mode, mode)
