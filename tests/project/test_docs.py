"""What the documentation shows runs, and says what it computes."""

import ast
import doctest
import importlib
import inspect
import re

import pytest

import tritonq
from pages import ROOT, described, python_blocks

# Variables that other programs define: the C++ compiler, and where caches are.
STANDARD_VARIABLES = {"CXX", "XDG_CACHE_HOME"}
MODULES = [
    ".".join(("tritonq", *path.relative_to(ROOT / "tritonq").with_suffix("").parts)).removesuffix(".__init__")
    for path in sorted((ROOT / "tritonq").rglob("*.py"))
    if ">>>" in path.read_text()
]


# torch.ao announces its end, and its version 1 gives zero points to weights.
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor.* deprecated:UserWarning")
@pytest.mark.filterwarnings("ignore:weight zero points differ between channels:UserWarning")
@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    results = doctest.testmod(importlib.import_module(name))
    assert results.attempted
    assert not results.failed


def public_objects():
    """Each name that is public or described, and what it stands for.

    Modules and plain data are left out, whose examples are in docs/api.
    """
    listed = (ROOT / "tests" / "public_names.txt").read_text().split()
    from_docstrings = {name for directive, name in described() if directive in ("autoclass", "autofunction")}
    for name in sorted({*listed, *from_docstrings}):
        module, _, attribute = name.rpartition(".")
        # A function may have the name of its module, which it then hides from attribute access.
        found = getattr(importlib.import_module(module), attribute)
        if inspect.isclass(found) or inspect.isfunction(found):
            yield name, found


def test_public_names_have_examples():
    """In a docstring of their own, which `test_docstring_examples` runs."""
    found = dict(public_objects())
    assert len(found) > 190
    assert [
        name for name, thing in found.items() if ">>>" not in (vars(thing).get("__doc__", thing.__doc__) or "")
    ] == []
    assert {thing.__module__ for thing in found.values()} <= set(MODULES)


def test_readme_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = python_blocks(ROOT / "README.md")
    exec(compile(block.code, "README.md", "exec"), {})  # a reader would paste it into a file
    assert "no code differs" in capsys.readouterr().out
    assert (tmp_path / "model.onnx").exists()
    assert (tmp_path / "model.int8.pt").exists()


def test_readme_names_exist():
    """Every `tritonq.name` and every file that the README mentions."""
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"`?tritonq\.([a-z_]+)\(", text):
        assert hasattr(tritonq, name), name
    for path in re.findall(r"`([\w/]+\.(?:py|md|txt)|[\w]+/)`", text):
        assert (ROOT / path).exists() or (ROOT / "tritonq" / path).exists(), path


def test_public_names_have_docstrings_and_are_sorted():
    assert sorted(tritonq.__all__, key=lambda name: (not name[0].isupper(), name)) == tritonq.__all__
    for name in tritonq.__all__:
        assert getattr(tritonq, name) is not None
        if callable(getattr(tritonq, name)):
            assert getattr(tritonq, name).__doc__, name


def test_no_environment_variable_of_ours_is_read():
    for path in [*(ROOT / "tritonq").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv"):
                text = path.read_text().splitlines()[node.lineno - 1]
                named = re.findall(r"os.environ.get\(\"(\w+)\"\)", text)
                assert set(named or [text]) <= STANDARD_VARIABLES, f"{path.relative_to(ROOT)}: {text.strip()}"
