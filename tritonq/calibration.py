"""Post-training: observe data without rounding, fix the ranges, and refine the scales (EasyQuant)."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tritonq.fake_quantize import FakeQuantize
from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.fixed_point_fake_quantize import FixedPointFakeQuantize
from tritonq.float_fake_quantize import FloatFakeQuantize
from tritonq.learned_base import LearnedFakeQuantize
from tritonq.nn.call_arguments import by_position
from tritonq.nn.qat import QATLayer
from tritonq.observers import PassiveObserver
from tritonq.prepare.record.structure import tensors_in
from tritonq.qparams import QParams
from tritonq.switched_quantizer import SwitchedQuantizer
from tritonq.warn_once import silence

Batch = tuple[tuple[Any, ...], dict[str, Any]]


@torch.no_grad()
def calibrate(model: nn.Module, data: Any) -> nn.Module:
    """Run every observer over ``data`` without fake quantization, then fix the ranges and switch rounding on.

    The model runs in eval mode (BatchNorm keeps its statistics, weights are observed as they will be deployed); the
    modes of all its modules are restored. Afterwards observers are off and fake quantizers on;
    :func:`tritonq.convert` can follow. Quantizers with trained scales take these from what was observed.

    Args:
        model: a prepared model (:func:`tritonq.prepare_qat`), changed in place.
        data: one input tensor, one dict of keyword arguments, or an iterable of batches on the model's device: each a
            tensor, a dict of keyword arguments, or a tuple or list, of which as many items are used as the model's
            forward requires (a data loader's labels are not; of a ``forward(*args)``, all are).

    Returns:
        ``model``.

    Raises:
        ValueError: the model has no fake quantizer, or ones of fixed point, whose formats are found in training alone;
            ``data`` has no sample, or is neither a tensor nor iterable; or a quantizer has seen no finite value, and
            the message names each such. Switches are as before then; running ranges may have changed.

    Source: MegEngine's calibration flow; docs/calibration.md.

    Examples:
        >>> import tritonq
        >>> model = tritonq.nn.Linear(4, 2, qconfig=tritonq.get_qconfig("megengine_calibration"))
        >>> calibrate(model, [torch.randn(8, 4) for _ in range(4)]).weight_fake_quant.is_enabled_on_host()
        True
    """
    with calibrating(model):
        for args, kwargs in model_batches(model, data):
            model(*args, **kwargs)
    return model


@contextmanager
def calibrating(model: nn.Module) -> Iterator[None]:
    """Let a prepared model observe what the caller runs in the block, and fix its ranges afterwards.

    Inside, the model is in eval mode and without gradients, its observers are on and its fake quantizers off.
    Afterwards scales and zero points, trained ones too, are set from what was seen, observers are off and fake
    quantizers on, and each module's training mode is as before.

    Raises:
        ValueError: the model has no fake quantizer, or ones of fixed point; or, at the block's end, a quantizer has
            seen no finite value. Switches are as before then, and also if the block raises; running ranges may not be.
    """
    quantizers = {name: module for name, module in model.named_modules() if isinstance(module, SwitchedQuantizer)}
    if not quantizers:
        raise ValueError(f"{type(model).__name__} has no fake quantizer: call prepare_qat first")
    for name, quantizer in quantizers.items():
        if isinstance(quantizer, FixedPointFakeQuantize):
            # Rounding is the network's ReLU, so that it cannot be off; and formats follow at their own pace.
            raise ValueError(f"{name!r} is of fixed point: train the network, which finds its formats")
    switches = {q: (q.fake_quant_enabled.clone(), q.observer_enabled.clone()) for q in quantizers.values()}
    try:
        with torch.no_grad(), _observing(model, quantizers.values()):
            yield
        _check_observed(quantizers)
    except BaseException:
        for quantizer, (rounding, observing) in switches.items():
            quantizer.fake_quant_enabled.copy_(rounding)
            quantizer.observer_enabled.copy_(observing)
        raise
    for quantizer in quantizers.values():
        if isinstance(quantizer, FakeQuantize):
            quantizer.refresh_qparams()
        elif isinstance(quantizer, LearnedFakeQuantize):
            quantizer.initialize()
        quantizer.disable_observer()
        quantizer.enable_fake_quant()


@torch.no_grad()
def refine_scales(
    model: nn.Module, data: Any, *, candidates: int = 40, span: tuple[float, float] = (0.8, 1.2)
) -> dict[str, Tensor]:
    """Try other scales for each layer's weight and output; keep those whose output is most like the float layer's.

    Weights first, one choice per scale, or for all groups of an out channel; then activations. The measure is the
    cosine similarity of the layer's output with and without quantization, for the inputs that the float model gives the
    layer. A scale stays as it is unless a candidate is better, or if it is computed from each tensor: that of a float
    format, and of a weight whose codes follow from a formula (`tritonq.paper_schemes`).

    Args:
        model: a calibrated model; its scales change in place. A PassiveObserver, which holds a scale given by hand,
            gets the new one as ``scale``, and keeps the given one as ``original_scale``.
        data: one input tensor, one dict of keyword arguments, or an iterable of batches, as :func:`tritonq.calibrate`
            takes them; a few are enough, and all layers' inputs and outputs are kept in memory while this runs.
        candidates: scales tried, equally spaced over ``span``.
        span: smallest and largest candidate, as a multiple of the scale.

    Returns:
        By the quantizer's qualified name the factors by which its scales were multiplied, 1 where one stays: float32,
        on its device, (1,), (channels,) or (groups of all channels,). Quantizers that were not tried are left out.

    Raises:
        ValueError: fewer than one candidate, a span that does not ascend or is not above 0, no quantized layer, none
            with a scale to try, or ``data`` that has no batch or is neither a tensor nor iterable.

    Source: Wu et al., "EasyQuant" (2020); docs/numbers.md, "Scales by similarity".

    Examples:
        >>> import torch, tritonq
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2))
        >>> x = torch.randn(8, 4)
        >>> prepared = tritonq.calibrate(tritonq.prepare_qat(model, example_inputs=x), [x])
        >>> sorted(refine_scales(prepared, [x]))
        ['0.activation_post_process', '0.weight_fake_quant']
    """
    if candidates < 1 or not 0 < span[0] < span[1]:
        raise ValueError(f"candidates must be positive and span ascend above 0, got {candidates} and {span}")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QATLayer)}
    if not layers:
        raise ValueError(f"{type(model).__name__} has no quantized layer")
    factors = torch.linspace(*span, candidates).tolist()
    chosen: dict[str, Tensor] = {}
    with everything_float(model):
        examples = _layer_examples(model, layers, data)
        for role in ("weight_fake_quant", "activation_post_process"):
            for name, layer in layers.items():
                quantizer = getattr(layer, role)
                has_scale = isinstance(quantizer, FakeQuantizeBase) and quantizer.rounds_to_nearest
                if has_scale and quantizer.has_qparams() and examples[name]:
                    with rounding(layer.weight_fake_quant, quantizer):
                        chosen[f"{name}.{role}".lstrip(".")] = _best_factors(layer, quantizer, examples[name], factors)
    if not chosen:
        raise ValueError(
            f"{type(model).__name__} has no quantizer of integers with a range to refine: calibrate it first; scales "
            "of float formats and of weights with codes by a formula follow from each tensor"
        )
    return chosen


def model_batches(model: nn.Module, data: Any) -> Iterator[Batch]:
    """Yield ``(args, kwargs)`` of a call of ``model`` for each batch of ``data`` whose tensors are not all empty.

    Args:
        model: the model; it is not run.
        data: one tensor, one dict of keyword arguments, or an iterable of batches: each a tensor, a dict of keyword
            arguments, or a tuple or list, of which as many first items are taken as the forward requires.

    Raises:
        ValueError: ``data`` is neither a tensor nor iterable, or has no batch with a sample.
    """
    has_sample = False
    for call in model_calls(model, data):
        sizes = [tensor.numel() for _, tensor in tensors_in(call)]
        if any(sizes) or not sizes:
            has_sample = True
            yield call
    if not has_sample:
        raise ValueError("data has no batch that holds a sample")


def model_calls(model: nn.Module, data: Any, inputs: int = 0) -> Iterator[Batch]:
    """Yield ``(args, kwargs)`` of a call of ``model`` for each batch of ``data``.

    A batch that is a dict gives ``((), batch)``. Of a tuple or list the first items are taken, as many as
    ``model.forward`` has positional parameters without default, at least one: ``((x,), {})`` of ``(x, labels)``. Of a
    ``forward(*args)`` all are. Anything else is the one argument. Tensors are neither copied nor moved.

    Args:
        model: the model; it is not run.
        data: one tensor, one dict of keyword arguments, or an iterable of batches.
        inputs: how many items of a tuple or list to take, but at most as many as the forward has positional parameters,
            and at least as many as it has without default; 0: as many as it has without default.

    Raises:
        ValueError: ``data`` is neither a tensor nor iterable.
    """
    if not isinstance(data, (Tensor, Iterable)):
        raise ValueError(f"data must be a tensor or an iterable of batches, got {type(data).__name__}")
    parameters = inspect.signature(model.forward).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    taken: int | None = max(1, sum(p.default is p.empty for p in positional), min(inputs, len(positional)))
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        taken = None
    for batch in [data] if isinstance(data, (Tensor, Mapping)) else data:
        if isinstance(batch, Mapping):
            yield (), dict(batch)
        elif isinstance(batch, Sequence):
            yield tuple(batch[:taken]), {}
        else:
            yield (batch,), {}


def _check_observed(quantizers: dict[str, SwitchedQuantizer]) -> None:
    unset = [name or type(quantizer).__name__ for name, quantizer in quantizers.items() if _is_unset(quantizer)]
    if unset:
        raise ValueError(
            f"these quantizers saw no finite value, since the data are empty or not finite, or the model does not run "
            f"them: {', '.join(unset)}"
        )


def _is_unset(quantizer: SwitchedQuantizer) -> bool:
    if isinstance(quantizer, FloatFakeQuantize):
        return quantizer.has_observed_scale and not bool(quantizer.amax_history.any())
    if isinstance(quantizer, (FakeQuantize, LearnedFakeQuantize)):
        return not bool(quantizer.activation_post_process.has_observed())
    return False


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Restore the training mode of each module of ``model`` when the block ends, also by an error."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _observing(model: nn.Module, quantizers: Iterable[SwitchedQuantizer]) -> Iterator[None]:
    """Set eval mode inside the block, while ``quantizers`` observe and do not round.

    The modes are restored at the end. The switches of the quantizers are not: the caller sets them.
    """
    with modes_restored(model):
        model.eval()
        hooks = []
        for quantizer in quantizers:
            quantizer.disable_fake_quant()
            quantizer.enable_observer()
            if isinstance(quantizer, LearnedFakeQuantize):
                # In training mode it would take its first batch for all the data; in eval it would warn.
                silence(quantizer)
                hooks.append(quantizer.register_forward_pre_hook(lambda module, args: module.observe(args[0])))
            elif isinstance(quantizer, FloatFakeQuantize):
                # In training mode its history would forget the first of many batches.
                silence(quantizer)
                hooks.append(quantizer.register_forward_pre_hook(lambda module, args: module.gather(args[0])))
            else:
                quantizer.train()
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def everything_float(model: nn.Module) -> Iterator[None]:
    """Let ``model`` compute in float in the block: in eval mode, with all fake quantizers switched off.

    Training modes and rounding switches are restored when the block ends, also by an error. Nothing is observed.
    """
    quantizers = [module for module in model.modules() if isinstance(module, SwitchedQuantizer)]
    switches = [quantizer.fake_quant_enabled.clone() for quantizer in quantizers]
    with modes_restored(model):
        model.eval()
        for quantizer in quantizers:
            quantizer.disable_fake_quant()
        try:
            yield
        finally:
            for quantizer, switch in zip(quantizers, switches, strict=True):
                quantizer.fake_quant_enabled.copy_(switch)


@contextmanager
def rounding(*quantizers: nn.Module) -> Iterator[None]:
    """Switch rounding on in the block for ``quantizers`` with a switch; then off, also by an error or if on before."""
    switched = [quantizer for quantizer in quantizers if isinstance(quantizer, SwitchedQuantizer)]
    for quantizer in switched:
        quantizer.enable_fake_quant()
    try:
        yield
    finally:
        for quantizer in switched:
            quantizer.disable_fake_quant()


def _layer_examples(
    model: nn.Module, layers: dict[str, QATLayer], data: Any
) -> dict[str, list[tuple[tuple[Any, ...], Tensor]]]:
    """Run ``data`` through the model; return pairs of arguments, by position, and output of each call of each layer.

    Args:
        model: runs as it is set; outputs are copied.
        layers: those to watch, by name, which is the key in the result, too.
        data: one input tensor, or an iterable of batches, as :func:`calibrate` takes them.

    Raises:
        ValueError: ``data`` has no sample.
    """
    examples: dict[str, list[tuple[tuple[Any, ...], Tensor]]] = {name: [] for name in layers}

    def recorder(name: str) -> Any:
        def record(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
            examples[name].append((by_position(module, args, kwargs), output.clone()))

        return record

    hooks = [layer.register_forward_hook(recorder(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        for args, kwargs in model_batches(model, data):
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return examples


def _best_factors(
    layer: QATLayer,
    quantizer: FakeQuantizeBase,
    examples: list[tuple[tuple[Any, ...], Tensor]],
    factors: list[float],
) -> Tensor:
    """Try each factor on the scales of ``quantizer``, and leave it with the best ones.

    Args:
        layer: the layer of the quantizer.
        quantizer: of its weight or output.
        examples: pairs of the layer's arguments and its float output.
        factors: what the scales are multiplied by, such as 0.8 to 1.2.

    Returns:
        The factor of each scale with which the layer's output is most like the float output; 1 if none is better.
    """
    original = QParams(*(value.detach().clone() for value in quantizer.calculate_qparams()))
    per_channel = original.scale.numel() > 1
    best_similarity = _similarity(layer, examples, per_channel)
    best = torch.ones(best_similarity.shape)
    for factor in factors:
        _set_scale(quantizer, QParams(original.scale * factor, original.zero_point))
        similarity = _similarity(layer, examples, per_channel)
        better = similarity > best_similarity
        best_similarity = torch.where(better, similarity, best_similarity)
        best = torch.where(better, factor, best)
    # The scales of a channel's groups follow one another.
    best = best.repeat_interleave(original.scale.numel() // best.numel()).to(original.scale.device)
    _set_scale(quantizer, QParams(original.scale * best, original.zero_point))
    return best


def _similarity(layer: QATLayer, examples: list[tuple[tuple[Any, ...], Tensor]], per_channel: bool) -> Tensor:
    """Return how similar the layer's present outputs are to those in ``examples``: float64, (1,) or (channels,).

    The measure is the cosine of the angle between both, seen as vectors; it is 1 for equal outputs.
    """
    dot = found = wanted = torch.zeros((), dtype=torch.float64)
    for args, expected in examples:
        output = layer(*args)
        if per_channel:
            rows = [y.double().movedim(layer.linear_map.output_axis, 0).flatten(1) for y in (output, expected)]
        else:
            rows = [y.double().reshape(1, -1) for y in (output, expected)]
        dot = dot + (rows[0] * rows[1]).sum(1).cpu()
        found, wanted = found + rows[0].square().sum(1).cpu(), wanted + rows[1].square().sum(1).cpu()
    # An output of zeros is as good as any other.
    return dot / (found * wanted).sqrt().clamp(min=torch.finfo(torch.float64).tiny)


def _set_scale(quantizer: FakeQuantizeBase, qparams: QParams) -> None:
    """Make ``quantizer`` round with the scale and zero point in ``qparams``, in place.

    Trained quantizers get parameters that give them, and a PassiveObserver the scale.
    """
    if isinstance(quantizer, LearnedFakeQuantize):
        quantizer.initialize(qparams)
        return
    if isinstance(quantizer, FakeQuantize) and isinstance(quantizer.activation_post_process, PassiveObserver):
        quantizer.activation_post_process.scale = qparams.scale
    quantizer.scale.copy_(qparams.scale)
    quantizer.zero_point.copy_(qparams.zero_point)
