"""Quantization-aware layers without BatchNorm against torch.ao's, and the exact integers of eval mode."""

import copy
import itertools
import pickle

import pytest
import torch
import torch.ao.nn.intrinsic as nni
import torch.ao.nn.intrinsic.qat as nniqat
import torch.ao.nn.qat as nnqat
from torch import nn
from torch.ao import quantization as ao

import tritonq
from tolerances import LONG_SUMS, SUMS, assert_close
from tritonq.nn import DEFAULT_QAT_MAPPING, intrinsic

TORCH_QCONFIG = ao.get_default_qat_qconfig("onednn", version=0)
QCONFIG = tritonq.get_default_qat_qconfig("onednn", version=0)

# By the name of the quantization-aware class in both libraries: the float layer in it, and the input's shape.
CASES = {
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 9)),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect", stride=2), (2, 4, 7, 6)),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 2, bias=False), (2, 2, 4, 3, 5)),
    "Linear": (lambda: nn.Linear(5, 7), (2, 3, 5)),
    "ConvReLU2d": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 7, 6)),
    "LinearReLU": (lambda: nn.Linear(5, 7), (3, 5)),
}


def pair(name):
    """The torch.ao layer and tritonq's, made from two copies of one float layer."""
    torch.manual_seed(0)
    theirs = CASES[name][0]()
    ours, classes = copy.deepcopy(theirs), nnqat
    if "ReLU" in name:
        theirs.qconfig = TORCH_QCONFIG
        theirs, ours = getattr(nni, name)(theirs, nn.ReLU()), getattr(intrinsic, name)(ours, nn.ReLU())
        classes = nniqat
    theirs.qconfig, ours.qconfig = TORCH_QCONFIG, QCONFIG
    return getattr(classes, name).from_float(theirs), getattr(tritonq.nn, name).from_float(ours)


@pytest.mark.parametrize("name", CASES)
def test_training_equals_torch_ao(name):
    theirs, ours = pair(name)
    ours.activation_post_process = nn.Identity()
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        x = torch.randn(CASES[name][1], generator=generator)
        p, q = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = ours(p), theirs(q)
        assert_close(y, z, SUMS)
        dy = torch.randn(y.shape, generator=generator)
        y.backward(dy)
        z.backward(dy)
        assert_close(p.grad, q.grad, SUMS)
        assert_close(ours.weight.grad, theirs.weight.grad, SUMS)
        if ours.bias is not None:
            assert_close(ours.bias.grad, theirs.bias.grad, SUMS)


@pytest.mark.parametrize("name", CASES)
def test_from_float_shares_parameters_and_keeps_mode(name):
    layer = CASES[name][0]().eval()
    source = getattr(intrinsic, name)(layer, nn.ReLU()).eval() if "ReLU" in name else layer
    source.qconfig = QCONFIG
    ours = getattr(tritonq.nn, name).from_float(source)
    assert ours.weight is layer.weight
    assert ours.bias is layer.bias
    assert not ours.training
    assert ours.weight_fake_quant.scale.numel() == layer.weight.shape[0]
    assert ours.weight_fake_quant.scale.device == layer.weight.device


def test_every_entry_of_torch_ao_mapping_has_a_counterpart():
    names = {cls.__name__ for cls in ao.get_default_qat_module_mappings()}
    ours = {cls.__name__ for cls in DEFAULT_QAT_MAPPING}
    assert names <= ours, names - ours


def test_every_plain_float_type_of_the_mapping_is_accepted():
    arguments = {
        "Linear": (3, 2),
        "NonDynamicallyQuantizableLinear": (3, 2),
        "Embedding": (3, 2),
        "EmbeddingBag": (3, 2),
    }
    for float_type, qat_type in DEFAULT_QAT_MAPPING.items():
        if not issubclass(float_type, nn.Sequential):
            layer = float_type(*arguments.get(float_type.__name__, (3, 2, 1)))
            layer.qconfig = tritonq.default_embedding_qat_qconfig if "Embedding" in float_type.__name__ else QCONFIG
            weight = next(name for name in ("weight", "weight_ih", "weight_ih_l0") if hasattr(layer, name))
            assert getattr(qat_type.from_float(layer), weight) is getattr(layer, weight)


