"""What `accelerate` did to each quantized part of a model: one row each, printed as a table."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """A module, or a group of graph nodes that one call of tritonq replaces, and what became of it.

    Attributes:
        name: path of the module in the model; of nodes, the path of the graph module and the last node's name.
        kind: name of the module's class; of nodes, the operations, such as ``"convolution, ReLU, quantizer"``.
        outcome: what tritonq runs in its place, such as ``"observing and rounding"``; empty if it was left alone.
        reason: why it was left alone, such as ``"dynamic quantization"``; empty if it was not.

    Examples:
        >>> row = Row("conv", "Conv2d", "operator with its quantizers")
        >>> row.is_accelerated, Row("tail", "Linear", reason="it has hooks").is_accelerated
        (True, False)
    """

    name: str
    kind: str
    outcome: str = ""
    reason: str = ""

    @property
    def is_accelerated(self) -> bool:
        """Whether tritonq computes the module or nodes of this row."""
        return bool(self.outcome)


@dataclass
class AccelerationReport:
    """What :func:`tritonq.accelerate` did; prints as a table.

    Attributes:
        library: who prepared the model, with version, such as ``"torchao 0.18.0"``; several are joined by ``", "``.
        rows: one for each quantized layer, operation or quantizer; in a graph, for each group of nodes that one call of
            tritonq replaces, and each quantizer left alone. Model-Optimizer's have none while they are switched off.
        faults: a sentence for each known fault of torchao that this model may have, such as "2 observers go on in eval
            mode, …"; printed as notes below the table.

    Examples:
        >>> rows = [Row("conv", "Conv2d", "operator with its quantizer"), Row("fc", "Linear", reason="hooks")]
        >>> print(AccelerationReport("torchao 0.18.0", rows))
        prepared by torchao 0.18.0: 1 of 2 parts run by tritonq
          name  kind    computed by
          conv  Conv2d  operator with its quantizer
          fc    Linear  the library: hooks
    """

    library: str
    rows: list[Row] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def left_alone(self) -> list[Row]:
        """The rows of parts that the library goes on computing."""
        return [row for row in self.rows if not row.is_accelerated]

    def __str__(self) -> str:
        count = len(self.rows) - len(self.left_alone)
        lines = [f"prepared by {self.library}: {count} of {len(self.rows)} parts run by tritonq"]
        cells = [("name", "kind", "computed by")]
        cells += [(row.name, row.kind, row.outcome or f"the library: {row.reason}") for row in self.rows]
        widths = [max(len(row[column]) for row in cells) for column in range(2)]
        lines += [f"  {name:{widths[0]}}  {kind:{widths[1]}}  {by}" for name, kind, by in cells]
        return "\n".join(lines + [f"note: {fault}" for fault in self.faults])
