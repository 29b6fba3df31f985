"""Whether a deployed model computes what was trained: codes are compared layer by layer, and the outputs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from tritonq.calibration import model_calls
from tritonq.deploy.codes import Codes, Runner
from tritonq.deploy.comparisons import LayerComparison as LayerComparison
from tritonq.deploy.comparisons import OutputComparison as OutputComparison
from tritonq.deploy.comparisons import VerificationReport as VerificationReport
from tritonq.deploy.comparisons import add_layers, add_outputs, compare_codes
from tritonq.deploy.onnx_ends import Ends
from tritonq.deploy.program_runner import PROGRAM_SUFFIX, load_program, program_runner
from tritonq.deploy.torch_runner import torch_runner
from tritonq.deploy.unread import without_unread
from tritonq.nn.compile_wrapper import uncompiled
from tritonq.prepare.edit.earlier_inputs import earlier_names

_QUANTIZER_NAME = "activation_post_process"
_Islands = Mapping[str, tuple[str, ...]]


def verify(
    qat_model: nn.Module, deployed: nn.Module | ExportedProgram | str | os.PathLike[str], data: Any
) -> VerificationReport:
    """Run a quantization-aware model in eval mode and its deployed form on the same data, and compare their codes.

    Codes are compared at every activation quantizer, in order of execution. Each layer of the deployed model computes
    on the codes that the trained model's layers made, so that a difference is counted for the layer that makes it. If
    an ONNX file's operators add floats in no defined order (softmax, LayerNorm, a layer left in float), codes behind
    them may differ by one, and the report says so. In a fixed-point network the codes are those that each layer reads,
    under the layer's name. The outputs are those that the deployed model makes of its own codes, so that differences of
    all layers reach them. A model of which only weights are quantized has no codes, only outputs. Codes that nothing
    reads, and that the deployed model does not compute, are left out, and the report names their layers.

    Args:
        qat_model: the trained model; its mode is restored. A converted model will do as well.
        deployed: a converted model; the path of a file of :func:`tritonq.export_onnx`, which ONNX Runtime runs; or a
            program of :func:`tritonq.export_program`, as such or as the path of a file ``*.pt2``.
        data: one input tensor, one dict of arguments, or an iterable of batches: each a tensor, a dict of arguments, or
            a tuple of arguments, of which as many are used as the model's forward requires, or as the file or program
            has inputs if those are more (a data loader's labels are not; of a ``forward(*args)``, all are). For a file
            that takes pixels, uint8 images.

    Returns:
        The report. Differences raise no error: ask its ``agrees()``, or print it.

    Raises:
        ValueError: no data; a deployed model with other quantizers, or other shapes of codes or outputs, so not made
            from ``qat_model``; data that a file or program does not take; or a file that is not one of these.
        OSError: the file can't be read.
        ImportError: an ONNX file without onnx and onnxruntime (the extra ``tritonq[onnx]``).

    Examples:
        >>> import torch, tritonq
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
        >>> x = torch.randn(4, 3, 8, 8)
        >>> qat = tritonq.prepare_qat(model, example_inputs=x).train()
        >>> _ = qat(x)                         # training steps
        >>> print(str(verify(qat, tritonq.convert(qat), x)).splitlines()[-2])
        no code differs
    """
    qat_model = uncompiled(qat_model)
    run_deployed, islands, ends, inputs = _deployed_runner(deployed)
    run_reference = torch_runner(qat_model)
    tally = _Tally(earlier_names(qat_model), islands)
    for args, kwargs in model_calls(qat_model, data, inputs):
        given = ends.values((args, kwargs))
        expected, expected_outputs = run_reference(*given)
        found, found_outputs = run_deployed(args, kwargs)
        lacking = tally.lacking(expected, found)
        if lacking:
            expected, unread = without_unread(expected, expected_outputs, lacking, run_reference, given)
            tally.note_unread(unread)
        pairs = tally.pairs(expected, found)
        if not all(torch.equal(pair.expected, pair.found) for pair in pairs):
            found, _ = run_deployed(args, kwargs, _given(pairs, found))
            pairs = tally.pairs(expected, found)
        tally.add(pairs, ends.results(expected_outputs), found_outputs)
    return tally.report()


def _deployed_runner(
    deployed: nn.Module | ExportedProgram | str | os.PathLike[str],
) -> tuple[Runner, _Islands, Ends, int]:
    """Return ``(runner, islands, ends, inputs)`` for a deployed model.

    The runner runs it. ``islands`` has, by the name of a quantizer, operators before it for which its codes may differ
    by one; ``ends`` what a file takes and returns; ``inputs`` how many inputs a file takes, 0 for a module.
    """
    if isinstance(deployed, nn.Module):
        return torch_runner(uncompiled(deployed)), {}, Ends(), 0
    if not isinstance(deployed, ExportedProgram) and os.fspath(deployed).endswith(PROGRAM_SUFFIX):
        deployed = load_program(deployed)
    if isinstance(deployed, ExportedProgram):
        return program_runner(deployed), {}, Ends(), len(deployed.graph_signature.user_inputs)
    from tritonq.deploy.onnx_runner import onnx_runner

    return onnx_runner(deployed)


@dataclass(frozen=True)
class _Pair:
    """The codes of one call of a quantizer in both models.

    Attributes:
        name: of the layer, with the number of the call.
        expected: the trained model's codes.
        found: the deployed model's codes.
        source: name of the quantizer in the deployed model, and the indices of those of its calls that have these
            codes.
    """

    name: str
    expected: Tensor
    found: Tensor
    source: tuple[str, tuple[int, ...]]


def _given(pairs: Iterable[_Pair], found: Codes) -> dict[str, list[Tensor | None]]:
    """Return the trained model's codes by the deployed model's quantizers and calls; None for calls without a pair.

    They are ``given`` to the deployed model's runner, so that each layer computes on the trained model's codes.
    ``found`` has the codes that the deployed model made, by quantizer.
    """
    given: dict[str, list[Tensor | None]] = {name: [None] * len(calls) for name, calls in found.items()}
    for pair in pairs:
        name, places = pair.source
        for place in places:
            given[name][place] = pair.expected
    return given


class _Tally:
    """Differences between two models, summed over batches.

    Args:
        earlier: for quantizers of the trained model, by name, the names that files of version 0.1.0 have for them.
        islands: by a quantizer's name, names of the operators before it (softmax, LayerNorm) whose sums have no defined
            order: its codes may differ by one.
    """

    def __init__(self, earlier: Mapping[str, str], islands: _Islands) -> None:
        self._earlier = earlier
        self._islands = islands
        self._layers: dict[str, LayerComparison] = {}
        self._outputs: OutputComparison | None = None
        self._unread: dict[str, None] = {}

    def lacking(self, expected: Codes, found: Codes) -> list[str]:
        """Return the names of quantizers of the trained model that the deployed one lacks, or calls fewer times.

        One that the deployed model lacks is not returned if another quantizer, which both models have and run once,
        makes the same codes in the trained one (:func:`_twin`). ``expected`` are the trained model's codes, ``found``
        the deployed one's: by quantizer, one tensor per call.
        """
        names = {name: self._name_in(name, found) for name in expected}
        few = (name for name, calls in expected.items() if len(calls) > len(found.get(names[name], ())))
        return [name for name in few if names[name] in found or _twin(expected[name], expected, found) is None]

    def note_unread(self, quantizers: Iterable[str]) -> None:
        """Note quantizers of the trained model, given by name, for the report's ``unread``, which names their layers.

        In at least one call nothing reads their codes. The deployed model leaves these out, so they are not compared.
        """
        self._unread |= dict.fromkeys(_layer_name(quantizer) for quantizer in quantizers)

    def _name_in(self, quantizer: str, found: Codes) -> str:
        """Return the deployed model's name of a quantizer of the trained one; ``found`` has its codes by name."""
        earlier = self._earlier.get(quantizer, quantizer)
        # One that ran once for all who read the tensor has another name.
        return quantizer if quantizer in found or earlier not in found else earlier

    def pairs(self, expected: Codes, found: Codes) -> list[_Pair]:
        """Return the codes of each call of each quantizer in both models, in the trained model's order.

        ``expected`` are the trained model's codes, ``found`` the deployed one's: by quantizer, one tensor per call.
        An exporter merges what computes the same: for a missing quantizer another one with the same codes stands
        (:func:`_twin`), and a quantizer may run more often in one model if codes only repeat (:func:`_calls`).

        Raises:
            ValueError: the deployed model has a quantizer that the trained one lacks, or lacks one for which no other
                stands; or the calls of a quantizer differ in number by more than repeats.
        """
        names = {name: self._name_in(name, found) for name in expected}
        for quantizer in found:
            if quantizer not in expected and quantizer not in self._earlier.values():
                raise ValueError(f"the deployed model has a quantizer {quantizer!r} that the trained model lacks")
        if expected and not found:
            raise ValueError("the deployed model has no quantizer: it was not made from this model")
        pairs: list[_Pair] = []
        for quantizer, calls in expected.items():
            source = names[quantizer] if names[quantizer] in found else _twin(calls, expected, found)
            if source is None:
                raise ValueError(f"the deployed model lacks the quantizer {quantizer!r} of the trained model")
            pairs += _calls(quantizer, calls, source, found[source])
        return pairs

    def add(self, pairs: Iterable[_Pair], expected: list[Tensor], found: list[Tensor]) -> None:
        """Add the differences of one batch.

        Args:
            pairs: the codes of both models for each call of each quantizer, as :meth:`pairs` returns them.
            expected: the trained model's outputs.
            found: the deployed model's outputs.

        Raises:
            ValueError: codes of a call, or outputs, of different shapes, or another number of outputs.
        """
        for pair in pairs:
            compared = compare_codes(pair.name, pair.expected, pair.found, self._islands.get(pair.source[0], ()))
            self._layers[pair.name] = add_layers(self._layers.get(pair.name), compared)
        self._outputs = add_outputs(self._outputs, expected, found)

    def report(self) -> VerificationReport:
        """Return the report about all batches.

        Raises:
            ValueError: there was no batch, or none with a sample.
        """
        codes = sum(layer.codes for layer in self._layers.values())
        if self._outputs is None or not (codes or self._outputs.elements):
            raise ValueError("verify needs at least one batch of data that holds a sample")
        return VerificationReport(tuple(self._layers.values()), self._outputs, tuple(self._unread))


def _twin(calls: list[Tensor], expected: Codes, found: Codes) -> str | None:
    """Return the name of another quantizer that makes the same codes as ``calls`` and that both models have, or None.

    Only quantizers that run once are looked at: ``calls`` of more tensors have none.
    ``expected`` are the trained model's codes, ``found`` the deployed one's: by quantizer, with one tensor per call.
    An exporter merges branches that compute the same, such as heads that were copied and not trained.
    """
    if len(calls) != 1:
        return None
    single = (name for name, others in expected.items() if name in found and len(others) == len(found[name]) == 1)
    return next((name for name in single if torch.equal(expected[name][0], calls[0])), None)


def _calls(quantizer: str, calls: list[Tensor], source: str, found: list[Tensor]) -> list[_Pair]:
    """Return the pairs of one quantizer's calls in both models, in order.

    An exporter merges calls of one quantizer on one tensor, so that one model may have repeats of the other's codes.

    Args:
        quantizer: its name in the trained model.
        calls: the trained model's codes, one tensor per call.
        source: name of the quantizer in the deployed model that makes these codes.
        found: the deployed model's codes of ``source``, one tensor per call.

    Raises:
        ValueError: the numbers of calls differ by more than such repeats.
    """
    expected_places: list[tuple[int, ...]] = [(place,) for place in range(len(calls))]
    places: list[tuple[int, ...]] = [(place,) for place in range(len(found))]
    if source != quantizer:
        places = places * len(calls)
    elif len(calls) != len(found):
        expected_places, places = _places_of_different(calls), _places_of_different(found)
    if len(expected_places) != len(places):
        counts = f"{len(expected_places)} times in the trained model, {len(places)} times in the deployed one"
        raise ValueError(f"the quantizer {quantizer!r} runs {counts}")
    return [
        _Pair(
            _layer_name(quantizer) + (f" (call {index + 1})" if index else ""),
            calls[one[0]],
            found[other[0]],
            (source, other),
        )
        for index, (one, other) in enumerate(zip(expected_places, places, strict=True))
    ]


def _places_of_different(calls: list[Tensor]) -> list[tuple[int, ...]]:
    """Return for each different value among ``calls`` the indices of the calls that have it."""
    places: list[list[int]] = []
    for place, call in enumerate(calls):
        known = next((found for found in places if torch.equal(calls[found[0]], call)), None)
        if known is None:
            places.append([place])
        else:
            known.append(place)
    return [tuple(found) for found in places]


def _layer_name(quantizer: str) -> str:
    return quantizer.removesuffix(_QUANTIZER_NAME).removesuffix(".") or quantizer
