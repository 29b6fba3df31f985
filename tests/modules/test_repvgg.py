"""RepVGG: one convolution for three branches, and QAT through them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonq
from conv_bn_cases import FLOAT_OUT, randomise
from tolerances import FLOAT64, FLOAT64_SUMS, LONG_SUMS, SUMS, assert_close
from tritonq.nn import QATRepVGGBlock, RepVGGBlock
from written_quantizers import WrittenWeight

CASES = {
    "identity": {"in_channels": 6, "out_channels": 6},
    "stride": {"in_channels": 6, "out_channels": 6, "stride": 2},
    "channels": {"in_channels": 4, "out_channels": 6},
    "groups": {"in_channels": 6, "out_channels": 6, "groups": 2, "learned_alpha": True},
    "depthwise": {"in_channels": 6, "out_channels": 6, "groups": 6, "activation": nn.SiLU()},
    "linear": {"in_channels": 6, "out_channels": 6, "activation": None, "learned_alpha": True},
}


def block(name):
    torch.manual_seed(0)
    made = RepVGGBlock(**CASES[name]).double()
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            randomise(module)
    if made.alpha is not None:
        with torch.no_grad():
            made.alpha.fill_(0.7)
    return made


def quantized(name, qconfig=FLOAT_OUT):
    made = block(name)
    made.qconfig = qconfig
    return QATRepVGGBlock.from_float(made)


def sample(name, batch=2):
    return torch.randn(batch, CASES[name]["in_channels"], 7, 6, dtype=torch.float64, generator=torch.manual_seed(1))


def test_identity_branch_and_activations_by_name():
    """PaddleDetection's blocks have no identity branch, and name their activations."""
    assert RepVGGBlock(6, 6).bn_identity is not None
    assert RepVGGBlock(6, 6, identity=False).bn_identity is None
    without = RepVGGBlock(6, 6, identity=False, activation="silu")
    assert type(without.activation) is nn.SiLU
    without.qconfig = FLOAT_OUT
    assert QATRepVGGBlock.from_float(without).bn_identity is None
    for arguments, error, message in (
        ((6, 4, 1, 1, "relu", True), TypeError, "positional"),
        ((6, 4), ValueError, "as many channels in as out"),
        ((6, 6, 2), ValueError, "stride 1"),
    ):
        with pytest.raises(error, match=message):
            RepVGGBlock(*arguments, identity=True)
    with pytest.raises(ValueError, match="unknown activation 'selu'; known: relu"):
        RepVGGBlock(6, 6, activation="selu")
    with pytest.raises(TypeError, match="activation must be a module"):
        RepVGGBlock(6, 6, activation=3)


@pytest.mark.parametrize("name", CASES)
def test_merged_equals_branches_in_eval(name):
    made, x = block(name).eval(), sample(name)
    branches = made.bn3(made.conv3(x)) + made.bn1(made.conv1(x)) * (1 if made.alpha is None else made.alpha)
    if name in ("identity", "groups", "depthwise", "linear"):
        branches = branches + made.bn_identity(x)
    else:
        assert made.bn_identity is None
    conv = made.reparametrize()
    assert conv.kernel_size == (3, 3)
    assert_close(conv(x), branches, FLOAT64)
    activation = CASES[name].get("activation", nn.ReLU())
    expected = branches if activation is None else activation(branches)
    assert_close(made(x), expected, FLOAT64)


