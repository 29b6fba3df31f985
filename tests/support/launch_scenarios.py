"""What modules and functions launch: scenarios over all presets, modes of folding, dtypes, layouts and switches.

With and without quantizers, hooks and ReLUs. What a scenario launches is found by running it, so that no list of
launches has to be kept: see `launch_log`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import tritonq
from grids import presets_for_any_width
from op_tester import clear_plans
from qat_models import set_mode
from quantizer_states import quantizer_state
from tritonq import nn as qnn
from tritonq.backend import implementation
from tritonq.bins import FloatPrefixBins
from tritonq.grid import Grid
from tritonq.kernels import conv2d, layout
from tritonq.kernels.conv_tile import ConvTile
from tritonq.nn.functions import FunctionLayer
from tritonq.qconfig import PRESETS
from tritonq.quantized_type import QINT8, QUINT8
from tritonq.reference.functions import DEFINITIONS, Function

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TORCH_AO = {
    f"{engine}_v{v}": tritonq.get_default_qat_qconfig(engine, v) for engine in ("fbgemm", "qnnpack") for v in (0, 1)
}
WEIGHT = tritonq.get_qconfig("tensorrt").weight
LEARNED = {
    "lsq+": tritonq.QConfig(
        tritonq.LearnedStepFakeQuantize.with_args(dtype=torch.quint8, learn_zero_point=True), WEIGHT
    ),
    "lsq per channel": tritonq.QConfig(
        tritonq.LearnedStepFakeQuantize.with_args(dtype=torch.qint8),
        tritonq.LearnedStepFakeQuantize.with_args(dtype=torch.qint8, qscheme=torch.per_channel_symmetric, ch_axis=0),
    ),
    "pact": tritonq.QConfig(tritonq.ClippedFakeQuantize.with_args(dtype="quint8"), WEIGHT),
    "histogram": tritonq.QConfig(tritonq.FakeQuantize.with_args(observer=tritonq.HistogramObserver), WEIGHT),
}


class Net(nn.Module):
    """Each kind of layer and join once: ReLU, ReLU6 and no ReLU behind a convolution and behind an addition."""

    def __init__(self, fixed_point: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.clipped = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU6())
        self.plain = nn.Sequential(nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6, affine=fixed_point))
        self.relu, self.relu6 = nn.ReLU(), nn.ReLU6()
        self.fixed_point = fixed_point
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.clipped(x)
        z = self.relu(self.plain(y) + x)
        if not self.fixed_point:
            z = self.relu6(z + y) + x
        return self.head(z.mean((2, 3)) if not self.fixed_point else nn.functional.adaptive_avg_pool2d(z, 1).flatten(1))


def image(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0)).to(dtype)


def prepared(qconfig: tritonq.QConfig, fixed_point: bool = False) -> nn.Module:
    torch.manual_seed(0)
    with tritonq.use_backend("torch"):
        return tritonq.prepare_qat(Net(fixed_point), qconfig=qconfig, example_inputs=image()).train()


def train(model: nn.Module, x: Tensor) -> None:
    """A step that observes, one that does not, one that does not round, and one with frozen statistics."""

    def step() -> None:
        model(x).float().square().mean().backward()

    step()
    tritonq.disable_observer(model)
    step()
    tritonq.disable_fake_quant(model)
    step()
    tritonq.enable_fake_quant(model)
    tritonq.freeze_bn_stats(model)
    step()


def evaluate(model: nn.Module, x: Tensor) -> None:
    """In eval mode, and converted; some scales are given by others and not observed."""
    with torch.no_grad():
        model.eval()(x)
        tritonq.convert(model, allow_unquantized=True)(x)


def preset(qconfig: tritonq.QConfig, fixed_point: bool = False) -> Callable[[], None]:
    def run() -> None:
        model = prepared(qconfig, fixed_point)
        train(model, image())
        made = qconfig.activation(), qconfig.weight()
        # Blocks of activations are not deployed, and those of weights not where three channels make no block.
        if not any(isinstance(each, tritonq.FloatFakeQuantize) and each.qtype is None for each in made):
            evaluate(model, image())

    return run


def in_dtype(dtype: torch.dtype) -> None:
    """A whole model in a dtype, in channels_last."""
    model = prepared(PRESETS["tensorrt"]).to(dtype).to(memory_format=torch.channels_last)
    train(model, image(dtype).to(memory_format=torch.channels_last))


def autocast(channels_last: bool) -> None:
    model, x = prepared(tritonq.get_default_qat_qconfig("x86")), image()
    if channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        train(model, x)


def in_mode(mode: str) -> None:
    model = prepared(PRESETS["tensorrt"])
    set_mode(model, mode)
    train(model, image())


def with_hooks(name: str) -> None:
    """Quantizers with hooks run by themselves."""
    model = prepared(PRESETS["tensorrt"])
    for layer in model.modules():
        quantizer = getattr(layer, name, None)
        if isinstance(quantizer, nn.Module):
            quantizer.register_forward_hook(lambda module, given, y: None)
    train(model, image())


def without(side: str) -> None:
    qconfig = PRESETS["tensorrt"]._replace(**{side: nn.Identity})
    train(prepared(qconfig), image())


def functions_of_one_tensor() -> None:
    """Each function, on inputs that are kept as codes and on others, and joins that have no operator of their own."""
    states = [FunctionLayer(Function(name, (0.5, 2.0)[: known.arguments])) for name, known in DEFINITIONS.items()]
    qconfig = PRESETS["onnxruntime"]
    source, x = qconfig.activation(), image()
    for layer in states:
        layer.attach_quantizers(qconfig)
        layer(x.requires_grad_()).sum().backward()
        layer.set_quantizers(source)
        layer(source(x)).sum().backward()
    for preset in ("tensorrt", "onnxruntime"):
        for join in (qnn.Mul, qnn.Add):
            join(qconfig=PRESETS[preset])(x, x[:, :, :1, :1]).sum().backward()


def large() -> None:
    """Tensors that several programs share: one operator in two launches, and rows longer than a tile."""
    x = torch.randn(2, 3, 80, 80, generator=torch.Generator().manual_seed(0))
    for axis in (None, 1):
        observer = tritonq.MinMaxObserver() if axis is None else tritonq.PerChannelMinMaxObserver(ch_axis=axis)
        observer(x)
    tritonq.FakeQuantize(tritonq.MovingAverageMinMaxObserver)(x)
    layer = qnn.ConvBnReLU2d(1024, 2, 3, padding=1, qconfig=PRESETS["tensorrt"])
    layer(torch.randn(2, 1024, 3, 3, generator=torch.Generator().manual_seed(0))).sum().backward()


def short_rows() -> None:
    """Rows of 7 · 7 elements, which begin anywhere in planes that begin at multiples of 8, in each dtype."""
    qconfig = PRESETS["tensorrt"]
    for dtype in DTYPES:
        for given in (qconfig, qconfig._replace(activation=nn.Identity)):
            layer = qnn.ConvBnReLU2d(2, 8, 3, padding=1, qconfig=given).to(dtype)
            layer(torch.ones(2, 2, 7, 7, dtype=dtype)).float().sum().backward()


def weights_together() -> None:
    # A parameter without storage, which the search for the tensors behind the table of addresses must pass over.
    bystander = nn.LazyLinear(1)
    for qconfig in (PRESETS["tensorrt"], TORCH_AO["fbgemm_v0"]):
        model = prepared(qconfig)
        tritonq.quantize_weights_together(model)
        train(model, image())
    assert bystander.has_uninitialized_params()


def tuned_convolutions() -> None:
    """Evaluation on a GPU whose table prefers kernels."""
    tile = ConvTile(16, 16, 16, 4, 2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(conv2d, "_tuned_tile", lambda *_: tile)
        for name in ("tensorrt", "megengine_ema"):
            model = prepared(PRESETS[name])
            model(image())
            evaluate(model, image())
            layer = qnn.ConvReLU2d(3, 4, 3, qconfig=PRESETS[name])
            layer(image())
            evaluate(nn.Sequential(layer), image())


def long_sums() -> None:
    """Evaluation of a layer whose sums of codes outgrow float32."""
    x = torch.randn(2, 600, generator=torch.Generator().manual_seed(0))
    model = tritonq.prepare_qat(nn.Sequential(nn.Linear(600, 3)), qconfig=PRESETS["onnxruntime"], example_inputs=(x,))
    model(x)
    evaluate(model, x)


@contextmanager
def wide_offsets() -> Iterator[None]:
    """Compute all offsets as if tensors were too large for 32 bits."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(layout, "_WIDE_EXTENT", 0)
        clear_plans()
        yield
    clear_plans()


