"""The pages of docs/: their code runs in an empty folder, their commands and links exist, public names are listed."""

from __future__ import annotations

import doctest
import inspect
import json
import pydoc
import re
import shlex
import warnings

import pytest
import torch

import tritonq
from pages import DOCUMENTS, PAGES, ROOT, commands, described, links, python_blocks
from tritonq.__main__ import COMMANDS, build_parser

# Programs that pages speak of and that the tests cannot run.
FOREIGN_PROGRAMS = {
    "pip",
    "trtexec",
    "torchrun",
    "yolo",
    "git",
    "cd",
    "ovc",
    "qairt-converter",
    "benchmark_app",
    ".ci/run",
    ".venv/bin/python",
}


def page_ids(path):
    return str(path.relative_to(ROOT / "docs"))


@pytest.mark.parametrize("path", [path for path in PAGES if python_blocks(path)], ids=page_ids)
def test_code_of_a_page_runs(path, tmp_path, monkeypatch):
    """All blocks of a page, in order, as one script."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {"__name__": "__main__"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in python_blocks(path):
            if block.reason is None:
                code = compile("\n" * (block.line - 1) + block.code, str(path), "exec")
                exec(code, namespace)


@pytest.mark.parametrize("path", PAGES, ids=page_ids)
def test_what_does_not_run_compiles(path):
    for block in python_blocks(path):
        compile("\n" * (block.line - 1) + block.code, str(path), "exec")


@pytest.mark.parametrize("path", [*PAGES, *DOCUMENTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_of_a_page_exist(path):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in commands(path):
        words = [word for word in shlex.split(command) if "=" not in word or word.startswith("-")]
        if words[0] == "make":
            assert set(words[1:]) <= set(targets), command
        elif words[:3] == ["python", "-m", "tritonq"] or words[0] == "tritonq":
            words = shlex.split(command)
            words = words[words.index("tritonq") + 1 :]
            words = words[: words.index(">>")] if ">>" in words else words
            assert words[0] in COMMANDS or words == ["--version"], command
            if words[0] in COMMANDS:
                build_parser(words).parse_args(words)  # leaves with SystemExit where an option is unknown
        elif words[0] in ("python", "python3"):
            module = words[2] if words[1] == "-m" else words[1]
            file = module.replace("tritonq.perf", "perf").replace(".", "/") if words[1] == "-m" else module
            folders = (ROOT, ROOT / "tools", ROOT / "examples")
            assert any((folder / name).exists() for folder in folders for name in (file, f"{file}.py")), command
        else:
            assert words[0] in FOREIGN_PROGRAMS, command


@pytest.mark.parametrize("path", [*PAGES, *DOCUMENTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_a_page_exist(path):
    """Links to files; Sphinx checks those to sections and names."""
    for target in links(path):
        file, _, _ = target.partition("#")
        if file and "://" not in file:
            assert (path.parent / file).exists(), target


def test_every_public_name_is_in_the_reference():
    documented = [name for _, name in described()]
    assert len(documented) == len(set(documented)), "described twice"
    things = {id(pydoc.locate(name)) for name in documented}
    names = (ROOT / "tests" / "public_names.txt").read_text().split()
    found = {name: pydoc.locate(name) for name in names}
    assert [name for name, what in found.items() if not (inspect.ismodule(what) or id(what) in things)] == []


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "api").glob("*.rst")), ids=lambda path: path.name)
def test_examples_of_the_reference_run(path):
    names = {"tritonq": tritonq, "torch": torch}
    assert not doctest.testfile(str(path), module_relative=False, globs=names).failed


def test_cited_pages_and_sections_exist():
    """Docstrings cite a page as ``docs/numbers.md``, and a section of it by its heading in quotes."""
    cited = []
    for folder in ("tritonq", "kernels", "perf", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            text = re.sub(r"\s+", " ", path.read_text())
            cited += re.findall(r"(docs/[\w-]+\.md)(?:, \"([^\"]+)\")?", text)
    assert len(cited) > 40
    for page, section in cited:
        headings = re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), re.MULTILINE)
        assert not section or section in headings, (page, section)


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch, capsys):
    """All cells in order, in quick form; what is committed holds the outputs of a whole run without errors.

    Lines without numbers, such as the header of a table, are those that the code prints today.
    """
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pyplot, "show", lambda: pyplot.close("all"))
    torch.manual_seed(0)
    namespace = {"__name__": "__main__", "QUICK": True}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            assert cell["execution_count"], "run the notebook and save it"
            assert all(output["output_type"] != "error" for output in cell["outputs"])
            exec(compile("".join(cell["source"]), str(path), "exec"), namespace)
            printed = capsys.readouterr().out.splitlines()
            kept = "".join(text for output in cell["outputs"] for text in output.get("text", ())).splitlines()
            stale = [line for line in kept if not re.search(r"\d", line) and line not in printed]
            assert stale == [], "run the notebook again and save it: it shows what an earlier version printed"
