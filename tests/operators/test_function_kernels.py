"""A function of one tensor, its observer and its quantizer as one operator, against the specification."""

import pytest
import torch

from op_tester import OpTester, operators
from quantizer_states import assert_same_state, quantizer_state
from tolerances import BFLOAT16, EXACT, FLOAT32, SUMS, assert_close
from tritonq.functional.functions import quantized_function
from tritonq.quantized_type import QINT8, QUINT8
from tritonq.reference import functions
from tritonq.reference.functions import DEFINITIONS, Function
from tritonq.reference.input_codes import encode

ARGUMENTS = {"leaky_relu": (0.1,), "elu": (1.3,), "softplus": (2.0, 5.0), "clip": (-1.0, 2.5)}
ARGUMENTS |= {"plus": (0.3,), "times": (-0.7,), "over": (3.0,), "from": (1.1,), "ratio": (0.1,)}
FUNCTIONS = [Function(name, ARGUMENTS.get(name, ())) for name in DEFINITIONS]
FUNCTIONS.append(Function("clip", (-torch.inf, 0.5)))
# Their float32 results are the same bits on every backend: sums, products and IEEE divisions.
SAME_BITS = {
    "hardsigmoid",
    "hardswish",
    "leaky_relu",
    "clip",
    "plus",
    "times",
    "over",
    "from",
    "ratio",
    "square",
    "abs",
}
SHAPES = [(3, 5, 7, 2), (1,), (7, 131), (0, 4), ()]


def values(shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(4 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(2)]


def named(function):
    return function.name


def assert_near(actual, expected, function, scale):
    """Equal; where the last bit of a function may turn over a tie, equal but for single steps of few values."""
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.isnan(), expected.isnan())
    difference = (actual.float() - expected.float()).nan_to_num(0, 0, 0).abs()
    if function.name in SAME_BITS or not difference.numel():
        assert not difference.any()
        return
    assert difference.max() <= 1.01 * scale
    assert int((difference > 0.5 * scale).sum()) <= 1 + difference.numel() // 500


def assert_close_gradient(actual, expected, dtype):
    """The derivative is a product of a few float32 numbers, of which the exponential is the hardware's."""
    tolerance = 2**-7 if dtype == torch.bfloat16 else 2**-9 if dtype == torch.float16 else SUMS.rtol
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=SUMS.atol, equal_nan=True)


class TestFunctions(OpTester):
    @pytest.mark.parametrize("function", FUNCTIONS, ids=named)
    def test_equals_the_specification(self, function, use, device):
        ops = operators("functions", use)
        mine, other = (quantizer_state(QUINT8, device=device) for _ in range(2))
        x, dy = (t.to(device) for t in values((7, 131)))
        # torch's own functions differ in what they make of infinities, from device to device.
        ends = (torch.inf, -torch.inf) if function.name in SAME_BITS else (0.0, 0.0)
        x.view(-1)[:6] = torch.tensor([torch.nan, *ends, 3.0, -3.0, 0.0])
        y, grid = ops.forward(x, function, *mine)
        expected, kept = functions.forward(x, function, *other)
        assert_near(y, expected, function, float(kept.scale))
        assert_close(grid.scale, kept.scale, FLOAT32, size=0)
        if function.name in SAME_BITS:
            assert_same_state(mine, other)
        dx = ops.backward(dy, x, None, None, function, kept)
        assert_close_gradient(dx[1:], functions.backward(dy, x, None, None, function, kept)[1:], x.dtype)

    @pytest.mark.parametrize("shape", SHAPES, ids=str)
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
    def test_shapes_and_dtypes(self, shape, dtype, use, device):
        ops, function = operators("functions", use), Function("hardswish")
        mine, other = (quantizer_state(QINT8, device=device) for _ in range(2))
        for seed in range(2):
            x, dy = (t.to(device) for t in values(shape, dtype, seed))
            y, grid = ops.forward(x, function, *mine)
            expected, kept = functions.forward(x, function, *other)
            assert_close(y, expected, BFLOAT16 if dtype == torch.bfloat16 else EXACT)
            assert_same_state(mine, other)
            dx = ops.backward(dy, x, None, None, function, grid)
            assert_close_gradient(dx, functions.backward(dy, x, None, None, function, kept), dtype)

    def test_layouts_and_switches(self, use, device):
        ops, function = operators("functions", use), Function("hardswish")
        x, dy = (t.to(device) for t in values((2, 4, 3, 5)))
        last = {"memory_format": torch.channels_last}
        for p, q in ((x.contiguous(**last), dy), (x[:, ::2], dy[:, 1::2]), (x.mT, dy.mT)):
            for change in ({}, {"observing": False}, {"active": False}):
                mine, other = (quantizer_state(QUINT8, device=device, **change) for _ in range(2))
                y, grid = ops.forward(p, function, *mine)
                expected, kept = functions.forward(p, function, *other)
                assert torch.equal(y, expected)
                assert_same_state(mine, other)
                mine_dx = ops.backward(q, p, None, None, function, grid)
                assert_close_gradient(mine_dx, functions.backward(q, p, None, None, function, kept), x.dtype)

    @pytest.mark.parametrize("qtype", [QINT8, QUINT8], ids=str)
    def test_reads_its_input_as_codes(self, qtype, use, device):
        ops, function = operators("functions", use), Function("silu")
        source, _ = quantizer_state(qtype, device=device)
        source.scale.fill_(0.05)
        zero = 0
        if source.zero_point is not None:
            zero = int(source.zero_point.fill_(100))
        x, dy = (t.to(device) for t in values((7, 131)))
        x = (x / 0.05).round().clamp(qtype.quant_min - zero, qtype.quant_max - zero) * source.scale
        codes = encode(x, source, trusted=True)
        _, grid = functions.forward(x, function, *quantizer_state(QUINT8, device=device))
        assert_close_gradient(
            ops.backward(dy, *codes, function, grid), ops.backward(dy, x, None, None, function, grid), x.dtype
        )


@pytest.mark.parametrize("function", FUNCTIONS, ids=named)
def test_the_gradient_is_that_of_torch(function):
    """Bit for bit: autograd's, of the function and torch's own quantizer."""
    grid, statistics = quantizer_state(QUINT8)
    x, dy = values((300,))
    x.requires_grad_()
    y = quantized_function(x, function, None, grid, statistics)
    (dx,) = torch.autograd.grad(y, x, dy)
    zero_point = grid.zero_point.int()
    z = torch.fake_quantize_per_tensor_affine(function(x), grid.scale, zero_point, 0, 255)
    assert torch.equal(y, z)
    (expected,) = torch.autograd.grad(z, x, dy)
    assert torch.equal(dx, expected)


def test_a_bfloat16_result_is_rounded_once():
    """The code is that of the function in float32; a function in bfloat16 gives another one for many values."""
    x = values((4000,), torch.bfloat16)[0]
    state, wide = quantizer_state(QUINT8), quantizer_state(QUINT8)
    y = quantized_function(x, Function("silu"), None, *state)
    expected = quantized_function(x.float(), Function("silu"), None, *wide)
    assert torch.equal(y, expected.bfloat16())
    assert_same_state(state, wide)