@pytest.mark.parametrize("kind", ["Embedding", "EmbeddingBag"])
def test_embedding_tables_are_quantized_row_by_row(kind):
    torch.manual_seed(0)
    layer = getattr(nn, kind)(10, 4)
    layer.qconfig = tritonq.default_embedding_qat_qconfig
    ours = getattr(tritonq.nn, kind).from_float(layer)
    assert ours.weight is layer.weight
    indices = torch.tensor([[1, 2, 4], [4, 3, 9]])
    y = ours(indices)
    quantizer = ours.weight_fake_quant
    table = torch.fake_quantize_per_channel_affine(layer.weight, quantizer.scale, quantizer.zero_point, 0, 0, 255)
    layer.weight.data = table.detach()
    assert torch.equal(y, layer(indices))
    y.sum().backward()
    assert ours.weight.grad.abs().sum() > 0


def observed(quantizer, x):
    """``x`` on the grid of ``quantizer``, which has seen it."""
    quantizer(x)
    return quantizer.eval()(x)


LAYERS = {
    "Conv2d": (lambda q: tritonq.nn.Conv2d(4, 6, 3, padding=1, qconfig=q), (2, 4, 7, 6)),
    "Conv2d grouped": (lambda q: tritonq.nn.Conv2d(4, 6, 3, groups=2, bias=False, qconfig=q), (2, 4, 7, 6)),
    "Conv2d circular": (
        lambda q: tritonq.nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular", qconfig=q),
        (2, 4, 7, 6),
    ),
    "ConvReLU1d": (lambda q: tritonq.nn.ConvReLU1d(4, 6, 3, qconfig=q), (2, 4, 9)),
    "Conv3d": (lambda q: tritonq.nn.Conv3d(2, 3, 2, qconfig=q), (1, 2, 4, 3, 5)),
    "ConvTranspose2d": (lambda q: tritonq.nn.ConvTranspose2d(4, 6, 3, groups=2, stride=2, qconfig=q), (2, 4, 5, 5)),
    "Linear": (lambda q: tritonq.nn.Linear(5, 7, qconfig=q), (2, 3, 5)),
    "ConvBnReLU2d": (lambda q: tritonq.nn.ConvBnReLU2d(4, 6, 3, qconfig=q), (2, 4, 7, 6)),
    "LinearBn1d": (lambda q: tritonq.nn.LinearBn1d(5, 7, qconfig=q), (8, 5)),
}
QCONFIGS = {
    "tensorrt": tritonq.get_qconfig("tensorrt"),
    "fbgemm": tritonq.get_default_qat_qconfig("fbgemm", 0),
    "qnnpack v1": tritonq.get_default_qat_qconfig("qnnpack", 1),
    "megengine": tritonq.get_qconfig("megengine_ema"),
    "lowbit": tritonq.get_qconfig("megengine_lowbit"),
}


def integers_by_hand(layer, x, source):
    """The layer in int64, straight from the definition: no library convolution of floats takes part."""
    weight, bias = layer.folded_parameters()
    rows = layer.linear_map.to_rows(weight.double())
    wq, shape = layer.weight_fake_quant, (-1, *[1] * (weight.dim() - 1))
    scale, zero = (v.expand(len(rows)).view(shape) for v in wq.calculate_qparams())
    ratio = rows.float() / scale if wq.qtype.rounding == "half_away" else rows.float() * (1 / scale)
    rounded = ratio.round() if wq.qtype.rounding == "half_even" else (ratio.abs() + 0.5).floor() * ratio.sign()
    codes = (rounded + zero).clamp(wq.quant_min, wq.quant_max) - zero
    multiplier = source.scale * scale.flatten()
    inputs = (x.double() / source.scale.double()).round()
    total = layer.linear_map(inputs, layer.linear_map.from_rows(codes.double()), None)
    assert total.frac().abs().max() < 1e-6
    view = [1] * total.dim()
    view[layer.linear_map.output_axis] = -1
    total = total.round()
    if bias is not None:
        total = total + (bias.double() / multiplier.double()).round().view(view)
    return total.float() * multiplier.view(view)


