"""tritonq's observers and fake quantizers in torch.ao's QConfig and torchao's QuantizationSpec."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.ao import quantization as ao
from torch.ao.quantization import quantize_fx

import tritonq
from tolerances import EXACT, SUMS, assert_close
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


FULL = dict(dtype=torch.quint8, qscheme=torch.per_tensor_affine)
BY_NAME = tritonq.get_qconfig("onnxruntime")
QUANTIZERS = {
    "histogram": tritonq.FakeQuantize.with_args(observer=tritonq.HistogramObserver, **FULL),
    "interpolating": tritonq.FakeQuantize.with_args(observer=tritonq.InterpolatingHistogramObserver, **FULL),
    "lsq": tritonq.LearnedStepFakeQuantize.with_args(**FULL),
    "lsq+": tritonq.LearnedStepFakeQuantize.with_args(learn_zero_point=True, **FULL),
    "tqt": tritonq.TrainedThresholdFakeQuantize.with_args(**FULL),
    "pact": tritonq.ClippedFakeQuantize.with_args(observer=tritonq.MinMaxObserver, **FULL),
    "preset": BY_NAME.activation,
}
WEIGHTS = {
    "lsq per channel": tritonq.LearnedStepFakeQuantize.with_args(observer=tritonq.PerChannelMinMaxObserver, **WEIGHT),
    "lsq": tritonq.LearnedStepFakeQuantize.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric),
    "tqt": tritonq.TrainedThresholdFakeQuantize.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric),
    "preset": BY_NAME.weight,
}


@pytest.mark.parametrize("form", ["eager", "fx"])
@pytest.mark.parametrize(
    ("activation", "weight"),
    [*((a, WEIGHTS["preset"]) for a in QUANTIZERS.values()), *((QUANTIZERS["preset"], w) for w in WEIGHTS.values())],
    ids=[*QUANTIZERS, *(f"weight {name}" for name in WEIGHTS)],
)
def test_torch_ao_converts_with_the_grids_that_were_trained(activation, weight, form):
    torch.manual_seed(0)
    net = nn.Sequential(ao.QuantStub(), nn.Conv2d(3, 8, 3), nn.ReLU(), ao.DeQuantStub()).train()
    if form == "eager":
        net.qconfig = ao.QConfig(activation, weight)
        model = ao.prepare_qat(ao.fuse_modules_qat(net, [["1", "2"]]))
        conv, output = model[1], model[1].activation_post_process
    else:
        mapping = ao.QConfigMapping().set_global(ao.QConfig(activation, weight))
        model = quantize_fx.prepare_qat_fx(net, mapping, (images(),))
        conv, output = model.get_submodule("1"), model.get_submodule("activation_post_process_1")
    model(images())  # parameters of learned quantizers get their values and, per channel, their lengths
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for step in range(3):
        optimizer.zero_grad()
        model(images(step)).square().mean().backward()
        optimizer.step()
    expected = model.eval()(images(9))
    trained, weights = output.calculate_qparams(), conv.weight_fake_quant(conv.weight).detach()
    converted = ao.convert(model) if form == "eager" else quantize_fx.convert_fx(model)
    layer = converted.get_submodule("1")
    assert_close(layer.weight().dequantize(), weights, EXACT)
    assert_close((layer.scale, layer.zero_point), (float(trained.scale), int(trained.zero_point)), EXACT)
    # torch.ao's integer kernels may round a tie, and what is near one, to the other side.
    assert ((converted(images(9)) - expected) / trained.scale).abs().max() < 1.5


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
