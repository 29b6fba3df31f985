"""Float and int8 files in ONNX Runtime: which nodes take the time, and the dense networks among the models."""

import pytest
import torch
from torch import nn

from tritonq.perf import deployed
from tritonq.perf.cases.dense_nets import Detector, UNet
from tritonq.perf.cases.deployed import DENSE_NETS, GOALS, Setting, settings


@pytest.mark.parametrize(("net", "shape"), [(UNet, (2, 1, 32, 64)), (Detector, (2, 16, 42))])
def test_dense_networks(net, shape):
    torch.manual_seed(0)
    assert net().eval()(torch.randn(2, 3, 32, 64)).shape == shape


def test_every_model_has_a_goal_and_runs_with_one_and_two_threads():
    assert [(setting.model, setting.threads) for setting in settings()] == [(m, t) for m in GOALS for t in (1, 2)]


def tiny():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))


def test_a_missed_goal_names_the_nodes(monkeypatch, capsys):
    pytest.importorskip("onnxruntime")
    monkeypatch.setitem(DENSE_NETS, "tiny", tiny)
    monkeypatch.setitem(GOALS, "tiny", 1e9)
    monkeypatch.setattr(deployed, "settings", lambda: [Setting("tiny", 1, 16)])
    assert deployed.main(["--seconds", "0.01"]) == 1
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert first.startswith("deployed/tiny/1x3x16x16/1 thread ")
    assert "QLinearConv" in second
