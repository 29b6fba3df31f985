"""Ranges to scale and zero point: torch's own functions, and docs/numbers.md worked by hand."""

import pytest
import torch
from torch.ao.quantization import MinMaxObserver as TorchMinMaxObserver

from tolerances import FLOAT32
from tritonq.arithmetic import round_half_away
from tritonq.qparams import range_to_qparams
from tritonq.quantized_type import QUANTIZED_TYPES, QuantizedType

RANGES = [(-1.0, 2.0), (-3.0, 0.5), (0.25, 4.0), (-4.0, -0.5), (0.0, 0.0), (-1e-9, 1e-9), (-7e4, 3e4)]


@pytest.mark.parametrize(
    ("name", "codes"),
    [
        ("qint8", (-128, 127)),
        ("qint8_narrow", (-127, 127)),
        ("quint8", (0, 255)),
        ("qint4", (-8, 7)),
        ("quint4", (0, 15)),
        ("qint2", (-2, 1)),
        ("quint2", (0, 3)),
        ("qint1", (0, 1)),
        ("qint32", (-(2**31), 2**31 - 1)),
    ],
)
def test_types_have_the_code_ranges_of_the_table(name, codes):
    qtype = QUANTIZED_TYPES[name]
    assert (qtype.quant_min, qtype.quant_max) == codes
    assert torch.iinfo(qtype.storage_dtype).min <= codes[0]
    assert torch.iinfo(qtype.storage_dtype).max >= codes[1]


def test_derived_properties():
    assert QuantizedType.of(8, narrow=True).narrow
    assert not QuantizedType.of(8).narrow
    assert QuantizedType(0, 127, symmetric=False).bits == 7
    assert QuantizedType(0, 255).fixed_zero_point == 128
    assert QuantizedType(0, 255, symmetric=False).fixed_zero_point is None
    assert QuantizedType(-(2**31), 0).torch_dtype == torch.qint32
    assert QuantizedType(-(2**31) - 1, 0).torch_dtype is None


@pytest.mark.parametrize("bounds", RANGES)
@pytest.mark.parametrize(
    ("dtype", "qscheme", "qtype"),
    [
        (torch.qint8, torch.per_tensor_symmetric, QuantizedType.of(8)),
        (torch.quint8, torch.per_tensor_symmetric, QuantizedType(0, 255)),
        (torch.quint8, torch.per_tensor_affine, QuantizedType(0, 255, symmetric=False)),
        (torch.qint8, torch.per_tensor_affine, QuantizedType(-128, 127, symmetric=False)),
    ],
)
def test_torch_rule_equals_torch_ao(bounds, dtype, qscheme, qtype):
    observer = TorchMinMaxObserver(dtype=dtype, qscheme=qscheme)
    observer(torch.tensor(bounds))
    scale, zero_point = observer.calculate_qparams()
    ours = range_to_qparams(*(torch.tensor(bound) for bound in bounds), qtype)
    assert ours.scale.dtype == torch.float32
    assert ours.zero_point.dtype == torch.int32
    assert float(ours.scale) == float(scale)
    assert int(ours.zero_point) == int(zero_point)


@pytest.mark.parametrize("exponent", [-7, -45])
@pytest.mark.parametrize(("quant_min", "quant_max", "symmetric"), [(-128, 127, True), (0, 255, False), (-8, 7, True)])
def test_v1_rule_equals_torchs_fused_operator(quant_min, quant_max, symmetric, exponent):
    """At the lower exponents scales have no finite reciprocal."""
    generator = torch.Generator().manual_seed(0)
    one = torch.ones(1, dtype=torch.long)
    for trial in range(300):
        x = torch.randn(17, generator=generator) * 10.0 ** (trial % 11 + exponent)
        x = {0: x.abs(), 1: -x.abs(), 2: x * 0 if trial % 50 == 2 else x}.get(trial % 4, x)
        scale, zero_point = torch.ones(1), torch.zeros(1, dtype=torch.int32)
        low, high = torch.tensor(torch.inf), torch.tensor(-torch.inf)
        torch.fused_moving_avg_obs_fake_quant(
            x, one, one, low, high, scale, zero_point, 0.01, quant_min, quant_max, -1, False, symmetric
        )
        ours = range_to_qparams(x.min(), x.max(), QuantizedType(quant_min, quant_max, symmetric), rule="torch_v1")
        assert (float(ours.scale), int(ours.zero_point)) == (float(scale), int(zero_point)), (trial, x.min(), x.max())


