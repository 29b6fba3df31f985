"""`python -m tritonq doctor` says what is there and ends with 1 where something is broken."""

from __future__ import annotations

import json
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import torch

import tritonq
from tritonq.__main__ import COMMANDS, main
from tritonq.cli import doctor

launch = pytest.importorskip("tritonq.kernels.launch_sizes")


def findings():
    return {(finding.topic, finding.name): finding for finding in doctor.examine()}


def test_it_prints_every_topic(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if not line.startswith(" ")] == [
        *("versions", "devices", "backend", "ONNX Runtime", "launch sizes", "no problem found")
    ]
    assert torch.__version__ in printed


def test_the_backend_and_its_reason():
    found = findings()["backend", "float32 on cpu"].value
    assert found == "torch: kernels run on CUDA and HIP tensors, got one on cpu"
    assert "float64" in findings()["backend", "float64 anywhere"].value
    with tritonq.use_backend("torch"):
        assert findings()["backend", "float32 on cpu"].value.startswith("torch: ")


@pytest.mark.parametrize("saturates", [False, True])
def test_what_int8_sums_need(saturates, monkeypatch):
    monkeypatch.setattr(doctor, "products_saturate", lambda: saturates)
    assert ("session.x64quantprecision" in findings()["ONNX Runtime", "int8 sums on cpu"].value) == saturates


def test_missing_and_old_packages(monkeypatch, capsys):
    real = metadata.version

    def version(name):
        if name == "onnx":
            raise metadata.PackageNotFoundError(name)
        return "3.5.1" if name == "triton" else real(name)

    monkeypatch.setattr(metadata, "version", version)
    assert main(["doctor"]) == 1
    printed = capsys.readouterr().out
    assert "onnx" in printed
    assert "not installed; for export_onnx" in printed
    assert "3.5.1  [problem: at least 3.6 is needed]" in printed
    assert "1 problem found" in printed


def test_tables_good_and_damaged(monkeypatch, tmp_path, capsys):
    content = {"version": launch.TABLE_VERSION, "gpu": "NVIDIA H200", "kernels": {"fake_quantize": {}}}
    (tmp_path / "nvidia_h200.json").write_text(json.dumps(content))
    monkeypatch.setattr(launch, "TABLES", tmp_path)
    assert "for another GPU" in findings()["launch sizes", "nvidia_h200.json"].value
    (tmp_path / "broken.json").write_text("{")
    assert main(["doctor"]) == 1
    assert "damaged" in capsys.readouterr().out


@pytest.mark.parametrize(("version", "old"), [("3.6.0", False), ("3.10", False), ("3.5.1", True), ("3.6rc1", True)])
def test_versions_compare_as_versions(version, old, monkeypatch):
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: version if name == "triton" else real(name))
    assert bool(findings()["versions", "triton"].problem) == old


def test_minima_come_from_the_requirements():
    oldest = doctor._oldest_versions()
    assert {"torch", "triton"} <= oldest.keys()
    project = tomllib.loads((Path(__file__).parent.parent.parent / "pyproject.toml").read_text())["project"]
    assert f"torch>={oldest['torch']}" in project["dependencies"]


def test_it_runs_where_only_the_folder_is_on_the_path(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", absent)
    assert findings()["versions", "tritonq"].value == tritonq.__version__
    assert not findings()["versions", "torch"].problem


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert COMMANDS[command].summary.split()[0] in capsys.readouterr().out
