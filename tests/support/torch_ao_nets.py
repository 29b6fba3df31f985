"""Models that torch.ao's eager quantization-aware training prepared."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn
from torch.ao import quantization as ao
from torch.ao.nn.quantized import FloatFunctional

from tolerances import SUMS, assert_close

FUSED = [
    ["conv", "norm", "relu"],
    ["branch", "branch_norm"],
    ["wide", "wide_relu"],
    ["hidden", "hidden_relu"],
    ["fc", "fc_norm"],
]


class EveryKind(nn.Module):
    """Each kind of layer and operation that torch.ao prepares in two dimensions, and linear ones."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = ao.QuantStub(), ao.DeQuantStub()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm, self.relu = nn.BatchNorm2d(8, eps=1e-3, momentum=0.03), nn.ReLU()
        self.branch, self.branch_norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=None)
        self.join, self.pool = FloatFunctional(), nn.MaxPool2d(2)
        self.wide, self.wide_relu = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU()
        self.grouped, self.clip = nn.Conv2d(8, 8, 1, groups=4), nn.ReLU6()
        self.hidden, self.hidden_relu = nn.Linear(8, 4), nn.ReLU()
        self.fc, self.fc_norm = nn.Linear(4, 4), nn.BatchNorm1d(4)
        self.sum, self.product, self.head = FloatFunctional(), FloatFunctional(), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, 4) for (batch, 3, 8, 8)."""
        x = self.relu(self.norm(self.conv(self.quant(x))))
        x = self.pool(self.join.add_relu(x, self.branch_norm(self.branch(x))))
        x = self.clip(self.grouped(self.wide_relu(self.wide(x)))).mean((2, 3))
        x = self.hidden_relu(self.hidden(x))
        x = self.sum.add(self.fc_norm(self.fc(x)), x)
        return self.dequant(self.head(self.product.mul(x, x)))


class OtherDimensions(nn.Module):
    """The kinds of one and three dimensions, with and without BatchNorm and ReLU, and functions with quantizers."""

    def __init__(self) -> None:
        super().__init__()
        self.quant, self.dequant = ao.QuantStub(), ao.DeQuantStub()
        self.flat, self.deep = _row(nn.Conv1d, nn.BatchNorm1d), _row(nn.Conv3d, nn.BatchNorm3d)
        self.functions = nn.Sequential(nn.Sigmoid(), nn.Tanh(), nn.Hardswish(), nn.LeakyReLU(), nn.ELU())

    def forward(self, x: Tensor) -> Tensor:
        """Return (batch, 12, 64) for (batch, 3, 8, 8)."""
        x = self.quant(x)
        flat = self.functions(self.flat(x.flatten(2)))
        deep = self.deep(x.unflatten(3, (2, 4)))
        return torch.cat([self.dequant(flat), self.dequant(deep).flatten(2)], 1)


def _row(conv: type[nn.Module], norm: type[nn.Module]) -> nn.Sequential:
    first = (conv(3, 4, 3, padding=1, bias=False), norm(4, eps=1e-3), nn.ReLU())
    second = (conv(4, 4, 3, padding=1), norm(4))
    return nn.Sequential(*first, *second, conv(4, 4, 1), nn.ReLU(), conv(4, 6, 1, groups=2))


def _rows(name: str) -> list[list[str]]:
    return [[f"{name}.{index}" for index in row] for row in ((0, 1, 2), (3, 4), (5, 6))]


def prepared(qconfig: ao.QConfig, model: nn.Module | None = None) -> nn.Module:
    """Return a fused and prepared model, in training mode."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = [*_rows("flat"), *_rows("deep")] if isinstance(model, OtherDimensions) else FUSED
        model = ao.fuse_modules_qat((model or EveryKind()).train(), rows)
        model.qconfig = qconfig
        return ao.prepare_qat(model)


def in_float64(model: nn.Module) -> nn.Module:
    """Give ``model``, in place, parameters and BatchNorms in float64; quantizers keep their buffers."""
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.double()
    return model


def assert_compiled_gradients_equal(eager: nn.Module, x: Tensor) -> nn.Module:
    """Compare the gradients of one step with those of a compiled copy, which is returned; both have made the step."""
    model = copy.deepcopy(eager)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for run in (eager, compiled):
        run(x).square().mean().backward()
    for (name, parameter), other in zip(eager.named_parameters(), model.parameters(), strict=True):
        # A compiler adds up in another order, which small elements of a sum of large ones show.
        largest = float(parameter.grad.abs().max())
        assert_close(other.grad, parameter.grad, SUMS, size=largest, msg=name)
    return model
