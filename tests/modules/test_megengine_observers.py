"""MegEngine's observers: its rule and momentum, and the observer whose scale is given."""

import numpy as np
import pytest
import torch
from torch import nn

import tritonq
from tolerances import SUMS, assert_close


def test_megengines_momentum_counts_one_update_later():
    """MegEngine copies the momentum in use at the end of each forward; its largest value keeps the range."""
    observer = tritonq.MovingAverageMinMaxObserver(dtype="qint8", rule="megengine", averaging_constant=0.1)
    found = []
    for value, momentum in ((1.0, None), (2.0, None), (4.0, 0.5), (8.0, 1.0), (16.0, None), (32.0, None)):
        if momentum is not None:
            observer.set_momentum(momentum)
        observer(torch.tensor([0.0, value]))
        found.append(float(observer.max_val))
    # Kept: 0.9, 0.9, then a half from the fourth batch on, then all.
    assert found == pytest.approx([1.0, 1.1, 1.39, 4.695, 4.695, 4.695])
    with pytest.raises(ValueError, match="momentum must be in"):
        observer.set_momentum(1.5)
    with pytest.raises(ValueError, match="averaging_constant must be in"):
        tritonq.MovingAverageMinMaxObserver().set_momentum(1.0)


@pytest.mark.parametrize("kind", [tritonq.nn.Linear, tritonq.nn.LinearReLU])
def test_megengines_momentum_counts_in_layers_whose_operator_observes(kind):
    """While a momentum waits for the next update, the quantizer runs itself, so that the update is noticed."""
    quantizer = tritonq.FakeQuantize.with_args(
        observer=tritonq.MovingAverageMinMaxObserver, dtype="qint8", rule="megengine", averaging_constant=0.25
    )
    layer = kind(1, 1, qconfig=tritonq.QConfig(quantizer, quantizer))
    observers = [held.activation_post_process for held in (layer.weight_fake_quant, layer.activation_post_process)]
    found = []
    for momentum in (None, 0.5, None):
        for observer in observers if momentum is not None else ():
            observer.set_momentum(momentum)
        layer(torch.ones(1, 1, requires_grad=True))
        found.append([observer.averaging_constant for observer in observers])
    assert found == [[0.25, 0.25], [0.5, 0.5], [0.5, 0.5]]


def test_megengines_symmetric_unsigned_codes_count_from_zero():
    qtype = tritonq.QuantizedType(0, 255, symmetric=True, rounding="half_away")
    quantizer = tritonq.FakeQuantize(tritonq.MinMaxObserver, dtype=qtype, rule="megengine")
    y = quantizer(torch.tensor([-1.0, 0.0, 0.5, 1.9, 1.98]))
    scale = 1.98 / 127.5
    assert int(quantizer.zero_point) == 0
    assert_close(y, torch.tensor([0.0, 0.0, 32 * scale, 122 * scale, 128 * scale]), SUMS)
    assert int(tritonq.FakeQuantize(tritonq.MinMaxObserver, dtype=qtype).zero_point) == 128


def test_passive_observer():
    observer = tritonq.PassiveObserver(dtype="qint8")
    assert not observer.has_observed()
    observer.set_qparams(torch.tensor([0.5]))
    observer(torch.full((4,), 1e9))
    observer.scale = torch.tensor([0.25])
    assert observer.calculate_qparams().scale.tolist() == [0.25]
    assert observer.original_scale.tolist() == [0.5]
    observer.set_qparams(np.array([2.0]))
    assert (observer.scale.tolist(), observer.original_scale.tolist()) == ([2.0], [2.0])
    observer.scale = 0.125
    assert observer.scale.tolist() == [0.125]
    with pytest.raises(ValueError, match="positive and finite"):
        observer.scale = torch.tensor([0.0])
    with pytest.raises(ValueError, match="a type with one scale for the tensor, got 2"):
        observer.set_qparams(torch.tensor([0.5, 0.25]))
    assert (observer.scale.tolist(), observer.original_scale.tolist()) == ([0.125], [2.0])
    with pytest.raises(ValueError, match="zero point 0, got"):
        tritonq.PassiveObserver(dtype="qint8").set_qparams(torch.tensor([1.0]), torch.tensor([3]))
    affine = tritonq.PassiveObserver(dtype=torch.quint8, qscheme=torch.per_channel_affine, ch_axis=0)
    affine.set_qparams(torch.ones(3), torch.tensor([1, 2, 3]))
    affine.set_qparams(0.5, 0)
    assert affine.calculate_qparams().zero_point.unique().tolist() == [0]
    with pytest.raises(ValueError, match="zero_point must be a whole number"):
        tritonq.PassiveObserver(dtype=torch.quint8, qscheme=torch.per_tensor_affine).set_qparams(0.5, 3.7)


