"""Compiled conversions of codes against the reference: the same bits everywhere, ties and clipped ends included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tritonq
from tritonq.compiled import build, eval_codes
from tritonq.reference import eval_codes as reference
from tritonq.reference.eval_codes import CodeRange

pytestmark = pytest.mark.skipif(build.obstacle() is not None, reason=str(build.obstacle()))

RANGES = [
    *(CodeRange(0, 0, 255, True), CodeRange(128, 0, 255, True), CodeRange(3, 3, 200, True), CodeRange(0, 0, 15, True)),
    CodeRange(7, 1, 250, False),
]
SHAPES = [(5, 24, 7, 3), (2, 1, 4, 4), (3, 2049, 1, 1), (1000, 33), (2, 8, 5), (2, 16, 64, 40)]


def sums_of(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Whole sums in the order of oneDNN's results, and factors that make ties of some."""
    generator = torch.Generator().manual_seed(0)
    sums = torch.randint(-3000, 3000, shape, generator=generator).float()
    if len(shape) == 4:
        sums = sums.contiguous(memory_format=torch.channels_last)
    channels = shape[1]
    factors = torch.rand(channels, generator=generator) * 0.2
    factors[::3] = 0.5  # of an odd sum a tie
    factors[1:2] = 1e36  # beyond float32 for all but small sums
    return sums, factors.view(-1, *[1] * (len(shape) - 2))


class Net(nn.Module):
    """A layer with a ReLU, one with a table, a gate and a residual addition."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.SiLU())
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 16, 1), nn.Hardsigmoid())
        self.last = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.second(x)
        return self.last((x + y * self.gate(y)).mean((2, 3)))


def images() -> Tensor:
    return torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(4))


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the reference's functions that run from now on."""
    ran: list[str] = []
    for name in ("codes_of_sums", "codes_of_values", "codes_of_sum", "codes_of_product", "values_of_codes"):
        function = getattr(reference, name)
        monkeypatch.setattr(reference, name, lambda *args, _f=function, _n=name: (ran.append(_n), _f(*args))[1])
    return ran


@pytest.mark.parametrize("to", RANGES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_become_the_codes_of_the_reference(shape, to):
    sums, by_channel = sums_of(shape)
    factors = reference.repeated(by_channel)
    ours = eval_codes.codes_of_sums(sums.clone(), factors, to, None)
    theirs = reference.codes_of_sums(sums.clone(), factors, to, None)
    assert ours.stride() == sums.stride()
    assert torch.equal(ours, theirs)
    one = reference.repeated(torch.tensor([0.5]).view(by_channel[:1].shape))
    assert torch.equal(
        eval_codes.codes_of_sums(sums.clone(), one, to, None), reference.codes_of_sums(sums.clone(), one, to, None)
    )


@pytest.mark.parametrize("end", [-2999.0, 2999.0])
def test_a_sum_that_reaches_the_bound_is_told(end):
    sums, by_channel = sums_of((4, 600))
    sums.clamp_(-2900, 2900)[3, 599] = end
    factors, to = reference.repeated(by_channel), RANGES[0]
    for module in (eval_codes, reference):
        assert module.codes_of_sums(sums.clone(), factors, to, 2999.0) is None
        assert module.codes_of_sums(sums.clone(), factors, to, 3000.0) is not None
        assert module.codes_of_sums(sums.clone(), factors, to, -torch.inf) is None


@pytest.mark.parametrize("to", RANGES, ids=str)
@pytest.mark.parametrize("count", [1, 15, 4097, 70_001])
def test_values_become_the_codes_of_the_reference(to, count):
    x = torch.randn(count, generator=torch.Generator().manual_seed(1)) * 40
    x[0] = torch.inf
    scale = 0.25
    ours = eval_codes.codes_of_values(x, scale, to, None)
    assert torch.equal(ours, reference.codes_of_values(x, scale, to, None))
    held = reference.values_of_codes(ours, 0.3, to.zero, torch.contiguous_format)
    assert torch.equal(held, eval_codes.values_of_codes(ours, 0.3, to.zero, torch.contiguous_format))
    for module in (eval_codes, reference):
        assert torch.equal(module.codes_of_values(held, torch.tensor(0.3).item(), to, 255), ours)
        assert module.codes_of_values(torch.full((count,), torch.nan), scale, to, None) is None
        for beyond in (-to.zero - 1.0, 256.0 - to.zero, torch.nan):
            with_one = held.clone()
            with_one[count // 2] = beyond * 0.3
            assert module.codes_of_values(with_one, torch.tensor(0.3).item(), to, 255) is None


@pytest.mark.parametrize("to", RANGES, ids=str)
def test_all_pairs_of_codes_have_the_sums_and_products_of_the_reference(to):
    a = torch.arange(256, dtype=torch.uint8).repeat(256)
    b = torch.arange(256, dtype=torch.uint8).repeat_interleave(256)
    for ratios, fixed in (((0.5, 0.5), 0.0), ((0.7310585, -1.3333334), 3.25), ((1e-3, 2.0), 128.0)):
        given = (3, 128), ratios, torch.tensor(fixed), to
        assert torch.equal(eval_codes.codes_of_sum(a, b, *given), reference.codes_of_sum(a, b, *given))
        given = (3, 128), ratios[0], torch.tensor(fixed), to
        assert torch.equal(eval_codes.codes_of_product(a, b, *given), reference.codes_of_product(a, b, *given))


def test_a_gate_broadcasts_over_the_pixels_of_its_image():
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(0, 256, (3, 24, 9, 5), generator=generator, dtype=torch.uint8)
    gate = torch.randint(0, 256, (3, 24, 1, 1), generator=generator, dtype=torch.uint8)
    given = 0.013, torch.tensor(1.5), RANGES[1]
    for form in (torch.channels_last, torch.contiguous_format):
        image = x.contiguous(memory_format=form)
        expected = reference.codes_of_product(image, gate, (1, 2), *given)
        assert torch.equal(eval_codes.codes_of_product(image, gate, (1, 2), *given), expected)
        assert torch.equal(eval_codes.codes_of_product(gate, image, (2, 1), *given), expected)


def test_a_table_is_looked_up_as_by_the_reference():
    codes = torch.arange(256, dtype=torch.uint8).view(2, 8, 4, 4).contiguous(memory_format=torch.channels_last)
    table = torch.randperm(256, generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    ours = eval_codes.look_up_codes(codes, table)
    assert ours.stride() == codes.stride()
    assert torch.equal(ours, reference.look_up_codes(codes, table))


def test_a_converted_model_and_eval_mode_give_the_same_bits_by_compiled_code(monkeypatch):
    torch.manual_seed(0)
    model = tritonq.prepare_qat(Net(), example_inputs=(images(),))
    for _ in range(2):
        model(images())
    converted, x = tritonq.convert(model.eval()), images() * 1.5
    with torch.no_grad():
        expected = converted(x)
        ran = counted(monkeypatch)
        with tritonq.use_backend("compiled"):
            found, evaluated = converted(x), model(x)
    assert torch.equal(found, expected)
    assert torch.equal(evaluated, expected)
    assert not ran
