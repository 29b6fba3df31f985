"""Pictures from result files: how much faster than each peer, and how close to what the memory allows.

Run as ``python -m tritonq.perf.plot [FILE OR FOLDER ...]``.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritonq.perf import records
from tritonq.perf.records import Record
from tritonq.perf.runner import default_results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OURS = "tritonq"

# Colour-blind safe (Okabe and Ito), readable on white.
_FASTER, _SLOWER, _INK, _GRID = "#0072b2", "#d55e00", "#222222", "#d9d9d9"
_MARKS = {
    "tritonq": ("o", "#0072b2"),
    "torch.compile(tritonq)": ("o", "#56b4e9"),
    "torch": ("s", "#d55e00"),
    "torch.ao v0": ("v", "#e69f00"),
    "torch.ao v1": ("^", "#cc79a7"),
    "torch.compile(formula)": ("D", "#009e73"),
}

_TIMES = "\N{MULTIPLICATION SIGN}"

_COLUMNS = 3
_BAR_INCHES, _PANEL_INCHES, _WIDTH_INCHES = 0.27, 0.78, 13.5
_HEAD_INCHES = 0.75

# Room beyond the longest bar for its number, in doublings; and the axis reaches at least from half to double.
_ROOM = 1.3
_LEAST_REACH = 1.0

# Marks of one case stand side by side, this factor apart.
_DODGE = 1.05


def main(argv: list[str] | None = None) -> int:
    """Draw both pictures; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tritonq.perf.plot", description=__doc__)
    parser.add_argument("results", nargs="*", type=Path, help="result files or folders (default: perf/results)")
    parser.add_argument("--case", action="append", metavar="PATTERN", help="part of a name, or a glob; repeatable")
    parser.add_argument("--device", help="part of a device's name, where the results are of several")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="folder for the pictures")
    args = parser.parse_args(argv)
    try:
        chosen = choose(load(args.results or [default_results()]), args.case or [], args.device)
    except ValueError as error:
        print(f"plot: {error}", file=sys.stderr)
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    for name, figure in (("speedup", speed_up_figure(chosen)), ("roofline", roofline_figure(chosen))):
        if figure is None:
            print(f"plot: these results have nothing to show in a {name} picture", file=sys.stderr)
            continue
        path = args.out / f"{name}-{chosen[0]['environment']['device_type']}.png"
        figure.savefig(path, dpi=150, facecolor="white")
        print(path)
    return 0


def load(paths: Iterable[Path]) -> list[Record]:
    """Return the records in files and folders.

    In a folder a damaged file is named and left out; if it is named itself, it is an error.

    Raises:
        ValueError: a file that is missing or damaged.
    """
    found: list[Record] = []
    for path in paths:
        found += records.read_folder(path) if path.is_dir() else records.read(path)
    return found


def choose(found: Sequence[Record], patterns: Sequence[str], device: str | None) -> list[Record]:
    """Return the newest timed record of each case and implementation on one device.

    Raises:
        ValueError: nothing is left, or results of several devices are.
    """
    timed = [record for record in found if "median_s" in record and record["family"] != "overhead"]
    if patterns:
        timed = [r for r in timed if any(part in r["case"] or fnmatchcase(r["case"], part) for part in patterns)]
    if device:
        timed = [r for r in timed if device.lower() in r["environment"]["device"].lower()]
    devices = sorted({record["environment"]["device"] for record in timed})
    if not devices:
        raise ValueError("no measurement matches")
    if len(devices) > 1:
        raise ValueError(f"results of several devices, choose one by --device: {', '.join(devices)}")
    return records.latest(timed)


