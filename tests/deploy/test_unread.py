"""`verify` of files that leave out what nothing reads."""

import pytest
import torch
from torch import nn

import tritonq

X = torch.randn(2, 3, 6, 6)


class Dead(nn.Module):
    """Computes what it does not return, and ``head`` twice, once for nothing."""

    def __init__(self, reads=False):
        super().__init__()
        self.first, self.dead, self.behind = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.head, self.last, self.reads = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1), reads

    def forward(self, x):
        x = self.first(x).relu()
        y = self.behind(self.dead(x).relu()) + x
        self.head(y)
        return self.last(self.head(x) + y if self.reads else self.head(x))


def deployed(model, path):
    prepared = tritonq.prepare_qat(model, example_inputs=X).train()
    prepared(X).square().mean().backward()
    converted = tritonq.convert(prepared.eval())
    tritonq.export_onnx(converted, path, X)
    tritonq.export_program(converted, path.with_suffix(".pt2"), X)
    return prepared, converted


@pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
def test_they_are_named_and_all_else_is_compared(suffix, tmp_path):
    prepared, converted = deployed(Dead(), tmp_path / "model.onnx")
    report = tritonq.verify(prepared, tmp_path / f"model{suffix}", [X, torch.randn_like(X)])
    assert report.agrees()
    assert {layer.name for layer in report.layers} >= {"first", "head", "last"}
    assert not {"first", "last"} & set(report.unread)
    assert {"dead", "add"} <= set(report.unread) or suffix == ".pt2"
    if report.unread:
        assert f"nothing reads what they make: {', '.join(report.unread)}" in str(report)
    assert tritonq.verify(prepared, converted, X).unread == ()


def test_a_quantizer_whose_codes_are_read_is_not_left_out(tmp_path):
    read, _ = deployed(Dead(reads=True), tmp_path / "read.onnx")
    deployed(Dead(), tmp_path / "unread.onnx")
    with pytest.raises(ValueError, match=r"lacks the quantizer '(dead|behind|add)|runs 2 times in the trained model"):
        tritonq.verify(read, tmp_path / "unread.onnx", X)
