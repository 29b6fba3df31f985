"""Curves of a step's cost: what is measured, and that the picture holds it."""

from __future__ import annotations

import pytest

from tritonq.perf import curves
from tritonq.perf.measure import Budget
from tritonq.perf.stats import Spread


def test_each_point_differs_from_the_common_chain_in_its_curve_alone():
    planned = list(curves.plan(quick=False))
    assert {name for name, _ in planned} == set(curves.CURVES)
    assert len(planned) == 2 * sum(len(values) for values in curves.CURVES.values())
    for name, chain in planned:
        common = curves.Chain(channels_last=chain.channels_last)
        different = {field for field, value in vars(chain).items() if value != getattr(common, field)}
        assert different <= {name}


def test_a_point_compares_a_step_with_floats():
    point = curves.measure("depth", curves.Chain(2, 8, 2, 6, "depthwise"), Budget(0.01, 3, 3))
    assert 0 < point.ratio.p20 <= point.ratio.median <= point.ratio.p80
    assert point.float_s > 0


def test_the_picture_has_a_panel_per_curve():
    pytest.importorskip("matplotlib")
    points = [curves.Point(name, chain, Spread(1.25, 1.0, 1.5), 0.1) for name, chain in curves.plan(quick=True)]
    panels = curves.figure(points, "somewhere").axes
    assert [panel.get_xlabel() for panel in panels if panel.get_xlabel()] == list(curves.CURVES)
    assert [tuple(line.get_ydata()) for line in panels[0].lines[:2]] == [(1.25, 1.25)] * 2
