"""Layers behind operations that move values, and modules called several times, run in integers in ONNX Runtime."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonq
from optimised_graph import optimised_kinds
from qat_models import after_one_batch


def exported(net, folder):
    """The kinds of nodes of a trained model's file, after every code in it was compared."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 12, 12)
    qat = tritonq.prepare_qat(net, example_inputs=x[:2], strict=True).train()
    qat(x).square().mean().backward()
    int8 = tritonq.convert(qat.eval())
    tritonq.export_onnx(int8, folder / "model.onnx", x[:2])
    assert tritonq.verify(qat, int8, x).total.differing == 0
    assert tritonq.verify(qat, folder / "model.onnx", x).total.differing == 0
    return optimised_kinds(folder / "model.onnx")


def shuffle(x):
    return x.view(x.shape[0], 2, -1, *x.shape[2:]).transpose(1, 2).reshape(x.shape)


# Each takes 8 channels and returns as many as are given.
MOVES = [
    [
        (lambda x: x.chunk(2, 1)[0], 4),
        (lambda x: x.split([3, 5], 1)[1], 5),
        (lambda x: x[:, [0, 2, 7]], 3),
        (shuffle, 8),
        (lambda x: x.roll((1, 2), (2, 3)), 8),
        (lambda x: x.repeat(1, 2, 1, 1), 16),
        (lambda x: torch.stack([x, x], 2).flatten(1, 2), 16),
        (lambda x: x.index_select(1, torch.tensor([1, 3, 5])), 3),
        (lambda x: x.transpose(2, 3).flip(2), 8),
    ],
    [
        (nn.Upsample(scale_factor=2), 8),
        (nn.MaxPool2d(3, 2, 1), 8),
        (nn.PixelUnshuffle(2), 32),
        (nn.PixelShuffle(2), 2),
        (nn.ReflectionPad2d(1), 8),
        (lambda x: F.pad(x, (1, 1, 1, 1), mode="replicate"), 8),
        (lambda x: F.pad(x, (1, 0, 0, 1)), 8),
        (lambda x: x.amax(2, keepdim=True).expand(-1, -1, 9, -1), 8),
    ],
]


class Chain(nn.Module):
    def __init__(self, moves):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.layers = nn.ModuleList([nn.Conv2d(channels, 8, 1) for _, channels in moves])
        self.moves = [move for move, _ in moves]

    def forward(self, x):
        x = F.relu(self.first(x))
        for move, layer in zip(self.moves, self.layers, strict=True):
            x = F.relu(layer(move(x)))
        return x


@pytest.mark.parametrize("moves", MOVES)
def test_layers_behind_moves_see_codes(moves, tmp_path):
    kinds = exported(Chain(moves), tmp_path)
    assert (kinds["QLinearConv"], kinds["Conv"] + kinds["FusedConv"]) == (1 + len(moves), 0)


class Calls(nn.Module):
    """A module called twice on one grid, a convolution read raw and through its ReLU, a ReLU in a loop with a test."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.twice, self.head = (nn.Conv2d(c, 8, 1) for c in (3, 8, 8, 8))

    def forward(self, x):
        for layer in (self.a, self.b):
            x = layer(x)
            if x.shape[1] == 8:
                x = F.relu(x)
        x = self.twice(x) + self.twice(F.max_pool2d(x, 3, 1, 1))
        return self.head(F.relu(x) + x)


def test_modules_called_twice_and_relus_that_stay_cost_no_float_island(tmp_path):
    kinds = exported(Calls(), tmp_path)
    assert (kinds["QLinearConv"], kinds["QLinearAdd"]) == (5, 2)
    assert kinds["Conv"] + kinds["FusedConv"] + kinds["Relu"] == 0


class TwoGrids(nn.Module):
    """A convolution that reads its own result, and a head that levels of a pyramid share."""

    def __init__(self):
        super().__init__()
        self.first, self.twice, self.down, self.head = (nn.Conv2d(c, 8, 1) for c in (3, 8, 8, 8))

    def forward(self, x):
        x = self.twice(self.twice(self.first(x)))
        levels = [x, F.relu(self.down(F.max_pool2d(x, 2)))]
        return torch.cat([F.relu(self.head(level)).flatten(2) for level in levels], 2)


def test_a_module_called_on_two_grids_takes_both_to_one(tmp_path):
    kinds = exported(TwoGrids(), tmp_path)
    assert (kinds["QLinearConv"], kinds["Conv"] + kinds["FusedConv"]) == (6, 0)


def test_for_tensorrt_each_call_keeps_its_grid():
    """There biases are floats, which lie on no grid of sums."""
    qat = tritonq.prepare_qat(
        TwoGrids(), qconfig=tritonq.get_qconfig("tensorrt"), example_inputs=torch.randn(2, 3, 8, 8)
    )
    assert [name for name, _ in qat.named_modules() if name.endswith("input_fake_quant")] == ["first.input_fake_quant"]


def test_products_of_more_axes_are_those_of_two(tmp_path):
    """With a MatMul and an addition sums would be rounded twice more in float."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)), torch.randn(64, 2, 5, 8)
    qat = after_one_batch(net, x)
    tritonq.export_onnx(qat, tmp_path / "model.onnx", x[:2])
    assert tritonq.verify(qat, tmp_path / "model.onnx", [x, x[:1]]).total.differing == 0
    kinds = optimised_kinds(tmp_path / "model.onnx")
    assert (kinds["QGemm"], kinds["MatMul"] + kinds["MatMulIntegerToFloat"] + kinds["Add"]) == (2, 0)


