"""The steps of `prepare_qat`: folders that import one way, one editor, linear time, a page that shows them."""

import ast
import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from prepared_nets import Net, conv, norm
from tolerances import EXACT, assert_close
from tritonq.prepare import prepare_qat
from tritonq.prepare.edit.editor import ModelEditor
from tritonq.prepare.explain import ThreeLines, explain

ROOT = Path(__file__).parent.parent.parent
FOLDERS = ["record", "forwards", "decide", "edit"]
# What 0.1.0 put into pickles of whole models.
PICKLED = {
    "forward_graph": ["_rebuild"],
    "report": ["LayerRecord"],
    "inputs": ["InputFakeQuants", "InputPlace", "quantize_inputs_hook", "quantize_first_argument_hook"],
    "eager": ["quantize_output_hook"],
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_each_step_imports_only_those_before_it(folder):
    later = FOLDERS[FOLDERS.index(folder) + 1 :]
    files = sorted((ROOT / "tritonq/prepare" / folder).glob("*.py"))
    assert files
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tritonq.prepare"):
                step = [*node.module.split("."), ""][2]
                assert step in FOLDERS, f"{path} imports {node.module}"
                assert step not in later, f"{path} imports {node.module}, which comes later"


def test_the_page_shows_what_the_command_prints():
    run = subprocess.run(
        [sys.executable, "-m", "tritonq.prepare.explain"], capture_output=True, text=True, check=True, timeout=120
    )
    page = (ROOT / "docs/prepare.md").read_text()
    assert page.partition("```text\n")[2].partition("\n```")[0] == run.stdout.rstrip()


def test_explaining_leaves_the_model_as_it_is():
    model = ThreeLines()
    before, modules = list(model.state_dict()), list(model.modules())
    text = explain(model, torch.randn(1, 4, 8, 8))
    assert (list(model.state_dict()), list(model.modules())) == (before, modules)
    assert "layer conv: Conv2d, BatchNorm2d" in text
    assert "no forward had to be edited" in explain(nn.Sequential(conv(), norm()), torch.randn(1, 4, 8, 8))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act, self.mix = conv(), norm(), nn.SiLU(), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        y = self.act(self.norm(self.conv(x)))
        return x + self.mix(torch.cat([y, x], 1))


def test_time_is_linear_in_the_number_of_modules():
    counts = []
    for blocks in (1, 15, 30):  # the first fills caches
        model, calls = nn.Sequential(*[Block() for _ in range(blocks)]), 0

        def count(frame, event, argument):
            nonlocal calls
            calls += 1

        sys.setprofile(count)
        try:
            prepare_qat(model, example_inputs=torch.randn(1, 4, 4, 4), inplace=True)
        finally:
            sys.setprofile(None)
        counts.append(calls)
    # Twice as many where no step searches all modules again for each of them; 2.34 with one step that does.
    assert counts[2] < 2.1 * counts[1]


def test_the_editor_undoes_everything():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act, self.tail = conv(), nn.ReLU(), nn.Sequential(nn.ReLU())

        def forward(self, x):
            return self.tail(self.act(self.conv(x) + x))

    from tritonq.prepare.forwards.graph import ForwardGraph, node_operands
    from tritonq.prepare.record.recorder import record

    model, x = Sum(), torch.randn(1, 4, 6, 6)
    model.again = model.act
    expected, modules, kind = model(x), list(model.named_modules(remove_duplicate=False)), type(model)
    flow = record(model, (x,))

    def edit(fail):
        names = dict(model.named_modules())
        with ModelEditor(model, names, lambda owner: ForwardGraph.trace(names[owner], flow.frames_of(owner))) as editor:
            editor.replace("act", nn.Identity())
            assert isinstance(model.again, nn.Identity)  # wherever it is a child
            name = editor.add_child(model, "conv", Net(lambda self, a, b: a * b))
            assert name == "conv_1"
            model.conv_1.forward = lambda a, b: a * b
            editor.rewrite("").replace("add", name, node_operands)
            editor.add_child(model.tail, "extra", nn.Tanh())
            editor.apply()
            torch.testing.assert_close(model(x), (model.conv(x) * x).relu())  # a Sequential does not run what was added
            assert len(model.tail) == 1
            if fail:
                raise KeyError("stop")

    with pytest.raises(KeyError):
        edit(fail=True)
    assert list(model.named_modules(remove_duplicate=False)) == modules
    assert type(model) is kind
    assert_close(model(x), expected, EXACT)
    edit(fail=False)
    assert type(model) is not kind


@pytest.mark.parametrize("module", PICKLED)
def test_pickles_of_an_earlier_version_find_their_classes(module):
    earlier = importlib.import_module(f"tritonq.prepare.{module}")
    for name in PICKLED[module]:
        reference = f"ctritonq.prepare.{module}\n{name}\n.".encode()
        assert pickle.loads(reference) is getattr(earlier, name)
