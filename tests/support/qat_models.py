"""Small quantization-aware models written by hand, trained for a few steps, for the tests of deployment."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

import tritonq
from tritonq import nn as qnn
from tritonq.nn.batch_norm_layer import QATBatchNormLayer
from tritonq.qconfig import Folding

TORCH_PRESETS = {
    f"{engine}_v{version}": tritonq.get_default_qat_qconfig(engine, version)
    for engine in ("fbgemm", "qnnpack", "onednn", "x86")
    for version in (0, 1)
}
OBSERVED_PRESETS = {
    name: tritonq.get_qconfig(name)
    for name in ("onnxruntime", "tensorrt", "megengine_ema", "megengine_min_max", "megengine_lowbit")
}
PRESETS = {**TORCH_PRESETS, **OBSERVED_PRESETS}


class Residual(nn.Module):
    """Conv-BN-ReLU, a depthwise convolution, a residual addition, pooling, a linear head without output quantizer."""

    def __init__(self, qconfig: tritonq.QConfig) -> None:
        super().__init__()
        self.input = qconfig.activation()
        self.stem = qnn.ConvBnReLU2d(3, 8, 3, padding=1, qconfig=qconfig)
        self.depthwise = qnn.ConvBnReLU2d(8, 8, 3, padding=1, groups=8, bias=False, qconfig=qconfig)
        self.point = qnn.ConvBn2d(8, 8, 1, qconfig=qconfig)
        self.add = qnn.Add(math.inf, qconfig=qconfig)
        self.pool = nn.AvgPool2d(4)
        self.pooled = qconfig.activation()
        self.head = qnn.Linear(32, 10, qconfig=tritonq.QConfig(nn.Identity, qconfig.weight))
        self.stem.set_input_quantizer(self.input)
        self.depthwise.set_input_quantizer(self.stem.activation_post_process)
        self.point.set_input_quantizer(self.depthwise.activation_post_process)
        self.head.set_input_quantizer(self.pooled)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(self.input(x))
        x = self.add(self.point(self.depthwise(x)), x)
        return self.head(self.pooled(self.pool(x)).flatten(1))


class FloatResidual(nn.Module):
    """The float model of :class:`Residual`'s shape, as a user would build it before loading a converted file."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.relu(self.point(torch.relu(self.bn(self.depthwise(x)))) + x)
        return self.head(x.mean((2, 3)))


class FloatPair(nn.Module):
    """Conv-BN-ReLU and a head: two layers, where compiling more of them would only take longer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.head = nn.Linear(36, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stem(x).flatten(1))


class OneLayer(nn.Module):
    """One layer behind an input quantizer, whose grid it knows or not."""

    def __init__(self, layer: nn.Module, qconfig: tritonq.QConfig, known_grid: bool = True) -> None:
        super().__init__()
        self.input, self.layer = qconfig.activation(), layer
        if known_grid:
            layer.set_input_quantizer(self.input)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.input(x))


def images(count: int = 16, seed: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def train(model: nn.Module, *batches: torch.Tensor, steps: int = 3) -> nn.Module:
    """Return ``model`` after a few steps of gradient descent, in eval mode."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for step in range(steps):
        inputs = batches or (images(8, seed=100 + step),)
        optimizer.zero_grad()
        model(*inputs).square().mean().backward()
        optimizer.step()
    return model.eval()


def after_one_batch(model: nn.Module, *inputs: torch.Tensor, **options: object) -> nn.Module:
    """Return what `prepare_qat` makes of a model, in eval mode and after one batch in training mode."""
    qat = tritonq.prepare_qat(model, example_inputs=inputs, **options).train()
    qat(*inputs)
    return qat.eval()


def trained_residual(preset: str = "tensorrt") -> Residual:
    torch.manual_seed(0)
    return train(Residual(PRESETS[preset]))


def trained_float_form(preset: str = "tensorrt") -> nn.Module:
    """Return a :class:`FloatResidual` after `prepare_qat` and some training."""
    torch.manual_seed(0)
    return train(tritonq.prepare_qat(FloatResidual(), qconfig=PRESETS[preset], example_inputs=images(2)))


def state_of(model: nn.Module) -> dict[str, object]:
    """Return everything that an operation which must not touch the model could have touched."""
    return {
        "modules": {name: type(module) for name, module in model.named_modules(remove_duplicate=False)},
        "modes": {name: module.training for name, module in model.named_modules()},
        "hooks": {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()},
        "tensors": copy.deepcopy(model.state_dict()),
    }


def assert_same_state(before: dict[str, object], after: dict[str, object]) -> None:
    for key in ("modules", "modes", "hooks"):
        assert before[key] == after[key]
    tensors, others = before["tensors"], after["tensors"]
    assert list(tensors) == list(others)
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)


def set_mode(model: nn.Module, mode: Folding) -> None:
    """Set how every BatchNorm of a model is folded in training."""
    for layer in model.modules():
        if isinstance(layer, QATBatchNormLayer):
            layer.mode = mode


def without_ranges(model: nn.Module) -> nn.Module:
    """Take from a prepared model the ranges that its example inputs gave."""
    for module in model.modules():
        if isinstance(module, tritonq.FakeQuantize):
            module.begin_anew()
    return model


class Named(nn.Module):
    """Gives its layers their input by name, or by position."""

    def __init__(self, named: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.named, self.first, self.second = named, nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(input=self.first(input=x).relu()) if self.named else self.second(self.first(x).relu())
