"""What counts as a layer is the computation: subclasses, computed weights, functions, every kind of BatchNorm."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

import tritonq
import tritonq.nn as qnn
from prepared_nets import assert_same_when_not_rounding
from tolerances import EXACT, assert_close
from tritonq.prepare import prepare_qat
from tritonq.prepare.record.snapshot import copied

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def trained(model, x=X, steps=2):
    """Prepare a model, train it for some steps, and check its outputs, gradients and conversion on the way."""
    prepared = prepare_qat(model, example_inputs=x, strict=True)
    assert_same_when_not_rounding(copied(model), prepared, x)
    prepared.train()
    optimizer = torch.optim.SGD(prepared.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        prepared(x).square().mean().backward()
        assert all(parameter.grad is not None for parameter in prepared.parameters())
        optimizer.step()
    prepared.eval()
    converted = tritonq.convert(prepared)
    with torch.no_grad():
        assert_close(converted(x), prepared(x), EXACT)
    return prepared, converted


def rows(prepared):
    return {record.name: (record.kind, record.status) for record in tritonq.summary(prepared).layers}


class Depthwise(nn.Conv2d):
    """Constructs, and nothing else."""

    hint = "depthwise"

    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.multiplier = 1


class Norm(nn.BatchNorm2d):
    """An alias."""


class Wide(nn.Linear):
    """An alias with a buffer."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.register_buffer("steps", torch.zeros(1))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, Norm, nn.SyncBatchNorm])
def test_subclasses_that_only_construct_become_layers(norm):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), Depthwise(8), norm(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), Wide(8, 4)
    )
    prepared, _ = trained(model)
    assert type(prepared[1]) is qnn.ConvBnReLU2d
    assert type(prepared[6]) is qnn.Linear
    assert (prepared[1].hint, prepared[1].multiplier) == ("depthwise", 1)
    assert prepared[6].steps.shape == (1,)
    assert set(rows(prepared)["1"]) == {"Depthwise", "quantized"}
    assert prepared.train()[1].trains_in_one_operator


def test_a_class_that_overrides_its_convolution_is_no_plain_layer():
    class Scaled(nn.Conv2d):
        def _conv_forward(self, input, weight, bias):
            return 2 * super()._conv_forward(input, weight, bias)

    prepared = prepare_qat(nn.Sequential(Scaled(3, 4, 1), nn.Conv2d(4, 4, 1)), example_inputs=X, warn=False)
    assert type(prepared[0]) is not qnn.Conv2d


