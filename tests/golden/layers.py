"""Every quantization-aware module by itself: trained, evaluated and converted."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tritonq
from golden.inputs import fill, indices, values
from golden.operators import Case
from golden.training import evaluate, train, trained_and_evaluated
from tritonq import nn as qnn

_TENSORRT = tritonq.get_qconfig("tensorrt")
_X86 = tritonq.get_default_qat_qconfig("x86")


class Behind(nn.Module):
    """A layer whose input comes from a quantizer that it knows, or does not know."""

    def __init__(self, layer: nn.Module, qconfig: tritonq.QConfig, known: bool = True) -> None:
        super().__init__()
        self.quantizer, self.layer = qconfig.activation(), layer
        if known:
            layer.set_input_quantizer(self.quantizer)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.quantizer(x))


_CONV = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1, "bias": True}
_IMAGE, _LINE, _VOLUME = (4, 4, 5, 6), (4, 4, 9), (2, 4, 3, 4, 3)

_LAYERS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any], tuple[int, ...]]] = {
    "Conv1d": (qnn.Conv1d, {**_CONV, "stride": 2}, _LINE),
    "Conv2d": (qnn.Conv2d, _CONV, _IMAGE),
    "Conv2d/reflect": (qnn.Conv2d, {**_CONV, "padding_mode": "reflect"}, _IMAGE),
    "Conv2d/same": (qnn.Conv2d, {**_CONV, "kernel_size": (2, 3), "padding": "same"}, _IMAGE),
    "Conv2d/unbatched": (qnn.Conv2d, _CONV, _IMAGE[1:]),
    "Conv2d/grouped": (qnn.Conv2d, {**_CONV, "groups": 2, "bias": False}, _IMAGE),
    "Conv3d": (qnn.Conv3d, _CONV, _VOLUME),
    "ConvReLU1d": (qnn.ConvReLU1d, _CONV, _LINE),
    "ConvReLU2d": (qnn.ConvReLU2d, _CONV, _IMAGE),
    "ConvReLU3d": (qnn.ConvReLU3d, _CONV, _VOLUME),
    "ConvTranspose2d": (qnn.ConvTranspose2d, {**_CONV, "stride": 2, "output_padding": 1, "groups": 2}, _IMAGE),
    "ConvTransposeReLU2d": (qnn.ConvTransposeReLU2d, _CONV, _IMAGE),
    "Linear": (qnn.Linear, {"in_features": 6, "out_features": 5}, (3, 4, 6)),
    "LinearReLU": (qnn.LinearReLU, {"in_features": 6, "out_features": 5}, (8, 6)),
    "ConvBn1d": (qnn.ConvBn1d, _CONV, _LINE),
    "ConvBn2d": (qnn.ConvBn2d, _CONV, _IMAGE),
    "ConvBn2d/depthwise": (qnn.ConvBn2d, {**_CONV, "out_channels": 4, "groups": 4, "bias": False}, _IMAGE),
    "ConvBn2d/replicate": (qnn.ConvBn2d, {**_CONV, "padding_mode": "replicate"}, _IMAGE),
    "ConvBn2d/exact": (qnn.ConvBn2d, {**_CONV, "mode": "exact"}, _IMAGE),
    "ConvBn2d/corrected": (qnn.ConvBn2d, {**_CONV, "mode": "corrected"}, _IMAGE),
    "ConvBn2d/frozen": (qnn.ConvBn2d, {**_CONV, "freeze_bn": True}, _IMAGE),
    "ConvBn2d/cumulative": (qnn.ConvBn2d, {**_CONV, "momentum": None}, _IMAGE),
    "ConvBn3d": (qnn.ConvBn3d, _CONV, _VOLUME),
    "ConvBnReLU1d": (qnn.ConvBnReLU1d, _CONV, _LINE),
    "ConvBnReLU2d": (qnn.ConvBnReLU2d, _CONV, _IMAGE),
    "ConvBnReLU2d/frozen": (qnn.ConvBnReLU2d, {**_CONV, "freeze_bn": True}, _IMAGE),
    "ConvBnReLU2d/exact": (qnn.ConvBnReLU2d, {**_CONV, "mode": "exact"}, _IMAGE),
    "ConvBnReLU3d": (qnn.ConvBnReLU3d, _CONV, _VOLUME),
    "ConvTransposeBn2d": (qnn.ConvTransposeBn2d, {**_CONV, "stride": 2, "groups": 2}, _IMAGE),
    "ConvTransposeBnReLU2d": (qnn.ConvTransposeBnReLU2d, _CONV, _IMAGE),
    "LinearBn1d": (qnn.LinearBn1d, {"in_features": 6, "out_features": 5}, (8, 6)),
    "LinearBnReLU1d": (qnn.LinearBnReLU1d, {"in_features": 6, "out_features": 5}, (8, 6)),
    "QATRepVGGBlock": (qnn.QATRepVGGBlock, {"in_channels": 4, "out_channels": 4}, _IMAGE),
    "QATRepVGGBlock/sigmoid": (
        qnn.QATRepVGGBlock,
        {"in_channels": 4, "out_channels": 6, "stride": 2, "learned_alpha": True, "activation": nn.Sigmoid()},
        _IMAGE,
    ),
    "QATRepVGGBlock/linear": (qnn.QATRepVGGBlock, {"in_channels": 4, "out_channels": 4, "activation": None}, _IMAGE),
    "FixedPointConv2d": (qnn.FixedPointConv2d, _CONV, _IMAGE),
    "FixedPointConvBn2d": (qnn.FixedPointConvBn2d, {**_CONV, "signed_input": True}, _IMAGE),
    "FixedPointLinear": (qnn.FixedPointLinear, {"in_features": 6, "out_features": 5}, (8, 6)),
}


def _layer(name: str, known: bool, qconfig: tritonq.QConfig = _TENSORRT, prepare: Any = None) -> dict[str, Any]:
    make, arguments, shape = _LAYERS[name]
    if name.startswith("FixedPoint"):
        return trained_and_evaluated(fill(make(**arguments)), *shape)
    model = Behind(fill(make(**arguments, qconfig=qconfig)), qconfig, known)
    if prepare is not None:
        prepare(model.layer)
    parts = trained_and_evaluated(model, *shape)
    x = values(*shape, seed=50)
    with torch.no_grad():
        parts["converted"] = tritonq.convert(model, allow_unquantized=True)(x)
        parts["copy"] = copy.deepcopy(model)(x)
        if known and prepare is None:
            parts["bfloat16"] = model(x.bfloat16())
    return parts


def _switched_off(layer: nn.Module) -> None:
    layer.weight_fake_quant.disable_fake_quant()


def _bounded(layer: nn.Module) -> None:
    layer.ceiling = 1.5


def _without_output(layer: nn.Module) -> None:
    layer.activation_post_process = nn.Identity()


def _hooked(layer: nn.Module) -> None:
    layer.activation_post_process.register_forward_hook(lambda module, args, output: output * 2)


class Recomputed(nn.Module):
    """A layer under gradient checkpointing."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=False) if self.training else self.layer(x)


