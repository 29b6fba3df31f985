"""torch's multi-head attention, computed by operations that preparation can record and quantize one by one."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MultiheadAttention(nn.MultiheadAttention):
    """:class:`torch.nn.MultiheadAttention` computed as linear layers, two matrix products and a softmax.

    Per head: ``softmax(q kᵀ / sqrt(head_dim) + mask) v`` with q, k, v the projections of query, key and value; a linear
    layer follows. `prepare_qat` gives this class to attention modules, which keep their parameters: torch's own forward
    is one call whose parts can't be quantized. Results agree with torch's to rounding errors of float32.

    Examples:
        >>> import torch, tritonq
        >>> from torch import nn
        >>> class Attends(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        ...     def forward(self, x):
        ...         return self.attention(x, x, x)[0]
        >>> qat = tritonq.prepare_qat(Attends(), example_inputs=torch.randn(2, 5, 8))
        >>> sum(isinstance(module, tritonq.nn.MatMul) for module in qat.modules())
        2
    """

    # What rules by type call it.
    stands_for: ClassVar[type[nn.Module]] = nn.MultiheadAttention

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """False, so that torch's encoder layers do not pass the parameters to one fused kernel in eval mode."""
        return False

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        """Ignore the value that torch's class assigns; whether ``in_proj_weight`` is None tells the same."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``(output, weights)`` of attention; arguments, shapes and results are those of torch's class.

        Args:
            query: (batch, targets, embed_dim) with ``batch_first``, else (targets, batch, embed_dim); without a batch 2
                axes.
            key: (batch, sources, kdim) with ``batch_first``, else (sources, batch, kdim); without a batch 2 axes.
            value: in the axes of ``key``, the last one of size vdim. Both sizes are ``embed_dim`` by default.
            key_padding_mask: (batch, sources), or (sources,) without a batch: bool, True for keys that do not count, or
                numbers to add to the scores; None: all keys count.
            need_weights: whether to return the weights; if not, the second result is None.
            attn_mask: (targets, sources) or (batch * heads, targets, sources): bool or numbers, as
                ``key_padding_mask``; None: no mask.
            average_attn_weights: whether the returned weights are averaged over the heads.
            is_causal: says that ``attn_mask`` is causal, and changes nothing else; needs that mask, as in torch.

        Returns:
            The output, in the axes of ``query``, and the softmax after dropout, (batch, targets, sources) or (batch,
            heads, targets, sources); without a batch both lack that axis. ``add_bias_kv`` and ``add_zero_attn`` append
            a source each.

        Raises:
            ValueError: ``is_causal`` without ``attn_mask``.
        """
        is_batched = query.dim() == 3
        if not is_batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        width = self.embed_dim
        if self.in_proj_weight is None:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        else:
            weights = (
                self.in_proj_weight[:width],
                self.in_proj_weight[width : 2 * width],
                self.in_proj_weight[2 * width :],
            )
        if self.in_proj_bias is None:
            q, k, v = F.linear(query, weights[0]), F.linear(key, weights[1]), F.linear(value, weights[2])
        else:
            q = F.linear(query, weights[0], self.in_proj_bias[:width])
            k = F.linear(key, weights[1], self.in_proj_bias[width : 2 * width])
            v = F.linear(value, weights[2], self.in_proj_bias[2 * width :])
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], 1, width)], 1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], 1, width)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        q = torch.unflatten(q, -1, (self.num_heads, self.head_dim)).transpose(1, 2)
        k = torch.unflatten(k, -1, (self.num_heads, self.head_dim)).transpose(1, 2)
        v = torch.unflatten(v, -1, (self.num_heads, self.head_dim)).transpose(1, 2)
        scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
        mask = _mask(attn_mask, key_padding_mask, is_causal, scores)
        if mask is not None:
            scores = scores + mask
        weights_of_values = F.dropout(scores.softmax(-1), self.dropout, self.training)
        y = self.out_proj((weights_of_values @ v).transpose(1, 2).flatten(2))
        shown = weights_of_values.mean(1) if average_attn_weights else weights_of_values
        if not is_batched:
            return y.squeeze(0), shown.squeeze(0) if need_weights else None
        return y if self.batch_first else y.transpose(0, 1), shown if need_weights else None


def _mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool, scores: Tensor) -> Tensor | None:
    """Return the mask to add to the scores, which broadcasts to (batch, heads, queries, keys); None: no mask.

    Keys that were appended to the given ones have 0 in it.

    Args:
        attn_mask: (queries, keys) or (batch * heads, queries, keys): True, or -inf, for keys that do not count; None:
            all do.
        key_padding_mask: (batch, keys), in the same way; None: all count.
        is_causal: says that ``attn_mask`` is causal.
        scores: (batch, heads, queries, keys).

    Raises:
        ValueError: ``is_causal`` without a mask, as in torch.
    """
    if is_causal and attn_mask is None:
        raise ValueError("is_causal needs attn_mask, as in torch")
    found = None
    if attn_mask is not None:
        given = _added(attn_mask, scores)
        found = given.view(scores.shape[0], -1, *given.shape[1:]) if given.dim() == 3 else given
    if key_padding_mask is not None:
        padding = _added(key_padding_mask, scores)[:, None, None, :]
        found = padding if found is None else found + padding
    return found


def _added(mask: Tensor, scores: Tensor) -> Tensor:
    """Return a mask as numbers to add to the scores: in their dtype, with one column for each of their keys.

    Args:
        mask: (..., keys): bool, where True becomes -inf and False 0; or numbers, which stay as they are. Keys that
            attention appended behind the given ones have no column in it and get 0.
        scores: (batch, heads, queries, keys).
    """
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(mask, float("-inf"))
    return F.pad(mask.to(scores.dtype), (0, scores.shape[-1] - mask.shape[-1]))
