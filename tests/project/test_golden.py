"""Operators, modules, presets and files give what the record says; `record_golden.py` explains how."""

import copy
import json

import pytest

from record_golden import PROBE, RECORD, difference, differences, summary_with


@pytest.fixture(scope="module")
def summary():
    return summary_with("oldest")


def test_everything_is_as_recorded(summary):
    assert not differences(summary)


def test_the_comparison_can_fail(summary):
    recorded = json.loads(RECORD.read_text())["parts"]
    changed = copy.deepcopy(summary)
    exact = next(name for name, part in recorded.items() if part[1] == 0)
    inexact = next(name for name, part in recorded.items() if part[1] and name != PROBE)
    changed[exact][0] = changed[inexact][0] = "0"
    assert [line for line in differences(changed) if line.startswith(exact)]
    # Elsewhere than on the record's machine, small differences of inexact parts pass, and large ones do not.
    assert difference(recorded[exact], changed[exact], exactly=False)
    assert not difference(recorded[inexact], changed[inexact], exactly=False)
    changed[inexact][1] = (1 + changed[inexact][1]) * (2 + recorded[inexact][1])
    assert difference(recorded[inexact], changed[inexact], exactly=False)
    del changed[exact]
    assert f"{exact}: missing" in differences(changed)
