"""The goals, and whether the newest committed results meet them; the table in ``perf/README.md`` is its output.

Run as ``python -m tritonq.perf.goals`` to print it, with ``--write`` to put it into the README.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tritonq.perf import records
from tritonq.perf.cases.train_step_peers import PEERS
from tritonq.perf.machine import SOURCE
from tritonq.perf.records import Record
from tritonq.perf.runner import default_results

# Whoever a training step is compared with, in the case's own words.
TRAINING_PEERS = ("torch.ao v0", "torch.ao v1", *PEERS)

_BEGIN, _END = "<!-- goals: written by python -m tritonq.perf.goals --write -->\n", "<!-- end of goals -->\n"


@dataclass(frozen=True)
class Goal:
    """One promise about one case.

    Attributes:
        says: what is promised, in words.
        case: name of the case.
        measure: ``"speed-up"`` (at least ``bound`` times faster than ``peer``), ``"time"`` (at most ``bound`` times the
            peer's), ``"memory"`` (at most ``bound`` times the peer's), ``"copy"`` (at least that fraction of the copy
            bandwidth), ``"every peer"`` (at least ``bound`` times as fast as the fastest library that trains the same
            model and was timed; the table names those that were not).
        peer: the other implementation; not used by ``"copy"`` and ``"every peer"``.
        device_type: where it is to be measured.
        ours: the implementation that is meant.
    """

    says: str
    case: str
    measure: Literal["speed-up", "time", "memory", "copy", "every peer"]
    bound: float
    peer: str = ""
    device_type: str = "cpu"
    ours: str = "tritonq"

    def value(self, ours: Record, peer: Record | None) -> float | None:
        """Return the measured value in the unit of ``bound``; None where a record lacks it."""
        if self.measure == "copy":
            return ours.get("copy_fraction")
        if peer is None:
            return None
        if self.measure == "memory":
            own_bytes, peer_bytes = ours.get("memory_bytes"), peer.get("memory_bytes")
            return own_bytes / peer_bytes if own_bytes and peer_bytes else None
        if "speed_up" not in ours or "speed_up" not in peer:
            return None
        faster: float = ours["speed_up"] / peer["speed_up"]
        return 1 / faster if self.measure == "time" else faster

    def is_met(self, value: float) -> bool:
        """Whether ``value`` keeps the promise."""
        return value <= self.bound if self.measure in ("time", "memory") else value >= self.bound


def _fake_quant(what: str, direction: str) -> str:
    return f"fake_quant/{what}/16x64x24x24/float32/{direction}"


_FORWARD, _BOTH = "forward", "forward+backward"
_RESNET18 = "train_step/resnet18/16x3x96x96/float32"
_RESNET50 = "train_step/resnet50/128x3x224x224/amp-bfloat16/channels_last"
_MOBILENET = "train_step/mobilenet_v2/16x3x96x96/float32"
_EVALUATE = {
    "ResNet-18": "evaluate/resnet18/8x3x128x128/float32",
    "MobileNetV2": "evaluate/mobilenet_v2/8x3x128x128/float32",
}
_LARGE = "256x64x64x64/float32"


def _by_compiled_code(says: str, case: str, bound: float, peer: str) -> Goal:
    """Return the goal of one operator with ``use_backend("compiled")``."""
    return Goal(says, case, "speed-up", bound, peer, ours="tritonq, compiled")


def _evaluation(model: str, case: str, bound: float) -> tuple[Goal, ...]:
    """Return the goals of one model in eval mode: converted, and quantization-aware."""
    qat, compiled = "tritonq, QAT in eval", "tritonq, compiled"
    last = f"{case}/channels_last"
    return (
        Goal(f"{model} converted: at most {bound:g}x float's time in eval", case, "time", bound, "float"),
        Goal("the same, channels last", last, "time", bound, "float"),
        Goal(
            f"{model} converted, compiled: at most {bound:g}x float's time", case, "time", bound, "float", ours=compiled
        ),
        Goal("the same, channels last", last, "time", bound, "float", ours=compiled),
        Goal(f"{model}, QAT in eval: at most 1.3x float's time", case, "time", 1.3, "float", ours=qat),
        Goal("the same, channels last", last, "time", 1.3, "float", ours=qat),
    )


def _compiled(model: str, case: str, bound: float, channels_last: float) -> tuple[Goal, ...]:
    """Return the goals of one model's training step with ``use_backend("compiled")``."""
    ours = "tritonq, compiled"
    return (
        Goal(f"{model} step, compiled: at most {bound:g}x float's time", case, "time", bound, "float", ours=ours),
        Goal(
            f"the same, channels last: at most {channels_last:g}x",
            f"{case}/channels_last",
            "time",
            channels_last,
            "float",
            ours=ours,
        ),
        Goal(f"{model} step, compiled: faster than every peer", case, "every peer", 1.0, ours=ours),
        Goal("the same, channels last", f"{case}/channels_last", "every peer", 1.0, ours=ours),
    )


