"""A tuner's run in Triton's interpreter, started by `test_perf_tuner.py`: the interpreter needs its own process."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from interpreter_library import mend_interpreter
from tritonq.kernels import conv2d, launch_sizes
from tritonq.kernels.conv_tile import ConvTile
from tritonq.kernels.launch_sizes import Parameters
from tritonq.kernels.layout import view
from tritonq.perf import tuner, tuning_conv2d, tuning_space
from tritonq.perf.tuning_space import Shape, Target

# A convolution that the interpreter is done with soon, tiles for it, and how many times faster each is than torch's.
SHAPE = tuning_conv2d.ConvShape(1, 5, 5, 6, 3)
TILES = [ConvTile(16, 16, 16, 4, 1), ConvTile(32, 16, 16, 4, 2)]
CONVOLUTIONS = {
    "float32/channels_first/3x3s1/dense/small": [0.9, 1.5],
    "codes/channels_last/3x3s1/dense/large": [0.5, 1.01],
}

CPU = torch.device("cpu")
# Ragged, so that tiles of different sizes meet different edges.
SHAPES = {
    "flat": Shape((37, 30), None),
    "rows": Shape((7, 5, 3, 3), 0),
    "cols": Shape((2, 40, 5, 3), 1, channels_last=True),
}
OPTIONS = [Parameters(512, 512, 1), Parameters(512, 64, 2), Parameters(1024, 128, 4)]


def gains(table):
    """Return a clock that gives each candidate, in turn, the next gain of ``table``."""
    remaining = iter(table)
    return lambda steps, sets, device: next(remaining)


def target(kernel, shapes_class):
    for found in tuning_space.targets():
        if found.kernel == kernel and found.key == f"float32/{shapes_class}/small":
            return Target(kernel, found.key, found.dtype, (SHAPES[shapes_class],), found.operation)
    raise AssertionError(f"no target for {kernel} {shapes_class}")


def tiles_with(options):
    """Return the tile that a flat launch gets under each of ``options``."""
    x = torch.rand(64, 64)
    seen = view(x.shape, (x.stride(),), None)
    tiles = []
    for option in options:
        with launch_sizes.override("fake_quantize", option):
            tiles.append(tuple(launch_sizes.plan("fake_quantize", x.dtype, seen, CPU).tile))
    return tiles


def wrong_for(option, steps):
    """Steps whose result is off by one where they are launched with ``option``."""
    step, reference = steps

    def run(inputs):
        sizes = launch_sizes.parameters("fake_quantize", torch.float32, view((4,), ((1,),), None), CPU)
        return tuple(output + (sizes == option) for output in step(inputs))

    return run, reference


def convolution(key, gains_of_candidates, options):
    """Return a search for the small convolution ``SHAPE`` in the class ``key``, with made up gains over torch's own."""
    target = next(target for target in tuning_conv2d.targets() if target.key == key)
    return tuner.search(replace(target, shapes=(SHAPE,)), CPU, gains(gains_of_candidates), options)


def report_of(result):
    return [result.parameters, result.gain, result.rejected]


def main(folder):
    mend_interpreter()
    tuner.input_sets = lambda make, device: [make(torch.Generator().manual_seed(0), device)]
    table = tuner.Table.open(folder / "cpu.json", CPU)
    report = {"tiles": tiles_with(OPTIONS), "results": {}}
    for kernel in ("fake_quantize", "fake_quantize_backward", "min_max"):
        for shapes_class in SHAPES:
            result = tuner.search(target(kernel, shapes_class), CPU, gains([1.0, 3.0, 2.0]), OPTIONS)
            table.add(kernel, f"float32/{shapes_class}/small", result)
            report["results"][f"{kernel} {shapes_class}"] = [result.parameters, result.gain, result.rejected]
    honest = target("fake_quantize", "flat")
    broken = replace(honest, operation=lambda shape: wrong_for(OPTIONS[1], honest.operation(shape)))
    result = tuner.search(broken, CPU, gains([1.0, 2.0]), OPTIONS)
    found = {key: convolution(key, table_of_gains, TILES) for key, table_of_gains in CONVOLUTIONS.items()}
    for key, outcome in found.items():
        table.add("conv2d", key, outcome)
    report["convolutions"] = {key: report_of(outcome) for key, outcome in found.items()}
    honest_kernel = conv2d.conv2d
    conv2d.conv2d = lambda *a, tile, **k: honest_kernel(*a, tile=tile, **k) + 3 * (tile == TILES[0])
    report["wrong convolution"] = report_of(convolution("float32/channels_first/3x3s1/dense/small", [3.0], TILES))
    report["wrong"] = [result.parameters, result.gain, result.rejected]
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
