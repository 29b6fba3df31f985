"""What stands in a QConfig that a user put together: an error names what does not belong there."""

import pytest
import torch
import torch.ao.quantization as ao
from torch import nn

import tritonq

PRESET = tritonq.get_qconfig()
X = torch.linspace(-1, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)


class OffGrid(tritonq.FakeQuantize):
    """Returns other values than it should, with rounding off too."""

    def quantize(self, x):
        return super().quantize(x) + 0.5


class Rounding(nn.Module):
    """No quantizer: nothing switches it off."""

    def forward(self, x):
        return x.round()


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())


@pytest.mark.parametrize("side", ["activation", "weight"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "must be a factory of quantizers, got None; torch.nn.Identity leaves that side in float"),
        ("qint8", "must be a factory of quantizers, got 'qint8'"),
        (tritonq.FakeQuantize(), r"is one FakeQuantize, and each layer needs its own: give FakeQuantize.with_args"),
    ],
)
def test_what_makes_no_quantizers(side, value, message):
    qconfig = PRESET._replace(**{side: value})
    float_model = model()
    float_model.qconfig = qconfig
    for call in (
        lambda: tritonq.prepare_qat(model(), qconfig=qconfig, example_inputs=X),
        lambda: tritonq.prepare_qat(float_model),
        lambda: tritonq.QConfigMapping().set_global(qconfig),
        lambda: tritonq.nn.Conv2d(3, 4, 3, qconfig=qconfig),
    ):
        with pytest.raises(TypeError, match=f"{side} in .*{message}"):
            call()


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"islands": "flaot"}, ValueError, "unknown islands 'flaot' in .*; known: None, float, rounded"),
        ({"folding": "scales"}, ValueError, "unknown folding 'scales' in .*; known: None, approximate"),
        ({"target": "tensort"}, ValueError, "unknown target 'tensort'"),
        ({"round_summands": "no"}, TypeError, "round_summands in .* must be a bool, got 'no'"),
    ],
)
def test_choices_that_do_not_exist(change, kind, message):
    with pytest.raises(kind, match=message):
        tritonq.prepare_qat(model(), qconfig=PRESET._replace(**change), example_inputs=X)


@pytest.mark.parametrize("observer", [tritonq.MinMaxObserver, tritonq.HistogramObserver, tritonq.PassiveObserver])
@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"rule": "torhc"}, "unknown rule 'torhc'; known: torch, torch_v1, megengine"),
        ({"eps": -1.0}, "eps must be positive and finite, got -1.0"),
        ({"eps": float("nan")}, "eps must be positive and finite, got nan"),
        ({"num_channels": -2}, "num_channels must not be negative, got -2"),
    ],
)
def test_choices_of_observers_that_do_not_exist(observer, choice, message):
    with pytest.raises(ValueError, match=message):
        observer(**choice)


@pytest.mark.parametrize("kind", [tritonq.FakeQuantize, tritonq.LearnedStepFakeQuantize])
@pytest.mark.parametrize("observer", [ao.MinMaxObserver, nn.Identity, "minmax"])
def test_observers_of_other_libraries(kind, observer):
    with pytest.raises(TypeError, match="observer must be a class or factory of tritonq's observers"):
        kind(observer=observer) if kind is tritonq.FakeQuantize else kind(observer)


@pytest.mark.parametrize("quantizer", [OffGrid.with_args(dtype="quint8"), Rounding])
def test_quantizers_that_break_the_contract_are_named(quantizer):
    qconfig = PRESET._replace(activation=quantizer)
    name = getattr(quantizer, "make", quantizer).__name__
    with pytest.raises(RuntimeError, match=f"differs by .*check_quantizer tries {name}"):
        tritonq.prepare_qat(model(), qconfig=qconfig, example_inputs=X)


def test_the_type_that_was_set_last_wins_though_it_was_set_before():
    mapping = tritonq.QConfigMapping().set_object_type(nn.Conv2d, None).set_object_type("Conv2d", PRESET)
    net = nn.Sequential(nn.Conv2d(1, 1, 1))
    assert mapping.resolve(net)[net[0]] is PRESET
    assert mapping.set_object_type(nn.Conv2d, None).resolve(net)[net[0]] is None
