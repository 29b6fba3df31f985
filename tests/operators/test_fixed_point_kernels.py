"""Fixed-point kernels on every backend: the bits of the PyTorch path, in any layout."""

from __future__ import annotations

import pytest
import torch

from op_tester import LAYOUTS, OpTester, axes, operators
from tolerances import FLOAT32, assert_close
from tritonq import fixed_point_quantize, search_frac_len
from tritonq.functional.fixed_point import fixed_point_type
from tritonq.grid import Grid
from tritonq.quantized_type import QuantizedType
from tritonq.reference import fake_quant
from tritonq.reference import fixed_point as reference
from tritonq.reference import int8_conv as conv_reference

FORMATS = [(8, True), (8, False), (2, True), (16, False)]


def frac_lens(x: torch.Tensor, axis: int | None, largest: int) -> torch.Tensor:
    """A different fractional length for each channel."""
    channels = 1 if axis is None else x.shape[axis]
    return (torch.arange(channels, dtype=torch.int32) * 3 + 1) % (largest + 1)


class TestFixedPointQuantize(OpTester):
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_equals_the_specification_in_every_layout(self, layout: str, use: str, device: str) -> None:
        for axis in axes(LAYOUTS[layout]()):
            x = LAYOUTS[layout]().to(device)
            lengths = frac_lens(x, axis, 7).to(device)
            grid = Grid(reference.power_of_two(-lengths), None, fixed_point_type(8, True, axis))
            expected = fake_quant.fake_quantize(x, grid)
            given = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            y = fixed_point_quantize(given, lengths, axis=axis, backend=use)
            assert torch.equal(y, expected)
            dy = torch.arange(1.0, y.numel() + 1, device=device).view(y.shape)
            y.backward(dy)
            assert torch.equal(given.grad, fake_quant.fake_quantize_backward(dy, x, grid, blocks_ends=True))

    @pytest.mark.parametrize(("word_len", "signed"), FORMATS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_ties_rails_and_infinities(
        self, word_len: int, signed: bool, dtype: torch.dtype, use: str, device: str
    ) -> None:
        low, high = (-(2 ** (word_len - 1)) + 1, 2 ** (word_len - 1) - 1) if signed else (0, 2**word_len - 1)
        frac_len = (word_len - signed) // 2
        codes = [low, low + 1, high - 1, high, high + 1, low - 1, 0, 1, -1, 2]
        values = [(code + part) / 2**frac_len for code in codes for part in (-0.5, -0.25, 0, 0.5)]
        special = [float("inf"), -float("inf"), float("nan"), 1e-40]
        x = torch.tensor([*values, *special], device=device).to(dtype).requires_grad_()
        y = fixed_point_quantize(x, frac_len, word_len, signed, backend=use)
        y.sum().backward()
        lengths = torch.tensor([frac_len], dtype=torch.int32, device=device)
        grid = Grid(reference.power_of_two(-lengths), None, QuantizedType(low, high))
        expected = fake_quant.fake_quantize(x.detach(), grid)
        assert torch.equal(y.nan_to_num(7), expected.nan_to_num(7))
        ones = torch.ones_like(expected)
        assert torch.equal(x.grad, fake_quant.fake_quantize_backward(ones, x.detach(), grid, blocks_ends=True))


class TestSearch(OpTester):
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_finds_what_the_specification_finds(self, layout: str, use: str, device: str) -> None:
        x = LAYOUTS[layout]().to(device)
        for number, axis in enumerate(axes(x)):
            word_len, signed = FORMATS[number % len(FORMATS)]
            found = search_frac_len(x, word_len, signed, axis=axis, backend=use)
            assert torch.equal(found, search_frac_len(x, word_len, signed, axis=axis, backend="torch"))

    @pytest.mark.parametrize("axis", [None, 1])
    @pytest.mark.parametrize(("word_len", "signed"), FORMATS)
    def test_every_format(self, word_len: int, signed: bool, axis: int | None, use: str, device: str) -> None:
        x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)).to(device)
        found = search_frac_len(x, word_len, signed, axis=axis, backend=use)
        assert torch.equal(found, search_frac_len(x, word_len, signed, axis=axis, backend="torch"))

    def test_errors_and_what_is_not_finite(self, use: str, device: str) -> None:
        x = torch.randn(4, 700, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.1], [1], [9], [99]])
        x[:, ::7] = float("nan")
        x[:, 1::7] = float("inf")
        x = x.to(device)
        ops = operators("fixed_point", use)
        for axis in (None, 0):
            for low, high, count in ((-127, 127, 8), (0, 255, 9)):
                qtype = QuantizedType(low, high, axis=axis)
                errors = ops.frac_len_errors(x, qtype, count)
                assert errors.dtype == torch.float64
                expected = reference.frac_len_errors(x, qtype, count)
                # float32 squares, added in another order.
                assert_close(errors, expected, FLOAT32, size=0)
                assert torch.equal(errors, ops.frac_len_errors(x, qtype, count))

    def test_ties_go_to_the_smaller(self, use: str, device: str) -> None:
        x = torch.tensor([0.25, -1.5, 8.75], device=device)
        assert int(search_frac_len(x, backend=use)) == 2
        assert int(search_frac_len(x * 0, backend=use)) == 0


