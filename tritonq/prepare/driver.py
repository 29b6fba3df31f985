"""Run the steps of `prepare_qat` on a recorded model: decide, edit, check."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from tritonq.fixed_point_fake_quantize import set_fixed_point_phase
from tritonq.nn.call_arguments import by_position
from tritonq.prepare.changes import note_report
from tritonq.prepare.check import check_same_output, first_ranges
from tritonq.prepare.decide.analysis import Analysis, EditableForward
from tritonq.prepare.decide.fixed_point import Links, find_links, is_fixed_point
from tritonq.prepare.decide.layer_records import LayerRecord, fixed_point_records, layer_records
from tritonq.prepare.decide.plan import Plan
from tritonq.prepare.decide.planner import make_plan
from tritonq.prepare.edit.editor import ModelEditor
from tritonq.prepare.edit.fake_quant import Types, apply_plan
from tritonq.prepare.edit.fixed_point import build_fixed_point
from tritonq.prepare.messages import report_float_layers
from tritonq.prepare.record.example import Recording
from tritonq.prepare.record.snapshot import ModelSnapshot, preserved_random_state
from tritonq.prepare.record.structure import clone_tensors
from tritonq.qconfig import QConfig
from tritonq.qconfig_mapping import Place

_log = logging.getLogger("tritonq")


class Scheme(Protocol):
    """A way to quantize a recorded model: fake quantization or fixed point."""

    def layer_names(self) -> list[str]:
        """Return the names of the layers that it quantizes; "" is the model itself."""

    def edit(self, editor: ModelEditor) -> tuple[LayerRecord, ...]:
        """Edit the model by ``editor``, and return a record of what became of each layer.

        Raises:
            ValueError: a layer can't be quantized; the message names it.
        """

    def check(self) -> None:
        """Raise RuntimeError unless the edited model computes what the float model did; then get it ready to train.

        Its quantizers get first ranges, or in fixed point the phase ``"fixed"``. A fixed-point model whose float model
        has ReLU6 is not compared. For others the recorded runs are repeated with rounding off. Results may differ by
        rounding errors, as :func:`tritonq.prepare.check.check_same_output` says.
        """


def prepare_recorded(
    model: nn.Module,
    types: Types,
    qconfigs: Mapping[nn.Module, QConfig | None],
    recording: Recording,
    warn: bool = True,
    strict: bool = False,
    inputs: Place | None = None,
) -> None:
    """Prepare a recorded model in place; on any error it is left as it was.

    Args:
        model: the float model.
        types: float type to quantization-aware type.
        qconfigs: the qconfig of each module, None to leave it in float; that of the model itself decides between fixed
            point and fake quantization (None: fake quantization).
        recording: runs of the model on its example inputs.
        warn: whether to warn of layers and joins that stay in float unasked.
        strict: whether these are an error.
        inputs: the rule of a ``QConfigMapping`` for inputs of the model; None without such a rule.

    Raises:
        ValueError: the model has no layer to quantize, is one itself, or has one that can't be quantized; with
            ``strict`` a layer or join stays in float unasked; or, in fixed point, a part without a fixed-point form, a
            layer with another qconfig, or a rule for inputs.
        RuntimeError: the prepared model would not compute what the float model does.
    """
    _log_obstacle(type(model).__name__, recording)
    # The line that called prepare_qat.
    report = partial(report_float_layers, warn=warn, strict=strict, depth=5)
    if is_fixed_point(qconfigs[model]):
        if inputs is not None:
            raise ValueError("fixed point finds the formats of inputs itself: leave set_input out")
        analysis = Analysis(model, recording.in_eval.flow)
        _carry_out(FixedPointScheme(analysis, qconfigs, recording), analysis, report)
        return

    def fake_quantize(cautious: bool) -> None:
        analysis = Analysis(model, recording.flow, recording.held, cautious)
        scheme = FakeQuantScheme(analysis, types, qconfigs, recording, inputs, keep_classes=cautious)
        _carry_out(scheme, analysis, partial(report, depth=6))

    try:
        fake_quantize(cautious=False)
    except RuntimeError as error:
        # A forward may ask its BatchNorms and ReLUs for their classes, or read x behind x += y under another name.
        try:
            fake_quantize(cautious=True)
        except RuntimeError:
            raise error from None


def _carry_out(scheme: Scheme, analysis: Analysis, report: Callable[..., None]) -> None:
    """Edit a model by a scheme, check it, and report what became of it; on any error it is left as it was.

    Raises ValueError if the model itself is a layer.

    Args:
        scheme: how to quantize it.
        analysis: the model and its record.
        report: called with the model and the records of layers.
    """
    model = analysis.model
    if "" in scheme.layer_names():
        raise ValueError(
            f"the model is a single {type(model).__name__}; put it into a container, such as nn.Sequential"
        )
    with ModelEditor(model, analysis.modules, lambda owner: cast(EditableForward, analysis.forward(owner))) as editor:
        records = scheme.edit(editor)
        scheme.check()
        report(model, records)
        note_report(model, records)


def _log_obstacle(name: str, recording: Recording) -> None:
    """Log which modules could not be recorded in training mode, and why; ``name`` is the class name of the model."""
    if recording.in_training is None:
        _log.warning(
            "%s does not run in training mode on example_inputs (%s); its run in eval mode decides. Pass "
            "training_inputs= to record training too",
            name,
            recording.obstacle,
        )
    elif recording.held:
        _log.warning(
            "in training mode %s does not run on example_inputs (%s); it was recorded in eval mode. Pass "
            "training_inputs= to record training too",
            ", ".join(repr(held) if held else name for held in sorted(recording.held)),
            recording.obstacle,
        )


class FakeQuantScheme:
    """Fake quantization with observed or learned ranges. The constructor makes the plan.

    Args:
        analysis: the model and its record.
        types: float type to quantization-aware type.
        qconfigs: the qconfig of each module; None leaves it in float.
        recording: the recorded runs, in eval and in training mode, with which :meth:`check` compares the edited model.
        inputs: the rule of a ``QConfigMapping`` for inputs of the model; None without such a rule.
        keep_classes: whether each replacement is of the replaced module's class, too, for ``isinstance`` in forwards.

    Raises:
        ValueError: no layer is to be quantized, unless some stay in float only because one mode alone runs them.
    """

    def __init__(
        self,
        analysis: Analysis,
        types: Types,
        qconfigs: Mapping[nn.Module, QConfig | None],
        recording: Recording,
        inputs: Place | None = None,
        keep_classes: bool = False,
    ) -> None:
        self._analysis, self._types, self._qconfigs, self._recording = analysis, types, qconfigs, recording
        self._keep_classes = keep_classes
        self.plan: Plan = make_plan(analysis, types, qconfigs, inputs)
        if not self.plan.layers and not self.plan.single_mode:
            known = ", ".join(sorted(kind.__name__ for kind in types if kind.__module__.startswith("torch.nn")))
            why = "; ".join(f"{name}: {reason}" for name, reason in list(self.plan.float_reasons.items())[:5])
            raise ValueError(
                f"{type(analysis.model).__name__} has no quantizable layer ({known})"
                + (f"; left in float: {why}" if why else "")
            )

    def layer_names(self) -> list[str]:
        """Return the qualified names of the layers that it quantizes, in the order of the plan."""
        return [layer.name for layer in self.plan.layers]

    def edit(self, editor: ModelEditor) -> tuple[LayerRecord, ...]:
        """Carry out the plan by ``editor``, and return what became of each layer; outputs are not compared.

        Raises:
            ValueError: a layer can't be quantized; the message names it.
        """
        plan, types = self.plan, self._types
        names = apply_plan(editor, self._analysis, plan, types, self._qconfigs, self._keep_classes)
        return layer_records(self._analysis, plan, *names)

    def check(self) -> None:
        """Repeat each recorded run with the edited model, rounding off, and compare the outputs with the recorded ones.

        Then let ranges begin with what quantizers observe when the last run is repeated (:func:`first_ranges`).

        Raises:
            RuntimeError: the edited model fails, or an output differs by more than rounding errors;
                :func:`check_same_output` has the tolerances.
        """
        for run in self._recording.runs:
            check_same_output(self._analysis.model, run)
        for quantizer, state in first_ranges(self._analysis.model, self._recording.runs).items():
            quantizer.begin_with(state)


class FixedPointScheme:
    """Fixed point, as in F8Net.

    Convolutions with their BatchNorms, linear layers, residual additions and average poolings become their fixed-point
    forms. Each gets the formats of its inputs, and the factor η of the format in which its output is read. ReLUs stay:
    an unsigned format clips at 0 itself. A ReLU6 becomes a ReLU, since the learned level of a format clips. The formats
    of network inputs begin with the fractional length that suits the example inputs, and are signed if these are. The
    constructor only reads the record; :meth:`edit` changes the model.

    Args:
        analysis: the model and its record in eval mode.
        qconfigs: the qconfig of each module.
        recording: the recorded runs: their inputs are the example inputs, and the edited model is compared with them.

    Raises:
        ValueError: no layer is called, a following layer can't be found, a layer is called twice or of a subclass, and
            the like; the message names it. :meth:`edit` raises one for a layer whose qconfig is None or not of fixed
            point, or that has no fixed-point form, such as a grouped but not depthwise one.

    Source: F8Net (Jin et al., 2022), section 3.
    """

    def __init__(self, analysis: Analysis, qconfigs: Mapping[nn.Module, QConfig | None], recording: Recording) -> None:
        self._analysis, self._qconfigs, self._recording = analysis, qconfigs, recording
        self.links = find_links(analysis, Analysis(analysis.model, recording.flow, recording.held))

    def layer_names(self) -> list[str]:
        """Return the qualified names of the convolutions and linear layers that the record calls.

        They stand in the order of the model's modules. Additions and poolings are not among them.
        """
        return [layer.name for layer in self.links.layers.values()]

    def edit(self, editor: ModelEditor) -> tuple[LayerRecord, ...]:
        """Build the layers and their formats, and return what became of each layer."""
        build_fixed_point(editor, self.links, self._qconfigs, _network_inputs(self.links, self._recording))
        return fixed_point_records(self.links)

    def check(self) -> None:
        """Compare the outputs with the recorded ones of the float model, then switch to fixed point.

        They must be equal, up to the rounding errors that :func:`check_same_output` allows, while the network computes
        in float without clipping (phase ``"floating_wo_clip"``). A model with ReLU6 is not compared: its ReLU6 are
        plain ReLUs now, since learned levels clip in their place. The model is left in phase ``"fixed"``.

        Raises:
            RuntimeError: an output differs by more, or the edited model fails.
        """
        model = self._analysis.model
        set_fixed_point_phase(model, "floating_wo_clip")
        if not self.links.relus:
            for run in self._recording.runs:
                check_same_output(model, run)
        set_fixed_point_phase(model, "fixed")


def _network_inputs(links: Links, recording: Recording) -> dict[str, Tensor]:
    """Run the example inputs in eval mode; return the input of each layer that reads no layer's output, by name."""
    model = links.analysis.model
    found: dict[str, Tensor] = {}
    handles = []
    snapshot = ModelSnapshot(model)
    for index, layer in links.layers.items():
        if not links.groups[links.analysis.flow.calls[index].inputs[0]].scaled:

            def keep(module: nn.Module, args: Any, kwargs: dict[str, Any], name: str = layer.name) -> None:
                found[name] = by_position(module, args, kwargs)[0].detach()

            handles.append(links.analysis.modules[layer.name].register_forward_pre_hook(keep, with_kwargs=True))
    try:
        with preserved_random_state(model), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for module in model.modules():
                module.training = False
            args, kwargs = clone_tensors(recording.in_eval.args, recording.in_eval.kwargs)
            model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
        snapshot.restore()
    return found
