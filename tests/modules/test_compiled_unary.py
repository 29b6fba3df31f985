"""Operations of one tensor in eval mode under ``torch.compile``: eager mode's values in every dtype and switch."""

from __future__ import annotations

import pytest
import torch

import tritonq
from tritonq.nn.average_pool import Average
from tritonq.nn.clip import Clip, Clipping
from tritonq.nn.functions import FunctionLayer, PReLU
from tritonq.reference.average_pool import AxesAverage
from tritonq.reference.functions import Function

pytestmark = pytest.mark.usefixtures("fresh_compiler")

QCONFIG = tritonq.get_qconfig()
LAYERS = {
    "silu": lambda: FunctionLayer(Function("silu"), qconfig=QCONFIG),
    "leaky_relu": lambda: FunctionLayer(Function("leaky_relu", (0.3,)), qconfig=QCONFIG),
    "prelu": lambda: PReLU(qconfig=QCONFIG),
    "prelu, channels": lambda: PReLU(4, qconfig=QCONFIG),
    "clip": lambda: Clip(Clipping(-1.0, 1.5), qconfig=QCONFIG),
    "mean": lambda: Average(AxesAverage((2, 3), True), qconfig=QCONFIG),
}


@pytest.mark.filterwarnings("ignore:bfloat16 merges neighbouring codes")
@pytest.mark.parametrize("off", ["", "source", "output"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_compiled_layer_gives_eager_modes_values(name, dtype, off):
    torch.manual_seed(0)
    layer, source = LAYERS[name](), QCONFIG.activation()
    x = torch.randn(8, 4, 16, 16)
    if isinstance(layer, PReLU):
        layer.weight.data.copy_(torch.rand(layer.num_parameters))
    layer.set_quantizers(source)
    layer.train()(source.train()(x))
    output = layer.activation_post_process
    source.scale.fill_(0.03)
    output.scale.fill_(0.0137)
    layer.eval()
    x = source.eval()(x).to(dtype)
    for quantizer, label in ((source, "source"), (output, "output")):
        quantizer.fake_quant_enabled.fill_(label != off)
    for cast in (False, True):
        with torch.no_grad(), torch.autocast("cpu", enabled=cast):
            torch._dynamo.reset()
            expected = layer(x)
            found = torch.compile(layer, backend="eager", fullgraph=True)(x)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
