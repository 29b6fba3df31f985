"""The result of the demo: its files, the accuracy of each *form* of the model, and a table of both.

The forms are the float model, the fine-tuned one, the converted one, and the ONNX file in ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tritonq.deploy import VerificationReport
from tritonq.deploy.comparisons import ISLAND_STEP
from tritonq.report.run import DEMO_FILE


@dataclass(frozen=True)
class Files:
    """Paths of the files that a run writes, all in one folder.

    Attributes:
        float_model: the float model's state dict.
        qat_model: the prepared model's checkpoint, which ``report`` reads.
        converted: the converted model.
        onnx: the ONNX file.
        picture: of loss curves and of a layer's weights.
    """

    float_model: Path
    qat_model: Path
    converted: Path
    onnx: Path
    picture: Path

    @classmethod
    def inside(cls, folder: Path, form: str = "int8") -> Files:
        """Return the paths in ``folder``, which is created if it is missing, with its parents.

        ``form``, "int8" or "f8net", names the kind of integers in the converted model's file: ``model.int8.pt``.
        """
        folder.mkdir(parents=True, exist_ok=True)
        names = ("model.float.pt", DEMO_FILE, f"model.{form}.pt", "model.onnx", "demo.png")
        return cls(*(folder / name for name in names))


@dataclass(frozen=True)
class Stage:
    """One form of the model and how it did on the test set.

    Attributes:
        name: which form, as the table calls it, such as "QAT (eval)".
        accuracy: fraction of test images classified correctly.
        file: that of the model, whose size the table shows; None for the fine-tuned model, whose file it leaves out.
        seconds_per_epoch: of its training; None for forms that are not trained.
        report: of `verify`: its codes and predictions against those of the fine-tuned model; None for forms that were
            not deployed from that model.
    """

    name: str
    accuracy: float
    file: Path | None = None
    seconds_per_epoch: float | None = None
    report: VerificationReport | None = None


@dataclass(frozen=True)
class Result:
    """The demo's result.

    Attributes:
        stages: a :class:`Stage` for each form of the model: float, fine-tuned, converted, ONNX Runtime, in this order.
        files: the paths of what was written.
    """

    stages: tuple[Stage, ...]
    files: Files

    @property
    def agrees(self) -> bool:
        """Whether no code of a deployed form differs from the fine-tuned model's by more than is allowed.

        Forms whose stage has a report are compared. No difference is allowed, except behind an island, such as an
        operation in float that adds in no defined order: there any number of codes may differ by one.
        """
        return self.disagreement is None

    @property
    def disagreement(self) -> str | None:
        """A sentence about the first deployed form that disagrees with the fine-tuned model; None: all agree.

        It has the first layer with more differences than are allowed: "ONNX Runtime disagrees with the trained model: 3
        of 1,000 codes of stem.0 differ, by up to 1; allowed: none".
        """
        for stage in self.stages:
            worst = None if stage.report is None else stage.report.first_beyond()
            if worst is not None:
                allowed = "none"
                if worst.island:
                    allowed = f"differences of {ISLAND_STEP}, since {', '.join(worst.island)} adds in no defined order"
                return (
                    f"{stage.name} disagrees with the trained model: {worst.differing:,} of {worst.codes:,} codes of "
                    f"{worst.name or 'the output'} differ, by up to {worst.largest}; allowed: {allowed}"
                )
        return None


def table(stages: Sequence[Stage]) -> str:
    """Return a table as text: a header, a line, and one line per stage.

    Columns are name, accuracy ("97.11%"), predictions that differ from those of the fine-tuned model in eval mode ("3
    of 100"), codes that differ from its codes, with the largest difference if any does ("3 of 100, by 1"), size of the
    file ("12.3 kB"), and seconds per epoch of training. "-" stands for what a stage does not have.

    Raises:
        FileNotFoundError: the file of a stage does not exist.
    """
    header = ("model", "accuracy", "predictions that differ", "codes that differ", "file", "s/epoch")
    rows = [header, *map(_cells, stages)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "  ".join("─" * width for width in widths), *lines[1:]])


def _cells(stage: Stage) -> tuple[str, ...]:
    predictions = codes = "-"
    if stage.report is not None:
        total, outputs = stage.report.total, stage.report.outputs
        predictions = f"{outputs.differing_predictions} of {outputs.predictions}"
        codes = f"{total.differing:,} of {total.codes:,}" + (f", by {total.largest}" if total.differing else "")
    return (
        stage.name,
        f"{stage.accuracy:.2%}",
        predictions,
        codes,
        "-" if stage.file is None else f"{stage.file.stat().st_size / 1000:.1f} kB",
        "-" if stage.seconds_per_epoch is None else f"{stage.seconds_per_epoch:.2f}",
    )
