"""Names of an ONNX file's outputs, and inputs whose height and width are open."""

import pytest
import torch
from torch import nn

import tritonq
from qat_models import after_one_batch
from tritonq.deploy.outputs import output_name

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def trained(model, inputs=(X,)):
    torch.manual_seed(0)
    return tritonq.convert(after_one_batch(model, *inputs))


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        y = self.conv(x)
        return {"boxes": y, "scores": [y.mean((2, 3)), y.amax((2, 3))], "x": y.sum(1)}


def test_outputs_are_called_as_the_model_calls_them(tmp_path):
    model, path = trained(Heads()), tmp_path / "m.onnx"
    tritonq.export_onnx(model, path, X)
    # An output and an input can't share a name.
    assert [value.name for value in onnx.load(path).graph.output] == ["boxes", "scores_0", "scores_1", "output_x"]
    assert tritonq.verify(model, path, X).agrees()
    tritonq.export_onnx(model, path, X, output_names=["a", "b", "c", "d"])
    assert [value.name for value in onnx.load(path).graph.output] == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("path", "name"), [((), "output"), ((1,), "output_1"), (("a-b", 0), "a_b_0"), (("aux", "out"), "aux_out")]
)
def test_output_names(path, name):
    assert output_name(path) == name


def test_open_sizes(tmp_path):
    middle = (nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.SiLU(), nn.Upsample(scale_factor=2))
    model = trained(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), *middle, nn.Conv2d(8, 4, 1)))
    path = tmp_path / "m.onnx"
    tritonq.export_onnx(model, path, X, dynamic_sizes=True)
    shape = onnx.load(path).graph.input[0].type.tensor_type.shape
    assert [dim.dim_param or dim.dim_value for dim in shape.dim] == ["batch", 3, "height", "width"]
    for sizes in ((1, 3, 24, 40), (2, 3, 16, 16)):
        assert tritonq.verify(model, path, torch.randn(sizes)).agrees()
    tritonq.export_onnx(model, path, X, dynamic_sizes=True, dynamic_batch=False)
    shape = onnx.load(path).graph.input[0].type.tensor_type.shape
    assert [dim.dim_value for dim in shape.dim] == [2, 3, 0, 0]


class Several(nn.Module):
    """An image, a second one of another size, and a signal."""

    def __init__(self):
        super().__init__()
        self.image, self.signal = nn.Conv2d(3, 4, 1), nn.Conv1d(2, 4, 1)

    def forward(self, x, y, z):
        return self.image(x), self.image(y)[:, :, ::2], self.signal(z)


def test_open_sizes_have_names(tmp_path):
    inputs = torch.randn(2, 3, 8, 9), torch.randn(2, 3, 10, 11), torch.randn(2, 2, 20)
    model = trained(Several(), inputs)
    tritonq.export_onnx(model, tmp_path / "m.onnx", inputs, dynamic_sizes=True)
    graph = onnx.load(tmp_path / "m.onnx").graph
    shapes = [
        [dim.dim_param for dim in value.type.tensor_type.shape.dim if dim.dim_param]
        for value in (*graph.input, *graph.output)
    ]
    assert shapes[:3] == [["batch", "height", "width"], ["batch", "y_height", "y_width"], ["batch", "length"]]
    assert shapes[3] == ["batch", "height", "width"]
    assert "y_height" in shapes[4][1]


def test_sizes_that_are_fixed_are_told(tmp_path):
    model = trained(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(2 * 14 * 14, 3)))
    with pytest.raises(ValueError, match=r"Sequential runs on the sizes of example_inputs alone .*dynamic_sizes=False"):
        tritonq.export_onnx(model, tmp_path / "m.onnx", X, dynamic_sizes=True)
    assert not list(tmp_path.iterdir())


class FixesTheBatch(nn.Module):
    """A forward that reads the batch as a number."""

    def __init__(self):
        super().__init__()
        self.conv, self.token = nn.Conv2d(3, 4, 1), nn.Parameter(torch.zeros(1, 4, 1))

    def forward(self, x):
        return torch.cat([self.conv(x).flatten(2), self.token.expand(len(x), -1, -1)], 2)


def test_a_forward_that_fixes_the_batch_is_told(tmp_path):
    model = after_one_batch(FixesTheBatch(), X)
    with pytest.warns(
        UserWarning, match=f"FixesTheBatch fixes the batch, and the file takes batches of {len(X)} alone"
    ):
        tritonq.export_onnx(model, tmp_path / "model.onnx", X)
    tritonq.export_onnx(model, tmp_path / "model.onnx", X, dynamic_batch=False)
    with pytest.warns(UserWarning, match="FixesTheBatch fixes the batch"):
        tritonq.deploy.export_encodings(model, tmp_path / "model.onnx", X, dynamic_batch=True)


class WithTable(nn.Module):
    """Reads an image for each of the batch, and a table with two rows for all."""

    def __init__(self):
        super().__init__()
        self.image, self.table = nn.Linear(3, 4), nn.Linear(5, 4)

    def forward(self, x, table):
        return self.image(x) + self.table(table).sum(0, keepdim=True)


def test_an_axis_of_size_2_is_no_batch_beside_a_batch_of_one(tmp_path):
    inputs = torch.randn(1, 3), torch.randn(2, 5)
    model = trained(WithTable(), inputs)
    tritonq.export_onnx(model, tmp_path / "m.onnx", inputs)
    shapes = [value.type.tensor_type.shape.dim for value in onnx.load(tmp_path / "m.onnx").graph.input]
    assert [[dim.dim_param or dim.dim_value for dim in shape] for shape in shapes] == [["batch", 3], [2, 5]]
    more = torch.randn(3, 3), inputs[1]
    assert tritonq.verify(model, tmp_path / "m.onnx", [more]).agrees()
    assert tritonq.verify(model, tritonq.deploy.export_program(model, None, inputs), [more]).agrees()
