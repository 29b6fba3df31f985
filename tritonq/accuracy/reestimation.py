"""Measure the statistics of BatchNorms anew, for the weights that will be deployed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tritonq.calibration import model_batches, modes_restored
from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.nn.batch_norm import FrozenBatchNorm
from tritonq.nn.batch_norm_layer import QATBatchNormLayer
from tritonq.nn.folded import FoldedBatchNorm

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


class _Statistics:
    """Sums of the means and mean squares of batches, in float64, for one BatchNorm.

    Its momentum is None meanwhile, so that its buffers hold the averages over its runs in the last batch.
    """

    def __init__(self, bn: _BatchNorm) -> None:
        self._bn = bn
        self._mean, self._var, self._count = (cast(Tensor, bn._buffers[name]) for name in _BUFFERS)
        self._before = (self._mean.clone(), self._var.clone())
        self._sum = self._squares = torch.zeros_like(self._mean, dtype=torch.float64)
        self._batches = 0
        self.put_back()

    def take_batch(self) -> None:
        """Add the statistics of the last batch, if it went through this BatchNorm.

        Then restore the running statistics from before all batches (:meth:`put_back`).
        """
        if int(self._count):
            mean = self._mean.double()
            self._sum, self._squares = self._sum + mean, self._squares + self._var.double() + mean.square()
            self._batches += 1
        self.put_back()

    def put_back(self) -> None:
        """Restore the running mean and variance from before all batches, and set ``num_batches_tracked`` to 0.

        In some modes of folding a layer's forward reads these statistics; so every batch sees the same.
        """
        self._mean.copy_(self._before[0])
        self._var.copy_(self._before[1])
        self._count.zero_()

    def write(self) -> None:
        """Write ``E[mean_b]`` and ``E[var_b + mean_b²] - mean²`` over all batches into the running statistics.

        E is the mean over batches b. If no batch went through the BatchNorm, leave them as they are.
        """
        if self._batches:
            mean = self._sum / self._batches
            self._mean.copy_(mean)
            self._var.copy_((self._squares / self._batches - mean.square()).clamp(min=0))


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, data: Any) -> nn.Module:
    """Measure running means and variances anew on ``data``, with weights and quantizers as they are.

    Running statistics are averages over the last hundreds of steps, so over other weights than those that are deployed.
    At 4 bits and fewer a weight that oscillates between two codes changes its channel's statistics in every step, and
    evaluation loses points of accuracy that this gives back. Each BatchNorm that runs gets, over all batches b,

        ``mean = E[mean_b]``, ``var = E[var_b + mean_b²] - mean²``,

    where ``var_b`` is unbiased and every batch counts the same, whatever its size; ``mean_b`` and ``var_b`` of a
    BatchNorm that runs several times in a batch are averages over its runs. A batch is normalised with its own
    statistics, as in training: let batches be as large as in training. BatchNorms of layers with ``freeze_bn`` are
    measured too; a FrozenBatchNorm is not. Ranges and scales do not change, and dropout is off meanwhile. Afterwards
    modes, ``freeze_bn`` and ``num_batches_tracked`` are as before; if it raises, so are the statistics.

    Args:
        model: a trained model, prepared or not, whose running statistics change in place.
        data: one input tensor, or an iterable of batches, such as a data loader (labels are left out), as
            :func:`tritonq.calibrate` takes them; some thousand samples are enough.

    Returns:
        ``model``.

    Raises:
        ValueError: no BatchNorm with running statistics; ``data`` has no batch, or is neither a tensor nor iterable; or
            a batch gives a BatchNorm a single value per channel.

    Source: Nagel et al., "Overcoming Oscillations in Quantization-Aware Training" (2022), section 3.3; Wu & Johnson,
        "Rethinking Batch in BatchNorm" (2021), for the variance over batches.

    Examples:
        >>> bn = nn.BatchNorm1d(1)
        >>> _ = reestimate_batch_norm(nn.Sequential(bn), [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0]])])
        >>> bn.running_mean, bn.running_var
        (tensor([4.]), tensor([6.]))
    """
    norms = [bn for bn in model.modules() if _is_measured(bn)]
    if not norms:
        raise ValueError(f"{type(model).__name__} has no BatchNorm with running statistics")
    with modes_restored(model), _measuring(model, norms):
        statistics = [_Statistics(bn) for bn in norms]
        try:
            for args, kwargs in model_batches(model, data):
                model(*args, **kwargs)
                for item in statistics:
                    item.take_batch()
        finally:
            for item in statistics:
                item.put_back()
        for item in statistics:
            item.write()
    return model


def _is_measured(module: nn.Module) -> TypeGuard[_BatchNorm]:
    is_norm = isinstance(module, _BatchNorm) and not isinstance(module, (FrozenBatchNorm, FoldedBatchNorm))
    return is_norm and module.running_var is not None


@contextmanager
def _measuring(model: nn.Module, norms: list[_BatchNorm]) -> Iterator[None]:
    """Set eval mode inside the block, but let BatchNorms normalise by their batch and store its statistics.

    Inside, their momentum is None, frozen layers are not frozen, and observers are off; all three are put back
    afterwards. The caller restores the modes.
    """
    momenta = [(bn, bn.momentum, bn.num_batches_tracked) for bn in norms]
    layers = [layer for layer in model.modules() if isinstance(layer, QATBatchNormLayer)]
    frozen = [layer for layer in layers if layer.freeze_bn]
    quantizers = [module for module in model.modules() if isinstance(module, FakeQuantizeBase)]
    switches = [quantizer.observer_enabled.clone() for quantizer in quantizers]
    try:
        model.eval()
        for quantizer in quantizers:
            quantizer.disable_observer()
        for layer in layers:
            layer.training = True
            layer.freeze_bn = False
            if layer.batch_norm_place.module is not None:
                layer.batch_norm_place.module.training = True
        for bn in norms:
            bn.training = True
            bn.momentum = None
            device = cast(Tensor, bn.running_mean).device
            bn.num_batches_tracked = torch.zeros((), dtype=torch.long, device=device)
        yield
    finally:
        for bn, momentum, count in momenta:
            bn.momentum, bn.num_batches_tracked = momentum, count
        for layer in frozen:
            layer.freeze_bn = True
        for quantizer, switch in zip(quantizers, switches, strict=True):
            quantizer.observer_enabled.copy_(switch)
