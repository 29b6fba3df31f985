"""The table of cases, one module per family of operators."""

from __future__ import annotations

from functools import cache

from tritonq.perf.case import Case
from tritonq.perf.cases import (
    conv2d,
    conv_bn,
    fake_quant,
    fixed_point,
    histogram,
    learned_scale,
    observe,
    residual,
    train_step,
    weight_fold,
)

_FAMILIES = (
    *(fake_quant, observe, weight_fold, conv_bn, conv2d, residual),
    *(histogram, learned_scale, fixed_point, train_step),
)


@cache
def all_cases() -> tuple[Case, ...]:
    """Every case, in the order of the families.

    Raises:
        ValueError: two cases share a name, so that their results could not be told apart.
    """
    cases = tuple(case for family in _FAMILIES for case in family.cases())
    names = [case.name for case in cases]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"case names are not unique: {', '.join(repeated)}")
    return cases