@pytest.mark.parametrize(("layer_name", "qconfig_name"), list(itertools.product(LAYERS, QCONFIGS)))
def test_eval_is_exact_integer_arithmetic(layer_name, qconfig_name):
    torch.manual_seed(0)
    make, shape = LAYERS[layer_name]
    layer = make(QCONFIGS[qconfig_name])
    if hasattr(layer, "bn"):
        nn.init.uniform_(layer.bn.weight, 0.5, 1.5)
        nn.init.uniform_(layer.bn.bias, -1, 1)
    source = QCONFIGS[qconfig_name].activation()
    x = observed(source, torch.randn(shape) + 0.3)
    layer(x)
    layer.eval()
    float_output = layer(x)
    layer.activation_post_process.disable_fake_quant()
    unquantized = layer(x)
    layer.set_input_quantizer(source)
    y = layer(x)
    expected = integers_by_hand(layer, x, source)
    assert torch.equal(y, expected if layer.ceiling is None else torch.relu(expected))
    # The integers are the float computation up to its rounding and that of the bias.
    unit = float((layer.weight_fake_quant.scale.max() * source.scale).max())
    torch.testing.assert_close(y, unquantized, rtol=LONG_SUMS.rtol, atol=unit + SUMS.atol)
    assert float_output.shape == y.shape


def test_eval_gradients_are_those_of_the_float_computation():
    torch.manual_seed(0)
    source = QCONFIG.activation()
    x = observed(source, torch.randn(2, 4, 7, 6)).requires_grad_()
    layer = tritonq.nn.Conv2d(4, 6, 3, qconfig=QCONFIG)
    layer(x)
    layer.eval()
    layer(x).sum().backward()
    expected, x.grad = (x.grad, layer.weight.grad.clone()), None
    layer.weight.grad = None
    layer.set_input_quantizer(source)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, expected[0])
    torch.testing.assert_close(layer.weight.grad, expected[1])


def test_without_onednn_the_integers_stay_exact():
    """NNPACK would take over at batch 16 and uses Winograd: float64 and rounding keep its fractions out."""
    torch.manual_seed(0)
    source = QCONFIG.activation()
    layer = tritonq.nn.Conv2d(16, 16, 3, padding=1, qconfig=QCONFIG)
    x = observed(source, torch.randn(16, 16, 12, 12))
    layer(x)
    layer.eval().set_input_quantizer(source)
    with torch.no_grad():
        expected = layer(x)
        with torch.backends.mkldnn.flags(enabled=False):
            assert torch.equal(layer(x), expected)


def test_sums_beyond_float32_stay_exact():
    """3×3 over 512 channels of largest codes passes 2^24, where float32 loses odd integers."""
    source = tritonq.FakeQuantize(dtype="qint8")
    source(torch.tensor([-1.0, 1.0]))
    scale = float(source.scale)
    layer = tritonq.nn.Conv2d(2048, 1, 3, bias=False, qconfig=tritonq.get_qconfig("tensorrt"))
    nn.init.constant_(layer.weight, 0.01)
    x = torch.full((1, 2048, 3, 3), 127 * scale)
    x[0, 0, 0, 0] = scale
    layer(x)
    layer.eval().activation_post_process.disable_fake_quant()
    layer.set_input_quantizer(source.eval())
    exact = (2048 * 9 - 1) * 127 * 127 + 127
    assert exact > 2**24
    assert layer(x).item() == float(
        torch.tensor(exact, dtype=torch.float64).float() * layer.weight_fake_quant.scale * scale
    )


