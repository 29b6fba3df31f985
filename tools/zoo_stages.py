"""Try one model for `make zoo`: every stage from `prepare_qat` to ONNX Runtime, in this process.

    python tools/zoo_stages.py timm/resnet18 result.json

A stage is a method of :class:`Trial`. It returns None if it passed, or why it was skipped, and raises if it failed.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree

import tritonq
import zoo_models
from integer_nodes import float_parts
from tritonq.deploy.verify import VerificationReport
from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.prepare.record.example import example_arguments

STAGES = (
    *("prepare", "eval output", "training output", "three steps", "gradients", "eval", "convert", "save and load"),
    *("verify", "ONNX", "integer nodes"),
)
STEPS = 3
# Folding BatchNorms rounds otherwise than applying them; relative to the largest output.
TOLERANCE = 2e-3
TOLERANCE_FLOAT64 = 1e-9
# How many names an error shows.
NAMES = 5
# The share of codes that may differ in ONNX Runtime, and by how many: islands in float (softmax, LayerNorm) have ties.
ONNX_TOLERANCE = (0.01, 1)


class StageError(Exception):
    """Raised by a stage whose check failed; the message says how."""


@dataclass
class Result:
    """What came of one model.

    Attributes:
        name: the model.
        parameters: how many numbers its parameters hold.
        stages: by stage, "ok", "skipped: why", or what failed.
        seconds: by stage, how long it took.
        layers: quantized layers with weights, and all of them.
        joins: the same for additions, products, differences and concatenations.
        in_float: name and reason of each that stays in float.
    """

    name: str
    parameters: int = 0
    stages: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    layers: tuple[int, int] = (0, 0)
    joins: tuple[int, int] = (0, 0)
    in_float: list[tuple[str, str]] = field(default_factory=list)


class Trial:
    """The stages of one model, in order. A stage that fails ends those that need it."""

    def __init__(self, name: str) -> None:
        self.result = Result(name)
        self.name = name
        self.example = zoo_models.example(name)
        self.float_model = self.example.model.eval()
        self.result.parameters = sum(parameter.numel() for parameter in self.float_model.parameters())
        self.trainable = True
        self.folder = Path(tempfile.mkdtemp())

    def run(self) -> Result:
        """Run all stages; return the result."""
        steps: tuple[Callable[[], str | None], ...] = (
            *(self.prepare, self.eval_output, self.training_output, self.three_steps, self.gradients, self.eval),
            *(self.convert, self.save_and_load, self.verify, self.onnx, self.integer_nodes),
        )
        for stage, step in zip(STAGES, steps, strict=True):
            begin = time.perf_counter()
            try:
                self.result.stages[stage] = step() or "ok"
            except Exception as error:
                text = str(error) if isinstance(error, StageError) else f"{type(error).__name__}: {error}"
                self.result.stages[stage] = " ".join(text.split())[:400]
                if stage in ("prepare", "convert"):
                    break
            self.result.seconds[stage] = round(time.perf_counter() - begin, 2)
        return self.result

    def prepare(self) -> None:
        """Prepare the model, and count what stays in float."""
        self.prepared = tritonq.prepare_qat(
            self.float_model,
            example_inputs=self.example.inputs,
            training_inputs=self.example.training_inputs,
            warn=False,
        )
        rows = tritonq.summary(self.prepared).layers
        layers, joins = ([row for row in rows if row.part == part] for part in ("layer", "join"))
        self.result.layers = sum(row.status == "quantized" for row in layers), len(layers)
        self.result.joins = sum(row.status == "quantized" for row in joins), len(joins)
        self.result.in_float = [(row.name, row.reason) for row in (*layers, *joins) if row.status == "float"]

    def eval_output(self) -> None:
        """Compare outputs in eval mode, with rounding off."""
        self._compare_forms(self._outputs(self.float_model, False), False)

    def _compare_forms(self, expected: list[Tensor], training: bool) -> None:
        """Compare outputs of the float model with those of the prepared model while nothing is rounded.

        If they differ in float32, they are compared in float64: a BatchNorm over few values multiplies what rounding to
        float32 does.
        """
        prepared = _without_rounding(self.prepared)
        try:
            _compare(expected, self._outputs(prepared, training))
        except StageError:
            wide = self._outputs(copy.deepcopy(self.float_model).double(), training, torch.float64)
            _compare(wide, self._outputs(prepared.double(), training, torch.float64), TOLERANCE_FLOAT64)

    def training_output(self) -> str | None:
        """Compare outputs in training mode, with rounding off and the same random numbers."""
        try:
            expected = self._outputs(copy.deepcopy(self.float_model), True)
        except Exception as error:
            self.trainable = False
            return f"skipped: the float model raises {type(error).__name__}"
        self._compare_forms(expected, True)
        return None

    def three_steps(self) -> str | None:
        """Train for three steps with a loss that reads every output."""
        if not self.trainable:
            return "skipped: the float model does not train"
        optimizer = torch.optim.SGD(self.prepared.parameters(), lr=1e-4)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = self._loss(self.prepared)
            if not bool(loss.isfinite()):
                raise StageError("the loss is not finite")
            loss.backward()
            optimizer.step()
        return None

    def gradients(self) -> str | None:
        """Check that as many parameters get a gradient in the prepared model as in the float model."""
        if not self.trainable:
            return "skipped: the float model does not train"
        model = copy.deepcopy(self.float_model)
        self._loss(model).backward()
        missing = [sum(p.grad is None for p in found.parameters()) for found in (model, self.prepared)]
        if missing[1] > missing[0]:
            raise StageError(f"{missing[1]} parameters without a gradient, in float {missing[0]}")
        return None

    def eval(self) -> None:
        """Run the trained model in eval mode."""
        self.trained = self._outputs(self.prepared, False)
        if any(not bool(tensor.isfinite().all()) for tensor in self.trained):
            raise StageError("an output is not finite")

    def convert(self) -> None:
        """Convert the model, and compare it with eval mode bit for bit."""
        self.converted = tritonq.convert(self.prepared, allow_unquantized=not self.trainable)
        _compare(self.trained, self._outputs(self.converted, False), tolerance=0.0)

    def save_and_load(self) -> None:
        """Write the converted model, load it into a new float model, and compare bit for bit."""
        path = self.folder / "converted.pt"
        tritonq.save_converted(self.converted, path)
        loaded = tritonq.load_converted(path, zoo_models.example(self.name).model)
        _compare(self.trained, self._outputs(loaded, False), tolerance=0.0)

    def verify(self) -> None:
        """Compare the codes of the converted model with those of the trained one."""
        report = tritonq.verify(self.prepared, self.converted, [self.example.inputs])
        if not report.agrees():
            raise StageError(_disagreement(report))

    def onnx(self) -> str | None:
        """Export the model and run it in ONNX Runtime: no code may differ except in islands."""
        try:
            tritonq.export_onnx(self.converted, self._file(), self.example.inputs, dynamic_batch=False)
        except ValueError:
            args, kwargs = example_arguments(copy.deepcopy(self.example.inputs))
            try:
                torch.onnx.export(self.float_model.eval(), args, kwargs=kwargs, dynamo=True, verbose=False)
            except torch.onnx.errors.OnnxExporterError:
                return "skipped: torch can't export the float model either"
            raise
        report = tritonq.verify(self.prepared, self._file(), [self.example.inputs])
        if not report.agrees(*ONNX_TOLERANCE):
            raise StageError(_disagreement(report))
        wrong = [layer.name for layer in report.layers if layer.differing and not layer.island]
        if wrong:
            raise StageError(f"codes differ outside of islands, in {len(wrong)} layers: {', '.join(wrong[:NAMES])}")
        return None

    def integer_nodes(self) -> str | None:
        """Check that ONNX Runtime computes every layer and join that `summary` calls quantized in integers."""
        if not self._file().exists():
            return "skipped: there is no file"
        found = float_parts(tritonq.summary(self.prepared), self._file())
        if found:
            raise StageError(f"{len(found)} in float: {', '.join(found[:NAMES])}")
        return None

    def _file(self) -> Path:
        return self.folder / "model.onnx"

    def _outputs(self, model: nn.Module, training: bool, dtype: torch.dtype | None = None) -> list[Tensor]:
        with torch.no_grad():
            return [tensor.detach() for tensor in self._run(model, training, dtype)]

    def _loss(self, model: nn.Module) -> Tensor:
        tensors = [tensor for tensor in self._run(model, True) if tensor.requires_grad]
        return torch.stack([tensor.float().square().mean() for tensor in tensors]).mean()

    def _run(self, model: nn.Module, training: bool, dtype: torch.dtype | None = None) -> list[Tensor]:
        other = self.example.training_inputs
        inputs = copy.deepcopy(other if training and other is not None else self.example.inputs)
        if dtype is not None:
            inputs = _pytree.tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, inputs)
        torch.manual_seed(2)
        if model.training != training:
            model.train(training)
        args, kwargs = example_arguments(inputs)
        return list(_floating(model(*args, **kwargs)))


def _disagreement(report: VerificationReport) -> str:
    total, first = report.total, report.first_difference
    where = "an output" if first is None else first.name
    return f"{total.fraction:.2%} of the codes differ, by at most {total.largest}; first in {where}"


def _without_rounding(prepared: nn.Module) -> nn.Module:
    model = copy.deepcopy(prepared)
    for module in model.modules():
        if isinstance(module, FakeQuantizeBase):
            module.disable_fake_quant()
            module.disable_observer()
    return model


def _floating(result: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors of a model's output."""
    if hasattr(result, "to_tuple"):
        result = result.to_tuple()
    for leaf in _pytree.tree_leaves(result):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield leaf


def _compare(expected: list[Tensor], got: list[Tensor], tolerance: float = TOLERANCE) -> None:
    if [tensor.shape for tensor in expected] != [tensor.shape for tensor in got]:
        raise StageError(f"{len(got)} outputs of other shapes instead of {len(expected)}")
    for index, (a, b) in enumerate(zip(expected, got, strict=True)):
        largest = float(a.abs().max()) if a.numel() else 0.0
        error = float((a - b).abs().max()) if a.numel() else 0.0
        if not error <= tolerance * largest:
            raise StageError(f"output {index} differs by {error:.2g}, its largest value is {largest:.2g}")


def main() -> None:
    """Try the model that the command line names, and write the result to the file that it names."""
    name, path = sys.argv[1:]
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    warnings.simplefilter("ignore")
    result = Trial(name).run()
    Path(path).write_text(json.dumps(vars(result)))


if __name__ == "__main__":
    main()
