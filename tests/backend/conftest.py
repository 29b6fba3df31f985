"""Keeps torchao from exporting patterns that match nothing here: some sixty in each conversion, 0.2 s each."""

import functools
import importlib.util

import pytest
from torch.nn import functional as F


@pytest.fixture(autouse=True, scope="session")
def only_patterns_of_conv2d():
    """No net here has a BatchNorm behind another convolution than ``Conv2d``."""
    if importlib.util.find_spec("torchao") is None:
        yield
        return
    from torchao.quantization.pt2e import qat_utils

    with pytest.MonkeyPatch.context() as patch:
        for name in ("_fuse_conv_bn_qat_helper", "_fold_conv_bn_qat_helper"):
            patch.setattr(qat_utils, name, only_conv2d(getattr(qat_utils, name)))
        yield


def only_conv2d(helper):
    """Return ``helper(graph, convolution, ...)``, which leaves the graph alone for other convolutions."""

    @functools.wraps(helper)
    def run(graph, convolution, *args, **kwargs):
        return helper(graph, convolution, *args, **kwargs) if convolution is F.conv2d else graph

    return run
