"""`parameter_groups`: each parameter once, in the group that it belongs to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tritonq

SCHEMES = {
    "lsq": tritonq.LearnedStepFakeQuantize.with_args(dtype="quint8", learn_zero_point=True),
    "tqt": tritonq.TrainedThresholdFakeQuantize.with_args(dtype="qint8"),
    "pact": tritonq.ClippedFakeQuantize,
}


def prepared(scheme):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LayerNorm(100), nn.Linear(100, 2)
    )
    qconfig = tritonq.QConfig(SCHEMES[scheme], tritonq.LearnedStepFakeQuantize.with_args(dtype="qint8"))
    return tritonq.prepare_qat(model, qconfig=qconfig, example_inputs=torch.rand(2, 3, 5, 5), warn=False)


@pytest.mark.filterwarnings("ignore:a ClippedFakeQuantize")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_parameter_once(scheme):
    model = prepared(scheme)
    groups = tritonq.parameter_groups(model, 0.1, 1e-4, scale_lr=0.01)
    names = {parameter: name for name, parameter in model.named_parameters()}
    members = {group["name"]: sorted(names[parameter] for parameter in group["params"]) for group in groups}
    assert sorted(name for group in members.values() for name in group) == sorted(names.values())
    assert all(name.endswith((".scale", ".zero_point", ".log2_threshold", ".alpha")) for name in members["quantizers"])
    assert members["normalizations"] == ["0.bn.bias", "0.bn.weight", "4.bias", "4.weight"]
    assert members["weights"] == ["0.bias", "0.weight", "5.bias", "5.weight"]
    assert {group["name"]: (group["lr"], group["weight_decay"]) for group in groups} == {
        "weights": (0.1, 1e-4),
        "normalizations": (0.1, 0.0),
        "quantizers": (0.01, 0.0),
    }


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_only_weights_decay(kind):
    model = prepared("lsq")
    model(torch.rand(2, 3, 5, 5))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = kind(tritonq.parameter_groups(model, 0.1, 0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {"0.bias", "0.weight", "5.bias", "5.weight"}


def test_clipping_levels_of_fixed_point_are_quantizers():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    model = tritonq.prepare_qat(model, qconfig=tritonq.get_qconfig("f8net"), example_inputs=torch.rand(2, 3, 8, 8))
    groups = {group["name"]: group for group in tritonq.parameter_groups(model, 0.1, 0.5)}
    levels = {
        id(parameter) for name, parameter in model.named_parameters() if "alpha" in name and parameter.requires_grad
    }
    assert levels == {id(parameter) for parameter in groups["quantizers"]["params"]}
    assert groups["quantizers"]["weight_decay"] == 0


def test_shared_and_frozen_parameters():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    (group,) = tritonq.parameter_groups(model, 0.1)
    assert len(group["params"]) == 2


def test_bad_arguments():
    with pytest.raises(ValueError, match="scale_lr must not be negative"):
        tritonq.parameter_groups(nn.Linear(1, 1), 0.1, scale_lr=-1)
    with pytest.raises(ValueError, match="weight_decay must not be negative, got nan"):
        tritonq.parameter_groups(nn.Linear(1, 1), 0.1, float("nan"))
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        tritonq.parameter_groups(nn.ReLU(), 0.1)
