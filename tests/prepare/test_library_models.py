"""Models of torchvision, timm and transformers, as their authors wrote them: prepared, trained, converted, exported."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonq
import tritonq.nn as qnn
import vision_models
from prepared_nets import assert_inputs_on_their_grids, assert_same_when_not_rounding, primary
from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.nn.batch_norm_layer import QATBatchNormLayer

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from integer_nodes import float_parts

STEPS = 10
WEIGHTED = (nn.modules.conv._ConvNd, nn.Linear)


@dataclass(frozen=True)
class Zoo:
    """A model, and what a hand count of it gives.

    Attributes:
        make: builds it.
        pairs: convolutions with a BatchNorm behind them.
        layers: convolutions and linear layers.
        joins: additions and concatenations.
        listed: whether it also trains and goes to ONNX Runtime here; others differ from one of those in little.
        make_small: builds a model of the same blocks, but fewer, for training and ONNX Runtime; None: ``make``.
    """

    make: Callable[[], nn.Module]
    pairs: int
    layers: int
    joins: int
    listed: bool = True
    make_small: Callable[[], nn.Module] | None = None


ZOO = {
    # stem, 16 in blocks, 3 shortcuts; 20 convolutions and the head; 8 additions
    "torchvision_resnet18": Zoo(lambda: vision_models.torchvision_model("resnet18"), 20, 21, 8),
    # 34 pairs, 9 squeeze-and-excite blocks of two plain convolutions, two linear layers
    "torchvision_mobilenet_v3_small": Zoo(lambda: vision_models.torchvision_model("mobilenet_v3_small"), 34, 54, 6),
    # The stem, and the first of two convolutions in each of 58 layers; 3 transitions and the head; concatenated is the
    # input of each layer but the first of its block, and the output of each of 4 blocks
    "torchvision_densenet121": Zoo(
        lambda: vision_models.torchvision_model("densenet121"),
        59,
        121,
        54 + 4,
        make_small=lambda: vision_models.torchvision_dense_network((2, 2, 2, 2)),
    ),
    "torchvision_mobilenet_v2": Zoo(lambda: vision_models.torchvision_model("mobilenet_v2"), 52, 53, 10, False),
    "timm_resnet18": Zoo(lambda: vision_models.timm_model("resnet18"), 20, 21, 8),
    # 22 blocks of a 1×1 and a 3×3 branch, 17 of them with an identity branch that is a BatchNorm alone
    "timm_repvgg_a0": Zoo(lambda: vision_models.timm_model("repvgg_a0"), 44, 45, 39),
    # stem, 2 in the first block, 45 in fifteen blocks of three, head
    "timm_efficientnet_lite0": Zoo(lambda: vision_models.timm_model("efficientnet_lite0"), 49, 50, 9),
    # stem, two blocks of two, one of them with a shortcut, and the first stage's block
    "transformers_resnet": Zoo(vision_models.transformers_resnet, 8, 9, 3),
    "transformers_resnet_bottleneck": Zoo(lambda: vision_models.transformers_resnet("bottleneck"), 11, 12, 3, False),
    "transformers_mobilenet_v2": Zoo(vision_models.transformers_mobilenet_v2, 52, 53, 10),
}
LISTED = [name for name, zoo in ZOO.items() if zoo.listed]


@pytest.mark.parametrize("name", ZOO)
def test_it_is_prepared_as_a_hand_count_says(name):
    torch.manual_seed(0)
    zoo, x = ZOO[name], torch.randn(2, 3, 64, 64)
    model = zoo.make()
    prepared = tritonq.prepare_qat(model, example_inputs=x[:1])
    assert type(prepared).__name__ == type(model).__name__
    layers = [module for module in prepared.modules() if isinstance(module, qnn.QATLayer)]
    assert sum(isinstance(layer, QATBatchNormLayer) for layer in layers) == zoo.pairs
    assert len(layers) == zoo.layers
    assert sum(isinstance(module, (qnn.Add, qnn.Cat)) for module in prepared.modules()) == zoo.joins
    assert all(layer.input_quantizer is not None for layer in layers)
    assert_same_when_not_rounding(model, prepared, x)

    loss = primary(prepared.train()(x)).square().sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in prepared.parameters())
    assert len(assert_inputs_on_their_grids(prepared, x)) == zoo.layers


@pytest.mark.parametrize("name", LISTED)
def test_every_layer_is_quantized_or_the_summary_says_why(name):
    model = ZOO[name].make()
    weighted = {layer for layer, module in model.named_modules() if isinstance(module, WEIGHTED)}
    prepared = tritonq.prepare_qat(model, example_inputs=torch.randn(1, 3, 32, 32))
    rows = {row.name: row for row in tritonq.summary(prepared).layers}
    assert weighted <= set(rows)
    for row in rows.values():
        assert (row.status == "float" or row.reason.startswith("float in")) == bool(row.reason), row
    for layer in weighted:
        is_quantized = isinstance(prepared.get_submodule(layer), qnn.QATLayer)
        assert (rows[layer].status == "quantized") == is_quantized, rows[layer]
        assert rows[layer].grid or rows[layer].reason


@pytest.mark.parametrize("name", LISTED)
def test_no_quantizer_feeds_another_through_a_clip(name):
    """Where a ReLU or ReLU6 remains as a module, what it reads was not rounded just before."""
    prepared = tritonq.prepare_qat(ZOO[name].make(), example_inputs=torch.randn(1, 3, 32, 32)).train()
    rounded: dict[int, torch.Tensor] = {}
    clipped_twice: list[str] = []

    def note(module, inputs, output):
        rounded[id(output)] = output

    def check(layer):
        def hook(module, inputs, output):
            if id(inputs[0]) in rounded and hasattr(module, "activation_post_process"):
                clipped_twice.append(layer)

        return hook

    for layer, module in prepared.named_modules():
        if isinstance(module, FakeQuantizeBase) and not layer.endswith("weight_fake_quant"):
            module.register_forward_hook(note)
        elif isinstance(module, (nn.ReLU, nn.ReLU6)):
            module.register_forward_hook(check(layer))
    prepared(torch.randn(2, 3, 32, 32))
    assert rounded
    assert not clipped_twice


@dataclass(frozen=True)
class Trained:
    """A model after ten steps on one small batch, in eval mode.

    Attributes:
        model: it.
        images: the batch.
        losses: of each step.
    """

    model: nn.Module
    images: torch.Tensor
    losses: list[float]


@cache
def trained(name: str) -> Trained:
    torch.manual_seed(0)
    zoo = ZOO[name]
    model, images, labels = (zoo.make_small or zoo.make)(), torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.5  # or ten steps would leave eval mode with the statistics of the construction
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tritonq.prepare_qat(model, example_inputs=images[:2]).train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(primary(model(images)), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return Trained(model.eval(), images, losses)


@pytest.mark.parametrize("name", LISTED)
def test_the_loss_falls_in_ten_steps(name):
    found = trained(name)
    assert sum(found.losses[-3:]) < 0.95 * sum(found.losses[:3]), found.losses
    assert all(parameter.isfinite().all() for parameter in found.model.parameters())


@pytest.mark.parametrize("name", LISTED)
def test_the_converted_model_has_the_codes_of_eval_mode(name):
    found = trained(name)
    converted = tritonq.convert(found.model)
    assert not any(isinstance(module, qnn.QATLayer) for module in converted.modules())
    report = tritonq.verify(found.model, converted, found.images)
    assert report.agrees(), report
    # A network of which nothing but zeros is left would agree as well.
    assert len(primary(converted(found.images)).unique()) >= 5


@pytest.mark.parametrize("name", LISTED)
def test_onnx_runtime_finds_the_codes(name, tmp_path: Path):
    pytest.importorskip("onnxruntime")
    found, path = trained(name), tmp_path / "model.onnx"
    tritonq.export_onnx(copy.deepcopy(found.model), path, found.images[:2])
    others = torch.randn(3, *found.images.shape[1:], generator=torch.Generator().manual_seed(5))
    report = tritonq.verify(found.model, path, [found.images, others])
    assert report.agrees(), report
    assert report.outputs.differing_predictions == 0
    assert float_parts(tritonq.summary(found.model), path) == []
