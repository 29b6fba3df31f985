"""Pairs of torch.ao's and tritonq's layers with BatchNorm, in float64, and how to compare them."""

import torch
import torch.ao.nn.intrinsic.qat as nniqat
from torch import nn
from torch.ao.quantization import QConfig as TorchQConfig

import tritonq
from tolerances import FLOAT64_LAYERS, assert_close
from written_quantizers import WrittenActivation, WrittenWeight

WRITTEN = TorchQConfig(activation=WrittenActivation, weight=WrittenWeight)
FLOAT_OUT = tritonq.QConfig(activation=nn.Identity, weight=tritonq.get_qconfig("tensorrt").weight)

GEOMETRIES = {
    "1d": ("1d", {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "stride": 2, "padding": 1}, (4, 4, 9)),
    "2d": ("2d", {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1}, (4, 4, 5, 6)),
    "pointwise": ("2d", {"in_channels": 4, "out_channels": 6, "kernel_size": 1, "stride": 2}, (4, 4, 5, 6)),
    "one pixel": ("2d", {"in_channels": 4, "out_channels": 6, "kernel_size": 3}, (8, 4, 3, 3)),
    "reflect": (
        "2d",
        {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        (4, 4, 5, 6),
    ),
    "replicate": (
        "1d",
        {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 2, "padding_mode": "replicate"},
        (4, 4, 9),
    ),
    "same": ("2d", {"in_channels": 4, "out_channels": 6, "kernel_size": (2, 3), "padding": "same"}, (4, 4, 5, 6)),
    "grouped": (
        "2d",
        {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "groups": 2, "dilation": 2, "padding": 2},
        (4, 4, 5, 6),
    ),
    "depthwise": ("2d", {"in_channels": 6, "out_channels": 6, "kernel_size": 3, "groups": 6}, (4, 6, 5, 6)),
    "3d": (
        "3d",
        {"in_channels": 2, "out_channels": 3, "kernel_size": 2, "padding_mode": "circular", "padding": 1},
        (2, 2, 3, 4, 3),
    ),
}


def randomise(bn):
    """Return statistics and affine unlike those of a new BatchNorm; every second γ is negative."""
    with torch.no_grad():
        bn.weight.uniform_(0.5, 1.5)[1::2] *= -1
        bn.bias.normal_()
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
    return bn


def pair(geometry, *, bias=True, affine=True, relu=True, momentum=0.1, qconfig=FLOAT_OUT, **ours_only):
    """Return torch.ao's module and tritonq's with the same parameters, in float64."""
    dim, arguments, _ = GEOMETRIES[geometry]
    torch.manual_seed(0)
    arguments = {**arguments, "bias": bias, "momentum": momentum}
    theirs = getattr(nniqat, f"ConvBn{'ReLU' if relu else ''}{dim}")(**arguments, qconfig=WRITTEN).double()
    ours = getattr(tritonq.nn, f"ConvBn{'ReLU' if relu else ''}{dim}")(**arguments, qconfig=qconfig, **ours_only)
    ours, theirs.padding = ours.double(), ours.padding  # torch.ao takes "same" for a pair of numbers
    with torch.no_grad():
        randomise(theirs.bn)
        if not affine:
            theirs.bn.weight.fill_(1)
            theirs.bn.bias.zero_()
    ours.load_state_dict(theirs.state_dict(), strict=False)
    if not affine:
        ours.bn.weight = ours.bn.bias = None
    return theirs, ours


def inputs(geometry, steps=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(GEOMETRIES[geometry][2], generator=generator, dtype=torch.float64) for _ in range(steps)]


def assert_same_training(theirs, ours, batches, channels_last=False):
    """Three steps of output, gradients and running statistics, then one evaluation."""
    for x in batches:
        p, q = x.clone().requires_grad_(), x.clone().requires_grad_()
        z = theirs(q)
        y = ours(p.contiguous(memory_format=torch.channels_last) if channels_last else p)
        assert y.shape == z.shape
        assert_close(y, z, FLOAT64_LAYERS)
        dy = torch.randn(z.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
        for module in (theirs, ours):
            module.zero_grad()
        y.backward(dy)
        z.backward(dy)
        assert_close(p.grad, q.grad, FLOAT64_LAYERS)
        gradients = dict(theirs.named_parameters())
        for name, parameter in ours.named_parameters():
            assert_close(parameter.grad, gradients[name].grad, FLOAT64_LAYERS, msg=lambda m, n=name: n + m)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            assert_close(getattr(ours.bn, name), getattr(theirs.bn, name), FLOAT64_LAYERS)
    theirs.eval()
    ours.eval()
    assert_close(ours(batches[0]), theirs(batches[0]), FLOAT64_LAYERS)
