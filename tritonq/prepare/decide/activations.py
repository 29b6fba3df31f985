"""Which qconfig's activation quantizer a tensor gets that no quantized layer or join returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from tritonq.prepare.decide.analysis import Analysis
from tritonq.qconfig import QConfig
from tritonq.qconfig_mapping import Place


class ActivationChoice:
    """Chooses among the qconfigs of a tensor's reader, of what made it, and of the model.

    A reader whose activation factory makes no quantizer says that its own result stays in float, and nothing of what it
    reads: a head with float logits still reads its features on a grid.

    Args:
        analysis: the model and its record.
        qconfigs: the qconfig of each module.
        inputs: the rule for inputs of the model; None without one.
    """

    def __init__(
        self, analysis: Analysis, qconfigs: Mapping[nn.Module, QConfig | None], inputs: Place | None = None
    ) -> None:
        self._analysis, self._qconfigs, self._inputs = analysis, qconfigs, inputs

    def choose(self, value: int, reader: QConfig) -> QConfig | None:
        """Return the qconfig for a recorded value, given that of the layer or join that reads it; None: leave it."""
        is_input = self._analysis.flow.values[value].source == "input"
        if is_input and self._inputs is not None:
            return self._inputs.qconfig
        candidates = (qconfig for qconfig in (reader, *self._others(value)) if qconfig is not None)
        return next((qconfig for qconfig in candidates if _rounds_activations(qconfig)), reader)

    def _others(self, value: int) -> Iterator[QConfig | None]:
        call = self._analysis.flow.producer(value)
        if call is not None:
            maker = self._analysis.modules.get(call.owner if call.module_name is None else call.module_name)
            yield None if maker is None else self._qconfigs.get(maker)
        yield self._qconfigs.get(self._analysis.model)


def _rounds_activations(qconfig: QConfig) -> bool:
    return not isinstance(qconfig.activation(), nn.Identity)
