"""Measuring BatchNorm statistics anew."""

import pytest
import torch
from torch import nn

import tritonq
from tolerances import LONG_SUMS, SUMS, TRAINED, assert_close

X = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(5)) + 1


def net():
    torch.manual_seed(1)
    first = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU())
    return nn.Sequential(first, nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))


def prepared(**fields):
    qconfig = tritonq.get_qconfig()._replace(**fields)
    model = tritonq.prepare_qat(net(), qconfig=qconfig, example_inputs=X[:8])
    model.train()(X[:16])
    return model


@pytest.mark.parametrize("folding", ["approximate", "scale", "exact"])
def test_statistics_are_those_of_the_rounded_weights_over_all_data(folding):
    model = prepared(folding=folding)
    layer = model[0][0]
    with torch.no_grad():
        layer.bn.running_mean.add_(3)
    before = layer.bn.running_var.clone()
    fold = (layer.bn.weight / torch.sqrt(before + layer.bn.eps)).view(-1, 1, 1, 1)
    quantizer = layer.weight_fake_quant.eval()
    weight = {
        "approximate": lambda: quantizer(layer.weight * fold) / fold,
        "scale": lambda: quantizer(layer.weight),
        "exact": lambda: layer.weight,  # this mode measures the float weight
    }[folding]()
    model.train()
    tritonq.reestimate_batch_norm(model, X.split(16))
    x = layer.input_fake_quant.quantize(X)
    c = nn.functional.conv2d(x, weight, layer.bias).double()
    assert_close(layer.bn.running_mean.double(), c.mean((0, 2, 3)), LONG_SUMS)
    # of each batch the unbiased variance
    count = 16 * 16
    within = torch.stack([part.var((0, 2, 3), unbiased=True) for part in c.split(16)]).mean(0)
    between = torch.stack([part.mean((0, 2, 3)) for part in c.split(16)]).var(0, unbiased=False)
    assert_close(layer.bn.running_var.double(), within + between, TRAINED, size=0.01)
    total = c.var((0, 2, 3), unbiased=False)
    torch.testing.assert_close(layer.bn.running_var.double(), total, rtol=2 / count + TRAINED.rtol, atol=SUMS.atol)


def test_nothing_else_changes():
    model = prepared()
    model[0][0].freeze_bn_stats()
    model.eval()
    model[0].train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    tritonq.reestimate_batch_norm(model, X.split(16))
    assert [module.training for module in model.modules()] == modes
    assert model[0][0].freeze_bn
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, state[name])}
    assert changed == {f"{name}.bn.running_{kind}" for name in ("0.0", "1") for kind in ("mean", "var")}
    assert torch.equal(torch.get_rng_state(), random)


def test_float_models_too():
    model = net().eval()
    expected = model[0][0](X).mean((0, 2, 3))
    tritonq.reestimate_batch_norm(model, X.split(32))
    assert_close(model[0][1].running_mean, expected, LONG_SUMS, size=0.1)
    assert model[0][1].momentum == 0.1
    assert int(model[0][1].num_batches_tracked) == 0


def test_every_run_of_a_shared_norm_counts():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

        def forward(self, x):
            return self.norm(x) + self.norm(x + 10)

    model = tritonq.reestimate_batch_norm(Twice(), [torch.tensor([[1.0], [3.0]])])
    assert model.norm.running_mean.tolist() == [7.0]
    assert model.norm.running_var.tolist() == [2.0]


def test_a_failing_batch_leaves_the_statistics():
    model = net()
    before = model[0][1].running_mean.clone()
    with pytest.raises(RuntimeError):
        tritonq.reestimate_batch_norm(model, [X, X[:, :2]])
    assert torch.equal(model[0][1].running_mean, before)
    with pytest.raises(ValueError, match="no batch"):
        tritonq.reestimate_batch_norm(model, [])
    with pytest.raises(ValueError, match="no BatchNorm"):
        tritonq.reestimate_batch_norm(nn.Linear(2, 2), X)