def test_a_bias_too_large_for_its_scale_raises_the_scale():
    """A dead channel has a tiny weight scale; its bias must not overflow 32 bits."""
    layer = tritonq.nn.Conv2d(2, 2, 1, qconfig=tritonq.get_qconfig("tensorrt"))
    with torch.no_grad():
        layer.weight[0] = 0
        layer.bias.copy_(torch.tensor([1e6, 0.5]))
    source = tritonq.FakeQuantize(dtype="qint8")
    x = observed(source, torch.randn(2, 2, 3, 3))
    layer(x)
    layer.eval().activation_post_process.disable_fake_quant()
    layer.set_input_quantizer(source)
    integer = layer.integer_layer(layer.weight, layer.bias)
    assert integer.bias.dtype == torch.int32
    torch.testing.assert_close(layer(x)[:, 0], torch.full((2, 3, 3), 1e6))


def test_deepcopy_and_pickle_keep_the_link_to_the_input_quantizer():
    model = nn.Sequential(tritonq.nn.Conv2d(2, 3, 1, qconfig=QCONFIG), tritonq.nn.Conv2d(3, 2, 1, qconfig=QCONFIG))
    model[1].set_input_quantizer(model[0].activation_post_process)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin[1].input_quantizer is twin[0].activation_post_process
        assert twin[1].input_quantizer is not model[0].activation_post_process
    assert not any("input" in name for name in model.state_dict())


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: tritonq.nn.Conv2d(1, 1, 1), TypeError, "qconfig of Conv2d must be a QConfig, got None"),
        (lambda: tritonq.nn.Embedding(3, 2), TypeError, "qconfig of Embedding must be a QConfig, got None"),
        (
            lambda: tritonq.nn.EmbeddingBag(3, 32, qconfig=tritonq.get_qconfig("w4_g32")),
            ValueError,
            r"the table of an EmbeddingBag can't have a scale per group of 32 \(axis 1\): give it one per row",
        ),
        (lambda: tritonq.nn.Conv2d.from_float(nn.Linear(1, 1)), TypeError, "expects Conv2d, got Linear"),
        (lambda: tritonq.nn.Linear.from_float(nn.Conv2d(1, 1, 1)), TypeError, "expects Linear, got Conv2d"),
        (lambda: tritonq.nn.Conv2d.from_float(nn.Conv2d(1, 1, 1)), TypeError, "got None"),
        (
            lambda: tritonq.nn.Conv2d(1, 1, 1, qconfig=QCONFIG._replace(weight=QCONFIG.weight.with_args(ch_axis=1))),
            ValueError,
            "ch_axis=0",
        ),
        (
            lambda: tritonq.nn.AvgPool2d(2, qconfig="x86"),
            TypeError,
            "qconfig of AvgPool2d must be a QConfig or None, got",
        ),
        (lambda: tritonq.nn.Cat(qconfig="x86"), TypeError, "qconfig of Cat must be a QConfig or None, got"),
        (
            lambda: tritonq.nn.Cat(arrangement="pile"),
            ValueError,
            "arrangement must be one of cat, .*, got 'pile'",
        ),
        (lambda: tritonq.nn.Einsum("0a,0b->0ab"), ValueError, "indices are letters, got '0a,0b->0ab'"),
    ],
)
def test_bad_construction(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_batch_norm_without_statistics_is_refused():
    row = intrinsic.ConvBn2d(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, track_running_stats=False))
    row.qconfig = QCONFIG
    with pytest.raises(ValueError, match="track_running_stats=False"):
        tritonq.nn.ConvBn2d.from_float(row)


def test_float_functional():
    functional = tritonq.nn.FloatFunctional()
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(functional.add(a, b), a + b)
    assert torch.equal(functional.mul(a, b), a * b)
    assert torch.equal(functional.add_relu(a, b), torch.relu(a + b))
    assert torch.equal(functional.cat([a, b], 1), torch.cat([a, b], 1))
    assert torch.equal(functional.matmul(a, b.T), a @ b.T)
    assert torch.equal(functional.add_scalar(a, 2.0), a + 2)
    assert torch.equal(functional.mul_scalar(a, 2.0), a * 2)
    with pytest.raises(RuntimeError, match="no forward"):
        functional(a)
