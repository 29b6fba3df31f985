"""Addition, ReLU, observer and fake quantization as one operator, against its parts."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonq
from op_tester import OpTester, few_programs, operators
from quantizer_states import NO_QUANTIZER, assert_same_state, moved, quantizer_state
from tolerances import BFLOAT16, EXACT, assert_close
from tritonq.grid import Grid
from tritonq.quantized_type import QINT8, QUINT8, QuantizedType
from tritonq.reference import residual, rounded
from tritonq.reference.activation import rectify

SHAPES = [(3, 5, 7, 2), (1,), (2, 16), (3, 1, 5), (2, 3, 2, 3, 2), (0, 4), ()]

# Of the ReLU: none, a plain one, and bounds that no code and that one code (of scale 0.5) lies on.
CEILINGS = [None, math.inf, 0.7, 1.5]


class Parts(nn.Module):
    """The same join with modules of its own for each step."""

    def __init__(self, ceiling, quantizer):
        super().__init__()
        self.ceiling, self.quantizer = ceiling, quantizer

    def forward(self, a, b):
        total = a + b
        return self.quantizer(total if self.ceiling is None else F.hardtanh(total, 0, self.ceiling))


def pair(ceiling, preset="tensorrt"):
    join = tritonq.nn.Add(ceiling, qconfig=tritonq.get_qconfig(preset))
    return join, Parts(ceiling, copy.deepcopy(join.activation_post_process))


def tensors(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]


def assert_same_steps(join, parts, batches):
    for a, b, dy in batches:
        p, q = ([t.clone().requires_grad_() for t in (a, b)] for _ in range(2))
        y, z = join(*p), parts(*q)
        assert torch.equal(y.nan_to_num(7), z.nan_to_num(7))
        assert torch.equal(y.isnan(), z.isnan())
        y.backward(dy)
        z.backward(dy)
        for mine, other in zip(p, q, strict=True):
            assert torch.equal(mine.grad, other.grad)
        mine, other = join.activation_post_process, parts.quantizer
        for (name, value), expected in zip(mine.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(value, expected), name


@pytest.mark.parametrize("ceiling", CEILINGS)
@pytest.mark.parametrize("preset", ["tensorrt", "megengine_ema", "megengine_lowbit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_its_parts_bit_for_bit(ceiling, preset, dtype):
    join, parts = pair(ceiling, preset)
    assert_same_steps(join, parts, [tensors((3, 5, 7, 2), dtype, seed) for seed in range(3)])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("ceiling", CEILINGS)
def test_shapes(shape, ceiling):
    assert_same_steps(*pair(ceiling), [tensors((3, 5)), tensors(shape)])


def test_affine_quantizer():
    join = tritonq.nn.Add(qconfig=tritonq.get_default_qat_qconfig("fbgemm", version=0))
    parts = Parts(None, copy.deepcopy(join.activation_post_process))
    assert_same_steps(join, parts, [tensors((4, 9), seed=seed) for seed in range(3)])


def test_ties_rails_and_nonfinite_values():
    for ceiling in CEILINGS:
        join, parts = pair(ceiling)
        for quantizer in (join.activation_post_process, parts.quantizer):
            quantizer(torch.tensor([-63.75, 63.75]))  # scale 0.5
            quantizer.disable_observer()
        inf, nan = torch.inf, torch.nan
        a = torch.tensor(
            [0.25, 0.75, -0.25, 63.5, 63.75, 63.76, -64.0, -64.25, -64.26, 0.0, inf, -inf, nan, 1e30, 1e-40]
        )
        assert_same_steps(join, parts, [(a, torch.zeros_like(a), torch.arange(1.0, 16.0))])


@pytest.mark.parametrize("switch", ["disable_fake_quant", "disable_observer", "eval"])
def test_switches(switch):
    join, parts = pair(math.inf)
    assert_same_steps(join, parts, [tensors((4, 9))])
    for quantizer in (join.activation_post_process, parts.quantizer):
        getattr(quantizer, switch)()
    assert_same_steps(join, parts, [tensors((4, 9), seed=1)])


def test_layouts_and_strides():
    a, b, dy = tensors((2, 4, 3, 5))
    last = {"memory_format": torch.channels_last}
    mixed = [
        (a.contiguous(**last), b, dy),
        (a, b.contiguous(**last), dy.contiguous(**last)),
        (a.contiguous(**last), b.contiguous(**last), dy),
        (a.mT, b.mT, dy.mT),
        (a[:, ::2], b[:, ::2], dy[:, 1::2]),
    ]
    assert_same_steps(*pair(math.inf), mixed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_rounds_once(dtype):
    join, _ = pair(math.inf)
    a, b, dy = tensors((4, 33), dtype)
    wide = copy.deepcopy(join)
    expected = wide(a.float(), b.float()).to(dtype)
    a.requires_grad_()
    y = join(a, b)
    assert torch.equal(y, expected)
    y.backward(dy)
    assert a.grad.dtype == dtype


def test_infinite_gradients_are_blocked_not_poisoned():
    join, _ = pair(math.inf)
    a = torch.tensor([-1.0, 2.0], requires_grad=True)
    join(a, torch.zeros(2)).backward(torch.tensor([torch.inf, 1.0]))
    assert torch.equal(a.grad, torch.tensor([0.0, 1.0]))


def test_saves_one_bit_per_element():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        a, b, _ = tensors((8, 100))
        pair(math.inf)[0](a.requires_grad_(), b)
    assert sum(t.untyped_storage().nbytes() for t in saved) == 112


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 1001])
def test_packed_bits_survive(count):
    bits = torch.randint(0, 2, (count,)).float()
    mask = residual.pack(bits)
    assert mask.numel() == 16 * -(-count // 128)
    assert torch.equal((residual.unpack(mask, count) != 0).float(), bits)


def test_broadcasting_sums_take_the_long_way():
    join, parts = pair(math.inf)
    a, b = torch.randn(4, 5, requires_grad=True), torch.randn(5, requires_grad=True)
    y = join(a, b)
    assert torch.equal(y, parts(a, b))
    y.sum().backward()
    assert b.grad.shape == (5,)


def test_without_a_qconfig_it_only_adds():
    a, b, _ = tensors((4, 5))
    assert torch.equal(tritonq.nn.Add(math.inf)(a, b), F.relu(a + b))


class TestBackends(OpTester):
    @pytest.mark.parametrize("shape", [*SHAPES, (7, 131)], ids=str)
    @pytest.mark.parametrize(
        ("qtype", "ceiling"),
        [(QINT8, math.inf), (QINT8, 1.5), (QUINT8, None), (QUINT8, 0.3), (None, math.inf), (None, 1.5)],
    )
    def test_equals_the_pytorch_path(self, shape, qtype, ceiling, use, device):
        mine, other = (NO_QUANTIZER if qtype is None else quantizer_state(qtype, device=device) for _ in range(2))
        for seed, dtype in ((0, torch.float32), (1, torch.bfloat16), (2, torch.float16)):
            a, b, dy = (t.to(device) for t in tensors(shape, dtype, seed))
            if a.numel() > 20:
                a.view(-1)[[3, 9, 15]] = torch.tensor([torch.nan, torch.inf, -torch.inf], device=device).to(dtype)
            ops = operators("residual", use)
            y, mask = ops.forward(a, b, *mine, ceiling)
            z, expected = residual.forward(a, b, *other, ceiling)
            assert_close(y, z, BFLOAT16 if dtype == torch.bfloat16 else EXACT, equal_nan=True)
            assert torch.equal(residual.unpack(mask, a.numel()), residual.unpack(expected, a.numel()))
            assert torch.equal(ops.backward(dy, mask), residual.backward(dy, expected))
            if qtype is not None:
                assert_same_state(mine, other)

    def test_one_program_takes_several_blocks(self, use, device):
        """The range of sums whose smallest comes first and whose largest last, of two programs."""
        a = torch.arange(20001.0) / 100
        state, other = quantizer_state(QUINT8, device=device), quantizer_state(QUINT8)
        with few_programs() if use == "triton" else nullcontext():
            y, _ = operators("residual", use).forward(a.to(device), a.to(device), *state, None)
        z, _ = residual.forward(a, a, *other, None)
        assert torch.equal(y.cpu(), z)
        assert_same_state(state, other)

    @pytest.mark.parametrize("zero", [-3, 0, 1, 2])
    def test_ties_at_the_ends_pass_where_they_round_to_a_code(self, zero, use, device):
        """Half a code beyond the first or last one goes to the even neighbour, counted from the zero point."""
        first, last = -8 - zero, 7 - zero
        a = torch.tensor([first - 0.5, first - 0.75, first, last, last + 0.5, last + 0.75], device=device)
        grid = Grid(torch.ones(1), torch.tensor([zero], dtype=torch.int32), QuantizedType(-8, 7, symmetric=False))
        y, mask = operators("residual", use).forward(a, torch.zeros_like(a), moved(grid, device), None, None)
        assert y.tolist() == [first, first, first, last, last, last]
        passes = residual.unpack(mask.cpu(), 6) != 0
        assert passes.tolist() == [first % 2 == 0, False, True, True, last % 2 == 0, False]

    @pytest.mark.parametrize("ceiling", [None, math.inf, 0.7, 100.0])
    @pytest.mark.parametrize("qtype", [QINT8, QUINT8])
    def test_a_quantizer_that_is_off_blocks_nothing(self, qtype, ceiling, use, device):
        """Nor infinities, which float32 compares as no number is."""
        y = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 0.0, 0.5, -0.5, 50.0, 100.0])
        grid, _ = quantizer_state(qtype, device=device)
        grid = grid.with_buffers(grid.scale, grid.zero_point, torch.zeros(1, dtype=torch.uint8, device=device))
        expected = (
            torch.ones(10, dtype=torch.bool) if ceiling is None else (y > 0) & ((y < ceiling) | (ceiling == math.inf))
        )
        for found, mask in (
            operators("residual", use).forward(y.to(device), torch.zeros_like(y, device=device), grid, None, ceiling),
            operators("rounded", use).forward(y.to(device, copy=True), grid, None, ceiling),
            rounded.forward_with_mask(y.to(device), grid, None, ceiling),
        ):
            assert_close(found.cpu(), rectify(y, ceiling), EXACT, equal_nan=True)
            passes = mask if mask.dtype == torch.bool else residual.unpack(mask, len(y)) != 0
            assert torch.equal(passes.cpu(), expected)

    def test_layouts(self, use, device):
        a, b, _ = (t.to(device) for t in tensors((2, 4, 3, 5)))
        last = a.contiguous(memory_format=torch.channels_last)
        for p, q in (
            (last, b),
            (a, b.contiguous(memory_format=torch.channels_last)),
            (last, last),
            (a[:, ::2], b[:, ::2]),
        ):
            ops = operators("residual", use)
            y, mask = ops.forward(p, q, *quantizer_state(QINT8, device=device), math.inf)
            z, expected = residual.forward(p, q, *quantizer_state(QINT8, device=device), math.inf)
            assert torch.equal(y, z)
            dy = torch.randn_like(y)
            assert torch.equal(ops.backward(dy, mask), residual.backward(dy, expected))

    @pytest.mark.parametrize("shape", [(7, 131), (2, 4, 3, 5), (0, 4), ()], ids=str)
    @pytest.mark.parametrize(("qtype", "ceiling"), [(QINT8, math.inf), (QUINT8, None), (QUINT8, 1.5)])
    def test_results_of_any_operation(self, shape, qtype, ceiling, use, device):
        mine, other = (quantizer_state(qtype, device=device) for _ in range(2))
        for seed in range(2):
            a = tensors(shape, seed=seed)[0].to(device)
            if a.numel() > 200:
                a.view(-1)[[3, 9, 15]] = torch.tensor([torch.nan, torch.inf, -torch.inf], device=device)
            if a.dim() == 4:
                a = a.contiguous(memory_format=torch.channels_last)
            y, mask = operators("rounded", use).forward(a.clone(), *mine, ceiling)
            z, expected = rounded.forward(a.clone(), *other, ceiling)
            assert_close(y, z, EXACT, equal_nan=True)
            assert torch.equal(residual.unpack(mask, a.numel()), residual.unpack(expected, a.numel()))
            assert_same_state(mine, other)


class TestFirstElement(OpTester):
    def test_is_counted_once(self, use, device):
        """It stands in for the elements that a last, partial block lacks."""
        a = torch.ones(300, device=device)
        a[0] = torch.nan
        state = quantizer_state(QINT8, device=device)
        operators("residual", use).forward(a, torch.ones_like(a), *state, None)
        assert int(state.statistics.nonfinite_count) == 1
        assert float(state.statistics.max_val) == 2
