"""Matrix products of two activations with a quantizer of their own: single ones, in a sum, and in attention.

FQ in formulas is fake quantization. ``relu?`` is a ReLU up to the argument ``ceiling`` (infinity: a plain one); None,
the default: no ReLU. ``qconfig=`` makes the quantizer; without it the output stays in float. A *producer* is the module
that puts an operand on its grid.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from tritonq.nn.elementwise import Add, Joint
from tritonq.nn.reference import Referred
from tritonq.qconfig import QConfig


class MatMul(Joint):
    """``FQ(relu?(a @ b))`` of matrices or batches of them, as :func:`torch.matmul` takes them.

    The arguments are ``ceiling=None`` and ``qconfig=None``, as :class:`Joint` has them.

    In eval mode, if operands and result have known grids, as :class:`Joint` says, the products are summed in integers
    and rounded once: ``code = round(Σ u v · (s_a s_b / s_out)) + z`` with u, v the codes minus zero points.

    Raises:
        ValueError: in eval mode on such grids, sums that may pass 31 bits (53 where an operand has more than 8 bits).

    Examples:
        >>> import torch, tritonq
        >>> tritonq.nn.MatMul()(torch.tensor([[2.0, 1.0]]), torch.tensor([[0.25], [0.5]]))
        tensor([[1.]])
    """

    kind = "matmul"


class AddMatMul(Add):
    """``FQ(relu?(c + FQ(a @ b)))``: :func:`torch.addmm` and :func:`torch.baddbmm` with alpha and beta 1.

    Called with (c, a, b).

    Args:
        ceiling: upper bound of the ReLU behind the sum: infinity for a plain one, 6 for ReLU6; None: no ReLU.
        qconfig: makes the quantizers of product and sum; None: both stay in float.

    Attributes:
        product: the matrix product ``FQ(a @ b)``.

    Examples:
        >>> import torch, tritonq
        >>> tritonq.nn.AddMatMul()(torch.tensor([[1.0]]), torch.tensor([[2.0, 1.0]]), torch.tensor([[0.25], [0.5]]))
        tensor([[2.]])
    """

    def __init__(self, ceiling: float | None = None, *, qconfig: QConfig | None = None) -> None:
        super().__init__(ceiling, qconfig=qconfig)
        self.product = MatMul(qconfig=qconfig)
        self.set_producers(None, self.product)

    def set_operand_producers(self, *producers: Referred) -> None:
        """Set the modules that put the summand c and the matrices a and b on their grids, in this order; None: unknown.

        Eval mode reads the operands' grids from them. Each is a module or a :class:`~tritonq.nn.reference.Reference`.
        """
        summand, a, b = producers
        self.product.set_producers(a, b)
        self.set_producers(summand, self.product)

    def forward(self, input: Tensor, a: Tensor, b: Tensor) -> Tensor:  # type: ignore[override]
        """Return ``FQ(relu?(input + FQ(a @ b)))``; ``input`` and the product broadcast."""
        return self.joined(input, self.product(a, b))


class ScaledDotProductAttention(MatMul):
    """``FQ(FQ_w(softmax(FQ_s(q kᵀ) · scale + mask)) v)``: :func:`torch.nn.functional.scaled_dot_product_attention`.

    FQ_s and FQ_w are fake quantization of scores and softmax. In eval mode each matrix product runs in integers if the
    grids of its operands and its result are known and on; the softmax between them is computed in float. Dropout acts
    on the rounded softmax.

    Args:
        qconfig: makes the quantizers of scores, softmax and result; with ``islands="float"`` the scores stay in float.
            None: nothing is rounded.

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
        reads_float = qconfig is not None and qconfig.islands == "float"
        self.scores = MatMul(qconfig=None if reads_float else qconfig)
        self.softmax_fake_quant = nn.Identity() if qconfig is None else qconfig.activation()
        self.set_producers(self.softmax_fake_quant, None)

    def set_operand_producers(self, *producers: Referred) -> None:
        """Set the modules that put queries, keys and values on their grids, in this order; None: unknown.

        Eval mode computes the two products in integers by these grids; a product with an unknown one, in float.
        """
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
        """Return the fake-quantized result of attention, (..., queries, width of values).

        Args:
            query: (..., queries, width).
            key: (..., keys, width).
            value: (..., keys, width of values).
            attn_mask: broadcasts to (..., queries, keys): bool, True for keys that count; or numbers to add to the
                scores; None: no mask.
            dropout_p: probability of dropout on the softmax, in eval mode too, as in torch's function.
            is_causal: whether each query reads only the keys up to its own position; with ``attn_mask``, those of them
                that the mask lets count, as torch computes it on CPUs (its other kernels refuse both together).
            scale: factor of the scores; None: ``1 / sqrt(width)``.
            enable_gqa: whether keys and values have fewer heads (axis -3) than queries, and are repeated.
        """
        if enable_gqa:
            key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        scores = self.scores(query, key.transpose(-2, -1)) * factor
        if is_causal:
            causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~causal, float("-inf"))
        if attn_mask is None:
            weights = scores.softmax(-1)
        else:
            is_bool = attn_mask.dtype == torch.bool
            counts = attn_mask if is_bool else attn_mask != float("-inf")
            reads_none = ~(counts & causal if is_causal else counts).any(-1, keepdim=True)
            if is_bool:
                scores = scores.masked_fill(~attn_mask, float("-inf"))
            else:  # where a gradient would be NaN, no number is added
                scores = scores + torch.where(reads_none, 0.0, attn_mask)
            # Rows that attend to nothing are zero, as in torch.
            weights = scores.softmax(-1).masked_fill(reads_none, 0.0)
        weights = cast(Tensor, self.softmax_fake_quant(weights))
        return self.joined(nn.functional.dropout(weights, dropout_p), value)


def attention_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Return the eight arguments of a call of ``F.scaled_dot_product_attention``, with torch's defaults filled in.

    The order is ``query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa``; ``args`` and ``kwargs`` are
    those of the call.
    """
    defaults: dict[str, Any] = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None}
    defaults["enable_gqa"] = False
    names = ("query", "key", "value", *defaults)
    given = {**defaults, **dict(zip(names, args, strict=False)), **kwargs}
    return tuple(given[name] for name in names)
