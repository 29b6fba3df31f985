"""Converted models as users' code meets them: they have parameters, a dtype, and weights that read as float values."""

import copy

import pytest
import torch
from torch import nn

import tritonq
from tolerances import HALF, SUMS, assert_close
from tritonq.deploy.computed import stand_in, stand_ins
from tritonq.prepare.forwards.edited import forward_source


class Patches(nn.Module):
    """Casts its input to its weight's type and place, as transformers' vision models do."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    @property
    def dtype(self) -> torch.dtype:
        return next(parameter.dtype for parameter in self.parameters() if parameter.is_floating_point())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(next(self.parameters()).device, self.dtype).to(self.projection.weight.dtype)
        x = self.norm(self.projection(x.to(self.projection.bias.dtype)))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def models() -> tuple[nn.Module, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 8, 8)
    qat = tritonq.prepare_qat(Patches(), example_inputs=x)
    qat(x).sum().backward()
    qat.eval()
    return qat, tritonq.convert(qat), x


def test_forwards_that_ask_for_dtype_and_device_compute_the_same_codes(models):
    qat, converted, x = models
    assert tritonq.verify(qat, converted, x).agrees()
    assert converted.dtype == converted.projection.weight.dtype == converted.projection.bias.dtype == torch.float32
    assert not any(parameter.requires_grad for parameter in converted.parameters())
    compiled = torch.compile(converted, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), converted(x))


def test_weight_and_bias_are_the_values_of_the_codes(models):
    qat, converted, _ = models
    layer = converted.projection
    weight, bias = qat.projection.folded_parameters()
    scale = layer.weight_scale.view(-1, 1, 1, 1)
    assert layer.stored_weight.dtype == torch.int8
    assert torch.equal(layer.weight + 0, layer.stored_weight * scale)
    assert_close(layer.weight, weight, SUMS, size=1000)
    assert torch.allclose(layer.bias, bias, atol=float(layer.multiplier.max()))
    assert layer.weight.numpy().shape == layer.weight.shape == (8, 3, 4, 4)
    assert torch.equal(copy.deepcopy(layer.weight), layer.weight.clone())


def test_weights_of_converted_layers_can_not_be_changed(models):
    layer = models[1].projection
    for write in (
        lambda weight: weight.mul_(2),
        lambda weight: weight.data.neg_(),
        lambda weight: weight.detach().view(-1).fill_(0),
        lambda weight: weight.__setitem__(0, 1.0),
        lambda weight: weight[:, 0].zero_(),
        lambda weight: torch.add(torch.ones(8, 3, 4, 4), 1, out=weight),
        lambda weight: torch._foreach_mul_([torch.ones(2), weight], 2),
    ):
        with pytest.raises(RuntimeError, match="would change the weight of a converted layer"):
            write(layer.weight)
    other = torch.empty(8, 3, 4, 4)
    assert torch.add(layer.weight, 1, out=other) is other
    assert torch.equal(other, layer.weight + 1)
    for name in ("weight", "bias"):
        with pytest.raises(AttributeError, match=f"the {name} of a converted layer is fixed"):
            setattr(layer, name, nn.Parameter(getattr(layer, name) * 2))


def test_scales_keep_their_type_and_value_in_half_precision(models):
    converted, x = models[1], models[2]
    before, scale = converted(x), converted.head.weight_scale.clone()
    converted.half().float()
    assert torch.equal(converted.head.weight_scale, scale)
    assert torch.equal(converted(x), before)


class Tokens(Patches):
    """Also adds a parameter of its own, which has the dtype of the model, and normalises."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.layer_norm, self.middle = nn.Parameter(torch.zeros(8)), nn.LayerNorm(8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.projection.weight.dtype).to(next(self.parameters()).device)
        x = self.projection(x).mean((2, 3)) + self.start.to(self.dtype)
        return self.head(self.layer_norm(x + self.middle(x)))


@pytest.mark.filterwarnings("ignore:bfloat16 merges neighbouring codes:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["qat", "converted"])
def test_forwards_that_ask_for_a_dtype_follow_the_model(kind, dtype):
    x = torch.randn(4, 3, 8, 8)
    qat = tritonq.prepare_qat(Tokens(), example_inputs=x, warn=False)
    qat(x).sum().backward()
    model = qat.eval() if kind == "qat" else tritonq.convert(qat.eval())
    # An edited forward must ask, too: a constant of it would stay when the model moves.
    source = "".join(forward_source(model).values())
    assert "device(" not in source
    assert "torch.float32" not in source
    expected = model(x)
    moved = copy.deepcopy(model).to(dtype)
    assert moved.projection.weight.dtype == dtype
    y = moved(x.to(dtype))
    assert y.dtype == dtype
    assert_close(y.float(), expected, HALF, size=10)


def test_tables_read_as_float_values():
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(10, 8), nn.Linear(8, 2)

        def forward(self, index: torch.Tensor) -> torch.Tensor:
            return self.head(self.words(index).to(self.words.weight.dtype))

    index = torch.arange(6).view(2, 3)
    qat = tritonq.prepare_qat(Words(), example_inputs=index)
    qat(index).sum().backward()
    converted = tritonq.convert(qat.eval())
    assert torch.equal(converted(index), qat(index))
    assert converted.words.weight.dtype == torch.float32
    step = float(converted.words.activation_post_process.scale)
    assert torch.allclose(converted.words.weight[index], converted.words(index), atol=0.51 * step)


def fuse(model: nn.Module) -> None:
    """Merge BatchNorms as libraries do in their fuse(): by their statistics."""
    bn = model.norm
    factor = (bn.weight / torch.sqrt(bn.running_var + bn.eps)).view(-1, 1, 1, 1)
    with torch.no_grad():
        model.projection.weight = nn.Parameter(model.projection.weight * factor)
        model.projection.bias = nn.Parameter(bn.bias + (model.projection.bias - bn.running_mean) * factor.view(-1))
    model.norm = nn.Identity()


def test_merging_batch_norms_works_before_preparation_and_names_the_reason_after(models, tmp_path):
    float_model, x = Patches().eval(), models[2]
    expected = float_model(x)
    fuse(float_model)
    assert_close(float_model(x), expected, SUMS)
    prepared = tritonq.prepare_qat(float_model, example_inputs=x)
    assert tritonq.summary(prepared).quantized
    tritonq.save_converted(models[1], tmp_path / "model.pt")
    loaded = tritonq.load_converted(tmp_path / "model.pt", Patches())
    for model in (models[0], models[1], loaded, copy.deepcopy(models[0])):
        with pytest.raises(AttributeError, match=r"BatchNorm2d part of the layer 'projection'.*before prepare_qat"):
            fuse(model)
        model(x)


def test_a_stand_in_takes_the_place_of_what_is_there_alone():
    module = nn.BatchNorm2d(3, affine=False)
    stand_in(module, "weight")
    assert module._parameters == {"weight": None, "bias": None}
    assert stand_ins(module) == []
    stand_in(module, "running_mean")
    assert "running_mean" not in module._buffers
    assert stand_ins(module) == ["running_mean"]
