"""An operator has one signature: its kernel launcher takes what the reference takes, by the same names.

Its form for ``torch.compile`` is made from the reference's signature.
"""

import importlib
import inspect

import pytest

from tritonq.backend import has_triton
from tritonq.functional import traced
from tritonq.reference.operator import operators_by_family

OPERATORS = [
    pytest.param(family, name, id=f"{family}.{name}")
    for family, operators in operators_by_family().items()
    for name in operators
]


def parameters(function):
    """Name and default of each parameter."""
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.skipif(not has_triton(), reason="kernels need triton")
@pytest.mark.parametrize(("family", "name"), OPERATORS)
def test_a_kernel_takes_what_the_reference_takes(family, name):
    reference = operators_by_family()[family][name]
    if not reference.operator.has_kernel:
        return
    launcher = getattr(importlib.import_module(f"tritonq.kernels.{family}"), name)
    assert parameters(launcher) == parameters(reference)


@pytest.mark.parametrize(("family", "name"), OPERATORS)
def test_each_operator_has_a_traced_form(family, name):
    assert callable(getattr(traced.FAMILIES[family], name))


def test_operators_are_found():
    assert len(OPERATORS) > 20