def _recomputed(name: str) -> dict[str, Any]:
    make, arguments, shape = _LAYERS[name]
    qconfig = {} if name.startswith("FixedPoint") else {"qconfig": _TENSORRT}
    return trained_and_evaluated(Recomputed(fill(make(**arguments, **qconfig))), *shape)


def _traced(name: str) -> dict[str, Any]:
    """A layer in a graph, whose switches are then thrown."""
    make, arguments, shape = _LAYERS[name]
    model = Behind(fill(make(**arguments, qconfig=_TENSORRT)), _TENSORRT)
    train(model, lambda number: (values(*shape, seed=number),))
    traced, x = torch.compile(model.eval(), backend="eager", fullgraph=True), values(*shape, seed=50)
    parts = evaluate(traced, x)
    with torch.no_grad():
        model.layer.weight_fake_quant.disable_fake_quant()
        parts["weight off"] = traced(x)
        model.layer.weight_fake_quant.enable_fake_quant()
        model.layer.activation_post_process.disable_fake_quant()
        parts["output off"] = traced(x)
    torch._dynamo.reset()
    return parts


class Joined(nn.Module):
    """A join of two quantized branches."""

    def __init__(self, join: nn.Module, qconfig: tritonq.QConfig, known: bool) -> None:
        super().__init__()
        self.left, self.right, self.join = qconfig.activation(), qconfig.activation(), join
        if known:
            join.set_input_quantizers(self.left, self.right)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.left(x), self.right(x.flip(0) * 0.75)
        return self.join([left, right]) if isinstance(self.join, qnn.Cat) else self.join(left, right)


def _added(ceiling: float | None, qconfig: tritonq.QConfig, known: bool) -> dict[str, Any]:
    model = Joined(qnn.Add(ceiling, qconfig=qconfig), qconfig, known)
    parts = trained_and_evaluated(model, *_IMAGE)
    with torch.no_grad():
        parts["converted"] = tritonq.convert(model)(values(*_IMAGE, seed=50))
    return parts


