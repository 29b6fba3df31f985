"""The plan of the benchmark: what is measured, in which order, and what is left out so that it takes three hours."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from tritonq.perf.accuracy.methods import METHODS, VARIANTS
from tritonq.perf.accuracy.peers import PEERS
from tritonq.perf.accuracy.request import Method
from tritonq.perf.accuracy.schemes import SCHEMES
from tritonq.perf.accuracy.tools import TOOLS
from tritonq.recipes import EIGHT_BITS, FEW_BITS, TrainingRecipe

ALL_METHODS: dict[str, Method] = {**METHODS, **PEERS, **VARIANTS, **SCHEMES, **TOOLS}
# What everyone tries, by name; nothing freezes, since not every library can.
RECIPES: dict[str, TrainingRecipe] = {
    "low rate": TrainingRecipe(EIGHT_BITS.learning_rate, 1e-4, 0.0),
    "high rate": TrainingRecipe(FEW_BITS.learning_rate, 1e-4, 0.0),
}
_NO_TRAINING = {"no training": TrainingRecipe(0.0, 0.0, 0.0)}
_WIDTHS = ((2, 2), (4, 4), (8, 8), (2, 4), (3, 3), (4, 8))
_WIDTHS_OF_ALL = ((8, 8), (4, 4), (2, 4))
_HOURS = 3.0
# Seconds of a measurement with two threads on a quiet machine, float training and evaluation included.
_SECONDS = {
    ("garments", "residual"): 40,
    ("garments", "depthwise"): 25,
    ("pasted", "residual"): 180,
    ("pasted", "depthwise"): 110,
}


@dataclass(frozen=True)
class Measurement:
    """One training with rounding.

    Attributes:
        task: name of the data.
        net: name of the network.
        method: name of the method.
        weights: bits of weights.
        activations: bits of activations.
        seed: of the float model and of the training.
        recipe: name of learning rate and schedule.
    """

    task: str
    net: str
    method: str
    weights: int
    activations: int
    seed: int
    recipe: str

    @property
    def row(self) -> Row:
        """The row of the table to which this measurement belongs."""
        return Row(self.task, self.net, self.weights, self.activations, self.method)


@dataclass(frozen=True, order=True)
class Row:
    """A line of the table; its recipe is the one that does best on the validation split.

    Attributes:
        task: name of the data.
        net: name of the network.
        weights: bits of weights.
        activations: bits of activations.
        method: name of the method.
    """

    task: str
    net: str
    weights: int
    activations: int
    method: str

    @property
    def bits(self) -> str:
        """The bits as text, such as ``W4A4``."""
        return f"W{self.weights}A{self.activations}"

    def measurement(self, seed: int, recipe: str) -> Measurement:
        """Return the measurement of this row with a seed and a recipe."""
        return Measurement(self.task, self.net, self.method, self.weights, self.activations, seed, recipe)


@dataclass(frozen=True)
class Step:
    """The measurements of one row with one seed: of every recipe for the first seed, of the chosen one for others.

    Attributes:
        row: of the table.
        seed: 0 is the first.
    """

    row: Row
    seed: int

    @property
    def seconds(self) -> int:
        """Estimated time of all its trainings, in seconds."""
        trainings = len(recipes_of(self.row.method)) if self.seed == 0 else 1
        return trainings * _SECONDS[self.row.task, self.row.net]


@dataclass(frozen=True)
class Plan:
    """All measurements of the benchmark.

    Attributes:
        steps: in order.
        cut: steps that are left out because three hours have no room for them.
    """

    steps: Sequence[Step]
    cut: Sequence[Step]

    def describe_cut(self, measured: Collection[Step] = ()) -> list[str]:
        """Return a line per task and network that says what of it is left out and not among the ``measured`` steps."""
        begun = {(step.row.task, step.row.net) for step in (*self.steps, *measured)}
        lines: dict[tuple[str, str], dict[str, None]] = {}
        for step in self.cut:
            if step in measured:
                continue
            place = (step.row.task, step.row.net)
            cell = f"{step.row.bits} seed {step.seed}" if place in begun else "all of it"
            lines.setdefault(place, {})[cell] = None
        return [f"{task}, {net}: {', '.join(cells)}" for (task, net), cells in lines.items()]


def recipes_of(method: str) -> dict[str, TrainingRecipe]:
    """Return the recipes that a method tries, by name."""
    return RECIPES if ALL_METHODS[method].is_trained else _NO_TRAINING


def full_plan(seeds: int, hours: float = _HOURS) -> Plan:
    """Return the plan of the benchmark; the rows that tell most come first."""
    kept: list[Step] = []
    cut: list[Step] = []
    seconds = 0
    for cell in _cells(seeds):
        seconds += sum(step.seconds for step in cell)
        (kept if seconds <= 3600 * hours else cut).extend(cell)
    return Plan(kept, cut)


def quick_plan() -> Plan:
    """Return a plan that takes minutes: generated data, one seed and one width."""
    rows = [Row("garments", "residual", 2, 2, method) for method in ("LSQ", "LSQ by hand")]
    return Plan([Step(row, 0) for row in rows], [])


def tools_plan() -> Plan:
    """Return a plan of tools, variants and papers' schemes, with one seed.

    Without training they are measured at W4A8 and W3A8, with it at W4A4 and W2A2; a method with widths of its own at
    those.
    """
    rows = [
        Row("garments", net, *widths, name)
        for name, method in {**SCHEMES, **TOOLS, **VARIANTS}.items()
        for net in ("residual", "depthwise")
        for widths in method.widths or (((2, 2), (4, 4)) if method.is_trained else ((4, 8), (3, 8)))
    ]
    rows.sort(key=lambda row: (row.net != "residual", ALL_METHODS[row.method].is_trained))
    return Plan([Step(row, 0) for row in rows], [])


def _cells(seeds: int) -> Iterator[list[Step]]:
    """Yield groups of steps that are kept or left out together: all methods of a task, network, width and seed."""
    first = ("garments", "residual")
    for widths in _WIDTHS:
        yield _cell(*first, widths, 0)
    for seed in range(1, seeds):
        for widths in _WIDTHS:
            yield _cell(*first, widths, seed)
    for task, net in (("garments", "depthwise"), ("pasted", "residual"), ("pasted", "depthwise")):
        for seed in range(seeds):
            for widths in _WIDTHS:
                yield _cell(task, net, widths, seed)


def _cell(task: str, net: str, widths: tuple[int, int], seed: int) -> list[Step]:
    return [
        Step(Row(task, net, *widths, name), seed)
        for name, method in {**METHODS, **PEERS}.items()
        if method.at_all_widths or widths in _WIDTHS_OF_ALL
    ]
