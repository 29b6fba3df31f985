"""Trained bit widths: FracBits' formula and gradients in float64, the penalty, the end of the search, deployment."""

import numpy as np
import pytest
import torch
from torch import nn

import tritonq
from tolerances import FLOAT32, SUMS, assert_close
from tritonq.learned_bits import NORMAL_STEPS, LearnedBitsFakeQuantize
from tritonq.switched_quantizer import SwitchedQuantizer


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def on_grid(w, scale, bits):
    """LSQ's result of one width and its gradients (Esser et al., 2020), that of the step in steps at 8 bits."""
    largest = 2 ** (bits - 1) - 1
    relative = NORMAL_STEPS[bits - 2] / NORMAL_STEPS[6]
    step = scale * relative
    v = w / step
    inside = v.round().abs() <= largest
    codes = torch.where(inside, v.round(), v.sign() * largest)
    slope = torch.where(inside, v.round() - v, v.sign() * largest)
    per_scale = w.numel() // scale.numel()
    return codes * step, inside.double(), slope / relative / (per_scale * largest) ** 0.5


@pytest.mark.parametrize("bits", range(2, 9))
def test_steps_have_the_least_error_on_normally_distributed_values(bits):
    x = torch.linspace(0, 8, 400_001, dtype=torch.float64)
    density = (-x.square() / 2).exp()

    def error(step):
        return float(((x - (x / step).round().clamp(max=2 ** (bits - 1) - 1) * step).square() * density).sum())

    least = error(NORMAL_STEPS[bits - 2])
    assert least < error(NORMAL_STEPS[bits - 2] * 1.01)
    assert least < error(NORMAL_STEPS[bits - 2] * 0.99)


@pytest.mark.parametrize("ch_axis", [None, 0])
@pytest.mark.parametrize("bits", [2.0, 2.3, 3.75, 5.0, 7.999, 8.0])
def test_value_and_gradients_are_the_paper_s(bits, ch_axis):
    weight, upstream = drawn(6, 3, 2, 2), drawn(6, 3, 2, 2).flip(0)
    quantizer = LearnedBitsFakeQuantize(bits, ch_axis=ch_axis)
    quantizer(weight)
    with torch.no_grad():
        quantizer.scale.mul_(0.6)  # some values saturate
    weight.requires_grad_()
    y = quantizer(weight)
    y.backward(upstream)
    low = min(int(bits), 7)
    share = bits - low
    scale = quantizer.scale.detach().double()
    aligned = scale.view(-1, *[1] * (3 if ch_axis == 0 else 0))
    fewer, more = (on_grid(weight.detach(), aligned, width) for width in (low, low + 1))

    def mixed(index):
        return (1 - share) * fewer[index] + share * more[index]

    # The width is held in float32.
    assert_close(y.detach(), mixed(0), FLOAT32, size=0.1)
    assert_close(weight.grad, upstream * mixed(1), FLOAT32, size=0.1)
    per_value = (upstream * mixed(2)).flatten(1).sum(1) if ch_axis == 0 else (upstream * mixed(2)).sum().view(1)
    assert_close(quantizer.scale.grad.double(), per_value, SUMS)
    of_bits = (upstream * (more[0] - fewer[0])).sum().view(1)
    assert_close(quantizer.bits.grad.double(), of_bits, SUMS)
    assert quantizer.elements == weight.numel()


def test_a_width_returns_to_its_bounds():
    quantizer = LearnedBitsFakeQuantize(3.0, min_bits=3, max_bits=6)
    with torch.no_grad():
        quantizer.bits.fill_(1.5)
    quantizer(torch.randn(4, 5))
    assert quantizer.bits.item() == 3.0
    with torch.no_grad():
        quantizer.bits.fill_(9.0)
    assert quantizer.qtype.bits == 6


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.body, self.head = nn.Conv2d(8, 8, 3, bias=False), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.relu(self.body(torch.relu(self.norm(self.stem(x))))).mean((2, 3)))


X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def prepared():
    torch.manual_seed(0)
    mapping = tritonq.get_qconfig_mapping("learned_bits_a8")
    return tritonq.prepare_qat(Net(), qconfig=mapping, example_inputs=X).train()


