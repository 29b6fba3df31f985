"""Choose the qconfig whose activation quantizer a tensor gets, for tensors that no quantized layer or join returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from tritonq.prepare.decide.analysis import Analysis
from tritonq.prepare.record.dataflow import ValueIndex
from tritonq.qconfig import QConfig
from tritonq.qconfig_mapping import Place


class ActivationChoice:
    """Choose among the qconfigs of a tensor's reader, of the module that made it, and of the model.

    The first of them whose activation factory makes a quantizer wins. A reader without an activation quantizer leaves
    its own result in float, but what it reads is still quantized: a classifier with float logits reads quantized
    features.

    Args:
        analysis: the model and its record.
        qconfigs: the qconfig of each module; None leaves a module in float.
        inputs: the rule of a ``QConfigMapping`` for inputs of the model, which holds their qconfig; None without one.
    """

    def __init__(
        self, analysis: Analysis, qconfigs: Mapping[nn.Module, QConfig | None], inputs: Place | None = None
    ) -> None:
        self._analysis, self._qconfigs, self._inputs = analysis, qconfigs, inputs

    def choose(self, value: ValueIndex, reader: QConfig) -> QConfig | None:
        """Return the qconfig whose activation factory makes the quantizer of a tensor.

        For an input of the model, if there is a rule for these, it is the rule's; None: the input gets no quantizer.
        For any other tensor it is the first that makes a quantizer: ``reader``, that of the module which made the
        tensor, that of the model. If none does, it is ``reader``, whose factory makes an ``nn.Identity``.

        Args:
            value: index of the tensor's value.
            reader: qconfig of the layer or join that reads it.
        """
        is_input = self._analysis.flow.values[value].source == "input"
        if is_input and self._inputs is not None:
            return self._inputs.qconfig
        candidates = (qconfig for qconfig in (reader, *self._others(value)) if qconfig is not None)
        return next((qconfig for qconfig in candidates if _rounds_activations(qconfig)), reader)

    def _others(self, value: ValueIndex) -> Iterator[QConfig | None]:
        """Yield the qconfig of the module that made a value (None if it has none), then that of the model."""
        call = self._analysis.flow.producer(value)
        if call is not None:
            maker = self._analysis.modules.get(call.owner if call.module_name is None else call.module_name)
            yield None if maker is None else self._qconfigs.get(maker)
        yield self._qconfigs.get(self._analysis.model)


def _rounds_activations(qconfig: QConfig) -> bool:
    """Whether a qconfig's activation factory makes a quantizer, not an ``nn.Identity``."""
    return not isinstance(qconfig.activation(), nn.Identity)
