"""What a compiler sees of a training step: tensor operations, and buffers as they were when the forward read them."""

from __future__ import annotations

import copy

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import tritonq
from saved_bytes import saved_bytes
from tolerances import SUMS, assert_close
from tritonq import nn as qnn

pytestmark = pytest.mark.usefixtures("fresh_compiler")

# What stays one call: copies of buffers, and the fold of a running variance as the forward finds it.
OPAQUE = {"tritonq.remember.default", "tritonq.fold_remembered.default"}


class Block(nn.Module):
    """Two convolutions with BatchNorm and an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return torch.relu(self.second(x) + x)


def compiled(model: nn.Module, graphs: list[torch.fx.GraphModule]) -> nn.Module:
    """Traced and partitioned as Inductor does, run without compiling code."""

    def compiler(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=compiler, bw_compiler=compiler, partition_fn=min_cut_rematerialization_partition)
    return torch.compile(model, fullgraph=True, backend=backend)


def called(graph: torch.fx.GraphModule) -> set[str]:
    """Names of tritonq's operators in a graph."""
    targets = [node.args[0] if "auto_functionalized" in str(node.target) else node.target for node in graph.graph.nodes]
    return {str(target) for target in targets if str(target).startswith("tritonq.")}


class Functions(nn.Module):
    """A linear layer and a function of its result."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.silu(self.linear(x))


def prepared(name: str, x: torch.Tensor) -> nn.Module:
    """A prepared model in training mode, which has seen a batch where its scales are trained."""
    torch.manual_seed(0)
    if name == "functions":
        return tritonq.prepare_qat(Functions(), qconfig=tritonq.get_qconfig("onnxruntime"), example_inputs=x).train()
    model = tritonq.prepare_qat(Block(), qconfig=tritonq.get_qconfig(name), example_inputs=x).train()
    model(x)
    return model


@pytest.mark.parametrize("name", ["tensorrt", "functions", "lsq_w8a8", "megengine_tqt"])
def test_what_a_step_computes_are_tensor_operations(name):
    """Tails, weights, joins, ranges, functions and learned scales."""
    x, graphs = torch.randn(8, 4, 5, 5), []
    compiled(prepared(name, x), graphs)(x).sum().backward()
    forward, backward = graphs
    assert called(forward) <= OPAQUE
    assert called(backward) == set()
    assert len(forward.graph.nodes) > 50


@pytest.mark.parametrize("layer", ["conv_bn", "addition", "linear", "functions", "lsq_w8a8"])
def test_a_backward_takes_buffers_as_the_forward_found_them(layer):
    """torch saves a buffer that a graph moves, not its value, where the backward can start from it."""
    torch.manual_seed(0)
    qconfig, x = tritonq.get_qconfig("tensorrt"), torch.randn(16, 4, 3, 3)
    if layer == "conv_bn":
        model = qnn.ConvBnReLU2d(4, 4, 1, qconfig=qconfig)
    elif layer == "addition":
        model = tritonq.prepare_qat(Block(), qconfig=qconfig, example_inputs=x).train()
    elif layer in ("functions", "lsq_w8a8"):
        x = torch.randn(16, 4, 5, 5)
        model = prepared(layer, x)
    else:
        model, x = qnn.Linear(4, 4, qconfig=qconfig), x[..., 0, 0]
    model(x)
    eager = copy.deepcopy(model)
    weight = torch.randn_like(model(x))
    # The second batch moves every running range and variance a long way, the third clips.
    eager(x)
    graphs: list[torch.fx.GraphModule] = []
    for called_model in (eager, compiled(model, graphs)):
        for factor in (30.0, 3.0):
            called_model.zero_grad()
            (called_model(factor * x) * weight).sum().backward()
    for (name, found), expected in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert_close(found.grad, expected.grad, SUMS, size=0.1, msg=f"gradient of {name} differs")
    assert len(graphs) == 2


class Wide(nn.Module):
    """Two blocks whose weights are larger than what they compute, a gate, and a function."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.wide = nn.Sequential(nn.Conv2d(4, 64, 3, bias=False), nn.BatchNorm2d(64), nn.SiLU())
        self.gate, self.head = nn.Conv2d(64, 64, 1), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.wide(self.blocks(x))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.head(x.mean((2, 3)))


def kept_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes that a compiled forward keeps for its backward, beside parameters and the input."""
    graphs: list[torch.fx.GraphModule] = []
    compiled(model, graphs)(x).square().mean().backward()
    forward, backward = graphs
    read = {node.name for node in backward.graph.nodes if node.op == "placeholder"}
    (results,) = next(node for node in forward.graph.nodes if node.op == "output").args
    kept = {node for node in results if node is not None and node.op != "placeholder" and node.name in read}
    return sum(node.meta["val"].nbytes for node in kept)


def test_a_compiled_step_keeps_no_more_than_an_eager_one():
    """Neither rounded weights nor rounded results: the backward makes them again."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 8, 8)
    model = tritonq.prepare_qat(Wide(), example_inputs=x).train()
    assert kept_bytes(copy.deepcopy(model), x) <= saved_bytes(model, x)
