"""Print how `prepare_qat` sees a model: its record, the plan, the edited forwards.

``python -m tritonq.prepare.explain`` prints them for a model whose forward has three lines; ``docs/prepare.md``
explains the output. This model takes images (batch, 4, height, width) and returns two scores for each, (batch, 2).
"""

from __future__ import annotations

import inspect
import sys
import textwrap
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritonq.nn import DEFAULT_QAT_MAPPING
from tritonq.observers import ObserverBase
from tritonq.prepare import prepare_qat
from tritonq.prepare.decide.analysis import Analysis
from tritonq.prepare.decide.fixed_point import is_fixed_point
from tritonq.prepare.decide.planner import make_plan
from tritonq.prepare.decide.qconfigs import resolve_qconfigs
from tritonq.prepare.forwards.edited import forward_source
from tritonq.prepare.record.example import record_examples
from tritonq.qconfig import DEFAULT_PRESET, QConfig, get_qconfig


class ThreeLines(nn.Module):
    """An example of a model: a convolution with BatchNorm, a residual addition with ReLU, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.classifier = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return two scores per image, (batch, 2), for images (batch, 4, height, width)."""
        y = self.norm(self.conv(x))
        y = F.relu(y + x)
        return cast(Tensor, self.classifier(y.mean((2, 3))))


def explain(model: nn.Module, example_inputs: Any, qconfig: QConfig | None = None) -> str:
    """Describe the steps of ``prepare_qat`` on a model, which stays as it is.

    Args:
        model: a float model.
        example_inputs: a tensor, a tuple or list of positional arguments, or a dict of named ones.
        qconfig: the qconfig of the model; None: that of the default preset. A module's own attribute ``qconfig`` wins.

    Returns:
        Four parts of text: the record of the run in eval mode, the plan (fixed point has none), each edited forward,
        and the modules of the prepared model.

    Raises:
        ValueError: ``prepare_qat`` refuses the model, or the model rejects ``example_inputs``.
        TypeError: ``example_inputs`` of another type.

    Examples:
        >>> print(explain(ThreeLines(), torch.randn(1, 4, 8, 8)).splitlines()[0])
        RECORD: one run of ThreeLines on its example inputs
    """
    qconfig = get_qconfig(DEFAULT_PRESET) if qconfig is None else qconfig
    recording = record_examples(model, example_inputs)
    analysis = Analysis(model, recording.flow, recording.held)
    qconfigs = resolve_qconfigs(model, qconfig)
    plan = None if is_fixed_point(qconfig) else make_plan(analysis, DEFAULT_QAT_MAPPING, qconfigs)
    prepared = prepare_qat(model, qconfig=qconfig, example_inputs=example_inputs)
    forwards = [
        f"{name or 'the model'}, {mode}:\n{source}"
        for name, module in prepared.named_modules()
        for mode, source in forward_source(module).items()
    ]
    parts = {
        f"RECORD: one run of {type(model).__name__} on its example inputs": str(recording.in_eval.flow),
        "PLAN: what will become of it": str(plan or "none: formats of fixed point are linked layer by layer"),
        "FORWARD: what edited modules run now": "\n\n".join(forwards) or "no forward had to be edited",
        "MODEL: what its modules are now": _outline(prepared),
    }
    return "\n\n".join(f"{title}\n\n{textwrap.indent(text, '    ')}" for title, text in parts.items())


def _outline(model: nn.Module) -> str:
    """Return one line per module of a model, with its name and class; observers are left out."""
    shown = (module for module in model.named_modules() if not isinstance(module[1], ObserverBase))
    named = [(name, type(module).__name__) for name, module in shown if name]
    width = max((len(name) for name, _ in named), default=0)
    return "\n".join(f"{name:{width}}  {kind}" for name, kind in named)


def main() -> None:
    """Print the source of :class:`ThreeLines` and how it is prepared."""
    torch.manual_seed(0)
    source = textwrap.indent(inspect.getsource(ThreeLines).rstrip(), "    ")
    sys.stdout.write(f"SOURCE\n\n{source}\n\n{explain(ThreeLines(), torch.randn(1, 4, 8, 8))}\n")


if __name__ == "__main__":
    main()
