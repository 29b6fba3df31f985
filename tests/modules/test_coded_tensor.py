"""Tensors that hold codes are the float tensors they stand for, whatever is done to them."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonq
from tritonq.functional.coded_tensor import CodedTensor, coded_like
from tritonq.functional.host_grid import HostGrid

GRID = HostGrid(0.25, 5, 255, True)


def coded(shape=(2, 4, 6, 6), channels_last=False, grid=GRID):
    """A tensor of random codes, and the same as an ordinary one; the codes lie in channels_last."""
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    values = (codes.float() - grid.zero) * grid.scale
    if len(shape) == 4:
        codes = codes.contiguous(memory_format=torch.channels_last)
        if channels_last:
            values = values.contiguous(memory_format=torch.channels_last)
    return coded_like(codes, values, grid), values


# Whether the result is still held as codes.
OPERATORS = {
    "view": (lambda x: x.view(2, -1), True),
    "flatten": (lambda x: x.flatten(1), True),
    "reshape": (lambda x: x.transpose(1, 2).reshape(2, -1), True),
    "permute": (lambda x: x.permute(0, 2, 3, 1), True),
    "slice": (lambda x: x[:, 1:3, ::2], True),
    "select": (lambda x: x[0, :, None], True),
    "index": (lambda x: x[:, torch.tensor([2, 0])], True),
    "chunk": (lambda x: x.chunk(2, 1)[1], True),
    "split of a view": (lambda x: x.permute(0, 2, 3, 1).split([1, 5], 1)[1], True),
    "expand": (lambda x: x[:, :1].expand(-1, 3, -1, -1), True),
    "view of an expanded one": (lambda x: x[:, :1, None].expand(-1, 1, 3, -1, -1).flatten(1, 2), True),
    "unbind": (lambda x: x.unbind(1)[3], True),
    "channel shuffle": (lambda x: x.view(2, 2, 2, 6, 6).transpose(1, 2).contiguous().view(2, 4, 6, 6), True),
    "cat": (lambda x: torch.cat([x, x[:, :2]], 1), True),
    "stack": (lambda x: torch.stack([x, x]), None),
    "clone": (lambda x: x.clone(), True),
    "contiguous": (lambda x: x.permute(0, 2, 3, 1).contiguous(), True),
    "detach": (lambda x: x.detach(), True),
    "relu": (F.relu, True),
    "dropout": (lambda x: F.dropout(x, 0.5, training=False), True),
    "roll": (lambda x: x.roll(1, 2), True),
    "flip": (lambda x: x.flip(3), True),
    "pixel shuffle": (lambda x: F.pixel_shuffle(x, 2), None),
    "upsample": (lambda x: F.interpolate(x, scale_factor=2, mode="nearest"), True),
    "max pool": (lambda x: F.max_pool2d(x, 3, 2, 1), True),
    "max pool, odd": (lambda x: F.max_pool2d(x, (2, 3), (3, 2), (1, 0), ceil_mode=True), True),
    "max pool, dilated": (lambda x: F.max_pool2d(x, 2, 1, 0, (2, 3)), True),
    "max pool with an empty stride": (lambda x: F.max_pool2d(x, 2, ()), True),
    "max pool with indices": (lambda x: F.max_pool2d(x, 2, return_indices=True)[1], False),
    "relu6": (F.relu6, False),
    "mean": (lambda x: x.mean((2, 3)), False),
    "sum of two": (lambda x: x + x, False),
    "linear": (lambda x: F.linear(x, torch.ones(3, 6)), False),
    "sigmoid": (torch.sigmoid, False),
    "double": (lambda x: x.double(), False),
    "pad": (lambda x: F.pad(x, (1, 1)), None),
    "as_strided": (lambda x: x.as_strided((2, 2), (144, 1)), False),
    "where": (lambda x: torch.where(x > 0, x, 0.0), False),
}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_give_what_they_give_on_values(name, channels_last):
    torch.manual_seed(0)
    operator, stays = OPERATORS[name]
    x, values = coded(channels_last=channels_last)
    try:
        expected = operator(values)
    except RuntimeError:  # a view that these strides don't allow
        with pytest.raises(RuntimeError, match="view size"):
            operator(x)
        return
    found = operator(x)
    assert (stays is None) or (type(found) is CodedTensor) is stays
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    if name in ("view", "permute", "slice", "select", "max pool", "cat", "contiguous"):
        assert found.stride() == expected.stride()


# Each changes its argument.
WRITES = {
    "add_": lambda x: x.add_(1),
    "index": lambda x: x.__setitem__((0, 1), 7.0),
    "relu_": lambda x: F.relu(x, inplace=True),
    "through a view": lambda x: x[:, 1].mul_(3),
    "through a view of a view": lambda x: x.permute(0, 2, 3, 1)[0].unbind(0)[2].zero_(),
    "out": lambda x: torch.add(torch.ones(x.shape), 1, out=x),
    "numpy": lambda x: x.numpy().__setitem__(0, 3.0),
    "as_strided": lambda x: x.as_strided((2, 2), (144, 1)).fill_(9),
    "data": lambda x: x.data.fill_(2),
}


@pytest.mark.parametrize("when", ["fresh", "after a read"])
@pytest.mark.parametrize("name", WRITES)
def test_writes_reach_the_tensor_and_its_views(name, when):
    torch.manual_seed(0)
    x, values = coded()
    view, expected_view = x.transpose(1, 2)[1:], values.transpose(1, 2)[1:]
    if when == "after a read":
        assert torch.equal(x + 0, values)
    WRITES[name](x)
    WRITES[name](values)
    assert torch.equal(x + 0, values)
    assert torch.equal(view + 0, expected_view)
    assert torch.equal(F.max_pool2d(x, 2), F.max_pool2d(values, 2))
    assert torch.equal(torch.cat([x, x]), torch.cat([values, values]))


@pytest.mark.parametrize("sizes", [(2, 2, 2), (3, 2, -1), (7,), (2, 0), (2, 1, 0, 0), (0,), ((2, 2, 2),)], ids=str)
def test_sizes_of_pools_that_torch_refuses(sizes):
    x, values = coded()
    for tensor in (x, values):
        with pytest.raises(RuntimeError):
            F.max_pool2d(tensor, *sizes)


def test_a_write_to_a_view_after_its_tensor_was_read():
    x, values = coded()
    view = x[0]
    assert torch.equal(x + 0, values)
    view.add_(1)
    values[0].add_(1)
    assert torch.equal(x + 0, values)


def test_in_place_operators_return_their_argument():
    x, _ = coded()
    assert x.add_(1) is x


def test_its_memory_can_be_read():
    x, values = coded()
    assert np.array_equal(np.asarray(x), values.numpy())
    assert x.tolist() == values.tolist()
    assert float(x[0, 0, 0, 0]) == float(values[0, 0, 0, 0])
    assert torch.equal(torch.from_dlpack(x), values)
    assert "CodedTensor" not in repr(x)
    for twin in (copy.deepcopy(x), pickle.loads(pickle.dumps(x))):
        assert type(twin) is torch.Tensor
        assert torch.equal(twin, values)
    file = io.BytesIO()
    torch.save(x, file)
    assert torch.equal(torch.load(io.BytesIO(file.getvalue())), values)


def test_gradients_pass_to_what_follows():
    x, values = coded()
    weight = torch.ones(6, 6, requires_grad=True)
    (x @ weight).square().sum().backward()
    expected = weight.grad
    weight.grad = None
    (values @ weight).square().sum().backward()
    assert torch.equal(expected, weight.grad)


class Net(nn.Module):
    """Layers with user code between them, and outputs in a dict."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.second = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8))
        self.fc = nn.Linear(8 * 16, 5)

    def forward(self, x):
        x = self.pool(self.first(x))
        a, b = x.chunk(2, 1)
        y = self.second(torch.cat([b, a], 1))
        return {"features": y, "scores": self.fc(y.view(len(y), -1))}


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(0)
    model = tritonq.prepare_qat(Net(), example_inputs=torch.randn(2, 3, 8, 8)).train()
    model(torch.randn(8, 3, 8, 8))
    return model.eval(), tritonq.convert(model)