def on_large_offsets() -> None:
    """Functions, layers, joins, convolutions in eval mode, and those of fixed point."""
    with wide_offsets():
        functions(torch.float32)
        functions_of_one_tensor()
        tuned_convolutions()
        preset(PRESETS["f8net"], fixed_point=True)()


def averaging_forever() -> None:
    """BatchNorm's statistics as averages of all batches, by a momentum that changes."""
    model = prepared(PRESETS["tensorrt"])
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
    train(model, image())


def operators() -> None:
    """What layers ask of operators for themselves, in forms of which no layer above has need."""
    x = image()
    # Slices have gaps, so that results are laid out otherwise.
    for given in (x, x[:, :, :, 1:]):
        for grid in (Grid(torch.full((1,), 0.1), None, QINT8), quantizer_state(QUINT8).grid):
            implementation("fake_quant", x).fake_quantize(given, grid)
            implementation("fake_quant", x).quantize(given, grid)
            implementation("learned_scale", x).learned_fake_quantize(given, grid, "megengine")
        tritonq.fake_quantize_float(given, "mxfp8", axis=3)
    implementation("residual", x).forward(x, x, Grid(torch.full((1,), 0.1), None, QINT8), None, None)
    per_channel = quantizer_state(QINT8.with_axis(1), x.shape[1])
    low, high, count = (
        per_channel.statistics.min_val,
        per_channel.statistics.max_val,
        torch.zeros((), dtype=torch.int64),
    )
    counts, bins = torch.zeros((x.shape[1], FloatPrefixBins().count), dtype=torch.int64), FloatPrefixBins()
    implementation("histogram", x).observe(x, counts, low, high, count, None, bins, 1)
    codes, ones = (x * 20).round().to(torch.int8), torch.ones(4, dtype=torch.int32)
    weight, saturated = torch.ones(4, 3, 3, 3, dtype=torch.int8), torch.zeros(1, dtype=torch.int64)
    geometry = ((1, 1), (1, 1), (1, 1), 1)
    implementation("int8_conv", x).int8_conv2d(codes, weight, ones, ones, *geometry, -127, 127, torch.int8, saturated)
    for qtype in (QINT8, QUINT8):
        for frozen, has_data in ((False, False), (True, True), (True, False)):
            state = quantizer_state(qtype.with_axis(0), 4).with_range(frozen=frozen, has_data=has_data)
            rows = torch.ones(4, 3, 3, 3)
            implementation("weights_together", x).quantize_all([rows], torch.ones(4), [state.grid], [state.statistics])


