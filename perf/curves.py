"""Curves of a training step's time over float's: against depth, width, batch, resolution, kind of layer.

Run as ``python -m tritonq.perf.curves``; it measures for some minutes, writes the ratios as JSON and draws them. Each
point is a chain of Conv-BN-ReLU layers that differs from one common chain in one respect, so that who knows these of
their own model finds it between the points. ``--quick`` takes the two ends of each curve.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritonq.perf.case import Inputs
from tritonq.perf.machine import environment
from tritonq.perf.measure import Budget, interleave
from tritonq.perf.placement import memory_format, placed
from tritonq.perf.progress import progress
from tritonq.perf.stats import Spread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CLASSES, _LEARNING_RATE, _GROUP = 10, 1e-3, 8
_BUDGET, _QUICK_BUDGET = Budget(seconds=4.0, min_rounds=7), Budget(seconds=0.5, min_rounds=3, max_rounds=5)
_COLUMNS, _PANEL_INCHES = 3, 3.2
_INK, _OURS = "#222222", "#0072b2"


@dataclass(frozen=True)
class Chain:
    """A chain of layers, and the batch that it trains on.

    Attributes:
        depth: number of layers.
        width: channels of each, a multiple of 8.
        batch: images.
        resolution: height and width of the images; nothing strides.
        kind: of the convolutions: ``"1x1"``, ``"3x3"``, ``"grouped"`` (3×3, eight channels a group) or ``"depthwise"``.
        channels_last: the memory format.
    """

    depth: int = 6
    width: int = 32
    batch: int = 16
    resolution: int = 24
    kind: str = "3x3"
    channels_last: bool = False

    def model(self) -> nn.Module:
        """Return the float model, with the same weights every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers = [layer for i in range(self.depth) for layer in self._layer(3 if i == 0 else self.width)]
            head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(self.width, _CLASSES)]
            model = nn.Sequential(*layers, *head)
            return placed(model, channels_last=self.channels_last).train()

    def inputs(self, seed: int = 0) -> Inputs:
        """Return ``images`` (batch, 3, resolution, resolution), ``labels`` (batch,)."""
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(self.batch, 3, self.resolution, self.resolution, generator=generator)
        labels = torch.randint(_CLASSES, (self.batch,), generator=generator)
        return {"images": images.contiguous(memory_format=memory_format(self.channels_last)), "labels": labels}

    def _layer(self, inputs: int) -> list[nn.Module]:
        # Of three channels there are no groups of eight.
        kind = self.kind if inputs == self.width else "3x3"
        groups = {"grouped": self.width // _GROUP, "depthwise": self.width}.get(kind, 1)
        size = 1 if kind == "1x1" else 3
        conv = nn.Conv2d(inputs, self.width, size, padding=size // 2, groups=groups, bias=False)
        return [conv, nn.BatchNorm2d(self.width), nn.ReLU()]


CURVES: dict[str, tuple[Any, ...]] = {
    "depth": (2, 4, 8, 16, 32),
    "width": (8, 16, 32, 64, 128),
    "batch": (1, 2, 4, 16, 64),
    "resolution": (6, 12, 24, 48),
    "kind": ("1x1", "3x3", "grouped", "depthwise"),
}


@dataclass(frozen=True)
class Point:
    """One measured chain.

    Attributes:
        curve: name of the curve that it is a point of.
        chain: the layers.
        ratio: its step's time over the float step's.
        float_s: seconds of the float step.
    """

    curve: str
    chain: Chain
    ratio: Spread
    float_s: float


class Step:
    """A function that takes one SGD step of a model per call."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=_LEARNING_RATE, momentum=0.9)

    def __call__(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Take one step on ``inputs``; return the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(self.model(inputs["images"]), inputs["labels"])
        loss.backward()
        self.optimizer.step()
        return (loss.detach(),)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, draw, and write both files; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tritonq.perf.curves", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="folder for curves-cpu.json and .png")
    parser.add_argument("--quick", action="store_true", help="the ends of each curve, briefly: does it run?")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of torch (default: as it is)")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    chains = list(plan(args.quick))
    budget = _QUICK_BUDGET if args.quick else _BUDGET
    points = [measure(curve, chain, budget) for curve, chain in progress(chains, len(chains), "curves", "point")]
    for point in points:
        value, layout = getattr(point.chain, point.curve), "channels last" if point.chain.channels_last else ""
        print(f"{point.curve:10} {value!s:>9} {layout:13} {point.ratio.median:5.2f}")
    env = environment(torch.device("cpu"))
    args.out.mkdir(parents=True, exist_ok=True)
    data = {"environment": env, "points": [asdict(point) for point in points]}
    (args.out / "curves-cpu.json").write_text(json.dumps(data, indent=1, default=str) + "\n", encoding="utf-8")
    figure(points, f"{env['device']}, {torch.get_num_threads()} threads").savefig(args.out / "curves-cpu.png", dpi=150)
    print(f"written to {args.out / 'curves-cpu.json'} and {args.out / 'curves-cpu.png'}")
    return 0


def plan(quick: bool) -> Iterator[tuple[str, Chain]]:
    """Yield the curve and the chain of each point: both memory formats."""
    for channels_last in (False, True):
        for name, values in CURVES.items():
            for value in (values[0], values[-1]) if quick else values:
                yield name, replace(Chain(channels_last=channels_last), **{name: value})


def measure(curve: str, chain: Chain, budget: Budget) -> Point:
    """Time the float step and the quantization-aware step of a chain in turns; return their ratio."""
    import tritonq

    inputs = [chain.inputs(seed) for seed in range(2)]
    prepared = tritonq.prepare_qat(
        chain.model(), qconfig=tritonq.get_qconfig("tensorrt"), example_inputs=(inputs[0]["images"],)
    )
    steps = {"float": Step(chain.model()), "tritonq": Step(prepared.train())}
    times = interleave(steps, inputs, torch.device("cpu"), budget)
    ratios = [ours / theirs for ours, theirs in zip(times["tritonq"], times["float"], strict=True)]
    return Point(curve, chain, Spread.of(ratios), Spread.of(times["float"]).median)


def figure(points: Sequence[Point], where: str) -> Figure:
    """Return one panel per curve, a line per memory format, bands over the middle 60 % of the rounds."""
    from matplotlib.figure import Figure

    rows = -(-len(CURVES) // _COLUMNS)
    drawn = Figure(figsize=(_COLUMNS * _PANEL_INCHES * 1.2, rows * _PANEL_INCHES), layout="constrained")
    panels = drawn.subplots(rows, _COLUMNS, squeeze=False, sharey=True).flatten()
    for panel, (name, values) in zip(panels, CURVES.items(), strict=False):
        for channels_last, style in ((False, "-"), (True, "--")):
            mine = [p for p in points if p.curve == name and p.chain.channels_last == channels_last]
            at = [values.index(getattr(p.chain, name)) for p in mine]
            label = "channels last" if channels_last else "contiguous"
            panel.plot(at, [p.ratio.median for p in mine], style, marker="o", color=_OURS, label=label)
            panel.fill_between(at, [p.ratio.p20 for p in mine], [p.ratio.p80 for p in mine], color=_OURS, alpha=0.15)
        panel.set_xticks(range(len(values)), [str(value) for value in values])
        panel.set_xlabel(name)
        panel.axhline(1, color=_INK, linewidth=0.8)
    panels[0].legend(frameon=False)
    for row in range(rows):
        panels[row * _COLUMNS].set_ylabel("step's time / float's")
    for panel in panels[len(CURVES) :]:
        panel.set_axis_off()
    common = ", ".join(f"{field.name} {field.default}" for field in fields(Chain) if field.name != "channels_last")
    drawn.suptitle(f"A QAT step over a float step; otherwise {common}\n{where}", fontsize=10)
    return drawn


if __name__ == "__main__":
    sys.exit(main())
