"""The converted fixed-point network: integers alone between input and output, equal to eval code for code."""

import copy
import math
from collections import OrderedDict
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from test_fixed_point_prepare import F8NET, Residual
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from qat_models import after_one_batch
from tritonq.demo.model import SmallResNet
from tritonq.deploy import convert
from tritonq.deploy.fixed_point_modules import (
    FixedPointFormat,
    IntegerAdd,
    IntegerAvgPool2d,
    IntegerLayer,
    PoolingWindow,
    overflow_report,
)
from tritonq.nn import FixedPointAvgPool2d, FixedPointConvBn2d, FixedPointLinear
from tritonq.nn.fixed_point_layer import FixedPointLayer
from tritonq.prepare import prepare_qat
from tritonq.qconfig import QConfig
from tritonq.reference.int8_conv import int8_conv2d, requantize


def trained(model, images, labels, qconfig=F8NET, steps=2):
    torch.manual_seed(0)
    quantized = prepare_qat(model, qconfig=qconfig, example_inputs=images[:2])
    optimizer = torch.optim.SGD(quantized.parameters(), lr=0.05, momentum=0.9)
    for step in range(steps):
        batch = slice(32 * step, 32 * step + 32)
        loss = F.cross_entropy(quantized(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return quantized.eval()


@pytest.fixture(scope="module")
def digits():
    """scikit-learn's handwritten digits."""
    from tritonq.cli.data import load_digits

    return load_digits()


def per_channel(choice="search"):
    return QConfig(F8NET.activation.with_args(choice=choice), F8NET.weight.with_args(axis=0))


def codes_of(model, x):
    """What every layer reads, as integer codes, and the network's outputs."""
    found, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, FixedPointLayer):

            def keep(module, given, name=name):
                quantizer = module.input_format
                step = 2.0 ** -int(quantizer.rounded_frac_len())
                found[name] = (quantizer.quantize(given[0]).double() / step).to(torch.int64)

            handles.append(module.register_forward_pre_hook(keep))
        elif isinstance(module, IntegerLayer):

            def keep(module, given, name=name):
                found[name] = (module.input.encode(given[0]) if module.encodes else given[0]).to(torch.int64)

            handles.append(module.register_forward_pre_hook(keep))
    with torch.no_grad():
        outputs = model(x)
    for handle in handles:
        handle.remove()
    return found, outputs


@pytest.mark.parametrize("qconfig", [F8NET, per_channel(), per_channel("rms")], ids=["layer", "channel", "rms"])
def test_residual_network_on_real_data_gives_equal_codes(digits, qconfig):
    torch.manual_seed(1)
    model = trained(SmallResNet(1, 10, width=8), digits.train_images, digits.train_labels, qconfig)
    integers = convert(model)
    simulated, expected = codes_of(model, digits.test_images[:300])
    deployed, outputs = codes_of(integers, digits.test_images[:300])
    assert list(simulated) == list(deployed)
    for name, codes in simulated.items():
        assert torch.equal(codes, deployed[name]), name
        assert codes.unique().numel() > 10, f"{name} says nothing"
    assert torch.equal(outputs, expected)
    assert not overflow_report(integers)


@pytest.mark.parametrize("qconfig", [F8NET, per_channel()], ids=["layer", "channel"])
def test_every_kind_of_join_gives_equal_codes(qconfig):
    torch.manual_seed(2)
    images, labels = torch.randn(128, 2, 12, 12), torch.randint(0, 3, (128,))
    model = trained(Residual(), images, labels, qconfig)
    integers = convert(model)
    (simulated, expected), (deployed, outputs) = codes_of(model, images), codes_of(integers, images)
    for name, codes in simulated.items():
        assert torch.equal(codes, deployed[name]), name
    assert torch.equal(outputs, expected)
    assert model.head.input_factor != 1


class Recorded(TorchDispatchMode):
    """Every operation with the dtypes of its tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [item for item in torch.utils._pytree.tree_leaves((args, kwargs, result)) if torch.is_tensor(item)]
        self.calls.append((func, {tensor.dtype for tensor in tensors}, args))
        return result


def test_no_floating_point_between_input_and_output(digits):
    torch.manual_seed(3)
    integers = convert(trained(SmallResNet(1, 10, width=4), digits.train_images, digits.train_labels, steps=2))
    with torch.no_grad(), Recorded() as recorded:
        integers(digits.test_images[:4])
    is_conv = [func is torch.ops.aten.convolution.default for func, _, _ in recorded.calls]
    assert sum(is_conv) == 7  # the stem, two blocks of two, the one between, the head
    first, last = is_conv.index(True), len(is_conv) - 1 - is_conv[::-1].index(True)
    between = recorded.calls[first : last + 1]
    floats = [func for func, dtypes, _ in between if any(dtype.is_floating_point for dtype in dtypes)]
    assert not floats
    # Before the first convolution the input becomes codes; after the last one accumulators become logits.
    before, after = recorded.calls[:first], recorded.calls[last + 1 :]
    for calls in (before, after):
        products = [args for func, _, args in calls if func is torch.ops.aten.mul.Tensor]
        factors = [torch.as_tensor(args[1]).double() for args in products]
        assert len(products) == 1
        assert all(torch.equal(factor.log2(), factor.log2().round()) for factor in factors)
    assert torch.int32 in before[-1][1]


def test_requantization_against_python():
    values = [*range(-70, 71), 2**31 - 1, -(2**31) + 1, 12345, -(2**20) - 2**4]
    for shift in range(-8, 17):
        for low, high in ((-127, 127), (0, 255)):
            expected = [min(max(round(math.ldexp(value, -shift)), low), high) for value in values]
            for dtype in (torch.int32, torch.int64):
                got = requantize(torch.tensor(values, dtype=dtype), torch.tensor(shift, dtype=torch.int32), low, high)
                assert got.tolist() == expected, shift


@pytest.mark.parametrize("groups", [1, 6])
def test_convolution_against_float64(groups):
    generator = torch.Generator().manual_seed(4)
    x = torch.randint(0, 256, (2, 6, 7, 9), generator=generator, dtype=torch.uint8)
    weight = torch.randint(-127, 128, (6, 6 // groups, 3, 3), generator=generator, dtype=torch.int8)
    bias = torch.randint(-9999, 9999, (6,), generator=generator, dtype=torch.int32)
    geometry = ((2, 1), (1, 0), (1, 2), groups)
    total = int8_conv2d(x, weight, bias, None, *geometry, 0, 0, torch.int32)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), *geometry)
    assert torch.equal(total.double(), expected)
    shift = torch.tensor([0, 3, 6, 8, 10, 13], dtype=torch.int32)
    codes = int8_conv2d(x, weight, bias, shift, *geometry, 0, 255, torch.uint8)
    scaled = expected * (0.5 ** shift.double()).view(1, -1, 1, 1)
    assert torch.equal(codes.double(), scaled.round().clamp(0, 255))


def overflowing():
    """A layer whose bias alone fills 32 bits, and one that reads its output."""
    torch.manual_seed(5)
    conv, head = FixedPointConvBn2d(1, 2, 1), FixedPointLinear(2, 2)
    conv.set_following(head)
    model = nn.Sequential(conv, nn.MaxPool2d(3), nn.Flatten(), head)
    x = torch.rand(4, 1, 3, 3) * 8
    for _ in range(3):
        model(x)
    with torch.no_grad():
        conv.bn.bias.copy_(torch.tensor([1e9, -1e9]))
        head.bias.copy_(torch.tensor([1e9, 0.0]))
    return model.eval(), x


def test_overflow_saturates_and_is_reported():
    model, x = overflowing()
    conv, _, _, head = integers = convert(model)
    conv.encodes = True
    assert conv.bound > 2**31 - 1
    with pytest.warns(RuntimeWarning, match="clamped"):
        outputs = integers(x)
    with torch.no_grad():
        assert torch.equal(outputs, model(x))
    assert outputs[0, 0] == (2**31 - 1) / 2.0 ** int(head.frac_len[0])
    assert overflow_report(integers)["3"] == 4


@pytest.mark.parametrize("compiled", [False, True])
def test_additions_count_what_they_clamp(compiled):
    lengths = torch.zeros(1, dtype=torch.int32), torch.full((1,), 2, dtype=torch.int32)
    add = IntegerAdd(lengths, (2**31 - 1, 127), None)
    model, add.name = nn.Sequential(OrderedDict(joined=add)), "joined"
    a = torch.tensor([2**30, -(2**30), 2**29, 2**29 - 1, 3]).to(torch.int32).view(1, 1, 5)
    b = torch.tensor([0, 0, -1, 3, 1], dtype=torch.int8).view(1, 1, 5)
    largest = 2**31 - 1
    torch._dynamo.reset()
    run = torch.compile(add, backend="aot_eager", fullgraph=True) if compiled else add
    with nullcontext() if compiled else pytest.warns(RuntimeWarning, match="2 accumulators of 'joined' passed 32 bits"):
        assert run(a, b).tolist() == [[[largest, -largest, largest, largest, 13]]]
    assert overflow_report(model) == {"joined": 2}
    run(a, b)
    assert overflow_report(model) == {"joined": 4}
    assert not [name for name in model.state_dict() if "saturated" in name]
    restored = copy.deepcopy(model)
    state = dict(restored.joined.__dict__, _buffers=dict(restored.joined._buffers))
    del state["_buffers"]["saturated"]  # as version 0.2.0 pickled it
    restored.joined.__setstate__(state)
    assert overflow_report(restored) == {}


@pytest.mark.parametrize("window", [None, (2904, 2904)])
def test_averages_of_more_values_than_32_bits_sum_count_what_they_clamp(window):
    area, stride = 2904**2, None if window is None else (1, 1)
    pool = IntegerAvgPool2d(
        PoolingWindow(window, stride, (0, 0), area, keepdim=False),
        torch.zeros(1, dtype=torch.int32),
        FixedPointFormat(0, 0, 255),
        None,
    )
    x = torch.full((1, 2, 2904, 2904), 255, dtype=torch.uint8)
    x[:, 1] = 1
    with pytest.warns(RuntimeWarning, match="1 accumulators of '' passed 32 bits and were clamped"):
        assert pool(x).flatten().tolist() == [2**31 - 1, area]
    assert overflow_report(pool) == {"": 1}


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_compiled_network_gives_the_codes_of_the_eager_one(channels_last):
    x = torch.randn(2, 2, 10, 10)
    model = prepare_qat(Residual(), qconfig=per_channel(), example_inputs=x).train()
    model(x).sum().backward()
    integers = convert(model.eval())
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    torch._dynamo.reset()
    assert torch.equal(torch.compile(integers, backend="aot_eager", fullgraph=True)(x), integers(x))


def test_overflow_in_a_compiled_network_warns_and_is_counted():
    model, x = overflowing()
    integers = convert(model)
    integers[0].encodes = True
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(integers), backend="aot_eager", fullgraph=True)
    with pytest.warns(RuntimeWarning) as caught:
        outputs = compiled(x)
    told = [str(warning.message).split(" passed", 1)[0] for warning in caught]
    assert "4 accumulators of a compiled fixed-point network" in told
    assert overflow_report(compiled._orig_mod)["3"] == 4
    with pytest.warns(RuntimeWarning, match="clamped"):
        assert torch.equal(outputs, integers(x))


def test_accumulators_of_64_bits_are_those_of_32_where_both_suffice():
    x = torch.randint(0, 256, (1, 4, 5, 5), dtype=torch.uint8)
    weight = torch.randint(-127, 128, (3, 4, 3, 3), dtype=torch.int8)
    bias, counter = torch.zeros(3, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    arguments = (x, weight, bias, None, (1, 1), (1, 1), (1, 1), 1, 0, 0, torch.int32)
    assert torch.equal(int8_conv2d(*arguments), int8_conv2d(*arguments, saturated=counter))
    assert int(counter) == 0
    bias.fill_(2**31 - 1)
    total = int8_conv2d(*arguments, saturated=counter)
    assert total.max() == 2**31 - 1
    assert int(counter) == int((F.conv2d(x.long(), weight.long(), padding=1) > 0).sum())


def test_input_codes():
    x = torch.tensor([-1.0, math.nan, math.inf, -math.inf, 0.375, 0.625])
    assert FixedPointFormat(2, -127, 127).encode(x).tolist() == [-4, 0, 127, -127, 2, 2]
    assert FixedPointFormat(2, 0, 255).encode(x).tolist() == [0, 0, 255, 0, 2, 2]


def test_what_cannot_be_converted_is_refused_and_left_as_it_was():
    model = prepare_qat(Residual(), qconfig=F8NET, example_inputs=torch.randn(2, 2, 12, 12))
    types = [type(part) for part in model.modules()]
    with pytest.raises(ValueError, match=r"'stem\.0' never observed"):
        convert(model, inplace=True)
    model(torch.randn(4, 2, 12, 12))
    model.b1[0].input_format.disable_fake_quant()
    with pytest.raises(ValueError, match=r"'b1\.0' is switched off"):
        convert(model, inplace=True)
    assert [type(part) for part in model.modules()] == types
    wide = QConfig(F8NET.activation.with_args(word_len=10), F8NET.weight)
    model = prepare_qat(Residual(), qconfig=wide, example_inputs=torch.randn(2, 2, 12, 12))
    model(torch.randn(4, 2, 12, 12))
    with pytest.raises(ValueError, match="more than 8 bits"):
        convert(model)
    x = torch.randn(2, 1, 8, 8)
    model = prepare_qat(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), qconfig=F8NET, example_inputs=x)
    model(x)
    model[1] = FixedPointAvgPool2d((2, 2), input_format=model[0].input_format)
    with pytest.raises(ValueError, match="'1' can't be converted: an average pooling needs a following layer"):
        convert(model, inplace=True)
    assert isinstance(model[1], FixedPointAvgPool2d)


def test_inplace_copies_and_modes():
    x = torch.randn(4, 2, 12, 12)
    model = after_one_batch(Residual(), x, qconfig=F8NET)
    with torch.no_grad():
        expected = model(x)
    integers = convert(model)
    assert torch.equal(copy.deepcopy(integers)(x), expected)
    assert convert(model, inplace=True) is model
    assert torch.equal(model(x), expected)
    with pytest.raises(RuntimeError, match="eval"):
        integers.train()
    with pytest.raises(ValueError, match=r"converted already|no quantization-aware"):
        convert(integers)


def test_linear_layers_take_any_leading_axes_and_no_rows():
    torch.manual_seed(0)
    x = torch.rand(2, 3, 6)
    model = after_one_batch(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), x, qconfig=F8NET)
    converted = convert(model.train())
    assert torch.equal(converted(x), model.eval()(x).float())
    assert converted(x[:0]).shape == (0, 3, 3)


def test_a_linear_layer_takes_one_sample_without_a_batch():
    x = torch.rand(6, 4)
    model = prepare_qat(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), qconfig=F8NET, example_inputs=x)
    model(x)
    model.eval()
    assert torch.equal(convert(model)(x[0]), model(x[0]))