def test_a_passive_observer_adopts_the_length_of_a_checkpoint():
    used, late = (
        tritonq.FakeQuantize(tritonq.PassiveObserver, dtype=torch.quint8, qscheme=torch.per_channel_affine)
        for _ in range(2)
    )
    used.activation_post_process.set_qparams(torch.tensor([0.1, 0.2, 0.3]), 5)
    assert used.activation_post_process.zero_point.tolist() == [5, 5, 5]
    x = torch.randn(3, 4)
    expected = used(x)
    late.load_state_dict(used.state_dict())
    assert torch.equal(late(x), expected)
    with pytest.raises(ValueError, match="scale has 3 elements, zero_point 2; one is enough"):
        late.activation_post_process.set_qparams(torch.tensor([0.4, 0.5, 0.6]), torch.tensor([1, 2]))
    assert torch.equal(late(x), expected)


_PER_CHANNEL = {"dtype": torch.quint8, "qscheme": torch.per_channel_affine}


def test_a_passive_observer_takes_one_scale_or_one_per_channel():
    observer = tritonq.PassiveObserver(**_PER_CHANNEL, num_channels=4)
    for wrong in (torch.ones(3), torch.ones(5), torch.ones(0)):
        with pytest.raises(ValueError, match=f"keeps 4 channels along axis 0, got {wrong.numel()} scales"):
            observer.set_qparams(wrong)
        with pytest.raises(ValueError, match=f"keeps 4 channels along axis 0, got {wrong.numel()} scales"):
            observer.scale = wrong
    observer.set_qparams(0.5, 3)
    assert observer.scale.tolist() == [0.5] * 4
    assert observer.zero_point.tolist() == [3] * 4
    observer.set_qparams(torch.arange(1.0, 5.0), torch.arange(4))
    observer.scale = 0.25
    assert observer.calculate_qparams().scale.tolist() == [0.25] * 4
    assert observer.zero_point.tolist() == [0, 1, 2, 3]


def test_a_passive_observer_of_a_layer_knows_the_layers_channels():
    weight = tritonq.FakeQuantize.with_args(observer=tritonq.PassiveObserver, **_PER_CHANNEL)
    layer, late = (tritonq.nn.Linear(3, 4, qconfig=tritonq.QConfig(nn.Identity, weight)) for _ in range(2))
    observer = layer.weight_fake_quant.activation_post_process
    with pytest.raises(ValueError, match="keeps 4 channels along axis 0, got 3 scales"):
        observer.set_qparams(torch.ones(3))
    observer.set_qparams(0.01, 128)
    x = torch.randn(2, 3)
    expected = layer(x)
    late.load_state_dict(layer.state_dict())
    assert torch.equal(late(x), expected)
    assert late.weight_fake_quant.scale.shape == (4,)


def test_a_passive_observer_without_a_known_number_of_channels():
    quantizer = tritonq.FakeQuantize(tritonq.PassiveObserver, **_PER_CHANNEL)
    quantizer.activation_post_process.scale = torch.tensor([0.5, 0.25])
    assert quantizer.activation_post_process.zero_point.tolist() == [0, 0]
    quantizer.activation_post_process.set_qparams(torch.tensor([0.5, 0.25]), torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="got 3 scales for 2 zero points: call set_qparams with both"):
        quantizer.activation_post_process.scale = torch.ones(3)
    with pytest.raises(ValueError, match="keeps 2 channels along axis 0, got 3 scales"):
        quantizer.allocate(3)
    one = tritonq.FakeQuantize(tritonq.PassiveObserver, **_PER_CHANNEL)
    one.activation_post_process.set_qparams(0.5, 7)
    assert one(torch.ones(2, 3)).tolist() == torch.ones(2, 3).tolist()
    one.allocate(2)
    assert one(torch.ones(2, 3)).tolist() == torch.ones(2, 3).tolist()
    assert one.calculate_qparams().scale.tolist() == [0.5, 0.5]
    assert one.activation_post_process.scale.tolist() == [0.5, 0.5]
    assert one.activation_post_process.zero_point.tolist() == [7, 7]


def test_a_fake_quantizer_follows_the_scale_it_is_given():
    """Also in eval mode, with nothing run in training mode before, and through a checkpoint."""
    quantizer = tritonq.get_qconfig("megengine_passive").activation().eval()
    quantizer.activation_post_process.set_qparams(torch.tensor([0.5]))
    x = torch.tensor([0.3, 0.8])
    assert quantizer(x).tolist() == [0.5, 1.0]
    quantizer.activation_post_process.scale = torch.tensor([0.25])
    assert quantizer(x).tolist() == [0.25, 0.75]
    assert quantizer.is_active()
    assert quantizer.calculate_qparams().scale.tolist() == [0.25]
    fresh = tritonq.get_qconfig("megengine_passive").activation().eval()
    fresh.load_state_dict(quantizer.state_dict())
    assert fresh(x).tolist() == [0.25, 0.75]
