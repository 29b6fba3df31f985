"""The accuracy benchmark: its data, and its quick form by what must hold of every result."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tritonq.perf.accuracy import command
from tritonq.perf.accuracy.data import generate, load, pasted, read_idx
from tritonq.perf.accuracy.nets import NETS, parameters


def test_the_quick_form(tmp_path, capsys):
    assert command.main(["--quick", "--out", str(tmp_path)]) == 0
    records = [json.loads(line) for line in (tmp_path / "quick.jsonl").read_text().splitlines()]
    assert [record["method"] for record in records] == ["lsq", "ranges"]
    for record in records:
        assert record["deployed"] == record["accuracy"]
        edges = {"0", "9"}
        assert {"0", "4.main.0", "9"} <= set(record["most_values"])
        for layer, values in record["most_values"].items():
            assert values <= (2**8 if layer in edges else 2**2), layer
        assert record["environment"]["torch"] == torch.__version__
        assert record["bytes"] > 10_000
    # what is done is not done again, and a line that was cut off is
    text = (tmp_path / "quick.jsonl").read_text()
    (tmp_path / "quick.jsonl").write_text(text[:-20])
    assert command.main(["--quick", "--out", str(tmp_path), "--minutes", "0"]) == 1
    assert "1 of 2 measurements are left" in capsys.readouterr().out


def test_idx_files_come_back_packed_or_not(tmp_path):
    generate(tmp_path, 300, 40)
    path = tmp_path / "train-images-idx3-ubyte"
    values = read_idx(path)
    assert values.shape == (300, 28, 28)
    Path(f"{path}.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    assert np.array_equal(read_idx(path), values)
    task = load(tmp_path, 200, 40)
    assert task.train.images.shape == (200, 1, 28, 28)
    assert torch.equal(task.validation.targets, load(tmp_path, 100, 40).validation.targets)
    with pytest.raises(ValueError, match="fewer than asked for"):
        load(tmp_path, 290, 40)
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x09ab")
    with pytest.raises(ValueError, match="holds 2 bytes"):
        load(tmp_path, 200, 40)


def test_pasted_garments_say_what_is_there(tmp_path):
    generate(tmp_path, 60, 10)
    task = load(tmp_path, 40, 10, several_labels=True)
    assert task.train.images.shape == (40, 1, 64, 64)
    assert task.train.targets.shape == (40, 10)
    assert set(task.train.targets.sum(1).tolist()) <= {1.0, 2.0, 3.0, 4.0}
    one = load(tmp_path, 40, 10).train
    assert torch.equal(pasted(one, 5, 3).images, pasted(one, 5, 3).images)


@pytest.mark.parametrize("name", NETS)
def test_networks_take_both_tasks(name):
    model = NETS[name](10).eval()
    assert [model(torch.zeros(2, 1, size, size)).shape for size in (28, 64)] == [(2, 10)] * 2
    assert parameters(model) < 80_000