def functions(dtype: torch.dtype) -> None:
    """Call public functions and observers, per tensor and along each kind of axis."""
    first = image(dtype).requires_grad_()
    last = first.detach().to(memory_format=torch.channels_last).requires_grad_()
    for rounding in ("half_even", "half_away"):
        tritonq.fake_quantize_per_tensor_affine(first, 0.1, 3, 0, 255, rounding=rounding).sum().backward()
        tritonq.fake_quantize_per_tensor_affine(first, 0.1, 0, -(2**23), 2**23 - 1, rounding=rounding).sum().backward()
        for x, axis in ((first, 0), (first, 1), (last, 1)):
            channels = x.shape[axis]
            scale, zero_point = torch.full((channels,), 0.1), torch.zeros(channels, dtype=torch.int32)
            tritonq.fake_quantize_per_channel_affine(
                x, scale, zero_point, axis, -128, 127, rounding=rounding
            ).sum().backward()
    for x, axis in ((first, 1), (last, 1)):
        for rounding in ("floor", "ceil"):
            tritonq.fake_quantize_float(x, "mxfp8", axis=axis, scale_rounding=rounding)
        tritonq.fake_quantize_float(x, "nvfp4", axis=axis)
        tritonq.fake_quantize_float(x, "fp8_e4m3", 0.1).sum().backward()
        implementation("fake_quant", x).fake_quantize_with_mask(
            x.detach(), Grid(torch.ones(1), None, tritonq.QuantizedType.of_floats("e5m2"))
        )
    ties_away = tritonq.QuantizedType.of(8, rounding="half_away")
    tritonq.LearnedStepFakeQuantize(dtype=ties_away)(first).sum().backward()
    for x, axis in ((first, None), (first, 1), (last, 1)):
        channels = 1 if axis is None else x.shape[axis]
        for switch in (None, torch.ones(1, dtype=torch.uint8)):
            grid = Grid(torch.full((channels,), 0.1), None, tritonq.QuantizedType(0, 255, False, axis), switch)
            implementation("fake_quant", x).fake_quantize_with_mask(x.detach(), grid)
        scale = torch.full((channels,), 0.1, requires_grad=True)
        zero_point = torch.zeros(channels, requires_grad=True)
        for method in ("torch", "megengine"):
            for shift in (0, zero_point):
                y = tritonq.fake_quantize_learnable(x, scale, shift, -128, 127, axis, method=method)
                y.sum().backward()
        tritonq.fixed_point_quantize(x, torch.full((channels,), 3), axis=axis).sum().backward()
        tritonq.search_frac_len(x, axis=axis)
        observer = tritonq.MinMaxObserver() if axis is None else tritonq.PerChannelMinMaxObserver(ch_axis=axis)
        observer(x)
        tritonq.HistogramObserver(ch_axis=axis)(x) if axis is None else None
    tritonq.trained_threshold_quantize(first, torch.tensor([1.0], requires_grad=True), -128, 127).sum().backward()
    tritonq.histogram(first.detach(), 16, -1.0, 1.0)