class Windows(nn.Module):
    """Pools in a forward that keeps its branches, one with a window that follows the size of the input."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        if x.shape[-1] > 100:
            return self.first(x)
        x = F.avg_pool2d(F.relu(self.first(x)), 3, 1, padding=1, count_include_pad=False)
        return self.last(F.avg_pool2d(x, x.shape[-1] // 4))


def test_windows_in_a_forward_that_keeps_its_branches_add_codes(tmp_path):
    kinds = exported(Windows(), tmp_path)
    assert (kinds["QLinearConv"], kinds["AveragePool"], kinds["Round"]) == (2, 2, 4)


def test_other_windows_than_recorded_are_means_in_float():
    qat = after_one_batch(Windows(), torch.randn(2, 3, 12, 12))
    larger = torch.randn(2, 3, 16, 16)
    with pytest.warns(UserWarning, match=r"Windows .* with other arguments \(avg_pool2d"):
        result = qat(larger)
    assert result.shape == Windows()(larger).shape == (2, 8, 4, 4)


def test_a_convolution_left_in_float_stays_in_float(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 4, 1))
    mapping = tritonq.QConfigMapping().set_global(tritonq.get_qconfig("onnxruntime")).set_module_name("1", None)
    x = torch.randn(2, 3, 8, 8)
    qat = after_one_batch(net, x, qconfig=mapping)
    tritonq.export_onnx(qat, tmp_path / "model.onnx", x)
    kinds = optimised_kinds(tmp_path / "model.onnx")
    assert (kinds["QLinearConv"], kinds["Conv"] + kinds["FusedConv"]) == (2, 1)


class Stacks(nn.Module):
    """Stacks of tensors on different grids, one of them in a forward that keeps its branches."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.both, self.last = (nn.Conv2d(c, 8, 1) for c in (3, 8, 16, 8))

    def forward(self, x):
        if x.shape[1] != 3:
            return x
        x = F.relu(self.first(x))
        y = self.both(torch.stack([x, self.second(x)], dim=2).flatten(1, 2))
        return self.last(torch.stack((x, y, self.second(y)), -1).mean(-1))


def test_stacks_are_concatenations(tmp_path):
    kinds = exported(Stacks(), tmp_path)
    x = torch.randn(2, 3, 12, 12)
    int8 = tritonq.convert(after_one_batch(Stacks(), x))
    tritonq.save_converted(int8, tmp_path / "model.pt")
    assert torch.equal(tritonq.load_converted(tmp_path / "model.pt", Stacks())(x), int8(x))
    assert (kinds["QLinearConv"], kinds["QLinearConcat"]) == (5, 2)
    assert kinds["Conv"] + kinds["FusedConv"] + kinds["Concat"] == 0


class NamedStacks(nn.Module):
    """torch's further functions that concatenate, of tensors with enough axes and with fewer."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(16, 4)

    def forward(self, x):
        x, y = F.relu(self.first(x)), self.second(x)
        deep = torch.dstack((x, y)).transpose(1, 2).flatten(0, 1)
        return self.last(torch.hstack([torch.vstack([x, y]), torch.column_stack([deep.mean(1), deep])[:, :8]]))


def test_named_stacks_are_concatenations(tmp_path):
    x = torch.randn(5, 6)
    qat = tritonq.prepare_qat(NamedStacks(), example_inputs=x).train()
    found = {row.kind: row.status for row in tritonq.summary(qat).layers}
    assert {found[name] for name in ("hstack", "vstack", "dstack", "column_stack")} == {"quantized"}
    tritonq.prepare.disable_fake_quant(qat)
    assert torch.allclose(qat(x), NamedStacks.forward(qat, x))
    tritonq.prepare.enable_fake_quant(qat)
    qat(x)
    int8, path = tritonq.convert(qat.eval()), tmp_path / "model.onnx"
    tritonq.save_converted(int8, tmp_path / "model.pt")
    assert torch.equal(tritonq.load_converted(tmp_path / "model.pt", NamedStacks())(x), int8(x))
    tritonq.export_onnx(int8, path, x)
    assert tritonq.verify(qat, int8, x).total.differing == 0
    assert tritonq.verify(qat, path, x).total.differing == 0


class Centred(nn.Module):
    """Differences whose second operand is a mean, a function, a clip of a layer, and a module of each kind."""

    def __init__(self):
        super().__init__()
        self.pool, self.act = nn.AvgPool2d(3, 1, 1), nn.SiLU()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = F.relu(self.first(x))
        x = x - x.mean((2, 3), keepdim=True)
        x = x - torch.sigmoid(x)
        x = (x - self.pool(x)) - self.act(x)
        return self.last(x - self.second(x).clamp(-0.5, 0.5))


def test_subtrahends_that_means_functions_and_clips_make_are_codes(tmp_path):
    kinds = exported(Centred(), tmp_path)
    assert (kinds["QLinearAdd"], kinds["Sub"], kinds["QLinearConv"]) == (5, 0, 3)


class Tokens(nn.Module):
    """Patches with a class token before them, which no quantizer makes, and one that is normalised in float behind."""

    def __init__(self):
        super().__init__()
        self.patches, self.token, self.last = nn.Conv2d(3, 8, 3), nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 4)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        more = F.layer_norm(x[:, :1], (8,))
        return self.last(torch.cat([self.token.expand(x.shape[0], -1, -1), x, more * self.token], 1))


def test_parts_that_no_quantizer_made_are_concatenated_as_codes(tmp_path):
    kinds = exported(Tokens(), tmp_path)
    assert (kinds["QLinearConcat"], kinds["QGemm"]) == (1, 1)