def test_v1_rule_divides_as_torchs_fused_operator_does():
    """Many channels: of narrow codes one scale in 2,700 differed by a bit when its range was widened in float64."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20_000, 2, generator=generator)
    scale, zero_point = torch.ones(len(x)), torch.zeros(len(x), dtype=torch.int32)
    low, high = torch.full_like(scale, torch.inf), torch.full_like(scale, -torch.inf)
    one = torch.ones(1, dtype=torch.long)
    torch.fused_moving_avg_obs_fake_quant(x, one, one, low, high, scale, zero_point, 0.01, -127, 127, 0, True, True)
    ours = range_to_qparams(*x.aminmax(dim=1), QuantizedType.of(8, narrow=True, axis=0), rule="torch_v1")
    assert torch.equal(ours.scale, scale)
    assert torch.equal(ours.zero_point, zero_point)


@pytest.mark.parametrize(
    ("low", "high", "qtype", "scale", "zero_point"),
    [
        (-1.0, 2.0, QuantizedType.of(8), 2.0 / 127.5, 0),
        (-1.0, 2.0, QuantizedType.of(8, narrow=True), 2.0 / 127, 0),
        (-1.0, 2.0, QuantizedType(0, 255, symmetric=False), 3.0 / 255, 85),
        (0.5, 2.0, QuantizedType(0, 255, symmetric=False), 2.0 / 255, 0),
        (-1e-9, 1e-9, QuantizedType.of(8), 1e-5, 0),
        # m/s = -2.5 rounds away to -3: z = 0 + 3.
        (-2.5, 12.5, QuantizedType(0, 15, symmetric=False), 1.0, 3),
    ],
)
def test_megengine_rule_by_hand(low, high, qtype, scale, zero_point):
    ours = range_to_qparams(torch.tensor(low), torch.tensor(high), qtype, rule="megengine")
    assert float(ours.scale) == pytest.approx(scale, rel=FLOAT32.rtol)
    assert int(ours.zero_point) == zero_point


def test_torch_rule_rounds_the_zero_point_half_to_even():
    ours = range_to_qparams(torch.tensor(-2.5), torch.tensor(12.5), QuantizedType(0, 15, symmetric=False))
    assert int(ours.zero_point) == 2


def test_per_channel_equals_channel_by_channel():
    low, high = torch.tensor([-1.0, -5.0, 0.0]), torch.tensor([2.0, 1.0, 0.0])
    together = range_to_qparams(low, high, QuantizedType.of(8, axis=0))
    alone = [range_to_qparams(low[i], high[i], QuantizedType.of(8)) for i in range(3)]
    assert together.scale.tolist() == [float(q.scale) for q in alone]


@pytest.mark.parametrize("bounds", [(torch.inf, -torch.inf), (torch.nan, 1.0), (-1.0, torch.inf)])
def test_a_range_without_data_gives_scale_one(bounds):
    ours = range_to_qparams(*(torch.tensor(bound) for bound in bounds), QuantizedType(0, 255, symmetric=False))
    assert (float(ours.scale), int(ours.zero_point)) == (1.0, 0)


def test_round_half_away():
    x = torch.tensor([-2.5, -1.5, -0.5, 0.0, 0.49999997, 0.5, 2.5, torch.inf, 8388609.0])
    assert round_half_away(x).tolist() == [-3, -2, -1, 0, 0, 1, 3, torch.inf, 8388609]
    assert torch.isnan(round_half_away(torch.tensor(torch.nan)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: QuantizedType(3, 3), "quant_min must be below quant_max"),
        (lambda: QuantizedType(0, 2**32), "at most 2\\^32 codes"),
        (lambda: QuantizedType(0, 1, rounding="up"), "unknown rounding 'up'"),
        (lambda: QuantizedType.of(0), "bits must be in 1..32"),
        (lambda: QuantizedType.of(8, signed=False, narrow=True), "narrow range is signed"),
        (lambda: range_to_qparams(torch.zeros(2), torch.zeros(3), QuantizedType.of(8)), "differ in shape"),
        (lambda: range_to_qparams(torch.zeros(2), torch.zeros(2), QuantizedType.of(8), rule="x"), "known: torch"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_codes_must_be_integers():
    with pytest.raises(TypeError, match=r"quant_min must be an int, got 0\.5"):
        QuantizedType(0.5, 3)
    with pytest.raises(TypeError, match=r"bits must be an int, got 4\.5"):
        QuantizedType.of(4.5)
    with pytest.raises(TypeError, match=r"group must be an int or None, got 2\.5"):
        QuantizedType.of(4, axis=1, group=2.5)
    with pytest.raises(TypeError, match="axis must be an int or None, got 'x'"):
        QuantizedType.of(4, axis="x")