SCENARIOS: dict[str, Callable[[], None]] = {
    **{name: preset(qconfig, name == "f8net") for name, qconfig in presets_for_any_width().items()},
    **{name: preset(qconfig) for name, qconfig in TORCH_AO.items()},
    **{f"in {dtype}": (lambda dtype=dtype: in_dtype(dtype)) for dtype in DTYPES},
    "autocast": lambda: autocast(False),
    "autocast, channels_last": lambda: autocast(True),
    **{f"mode {mode}": (lambda mode=mode: in_mode(mode)) for mode in ("exact", "corrected")},
    **{
        f"hooks on {name}": (lambda name=name: with_hooks(name))
        for name in ("weight_fake_quant", "activation_post_process")
    },
    **{f"without {side} quantizers": (lambda side=side: without(side)) for side in ("weight", "activation")},
    **{name: preset(qconfig) for name, qconfig in LEARNED.items()},
    "large": large,
    "functions of one tensor": functions_of_one_tensor,
    "short rows": short_rows,
    "weights together": weights_together,
    "tuned convolutions": tuned_convolutions,
    "long sums": long_sums,
    **{f"functions in {dtype}": (lambda dtype=dtype: functions(dtype)) for dtype in DTYPES},
    "large offsets": on_large_offsets,
    "averages of all batches": averaging_forever,
    "operators": operators,
}
