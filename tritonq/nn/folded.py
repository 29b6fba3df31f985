"""What stands in the place of a BatchNorm that became part of the layer before it."""

from __future__ import annotations

from typing import Any

from torch import nn

_BATCH_NORM_NAMES = frozenset(
    ("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "eps", "momentum", "affine")
)


class FoldedBatchNorm(nn.Identity):
    """Passes its input on; a library that would merge the BatchNorm once more is told that there is none.

    Attributes:
        kind: class name of the BatchNorm.
        layer: name of the layer that it is part of.

    Raises:
        AttributeError: a BatchNorm's statistics, weight or settings are read, as ``fuse()`` of YOLO and
            ``reparameterize`` of RepVGG-like models do.
    """

    def __init__(self, kind: str, layer: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, layer

    def __getattr__(self, name: str) -> Any:
        if name in _BATCH_NORM_NAMES:
            raise AttributeError(
                f"prepare_qat made this {self.kind} part of the layer {self.layer!r}, so that no {name} is left to "
                "read: merge BatchNorms and branches (fuse, reparameterize) before prepare_qat"
            )
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        """Return where the BatchNorm is now."""
        return f"{self.kind} is part of {self.layer}"
