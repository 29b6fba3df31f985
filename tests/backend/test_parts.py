"""tritonq's observers and fake quantizers in torch.ao's QConfig and torchao's QuantizationSpec."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.ao import quantization as ao

import tritonq
from tolerances import SUMS, assert_close
from torch_ao_nets import prepared

pytestmark = pytest.mark.filterwarnings("ignore")

ACTIVATION = dict(dtype=torch.quint8, quant_min=0, quant_max=127, qscheme=torch.per_tensor_affine)
WEIGHT = dict(dtype=torch.qint8, quant_min=-128, quant_max=127, qscheme=torch.per_channel_symmetric)


def images(step=0):
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(step))


def qconfig(kit):
    activation = kit.FakeQuantize.with_args(observer=kit.MovingAverageMinMaxObserver, **ACTIVATION)
    weight = kit.FakeQuantize.with_args(observer=kit.MovingAveragePerChannelMinMaxObserver, **WEIGHT)
    return ao.QConfig(activation, weight)


def test_in_a_qconfig_of_torch_ao():
    theirs, ours = prepared(qconfig(ao)), prepared(qconfig(tritonq))
    assert isinstance(ours.conv.weight_fake_quant, tritonq.FakeQuantize)
    for step in range(2):
        assert_close(theirs(images(step)), ours(images(step)), SUMS)
    theirs.apply(ao.disable_observer), ours.apply(ao.disable_observer)
    assert not any(bool(q.observer_enabled) for q in ours.modules() if isinstance(q, tritonq.FakeQuantize))
    converted = [ao.convert(model.eval()) for model in (theirs, ours)]
    assert [type(module) for module in converted[0].modules()] == [type(module) for module in converted[1].modules()]
    assert_close(*(model(images(9)) for model in converted), SUMS)


def test_in_a_quantization_spec_of_torchao():
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import pt2e
    from torchao.quantization.pt2e import quantize_pt2e
    from torchao.quantization.pt2e.quantizer import QuantizationSpec
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    def model(kit):
        def spec(observer, arguments, **more):
            make = kit.FakeQuantize.with_args(observer=observer)
            plain = {torch.quint8: torch.uint8, torch.qint8: torch.int8}[arguments["dtype"]]
            return QuantizationSpec(observer_or_fake_quant_ctr=make, **{**arguments, "dtype": plain}, **more)

        activation = spec(kit.MovingAverageMinMaxObserver, ACTIVATION)
        weight = spec(kit.MovingAveragePerChannelMinMaxObserver, WEIGHT, ch_axis=0)
        config = x86.QuantizationConfig(activation, activation, weight, None, is_qat=True)
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, bias=False), nn.ReLU())
        exported = torch.export.export(net.train(), (images(),), strict=True).module()
        return quantize_pt2e.prepare_qat_pt2e(exported, x86.X86InductorQuantizer().set_global(config))

    theirs, ours = model(pt2e), model(tritonq)
    assert sum(isinstance(module, tritonq.FakeQuantize) for module in ours.modules()) == 4
    for step in range(2):
        assert_close(theirs(images(step)), ours(images(step)), SUMS)
    for each in (theirs, ours):
        pt2e.move_exported_model_to_eval(each)
        each.apply(pt2e.disable_observer)
    converted = [quantize_pt2e.convert_pt2e(each) for each in (theirs, ours)]
    assert_close(*(each(images(9)) for each in converted), SUMS)
    targets = [[str(node.target) for node in each.graph.nodes if "quantize" in str(node.target)] for each in converted]
    assert targets[0] == targets[1]
    assert len(targets[0]) >= 6
