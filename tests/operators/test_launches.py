"""Every launch that modules and functions make is compiled for a GPU, and runs in the emulator in one shape.

The scenarios below run over all presets, modes of folding, dtypes, layouts, with and without quantizers, hooks and
ReLUs. What a scenario launches is found by running it, so that no list of launches has to be kept. The last test holds
the scenarios to reach every kernel, and both sides of every branch that is taken while compiling. Results are compared
by the operators' own tests (``make emulate``).
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

import tritonq
from grids import presets_for_any_width
from launch_log import LaunchLog, kernels
from tritonq import nn as qnn
from tritonq.backend import implementation, is_interpreting
from tritonq.grid import Grid
from tritonq.kernels import conv2d, layout
from tritonq.kernels.cached_launch import Launcher
from tritonq.kernels.conv_tile import ConvTile
from tritonq.nn.batch_norm_layer import QATBatchNormLayer
from tritonq.nn.functions import FunctionLayer
from tritonq.qconfig import PRESETS
from tritonq.reference.functions import DEFINITIONS, Function

if is_interpreting():
    pytest.skip("an interpreting process cannot compile", allow_module_level=True)

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
    for layer in model.modules():
        if isinstance(layer, QATBatchNormLayer):
            layer.mode = mode
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


def functions(dtype: torch.dtype, wide: bool = False) -> None:
    """Public functions and observers, per tensor and along each kind of axis."""
    with pytest.MonkeyPatch.context() as patched:
        if wide:
            patched.setattr(layout, "_WIDE_EXTENT", 0)
            layout.view.cache_clear()
        _functions(dtype)
    layout.view.cache_clear()


def _functions(dtype: torch.dtype) -> None:
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


# Branches whose other side no scenario reaches yet. The list only shrinks: who adds a scenario removes its entries.
ONE_SIDED = {
    "conv2d.conv2d_kernel: WIDE",
    "conv_bn.finish_kernel: momentum_ptr",
    "fake_quant.fake_quantize_kernel: CODES",
    "fake_quant.fake_quantize_kernel: SAME_STRIDES",
    # What decides whether a launch is new copies its tensors, slices without their gaps.
    "float_blocks.fake_quantize_blocks_kernel: SAME_STRIDES",
    "functions.function_backward_kernel: WIDE",
    "histogram.prefix_histogram_kernel: CHANNEL",
    "histogram.prefix_histogram_kernel: WINDOW",
    "int8_conv.int8_conv_kernel: saturated_ptr",
    "learned_scale.clip_then_round_kernel: active_ptr",
    "residual.join_backward_kernel: WIDE",
    "rounded.rounded_kernel: WIDE",
    "rounded.rounded_range_kernel: WIDE",
    "rounded.rounded_range_kernel: observing_ptr",
    "weights_together.quantize_all_kernel: HAS_ZERO_POINT",
    "weights_together.quantize_all_kernel: KNOWN",
    "weights_together.quantize_all_kernel: OBSERVES",
}

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
    "weights together": weights_together,
    "tuned convolutions": tuned_convolutions,
    "long sums": long_sums,
    **{f"functions in {dtype}": (lambda dtype=dtype: functions(dtype)) for dtype in DTYPES},
    "functions on large offsets": lambda: functions(torch.float32, wide=True),
}
LOG = LaunchLog()


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.filterwarnings("ignore")
def test_what_is_launched_compiles_and_runs(name: str) -> None:
    with LOG.running():
        SCENARIOS[name]()


def branches(launcher: Launcher) -> set[str]:
    """Arguments of a kernel that decide which of its lines are compiled: ``if X`` and ``X is None``."""
    function = launcher.function
    constants = {name for name, value in function.fn.__annotations__.items() if "constexpr" in str(value)}
    pointers = {name for name in function.arg_names if name.endswith("_ptr")}
    tree = ast.parse(textwrap.dedent(inspect.getsource(function.fn)))
    tests = [node.test for node in ast.walk(tree) if isinstance(node, ast.If | ast.IfExp)]
    names = {part.id for test in tests for part in ast.walk(test) if isinstance(part, ast.Name)}
    return names & (constants | pointers)


@pytest.mark.filterwarnings("ignore")
def test_scenarios_reach_every_kernel_and_both_sides_of_every_branch() -> None:
    """A kernel, or a branch of one, that no scenario launches fails: add the scenario that does."""
    log, found = LaunchLog(runs=False), kernels()
    with log.running():
        for scenario in SCENARIOS.values():
            scenario()
    assert set(log.variants) == set(found)
    one_sided = {
        f"{kernel}: {argument}"
        for kernel, launcher in found.items()
        for argument in branches(launcher)
        if len({dict(variant).get(argument) for variant in log.variants[kernel]}) < 2
    }
    assert one_sided == ONE_SIDED
