"""`fuse_modules_qat`: torch.ao's calling convention, and what torch.ao makes of the same call."""

import pytest
import torch
from torch import nn

import tritonq.nn as qnn
from tritonq.nn import intrinsic
from tritonq.prepare import fuse_known_modules, fuse_modules_qat, prepare_qat
from tritonq.prepare.decide.rows import ROWS
from tritonq.torch_ao import fuse_modules


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
        self.fc, self.bn1 = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        x = self.block(self.relu(self.bn(self.conv(x))))
        return self.bn1(self.fc(x.mean((2, 3))))


ALL = [["conv", "bn", "relu"], ["block.0", "block.1"], ["fc", "bn1"]]


def shape(model):
    """Class names by module name, with what differs between the two libraries left out."""
    return {name: type(module).__name__ for name, module in model.named_modules()}


def test_same_modules_as_torch_ao():
    from torch.ao.quantization import fuse_modules_qat as reference

    assert shape(fuse_modules_qat(Net(), ALL)) == shape(reference(Net(), ALL))


def test_one_row_of_names_and_a_copy():
    model = Net()
    fused = fuse_modules_qat(model, ["conv", "bn", "relu"])
    assert type(fused.conv) is intrinsic.ConvBnReLU2d
    assert type(fused.bn) is type(fused.relu) is nn.Identity
    assert type(model.conv) is nn.Conv2d


def test_inplace_shares_the_modules():
    model = Net()
    conv, bn = model.conv, model.bn
    assert fuse_modules_qat(model, ALL, inplace=True) is model
    assert model.conv[0] is conv
    assert model.conv[1] is bn


@pytest.mark.parametrize("training", [True, False])
def test_fused_model_computes_the_same(training):
    model, x = Net().train(training), torch.randn(3, 3, 6, 6)
    fused = fuse_modules_qat(model, ALL)
    assert fused.conv.training is fused.bn.training is training
    torch.testing.assert_close(fused(x), model(x))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: "-".join(kind.__name__ for kind in row))
def test_every_row_has_a_quantized_form(row):
    made = {nn.ReLU: nn.ReLU()}
    parts = []
    for kind in row:
        name = kind.__name__
        arguments = (4,) if "BatchNorm" in name else (4, 4, 1) if "Conv" in name else (4, 4)
        parts.append(made[kind] if kind in made else kind(*arguments))
    fused, *rest = fuse_known_modules(parts, is_qat=True)
    assert type(fused) is ROWS[row]
    assert type(fused) in qnn.DEFAULT_QAT_MAPPING
    assert all(type(module) is nn.Identity for module in rest)


def test_hooks_move_as_in_torch_ao():
    model, seen = Net(), []
    handle = model.conv.register_forward_pre_hook(lambda module, args: seen.append(type(module).__name__))
    model.relu.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    fused = fuse_modules_qat(model, ["conv", "bn", "relu"], inplace=True)
    fused(torch.randn(2, 3, 5, 5))
    assert seen == ["ConvBnReLU2d", "ConvBnReLU2d"]
    handle.remove()
    fused(torch.randn(2, 3, 5, 5))
    assert seen == ["ConvBnReLU2d"] * 3


def test_custom_fuser_method_and_function():
    class Pair(nn.Sequential):
        pass

    calls = []

    def method(is_qat, *modules):
        calls.append(is_qat)
        return Pair(*modules)

    config = {"additional_fuser_method_mapping": {(nn.Linear, nn.BatchNorm1d): method}}
    assert type(fuse_modules_qat(Net(), ["fc", "bn1"], fuse_custom_config_dict=config).fc) is Pair
    assert calls == [True]

    def function(modules, is_qat, mapping):
        calls.append(is_qat)
        return [Pair(*modules), *(nn.Identity() for _ in modules[1:])]

    assert type(fuse_modules_qat(Net(), ["fc", "bn1"], fuser_func=function).fc) is Pair
    assert type(fuse_modules(Net().eval(), ["fc", "bn1"], fuser_func=function).fc) is Pair
    assert calls == [True, True, False]


def change(**attributes):
    """A model with some attributes of its BatchNorm changed."""
    model = Net()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


@pytest.mark.parametrize(
    ("model", "rows", "message"),
    [
        (Net(), ["conv", "relu", "bn"], "can't fuse Conv2d, ReLU, BatchNorm2d; known rows"),
        (Net(), ["conv", "norm"], "no submodule 'norm'"),
        (change(bn=nn.BatchNorm2d(5)), ALL, "5 features for 4 output channels"),
        (change(bn=nn.BatchNorm2d(4, track_running_stats=False)), ALL, "track_running_stats=False"),
        (change(bn=nn.BatchNorm2d(4).eval()), ALL, "one mode, got train, eval, train"),
    ],
)
def test_bad_rows_leave_the_model_as_it_was(model, rows, message):
    before = shape(model)
    rows = [["block.0", "block.1"], rows] if isinstance(rows[0], str) else [*rows[1:], rows[0]]
    with pytest.raises(ValueError, match=message):
        fuse_modules_qat(model, rows, inplace=True)
    assert shape(model) == before


def test_fused_model_goes_through_the_eager_flow():
    prepared = prepare_qat(fuse_modules_qat(Net(), ALL))
    assert type(prepared.conv) is qnn.ConvBnReLU2d
    assert type(prepared.block[0]) is qnn.ConvReLU2d
    assert type(prepared.fc) is qnn.LinearBn1d
    prepared(torch.randn(2, 3, 6, 6)).sum().backward()
    assert prepared.conv.bn.weight.grad is not None
