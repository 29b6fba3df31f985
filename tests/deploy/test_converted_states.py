"""State dicts of converted models of one architecture fit each other, whatever zero points their data gave."""

from pathlib import Path

import pytest
import torch
from torch import nn

import tritonq

pytestmark = pytest.mark.filterwarnings("ignore:weight zero points differ between channels")
AFFINE = tritonq.FakeQuantize.with_args(dtype="quint8", qscheme=torch.per_tensor_affine)
PER_CHANNEL = tritonq.FakeQuantize.with_args(dtype="quint8", qscheme=torch.per_channel_affine)
GROUPS = tritonq.FakeQuantize.with_args(dtype=tritonq.QuantizedType(0, 15, symmetric=False, axis=1, group=4))
IMAGES = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))


class Last(nn.Module):
    """The last step of a recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0][-1]


MODELS = {
    "conv": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()), IMAGES, PER_CHANNEL),
    "per tensor": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.ReLU()), IMAGES, AFFINE),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.ReLU()), IMAGES, PER_CHANNEL),
    "groups": (lambda: nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()), IMAGES, GROUPS),
    "linear": (lambda: nn.Sequential(nn.Linear(6, 4)), IMAGES, PER_CHANNEL),
    "recurrent": (lambda: Last(nn.GRU(6, 4, bidirectional=True)), IMAGES[0], PER_CHANNEL),
}


def converted(name: str, positive: bool) -> nn.Module:
    """A model whose weights have zero points of 0 if ``positive``, since the range of each begins at 0."""
    make, x, weight = MODELS[name]
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            if positive and parameter.dim() > 1:
                parameter.abs_()
    qconfig = tritonq.QConfig(tritonq.get_qconfig().activation, weight)
    return tritonq.convert(tritonq.calibrate(tritonq.prepare_qat(model, qconfig=qconfig, example_inputs=x), x).eval())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("positive", [False, True])
def test_a_state_dict_is_loaded_with_and_without_zero_points(name: str, positive: bool, tmp_path: Path) -> None:
    source, target = converted(name, positive), converted(name, not positive)
    x, state = MODELS[name][1], source.state_dict()
    zeros = [key for key in state if "zero_point" in key and "weight" in key]
    assert (not zeros) == positive
    target(x)  # what was derived of the former codes is forgotten
    target.load_state_dict(state)
    assert list(target.state_dict()) == list(state)
    assert torch.equal(target(x), source(x))
    tritonq.save_converted(target, tmp_path / "model.pt")
    assert torch.equal(tritonq.load_converted(tmp_path / "model.pt", MODELS[name][0]())(x), source(x))


def test_a_state_dict_without_codes_leaves_zero_points_as_they_are() -> None:
    model = converted("conv", positive=False)
    before = model[0].weight_zero_point.clone()
    model.load_state_dict({"0.bias": torch.zeros_like(model.state_dict()["0.bias"])}, strict=False)
    assert torch.equal(model[0].weight_zero_point, before)
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("weight")}
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"0\.weight\""):
        model.load_state_dict(state)
    assert torch.equal(model[0].weight_zero_point, before)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.weight_zero_point"):
        converted("conv", positive=True).load_state_dict(
            model.state_dict() | {"0.weight_zero_point": torch.zeros(3, dtype=torch.int32)}
        )
