"""One batch with an outlier: the default range comes back at once, torch.ao's does not, and both tell it once."""

import pytest
import torch

import tritonq
from tolerances import EXACT, assert_close
from tritonq import outliers
from tritonq.outliers import LateReading
from tritonq.reference.min_max import FALL, update_range

MESSAGE = "up more than a hundredfold"


def quantizer(preset):
    torch.manual_seed(0)
    made = (tritonq.get_qconfig(preset) if preset != "x86" else tritonq.get_default_qat_qconfig("x86")).activation()
    for _ in range(20):
        made(torch.randn(64))
    return made


def outlier():
    x = torch.randn(64)
    x[3] = 1e6
    return x


@pytest.mark.parametrize("preset", ["onnxruntime", "tensorrt"])
def test_the_default_scale_is_back_within_fifty_batches(preset):
    made = quantizer(preset)
    before = float(made.scale)
    made(outlier())
    assert float(made.scale) > 100 * before
    with pytest.warns(UserWarning, match=f"{MESSAGE}.*follows the next batches down"):
        made(torch.randn(64))
    for _ in range(49):
        made(torch.randn(64))
    assert before / 2 < float(made.scale) < 2 * before


def test_torch_ao_presets_keep_their_numbers_and_tell():
    made = quantizer("x86")
    theirs = torch.ao.quantization.MovingAverageMinMaxObserver()
    theirs.min_val, theirs.max_val = (
        getattr(made.activation_post_process, name).clone() for name in ("min_val", "max_val")
    )
    batches = [outlier(), *(torch.randn(64) for _ in range(9))]
    for x in batches:
        theirs(x)
    made(batches[0])
    with pytest.warns(UserWarning, match=f"{MESSAGE}.*stays up"):
        made(batches[1])
    for x in batches[2:]:  # told once: a further warning would fail the test
        made(x)
    assert_close(made.activation_post_process.max_val, theirs.max_val, EXACT)


def test_a_layer_tells_too_and_ordinary_growth_does_not(recwarn):
    torch.manual_seed(0)
    layer = tritonq.nn.ConvBnReLU2d(3, 4, 1, qconfig=tritonq.get_qconfig())
    for step in range(6):
        with torch.no_grad():
            layer.bn.weight.fill_(20.0**step / 1000)
        layer(torch.randn(8, 3, 4, 4))
    assert not recwarn.list
    with torch.no_grad():
        layer.bn.bias.fill_(1e9)
    layer(torch.randn(8, 3, 4, 4))
    with pytest.warns(UserWarning, match=MESSAGE):
        layer(torch.randn(8, 3, 4, 4))


def test_a_batch_of_zeros_and_an_ordinary_fall_are_averaged():
    ends = [torch.tensor(value) for value in (-1.0, 8.0)]
    for largest in (0.0, 9.0 / FALL, 1.9, 7.0):
        low, high = torch.tensor(-largest), torch.tensor(largest)
        new = update_range(low, high, *ends, 0.01, 1.5)
        assert float(new[1]) == pytest.approx(8.0 + 0.01 * (largest - 8.0))
    low, high = torch.tensor(-0.05), torch.tensor(0.07)
    assert [float(end) for end in update_range(low, high, *ends, 0.01, 1.5)] == [float(low), float(high)]
    assert float(update_range(low, high, *ends, 0.01, None)[1]) > 7.9


def test_a_late_reading_gives_what_an_earlier_call_sent():
    reading = LateReading(period=3)
    ends = [(torch.tensor(-step), torch.tensor(step / 2)) for step in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)]
    assert [reading.latest(*pair) for pair in ends] == [None, 1.0, None, None, 4.0, None]


def test_a_reading_that_is_under_way_is_not_waited_for():
    class Arrival:
        has_arrived = False

        def query(self):
            return self.has_arrived

    reading, arrival = LateReading(period=1), Arrival()
    reading.latest(torch.tensor(-1.0), torch.tensor(2.0))
    reading._arrival = arrival
    assert reading.latest(torch.tensor(-1.0), torch.tensor(8.0)) is None
    arrival.has_arrived = True
    assert reading.latest(torch.tensor(-1.0), torch.tensor(9.0)) == 2.0


@pytest.mark.parametrize("preset", ["onnxruntime", "x86"])
def test_an_outlier_is_told_a_step_later_where_ranges_are_read_late(preset, monkeypatch):
    made = quantizer(preset)
    readings = {}

    def late(observer):
        return readings.setdefault(observer, LateReading(period=1)).latest(observer.min_val, observer.max_val)

    monkeypatch.setattr(outliers, "_magnitude", late)
    for x in (torch.randn(64), torch.randn(64), outlier(), torch.randn(64)):
        made(x)
    with pytest.warns(UserWarning, match=MESSAGE):
        made(torch.randn(64))
