"""The results file: a JSON line per measurement, and one per row whose test answers were read."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tritonq.perf.accuracy.plan import ALL_METHODS, Measurement, Row, Step, recipes_of

Record = dict[str, Any]


@dataclass(frozen=True)
class Results:
    """The measurements that were made with today's settings.

    Attributes:
        measured: records by measurement.
        tested: accuracies of the test split by measurement, for chosen recipes.
        failed: errors by measurement.
    """

    measured: dict[Measurement, Record]
    tested: dict[Measurement, float]
    failed: dict[Measurement, str]

    def rows(self) -> list[Row]:
        """Return the rows that have a measurement, in order."""
        return sorted({item.row for item in self.measured})

    def seeds_of(self, row: Row) -> list[int]:
        """Return the seeds of a row that are measured with its chosen recipe."""
        recipe = self.choice(row)
        return sorted(item.seed for item in self.measured if item.row == row and item.recipe == recipe)

    def steps(self) -> set[Step]:
        """Return the rows and seeds that are measured with the row's chosen recipe."""
        return {Step(row, seed) for row in self.rows() for seed in self.seeds_of(row)}

    def choice(self, row: Row) -> str | None:
        """Return the recipe that is best on the validation split of seed 0; None as long as not all were tried."""
        tried = {recipe: self.measured.get(row.measurement(0, recipe)) for recipe in recipes_of(row.method)}
        found = {recipe: record["validation"] for recipe, record in tried.items() if record is not None}
        return max(found, key=found.__getitem__) if len(found) == len(tried) else None

    def chosen(self, row: Row) -> list[Record]:
        """Return the records of all seeds with the chosen recipe; as long as none is chosen, with the best so far."""
        recipe = self.choice(row)
        if recipe is None:
            tried = [record for item, record in self.measured.items() if item.row == row]
            return [max(tried, key=lambda record: record["validation"])] if tried else []
        return [self.measured[row.measurement(seed, recipe)] for seed in self.seeds_of(row)]

    def test_accuracies(self, row: Row) -> list[float]:
        """Return the accuracies of the test split that were read, one per seed."""
        recipe = self.choice(row)
        items = [] if recipe is None else [row.measurement(seed, recipe) for seed in self.seeds_of(row)]
        return [self.tested[item] for item in items if item in self.tested]


def mean_and_spread(values: Iterable[float]) -> str:
    """Return the mean as text, followed by the standard deviation if there are several values."""
    found = list(values)
    mean = f"{statistics.mean(found):.2f}"
    return f"{mean} ± {statistics.stdev(found):.2f}" if len(found) > 1 else mean


def settings_of(item: Measurement) -> Record:
    """Return the settings of a measurement; a record with others does not count."""
    return {"revision": ALL_METHODS[item.method].revision, **asdict(recipes_of(item.method)[item.recipe])}


def read(path: Path) -> Results:
    """Return the results in a file.

    A line that was cut off is left out, and so are records of other settings than today's. Of several records of a
    measurement the last one counts; an accuracy of the test split belongs to the record before it.
    """
    measured: dict[Measurement, Record] = {}
    failed: dict[Measurement, str] = {}
    tested: dict[Measurement, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        item = Measurement(**{field.name: record[field.name] for field in fields(Measurement)})
        if item.method not in ALL_METHODS or item.recipe not in recipes_of(item.method):
            continue
        if record["settings"] != settings_of(item):
            continue
        if "failed" in record:
            failed[item] = record["failed"]
        elif "test" in record:
            tested[item] = record["test"]
        else:
            measured[item] = record
            tested.pop(item, None)
    return Results(measured, {item: value for item, value in tested.items() if item in measured}, failed)


def append(path: Path, item: Measurement, values: Record) -> None:
    """Append a line with the values of a measurement."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**asdict(item), "settings": settings_of(item), **values}, allow_nan=False) + "\n")
