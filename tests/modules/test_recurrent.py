"""Quantization-aware LSTM, GRU and RNN: torch's results on rounded weights, through training and conversion."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_leaves

import tritonq
from tolerances import TRAINED, assert_close
from tritonq.deploy.recurrent import RECURRENT_TYPES
from tritonq.nn import QATRecurrent
from tritonq.switched_quantizer import SwitchedQuantizer

WIDTH, HIDDEN, TIME, BATCH = 4, 8, 5, 3
LAYERS = {
    "lstm": (nn.LSTM, {}),
    "both directions, two layers": (nn.LSTM, {"bidirectional": True, "num_layers": 2, "dropout": 0.3}),
    "batch first, projections": (nn.LSTM, {"batch_first": True, "proj_size": 3}),
    "gru of three layers": (nn.GRU, {"num_layers": 3, "batch_first": True}),
    "gru without bias": (nn.GRU, {"bias": False, "bidirectional": True}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
}
CELLS = {nn.LSTMCell: {}, nn.GRUCell: {"bias": False}, nn.RNNCell: {"nonlinearity": "relu"}}


def quantized(layer, preset="onnxruntime"):
    layer.qconfig = tritonq.get_qconfig(preset)
    return tritonq.nn.DEFAULT_QAT_MAPPING[type(layer)].from_float(layer)


def switch_off(model, activations_alone=False):
    for name, module in model.named_modules():
        if isinstance(module, SwitchedQuantizer) and not (activations_alone and name.startswith("weight")):
            module.disable_fake_quant()
    return model


def inputs():
    packed = pack_padded_sequence(torch.randn(TIME, BATCH, WIDTH), [5, 2, 4], enforce_sorted=False)
    return {"batch": torch.randn(TIME, BATCH, WIDTH), "unbatched": torch.randn(TIME, WIDTH), "packed": packed}


def tensors(result):
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def test_states_in_a_list_are_those_of_a_tuple():
    layer, x = tritonq.nn.LSTM(3, 4, qconfig=tritonq.get_qconfig()), torch.rand(5, 2, 3)
    layer(x)
    layer.eval()
    states = [torch.rand(1, 2, 4), torch.rand(1, 2, 4)]
    assert torch.equal(layer(x, states)[0], layer(x, tuple(states))[0])
    with pytest.raises(ValueError, match=r"hx of LSTM is \(h_0, c_0\), got 1 of them"):
        layer(x, states[0])


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("case", LAYERS)
def test_without_rounding_it_is_torch_s(case):
    torch.manual_seed(0)
    kind, options = LAYERS[case]
    theirs = kind(WIDTH, HIDDEN, **options)
    ours = switch_off(quantized(theirs))
    for x in inputs().values():
        results = []
        for layer in (theirs, ours):
            torch.manual_seed(1)  # the dropout between layers
            first = layer(x)
            results.append((first, layer(x, first[1])))
        for found, expected in zip(tensors(results[1]), tensors(results[0]), strict=True):
            assert torch.equal(found, expected)
    assert set(theirs.state_dict()) < set(ours.state_dict())


@pytest.mark.parametrize("kind", CELLS)
def test_a_cell_without_rounding_is_torch_s(kind):
    torch.manual_seed(0)
    theirs = kind(WIDTH, HIDDEN, **CELLS[kind])
    ours = switch_off(quantized(theirs))
    for x in (torch.randn(BATCH, WIDTH), torch.randn(WIDTH)):
        found, expected = ours(x, ours(x)), theirs(x, theirs(x))
        assert all(map(torch.equal, tensors(found), tensors(expected)))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_weights_are_rounded_and_gradients_pass_straight_through(kind):
    torch.manual_seed(0)
    ours = switch_off(quantized(kind(WIDTH, HIDDEN)), activations_alone=True)
    x = torch.randn(TIME, BATCH, WIDTH)
    ours(x)[0].square().sum().backward()
    theirs = kind(WIDTH, HIDDEN)
    for name, parameter in theirs.named_parameters():
        value = getattr(ours, name).detach()
        if name.startswith("weight"):
            scale = value.abs().amax(1, keepdim=True) / 127
            value = (value / scale).round() * scale
        parameter.data.copy_(value)
    theirs(x)[0].square().sum().backward()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(getattr(ours, name).grad, parameter.grad)


def test_each_layer_reads_and_the_last_returns_values_on_a_grid():
    torch.manual_seed(0)
    lstm = quantized(nn.LSTM(WIDTH, HIDDEN, num_layers=2))
    read = []
    run = lstm.run_layer
    lstm.run_layer = lambda x, *rest: (read.append(x), run(x, *rest))[1]
    y, _ = lstm(torch.randn(TIME, BATCH, WIDTH))
    for tensor, quantizer in ((read[1], lstm.layer_fake_quant_0), (y, lstm.activation_post_process)):
        codes = tensor / quantizer.scale + quantizer.zero_point
        assert_close(codes, codes.round(), TRAINED)
        assert len(codes.round().unique()) > 20


class Tagger(nn.Module):
    """Words to a class each, or, from the last state, to one class."""

    def __init__(self, kind, *, last=False, **options):
        super().__init__()
        self.embed, self.rnn, self.last = nn.Embedding(20, WIDTH), kind(WIDTH, HIDDEN, **options), last
        self.head = nn.Linear(HIDDEN * (2 if options.get("bidirectional") else 1), 3)

    def forward(self, words):
        y, states = self.rnn(self.embed(words))
        last = states[0] if isinstance(states, tuple) else states
        return self.head(last[-1] if self.last else y)


class Loop(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell, self.head = kind(WIDTH, HIDDEN), nn.Linear(HIDDEN, 3)

    def forward(self, x):
        state, found = None, []
        for step in x:
            state = self.cell(step, state)
            found.append(state[0] if isinstance(state, tuple) else state)
        return self.head(torch.stack(found))


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.rnn, self.head = nn.Linear(WIDTH, WIDTH), nn.GRU(WIDTH, HIDDEN), nn.Linear(HIDDEN, 3)

    def forward(self, x, lengths):
        y, _ = self.rnn(pack_padded_sequence(self.embed(x), lengths, enforce_sorted=False))
        assert isinstance(y, PackedSequence)
        return self.head(pad_packed_sequence(y)[0])


WORDS = torch.arange(TIME * BATCH).view(TIME, BATCH)
MODELS = {
    "lstm": (lambda: Tagger(nn.LSTM, num_layers=2, bidirectional=True), (WORDS,)),
    "last state": (lambda: Tagger(nn.LSTM, last=True), (WORDS,)),
    "batch first": (lambda: Tagger(nn.GRU, batch_first=True), (WORDS,)),
    "no bias": (lambda: Tagger(nn.GRU, bias=False, bidirectional=True), (WORDS,)),
    "relu": (lambda: Tagger(nn.RNN, nonlinearity="relu"), (WORDS,)),
    "LSTM's cell": (lambda: Loop(nn.LSTMCell), (torch.randn(TIME, BATCH, WIDTH),)),
    "GRU's cell": (lambda: Loop(nn.GRUCell), (torch.randn(TIME, BATCH, WIDTH),)),
    "RNN's cell": (lambda: Loop(nn.RNNCell), (torch.randn(TIME, BATCH, WIDTH),)),
    "packed": (Packed, (torch.randn(TIME, BATCH, WIDTH), torch.tensor([5, 2, 4]))),
}
WITHOUT_FILE = {"LSTM's cell": "single LSTMCell", "GRU's cell": "single GRUCell", "RNN's cell": "single RNNCell"}
WITHOUT_FILE |= {"packed": "packed sequences"}


def trained(model, data, **options):
    qat = tritonq.prepare_qat(model, example_inputs=data, strict=True, **options)
    optimizer = torch.optim.SGD(qat.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        qat.train()(*data).square().sum().backward()
        optimizer.step()
    return qat.eval()


@pytest.fixture(scope="module", params=MODELS)
def trained_model(request):
    torch.manual_seed(0)
    make, data = MODELS[request.param]
    model = make()
    return request.param, model, trained(model, data), data


def test_it_is_found_trained_converted_and_saved(trained_model, tmp_path):
    _, model, qat, data = trained_model
    layer = next(module for module in qat.modules() if isinstance(module, QATRecurrent))
    assert all(parameter.grad.any() for name, parameter in layer.named_parameters() if name.startswith("weight"))
    integers = tritonq.convert(qat)
    deployed = next(module for module in integers.modules() if isinstance(module, tuple(RECURRENT_TYPES.values())))
    weights = [name for name in deployed.state_dict() if name.startswith("weight") and name in layer.state_dict()]
    assert len(weights) >= 2
    assert all(deployed.state_dict()[name].dtype == torch.int8 for name in weights)
    expected = qat(*data)
    assert torch.equal(integers(*data), expected)
    assert tritonq.verify(qat, integers, [data]).agrees()
    tritonq.save_converted(integers, tmp_path / "model.pt")
    loaded = tritonq.load_converted(tmp_path / "model.pt", copy.deepcopy(model))
    assert torch.equal(loaded(*data), expected)
    row = next(row for row in tritonq.summary(qat).quantized if row.kind.startswith(("LSTM", "GRU", "RNN")))
    assert row.grid.startswith("w -127..127 per channel")


@pytest.mark.filterwarnings("ignore::UserWarning")  # what TensorRT runs in float
def test_onnx_runtime_agrees_or_one_line_says_why_not(trained_model, tmp_path):
    name, _, qat, data = trained_model
    path = tmp_path / "model.onnx"
    # Weights and quantizers are those of the target, in one model as in another.
    for target in ("onnxruntime", "tensorrt", "qdq") if name == "lstm" else ("onnxruntime",):
        if name in WITHOUT_FILE:
            with pytest.raises(ValueError, match=WITHOUT_FILE[name]):
                tritonq.export_onnx(qat, path, data, target=target)
            continue
        tritonq.export_onnx(qat, path, data, target=target)
        report = tritonq.verify(qat, path, [data, (WORDS[:4],)])
        assert report.agrees()
        assert any(layer.island and layer.island[0] in ("LSTM", "GRU", "RNN") for layer in report.layers)


def test_a_file_holds_integer_weights(tmp_path):
    import onnx

    torch.manual_seed(0)
    qat = trained(Tagger(nn.LSTM), (WORDS,))
    tritonq.export_onnx(qat, tmp_path / "model.onnx", WORDS)
    found = onnx.load(tmp_path / "model.onnx").graph.initializer
    shapes = [tuple(each.dims) for each in found if each.data_type == onnx.TensorProto.INT8]
    assert {(4 * HIDDEN, WIDTH), (4 * HIDDEN, HIDDEN)} <= set(shapes)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_projections_have_no_file_and_say_so(tmp_path):
    x = torch.randn(TIME, BATCH, WIDTH)
    qat = tritonq.prepare_qat(nn.Sequential(nn.LSTM(WIDTH, HIDDEN, proj_size=3)), example_inputs=x)
    qat.train()(x)
    with pytest.raises(ValueError, match="'0': ONNX has no operator for an LSTM with projections"):
        tritonq.export_onnx(qat.eval(), tmp_path / "model.onnx", x)


@pytest.mark.parametrize("preset", ["w4_g32", "fp8_e4m3", "lsq_w4a8", "twn_w2a8", "a16w8"])
def test_presets_convert_with_equal_bits(preset):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.LSTM(32, 32))
    x = torch.randn(TIME, BATCH, 32)
    qat = tritonq.prepare_qat(model, example_inputs=x, qconfig=tritonq.get_qconfig(preset))
    qat.train()(x)
    assert all(map(torch.equal, tensors(tritonq.convert(qat.eval())(x)), tensors(qat(x))))


@pytest.mark.parametrize("norm", [weight_norm, parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_computed_weights_stay_in_float_and_are_told(norm):
    model = Tagger(nn.LSTM)
    model.rnn = norm(model.rnn, "weight_hh_l0")
    with pytest.warns(UserWarning, match="rnn: something computes its weights"):
        qat = tritonq.prepare_qat(model, example_inputs=WORDS)
    assert not any(isinstance(module, QATRecurrent) for module in qat.modules())


def test_a_group_that_divides_no_row_is_refused():
    layer = nn.GRU(WIDTH, HIDDEN)
    with pytest.raises(ValueError, match="weight_ih_l0 of GRU with rows of 4 can't have groups of 32"):
        quantized(layer, "w4_g32")


def test_the_eager_flow_swaps_it():
    torch.manual_seed(0)

    class Eager(nn.Module):
        def __init__(self):
            super().__init__()
            self.quant, self.rnn, self.dequant = tritonq.QuantStub(), nn.LSTM(WIDTH, HIDDEN), tritonq.DeQuantStub()

        def forward(self, x):
            return self.dequant(self.rnn(self.quant(x))[0])

    model = Eager().train()
    model.qconfig = tritonq.get_qconfig()
    qat, x = tritonq.prepare_qat(model), torch.randn(TIME, BATCH, WIDTH)
    qat(x)
    assert isinstance(qat.rnn, tritonq.nn.LSTM)
    assert torch.equal(tritonq.convert(qat.eval())(x), qat(x))
