"""Switch observation, rounding and BatchNorm statistics of a prepared model on and off.

Each function works on a module and everything inside it: ``enable_observer(model)`` and torch.ao's
``model.apply(enable_observer)`` do the same. They also switch modules that torch.ao or torchao prepared, accelerated or
not.
"""

from __future__ import annotations

from torch import nn

from tritonq.nn.batch_norm_layer import QATBatchNormLayer
from tritonq.switched_quantizer import SwitchedQuantizer


def enable_observer(module: nn.Module) -> None:
    """Let fake quantizers in ``module`` update their ranges, tritonq's in training mode only.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.ConvBn2d(3, 4, 1, qconfig=tritonq.get_qconfig())
        >>> enable_observer(layer)
        >>> layer.activation_post_process.observer_enabled
        tensor([1], dtype=torch.uint8)
    """
    _call(module, SwitchedQuantizer, "enable_observer")


def disable_observer(module: nn.Module) -> None:
    """Stop fake quantizers in ``module`` from updating their ranges; they keep the last ones.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.ConvBn2d(3, 4, 1, qconfig=tritonq.get_qconfig())
        >>> disable_observer(layer)
        >>> layer.activation_post_process.observer_enabled
        tensor([0], dtype=torch.uint8)
    """
    _call(module, SwitchedQuantizer, "disable_observer")


def enable_fake_quant(module: nn.Module) -> None:
    """Let fake quantizers in ``module`` round; those of tritonq that have no range yet still let values pass.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.ConvBn2d(3, 4, 1, qconfig=tritonq.get_qconfig())
        >>> enable_fake_quant(layer)
        >>> layer.weight_fake_quant.fake_quant_enabled
        tensor([1], dtype=torch.uint8)
    """
    _call(module, SwitchedQuantizer, "enable_fake_quant")


def disable_fake_quant(module: nn.Module) -> None:
    """Let values pass the fake quantizers in ``module`` unrounded; observers go on.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.ConvBn2d(3, 4, 1, qconfig=tritonq.get_qconfig())
        >>> disable_fake_quant(layer)
        >>> layer.weight_fake_quant.fake_quant_enabled
        tensor([0], dtype=torch.uint8)
    """
    _call(module, SwitchedQuantizer, "disable_fake_quant")


def freeze_bn_stats(module: nn.Module) -> None:
    """Let fused BatchNorms in ``module`` use their running statistics, in training too, and not update these.

    BatchNorms that are modules of their own stay as they are. Fixed-point layers still train with the statistics of
    each batch, as F8Net does.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.ConvBn2d(3, 4, 1, qconfig=tritonq.get_qconfig())
        >>> freeze_bn_stats(layer)
        >>> _ = layer.train()(torch.randn(2, 3, 4, 4))
        >>> layer.bn.running_mean
        tensor([0., 0., 0., 0.])
    """
    _call(module, QATBatchNormLayer, "freeze_bn_stats")


def update_bn_stats(module: nn.Module) -> None:
    """Undo :func:`freeze_bn_stats`: in training fused BatchNorms use and update statistics as before.

    They normalize with the batch's and update the running ones. A BatchNorm that the float model had frozen stays so.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.ConvBn2d(3, 4, 1, qconfig=tritonq.get_qconfig())
        >>> freeze_bn_stats(layer)
        >>> update_bn_stats(layer)
        >>> layer.bn.training
        True
    """
    _call(module, QATBatchNormLayer, "update_bn_stats")


def _call(module: nn.Module, kind: type[nn.Module], switch: str) -> None:
    """Call the method ``switch`` of modules of the class ``kind``, and of those of torch.ao or torchao with it."""
    for child in module.modules():
        if isinstance(child, kind) or (_is_of_library(child) and hasattr(child, switch)):
            getattr(child, switch)()


def _is_of_library(module: nn.Module) -> bool:
    """Whether a module is of a class of torch.ao or torchao."""
    return any(base.__module__.startswith(("torch.ao.", "torchao.")) for base in type(module).__mro__)
