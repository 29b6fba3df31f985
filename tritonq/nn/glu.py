"""Gated linear units. FQ in formulas is fake quantization, and ``relu?`` a ReLU if there is one."""

from __future__ import annotations

from torch import Tensor

from tritonq.nn.elementwise import Mul
from tritonq.nn.functions import FunctionLayer
from tritonq.nn.output_quantizer import quantizer_of
from tritonq.nn.reference import Reference, Referred
from tritonq.qconfig import QConfig
from tritonq.reference.functions import Function


class GLU(Mul):
    """``FQ(relu?(a * FQ(sigmoid(b))))`` for the halves a and b of a tensor: :func:`torch.nn.functional.glu`.

    Args:
        dim: the axis that is halved.
        ceiling: upper bound of a ReLU behind the product: infinity for a plain one, 6 for ReLU6; None: no ReLU.
        qconfig: makes the quantizers of the sigmoid and of the output; None: both stay in float.

    Attributes:
        dim: the axis that is halved.
        gate: the `FunctionLayer` that computes ``FQ(sigmoid(b))``.

    Raises:
        TypeError: a ceiling that is not a number.
        ValueError: a ceiling that is not positive.

    Examples:
        >>> import torch, tritonq
        >>> tritonq.nn.GLU()(torch.tensor([[3.0, 0.0]]))
        tensor([[1.5000]])
    """

    def __init__(self, dim: int = -1, ceiling: float | None = None, *, qconfig: QConfig | None = None) -> None:
        super().__init__(ceiling, qconfig=qconfig)
        self.dim = dim
        self.gate = FunctionLayer(Function("sigmoid"), qconfig=qconfig)
        self.set_producers(None, self.gate)

    def set_operand_producers(self, *producers: Referred) -> None:
        """Set the module that puts the forward's argument on its grid: the one element of ``producers``; None: unknown.

        It is a module with an output quantizer, a quantizer, or a Reference to either; eval mode computes by its grid.
        """
        source = Reference.to(producers[0])
        self.gate.set_quantizers(Reference(quantizer_of(source.module), source.route))
        self.set_producers(source, self.gate)

    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        """Return ``FQ(relu?(a * FQ(sigmoid(b))))`` with a the first half of ``input`` along ``dim``, b the second.

        The result has the shape of a.

        Raises:
            IndexError: ``input`` has no axis ``dim``.
            ValueError: the size along ``dim`` is odd.
        """
        if input.shape[self.dim] % 2:
            raise ValueError(f"a GLU halves axis {self.dim}, got the odd size {input.shape[self.dim]}")
        a, b = input.chunk(2, self.dim)
        return self.joined(a, self.gate(b))
