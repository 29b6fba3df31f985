"""Make the BatchNorms that become parts of quantized layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tritonq.nn.batch_norm import FrozenBatchNorm, SyncBatchNorm
from tritonq.prepare.decide.constants import PlannedProgram
from tritonq.prepare.decide.frozen_norms import AffineStep, FrozenNorm
from tritonq.prepare.edit.called_layers import computed_parameters


def plain_batch_norm(bn: nn.modules.batchnorm._BatchNorm, kind: type[nn.Module]) -> nn.Module:
    """Return ``bn`` itself if its class is ``kind``, no subclass; else a BatchNorm that computes the same.

    The new one is a :class:`~tritonq.nn.batch_norm.SyncBatchNorm` if ``bn`` is a synchronized BatchNorm, else a
    ``kind``. It shares the parameters and buffers of ``bn`` and is in the mode of ``bn``, training or eval.
    """
    if type(bn) is kind:
        return bn
    plain: nn.Module
    if isinstance(bn, nn.SyncBatchNorm):
        plain = SyncBatchNorm(bn.num_features, bn.eps, bn.momentum, process_group=bn.process_group, device="meta")
    else:
        plain = kind(bn.num_features, bn.eps, bn.momentum, device="meta")
    plain._parameters.update({name: bn._parameters[name] for name in plain._parameters})
    plain._buffers.update({name: bn._buffers[name] for name in plain._buffers})
    return plain.train(bn.training)


@torch.no_grad()
def frozen_batch_norm(norm: FrozenNorm, model: nn.Module) -> FrozenBatchNorm:
    """Return a BatchNorm with one factor and one summand per channel that computes all steps of a frozen norm.

    A frozen norm is a module that multiplies and shifts each channel by constants. Factors and summands are computed
    from the parameters and buffers of ``model`` now; later changes of these have no effect.
    """
    weight, bias = torch.ones(()), torch.zeros(())
    for step in norm.steps:
        weight, bias = _followed_by(step, weight, bias, model)
    return FrozenBatchNorm(weight.expand(norm.channels), bias.expand(norm.channels))


def _followed_by(step: AffineStep, weight: Tensor, bias: Tensor, model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return ``(factor, summand)`` of the one affine map that computes ``x · weight + bias`` and then ``step``."""
    if step.operation == "batch_norm" and step.operands is not None:
        return _followed_by_batch_norm(step, step.operands, weight, bias, model)
    operand: Tensor | float = step.number
    if step.operands is not None:
        operand = computed_parameters(step.operands, model)()[0].reshape(-1)
        weight, bias = weight.to(operand), bias.to(operand)
    if step.operation == "add":
        return weight, bias + operand
    if step.operation == "sub":
        return weight, bias - operand
    if step.operation == "reversed_sub":
        return -weight, operand - bias
    return (weight * operand, bias * operand) if step.operation == "mul" else (weight / operand, bias / operand)


def _followed_by_batch_norm(
    step: AffineStep, operands: PlannedProgram, weight: Tensor, bias: Tensor, model: nn.Module
) -> tuple[Tensor, Tensor]:
    """Return ``(factor, summand)`` of the affine map that computes ``x · weight + bias`` and then a BatchNorm.

    The BatchNorm is ``step``; ``operands`` is the program that computes its statistics, γ and β (1 and 0 without) from
    the state of ``model``. Its own factor is ``γ / sqrt(running_var + eps)``, its summand ``β - running_mean ·
    factor``.
    """
    given = {}
    for role, value in zip(step.roles, operands.results, strict=True):
        given[role] = computed_parameters(operands.only(value), model)()[0]
    scale = torch.rsqrt(given["running_var"] + step.number) * given.get("weight", 1.0)
    shift = given.get("bias", 0.0) - given["running_mean"] * scale
    return weight.to(scale) * scale, bias.to(scale) * scale + shift
