"""`tritonq.reference.conv_bn` for ``torch.compile``."""

from __future__ import annotations

import torch
from torch import Tensor

from tritonq.backend import implementation
from tritonq.functional.traced.text import fake_qparams, own, pack, qparams, unpack
from tritonq.reference.conv_bn import BatchNormState, Normalization, TailGradients, TailResult, dense
from tritonq.reference.quantizer_state import QuantizerState


def forward(
    c: Tensor,
    ratio: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    bias: Tensor | None,
    norm: BatchNormState,
    quantizer: QuantizerState | None,
    ceiling: float | None,
) -> TailResult:
    """See the reference."""
    momentum = norm.momentum
    number, tensor = (0.0, momentum) if isinstance(momentum, Tensor) else (momentum, None)
    statistics = (norm.running_mean, norm.running_var)
    y, vectors, scale, zero_point, active = _forward(
        c, ratio, gamma, beta, bias, *statistics, number, tensor, norm.eps, *pack(quantizer), ceiling
    )
    normalization = Normalization(*(vectors[i] for i in range(len(Normalization._fields))))
    if quantizer is None:
        return TailResult(y, normalization, None)
    zero = None if quantizer.zero_point is None else zero_point
    return TailResult(y, normalization, QuantizerState(scale, zero, active, quantizer.qtype, known=True))


def backward(
    dy: Tensor,
    c: Tensor,
    result: Normalization,
    quantizer: QuantizerState | None,
    ceiling: float | None,
    out: Tensor | None = None,
) -> TailGradients:
    """See the reference; ``out`` is not used."""
    return TailGradients(*_backward(dy, c, list(result), *pack(quantizer), ceiling))


@torch.library.custom_op("tritonq::conv_bn_forward", mutates_args=("running_mean", "running_var", "buffers"))
def _forward(
    c: Tensor,
    ratio: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    momentum_tensor: Tensor | None,
    eps: float,
    buffers: list[Tensor],
    switches: list[Tensor],
    text: str,
    ceiling: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    norm = BatchNormState(running_mean, running_var, momentum if momentum_tensor is None else momentum_tensor, eps)
    state = unpack(buffers, switches, text)
    y, result, frozen = implementation("conv_bn", c).forward(c, ratio, gamma, beta, bias, norm, state, ceiling)
    vectors = torch.stack([vector.to(ratio.dtype) for vector in result])
    return own(y, dense(c), c), vectors, *qparams(frozen, c)


@_forward.register_fake
def _(
    c: Tensor,
    ratio: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    momentum_tensor: Tensor | None,
    eps: float,
    buffers: list[Tensor],
    switches: list[Tensor],
    text: str,
    ceiling: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    y = torch.empty_like(dense(c))
    vectors = ratio.new_empty((len(Normalization._fields), *ratio.shape))
    return y, vectors, *fake_qparams(unpack(buffers, switches, text), c)


@torch.library.custom_op("tritonq::conv_bn_backward", mutates_args=())
def _backward(
    dy: Tensor,
    c: Tensor,
    vectors: list[Tensor],
    buffers: list[Tensor],
    switches: list[Tensor],
    text: str,
    ceiling: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    state = unpack(buffers, switches, text)
    # The reference may overwrite the incoming gradient nowhere, and the convolution's output neither.
    dc, sum_g, sum_gn = implementation("conv_bn", c).backward(dy, c, Normalization(*vectors), state, ceiling)
    # Kernels return the sums as two views of one tensor.
    return own(dc, dense(c), dy, c), sum_g, own(sum_gn, vectors[0], sum_g)


@_backward.register_fake
def _(
    dy: Tensor,
    c: Tensor,
    vectors: list[Tensor],
    buffers: list[Tensor],
    switches: list[Tensor],
    text: str,
    ceiling: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(dense(c)), torch.empty_like(vectors[0]), torch.empty_like(vectors[0])