def trained(target, steps=90):
    qat = prepared()
    optimizer = torch.optim.SGD(tritonq.parameter_groups(qat, lr=0.02, scale_lr=0.02))
    labels = torch.arange(8) % 4
    for _ in range(steps):
        penalty = 5e-2 * (tritonq.learned_size(qat) - target).abs()
        optimizer.zero_grad()
        (nn.functional.cross_entropy(qat(X), labels) + penalty).backward()
        optimizer.step()
    return qat


def test_a_penalty_holds_the_model_to_its_size():
    elements = 8 * 8 * 9
    qat = prepared()
    assert tritonq.learned_size(qat).item() == elements  # 8 bits, of the one layer between the ends
    tritonq.learned_size(qat).backward()
    assert qat.body.weight_fake_quant.bits.grad.item() == elements / 8
    qat = trained(target=elements * 4.5 / 8)
    assert 4.2 < qat.body.weight_fake_quant.bits.item() < 4.8
    assert qat.body.weight_fake_quant.scale.grad.any()


def test_the_search_ends_with_lsq_of_the_nearest_width_and_equal_numbers():
    qat = trained(target=8 * 8 * 9 * 3.2 / 8).eval()
    searched = qat(X)
    assert torch.equal(tritonq.convert(qat)(X), searched)
    assert tritonq.fix_learned_bits(qat) == {"body.weight_fake_quant": 3}
    assert type(qat.body.weight_fake_quant) is tritonq.LearnedStepFakeQuantize
    assert torch.equal(qat(X), searched)
    assert qat.body.weight_fake_quant.qtype == tritonq.QuantizedType.of(3, narrow=True, axis=0)
    qat.train()(X).square().mean().backward()
    assert qat.body.weight_fake_quant.scale.grad.any()
    converted = tritonq.convert(qat.eval())
    assert torch.equal(converted(X), qat(X))
    assert int(converted.body.stored_weight.abs().max()) <= 3
    with pytest.raises(ValueError, match="no weight whose width is trained"):
        tritonq.fix_learned_bits(qat)
    with pytest.raises(ValueError, match="no weight whose width is trained"):
        tritonq.learned_size(qat)


def test_checkpoints_hold_widths(tmp_path):
    qat = trained(target=8 * 8 * 9 * 5.3 / 8, steps=20)
    torch.save(qat.state_dict(), tmp_path / "q.pt")
    other = prepared()
    other.load_state_dict(torch.load(tmp_path / "q.pt"))
    assert torch.equal(other.eval()(X), qat.eval()(X))
    mapping = tritonq.get_qconfig_mapping("learned_bits_a8")
    tritonq.save_qconfig_mapping(mapping, tmp_path / "q.json")
    assert tritonq.load_qconfig_mapping(tmp_path / "q.json") == mapping


def test_a_model_in_bfloat16_keeps_its_width_in_float32():
    qat = prepared().bfloat16()
    assert qat.body.weight_fake_quant.bits.dtype == torch.float32
    assert qat(X.bfloat16()).dtype == torch.bfloat16


def test_switches_and_mistakes():
    quantizer = LearnedBitsFakeQuantize(2.5)
    assert isinstance(quantizer, SwitchedQuantizer)
    weight = torch.randn(4, 5)
    quantizer(weight)
    quantizer.disable_fake_quant()
    assert torch.equal(quantizer(weight), weight)
    for arguments in ({"initial_bits": 1.0}, {"min_bits": 1}, {"min_bits": 8, "initial_bits": 8.0}, {"ch_axis": 1}):
        with pytest.raises(ValueError, match="got"):
            LearnedBitsFakeQuantize(**arguments)


def test_a_fixed_quantizer_takes_its_length_from_the_first_tensor():
    quantizer = LearnedBitsFakeQuantize(4.0).fixed().train()
    assert not quantizer.has_qparams()
    assert quantizer(torch.randn(3, 5)).shape == (3, 5)
    assert quantizer.scale.shape == (3,)


def test_bounds_may_be_integers_of_numpy():
    assert tritonq.LearnedBitsFakeQuantize(4.0, min_bits=np.int64(2), max_bits=np.int64(6)).bounds == (2, 6)
