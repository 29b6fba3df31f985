"""What `accelerate` did to each quantized part of a model: one row each, printed as a table."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """One module or operation.

    Attributes:
        name: its path in the model, or its name in the graph.
        kind: its class in the library, or the operations.
        outcome: what computes it now; empty where it was left alone.
        reason: why it was left alone.

    Examples:
        >>> row = Row("conv", "torch.ao.nn.qat.Conv2d", "tritonq.nn.Conv2d")
        >>> row.is_accelerated, Row("tail", "Linear", reason="it has hooks").is_accelerated
        (True, False)
    """

    name: str
    kind: str
    outcome: str = ""
    reason: str = ""

    @property
    def is_accelerated(self) -> bool:
        """Whether tritonq computes it."""
        return bool(self.outcome)


@dataclass
class AccelerationReport:
    """What :func:`tritonq.accelerate` did; prints as a table.

    Attributes:
        library: who prepared the model, with version, such as ``"torchao 0.18.0"``.
        rows: one for each quantized layer, operation and quantizer.
        faults: sentences about what the library is known to change in a model, where it was found here.

    Examples:
        >>> rows = [Row("conv", "Conv2d", "Conv2d"), Row("fc", "Linear", reason="hooks")]
        >>> print(AccelerationReport("torchao 0.18.0", rows))
        prepared by torchao 0.18.0: 1 of 2 parts run by tritonq
          name  kind    computed by
          conv  Conv2d  Conv2d
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
