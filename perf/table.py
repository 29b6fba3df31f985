"""Records of measurements as text for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from tritonq.perf.records import Record

_COLUMNS = ("implementation", "median", "p20 … p80", "speed-up", "of copy", "memory")

# Longest unit first that leaves a number of at least one.
_TIME_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def render(written: Sequence[Record]) -> str:
    """Return a block per case, a line per implementation; cases that were not run come last, by name."""
    if not written:
        return "nothing was measured"
    blocks = [_machine(written[0])]
    idle: list[str] = []
    for case, group in groupby(written, key=lambda record: record["case"]):
        rows = list(group)
        if all(row["status"].startswith("not run") for row in rows):
            idle.append(f"  {case}: {rows[0]['status']}")
        else:
            timed = [_cells(row) for row in rows if "median_s" in row]
            blocks.append(
                "\n".join([_title(rows[0]), *aligned([_COLUMNS, *timed]), *_differences(rows), *_untimed(rows)])
            )
    if idle:
        blocks.append("\n".join(["not run:", *idle]))
    return "\n\n".join(blocks)


def duration(seconds: float) -> str:
    """Return ``seconds`` with three digits and a unit."""
    size, unit = next((entry for entry in _TIME_UNITS if seconds >= entry[0]), _TIME_UNITS[-1])
    return f"{seconds / size:.3g} {unit}"


def _machine(record: Record) -> str:
    env = record["environment"]
    copy = record["copy_bytes_per_s"]
    lines = [
        f"{env['device']}, {env['threads']} threads, torch {env['torch']}, triton {env['triton']}, "
        f"python {env['python']}, commit {str(env['commit'])[:7]}{' with changes' if env['dirty'] else ''}"
    ]
    if env["driver"]:
        lines.append(f"driver {env['driver']}")
    if copy:
        lines.append(f"copy bandwidth {copy / 1e9:.1f} GB/s, read plus written")
    return "\n".join(lines)


def _title(record: Record) -> str:
    moved = f"{record['bytes_moved'] / 1e6:.3g} MB must move; " if record["bytes_moved"] else ""
    return f"{record['case']}  ({moved}speed-up against {record['baseline']})"


def _cells(record: Record) -> tuple[str, ...]:
    spread = f"{duration(record['p20_s'])} … {duration(record['p80_s'])}"
    ratio = f"{record['speed_up']:.2f}x" if "speed_up" in record else "no baseline"
    fraction = record.get("copy_fraction")
    memory = record.get("memory_bytes")
    return (
        record["implementation"],
        duration(record["median_s"]),
        spread,
        ratio,
        f"{fraction:.0%}" if fraction else "",
        f"{memory / 2**20:.1f} MiB" if memory is not None else "",
    )


def _differences(rows: Iterable[Record]) -> list[str]:
    """Return one line for each timed implementation that computes less than tritonq, or something else."""
    return [
        f"  {row['implementation']} differs: {row['leaves_out']}"
        for row in rows
        if "median_s" in row and row.get("leaves_out")
    ]


def _untimed(rows: Iterable[Record]) -> list[str]:
    """Return one line for each reason why something was not timed, with the implementations that it holds for."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if "median_s" not in row:
            reasons.setdefault(row["status"], []).append(row["implementation"])
    return [f"  {', '.join(names)}: {reason}" for reason, names in reasons.items()]


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the rows as lines whose columns are as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
