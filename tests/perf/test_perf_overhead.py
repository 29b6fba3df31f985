"""Python time per call, per layer and per launch: that each is measured."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tritonq.backend import is_interpreting
from tritonq.perf import overhead
from tritonq.perf.measure import Budget

if is_interpreting():
    pytest.skip("launches are stubbed", allow_module_level=True)


@pytest.mark.filterwarnings("ignore")
def test_calls_layers_and_launches_are_measured() -> None:
    found = list(overhead.measure(torch.device("cpu"), Budget(seconds=0.01, min_rounds=2)))
    measured = {(record["case"].split("/")[1], record["implementation"]) for record in found}
    assert {("FakeQuantize", "torch"), ("ConvBnReLU2d", "torch"), ("ConvBnReLU2d", "tritonq")} <= measured
    (launch,) = (record for record in found if "/one launch/" in record["case"])
    layer = next(r for r in found if "ConvBnReLU2d/forward+" in r["case"] and r["implementation"] == "tritonq")
    # A layer's step has several launches.
    assert 0 < launch["median_s"] < layer["median_s"]