class TestConvolution(OpTester):
    architecture = 80

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
    @pytest.mark.parametrize(("channels", "outs", "groups"), [(3, 5, 1), (40, 17, 1), (6, 6, 6), (3, 6, 3)])
    @pytest.mark.parametrize("channels_last", [False, True])
    def test_equals_the_specification(
        self, dtype: torch.dtype, channels: int, outs: int, groups: int, channels_last: bool, use: str, device: str
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        low = -127 if dtype == torch.int8 else 0
        x = torch.randint(low, low + 255, (2, channels, 6, 7), generator=generator).to(device, dtype)
        x = x.to(memory_format=torch.channels_last) if channels_last else x
        weight = torch.randint(-127, 128, (outs, channels // groups, 3, 2), generator=generator).to(device, torch.int8)
        bias = torch.randint(-3000, 3000, (outs,), generator=generator).to(device, torch.int32)
        shift = (torch.arange(outs, dtype=torch.int32) % 12 - 1).to(device)
        conv = operators("int8_conv", use).int8_conv2d
        for geometry in (((1, 1), (1, 1), (1, 1)), ((2, 1), (0, 1), (1, 2))):
            for out in ((None, 0, 0, torch.int32), (shift, 0, 255, torch.uint8), (shift, -127, 127, torch.int8)):
                arguments = (x, weight, bias, out[0], *geometry, groups, *out[1:])
                expected = conv_reference.int8_conv2d(*arguments)
                assert torch.equal(conv(*arguments), expected)

    @pytest.mark.parametrize("groups", [1, 4])
    def test_saturation_is_counted(self, groups: int, use: str, device: str) -> None:
        x = torch.randint(0, 256, (2, 4, 5, 5), generator=torch.Generator().manual_seed(2)).to(device, torch.uint8)
        weight = torch.full((4, 4 // groups, 3, 3), 3, dtype=torch.int8, device=device)
        weight[1] = -3
        bias = torch.tensor([2**31 - 900, -(2**31) + 900, 0, 2**31 - 1], dtype=torch.int32, device=device)
        counts = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(2)]
        arguments = (x, weight, bias, None, (1, 1), (1, 1), (1, 1), groups, 0, 0, torch.int32)
        result = operators("int8_conv", use).int8_conv2d(*arguments, saturated=counts[0])
        assert torch.equal(result, conv_reference.int8_conv2d(*arguments, saturated=counts[1]))
        assert torch.equal(*counts)
        assert int(counts[0]) > 50
        assert int(result.abs().max()) == 2**31 - 1

    def test_nothing_to_do(self, use: str, device: str) -> None:
        x = torch.zeros(0, 3, 4, 4, dtype=torch.int8, device=device)
        weight = torch.zeros(2, 3, 1, 1, dtype=torch.int8, device=device)
        bias = torch.zeros(2, dtype=torch.int32, device=device)
        conv = operators("int8_conv", use).int8_conv2d
        assert conv(x, weight, bias, None, (1, 1), (0, 0), (1, 1), 1, 0, 0, torch.int32).shape == (0, 2, 4, 4)
