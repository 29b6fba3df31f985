"""The converted model computes what the trained one does in eval mode: no code and no output differs."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import tritonq
from qat_models import PRESETS, OneLayer, Residual, assert_same_state, images, state_of, train, trained_residual
from tritonq import nn as qnn
from tritonq.deploy import convert, verify
from tritonq.deploy.modules import DeployedModule, QuantizedConv2d, Quantizer
from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.qparams import QParams
from tritonq.quantized_type import QINT8

QCONFIG = tritonq.get_qconfig("tensorrt")
AFFINE = tritonq.get_default_qat_qconfig("onednn", version=0)

# Layer, input shape; each with the grid of its input known and unknown.
LAYERS = {
    "Conv1d": (lambda q: qnn.Conv1d(4, 6, 3, groups=2, qconfig=q), (2, 4, 9)),
    "Conv2d reflect": (
        lambda q: qnn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", stride=2, qconfig=q),
        (2, 4, 7, 6),
    ),
    "Conv2d same": (lambda q: qnn.ConvReLU2d(4, 6, 3, padding="same", dilation=2, qconfig=q), (2, 4, 7, 6)),
    "Conv3d": (lambda q: qnn.Conv3d(2, 3, 2, bias=False, qconfig=q), (2, 2, 4, 3, 5)),
    "ConvTranspose2d": (
        lambda q: qnn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2, qconfig=q),
        (2, 4, 5, 4),
    ),
    "ConvTransposeBn2d": (lambda q: qnn.ConvTransposeBn2d(4, 6, 3, padding=1, qconfig=q), (2, 4, 5, 4)),
    "ConvBnReLU1d": (lambda q: qnn.ConvBnReLU1d(4, 6, 3, qconfig=q), (2, 4, 9)),
    "ConvBn3d": (lambda q: qnn.ConvBn3d(2, 3, 2, qconfig=q), (2, 2, 4, 3, 5)),
    "Linear": (lambda q: qnn.Linear(5, 7, qconfig=q), (2, 3, 5)),
    "LinearReLU": (lambda q: qnn.LinearReLU(5, 7, bias=False, qconfig=q), (4, 5)),
    "LinearBn1d": (lambda q: qnn.LinearBn1d(5, 7, qconfig=q), (8, 5)),
}


def trained_layer(name, qconfig, known_grid=True):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    model = train(OneLayer(make(qconfig), qconfig, known_grid), torch.randn(shape))
    return model, torch.randn(shape)


@pytest.mark.parametrize("preset", PRESETS)
def test_no_code_differs_with_any_preset(preset):
    model = trained_residual(preset)
    report = verify(model, convert(model), images())
    assert report.agrees(), report
    assert report.outputs.largest == 0


@pytest.mark.parametrize("known_grid", [True, False])
@pytest.mark.parametrize("qconfig", [QCONFIG, AFFINE], ids=["symmetric", "affine"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_gives_the_same_bits(name, qconfig, known_grid):
    model, x = trained_layer(name, qconfig, known_grid)
    converted = convert(model)
    assert torch.equal(converted(x), model(x))
    layer = converted.layer
    assert layer.stored_weight.dtype == torch.int8
    assert (layer.multiplier is not None) == known_grid
    if layer.stored_bias is not None:
        assert layer.stored_bias.dtype == (torch.int32 if known_grid else torch.float32)
    assert not any(parameter.requires_grad for parameter in converted.parameters())
    assert not [m for m in converted.modules() if isinstance(m, (FakeQuantizeBase, nn.modules.batchnorm._BatchNorm))]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_activations_carry_the_same_codes(dtype):
    model, x = trained_layer("Conv2d same", QCONFIG)
    model, x = model.to(dtype), x.to(dtype)
    converted = convert(model)
    assert converted(x).dtype == dtype
    assert torch.equal(converted(x), model(x))
    assert convert(model).half().layer.multiplier.dtype == torch.float32


def test_autocast_changes_no_code():
    model = trained_residual()
    converted = convert(model)
    expected = converted(images())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(converted(images()), expected)
        assert torch.equal(model(images()), expected)


def test_a_model_in_training_mode_is_converted_as_eval_computes_it():
    model = trained_residual()
    expected = model(images())
    converted = convert(model.train())
    assert torch.equal(converted(images()), expected)
    assert model.training
    assert not any(module.training for module in converted.modules())


def test_int32_weights_of_the_integers_are_those_of_the_formula():
    model, x = trained_layer("Conv2d reflect", AFFINE)
    layer = convert(model).layer
    codes = (model.input(x) / layer.input_scale).round()
    assert layer.weight_zero_point is None
    weight = layer.stored_weight.double()
    padded = nn.functional.pad(codes.double(), (1, 1, 1, 1), mode="reflect")
    total = nn.functional.conv2d(padded, weight, layer.stored_bias.double(), stride=2)
    out = layer.activation_post_process
    steps = (total.float() * (layer.multiplier / out.scale).view(1, -1, 1, 1)).round()
    expected = ((steps + out.zero_point).clamp(0, 255) - out.zero_point) * out.scale
    assert torch.equal(layer(model.input(x)), expected)
    assert torch.equal(layer.multiplier, layer.input_scale * layer.weight_scale)


def test_shared_quantizers_stay_shared_and_originals_untouched():
    qconfig = QCONFIG
    model = nn.Sequential(qnn.Conv2d(3, 4, 1, qconfig=qconfig), qnn.Conv2d(4, 4, 1, qconfig=qconfig))
    model[1].activation_post_process = model[0].activation_post_process
    train(model, images(4))
    before = state_of(model)
    converted = convert(model)
    assert converted[0].activation_post_process is converted[1].activation_post_process
    assert_same_state(before, state_of(model))
    assert torch.equal(model(images()), converted(images()))


def test_inplace_changes_the_model_itself():
    model = trained_residual()
    expected = model(images())
    assert convert(model, inplace=True) is model
    assert isinstance(model.stem, QuantizedConv2d)
    assert torch.equal(model(images()), expected)


def test_geometry_that_users_code_may_read_survives():
    model, _ = trained_layer("Conv2d same", QCONFIG)
    layer = convert(model).layer
    assert isinstance(layer, nn.Conv2d)
    assert (layer.stride, layer.kernel_size, layer.dilation, layer.padding) == ((1, 1), (3, 3), (2, 2), "same")


def test_hooks_stay():
    model = trained_residual()
    seen = []
    model.stem.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    convert(model)(images())
    assert seen == ["QuantizedConv2d"]
    model(images())
    assert seen == ["QuantizedConv2d", "ConvBnReLU2d"]


def test_training_a_converted_model_is_refused():
    converted = convert(trained_residual())
    with pytest.raises(RuntimeError, match="only runs in eval mode"):
        converted.stem.train()
    with pytest.raises(RuntimeError, match="only runs in eval mode"):
        converted.train()
    converted.eval()


def test_converted_models_copy_and_pickle():
    converted = convert(trained_residual())
    expected = converted(images())
    for other in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert torch.equal(other(images()), expected)


def test_the_random_state_stays():
    model = trained_residual()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    convert(model)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("qconfig", [tritonq.default_embedding_qat_qconfig, QCONFIG], ids=["affine", "symmetric"])
def test_embeddings_become_integer_tables(qconfig):
    torch.manual_seed(0)
    table = qnn.Embedding(11, 5, padding_idx=2, qconfig=qconfig)
    bag = qnn.EmbeddingBag(11, 5, mode="mean", qconfig=qconfig)
    index, offsets = torch.tensor([[1, 2, 3], [4, 10, 0]]), torch.tensor([0, 2])
    flat = index.flatten()
    table(index).sum().backward()
    bag(flat, offsets).sum().backward()
    table.eval(), bag.eval()
    new_table, new_bag = convert(table), convert(bag)
    assert torch.equal(new_table(index), table(index))
    assert torch.equal(new_bag(flat, offsets), bag(flat, offsets))
    assert new_table.stored_weight.dtype in (torch.int8, torch.uint8)
    assert new_bag.stored_weight.element_size() == 1


class OtherFakeQuantize(FakeQuantizeBase):
    """A quantizer of another family: its scale is a parameter, and only calculate_qparams tells its grid."""

    def __init__(self):
        super().__init__()
        self.qtype = QINT8
        self.log_scale = nn.Parameter(torch.tensor([-3.0]))

    def has_qparams(self):
        return True

    def calculate_qparams(self):
        return QParams(self.log_scale.detach().exp2(), torch.zeros(1, dtype=torch.int32))

    def forward(self, x):
        scale = self.log_scale.exp2()
        return (x / scale).round().clamp(-128, 127) * scale


def test_quantizers_of_other_families_are_converted_by_their_qparams():
    model = OneLayer(qnn.Conv2d(3, 4, 3, qconfig=tritonq.QConfig(OtherFakeQuantize, QCONFIG.weight)), QCONFIG, False)
    model.input = OtherFakeQuantize()
    model.layer.set_input_quantizer(model.input)
    train(model, images(4))
    converted = convert(model)
    assert torch.equal(converted(images()), model(images()))
    assert float(converted.input.scale) == float(model.input.calculate_qparams().scale)


def test_an_unquantized_weight_stays_in_float():
    qconfig = tritonq.QConfig(QCONFIG.activation, nn.Identity)
    model = train(OneLayer(qnn.ConvBnReLU2d(3, 4, 3, qconfig=qconfig), qconfig), images(4))
    converted = convert(model)
    assert converted.layer.weight.dtype == torch.float32
    assert torch.equal(converted(images()), model(images()))


def never_observed():
    model = trained_residual()
    model.point.activation_post_process = QCONFIG.activation().eval()
    return model


def switched_off():
    model = trained_residual()
    model.point.weight_fake_quant.disable_fake_quant()
    return model


def in_double():
    return trained_residual().double()


BAD_MODELS = {
    "never observed": (never_observed, "'point.activation_post_process' has never observed"),
    "switched off": (switched_off, "'point.weight_fake_quant' is switched off"),
    "float64": (in_double, "'stem' has float64"),
    "float model": (lambda: nn.Sequential(nn.Conv2d(3, 3, 1)), "no quantization-aware layer"),
    "converted": (lambda: convert(trained_residual()), "converted already"),
}


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models_are_named_and_left_alone(case, inplace):
    make, message = BAD_MODELS[case]
    model = make()
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        convert(model, inplace)
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("make", [never_observed, switched_off])
@pytest.mark.filterwarnings("ignore:a FakeQuantize that has observed nothing")
def test_what_does_not_round_stays_in_float_on_request(make):
    model = make()
    converted = convert(model, allow_unquantized=True)
    assert torch.equal(converted(images()), model(images()))


def test_a_bias_that_needs_a_larger_weight_scale_keeps_its_codes():
    """A dead channel: its own weight scale is far too small for 32-bit bias codes."""
    model = Residual(QCONFIG)
    with torch.no_grad():
        model.stem.bn.weight[2] = 1e-12
        model.stem.bn.bias[2] = 300.0
    for step in range(2):
        model(images(8, seed=step))
    model.eval()
    converted = convert(model)
    assert converted.stem.weight_scale[2] > model.stem.weight_fake_quant.scale[2]
    assert torch.equal(converted(images()), model(images()))


def test_every_quantized_part_is_a_deployed_module():
    converted = convert(trained_residual())
    assert [type(module).__name__ for module in converted.modules() if isinstance(module, DeployedModule)] == [
        *("Quantizer", "QuantizedConv2d", "Quantizer", "QuantizedConv2d", "Quantizer", "QuantizedConv2d", "Quantizer"),
        *("Quantizer", "Quantizer", "QuantizedLinear"),
    ]
    text = repr(converted)
    assert "weight=torch.int8, arithmetic=integers" in text
    assert "codes -128..127" in text
    assert isinstance(converted.add.activation_post_process, Quantizer)


def test_a_prepared_table_keeps_the_quantizer_of_its_rows():
    torch.manual_seed(0)
    codes = torch.tensor([[1, 2], [3, 6]])
    model = tritonq.prepare_qat(nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 2)), example_inputs=codes)
    converted = convert(train(model, codes))
    assert [layer.name for layer in tritonq.verify(model, converted, codes).layers] == ["0", "1"]
    assert tritonq.verify(model, converted, codes).agrees()


@pytest.mark.filterwarnings("ignore:1 modules were put into the model:UserWarning")
def test_a_refused_conversion_in_place_leaves_the_model_as_it_was():
    x = torch.randn(4, 3, 8, 8)
    model = tritonq.prepare_qat(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)), example_inputs=x)
    model(x)
    prune.l1_unstructured(model[0], "weight", 0.5)
    model(x)
    model[1].weight_fake_quant = nn.Hardtanh()
    names, summary, hooks = list(model.state_dict()), str(tritonq.summary(model)), dict(model[0]._forward_pre_hooks)
    with pytest.raises(ValueError, match="'1' can't be converted: a weight quantizer of type Hardtanh has no grid"):
        convert(model, inplace=True)
    assert (list(model.state_dict()), str(tritonq.summary(model))) == (names, summary)
    assert dict(model[0]._forward_pre_hooks) == hooks


def test_a_layer_that_computes_in_float_says_so_and_no_reason():
    x = torch.randn(4, 32)
    for preset in ("fp8_e4m3", "w_mxfp4"):
        model = tritonq.prepare_qat(
            nn.Sequential(nn.Linear(32, 4)), qconfig=tritonq.get_qconfig(preset), example_inputs=x
        )
        model(x)
        text = repr(convert(model.eval()))
        assert "arithmetic=float\n" in text
        assert "unknown" not in text
