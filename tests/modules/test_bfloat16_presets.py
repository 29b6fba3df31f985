"""Training in bfloat16 autocast: the presets learn, and what was trained is what is deployed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonq


@pytest.mark.parametrize("preset", ["onnxruntime", "tensorrt"])
def test_presets_train_in_bfloat16(preset):
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)),
    )
    x = torch.randn(64, 3, 10, 10)
    labels = (x[:, 0].mean((1, 2)) > 0).long() + 2 * (x[:, 1].mean((1, 2)) > 0).long()
    model = tritonq.prepare_qat(net, qconfig=tritonq.get_qconfig(preset), example_inputs=x[:2]).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x).float(), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0], losses
    model.eval()
    assert tritonq.verify(model, tritonq.convert(model), x).agrees()
    assert (model(x).argmax(1) == labels).float().mean() > 0.7
    # Codes are made in float32 in eval mode, whatever autocast says.
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x).float(), model(x))


class Gated(nn.Module):
    """One of each: BatchNorm, ReLU, SiLU, a gate, a sum, a concatenation, a pool and a mean."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv, self.gate, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Linear(16, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        y = F.silu(self.conv(x))
        y = y * F.hardsigmoid(self.gate(y.mean((2, 3), keepdim=True))) + x
        return self.head(F.avg_pool2d(torch.cat([x, y], 1), 2).mean((2, 3)))


def results_of_modules(model, x, autocast):
    """What each module returned, in float32."""
    found = {}
    hooks = [
        module.register_forward_hook(lambda module, given, y, name=name: found.__setitem__(name, y.float()))
        for name, module in model.named_modules()
    ]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.filterwarnings("ignore:ONNX Runtime convolves in integers only where")  # those of preset tensorrt
@pytest.mark.parametrize("preset", ["onnxruntime", "tensorrt"])
def test_codes_under_autocast_are_those_of_float32(preset, tmp_path):
    """Trained in bfloat16, on images of bfloat16: in eval mode, converted and in a file."""
    torch.manual_seed(0)
    # From 0 on: all 256 codes of an unsigned grid are on one side, where bfloat16 merges neighbours.
    x = torch.rand(8, 3, 12, 12).bfloat16()
    model = tritonq.prepare_qat(Gated(), qconfig=tritonq.get_qconfig(preset), example_inputs=x[:2].float()).train()
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            model(x).float().square().mean().backward()
    model.eval()
    converted = tritonq.convert(model)
    for each in (model, converted):
        expected = results_of_modules(each, x.float(), autocast=False)
        found = results_of_modules(each, x, autocast=True)
        assert found.keys() == expected.keys()
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []
    tritonq.export_onnx(converted, tmp_path / "model.onnx", x[:2].float(), target="onnxruntime")
    assert tritonq.verify(model, tmp_path / "model.onnx", x.float()).total.differing == 0


def test_a_grid_that_bfloat16_does_not_tell_is_said_once():
    quantizer = tritonq.get_qconfig("onnxruntime").activation()
    quantizer(torch.rand(100))
    quantizer.eval()
    x = torch.rand(100).bfloat16()
    with pytest.warns(UserWarning, match="bfloat16 merges neighbouring codes"):
        assert quantizer(x).dtype == torch.bfloat16
    quantizer(x)  # once
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer(x), quantizer(x.float()))