class Arithmetic(nn.Module):
    """All methods of FloatFunctional."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.ModuleList(qnn.FloatFunctional(_TENSORRT) for _ in range(7))

    def forward(self, x: Tensor) -> Tensor:
        f = self.f
        y = f[0].add(x, f[1].add_scalar(x, 0.5))
        y = f[2].mul(y, f[3].mul_scalar(x, 0.25))
        y = f[4].cat([y, f[5].add_relu(x, y)], 1)
        return f[6].matmul(y, y.transpose(-1, -2))


class Tables(nn.Module):
    """Both embeddings."""

    def __init__(self, qconfig: tritonq.QConfig) -> None:
        super().__init__()
        self.embedding, self.bag = qnn.Embedding(10, 6, qconfig=qconfig), qnn.EmbeddingBag(10, 6, qconfig=qconfig)

    def forward(self, i: Tensor) -> Tensor:
        return self.embedding(i) + self.bag(i)[:, None]


def _embedded() -> dict[str, Any]:
    model = fill(Tables(tritonq.default_embedding_qat_qconfig))
    parts = train(model, lambda step: (indices(4, 5, below=10, seed=step),))
    parts["state"] = model.state_dict()
    with torch.no_grad():
        x = indices(4, 5, below=10)
        parts["eval"] = model.eval()(x)
        parts["converted"] = tritonq.convert(model)(x)
    return parts


def _quantizer(make: Callable[[], nn.Module]) -> dict[str, Any]:
    return trained_and_evaluated(make(), 4, 3, 5, 5, steps=3)


def _quantizers() -> Iterator[Case]:
    observers: dict[str, dict[str, Any]] = {
        "MinMaxObserver": {},
        "MovingAverageMinMaxObserver": {"qscheme": torch.per_tensor_affine, "dtype": torch.quint8},
        "PerChannelMinMaxObserver": {"ch_axis": 1, "qscheme": torch.per_channel_affine},
        "MovingAveragePerChannelMinMaxObserver": {"ch_axis": 1, "qscheme": torch.per_channel_symmetric},
        "HistogramObserver": {},
        "InterpolatingHistogramObserver": {},
    }
    for name, arguments in observers.items():
        yield (
            f"FakeQuantize/{name}",
            lambda n=name, a=arguments: _quantizer(lambda: tritonq.FakeQuantize(getattr(tritonq, n), **a)),
        )
    yield (
        "FakeQuantize/copy_above",
        lambda: _quantizer(lambda: tritonq.FakeQuantize(tritonq.MovingAverageMinMaxObserver, copy_above=1.5)),
    )
    yield "LearnedStepFakeQuantize", lambda: _quantizer(tritonq.LearnedStepFakeQuantize)
    yield (
        "LearnedStepFakeQuantize/zero point",
        lambda: _quantizer(lambda: tritonq.LearnedStepFakeQuantize(dtype=torch.quint8, learn_zero_point=True)),
    )
    yield "TrainedThresholdFakeQuantize", lambda: _quantizer(tritonq.TrainedThresholdFakeQuantize)
    yield "ClippedFakeQuantize", lambda: _quantizer(lambda: tritonq.ClippedFakeQuantize(dtype="quint8"))
    for choice in ("search", "std", "mean_abs", "rms"):
        yield (
            f"FixedPointFakeQuantize/{choice}",
            lambda c=choice: _quantizer(lambda: tritonq.FixedPointFakeQuantize(choice=c)),
        )
    yield (
        "FixedPointFakeQuantize/axis",
        lambda: _quantizer(lambda: tritonq.FixedPointFakeQuantize(word_len=4, axis=1, momentum=0.5)),
    )


def cases() -> Iterator[Case]:
    """Name and computation of every module's cases."""
    for name in _LAYERS:
        yield name, lambda n=name: _layer(n, known=True)
    for name in ("Conv2d", "ConvBnReLU2d", "Linear"):
        yield f"{name}/unknown input", lambda n=name: _layer(n, known=False)
        yield f"{name}/x86", lambda n=name: _layer(n, known=True, qconfig=_X86)
        yield f"{name}/weight off", lambda n=name: _layer(n, known=True, prepare=_switched_off)
        yield f"{name}/float output", lambda n=name: _layer(n, known=True, prepare=_without_output)
        yield f"{name}/hook", lambda n=name: _layer(n, known=True, prepare=_hooked)
    for name in ("ConvReLU2d", "ConvBnReLU2d", "LinearReLU", "QATRepVGGBlock"):
        yield f"{name}/bounded", lambda n=name: _layer(n, known=True, prepare=_bounded)
    for name in ("ConvBnReLU2d", "ConvBn2d/exact", "LinearReLU", "FixedPointConvBn2d"):
        yield f"{name}/recomputed", lambda n=name: _recomputed(n)
    for name in ("Conv2d", "ConvBnReLU2d", "ConvTranspose2d", "Linear"):
        yield f"{name}/traced", lambda n=name: _traced(n)
    for ceiling in (None, math.inf, 1.5):
        for preset, qconfig in (("tensorrt", _TENSORRT), ("x86", _X86)):
            for known in (True, False):
                yield (
                    f"Add/{ceiling}/{preset}/{'known' if known else 'unknown'}",
                    lambda c=ceiling, q=qconfig, k=known: _added(c, q, k),
                )
    yield "Cat", lambda: trained_and_evaluated(Joined(qnn.Cat(1, qconfig=_TENSORRT), _TENSORRT, False), *_IMAGE)
    yield "FloatFunctional", lambda: trained_and_evaluated(Arithmetic(), *_IMAGE)
    yield "Embedding", _embedded
    yield from _quantizers()


def quietly(case: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run ``case`` without its warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return case()
