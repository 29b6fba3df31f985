"""A remembered launch hands Triton's launcher what an ordinary one does; no GPU runs anything."""

import pytest
import torch

from grids import grid_of
from tritonq.backend import has_triton, is_interpreting
from tritonq.grid import Grid, RangeStatistics

if not has_triton() or is_interpreting():
    pytest.skip("needs a compiling Triton", allow_module_level=True)

import triton
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from tritonq.kernels import cached_launch, fake_quant, histogram, min_max
from tritonq.quantized_type import QUINT8


class RecordingDriver:
    """A GPU that is not there: kernels are compiled for it, and launches are written down."""

    def __init__(self):
        self.launches = []
        self.utils = self
        self.through_triton = 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 7

    def load_binary(self, name, binary, shared, device):
        return object(), hash(binary), 32, 0, 1024

    def unload_module(self, module):
        """Triton 3.8 calls it when a compiled kernel is freed."""

    def get_device_properties(self, device):
        return {"max_shared_mem": 2**18}

    def launcher_cls(self, source, metadata):
        def launch(*args):
            self.launches.append(args)

        return launch


@pytest.fixture
def recorder(monkeypatch):
    recording, run = RecordingDriver(), JITFunction.run

    def counted(self, *args, **kwargs):
        recording.through_triton += 1
        return run(self, *args, **kwargs)

    monkeypatch.setattr(JITFunction, "run", counted)
    monkeypatch.setattr(cached_launch, "has_launches", lambda value: True)
    before = driver._active
    driver.set_active(recording)
    launched_here = (fake_quant.fake_quantize_kernel, fake_quant.fake_quantize_backward_kernel)
    launched_here += (min_max.observe_kernel, histogram.linear_histogram_kernel)
    for kernel in launched_here:
        kernel._entries.clear()
    yield recording
    for kernel in launched_here:
        kernel._entries.clear()
        kernel.function.device_caches.pop(0, None)
    driver._active = before


def plain(launch):
    """Grid, stream, compiled kernel and arguments, tensors by where they lie."""
    grid, stream, function, packed = launch[:3], launch[3], launch[4], launch[5]
    args = [(a.data_ptr(), a.dtype) if isinstance(a, torch.Tensor) else a for a in launch[9:]]
    return grid, stream, function, packed, args


def quantize(x, axis=None):
    channels = 1 if axis is None else x.shape[axis]
    scale, zero_point = torch.full((channels,), 0.1), torch.zeros(channels, dtype=torch.int32)
    return fake_quant.fake_quantize_backward(x, x, grid_of(scale, zero_point, -8, 7, axis))


def observe(x):
    scale, zero_point, count = torch.ones(1), torch.zeros(1, dtype=torch.int32), torch.zeros((), dtype=torch.int64)
    low, high = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    statistics = RangeStatistics(low, high, count, QUINT8.granularity, averaging_constant=0.01, eps=1e-7)
    min_max.observe(x, statistics, Grid(scale, zero_point, QUINT8))


def launched(recorder, kernel, *args, **constants):
    recorder.launches.clear()
    kernel[(3, 2)](*args, **constants)
    (launch,) = recorder.launches
    return plain(launch)


CONSTANTS = {
    **{"CHANNEL": None, "QUANT_MIN": -8, "QUANT_MAX": 7, "ROUNDING": "half_even", "CODES": False},
    **{"MANTISSA_BITS": None, "LEAST_EXPONENT": None, "LARGEST": None, "OVERFLOW": None},
    **{"ROWS": 1, "COLS": 1024, "FIRST": 2, "WIDE": False, "SAME_STRIDES": True, "num_warps": 4},
}


def arguments(x, size=4096):
    return x, torch.empty_like(x), None, torch.ones(1), None, None, (0, 0, 1), (0, 0, 1), (1, 1, size)


@pytest.mark.parametrize("name", ["dtype", "alignment", "number", "constant", "option"])
def test_what_decides_the_compiled_kernel_is_told_apart(recorder, name):
    kernel, x = fake_quant.fake_quantize_kernel, torch.randn(4096)
    other, constants = arguments(x), dict(CONSTANTS)
    if name == "dtype":
        other = arguments(x.bfloat16())
    elif name == "alignment":
        other = arguments(torch.randn(4097)[1:])
    elif name == "number":
        other = arguments(x, 4095)
    elif name == "constant":
        constants["QUANT_MAX"] = 15
    else:
        constants["num_warps"] = 8
    first = launched(recorder, kernel, *arguments(x), **CONSTANTS)
    second = launched(recorder, kernel, *other, **constants)
    assert first[2:4] != second[2:4]
    expected = launched(recorder, kernel.function, *other, **constants)
    assert second == expected


