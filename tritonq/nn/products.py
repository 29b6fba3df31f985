"""Matrix products of two activations with a quantizer of their own, alone and as attention."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn

from tritonq.functional.integer_joins import float_join
from tritonq.functional.residual import rounded_result
from tritonq.grid import Grid, RangeStatistics
from tritonq.nn.elementwise import Joint
from tritonq.qconfig import QConfig


class MatMul(Joint):
    """``FQ(relu?(a @ b))`` of matrices or batches of them, as :func:`torch.matmul` has it; see :class:`Joint`.

    In eval mode, with both operands on known grids, the products are summed in integers and requantized once:
    :func:`tritonq.functional.integer_joins.integer_matmul`.

    Examples:
        >>> import torch, tritonq
        >>> tritonq.nn.MatMul()(torch.tensor([[2.0, 1.0]]), torch.tensor([[0.25], [0.5]]))
        tensor([[1.]])
    """

    kind = "matmul"

    def _rounded(self, a: Tensor, b: Tensor, grid: Grid, statistics: RangeStatistics) -> Tensor:
        return rounded_result(float_join(self.kind, a, b), grid, statistics, self.ceiling)

    def _on_codes(self, a: Tensor, b: Tensor) -> Tensor | None:
        return None


class Einsum(MatMul):
    """``FQ(relu?(einsum(equation, a, b)))`` for an equation that is one product of batches of matrices.

    Every index of an operand is in the other one or in the result. The operands are permuted and reshaped to batches of
    matrices, so that the product is that of :class:`MatMul`.

    Args:
        equation: as :func:`torch.einsum` takes it, with two operands and without an ellipsis.
        ceiling: see :class:`Joint`.
        qconfig: see :class:`Joint`.

    Raises:
        ValueError: any other equation.

    Examples:
        >>> import torch, tritonq
        >>> tritonq.nn.Einsum("bhqd,bhkd->bhqk")(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 5, 4)).shape
        torch.Size([1, 2, 3, 5])
    """

    def __init__(self, equation: str, ceiling: float | None = None, *, qconfig: QConfig | None = None) -> None:
        super().__init__(ceiling, qconfig=qconfig)
        self.equation = equation
        self._contraction = Contraction.of(equation)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Contract two tensors, and fake-quantize the result."""
        sizes = self._contraction.sizes(a, b)
        first, second = self._contraction.matrices(a, b, sizes)
        return self._contraction.result(self.joined(first, second), sizes)

    def extra_repr(self) -> str:
        """Return the equation, and the ReLU where there is one."""
        return ", ".join(filter(None, (repr(self.equation), super().extra_repr())))


@dataclass(frozen=True)
class Contraction:
    """An einsum equation of two operands as a product of batches of matrices.

    Attributes:
        a: indices of the first operand, in order.
        b: indices of the second one.
        out: indices of the result.
        batch: indices that both operands and the result have.
        summed: indices that the operands alone have.
    """

    a: str
    b: str
    out: str
    batch: str
    summed: str

    @classmethod
    def of(cls, equation: str) -> Contraction:
        """Read an equation.

        Raises:
            ValueError: it is no product of batches of matrices.
        """
        left, arrow, out = equation.replace(" ", "").partition("->")
        a, _, b = left.partition(",")
        if "." in equation or "," in b:
            raise ValueError(f"expected two operands and no ellipsis, got {equation!r}")
        if not arrow:
            out = "".join(sorted(index for index in {*a, *b} if (a + b).count(index) == 1))
        shared = [index for index in a if index in b]
        lone = [index for index in {*a, *b} if index not in out and index not in shared]
        repeated = any(len(set(part)) < len(part) for part in (a, b, out))
        if repeated or lone or not set(out) <= {*a, *b}:
            raise ValueError(
                f"{equation!r} is no product of batches of matrices: it sums or repeats an index by itself"
            )
        batch = "".join(index for index in shared if index in out)
        return cls(a, b, out, batch, "".join(index for index in shared if index not in out))

    def sizes(self, a: Tensor, b: Tensor) -> dict[str, int]:
        """Return the size of each index.

        Raises:
            ValueError: an operand has other axes than the equation.
        """
        for name, operand in ((self.a, a), (self.b, b)):
            if operand.dim() != len(name):
                raise ValueError(f"expected {len(name)} axes ({name}), got the shape {tuple(operand.shape)}")
        return {**dict(zip(self.b, b.shape, strict=True)), **dict(zip(self.a, a.shape, strict=True))}

    def matrices(self, a: Tensor, b: Tensor, sizes: dict[str, int]) -> tuple[Tensor, Tensor]:
        """Return the operands as (batch..., m, k) and (batch..., k, n)."""
        rows, columns = self._free(self.a), self._free(self.b)
        first = _arranged(a, self.a, self.batch, (rows, self.summed), sizes)
        return first, _arranged(b, self.b, self.batch, (self.summed, columns), sizes)

    def result(self, y: Tensor, sizes: dict[str, int]) -> Tensor:
        """Return the product (batch..., m, n) as the equation has it."""
        order = self.batch + self._free(self.a) + self._free(self.b)
        return y.reshape([sizes[index] for index in order]).permute([order.index(index) for index in self.out])

    def _free(self, indices: str) -> str:
        return "".join(index for index in indices if index not in self.batch + self.summed)