def _preparation(model: str, case: str) -> tuple[Goal, ...]:
    """Return the goals of preparing one model."""
    forward = "float training forward"
    return (
        Goal(f"{model}, prepare_qat: at most 15 float training forwards", case, "time", 15, forward),
        Goal("the same: at most 3x the memory of one", case, "memory", 3, forward),
    )


GOALS: tuple[Goal, ...] = (
    Goal(
        "fake quant per tensor, forward: 8x torch's operator", _fake_quant("tensor", _FORWARD), "speed-up", 8, "torch"
    ),
    Goal("fake quant per channel, forward: 8x", _fake_quant("channel1", _FORWARD), "speed-up", 8, "torch"),
    Goal(
        "fake quant per tensor, with backward: 2x (hoped for: 5x)", _fake_quant("tensor", _BOTH), "speed-up", 2, "torch"
    ),
    Goal("fake quant per channel, with backward: 2x (5x)", _fake_quant("channel1", _BOTH), "speed-up", 2, "torch"),
    _by_compiled_code(
        "fake quant per tensor, with backward, compiled: 5x torch's operator", _fake_quant("tensor", _BOTH), 5, "torch"
    ),
    _by_compiled_code("per channel, compiled: 5x", _fake_quant("channel1", _BOTH), 5, "torch"),
    Goal("ResNet-18 step: at most 1.15x float's time", _RESNET18, "time", 1.15, "float"),
    Goal("the same, channels last", f"{_RESNET18}/channels_last", "time", 1.15, "float"),
    Goal("ResNet-18 step: saves at most 1.01x float's bytes", _RESNET18, "memory", 1.01, "float"),
    Goal("the same, with inputs kept as codes: at most 0.76x", _RESNET18, "memory", 0.76, "float"),
    Goal("ResNet-18 step: faster than every peer", _RESNET18, "every peer", 1.0),
    Goal("the same, channels last", f"{_RESNET18}/channels_last", "every peer", 1.0),
    Goal("MobileNetV2 step: faster than every peer", _MOBILENET, "every peer", 1.0),
    Goal("the same, channels last", f"{_MOBILENET}/channels_last", "every peer", 1.0),
    *_compiled("ResNet-18", _RESNET18, 1.10, 1.12),
    *_compiled("MobileNetV2", _MOBILENET, 1.25, 1.35),
    Goal(
        "ResNet-18 step under torch.compile: at most 1.15x compiled float's time",
        _RESNET18,
        "time",
        1.15,
        "torch.compile(float)",
        ours="torch.compile(tritonq)",
    ),
    *_evaluation("ResNet-18", _EVALUATE["ResNet-18"], 0.31),
    *_evaluation("MobileNetV2", _EVALUATE["MobileNetV2"], 0.46),
    *_preparation("ResNet-18", "prepare/resnet18/2x3x224x224/float32"),
    *_preparation("MobileNetV2", "prepare/mobilenet_v2/2x3x224x224/float32"),
    Goal(
        "histogram observer with search: 3x torch.ao's",
        "histogram/observe+search/16x64x56x56/float32",
        "speed-up",
        3,
        "torch.ao",
    ),
    _by_compiled_code("the same, compiled: 6x", "histogram/observe+search/16x64x56x56/float32", 6, "torch.ao"),
    Goal("fake quant, 64 Mi elements: 90 % of copy", f"fake_quant/tensor/{_LARGE}/forward", "copy", 0.9, "", "cuda"),
    Goal("the same, channels last", f"fake_quant/tensor/{_LARGE}/channels_last/forward", "copy", 0.9, "", "cuda"),
    Goal(
        "fake quant, 64 Mi elements, with backward: 1.5x torch's operator",
        f"fake_quant/tensor/{_LARGE}/forward+backward",
        "speed-up",
        1.5,
        "torch",
        "cuda",
    ),
    Goal(
        "fake quant at 64x64: not slower than torch's operator",
        "fake_quant/tensor/64x64/float32/forward",
        "speed-up",
        1,
        "torch",
        "cuda",
    ),
    *(
        Goal(
            f"conv-BN tail, {shape}, bfloat16{', channels last' if layout else ''}: 85 % of copy",
            f"conv_bn/tail/{shape}/bfloat16{layout}/forward+backward",
            "copy",
            0.85,
            "",
            "cuda",
        )
        for shape in ("256x64x56x56", "256x512x7x7")
        for layout in ("", "/channels_last")
    ),
    Goal(
        "histogram, 64 Mi elements: 10x torch.ao's",
        "histogram/observe/256x64x64x64/float32",
        "speed-up",
        10,
        "torch.ao",
        "cuda",
    ),
    Goal("ResNet-50 step: at most float's time", _RESNET50, "time", 1.0, "float", "cuda"),
    Goal(
        "ResNet-50 step: at most 1.15x compiled float's time", _RESNET50, "time", 1.15, "torch.compile(float)", "cuda"
    ),
    Goal(
        "ResNet-50 step of two images, graphed: at most 1.2x float's time",
        _RESNET50.replace("128x", "2x"),
        "time",
        1.2,
        "float",
        "cuda",
        "tritonq, CUDA graph",
    ),
    Goal("ResNet-50 step: 2.5x torch.ao", _RESNET50, "speed-up", 2.5, "torch.ao v1", "cuda"),
    Goal("ResNet-50 step: 1.3x compiled torch.ao", _RESNET50, "speed-up", 1.3, "torch.compile(torch.ao v1)", "cuda"),
    Goal("ResNet-50 step: at most 0.8x float's peak memory", _RESNET50, "memory", 0.8, "float", "cuda"),
    Goal("ResNet-50 step: faster than every peer", _RESNET50, "every peer", 1.0, "", "cuda"),
)


