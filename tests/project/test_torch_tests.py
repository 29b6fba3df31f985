"""`make torch-tests`: how reports become a table; PyTorch's tests themselves are not run here."""

import doctest
import sys

import pytest

import torch_tests
from torch_tests import ROOT, Result


def test_examples():
    found = doctest.testmod(torch_tests)
    assert found.attempted >= 2
    assert not found.failed


def test_lost_tests_are_told_and_explained_ones_are_not(monkeypatch):
    plain = {"T.a": Result("passed"), "T.b": Result("passed"), "T.c": Result("skipped", "no GPU")}
    ours = {"T.a": Result("failed", "E: 1 != 2"), "T.b": Result("passed"), "T.c": Result("skipped", "no GPU")}
    runs = {"test/test_x.py": (plain, ours)}
    page = torch_tests.table("1.2.3", runs)
    assert "tests of PyTorch 1.2.3" in page
    assert torch_tests.OTHER_VERSION in page
    assert "| `test_x.py` | 3 | 2 | 1 | 1 | 1 |" in page
    assert "- `T.a`: E: 1 != 2" in page
    assert "- skipped: `T.c`: no GPU" in page
    monkeypatch.setitem(torch_tests.ABSENT, "T.a", "it asks for torch's own error")
    page = torch_tests.table("1.2.3", runs)
    assert "| `test_x.py` | 3 | 2 | 1 | 0 | 1 |" in page
    assert "## Lost\n\nNone." in page
    assert "- `T.a`: it asks for torch's own error" in page
    assert torch_tests.lost({"T.d": Result("passed")}, {}) == ["T.d"]


def test_a_folder_without_the_tests_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["torch_tests.py", str(tmp_path)])
    with pytest.raises(SystemExit):
        torch_tests.main()
    assert "it is no checkout of PyTorch" in capsys.readouterr().err


def test_the_page_is_of_this_version():
    """A page that speaks of another version of tritonq or torch is to be made anew."""
    import torch

    import tritonq

    page = (ROOT / "TORCH_TESTS.md").read_text()
    assert f"tritonq {tritonq.__version__}," in page
    if torch.__version__.startswith("2.13."):
        assert "torch 2.13." in page
