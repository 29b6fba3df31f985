"""The ResNets of benchmarks for machines without torchvision: its modules, names and results."""

from __future__ import annotations

import pytest
import torch

from tritonq.perf.cases import vision_models
from tritonq.perf.cases.resnet import ResNet, resnet


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
@pytest.mark.parametrize("quantizable", [False, True])
def test_own_resnets_are_torchvisions(name, quantizable):
    """The same weights from the same seed, and the same results."""
    if not vision_models.has_torchvision():
        pytest.skip("torchvision is not installed")
    make = vision_models.quantizable if quantizable else vision_models.torchvision_model
    theirs = make(name, num_classes=10)
    torch.manual_seed(0)
    own = resnet(name, 10, quantizable=quantizable)
    own.load_state_dict(theirs.state_dict()) if quantizable else None
    x = torch.randn(2, 3, 32, 32)
    assert own.state_dict().keys() == theirs.state_dict().keys()
    assert torch.equal(own.train()(x), theirs.train()(x))
    if quantizable:
        for model in (own, theirs):
            model.fuse_model(is_qat=True)
        assert [str(type(m)) for m in own.modules() if "intrinsic" in str(type(m))] == [
            str(type(m)) for m in theirs.modules() if "intrinsic" in str(type(m))
        ]


def test_without_torchvision_the_own_resnet_is_used(monkeypatch):
    monkeypatch.setattr(vision_models, "has_torchvision", lambda: False)
    assert isinstance(vision_models.torchvision_model("resnet18", 10), ResNet)
    assert hasattr(vision_models.quantizable("resnet18", 10), "fuse_model")
    with pytest.raises(ValueError, match="resnet18 and resnet50, not mobilenet_v2"):
        vision_models.torchvision_model("mobilenet_v2", 10)
