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