@pytest.mark.parametrize("name", CASES)
def test_qat_quantizes_the_merged_kernel(name):
    """The outputs and gradients of rounding written out; the statistics stay."""
    made, twin, x = quantized(name).train(), block(name), sample(name)
    before = {key: value.clone() for key, value in made.state_dict().items() if "running" in key}
    kernel, bias = twin.merged_parameters()
    written = WrittenWeight()(kernel)
    expected = F.conv2d(x, written, bias, twin.stride, 1, groups=twin.groups)
    expected = expected if twin.activation is None else twin.activation(expected)
    y = made(x)
    assert_close(y, expected, FLOAT64_SUMS)
    assert (written - kernel).abs().max() > 1e-4
    assert all(torch.equal(made.state_dict()[key], value) for key, value in before.items())
    y.square().sum().backward()
    expected.square().sum().backward()
    gradients = {key: parameter.grad for key, parameter in twin.named_parameters()}
    for key, parameter in made.named_parameters():
        assert_close(parameter.grad, gradients[key], FLOAT64_SUMS)


@pytest.mark.parametrize("name", CASES)
def test_gradients_by_finite_differences(name):
    """With rounding off, so that differences exist; every branch is reached."""
    made, x = quantized(name).train(), sample(name, batch=1)
    made.weight_fake_quant.disable_fake_quant()
    dy = torch.randn(made(x).shape, dtype=torch.float64)

    def loss():
        return (made(x) * dy).sum()

    loss().backward()
    generator = torch.Generator().manual_seed(3)
    for key, parameter in made.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        step = 1e-6
        with torch.no_grad():
            parameter += step * direction
            above = loss()
            parameter -= 2 * step * direction
            below = loss()
            parameter += step * direction
        slope = (parameter.grad * direction).sum()
        assert slope.abs() > 1e-8, key
        assert_close((above - below) / (2 * step), slope, SUMS, size=0.1, msg=lambda m, k=key: k + m)


def test_shares_its_branches():
    made = block("groups")
    made.qconfig = FLOAT_OUT
    qat = QATRepVGGBlock.from_float(made)
    assert qat.conv3.weight is made.conv3.weight
    assert qat.bn_identity is made.bn_identity
    assert qat.alpha is made.alpha
    assert not qat.bn1.training
    with pytest.raises(TypeError, match="RepVGGBlock"):
        QATRepVGGBlock.from_float(nn.Conv2d(3, 3, 3))
    with pytest.raises(TypeError, match="qconfig"):
        QATRepVGGBlock(3, 3)


@pytest.mark.parametrize("name", ["identity", "depthwise"])
def test_eval_is_close_to_float_and_in_integers_where_the_input_grid_is_known(name):
    source = tritonq.get_qconfig("tensorrt").activation()
    x = source(sample(name).float())
    made = quantized(name, tritonq.get_qconfig("tensorrt")).float()
    made.set_input_quantizer(source)
    for _ in range(3):
        made.train()(x)
    y = made.eval()(x)
    reference = block(name).float().eval()(x)
    assert (y - reference).norm() < 0.05 * reference.norm()
    assert made.integer_layer(*made.folded_parameters()) is not None
    scale = made.activation_post_process.scale
    assert_close(y / scale, (y / scale).round(), LONG_SUMS)


def test_the_bias_is_on_the_grid_of_the_sums_in_training():
    source = tritonq.get_qconfig("tensorrt").activation()
    source(torch.tensor([-2.0, 2.0]))
    made = quantized("identity").float()
    x = source(sample("identity").float())
    plain = copy.deepcopy(made)(x)
    made.set_input_quantizer(source)
    assert (made(x) - plain).abs().max() > 0


def test_prepare_qat_swaps_it():
    torch.manual_seed(0)
    model = nn.Sequential(RepVGGBlock(3, 6, 2), RepVGGBlock(6, 6), nn.Flatten(), nn.Linear(96, 4))
    x = torch.randn(4, 3, 8, 8)
    for _ in range(3):
        model(x)
    qat = tritonq.prepare_qat(model)
    assert [type(m) for m in qat][:2] == [QATRepVGGBlock, QATRepVGGBlock]
    optimizer = torch.optim.SGD(qat.parameters(), lr=0.01)
    first = None
    for _ in range(10):
        loss = F.cross_entropy(qat(x), torch.arange(4))
        first = first if first is not None else float(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < first


def network():
    """Blocks of every kind, found by dataflow; statistics as after training."""
    torch.manual_seed(0)
    model = nn.Sequential(
        RepVGGBlock(3, 8, 2),
        RepVGGBlock(8, 8, groups=2, learned_alpha=True),
        RepVGGBlock(8, 8, activation=nn.SiLU()),
        RepVGGBlock(8, 6, activation=None),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)),
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            randomise(module)
    return model


