"""A family of operators has all its parts, each in the file that bears its name; nothing else lists families.

A family is a module of `tritonq.reference` and one of `tritonq.kernels` that share functions. `test_signatures.py`
compares signatures and traced forms; `test_launches.py` has the emulator run every kernel.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from collections import Counter
from pathlib import Path
from types import FunctionType, ModuleType
from unittest.mock import patch

import pytest

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

import tritonq.kernels
from tritonq.backend import is_interpreting
from tritonq.kernels.cached_launch import Launcher
from tritonq.perf import cases, codegen
from tritonq.perf.codegen_cases import cases_by_family
from tritonq.reference.operator import operators_by_family

ROOT = Path(__file__).parent.parent.parent
TESTS = ROOT / "tests"


def functions(module: ModuleType) -> set[str]:
    """Names of the public functions that a module defines."""
    return {
        name
        for name, value in vars(module).items()
        if isinstance(value, FunctionType) and value.__module__ == module.__name__ and not name.startswith("_")
    }


def families() -> list[str]:
    """Names of the modules of kernels that implement functions of the reference's module of the same name."""
    names = [entry.name for entry in pkgutil.iter_modules(tritonq.kernels.__path__)]
    references = {entry.name for entry in pkgutil.iter_modules(importlib.import_module("tritonq.reference").__path__)}
    pairs = {
        name: [importlib.import_module(f"tritonq.{side}.{name}") for side in ("kernels", "reference")]
        for name in names
        if name in references
    }
    return sorted(name for name, (kernel, reference) in pairs.items() if functions(kernel) & functions(reference))


FAMILIES = families()


def called_families() -> set[str]:
    """Families that some module of tritonq calls: ``implementation("fake_quant", x)``, or an import of the kernels.

    One of which the specification of another is made is called with it.
    """
    found = set()
    for path in (ROOT / "tritonq").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and "implementation" in ast.unparse(node.func) and node.args:
                found.add(ast.unparse(node.args[0]).strip("'"))
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tritonq.kernels."):
                found.add(str(node.module).removeprefix("tritonq.kernels."))
            elif (
                isinstance(node, ast.ImportFrom)
                and node.module == "tritonq.reference"
                and path.parent.name == "reference"
            ):
                found.update(alias.name for alias in node.names)
    return found


def test_families_are_found() -> None:
    assert len(FAMILIES) > 9
    marked = operators_by_family()
    with_kernel = {name for name in marked if any(f.operator.has_kernel for f in marked[name].values())}
    assert with_kernel <= set(FAMILIES), "an operator that says it has a kernel has no module of kernels"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_called(family: str) -> None:
    assert family in called_families()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_tests_on_every_backend(family: str) -> None:
    """Some file of tests, found by the functions that it calls, has a class of `OpTester` for them."""
    module = importlib.import_module(f"tritonq.kernels.{family}")
    names = functions(module) & functions(importlib.import_module(f"tritonq.reference.{family}"))
    pattern = re.compile(rf'operators\("{family}"|{family}\.({"|".join(names)})\(|implementation\("{family}"')
    texts = {path.name: path.read_text() for path in TESTS.rglob("test_*.py")}
    assert [name for name, text in texts.items() if "(OpTester)" in text and pattern.search(text)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_benchmark_cases(family: str) -> None:
    assert family in cases.families(), f"perf/cases/{family}.py is missing"
    assert list(cases.families()[family]())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_code_generation_cases(family: str) -> None:
    assert family in cases_by_family(), f"perf/codegen_cases/{family}.py is missing"
    assert cases_by_family()[family]


@pytest.mark.skipif(is_interpreting(), reason="an interpreting process cannot compile")
def test_every_kernel_is_in_some_code_generation_case() -> None:
    launched: Counter[str] = Counter()

    def count(self: JITFunction[object], *args: object, **kwargs: object) -> None:
        launched[f"{self.fn.__module__}.{self.__name__}"] += 1

    with codegen.compiling_for("cuda:90"), patch.object(JITFunction, "run", count):
        for case in codegen.ALL_CASES:
            case.call(case.dtypes[0])
    modules = [
        importlib.import_module(f"tritonq.kernels.{entry.name}")
        for entry in pkgutil.iter_modules(tritonq.kernels.__path__)
    ]
    kernels = {
        f"{launcher.function.fn.__module__}.{launcher.function.__name__}"
        for module in modules
        for launcher in vars(module).values()
        if isinstance(launcher, Launcher)
    }
    assert len(kernels) > 20
    assert kernels - set(launched) == set()
