"""Constructors, defaults and eager outputs as torch.ao has them, argument by argument."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.ao.nn.intrinsic.qat as nniqat
import torch.ao.nn.qat as nnqat
from torch import nn
from torch.ao import quantization as ao

import tritonq
from tolerances import EXACT, assert_close

OURS, THEIRS = tritonq.get_default_qat_qconfig("fbgemm", 0), ao.get_default_qat_qconfig("fbgemm", 0)
CONVOLUTION = (4, 6, 3, 2, 1, 1, 2, True, "zeros")
FOLDED = (4, 6, 3, 2, 1, 1, 2, False, "zeros", 1e-3, 0.2, True)
POSITIONAL = {
    "Conv1d": (nnqat.Conv1d, CONVOLUTION),
    "Conv2d": (nnqat.Conv2d, CONVOLUTION),
    "Conv3d": (nnqat.Conv3d, CONVOLUTION),
    "Linear": (nnqat.Linear, (5, 4, False)),
    "ConvReLU2d": (nniqat.ConvReLU2d, CONVOLUTION),
    "LinearReLU": (nniqat.LinearReLU, (5, 4, True)),
    "ConvBn1d": (nniqat.ConvBn1d, FOLDED),
    "ConvBn2d": (nniqat.ConvBn2d, FOLDED),
    "ConvBnReLU2d": (nniqat.ConvBnReLU2d, FOLDED),
    "ConvBn3d": (nniqat.ConvBn3d, FOLDED),
    "LinearBn1d": (nniqat.LinearBn1d, (5, 4, True, 1e-3, 0.2, True)),
}


def described(module):
    """What a constructor sets, in names that both libraries have."""
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    values = [getattr(module, name, None) for name in (*names, "in_features", "out_features")]
    bn = getattr(module, "bn", None)
    return (*values, module.bias is None, None if bn is None else (bn.eps, bn.momentum, module.freeze_bn))


@pytest.mark.parametrize("name", POSITIONAL)
def test_positional_arguments(name):
    kind, arguments = POSITIONAL[name]
    ours, theirs = getattr(tritonq.nn, name)(*arguments, OURS), kind(*arguments, THEIRS)
    assert described(ours) == described(theirs)
    first = arguments[: 2 if "Linear" in name else 3]
    assert described(getattr(tritonq.nn, name)(*first, qconfig=OURS)) == described(kind(*first, qconfig=THEIRS))


def test_embeddings_take_a_qconfig_by_position():
    table = tritonq.nn.Embedding(7, 3, 0, None, 2.0, False, False, None, None, None, OURS)
    assert (table.padding_idx, table.qconfig) == (0, OURS)


def test_too_many_arguments():
    with pytest.raises(TypeError, match="given twice"):
        tritonq.nn.Linear(3, 2, True, OURS, qconfig=OURS)
    with pytest.raises(TypeError, match="at most 12 positional"):
        tritonq.nn.ConvBn2d(*FOLDED, 1, OURS)


def test_default_qat_qconfig_quantizes_weights_per_tensor():
    weight = torch.randn(4, 3, 3, 3) * torch.tensor([1.0, 0.1, 0.01, 10.0]).view(4, 1, 1, 1)
    ours, theirs = tritonq.default_qat_qconfig.weight(), ao.default_qat_qconfig.weight()
    assert torch.equal(ours(weight), theirs(weight))
    x = torch.randn(50)
    assert torch.equal(tritonq.default_qat_qconfig.activation()(x), ao.default_qat_qconfig.activation()(x))


def test_outputs_of_known_range():
    """Sigmoid, Tanh and their like get fixed scales in the eager flow."""

    def network(stubs):
        kinds = (nn.Sigmoid(), nn.Tanh(), nn.Hardsigmoid(), nn.Softmax(-1), nn.Hardswish())
        return nn.Sequential(stubs.QuantStub(), *kinds, stubs.DeQuantStub()).train()

    ours, theirs = network(tritonq), network(ao)
    ours.qconfig, theirs.qconfig = OURS, THEIRS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours, theirs = tritonq.prepare_qat(ours), ao.prepare_qat(theirs)
    x = torch.randn(8, 5) * 3
    for a, b in zip(ours, theirs, strict=True):
        assert hasattr(a, "activation_post_process") == hasattr(b, "activation_post_process")
        assert_close(a(x), b(x), EXACT)


def test_the_other_librarys_qconfig_is_named():
    model = nn.Sequential(nn.Linear(3, 3))
    model.qconfig = THEIRS
    for call in (
        lambda: tritonq.prepare_qat(model),
        lambda: tritonq.prepare_qat(nn.Linear(3, 3), qconfig=THEIRS, example_inputs=torch.ones(1, 3)),
        lambda: tritonq.QConfigMapping().set_global(THEIRS),
        lambda: tritonq.nn.Linear(3, 3, qconfig=THEIRS),
    ):
        with pytest.raises(TypeError, match=r"torch\.ao\.quantization\.qconfig\.QConfig, .*get_default_qat_qconfig"):
            call()


def test_folding_without_statistics():
    """MegEngine's fold_weight_bias counts a missing mean as 0 and a missing variance as 1."""
    weight, gamma, beta = torch.randn(4, 3, 3, 3), torch.rand(4), torch.randn(4)
    found = tritonq.fold_conv_bn(weight, None, None, None, gamma, beta, 1e-3)
    expected = tritonq.fold_conv_bn(weight, None, torch.zeros(4), torch.ones(4), gamma, beta, 1e-3)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
