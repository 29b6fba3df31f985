"""The results as a picture: the accuracy that each method loses against the float model, by number of bits."""

from __future__ import annotations

import statistics
from pathlib import Path

from tritonq.perf.accuracy.methods import METHODS
from tritonq.perf.accuracy.peers import PEERS
from tritonq.perf.accuracy.results import Results

# Colour-blind safe (Okabe and Ito); other libraries are grey to black.
_COLOURS = {
    **{"LSQ": "#0072b2", "LSQ+": "#56b4e9", "ranges": "#009e73"},
    **{"PACT": "#e69f00", "TQT": "#cc79a7", "F8Net": "#d55e00"},
}
_MARKS = {
    **{"LSQ by hand": "x", "Brevitas": "s", "Brevitas MSE": "D", "PT2E": "^", "torch.ao": "v"},
    **{"Model-Optimizer": "*", "AIMET": "P"},
}


def draw(found: Results, path: Path, task: str = "garments", net: str = "residual") -> None:
    """Draw the loss of every method of the full plan at every width of a task and network.

    Raises:
        ImportError: matplotlib is not installed (extra ``report``).
        ValueError: nothing of the task and network is measured.
    """
    from matplotlib.figure import Figure

    planned = [*METHODS, *PEERS]
    rows = [row for row in found.rows() if (row.task, row.net) == (task, net) and row.method in planned]
    if not rows:
        raise ValueError(f"nothing is measured of {task} with the {net} network")
    widths = sorted({(row.weights, row.activations) for row in rows}, reverse=True)
    methods = [name for name in planned if any(row.method == name for row in rows)]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for place, name in enumerate(methods):
        losses = {}
        for row in rows:
            if row.method == name:
                records = found.chosen(row)
                place_of_row = widths.index((row.weights, row.activations)) + (place / len(methods) - 0.5) * 0.7
                losses[place_of_row] = statistics.mean(record["validation"] - record["float"] for record in records)
        axes.plot(
            list(losses),
            list(losses.values()),
            linestyle="none",
            marker=_MARKS.get(name, "o"),
            color=_COLOURS.get(name, "#777777"),
            label=name,
        )
    axes.axhline(0, color="#222222", linewidth=0.8)
    axes.set_xticks(range(len(widths)), [f"W{weights}A{activations}" for weights, activations in widths])
    axes.set_ylabel("validation accuracy less float's, points")
    axes.set_yscale("symlog", linthresh=2)
    lowest = min(axes.get_ylim()[0], -1.0)
    marks = [mark for mark in (1, 0, -1, -2, -5, -10, -20, -50, -90) if mark >= lowest]
    axes.set_yticks(marks, [f"{mark:g}" for mark in marks])
    axes.set_ylim(lowest, 1)
    axes.grid(axis="y", color="#d9d9d9")
    axes.legend(fontsize="small", ncols=2, loc="lower left")
    figure.savefig(path, dpi=120)
