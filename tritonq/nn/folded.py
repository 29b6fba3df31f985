"""The module that takes the place of a BatchNorm which became part of the layer before it."""

from __future__ import annotations

from typing import Any

from torch import nn

_STATE_NAMES = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# What a BatchNorm holds.
BATCH_NORM_NAMES = frozenset((*_STATE_NAMES, "num_features", "eps", "momentum", "affine", "track_running_stats"))


class FoldedBatchNorm(nn.Identity):
    """Return the input unchanged, in the place of a BatchNorm that is part of a layer now.

    Args:
        kind: class name of the BatchNorm, such as ``"BatchNorm2d"``.
        layer: qualified name, in the model, of the layer that it is part of, such as ``"backbone.conv1"``.

    Attributes:
        kind: as the argument.
        layer: as the argument.

    Raises:
        AttributeError: a BatchNorm's statistics, weight or settings are read. ``fuse()`` of YOLO and ``reparameterize``
            of RepVGG-like models do so, and would merge it a second time. Only ``track_running_stats`` is there: False.
    """

    def __init__(self, kind: str, layer: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, layer
        self.track_running_stats = False

    def __getattr__(self, name: str) -> Any:
        if name in BATCH_NORM_NAMES:
            raise AttributeError(
                f"prepare_qat made this {self.kind} part of the layer {self.layer!r}, so that no {name} is left to "
                "read: merge BatchNorms and branches (fuse, reparameterize) before prepare_qat"
            )
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        """Return the text for ``repr``, such as ``"BatchNorm2d is part of backbone.conv1"``."""
        return f"{self.kind} is part of {self.layer}"
