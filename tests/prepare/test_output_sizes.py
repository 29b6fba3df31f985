"""Transposed convolutions that are called with the size of their result."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tritonq
from prepared_nets import assert_same_when_not_rounding


class Decoder(nn.Module):
    """One step down and up: the size of the skipped tensor is given by position, that of the image by name."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, 2, 1)
        self.deeper = nn.Conv2d(4, 4, 3, 2, 1)
        self.up = nn.ConvTranspose2d(4, 4, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.ConvTranspose2d(4, 2, 3, 2, 1)

    def forward(self, x):
        y = self.down(x)
        z = F.relu(self.norm(self.up(self.deeper(y), y.size()))) + y
        return self.last(z, output_size=[x.shape[2], x.shape[3]])


def images(height, width):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(height))


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    prepared = tritonq.prepare_qat(Decoder(), example_inputs=images(9, 10)).train()
    for size in ((9, 10), (8, 7)):
        prepared(images(*size)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in prepared.parameters())
    return prepared.eval()


@pytest.mark.parametrize("size", [(9, 10), (8, 8), (7, 9), (6, 11)])
def test_every_size_is_that_of_the_float_model(size):
    torch.manual_seed(0)
    model = Decoder()
    prepared = tritonq.prepare_qat(model, example_inputs=images(9, 10))
    assert_same_when_not_rounding(model, prepared, images(*size))


def test_converted_files_and_copies_compute_the_same(trained, tmp_path):
    converted = tritonq.convert(trained)
    for size in ((9, 10), (8, 7), (6, 6)):
        expected = trained(images(*size))
        assert expected.shape[2:] == size
        assert torch.equal(converted(images(*size)), expected)
        assert torch.equal(copy.deepcopy(converted)(images(*size)), expected)
    tritonq.export_onnx(converted, tmp_path / "decoder.onnx", images(8, 7))
    assert tritonq.verify(trained, tmp_path / "decoder.onnx", [images(8, 7)]).agrees()
    program = tritonq.export_program(converted, None, images(8, 7), dynamic_batch=False)
    assert torch.equal(program.module()(images(8, 7)), trained(images(8, 7)))
    assert converted.last.output_padding == (0, 0)


def test_a_size_that_no_padding_gives_is_refused(trained):
    with pytest.raises(ValueError, match="requested an output size"):
        trained.up(torch.zeros(1, 4, 3, 3), output_size=(9, 9))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.up = nn.ConvTranspose2d(4, 4, 3, 2, 1)

    def forward(self, x):
        x = self.first(x)
        return self.up(x, output_size=(11, 11)), self.up(x, output_size=(12, 12))


def test_a_file_holds_one_size_for_a_layer(tmp_path):
    prepared = tritonq.prepare_qat(Twice(), example_inputs=images(6, 6)).train()
    prepared(images(6, 6))
    converted = tritonq.convert(prepared.eval())
    assert [y.shape[-1] for y in converted(images(6, 6))] == [11, 12]
    with pytest.raises(ValueError, match=r"'up' is called with sizes .* output paddings \[\(0, 0\), \(1, 1\)\]"):
        tritonq.export_onnx(converted, tmp_path / "twice.onnx", images(6, 6))