IMAGES = torch.randn(16, 3, 12, 12, generator=torch.manual_seed(3))


@pytest.mark.parametrize("training", [False, True])
def test_prepare_finds_whole_blocks(training):
    model = network().train(training)
    expected = network().eval()(IMAGES)
    keys = set(model.state_dict())
    qat = tritonq.prepare_qat(model, example_inputs=IMAGES)
    assert [type(block) for block in qat[:4]] == [QATRepVGGBlock] * 4
    assert all(block.input_quantizer is not None for block in qat[:4])
    assert keys <= set(qat.state_dict())
    records = {record.name: record.status for record in qat.tritonq_report if record.kind in ("RepVGGBlock", "Linear")}
    assert records == dict.fromkeys(["0", "1", "2", "3", "6"], "quantized")
    assert not any(record.kind in ("Conv2d", "BatchNorm2d") for record in qat.tritonq_report)
    tritonq.disable_fake_quant(qat)
    assert_close(qat.eval()(IMAGES), expected, SUMS)


@pytest.mark.filterwarnings("ignore:ONNX Runtime convolves in integers")
def test_what_was_trained_is_deployed(tmp_path):
    qat = tritonq.prepare_qat(network(), example_inputs=IMAGES).train()
    optimizer, target = torch.optim.SGD(qat.parameters(), 0.05), torch.randint(5, (16,), generator=torch.manual_seed(4))
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(qat(IMAGES), target))
        losses[-1].backward()
        assert all(parameter.grad is not None for parameter in qat.parameters())
        optimizer.step()
    assert losses[-1] < losses[0]
    qat.eval()
    converted = tritonq.convert(copy.deepcopy(qat))
    assert converted[0].stored_weight.dtype == torch.int8
    assert torch.equal(converted(IMAGES), qat(IMAGES))
    assert tritonq.verify(qat, converted, IMAGES).agrees()
    tritonq.save_converted(converted, tmp_path / "model.pt")
    loaded = tritonq.load_converted(tmp_path / "model.pt", network())
    assert torch.equal(loaded(IMAGES), converted(IMAGES))
    assert isinstance(loaded[2].activation, nn.SiLU)
    program = tritonq.export_program(converted, tmp_path / "model.pt2", IMAGES)
    assert torch.equal(program.module()(IMAGES), converted(IMAGES))
    tritonq.export_onnx(converted, tmp_path / "model.onnx", IMAGES)
    assert tritonq.verify(qat, tmp_path / "model.onnx", IMAGES).agrees(max_fraction=1e-3, max_step=1)


def test_a_block_that_stays_in_float_is_left_alone():
    mapping = tritonq.QConfigMapping().set_global(tritonq.get_qconfig("tensorrt")).set_module_name("1", None)
    qat = tritonq.prepare_qat(network(), qconfig=mapping, example_inputs=IMAGES)
    assert isinstance(qat[1], RepVGGBlock)
    assert isinstance(qat[2], QATRepVGGBlock)


def test_a_file_of_other_blocks_is_refused(tmp_path):
    qat = tritonq.prepare_qat(network(), example_inputs=IMAGES).train()
    qat(IMAGES)
    tritonq.save_converted(tritonq.convert(qat.eval()), tmp_path / "model.pt")
    other = network()
    other[0] = RepVGGBlock(3, 8, 1)
    with pytest.raises(ValueError, match=r"'0' differs: .*stride"):
        tritonq.load_converted(tmp_path / "model.pt", other)
