"""A warning where no test has compiled the kernels."""

from __future__ import annotations

import warnings

import pytest

pytest.importorskip("triton")

from tritonq.kernels.architectures import TESTED, warn_if_untested
from tritonq.perf.codegen import TARGETS


def test_what_is_called_tested_is() -> None:
    assert set(TESTED) == set(TARGETS)


def test_one_clear_warning() -> None:
    warn_if_untested.cache_clear()
    with pytest.warns(UserWarning, match=r"no test compiles tritonq's kernels for cuda:120 \(tested: cuda:80, "):
        warn_if_untested("cuda:120")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_untested("cuda:120")
        warn_if_untested("cuda:90")