def ratios(rows: Sequence[Record]) -> dict[str, float]:
    """Return how many times faster tritonq is than each peer in one case; empty without tritonq."""
    by_name = {row["implementation"]: row for row in rows}
    if _OURS not in by_name:
        return {}
    # Both were paired with the baseline round by round; their quotient keeps that. Without a baseline: plain medians.
    paired = all("speed_up" in row for row in rows)
    speed = {name: row["speed_up"] if paired else 1 / row["median_s"] for name, row in by_name.items()}
    return {name: speed[_OURS] / speed[name] for name in by_name if _OURS not in name}


def speed_up_figure(chosen: Sequence[Record]) -> Figure | None:
    """Return a panel per case, a bar per peer: to the right tritonq is faster, to the left the peer is.

    None when there is no case in which tritonq and a peer were both timed.
    """
    from matplotlib.figure import Figure

    ordered = sorted(chosen, key=lambda record: record["case"])
    panels = [(case, ratios(list(rows))) for case, rows in groupby(ordered, key=lambda record: record["case"])]
    panels = [(case, found) for case, found in panels if found]
    if not panels:
        return None
    rows = [panels[i : i + _COLUMNS] for i in range(0, len(panels), _COLUMNS)]
    bars = [max(len(found) for _, found in row) for row in rows]
    heights = [count * _BAR_INCHES + _PANEL_INCHES for count in bars]
    figure = Figure(figsize=(_WIDTH_INCHES, sum(heights) + _HEAD_INCHES), layout="constrained")
    _head(figure, "How many times faster is tritonq? (left of 1: the peer is faster)", chosen)
    values = [math.log2(ratio) for _, found in panels for ratio in found.values()]
    limits = min(-_LEAST_REACH, min(values) - _ROOM), max(_LEAST_REACH, max(values) + _ROOM)
    columns = min(_COLUMNS, len(panels))
    axes = figure.subplots(len(rows), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for line, row, count in zip(axes, rows, bars, strict=True):
        for axis in line[len(row) :]:
            axis.set_axis_off()
        for axis, (case, found) in zip(line, row, strict=False):
            _bars(axis, case, found, limits, count)
    return figure


def roofline_figure(chosen: Sequence[Record]) -> Figure | None:
    """Return a picture of the bytes per second of each case, over the bytes of the case.

    The line is the copy bandwidth of the same run. None if no case counts its bytes.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    points = [record for record in chosen if record.get("bytes_per_s")]
    if not points:
        return None
    figure = Figure(figsize=(10, 6.2), layout="constrained")
    _head(figure, "How close to the memory's speed?", chosen)
    axis = figure.subplots()
    copies = sorted({record["copy_bytes_per_s"] / 1e9 for record in points})
    axis.axhspan(copies[0], copies[-1], color=_INK, alpha=0.12, lw=0)
    axis.axhline(copies[-1], color=_INK, lw=1.5)
    span = f"{copies[-1]:.3g}" if len(copies) == 1 else f"{copies[0]:.3g} to {copies[-1]:.3g}"
    axis.annotate(
        f"copy bandwidth, read plus written: {span} GB/s",
        (0.01, copies[-1]),
        xycoords=("axes fraction", "data"),
        xytext=(0, 5),
        textcoords="offset points",
        color=_INK,
    )
    for place, (name, (marker, colour)) in enumerate(_MARKS.items()):
        mine = [record for record in points if record["implementation"] == name]
        if mine:
            sizes = [record["bytes_moved"] / 1e6 * _DODGE ** (place - len(_MARKS) / 2) for record in mine]
            rates = [record["bytes_per_s"] / 1e9 for record in mine]
            axis.scatter(
                sizes, rates, marker=marker, s=46, color=colour, label=name, alpha=0.85, edgecolors="white", zorder=3
            )
    axis.set_xscale("log")
    axis.set_yscale("log")
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_xlabel("MB that must move; one column of marks per case")
    axis.set_ylabel("GB/s achieved")
    axis.grid(True, which="major", color=_GRID)
    axis.set_axisbelow(True)
    _bare(axis)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def _bars(axis: Axes, case: str, found: dict[str, float], limits: tuple[float, float], slots: int) -> None:
    """Draw the panel of one case, with a bar for each peer.

    Args:
        axis: the panel.
        case: name of the case.
        found: how many times faster tritonq is than each peer.
        limits: ends of the axis as powers of two, the same for all panels.
        slots: room for so many bars, the same for all panels.
    """
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    names = sorted(found, key=lambda name: found[name])
    values = [math.log2(found[name]) for name in names]
    colours = [_FASTER if value >= 0 else _SLOWER for value in values]
    axis.barh(range(len(names)), values, color=colours, height=0.72, zorder=3)
    for position, name in enumerate(names):
        ratio, right = found[name], found[name] >= 1
        axis.annotate(
            (f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}") + _TIMES,
            (values[position], position),
            xytext=(4 if right else -4, 0),
            textcoords="offset points",
            ha="left" if right else "right",
            va="center",
            fontsize=8.5,
            color=_INK,
        )
    axis.set_xlim(*limits)
    axis.set_ylim(len(names) - slots - 0.5, len(names) - 0.5)
    axis.set_yticks(range(len(names)), names, fontsize=8.5)
    axis.xaxis.set_major_locator(FixedLocator(range(-10, 11)))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(_as_factor))
    axis.tick_params(axis="both", length=0, labelcolor=_INK)
    axis.axvline(0, color=_INK, lw=1, zorder=4)
    axis.grid(True, axis="x", color=_GRID, lw=0.8)
    axis.set_axisbelow(True)
    axis.set_title(_caption(case), fontsize=9.5, loc="left", color=_INK)
    _bare(axis)


def _as_factor(doublings: float, _: int) -> str:
    """Return 2 to the power of ``doublings`` as text: ``8`` for 3, ``1/4`` for -2."""
    return f"{2.0**doublings:g}" if doublings >= 0 else f"1/{2.0**-doublings:g}"


def _caption(case: str) -> str:
    """Return a case's name on two lines: what, then on which data."""
    family, *parts = case.split("/")
    what = " ".join([family.replace("_", " "), *parts[:1]]).replace("channel", "per channel, axis ")
    direction = parts.pop() if parts[-1] in ("forward", "forward+backward") else ""
    data = ", ".join(part.replace("x", _TIMES) if part[:1].isdigit() else part.replace("_", " ") for part in parts[1:])
    what = what.replace("fake quant tensor", "fake quant per tensor")
    return f"{what}{', ' if direction else ''}{direction.replace('+', ' + ')}\n{data}"


def _head(figure: Figure, title: str, chosen: Sequence[Record]) -> None:
    """Draw the title, machine, versions, commit and day of the results."""
    height = figure.get_figheight()
    figure.text(0.012, 1 - 0.12 / height, title, fontsize=14, fontweight="bold", color=_INK, va="top")
    figure.text(0.012, 1 - 0.43 / height, _source(chosen), fontsize=9, color=_INK, va="top")
    layout: Any = figure.get_layout_engine()
    layout.set(rect=(0, 0, 1, 1 - _HEAD_INCHES / height), h_pad=0.14)


def _source(chosen: Sequence[Record]) -> str:
    env = chosen[0]["environment"]
    commits = sorted({f"{r['environment']['commit'][:7]}{'+' if r['environment']['dirty'] else ''}" for r in chosen})
    days = sorted({record["time"][:10] for record in chosen})
    where = env["device"] if env["device_type"] == "cuda" else f"{env['device']}, {env['threads']} threads"
    return (
        f"{where} · torch {env['torch']} · triton {env['triton']} · commit {_range(commits)} · {_range(days)}"
        " · medians of interleaved runs"
    )


def _range(values: Sequence[Any]) -> str:
    return values[0] if len(values) == 1 else f"{values[0]} … {values[-1]}"


def _bare(axis: Axes) -> None:
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(_GRID)


if __name__ == "__main__":
    sys.exit(main())