def same_padding(self, x):
    return F.conv2d(F.pad(x, [0, 1, 0, 1]), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def dynamic_padding(self, x):
    extra = max((-(-x.shape[-1] // 2) - 1) * 2 + 3 - x.shape[-1], 0)
    if extra > 0:
        x = F.pad(x, [0, extra, 0, extra])
    return F.conv2d(x, self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


def standardized(self, x):
    weight = F.batch_norm(
        self.weight.reshape(1, self.out_channels, -1), None, None, training=True, momentum=0.0, eps=1e-6
    ).reshape_as(self.weight)
    return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def masked_in_place(self, x):
    weight = self.weight.clone()
    weight[:, :, 0, 0] = 0
    return F.conv2d(input=x, weight=weight, bias=self.bias, stride=self.stride, padding=self.padding)


def convolution(forward):
    return type("Own", (nn.Conv2d,), {"forward": forward})


def network(make, x=X):
    """Two convolutions of a kind with BatchNorms, of one size before and behind, and a classifier."""
    torch.manual_seed(0)
    layers = []
    for inputs in (3, 8):
        layers += [make(inputs, 8), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def geometry_of_tensors(self, x):
    """Padding by the size of the kernel, groups by the channels of what it reads."""
    sides = self.weight.shape[-1] // 2
    return F.conv2d(x, self.weight, self.bias, 2, (sides, sides), groups=x.shape[1] // self.weight.shape[1])


@pytest.mark.parametrize("forward", [same_padding, dynamic_padding, standardized, masked_in_place, geometry_of_tensors])
def test_convolutions_with_forwards_of_their_own_are_layers(forward, tmp_path):
    kind = convolution(forward)
    model = network(lambda inputs, outputs: kind(inputs, outputs, 3, stride=2, padding=1, bias=inputs == 3))
    prepared, converted = trained(copy.deepcopy(model))
    assert type(prepared[0].conv2d) is type(prepared[3].conv2d) is qnn.ConvBnReLU2d
    assert rows(prepared)["0.conv2d"] == ("conv2d", "quantized")
    assert not [name for name, parameter in converted.named_parameters() if "weight" in name and parameter.dim() > 1]
    path = tmp_path / "converted.pt"
    tritonq.save_converted(converted, path)
    loaded = tritonq.load_converted(path, copy.deepcopy(model))
    with torch.no_grad():
        assert torch.equal(loaded(X), converted(X))


def masks(layer):
    prune.l1_unstructured(layer, "weight", 0.5)


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(layer)


@pytest.mark.parametrize(
    "change", [masks, old_weight_norm, parametrizations.weight_norm, parametrizations.spectral_norm]
)
def test_computed_weights_train_and_are_fixed_at_conversion(change):
    model = network(lambda inputs, outputs: nn.Conv2d(inputs, outputs, 3, padding=1))
    for index in (0, 3, 8):
        change(model[index])
    prepared, converted = trained(model)
    assert type(prepared[3].conv2d) is qnn.ConvBnReLU2d
    assert type(prepared[8].linear) is qnn.Linear
    assert "stride=(1, 1), padding=(1, 1)" in repr(prepared[3].conv2d)
    assert repr(prepared[8].linear).startswith("Linear(\n  in_features=")
    assert not any(parameter.requires_grad for parameter in converted.parameters())
    again = copy.deepcopy(prepared)
    with torch.no_grad():
        assert torch.equal(again(X), prepared(X))


def test_spectral_norm_iterates_once_per_step():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(3, 8, 3)))
    prepared = prepare_qat(model, example_inputs=X).train()
    model.train()(X), prepared(X)
    torch.testing.assert_close(prepared[0].parametrizations.weight[0]._u, model[0].parametrizations.weight[0]._u)


class TwoWeights(nn.Module):
    """Convolves and multiplies by functions, with parameters of its own and a table of constants."""

    def __init__(self):
        super().__init__()
        self.kernel, self.matrix = nn.Parameter(torch.randn(4, 3, 3, 3)), nn.Parameter(torch.randn(5, 4))
        self.register_buffer("table", torch.randn(6, 5))
        self.embed = nn.Linear(5, 5)

    def forward(self, x):
        y = F.relu(F.conv2d(x, self.kernel, padding=1))
        return F.linear(y.mean((2, 3)), self.matrix) + self.embed(self.table).sum(0)


def test_functions_with_parameters_are_layers_and_constants_are_left_alone():
    prepared = prepare_qat(TwoWeights(), example_inputs=X, strict=True)
    found = rows(prepared)
    assert found["conv2d"] == ("conv2d", "quantized")
    assert found["linear"] == ("linear", "quantized")
    assert found["embed"] == ("Linear", "float")
    assert type(prepared.conv2d) is qnn.ConvReLU2d
    assert "add" not in found


class Dropped(nn.Module):
    """Convolves with a weight that is drawn anew in each step of training."""

    def __init__(self):
        super().__init__()
        self.kernel, self.head = nn.Parameter(torch.randn(4, 3, 1, 1)), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.head(F.conv2d(x, F.dropout(self.kernel, 0.5, self.training)))


def test_weights_drawn_at_random_stay_in_float_with_that_reason():
    with pytest.warns(UserWarning, match="conv2d: its weight is drawn at random"):
        prepared = prepare_qat(Dropped(), example_inputs=X)
    assert rows(prepared)["head"] == ("Conv2d", "quantized")


class Holder(nn.Module):
    """Multiplies by the weight of a layer that it does not call, as BEiT does with its own bias."""

    def __init__(self):
        super().__init__()
        self.qkv, self.bias = nn.Linear(6, 4, bias=False), nn.Parameter(torch.randn(4))

    def forward(self, x):
        return F.linear(x, self.qkv.weight, self.bias).relu()


def test_a_layer_whose_weight_a_function_takes_is_part_of_that_function():
    prepared = prepare_qat(Holder(), example_inputs=torch.randn(2, 6), strict=True)
    assert rows(prepared) == {"qkv": ("Linear", "quantized"), "linear": ("linear", "quantized")}
    row = tritonq.summary(prepared).layers[0]
    assert (row.name, row.fused_with) == ("linear", ("qkv",))


class Conditional(nn.Module):
    """Convolves with a weight that the input chooses."""

    def __init__(self):
        super().__init__()
        self.kernels = nn.Parameter(torch.randn(2, 4, 3, 1, 1))
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        share = torch.sigmoid(x.mean())
        return self.head(F.conv2d(x, share * self.kernels[0] + (1 - share) * self.kernels[1]))


def test_weights_that_depend_on_the_input_stay_in_float_and_are_told():
    prepared = prepare_qat(Conditional(), example_inputs=X, warn=False)
    reasons = {record.name: record.reason for record in prepared.tritonq_report if record.status == "float"}
    assert reasons["conv2d"] == "its weight depends on the model's input"


class Frozen(nn.Module):
    """Statistics and parameters are buffers; how a toolkit computes with them is in the subclasses."""

    def __init__(self, channels):
        super().__init__()
        generator = torch.Generator().manual_seed(channels)
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels, generator=generator) + 0.5)

    def columns(self):
        return (getattr(self, name).reshape(1, -1, 1, 1) for name in ("weight", "bias", "running_mean", "running_var"))


class ByFactor(Frozen):
    def forward(self, x):
        weight, bias, mean, var = self.columns()
        scale = weight * (var + 1e-5).rsqrt()
        return x * scale.to(x.dtype) + (bias - mean * scale)


class ByFunction(Frozen):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=1e-3)


class ByHand(Frozen):
    def forward(self, x):
        weight, bias, mean, var = self.columns()
        return 2 * ((x - mean) / torch.sqrt(var + 1e-5)) * weight + bias


@pytest.mark.parametrize("norm", [ByFactor, ByFunction, ByHand])
def test_frozen_norms_are_folded_and_stay_frozen(norm):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    prepared, _ = trained(model)
    assert type(prepared[0]) is qnn.ConvBnReLU2d
    assert isinstance(prepared[1], nn.Identity)
    assert "add" not in rows(prepared)
    before = copy.deepcopy(prepared[0].bn.state_dict())
    prepared[0].update_bn_stats()
    prepared.train()(X)
    assert all(torch.equal(tensor, before[name]) for name, tensor in prepared[0].bn.state_dict().items())


class ByMode(Frozen):
    """Multiplies by another buffer, or another number, in training."""

    def __init__(self, by_number):
        super().__init__(8)
        self.by_number = by_number

    def forward(self, x):
        if self.by_number:
            return x * self.weight.view(1, -1, 1, 1) * (3.0 if self.training else 1.0)
        return x * (self.weight if self.training else self.bias).view(1, -1, 1, 1)


@pytest.mark.parametrize("by_number", [True, False])
def test_a_norm_of_other_factors_in_training_is_not_folded(by_number):
    x = torch.randn(4, 1, 8, 8)
    model = nn.Sequential(nn.Conv2d(1, 8, 3, bias=False), ByMode(by_number), nn.ReLU())
    assert type(prepare_qat(model, example_inputs=x)[1]).__name__ == "ByMode"


class WithActivation(ByFactor):
    """Calls its children afterwards, as timm's FrozenBatchNormAct2d does."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU6(inplace=True)

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class WithLaterArithmetic(WithActivation):
    def forward(self, x):
        return super().forward(x) * self.weight.reshape(1, -1, 1, 1)


def test_a_frozen_norm_with_an_activation_is_folded():
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), WithActivation(8), nn.Conv2d(8, 4, 1))
    prepared, _ = trained(model)
    assert type(prepared[0]) is qnn.ConvBnReLU2d
    assert not {"mul", "add"} & set(rows(prepared))
    later, _ = trained(nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), WithLaterArithmetic(8), nn.Conv2d(8, 4, 1)))
    assert type(later[0]) is qnn.Conv2d


class Trainable(nn.Module):
    """A factor per channel that trains is no frozen norm."""

    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x):
        return x * self.gamma


def test_factors_that_train_are_not_folded():
    prepared = prepare_qat(nn.Sequential(nn.Conv2d(3, 8, 3), Trainable(), nn.Conv2d(8, 4, 1)), example_inputs=X)
    assert type(prepared[0]) is qnn.Conv2d
    assert not isinstance(prepared[1], nn.Identity)


def test_batch_norms_without_running_statistics_stay_and_are_told():
    norm = nn.BatchNorm2d(8, track_running_stats=False)
    prepared = prepare_qat(nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.ReLU(), nn.Conv2d(8, 4, 1)), example_inputs=X)
    reasons = {record.name: record.reason for record in prepared.tritonq_report if record.status == "float"}
    assert reasons["1"] == "BatchNorm has track_running_stats=False"


def test_batch_norms_without_parameters_are_folded():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.ReLU(), nn.Conv2d(8, 4, 1))
    prepared, _ = trained(model)
    assert type(prepared[0]) is qnn.ConvBnReLU2d


def padding_by_size(self, x):
    padding = 1 if x.shape[-1] > 4 else 0
    return F.conv2d(x, self.weight, self.bias, self.stride, padding=padding, dilation=self.dilation)


def padding_of_size(self, x):
    return F.conv2d(x, self.weight, self.bias, self.stride, padding=x.shape[-1] // 6)


@pytest.mark.parametrize("forward", [padding_by_size, padding_of_size])
def test_another_geometry_than_recorded_is_an_error(forward):
    prepared = prepare_qat(nn.Sequential(convolution(forward)(3, 4, 3)), example_inputs=X).train()
    prepared(X)
    with pytest.raises(ValueError, match=r"padding.*\b1\b.* 0\b"):
        prepared(X[..., :4, :4])