def main(argv: list[str] | None = None) -> int:
    """Print the table, or write it into the README."""
    parser = argparse.ArgumentParser(prog="python -m tritonq.perf.goals", description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into perf/README.md")
    args = parser.parse_args(argv)
    table = render(records.read_folder(default_results()))
    if not args.write:
        print(table, end="")
        return 0
    readme = SOURCE / "README.md"
    readme.write_text(replaced(readme.read_text(encoding="utf-8"), table), encoding="utf-8")
    return 0


def render(found: Sequence[Record]) -> str:
    """Return a Markdown table: each goal, what was measured on each device of its type, and whether it is met."""
    newest = records.latest(found)
    lines = ["| goal | measured | met | on | commit |", "|---|---|---|---|---|"]
    for goal in GOALS:
        lines += _rows(goal, newest) or [f"| {goal.says} | not measured | | {goal.device_type} | |"]
    return "\n".join(lines) + "\n"


def replaced(text: str, table: str) -> str:
    """Return ``text`` with ``table`` between the two markers in it.

    Raises:
        ValueError: the markers are missing.
    """
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError("the README has lost the marks of its table of goals")
    return before + _BEGIN + table + _END + after


def _rows(goal: Goal, newest: Sequence[Record]) -> list[str]:
    mine = [r for r in newest if r["case"] == goal.case and r["environment"]["device_type"] == goal.device_type]
    rows = []
    for ours in (record for record in mine if record["implementation"] == goal.ours and "median_s" in record):
        env = ours["environment"]
        peer = _peer(goal, [record for record in mine if record["environment"]["device"] == env["device"]])
        value = goal.value(ours, peer)
        if value is not None:
            met = "yes" if goal.is_met(value) else "no"
            shown = f"{value:.0%}" if goal.measure == "copy" else f"{value:.2f}x"
            if goal.measure == "every peer" and peer is not None:
                shown += f" {peer['implementation']}{_not_timed(mine, env['device'])}"
            where = env["device"] if env["device_type"] == "cuda" else f"{env['device']}, {env['threads']} threads"
            rows.append(f"| {goal.says} | {shown} | {met} | {where} | {env['commit'][:7]} |")
    return rows


def _peer(goal: Goal, records_of_run: Sequence[Record]) -> Record | None:
    """Return the record that the goal compares with, or None where there is none yet."""
    if goal.measure != "every peer":
        timed = [r for r in records_of_run if r["implementation"] == goal.peer and "median_s" in r]
        return timed[0] if timed else None
    timed = [r for r in records_of_run if r["implementation"] in TRAINING_PEERS and "speed_up" in r]
    return max(timed, key=lambda record: float(record["speed_up"]), default=None)


def _not_timed(records_of_case: Sequence[Record], device: str) -> str:
    """Return in words which peers have no time on a device; one of them might have been the fastest."""
    here = [record for record in records_of_case if record["environment"]["device"] == device]
    timed = {record["implementation"] for record in here if "speed_up" in record}
    missing = [name for name in TRAINING_PEERS if name not in timed]
    return f" (not timed: {', '.join(missing)})" if missing else ""


if __name__ == "__main__":
    sys.exit(main())
