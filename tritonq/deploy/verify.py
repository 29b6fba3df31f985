"""Whether a deployed model computes what was trained: codes compared layer by layer, and the outputs."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from tritonq.deploy.codes import Codes, Runner
from tritonq.deploy.fixed_point_verify import codes_read, fixed_point_layers
from tritonq.deploy.modules import Quantizer
from tritonq.deploy.program_runner import PROGRAM_SUFFIX, load_program, program_runner
from tritonq.fake_quantize import FakeQuantizeBase
from tritonq.nn.compiled import uncompiled
from tritonq.prepare.edit.earlier_inputs import earlier_names
from tritonq.prepare.record.structure import tensors_in

_QUANTIZER_NAME = "activation_post_process"


@dataclass(frozen=True)
class LayerComparison:
    """How the codes of one quantizer differ.

    Attributes:
        name: the module whose output it quantizes; the second and later calls of one module are numbered.
        codes: how many codes were compared.
        differing: how many differ.
        largest: by how many codes at most.
    """

    name: str
    codes: int
    differing: int
    largest: int

    @property
    def fraction(self) -> float:
        """``differing / codes``."""
        return self.differing / max(self.codes, 1)


@dataclass(frozen=True)
class OutputComparison:
    """How the model's outputs differ.

    Attributes:
        elements: how many numbers were compared.
        largest: largest absolute difference (NaN where one side alone is NaN).
        predictions: rows of outputs of shape (batch, classes, ...): places where a largest class exists.
        differing_predictions: in how many of them the largest class is another one.
    """

    elements: int
    largest: float
    predictions: int
    differing_predictions: int

    @property
    def agreement(self) -> float:
        """Fraction of predictions that are the same."""
        return 1.0 - self.differing_predictions / max(self.predictions, 1)


@dataclass(frozen=True)
class VerificationReport:
    """What :func:`verify` found; ``print`` it for a table.

    Attributes:
        layers: one comparison per quantizer and call, in the order in which the model runs them.
        outputs: the model's outputs, all together.
    """

    layers: tuple[LayerComparison, ...]
    outputs: OutputComparison

    @property
    def first_difference(self) -> LayerComparison | None:
        """The first layer with a code that differs, or None."""
        return next((layer for layer in self.layers if layer.differing), None)

    @property
    def total(self) -> LayerComparison:
        """All layers together."""
        return LayerComparison(
            "all layers",
            sum(layer.codes for layer in self.layers),
            sum(layer.differing for layer in self.layers),
            max((layer.largest for layer in self.layers), default=0),
        )

    def agrees(self, max_fraction: float = 0.0, max_step: int = 0) -> bool:
        """Whether in every layer at most ``max_fraction`` of the codes differ, by at most ``max_step``."""
        return all(layer.fraction <= max_fraction and layer.largest <= max_step for layer in self.layers)

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in (*self.layers, self.total))
        lines = [f"{'layer':{width}}  {'codes':>12}  {'differing':>10}  {'fraction':>9}  {'by at most':>10}"]
        lines += [
            f"{layer.name:{width}}  {layer.codes:>12,}  {layer.differing:>10,}  {layer.fraction:>9.4%}  "
            f"{layer.largest:>10}"
            for layer in (*self.layers, self.total)
        ]
        first, outputs = self.first_difference, self.outputs
        lines.append("no code differs" if first is None else f"first difference: {first.name}")
        lines.append(
            f"outputs: {outputs.elements:,} numbers, largest difference {outputs.largest:.3g}; "
            f"{outputs.differing_predictions:,} of {outputs.predictions:,} predictions differ"
        )
        return "\n".join(lines)


def verify(
    qat_model: nn.Module, deployed: nn.Module | ExportedProgram | str | os.PathLike[str], data: Any
) -> VerificationReport:
    """Run a quantization-aware model in eval mode and its deployed form on the same data, and compare their codes.

    Codes are compared at every activation quantizer, in order of execution; what differs in one layer goes on into the
    layers behind it. In a fixed-point network they are those that each layer reads, under the layer's name.

    Args:
        qat_model: the trained model; its mode is restored. A converted model will do as well.
        deployed: a converted model; the path of a file of :func:`tritonq.export_onnx`, which ONNX Runtime runs; or a
            program of :func:`tritonq.export_program`, as such or as the path of a file ``*.pt2``.
        data: one input tensor, or an iterable of batches: each a tensor, a dict of arguments, or a tuple of arguments,
            of which those are used that the model's forward requires (a data loader's labels are not).

    Raises:
        ValueError: no data, or a deployed model that was not made from ``qat_model``.
        ImportError: an ONNX file without onnx and onnxruntime (the extra ``tritonq[onnx]``).
    """
    qat_model = uncompiled(qat_model)
    run_deployed: Runner
    if isinstance(deployed, nn.Module):
        run_deployed = _torch_runner(uncompiled(deployed))
    elif isinstance(deployed, ExportedProgram):
        run_deployed = program_runner(deployed)
    elif os.fspath(deployed).endswith(PROGRAM_SUFFIX):
        run_deployed = program_runner(load_program(deployed))
    else:
        from tritonq.deploy.onnx_runner import onnx_runner

        run_deployed = onnx_runner(deployed)
    run_reference = _torch_runner(qat_model)
    tally = _Tally(earlier_names(qat_model))
    for args, kwargs in _batches(qat_model, data):
        tally.add(run_reference(args, kwargs), run_deployed(args, kwargs))
    return tally.report()


class _Tally:
    """Sums over batches.

    Args:
        earlier: what files of version 0.1.0 call quantizers, by their names in the trained model.
    """

    def __init__(self, earlier: Mapping[str, str]) -> None:
        self._earlier = earlier
        self._layers: dict[str, LayerComparison] = {}
        self._outputs: OutputComparison | None = None

    def add(self, reference: tuple[Codes, list[Tensor]], deployed: tuple[Codes, list[Tensor]]) -> None:
        (expected, expected_outputs), (found, found_outputs) = reference, deployed
        for name, earlier in self._earlier.items():
            if name in expected and earlier in found:
                # It ran once for all who read the tensor.
                found = {**found, name: found[earlier] * len(expected[name])}
        found = {name: calls for name, calls in found.items() if name not in self._earlier.values()}
        for quantizer in found:
            if quantizer not in expected:
                raise ValueError(f"the deployed model has a quantizer {quantizer!r} that the trained model lacks")
        for quantizer, calls in expected.items():
            if quantizer not in found:
                raise ValueError(f"the deployed model lacks the quantizer {quantizer!r} of the trained model")
            if len(calls) != len(found[quantizer]):
                # An exporter merges what several readers of a tensor do with one quantizer.
                calls, found = _without_repeats(calls), {**found, quantizer: _without_repeats(found[quantizer])}
            if len(calls) != len(found[quantizer]):
                counts = f"{len(calls)} times in the trained model, {len(found[quantizer])} times in the deployed one"
                raise ValueError(f"the quantizer {quantizer!r} runs {counts}")
            for index, (one, other) in enumerate(zip(calls, found[quantizer], strict=True)):
                name = _layer_name(quantizer) + (f" (call {index + 1})" if index else "")
                self._layers[name] = _added(self._layers.get(name), _compare_codes(name, one, other))
        self._outputs = _outputs_added(self._outputs, expected_outputs, found_outputs)

    def report(self) -> VerificationReport:
        if self._outputs is None:
            raise ValueError("verify needs at least one batch of data")
        return VerificationReport(tuple(self._layers.values()), self._outputs)


def _without_repeats(calls: list[Tensor]) -> list[Tensor]:
    return [call for index, call in enumerate(calls) if not any(torch.equal(call, other) for other in calls[:index])]


def _compare_codes(name: str, one: Tensor, other: Tensor) -> LayerComparison:
    if [size for size in one.shape if size != 1] == [size for size in other.shape if size != 1]:
        other = other.reshape(one.shape)  # a file may hold the codes of a mean before its axes are dropped
    if one.shape != other.shape:
        raise ValueError(f"the codes of {name!r} have shape {tuple(one.shape)} and {tuple(other.shape)}")
    # NaN has no code; one on one side alone is the largest difference there is.
    steps = torch.where(one.isnan() & other.isnan(), 0.0, (one - other).abs()).nan_to_num(nan=2.0**31)
    largest = int(steps.max()) if steps.numel() else 0
    return LayerComparison(name, one.numel(), int(torch.count_nonzero(steps)), largest)


def _added(sum_: LayerComparison | None, new: LayerComparison) -> LayerComparison:
    if sum_ is None:
        return new
    return LayerComparison(
        new.name, sum_.codes + new.codes, sum_.differing + new.differing, max(sum_.largest, new.largest)
    )


def _outputs_added(sum_: OutputComparison | None, expected: list[Tensor], found: list[Tensor]) -> OutputComparison:
    if [tuple(t.shape) for t in expected] != [tuple(t.shape) for t in found]:
        shapes = [[tuple(t.shape) for t in tensors] for tensors in (expected, found)]
        raise ValueError(f"the outputs have the shapes {shapes[0]} and {shapes[1]}")
    result = sum_ or OutputComparison(0, 0.0, 0, 0)
    for one, other in zip(expected, found, strict=True):
        distance = torch.where(one == other, 0.0, (one.double() - other.double()).abs())
        distance = distance.masked_fill(one.isnan() & other.isnan(), 0.0)
        largest = float(distance.max()) if distance.numel() else 0.0
        predictions = differing = 0
        if one.dim() >= 2 and one.numel() and one.is_floating_point():
            classes = one.argmax(1), other.argmax(1)
            predictions, differing = classes[0].numel(), int((classes[0] != classes[1]).sum())
        result = OutputComparison(
            result.elements + one.numel(),
            max(result.largest, largest) if largest == largest else largest,
            result.predictions + predictions,
            result.differing_predictions + differing,
        )
    return result


def _torch_runner(model: nn.Module) -> Runner:
    quantizers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (FakeQuantizeBase, Quantizer)) and not name.endswith("weight_fake_quant")
    }
    active = {n: m for n, m in quantizers.items() if isinstance(m, Quantizer) or m.is_enabled_on_host()}
    layers = fixed_point_layers(model)
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Codes, list[Tensor]]:
        codes: Codes = {}
        if layers:
            handles = [layer.register_forward_pre_hook(_reader(codes, name)) for name, layer in layers.items()]
        else:
            handles = [module.register_forward_hook(_recorder(codes, name)) for name, module in active.items()]
        try:
            with _eval_mode(model), torch.no_grad():
                result = model(*_moved(args, device), **_moved(kwargs, device))
        finally:
            for handle in handles:
                handle.remove()
        return codes, [tensor.detach().cpu() for _, tensor in tensors_in(result)]

    return run


def _recorder(codes: Codes, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
    def record(module: Any, args: Any, output: Tensor) -> None:
        scale = module.calculate_qparams().scale if isinstance(module, FakeQuantizeBase) else module.scale
        axis = module.qtype.axis
        shape = [1] * output.dim()
        if axis is not None:
            shape[axis] = -1
        codes.setdefault(name, []).append((output.detach().float() / scale.view(shape)).round_().cpu())

    return record


def _reader(codes: Codes, name: str) -> Callable[[nn.Module, Any], None]:
    def record(layer: nn.Module, args: Any) -> None:
        codes.setdefault(name, []).append(codes_read(layer, args[0].detach()).cpu())

    return record


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for every module, and each module's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _batches(model: nn.Module, data: Any) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    if not isinstance(data, (Tensor, Iterable)):
        raise ValueError(f"data must be a tensor or an iterable of batches, got {type(data).__name__}")
    parameters = inspect.signature(model.forward).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = max(1, sum(p.default is p.empty for p in positional))
    for batch in [data] if isinstance(data, Tensor) else data:
        if isinstance(batch, Mapping):
            yield (), dict(batch)
        elif isinstance(batch, Sequence):
            yield tuple(batch[:required]), {}
        else:
            yield (batch,), {}


def _moved(item: Any, device: torch.device) -> Any:
    if isinstance(item, dict):
        return {key: _moved(value, device) for key, value in item.items()}
    if isinstance(item, tuple):
        return tuple(_moved(value, device) for value in item)
    return item.to(device) if isinstance(item, Tensor) else item


def _layer_name(quantizer: str) -> str:
    return quantizer.removesuffix(_QUANTIZER_NAME).removesuffix(".") or quantizer
