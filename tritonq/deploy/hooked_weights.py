"""Weights that a hook computes before each forward: pruning masks, and weight and spectral norms of the older kind."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm


def settle_weights(module: nn.Module) -> None:
    """Make plain parameters of weights that pruning, weight or spectral norm compute by a hook; remove the hooks.

    The parameters have the values that the hooks compute now. What the hooks computed them from (``weight_orig``,
    ``weight_mask`` and the like) is removed, too. Only hooks of ``module`` itself count, not those of its children;
    without one nothing changes.
    """
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)
        elif isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
