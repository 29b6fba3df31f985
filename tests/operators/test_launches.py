"""Every launch that modules and functions make is compiled for a GPU, and runs in the emulator in one shape.

The scenarios are those of `launch_scenarios`. The last test holds them to reach every kernel, and both sides of every
branch that is taken while compiling. Results are compared by the operators' own tests (``make emulate``).
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import warnings
from functools import cache
from typing import Any

import pytest

pytest.importorskip("triton")

from emulator import EmulatedGpu, compiled_for
from launch_log import LaunchLog, architecture_of, kernels
from launch_scenarios import SCENARIOS
from tritonq.backend import is_interpreting
from tritonq.kernels.cached_launch import Launcher

if is_interpreting():
    pytest.skip("an interpreting process cannot compile", allow_module_level=True)

LOG = LaunchLog()


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.filterwarnings("ignore")
def test_what_is_launched_compiles_and_runs(name: str) -> None:
    with LOG.running():
        SCENARIOS[name]()


def branches(launcher: Launcher) -> set[str]:
    """Arguments of a kernel that decide which of its lines are compiled: constants in ``if``, and ``X is None``."""
    function = launcher.function
    constants = {name for name, value in function.fn.__annotations__.items() if "constexpr" in str(value)}
    pointers = {name for name in function.arg_names if name.endswith("_ptr")}
    tree = ast.parse(textwrap.dedent(inspect.getsource(function.fn)))
    tests = [node.test for node in ast.walk(tree) if isinstance(node, ast.If | ast.IfExp)]
    parts = [part for test in tests for part in ast.walk(test)]
    compared = {ast.unparse(part.left) for part in parts if isinstance(part, ast.Compare) and _is_none(part)}
    return {part.id for part in parts if isinstance(part, ast.Name)} & constants | compared & pointers


def _is_none(comparison: ast.Compare) -> bool:
    (other,) = comparison.comparators
    return isinstance(other, ast.Constant) and other.value is None


@cache
def noted() -> LaunchLog:
    """Return what all scenarios launch, without running it."""
    log = LaunchLog(runs=False)
    with log.running(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for scenario in SCENARIOS.values():
            scenario()
    return log


def with_number(value: Any, number: int) -> Any:
    """Return an argument of a launch with another number for each of its integers."""
    if isinstance(value, tuple):
        return tuple(with_number(part, number) for part in value)
    return number if isinstance(value, int) and not isinstance(value, bool) else value


@pytest.mark.parametrize("number", [1, 2**31 + 16], ids=["one", "64 bits"])
@pytest.mark.parametrize("kernel", kernels())
def test_compiles_whatever_its_sizes_are(kernel: str, number: int) -> None:
    """Triton makes an integer that is 1 a number of Python, without the methods of its own, and large ones int64."""
    function, gpu = kernels()[kernel].function, EmulatedGpu(architecture_of(kernel))
    found = [example for (name, _), example in noted().examples.items() if name == kernel]
    with compiled_for(gpu):
        for args, constants in found[:: max(1, len(found) // 3)]:
            wide = {"WIDE": True} if "WIDE" in constants and number > 1 else {}
            given = [with_number(value, number) for value in args]
            function.warmup(*given, grid=(1,), **{**constants, **wide})


def test_scenarios_reach_every_kernel_and_both_sides_of_every_branch() -> None:
    """A kernel, or a branch of one, that no scenario launches fails: add the scenario that does."""
    log, found = noted(), kernels()
    assert set(log.variants) == set(found)
    one_sided = {
        f"{kernel}: {argument}"
        for kernel, launcher in found.items()
        for argument in branches(launcher)
        if len({dict(variant).get(argument) for variant in log.variants[kernel]}) < 2
    }
    assert not one_sided
