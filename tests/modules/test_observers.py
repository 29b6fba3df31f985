"""Observers and the FakeQuantize module against torch.ao's, and what tritonq promises beyond it."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch.ao import quantization as ao

import tritonq
from tolerances import FLOAT32, assert_close
from tritonq.quantized_type import QUANTIZED_TYPES, type_from_arguments

PAIRS = [
    (tritonq.MinMaxObserver, ao.MinMaxObserver, {}),
    (tritonq.MovingAverageMinMaxObserver, ao.MovingAverageMinMaxObserver, {"averaging_constant": 0.2}),
    (tritonq.PerChannelMinMaxObserver, ao.PerChannelMinMaxObserver, {"ch_axis": 1}),
    (
        tritonq.MovingAveragePerChannelMinMaxObserver,
        ao.MovingAveragePerChannelMinMaxObserver,
        {"averaging_constant": 0.3, "ch_axis": 1},
    ),
]


def batches(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, 4, 5, generator=generator) * (k + 1) + k for k in range(count)]


@pytest.mark.parametrize(("ours", "theirs", "arguments"), PAIRS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8])
def test_ranges_and_qparams_equal_torch_ao(ours, theirs, arguments, symmetric, dtype):
    per = "per_channel" if "ch_axis" in arguments else "per_tensor"
    qscheme = getattr(torch, f"{per}_{'symmetric' if symmetric else 'affine'}")
    a, b = (cls(dtype=dtype, qscheme=qscheme, **arguments) for cls in (ours, theirs))
    for x in batches():
        assert a(x) is x
        b(x)
    assert_close(a.min_val, b.min_val, FLOAT32, size=0)
    assert_close(a.max_val, b.max_val, FLOAT32, size=0)
    scale, zero_point = b.calculate_qparams()
    assert_close(a.calculate_qparams().scale.flatten(), scale.flatten(), FLOAT32, size=0)
    assert a.calculate_qparams().zero_point.flatten().tolist() == zero_point.flatten().tolist()


def test_nonfinite_values_are_skipped_and_counted():
    observer = tritonq.MinMaxObserver()
    observer(torch.tensor([1.0, torch.nan, -2.0, torch.inf]))
    assert (float(observer.min_val), float(observer.max_val)) == (-2.0, 1.0)
    assert int(observer.nonfinite_count) == 2


def test_a_batch_without_finite_values_changes_nothing():
    observer = tritonq.MovingAverageMinMaxObserver()
    observer(torch.tensor([-1.0, 2.0]))
    observer(torch.full((3,), torch.nan))
    observer(torch.empty(0))
    assert (float(observer.min_val), float(observer.max_val)) == (-1.0, 2.0)


def test_the_first_batch_is_copied_also_when_it_is_zero():
    observer = tritonq.MovingAverageMinMaxObserver(averaging_constant=0.5)
    observer(torch.zeros(3))
    observer(torch.tensor([-2.0, 4.0]))
    assert (float(observer.min_val), float(observer.max_val)) == (-1.0, 2.0)


def test_momentum_is_the_kept_fraction():
    observer = tritonq.MovingAverageMinMaxObserver()
    observer.set_momentum(0.75)
    observer(torch.tensor([0.0, 4.0]))
    observer(torch.tensor([0.0, 8.0]))
    assert float(observer.max_val) == 5.0


@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8, torch.int16, torch.int32, torch.quint4x2])
def test_reduce_range_is_torch_aos(dtype):
    ours, theirs = (kind(dtype=dtype, reduce_range=True) for kind in (tritonq.MinMaxObserver, ao.MinMaxObserver))
    assert (ours.quant_min, ours.quant_max) == (theirs.quant_min, theirs.quant_max)


def test_qparams_and_buffers_are_torch_aos():
    for ours, theirs in (
        (tritonq.MinMaxObserver(), ao.MinMaxObserver()),
        (tritonq.HistogramObserver(), ao.HistogramObserver()),
        (tritonq.PerChannelMinMaxObserver(), ao.PerChannelMinMaxObserver()),
    ):
        before = ours.min_val
        for observer in (ours, theirs):
            observer(torch.linspace(-1, 2, 12).view(4, 3))
        shapes = [[value.shape for value in observer.calculate_qparams()] for observer in (ours, theirs)]
        assert shapes[0] == shapes[1]
        assert ours.min_val is before, "DDP and nn.DataParallel hold buffers"
    quantizer = tritonq.FakeQuantize(tritonq.PerChannelMinMaxObserver, qscheme=torch.per_channel_affine)
    before = (quantizer.scale, quantizer.zero_point)
    quantizer(torch.randn(4, 3))
    assert all(a is b for a, b in zip(before, (quantizer.scale, quantizer.zero_point), strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": torch.float16}, "dtype must be one of"),
        ({"dtype": "qint9"}, "known: qint8"),
        ({"qscheme": torch.per_channel_affine_float_qparams}, "zero points are integers"),
        ({"quant_min": 0}, "go together"),
        ({"quant_min": 0, "quant_max": 300}, "does not fit"),
        ({"is_dynamic": True}, "is_dynamic"),
    ],
)
def test_observers_refuse_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        tritonq.MinMaxObserver(**arguments)


def test_observers_refuse_a_bad_averaging_constant_and_scheme():
    with pytest.raises(ValueError, match="in \\(0, 1\\]"):
        tritonq.MovingAverageMinMaxObserver(averaging_constant=0)
    for bad in (0.5, float("nan")):
        with pytest.raises(ValueError, match="copy_above must be at least 1"):
            tritonq.MovingAverageMinMaxObserver(copy_above=bad)
    with pytest.raises(ValueError, match="per-channel qscheme"):
        tritonq.PerChannelMinMaxObserver(qscheme=torch.per_tensor_affine)
    with pytest.raises(TypeError, match="x must be float32"):
        tritonq.MinMaxObserver()(torch.zeros(3, dtype=torch.int32))


def test_reduce_range_halves_the_codes():
    qtype = type_from_arguments(torch.quint8, torch.per_tensor_affine, True, 0, 255, 0, "half_even")
    assert (qtype.quant_min, qtype.quant_max) == (0, 127)


@pytest.mark.parametrize("backend", ["fbgemm", "x86", "qnnpack", "onednn"])
@pytest.mark.parametrize("version", [0, 1])
def test_fake_quantize_equals_torch_ao_presets(backend, version):
    """Activations and weights of every preset: outputs and gradients, over several training batches."""
    ours, theirs = tritonq.get_default_qat_qconfig(backend, version), ao.get_default_qat_qconfig(backend, version)
    for side in ("activation", "weight"):
        a, b = getattr(ours, side)(), getattr(theirs, side)()
        assert (a.quant_min, a.quant_max) == (b.activation_post_process.quant_min, b.activation_post_process.quant_max)
        for x in batches():
            p, q = x.clone().requires_grad_(), x.clone().requires_grad_()
            y, z = a(p), b(q)
            assert_close(a.scale, b.scale, FLOAT32, size=0)
            assert a.zero_point.tolist() == b.zero_point.tolist()
            # The moving average differs in its last bit between torch's two versions, so codes may move at ties.
            assert ((y - z).abs() <= 1e-5 + 0.001 * a.scale.max()).float().mean() > 0.995
            y.sum().backward()
            z.sum().backward()
            assert (p.grad != q.grad).float().mean() < 0.005


def test_presets_by_name():
    weight = tritonq.get_qconfig("tensorrt").weight()
    assert (weight.quant_min, weight.quant_max, weight.ch_axis) == (-127, 127, 0)
    lowbit = tritonq.get_qconfig("megengine_lowbit").activation()
    assert (lowbit.quant_min, lowbit.quant_max) == (-8, 7)
    with pytest.raises(ValueError, match="unknown preset 'int7'; known: onnxruntime, tensorrt, "):
        tritonq.get_qconfig("int7")
    with pytest.raises(ValueError, match="known: fbgemm, x86"):
        tritonq.get_default_qat_qconfig("tpu")
    with pytest.raises(ValueError, match="version must be 0 or 1"):
        tritonq.get_default_qat_qconfig("x86", 2)


def test_with_args_chains_and_makes_new_instances():
    factory = tritonq.FakeQuantize.with_args(dtype=torch.qint8).with_args(qscheme=torch.per_tensor_symmetric)
    a, b = factory(), factory()
    assert a is not b
    assert a.qscheme == torch.per_tensor_symmetric
    assert factory(dtype=torch.quint8).quant_max == 255
    assert pickle.loads(pickle.dumps(factory)) == factory


def test_switches():
    quantizer = tritonq.FakeQuantize()
    x = batches(1)[0]
    quantizer.disable_fake_quant()
    assert torch.equal(quantizer(x), x)
    scale = quantizer.scale.clone()
    quantizer.enable_fake_quant()
    quantizer.disable_observer()
    quantizer(100 * x)
    assert torch.equal(quantizer.scale, scale)
    assert "fake_quant=on, observer=off" in repr(quantizer)


def test_nothing_is_observed_in_eval_mode():
    quantizer = tritonq.FakeQuantize()
    quantizer(batches(1)[0])
    scale = quantizer.scale.clone()
    quantizer.eval()(batches(1)[0] * 100)
    assert torch.equal(quantizer.scale, scale)


def test_a_quantizer_that_never_observed_passes_through_with_one_warning():
    quantizer = tritonq.FakeQuantize().eval()
    x = batches(1)[0]
    with pytest.warns(UserWarning, match="observed nothing"):
        assert quantizer(x) is x
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantizer(x)


@pytest.mark.parametrize("convert", [torch.nn.Module.half, torch.nn.Module.bfloat16, torch.nn.Module.double])
def test_qparams_keep_their_dtype(convert):
    quantizer = tritonq.get_qconfig("tensorrt").weight(num_channels=3)
    quantizer(torch.randn(3, 4))
    before = copy.deepcopy(quantizer.state_dict())
    convert(quantizer)
    after = quantizer.state_dict()
    assert {k: v.dtype for k, v in after.items()} == {k: v.dtype for k, v in before.items()}
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_buffers_have_their_final_shape_from_construction():
    fresh = tritonq.get_qconfig("tensorrt").weight(num_channels=3)
    used = copy.deepcopy(fresh)
    used(torch.randn(3, 4))
    fresh.load_state_dict(used.state_dict())
    assert torch.equal(fresh.scale, used.scale)
    assert fresh.has_qparams()


def test_a_per_channel_quantizer_adopts_the_length_of_data_or_checkpoint():
    used = tritonq.get_qconfig("tensorrt").weight()
    used(torch.randn(3, 4))
    late = tritonq.get_qconfig("tensorrt").weight()
    late.load_state_dict(used.state_dict())
    assert torch.equal(late.scale, used.scale)
    with pytest.raises(ValueError, match="keeps 3 channels along axis 0, got 5"):
        late.allocate(5)


def test_ranges_per_tensor_and_per_channel_do_not_merge():
    whole = tritonq.MinMaxObserver()
    channels = tritonq.MinMaxObserver(qscheme=torch.per_channel_affine)
    whole(torch.ones(3, 4))
    for one, other in ((whole, channels), (channels, whole)):
        with pytest.raises(ValueError, match="cannot merge a range per channel and one per tensor"):
            one.merge(other)
    assert not channels.has_observed()


def test_deepcopy_and_pickle():
    quantizer = tritonq.FakeQuantize()
    quantizer(batches(1)[0])
    buffer = io.BytesIO()
    torch.save(quantizer.state_dict(), buffer)
    buffer.seek(0)
    assert set(torch.load(buffer, weights_only=True)) == set(quantizer.state_dict())
    for twin in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer))):
        x = batches(1, seed=3)[0]
        assert torch.equal(twin.eval()(x), quantizer.eval()(x))


def test_the_backward_uses_the_qparams_of_its_forward():
    """A later observation changes scale and switch in place; an earlier graph must not notice."""
    quantizer = tritonq.FakeQuantize(tritonq.MovingAverageMinMaxObserver, averaging_constant=1.0)
    x = torch.tensor([-1.0, 0.5, 3.0], requires_grad=True)
    y = quantizer(x)
    quantizer(torch.tensor([0.0, 1e-3]))
    quantizer.disable_fake_quant()
    y.sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "kind", [tritonq.MinMaxObserver, tritonq.PerChannelMinMaxObserver, tritonq.HistogramObserver, tritonq.FakeQuantize]
)
def test_a_quantized_type_is_taken_whole(kind):
    axis = 1 if kind is tritonq.PerChannelMinMaxObserver else None
    qtype = tritonq.QuantizedType(-7, 6, symmetric=False, axis=axis, rounding="half_away")
    given = {"ch_axis": 1} if axis == 1 else {}
    assert kind(dtype=qtype, **given).qtype == qtype
    other = torch.per_tensor_affine if axis == 1 else torch.per_channel_affine
    for argument in (
        {"rounding": "half_even"},
        {"reduce_range": True},
        {"qscheme": other},
        {"qscheme": torch.per_channel_symmetric if axis == 1 else torch.per_tensor_symmetric},
        *([{"ch_axis": 2}] if axis == 1 else []),
    ):
        with pytest.raises(ValueError, match=r"contradicts|per-channel observer needs"):
            kind(dtype=qtype, **{**given, **argument})


@pytest.mark.parametrize("kind", [tritonq.MinMaxObserver, tritonq.PerChannelMinMaxObserver])
@pytest.mark.parametrize("name", ["qint4", "quint4"])
def test_a_named_type_says_its_codes_and_symmetry(kind, name):
    per_channel = kind is tritonq.PerChannelMinMaxObserver
    named = QUANTIZED_TYPES[name]
    assert kind(dtype=name).qtype == named.with_axis(0 if per_channel else None)
    symmetric = torch.per_channel_symmetric if per_channel else torch.per_tensor_symmetric
    affine = torch.per_channel_affine if per_channel else torch.per_tensor_affine
    agrees, contradicts = (symmetric, affine) if named.symmetric else (affine, symmetric)
    assert kind(dtype=name, qscheme=agrees, rounding="half_away").qtype.symmetric == named.symmetric
    for argument in ({"qscheme": contradicts}, {"reduce_range": True}):
        with pytest.raises(ValueError, match="contradicts dtype"):
            kind(dtype=name, **argument)


def test_a_per_channel_observer_needs_a_type_with_an_axis():
    with pytest.raises(ValueError, match="needs a type with an axis"):
        tritonq.PerChannelMinMaxObserver(dtype=tritonq.QuantizedType.of(4))
    observer = tritonq.PerChannelMinMaxObserver(dtype=tritonq.QuantizedType.of(4, axis=2))
    observer(torch.zeros(2, 3, 4))
    assert observer.min_val.shape == (4,)


def test_a_quantizer_pickled_before_there_was_a_flag_goes_on():
    """Version 0.1.0 pickled quantizers without ``begins``."""
    quantizer = tritonq.FakeQuantize()
    quantizer(torch.linspace(-1, 1, 9))
    del quantizer._buffers["begins"]
    loaded = pickle.loads(pickle.dumps(quantizer))
    loaded.load_state_dict(quantizer.state_dict())
    assert torch.equal(loaded(torch.linspace(-1, 1, 9)), quantizer(torch.linspace(-1, 1, 9)))


def test_what_a_passive_observer_was_given_is_taken_over_by_each_way_to_ask():
    for ask in (lambda q: q.calculate_qparams().scale, lambda q: q.grid().scale, lambda q: q.has_qparams() and q.scale):
        quantizer = tritonq.FakeQuantize(tritonq.PassiveObserver, dtype=torch.qint8)
        quantizer.activation_post_process.set_qparams(0.5)
        assert ask(quantizer).tolist() == [0.5]


def test_a_passive_observer_keeps_its_buffers_as_it_learns_the_number_of_channels():
    observer = tritonq.PassiveObserver(dtype=torch.qint8, qscheme=torch.per_channel_symmetric)
    observer.set_qparams(0.5)
    held = dict(observer.named_buffers())
    observer.allocate(3)
    assert observer.scale.tolist() == [0.5] * 3
    assert all(buffer is held[name] for name, buffer in observer.named_buffers())
