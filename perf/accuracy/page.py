"""The results as tables, for a terminal and for a page of the documentation."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path

from tritonq.perf.accuracy.plan import ALL_METHODS, Plan, Row
from tritonq.perf.accuracy.results import Record, Results, mean_and_spread

BEGIN, END = "<!-- accuracy: written by python -m tritonq.perf.accuracy --page -->", "<!-- accuracy: end -->"
_HEAD = ("bits", "method", "float", "validation", "test", "seeds", "recipe", "differing outputs", "s/epoch", "saved MB")


def text(found: Results) -> str:
    """Return a table with one aligned line per row."""
    lines = [("task", "net", *_HEAD), *((row.task, row.net, *_cells(found, row)) for row in found.rows())]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def markdown(found: Results, plan: Plan, page: Path) -> None:
    """Write a table per task and network, what was left out, and the versions, between the two markers of a page.

    Raises:
        ValueError: the page lacks the markers.
    """
    before = page.read_text(encoding="utf-8")
    if before.count(BEGIN) != 1 or before.count(END) != 1:
        raise ValueError(f"{page} needs the lines {BEGIN!r} and {END!r}, once each")
    head, _, rest = before.partition(BEGIN)
    tail = rest.partition(END)[2]
    page.write_text(f"{head}{BEGIN}\n{_sections(found, plan)}\n{END}{tail}", encoding="utf-8")


def _sections(found: Results, plan: Plan) -> str:
    parts: list[str] = []
    rows = found.rows()
    for task, net in dict.fromkeys((row.task, row.net) for row in rows):
        lines = [f"\n{task}, {net} network:\n", _line(_HEAD), _line("---" for _ in _HEAD)]
        chosen = [row for row in rows if (row.task, row.net) == (task, net)]
        lines += [_line(_cells(found, row)) for row in sorted(chosen, key=lambda row: _order(found, row))]
        parts.append("\n".join(lines))
    planned, measured = set(plan.steps), found.steps()
    if planned - measured:
        parts.append(f"\n{len(planned - measured)} of {len(planned)} rows and seeds of the plan are not measured yet.")
    if found.failed:
        errors = (f"{item.method} at {item.row.bits} ({error})" for item, error in found.failed.items())
        parts.append("\nFailed: " + "; ".join(dict.fromkeys(errors)) + ".")
    cut = plan.describe_cut(measured)
    if cut:
        parts.append("\nCut from the plan, for want of time: " + "; ".join(cut) + ".")
    parts.append("\n" + _measured_with(found))
    return "\n".join(parts)


def _measured_with(found: Results) -> str:
    records = list(found.measured.values())
    if not records:
        return "Nothing is measured yet."
    versions = {name: number for record in records for name, number in record["versions"].items() if number}
    versions["tritonq"] = records[-1]["environment"]["tritonq"]
    commits = sorted({str(record["environment"]["commit"])[:7] for record in records})
    devices = sorted({record["environment"]["device"] for record in records})
    named = ", ".join(f"{name} {number}" for name, number in sorted(versions.items()))
    return (
        f"Measured with {named}; on {', '.join(devices)}; commits {', '.join(commits)}. Seconds per epoch hold for one "
        "thread of a machine that did other things too."
    )


def _order(found: Results, row: Row) -> tuple[int, int, float]:
    return row.weights, row.activations, -_mean(found.chosen(row), "validation")


def _cells(found: Results, row: Row) -> tuple[str, ...]:
    records = found.chosen(row)
    tested = found.test_accuracies(row)
    choice = found.choice(row)
    differing = [record["different_outputs"] for record in records if "different_outputs" in record]
    library = ALL_METHODS[row.method].library
    return (
        row.bits,
        row.method if library in (row.method, "by hand") else f"{library}: {row.method}",
        f"{_mean(records, 'float'):.2f}",
        mean_and_spread(record["validation"] for record in records),
        mean_and_spread(tested) if tested else "-",
        str(len(records)),
        choice or "not chosen yet",
        str(max(differing)) if differing else "-",
        f"{_mean(records, 'seconds_per_epoch'):.0f}",
        f"{_mean(records, 'saved_bytes') / 1e6:.1f}",
    )


def _mean(records: list[Record], name: str) -> float:
    return float(statistics.mean(record[name] for record in records))


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
