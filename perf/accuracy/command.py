"""The command: measure accuracy at few bits, of tritonq and of other libraries, as far as it is not measured yet."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tritonq.perf.accuracy import results
from tritonq.perf.accuracy.data import Task, generate, load
from tritonq.perf.accuracy.measure import FULL, QUICK, Budget, is_installed, measure, test_accuracy
from tritonq.perf.accuracy.page import markdown, text
from tritonq.perf.accuracy.plan import Measurement, Plan, full_plan, quick_plan, recipes_of, tools_plan


def main(arguments: list[str] | None = None) -> int:
    """Measure what the results file lacks, print a table, and return 0 when everything is done."""
    parser = argparse.ArgumentParser(prog="python -m tritonq.perf.accuracy", description=__doc__)
    parser.add_argument("data", type=Path, nargs="?", help="folder with Fashion-MNIST's four idx files")
    parser.add_argument("--out", type=Path, default=Path("accuracy-output"), help="where results and models go")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin no further measurement after so long")
    parser.add_argument("--hours", type=float, default=3.0, help="of the whole plan; what it has no room for is cut")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", default="", help="part of a name such as 'garments residual W2A2 LSQ', to do first")
    parser.add_argument("--tools", action="store_true", help="measure tools, variants and schemes of papers instead")
    parser.add_argument("--page", type=Path, help="write the table into this Markdown page, between its marks")
    parser.add_argument("--picture", type=Path, help="draw the accuracies into this file (extra report)")
    parser.add_argument(
        "--quick", action="store_true", help="generated data, one width and seed: a test of the command"
    )
    given = parser.parse_args(arguments)
    path = given.out / ("quick.jsonl" if given.quick else "results.jsonl")
    plan = tools_plan() if given.tools else full_plan(given.seeds, given.hours)
    plan = quick_plan() if given.quick else plan
    if given.page or given.picture:
        return _show(path, plan, given.page, given.picture)
    if given.data is None and not given.quick:
        parser.error("data is needed: Debian's package dataset-fashion-mnist has it, or any copy of the four files")
    given.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as generated:
        folder, budget = given.data or Path(generated), QUICK if given.quick else FULL
        if given.data is None:
            generate(folder, budget.images + budget.held_out, budget.held_out)
        _work(plan, path, _Tasks(folder, budget), given.only, time.monotonic() + 60 * given.minutes)
    found = results.read(path)
    print(text(found))
    for item, error in found.failed.items():
        print(f"failed: {item.row.bits} {item.method}, seed {item.seed}, {item.recipe}: {error}")
    for line in plan.describe_cut(found.steps()):
        print(f"cut: {line}")
    left = len(list(_missing(plan, path, "")))
    if left:
        print(f"at least {left} measurements are left: run the command again")
    return 1 if left else 0


class _Tasks:
    """The data of each task, loaded when it is first needed."""

    def __init__(self, folder: Path, budget: Budget) -> None:
        self.folder, self.budget = folder, budget
        self._loaded: dict[str, Task] = {}

    def __getitem__(self, name: str) -> Task:
        if name not in self._loaded:
            sizes = (self.budget.images, self.budget.held_out, self.budget.tested)
            self._loaded[name] = load(self.folder, *sizes, several_labels=name == "pasted")
        return self._loaded[name]


def _work(plan: Plan, path: Path, tasks: _Tasks, only: str, until: float) -> None:
    """Measure until the time is over, then compare the test answers of rows whose seeds are all measured."""
    while time.monotonic() < until:
        item = next(_missing(plan, path, only), None)
        if item is None:
            break
        try:
            values = measure(item, tasks[item.task], tasks.budget, path.parent)
        except Exception as error:  # a library that can't do it must not stop the others
            results.append(path, item, {"failed": f"{type(error).__name__}: {error}"[:300]})
            print(f"{item}: failed, {error}", file=sys.stderr, flush=True)
            continue
        results.append(path, item, values)
        _tell(item, values)
    found = results.read(path)
    for row in found.rows():
        recipe = found.choice(row)
        for seed in found.seeds_of(row) if recipe is not None else ():
            item = row.measurement(seed, str(recipe))
            if item not in found.tested:
                accuracy = test_accuracy(item, tasks[row.task], path.parent)
                if accuracy is not None:
                    results.append(path, item, {"test": accuracy})


def _missing(plan: Plan, path: Path, only: str) -> Iterator[Measurement]:
    """Yield the measurements that are missing, in order; those of later seeds only when the row's recipe is chosen."""
    found = results.read(path)
    for step in plan.steps:
        row = step.row
        name = f"{row.task} {row.net} {row.bits} {row.method} seed {step.seed}"
        if not is_installed(row.method) or only not in name:
            continue
        choice = found.choice(row)
        recipes = list(recipes_of(row.method)) if step.seed == 0 else [choice] if choice is not None else []
        for recipe in recipes:
            item = row.measurement(step.seed, recipe)
            if item not in found.measured and item not in found.failed:
                yield item


def _tell(item: Measurement, values: results.Record) -> None:
    print(
        f"{item.task} {item.net} {item.row.bits} {item.method}, seed {item.seed}, {item.recipe}: "
        f"{values['validation']:.2f} (float {values['float']:.2f})",
        file=sys.stderr,
        flush=True,
    )


def _show(path: Path, plan: Plan, page: Path | None, picture: Path | None) -> int:
    found = results.read(path)
    if page is not None:
        markdown(found, plan, page)
    if picture is not None:
        from tritonq.perf.accuracy.picture import draw

        draw(found, picture)
    return 0
