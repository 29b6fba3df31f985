"""When layers take the convolution kernel, and that they give the same numbers with it and without."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import tritonq
from tolerances import EXACT, HALF, assert_close, assert_matches
from tritonq.functional.conv2d import ConvKernel, find_kernel
from tritonq.functional.integer import IntegerAffine
from tritonq.functional.linear_map import Convolution, PaddedConvolution

TILE = {"pixels": 64, "outs": 16, "channels": 16, "warps": 4, "stages": 2}
CONV = Convolution((1, 1), (1, 1), (1, 1), (0, 0), False, 1)


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Writes the table of a GPU that the interpreter's CPU tensors then are on."""
    from tritonq.kernels import conv2d, launch_sizes

    def forget() -> None:
        launch_sizes.load_table.cache_clear()
        conv2d._tuned_tile.cache_clear()

    def write(**entries: object) -> None:
        content = {"version": 1, "kernels": {"conv2d": {key.replace("__", "/"): v for key, v in entries.items()}}}
        (tmp_path / "some_gpu.json").write_text(json.dumps(content))
        forget()

    lookup = launch_sizes.tuned
    monkeypatch.setattr(launch_sizes, "TABLES", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Some GPU")
    monkeypatch.setattr(launch_sizes, "tuned", lambda kernel, key, _: lookup(kernel, key, 0))
    forget()
    yield write
    forget()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernel's functions, for every call."""
    from tritonq.kernels import conv2d

    seen: list[str] = []

    def spied(name: str, original: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **keywords: object) -> object:
            seen.append(name)
            return original(*args, **keywords)

        return call

    for name in ("conv2d", "integer_conv2d"):
        monkeypatch.setattr(conv2d, name, spied(name, getattr(conv2d, name)))
    return seen


def integer_layer(bits_fit: bool = True) -> IntegerAffine:
    def read() -> float:
        raise AssertionError("a kernel needs no bound that is read from the device")

    one = torch.ones(6)
    return IntegerAffine(torch.ones(6, 4, 3, 3), None, one, one[:1], read, one, None, bits_fit, 127 * 127)


@pytest.mark.interpreter
class TestChoice:
    x = torch.randn(2, 4, 5, 5)
    weight = torch.randn(6, 4, 3, 3)

    def test_a_silent_table_leaves_values_to_torch_and_codes_to_the_kernel(self, table: Callable[..., None]) -> None:
        assert find_kernel(self.x, self.weight, CONV) is None
        table(**{"float32/channels_first/3x3s1/stem/large": TILE, "float16/channels_first/3x3s1/stem/small": TILE})
        assert find_kernel(self.x, self.weight, CONV) is None
        found = find_kernel(self.x, self.weight, CONV, integer_layer())
        assert isinstance(found, ConvKernel)
        assert found.tile is None
        table(**{"codes/channels_first/3x3s1/stem/small": "torch"})
        assert find_kernel(self.x, self.weight, CONV, integer_layer()) is None

    def test_an_entry_decides(self, table: Callable[..., None]) -> None:
        table(**{"float32/channels_first/3x3s1/stem/small": TILE, "float32/channels_last/3x3s1/stem/small": "torch"})
        found = find_kernel(self.x, self.weight, CONV)
        assert isinstance(found, ConvKernel)
        assert found.tile._asdict() == TILE
        last = self.x.contiguous(memory_format=torch.channels_last)
        assert find_kernel(last, self.weight, CONV) is None

    def test_where_it_cannot_run(self, table: Callable[..., None]) -> None:
        table(**{f"{kind}/channels_first/3x3s1/stem/small": TILE for kind in ("float32", "float64", "codes")})
        x, weight = self.x, self.weight
        assert find_kernel(x, weight, CONV) is not None
        reflecting = PaddedConvolution(CONV, (1, 1, 1, 1), "reflect")
        transposed = replace(CONV, transposed=True)
        assert find_kernel(x, weight, reflecting) is None
        assert find_kernel(x, weight, reflecting, integer_layer()) is not None
        assert find_kernel(x, weight, transposed, integer_layer()) is None
        assert find_kernel(x[0], weight, CONV, integer_layer()) is None
        assert find_kernel(x.double(), weight.double(), CONV) is None
        with tritonq.use_backend("torch"):
            assert find_kernel(x, weight, CONV) is None
        with torch.autocast("cpu", torch.bfloat16):
            assert find_kernel(x, weight, CONV) is None
            assert find_kernel(x, weight, CONV, integer_layer()) is not None
        assert find_kernel(x, weight, CONV, integer_layer(bits_fit=False)) is None

    def test_dtypes_must_agree(self, table: Callable[..., None]) -> None:
        table(**{"float32/channels_first/3x3s1/stem/small": TILE})
        kernel = find_kernel(self.x, self.weight, CONV)
        with pytest.raises(TypeError, match=r"one dtype, got torch.float32, torch.float16"):
            kernel(self.x, self.weight.half(), None)

    @pytest.mark.parametrize("ceiling", [None, math.inf, 1.3])
    @pytest.mark.parametrize("groups", [1, 2, 4])
    def test_gradients_are_those_of_torch(self, ceiling: float | None, groups: int) -> None:
        from tritonq.kernels.conv_tile import ConvTile

        conv = Convolution((2, 1), (1, 1), (1, 2), (0, 0), False, groups)
        values = [self.x, torch.randn(8, 4 // groups, 3, 3), torch.randn(8)]
        mine, other = ([value.clone().requires_grad_() for value in values] for _ in range(2))
        y = ConvKernel(conv, conv, ConvTile(**TILE))(*mine, ceiling)
        z = F.conv2d(*other, conv.stride, conv.padding, conv.dilation, groups)
        z = z if ceiling is None else F.hardtanh(z, 0, ceiling)
        assert_matches(y, z, "conv2d")
        dy = torch.randn_like(z)
        y.backward(dy)
        z.backward(dy)
        for one, two in zip(mine, other, strict=True):
            assert_matches(one.grad, two.grad, "conv2d")

    def test_classes(self) -> None:
        from tritonq.kernels.conv2d import table_key
        from tritonq.kernels.conv_tile import ConvGeometry

        def key(x: tuple[int, ...], weight: tuple[int, ...], *geometry: object) -> str:
            return table_key("codes", "channels_last", x, weight, ConvGeometry(*geometry)).removeprefix(
                "codes/channels_last/"
            )

        assert key((32, 64, 56, 56), (64, 64, 3, 3), (1, 1), (1, 1), (1, 1), 1) == "3x3s1/dense/large"
        assert key((32, 64, 56, 56), (64, 64, 3, 3), (8, 8), (1, 1), (1, 1), 1) == "3x3s8/dense/small"
        assert key((1, 3, 9, 9), (64, 3, 7, 7), (2, 2), (3, 3), (1, 1), 1) == "7x7s2/stem/small"
        assert key((1, 8, 9, 9), (8, 1, 3, 1), (1, 2), (1, 1), (2, 2), 8) == "3x1s1x2d2/depthwise/small"
        assert key((1, 8, 9, 9), (8, 2, 3, 3), (1, 1), (1, 1), (1, 1), 4) == "3x3s1/grouped/small"
        # 2^20 elements exactly, and one image line less.
        assert key((1, 64, 128, 128), (64, 64, 1, 1), (1, 1), (0, 0), (1, 1), 1) == "1x1s1/dense/large"
        assert key((1, 64, 127, 128), (64, 64, 1, 1), (1, 1), (0, 0), (1, 1), 1) == "1x1s1/dense/small"

    def test_tf32_is_for_values_where_torch_allows_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from tritonq.kernels.conv2d import input_precision

        for allowed in (True, False):
            monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", allowed)
            assert input_precision(self.x, is_codes=False) == ("tf32" if allowed else "ieee")
            assert input_precision(self.x, is_codes=True) == "ieee"
            assert input_precision(self.x.half(), is_codes=False) == "ieee"


EVERY_KIND = {f"{kind}/channels_first/3x3s1/stem/small": TILE for kind in ("float32", "codes")}


def trained(kind: str, **arguments: object) -> torch.nn.Module:
    """A model of a QuantStub and one layer, after three training steps."""
    torch.manual_seed(0)
    qconfig = tritonq.get_qconfig("tensorrt")
    if kind == "Conv2d":
        layers = [torch.nn.Conv2d(4, 6, 3, padding=1)]
    elif kind == "RepVGGBlock":
        layers = [tritonq.nn.RepVGGBlock(4, 6)]
    else:
        layers = [torch.nn.Conv2d(4, 6, 3, padding=1, bias=False), torch.nn.BatchNorm2d(6), torch.nn.ReLU()]
    qat = tritonq.prepare_qat(torch.nn.Sequential(*layers), qconfig=qconfig, example_inputs=(torch.randn(2, 4, 5, 5),))
    for seed in range(3):
        qat.train()(torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(seed)))
    return qat


def tie_values(model: torch.nn.Module) -> None:
    """Give the quantizers of ``model`` scales with which one in 32 of the layer's sums is a tie on its output's grid.

    Another order of the scales' products would break ties.
    """
    layer = layer_of(model)
    scales = torch.tensor(0.1), torch.tensor(0.01)
    layer.input_quantizer.scale.fill_(scales[0])
    layer.weight_fake_quant.scale.fill_(scales[1])
    layer.activation_post_process.scale.fill_(32 * (scales[0] * scales[1]))


def layer_of(model: torch.nn.Module) -> torch.nn.Module:
    return next(m for m in model.modules() if isinstance(m, tritonq.nn.QATLayer))


KINDS = ["Conv2d", "ConvBnReLU2d", "RepVGGBlock"]
OTHER_LAYERS = {
    "sums beyond 2^24": (torch.nn.Conv2d(160, 3, 3), (1, 160, 4, 5), "onnxruntime"),
    "weights with zero points": (torch.nn.Conv2d(90, 3, 3), (1, 90, 4, 5), "x86"),
    "one dimension": (torch.nn.Conv1d(5, 6, 3, stride=2, padding=1), (2, 5, 9), "onnxruntime"),
    "padded by reflection": (torch.nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 5, 5), "tensorrt"),
    "matrix product": (torch.nn.Linear(700, 6), (3, 700), "onnxruntime"),
    "matrix product of tokens": (torch.nn.Linear(7, 6), (2, 3, 7), "tensorrt"),
}


@pytest.mark.interpreter
class TestLayers:
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(9))

    @pytest.mark.parametrize("kind", KINDS)
    def test_eval_in_integers_is_the_same_bit_for_bit_and_so_is_what_is_deployed(
        self, kind: str, table: Callable[..., None], launches: list[str]
    ) -> None:
        model = trained(kind).eval()
        tie_values(model)
        with tritonq.use_backend("torch"):
            without = model(self.x)
        assert launches == []
        for entries in ({}, EVERY_KIND):
            table(**entries)
            with torch.no_grad():
                assert torch.equal(model(self.x), without)
            assert launches == ["integer_conv2d"]
            assert torch.equal(model(self.x).detach(), without)
            converted = tritonq.convert(model)
            launches.clear()
            assert torch.equal(converted(self.x), without)
            assert launches == ["integer_conv2d"]
            launches.clear()
        table(**dict.fromkeys(EVERY_KIND, "torch"))
        assert torch.equal(converted(self.x), model(self.x).detach())
        assert launches == []

    @pytest.mark.filterwarnings("ignore:weight zero points differ")
    @pytest.mark.parametrize("name", OTHER_LAYERS)
    def test_other_layers_of_codes_are_the_same_bit_for_bit(self, name: str, launches: list[str]) -> None:
        layer, shape, qconfig = OTHER_LAYERS[name]
        torch.manual_seed(0)
        x = torch.randn(shape)
        # Of one sign and size, so that sums grow as far as codes let them.
        with torch.no_grad():
            layer.weight.abs_().clamp_(0.9 * float(layer.weight.max()))
        by_name = tritonq.get_default_qat_qconfig if qconfig == "x86" else tritonq.get_qconfig
        qconfig = by_name(qconfig)
        model = tritonq.prepare_qat(torch.nn.Sequential(layer), qconfig=qconfig, example_inputs=(x,))
        model(x)
        model.eval()
        x = x.abs() * 10
        with tritonq.use_backend("torch"):
            expected = model(x).detach()
            assert torch.equal(tritonq.convert(model)(x), expected)
        assert launches == []
        with torch.no_grad():
            assert torch.equal(model(x), expected)
        assert torch.equal(tritonq.convert(model)(x), expected)
        assert launches == ["integer_conv2d"] * 2

    @pytest.mark.parametrize("kind", KINDS)
    def test_eval_in_float_equals_what_is_deployed(
        self, kind: str, table: Callable[..., None], launches: list[str]
    ) -> None:
        model = trained(kind).eval()
        layer_of(model).set_input_quantizer(None)
        table(**EVERY_KIND)
        with torch.no_grad():
            y = model(self.x)
        assert launches == ["conv2d"]
        assert_close(model(self.x).detach(), y, EXACT)
        with tritonq.use_backend("torch"), torch.no_grad():
            step = layer_of(model).activation_post_process.scale
            assert ((model(self.x) - y).abs() < 1.01 * step).all()

    @pytest.mark.parametrize("kind", KINDS[:2])
    def test_hooks_on_the_quantizer_run(self, kind: str, table: Callable[..., None], launches: list[str]) -> None:
        model = trained(kind).eval()
        table(**EVERY_KIND)
        with torch.no_grad():
            expected, seen = model(self.x), []
            layer_of(model).activation_post_process.register_forward_hook(lambda module, args, y: seen.append(y))
            assert torch.equal(model(self.x), expected)
        assert len(seen) == 1
        assert launches == ["integer_conv2d"] * 2

    def test_a_switched_off_quantizer_and_one_that_saw_nothing(
        self, table: Callable[..., None], launches: list[str]
    ) -> None:
        model = trained("Conv2d").eval()
        layer_of(model).activation_post_process.disable_fake_quant()
        with tritonq.use_backend("torch"):
            without = model(self.x).detach()
        table(**EVERY_KIND)
        with torch.no_grad():
            assert torch.equal(model(self.x), without)
        fresh = copy.deepcopy(model)
        layer = layer_of(fresh)
        layer.activation_post_process = layer.qconfig.activation().eval()
        with torch.no_grad(), pytest.warns(UserWarning, match="observed nothing"):
            assert torch.equal(fresh(self.x), without)
        assert launches == ["integer_conv2d"] * 2

    @pytest.mark.parametrize("kind", KINDS[1:])
    def test_frozen_training(self, kind: str, table: Callable[..., None], launches: list[str]) -> None:
        mine, other = trained(kind), trained(kind)
        for model in (mine, other):
            layer = layer_of(model)
            if hasattr(layer, "freeze_bn_stats"):
                layer.freeze_bn_stats()
        self.check_a_step(mine, other, table, launches)

    def test_exact_training_folds_by_the_kernel(self, table: Callable[..., None], launches: list[str]) -> None:
        mine, other = trained("ConvBnReLU2d"), trained("ConvBnReLU2d")
        for model in (mine, other):
            layer_of(model).mode = "exact"
        self.check_a_step(mine, other, table, launches)
        for name, buffer in layer_of(mine).bn.named_buffers():
            torch.testing.assert_close(buffer, getattr(layer_of(other).bn, name))

    def check_a_step(
        self, mine: torch.nn.Module, other: torch.nn.Module, table: Callable[..., None], launches: list[str]
    ) -> None:
        """One convolution by the kernel, with the results and gradients of a step without it."""
        z = other.train()(self.x)
        assert launches == []
        table(**EVERY_KIND)
        y = mine.train()(self.x)
        assert launches == ["conv2d"]
        step = layer_of(mine).activation_post_process.scale
        assert ((y - z).abs() < 1.01 * step).all()
        for out in (y, z):
            out.square().sum().backward()
        expected = dict(other.named_parameters())
        for name, parameter in mine.named_parameters():
            assert_close(parameter.grad, expected[name].grad, HALF, size=0.1)
