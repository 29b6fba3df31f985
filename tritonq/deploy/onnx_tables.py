"""Embedding tables in ONNX files: a Gather from codes behind DequantizeLinear, or from float values."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from tritonq.deploy.embedding_tables import QuantizedEmbeddingBag, QuantizedTable
from tritonq.deploy.onnx_ops import dequantize
from tritonq.nn.embedding import embedding_bag
from tritonq.prepare.forwards.edited import set_inner_forward


def rewrite_table(table: QuantizedTable, *, in_float: bool) -> None:
    """Make a table trace to a look-up in its dequantized codes, or with ``in_float`` in its values; changed in place.

    Codes of more than 8 bits become values, too, and so do those of a table with ``max_norm``: rows with a larger norm
    are scaled down here, once, and ``max_norm`` becomes None.
    """
    held = cast(Any, table)  # a class of torch.nn, too
    if in_float or held.max_norm is not None or table.stored_weight.dtype not in (torch.int8, torch.uint8):
        values = table.dequantized_weight()
        if held.max_norm is not None:
            rows = torch.arange(len(values), device=values.device)
            torch.embedding_renorm_(values, rows, held.max_norm, held.norm_type)
            held.max_norm = None
        table.keep(weight=values)
    else:
        table.weight_zero_point = table.weight_zero_point.to(table.stored_weight.dtype)
    forward: Any = _bags if isinstance(table, QuantizedEmbeddingBag) else _look_up
    set_inner_forward(table, partial(forward, table))


def _look_up(table: QuantizedTable, input: Tensor) -> Tensor:
    return F.embedding(input, _values(table))


def _bags(
    table: QuantizedEmbeddingBag,
    input: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    if input.dim() != 2 or table.padding_idx is not None:
        return embedding_bag(table, _values(table), input, offsets, per_sample_weights)
    # torch's exporter writes a loop over bags, and one that is no valid ONNX for means.
    rows = _look_up(table, input)
    rows = rows if per_sample_weights is None else rows * per_sample_weights.unsqueeze(-1)
    reduce: Any = {"sum": Tensor.sum, "mean": Tensor.mean, "max": Tensor.amax}[table.mode]
    return cast(Tensor, reduce(rows, 1))


def _values(table: QuantizedTable) -> Tensor:
    if table.stored_weight.is_floating_point():
        return table.stored_weight
    values: Tensor = dequantize(table.stored_weight, table.weight_scale, table.weight_zero_point, 0)
    return values