def seen_between(model, x):
    """The type of each layer's output during a call of ``model``, and what the call returns."""
    types, handles = [], []
    for name in ("first", "pool", "second"):
        hook = lambda module, args, result: types.append(type(result))  # noqa: E731
        handles.append(model.get_submodule(name).register_forward_hook(hook))
    with torch.no_grad():
        result = model(x)
    for handle in handles:
        handle.remove()
    return types, result


def test_a_converted_model_carries_codes_between_its_layers(models, tmp_path):
    model, converted = models
    tritonq.save_converted(converted, tmp_path / "net.pt")
    loaded = tritonq.load_converted(tmp_path / "net.pt", Net())
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
    for deployed in (converted, copy.deepcopy(converted), pickle.loads(pickle.dumps(converted)), loaded):
        types, found = seen_between(deployed, x)
        assert set(types) == {CodedTensor}
        for name, value in expected.items():
            assert type(found[name]) is torch.Tensor
            assert torch.equal(found[name], value)


def test_parts_of_a_converted_model_give_ordinary_tensors(models):
    _, converted = models
    x = torch.randn(2, 3, 8, 8)
    assert type(converted.first(x)) is torch.Tensor
    with pytest.raises(RuntimeError):
        converted(torch.randn(2, 4, 8, 8))  # an error inside closes the call
    assert type(converted.first(x)) is torch.Tensor


def test_nan_in_the_input_stays_nan(models):
    model, converted = models
    x = torch.randn(2, 3, 8, 8)
    x[0, 0, 0, 0] = torch.nan
    with torch.no_grad():
        expected, found = model(x)["scores"], converted(x)["scores"]
    assert torch.equal(expected.isnan(), found.isnan())
    assert torch.equal(expected[1], found[1])


def test_conversion_in_inference_mode_packs_once(models, monkeypatch):
    model, _ = models
    with torch.inference_mode():
        converted = tritonq.convert(model)
        x = torch.randn(2, 3, 8, 8)
        expected = converted(x)["scores"]
        monkeypatch.setattr("tritonq.deploy.modules.pack", lambda *args: pytest.fail("a weight was packed again"))
        assert torch.equal(converted(x)["scores"], expected)
