"""Every public function on tensors, with its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import tritonq
from golden.inputs import values

Case = tuple[str, Callable[[], dict[str, Any]]]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_SPECIAL = [0.0, -0.0, 0.5, -1.5, 1e30, -1e30, float("inf"), float("-inf"), float("nan"), 1e-40]


def _activation(dtype: torch.dtype, seed: int = 0) -> Tensor:
    """(2, 3, 4, 5) with ties, values beyond every grid and non-finite ones."""
    x = values(2, 3, 4, 5, seed=seed, step=1 / 16)
    x.view(-1)[: len(_SPECIAL)] = torch.tensor(_SPECIAL)
    return x.to(dtype)


def _differentiated(function: Callable[..., Tensor], *tensors: Tensor) -> dict[str, Any]:
    leaves = [t.clone().requires_grad_() if t.is_floating_point() else t for t in tensors]
    y = function(*leaves)
    y.backward(values(*y.shape, seed=9).to(y.dtype))
    return {"result": y.detach(), "gradients": [leaf.grad for leaf in leaves if leaf.grad is not None]}


def _fake_quantize(dtype: torch.dtype) -> Iterator[Case]:
    scales, zeros = torch.tensor([0.25, 0.1, 0.5]), torch.tensor([3, 0, -7], dtype=torch.int32)
    for rounding in ("half_even", "half_away"):
        yield (
            f"per_tensor/{rounding}",
            lambda r=rounding: _differentiated(
                lambda x: tritonq.fake_quantize_per_tensor_affine(x, 0.25, 3, -8, 7, rounding=r), _activation(dtype)
            ),
        )
        yield (
            f"per_channel/{rounding}",
            lambda r=rounding: _differentiated(
                lambda x: tritonq.fake_quantize_per_channel_affine(x, scales, zeros, 1, -128, 127, rounding=r),
                _activation(dtype),
            ),
        )
    yield (
        "learnable",
        lambda: _differentiated(
            lambda x, s, z: tritonq.fake_quantize_learnable(x, s, z, -8, 7, grad_factor=0.5),
            values(2, 3, 4, 5).to(dtype),
            torch.tensor([0.25]),
            torch.tensor([1.0]),
        ),
    )
    yield (
        "learnable/channels",
        lambda: _differentiated(
            lambda x, s: tritonq.fake_quantize_learnable(x, s, torch.zeros(3, dtype=torch.int32), -8, 7, axis=1),
            values(2, 3, 4, 5).to(dtype),
            torch.tensor([0.25, 0.5, 1.0]),
        ),
    )
    yield (
        "trained_threshold",
        lambda: _differentiated(
            lambda x, t: tritonq.trained_threshold_quantize(x, t, -128, 127),
            values(2, 3, 4, 5).to(dtype),
            torch.tensor([1.0]),
        ),
    )
    yield (
        "clipped",
        lambda: _differentiated(
            lambda x, a: tritonq.clipped_quantize(x, a, 4), values(2, 3, 4, 5).to(dtype), torch.tensor([2.0])
        ),
    )


def _fixed_point(dtype: torch.dtype) -> Iterator[Case]:
    x = values(3, 40, step=1 / 256).to(dtype)
    for axis in (None, 0):
        lengths = torch.tensor([5], dtype=torch.int32) if axis is None else torch.tensor([3, 5, 7], dtype=torch.int32)
        yield (
            f"fixed_point/axis {axis}",
            lambda f=lengths, a=axis: _differentiated(lambda t: tritonq.fixed_point_quantize(t, f, 8, True, axis=a), x),
        )
    yield "search_frac_len", lambda: {"result": tritonq.search_frac_len(x, 8)}
    yield "statistic_frac_len", lambda: {"result": tritonq.statistic_frac_len(x, 8)}


def _histogram(dtype: torch.dtype) -> Iterator[Case]:
    yield "histogram", lambda: {"result": tritonq.histogram(values(500).to(dtype), 16, -2.0, 2.0)}


def _folding() -> Iterator[Case]:
    vector = values(4, seed=1, step=1 / 16, levels=16)
    var, gamma = vector.abs() + 0.5, vector + 1
    for name, shape, transposed, groups in (
        ("dense", (4, 3, 3, 3), False, 1),
        ("transposed", (4, 2, 3, 3), True, 2),
    ):
        yield (
            f"fold_conv_bn/{name}",
            lambda s=shape, t=transposed, g=groups: {
                "result": list(
                    tritonq.fold_conv_bn(values(*s), vector, vector, var, gamma, vector, 1e-5, transposed=t, groups=g)
                )
            },
        )
    yield (
        "quantize_bias",
        lambda: _differentiated(
            lambda b: tritonq.quantize_bias(b, torch.tensor([0.1]), torch.tensor([0.01, 0.02, 0.03])),
            values(3, seed=2),
        ),
    )
    yield "fuse_conv_bn", _fused


def _fused() -> dict[str, Any]:
    from golden.inputs import fill

    pair = fill(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).eval()
    return {"result": tritonq.fuse_conv_bn(pair[0], pair[1]).state_dict()}


def _qparams() -> Iterator[Case]:
    low, high = torch.tensor([-1.0, 0.5, 0.0, -3.0]), torch.tensor([2.0, 3.0, 0.0, -1.0])
    for name, qtype in {
        "int8": tritonq.QuantizedType.of(8),
        "uint8": tritonq.QuantizedType.of(8, signed=False),
        "int4": tritonq.QuantizedType.of(4),
    }.items():
        for rule in ("torch", "torch_v1", "megengine"):
            yield (
                f"range_to_qparams/{name}/{rule}",
                lambda q=qtype, r=rule: {"result": list(tritonq.range_to_qparams(low, high, q, rule=r))},
            )


def cases() -> Iterator[Case]:
    """Name and computation of every function's cases."""
    for dtype in _DTYPES:
        for family in (_fake_quantize, _fixed_point, _histogram):
            for name, case in family(dtype):
                yield f"{name}/{str(dtype).removeprefix('torch.')}", case
    yield from _folding()
    yield from _qparams()
