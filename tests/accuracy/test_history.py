"""The record of scales, clipped shares and flips."""

import pytest
import torch
from torch import nn

import tritonq
from tritonq.fake_quantize_base import FakeQuantizeBase

X = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def prepared():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    return tritonq.prepare_qat(model, qconfig=tritonq.get_qconfig_mapping("lsq_w2a2"), example_inputs=X).train()


def test_it_counts_what_is_clipped_and_what_flips():
    layer = tritonq.nn.Linear(4, 1, bias=False, qconfig=tritonq.get_qconfig("lsq_w2a4"))
    layer(torch.ones(2, 4))
    with torch.no_grad():
        layer.weight_fake_quant.scale.fill_(0.5)
        layer.activation_post_process.scale.fill_(0.1)
        layer.activation_post_process.zero_point.zero_()
        layer.weight.copy_(torch.tensor([[0.1, 0.5, 0.8, -1.2]]))  # codes 0, 1, 1 (clipped), -2
    history = tritonq.QuantizerHistory(layer)
    layer(torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.0, 8.0, 0.0, 0.0]]))  # 0.5, and 4.0, where the grid ends at 1.5
    history.step()
    with torch.no_grad():
        layer.weight[0, 0] = 0.4
    layer(torch.zeros(2, 4))
    history.step()
    found = {(record.step, record.name): record for record in history.records}
    weight, output = "weight_fake_quant", "activation_post_process"
    assert [found[step, weight].clipped for step in (1, 2)] == [0.25, 0.25]
    assert [found[step, weight].flips for step in (1, 2)] == [None, 0.25]
    assert [found[step, output].clipped for step in (1, 2)] == [0.5, 0.0]
    assert found[1, weight].scale == 0.5
    assert found[1, output].scale == pytest.approx(0.1)
    history.close()
    assert not layer.activation_post_process._forward_hooks


def test_steps_give_the_same_numbers():
    plain, watched = prepared(), prepared()
    history = tritonq.QuantizerHistory(watched, every=2)
    for _ in range(4):
        outputs = []
        for model in (plain, watched):
            outputs.append(model(X))
            outputs[-1].square().mean().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.01 * parameter.grad
                    parameter.grad = None
        assert torch.equal(*outputs)
        history.step()
    assert {record.step for record in history.records} == {2, 4}
    names = {record.name for record in history.records}
    assert {"0.weight_fake_quant", "0.input_fake_quant", "3.activation_post_process"} <= names


def test_wrong_arguments():
    with pytest.raises(ValueError, match="call prepare_qat"):
        tritonq.QuantizerHistory(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="every must be"):
        tritonq.QuantizerHistory(prepared(), every=0)


def test_codes_of_a_formula_of_the_whole_weight():
    """A binary weight flips with its sign, and nothing of it is clipped."""
    qconfig = tritonq.QConfig(nn.Identity, tritonq.BinaryWeight.with_args())
    layer = tritonq.nn.Linear(4, 1, bias=False, qconfig=qconfig).train()
    history = tritonq.QuantizerHistory(layer)
    for first in (0.1, 5.0, -0.1):
        with torch.no_grad():
            layer.weight.copy_(torch.tensor([[first, 0.5, 0.8, -1.2]]))
        layer(torch.ones(2, 4))
        history.step()
    assert [record.flips for record in history.records] == [None, 0.0, 0.25]
    assert {record.clipped for record in history.records} == {0.0}
    assert layer.weight_fake_quant.training
    history.close()


class Sequence(nn.Module):
    """Weights of an embedding, of recurrent layers and one that is computed of others."""

    def __init__(self):
        super().__init__()
        self.table, self.bag = nn.Embedding(10, 8), nn.EmbeddingBag(10, 8)
        self.recurrent, self.cell = nn.GRU(8, 4, bidirectional=True), nn.RNNCell(8, 8)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 3))

    def forward(self, x):
        y = self.recurrent(self.table(x))[0]
        return self.normed(self.cell(y[-1] + self.bag(x.t())))


FIXED = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
INDICES = torch.randint(0, 10, (5, 4), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("model", "x", "preset"),
    [(Sequence(), INDICES, "onnxruntime"), (FIXED, X, "f8net")],
    ids=["sequence", "fixed point"],
)
def test_every_quantizer_is_recorded(model, x, preset):
    qat = tritonq.prepare_qat(model, qconfig=tritonq.get_qconfig(preset), example_inputs=x).train()
    history = tritonq.QuantizerHistory(qat)
    for _ in range(2):
        qat(x)
        history.step()
        with torch.no_grad():
            for name, parameter in qat.named_parameters():
                if parameter.dim() > 1 and not name.endswith("original0"):  # the norm of the computed weight
                    parameter.neg_()
    expected = {name for name, module in qat.named_modules() if isinstance(module, FakeQuantizeBase)}
    weights = {name for name in expected if ".weight" in f".{name}"}
    assert {record.name for record in history.records if record.step == 2} == expected
    flips = {record.name: record.flips for record in history.records if record.step == 2}
    assert {name for name, share in flips.items() if share is not None} == weights
    assert min(flips[name] for name in weights) > 0.2


def test_a_closed_history_stays_as_it_is():
    model = prepared()
    history = tritonq.QuantizerHistory(model)
    model(X)
    history.step()
    kept = list(history.records)
    assert kept
    history.close()
    model(X)
    history.step()
    assert history.records == kept