@pytest.mark.parametrize("reordered", [False, True])
def test_a_remembered_launch_is_the_same_launch(recorder, reordered):
    kernel, args = fake_quant.fake_quantize_kernel, arguments(torch.randn(4096))
    constants = dict(reversed(CONSTANTS.items())) if reordered else CONSTANTS
    first = launched(recorder, kernel, *args, **constants)
    before = recorder.through_triton
    second = launched(recorder, kernel, *args, **constants)
    assert recorder.through_triton == before
    assert first == second
    assert first[0] == (3, 2, 1)
    assert first[1] == 7


@pytest.mark.parametrize(
    "operation",
    [
        quantize,
        lambda x: quantize(x, 1),
        lambda x: quantize(x.to(memory_format=torch.channels_last), 1),
        observe,
    ],
)
def test_operators_launch_the_same(recorder, operation):
    x = torch.randn(4, 16, 8, 8)
    operation(x)
    first = [plain(launch) for launch in recorder.launches]
    before = recorder.through_triton
    recorder.launches.clear()
    operation(x)
    second = [plain(launch) for launch in recorder.launches]
    assert recorder.through_triton == before
    without_memory = [[a[1] if isinstance(a, tuple) else a for a in launch[4]] for launch in first]
    assert without_memory == [[a[1] if isinstance(a, tuple) else a for a in launch[4]] for launch in second]
    assert [launch[:4] for launch in first] == [launch[:4] for launch in second]


def test_hooks_of_profilers_see_remembered_launches(recorder):
    kernel, args = fake_quant.fake_quantize_kernel, arguments(torch.randn(4096))
    launched(recorder, kernel, *args, **CONSTANTS)
    seen = []
    knobs.runtime.launch_enter_hook.add(seen.append)
    try:
        recorder.launches.clear()
        kernel[(3, 2)](*args, **CONSTANTS)
        (launch,) = recorder.launches
        assert launch[7] is knobs.runtime.launch_enter_hook
        assert launch[6].get()["name"] == "fake_quantize_kernel"
    finally:
        knobs.runtime.launch_enter_hook.remove(seen.append)


def test_numbers_that_are_equal_and_of_two_types_are_told_apart(recorder):
    """Triton makes 0 an integer and 0.0 a float; each needs a kernel of its own."""
    kernel, x, counts = histogram.linear_histogram_kernel, torch.randn(4096), torch.zeros(4, dtype=torch.int64)
    signatures = []
    for parts in (0, 0.0, 0):
        launch = launched(recorder, kernel, x, counts, torch.zeros(2), 4096, 4, 4, parts, BLOCK=1024, num_warps=4)
        signatures.append(launch[2])
    assert signatures[0] == signatures[2] != signatures[1]


def test_the_memory_of_launches_is_bounded(recorder, monkeypatch):
    monkeypatch.setattr(cached_launch, "_MAX_ENTRIES", 2)
    kernel, x = fake_quant.fake_quantize_kernel, torch.randn(4096)
    for size in (16, 32, 48, 64, 80):
        launched(recorder, kernel, *arguments(x, size), **CONSTANTS)
        assert len(kernel._entries) <= 2


def test_interpreted_and_absent_launches_are_not_remembered():
    assert not cached_launch.has_launches(torch.zeros(1))
    assert not cached_launch.has_launches(torch.zeros(1, device="meta"))


@cached_launch.Launcher
@triton.jit
def scaled_kernel(x_ptr, factor: tl.constexpr, offset: tl.constexpr = 0):
    tl.store(x_ptr, tl.load(x_ptr) * factor + offset)


def test_a_launch_without_a_defaulted_parameter_is_refused_before_it_runs(recorder, monkeypatch):
    for is_on_gpu in (True, False):
        monkeypatch.setattr(cached_launch, "has_launches", lambda value, found=is_on_gpu: found)
        with pytest.raises(TypeError, match="scaled_kernel must be given offset, defaults or not"):
            scaled_kernel[(1,)](torch.zeros(1), factor=3, num_warps=1)
    assert not recorder.launches
    assert recorder.through_triton == 0
    scaled_kernel[(1,)](torch.zeros(1), factor=3, offset=0, num_warps=1)
    assert len(recorder.launches) == 1