def _arranged(x: Tensor, indices: str, batch: str, matrix: tuple[str, str], sizes: dict[str, int]) -> Tensor:
    """Permute ``x`` to (batch..., rows..., columns...) and flatten rows and columns."""
    moved = x.permute([indices.index(index) for index in batch + matrix[0] + matrix[1]])
    shape = [sizes[index] for index in batch] + [prod(sizes[index] for index in part) for part in matrix]
    return moved.reshape(shape)


class ScaledDotProductAttention(MatMul):
    """``FQ(FQ_w(softmax(FQ_s(q kᵀ) · scale + mask)) v)``: :func:`torch.nn.functional.scaled_dot_product_attention`.

    Both matrix products run in integers in eval mode where the grids of their operands are known; the softmax between
    them is computed in float and its result rounded. Dropout acts on the rounded weights, in training.

    Attributes:
        scores: the product of queries and keys.
        softmax_fake_quant: quantizer of the softmax's result.
        activation_post_process: quantizer of the result.

    Examples:
        >>> import torch, tritonq
        >>> attention = tritonq.nn.ScaledDotProductAttention(qconfig=tritonq.get_qconfig())
        >>> q, k, v = torch.randn(3, 1, 2, 5, 8)
        >>> y = attention(q, k, v, is_causal=True)
        >>> bool((y - torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)).abs().max() < 0.1)
        True
    """

    def __init__(self, *, qconfig: QConfig | None = None) -> None:
        super().__init__(qconfig=qconfig)
        self.scores = MatMul(qconfig=qconfig)
        self.softmax_fake_quant = nn.Identity() if qconfig is None else qconfig.activation()
        self.set_producers(self.softmax_fake_quant, None)

    def set_operand_producers(self, *producers: nn.Module | None) -> None:
        """Set the modules that put queries, keys and values on their grids (None: unknown)."""
        query, key, value = producers
        self.scores.set_producers(query, key)
        self.set_producers(self.softmax_fake_quant, value)

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Attend; arguments as for torch's function."""
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        scores = self.scores(query, key.transpose(-2, -1)) * factor
        if is_causal:
            causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~causal, float("-inf"))
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        elif attn_mask is not None:
            scores = scores + attn_mask
        weights = scores.softmax(-1)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            # Rows that attend to nothing are zero, as in torch.
            weights = weights.masked_fill(~attn_mask.any(-1, keepdim=True), 0.0)
        weights = cast(Tensor, self.softmax_fake_quant(weights))
        return self.joined(nn.functional.dropout(weights, dropout_p), value)


def attention_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return the arguments of a call of ``F.scaled_dot_product_attention``, keywords too, in order of position."""
    defaults: dict[str, Any] = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None}
    defaults["enable_gqa"] = False
    names = ("query", "key", "value", *defaults)
    given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
    return tuple(given[name] for name in names)
