"""Embedding tables of a converted model: integer codes, whose values are computed in float when rows are looked up.

A row's values are ``(code - zero_point) · scale``, float32, with the row's own scale and zero point.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch.nn.functional as F
from torch import Tensor, nn

from tritonq.deploy.modules import DeployedModule
from tritonq.deploy.values import check_shape, lazy_values, stored
from tritonq.deploy.weight_codes import codes_of_rows
from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.float_fake_quantize import FloatFakeQuantize
from tritonq.nn import Embedding, EmbeddingBag
from tritonq.nn.embedding import embedding_bag
from tritonq.quantized_type import QuantizedType

# What a saved file holds per table.
TABLE_TENSOR_NAMES = ("weight", "weight_scale", "weight_zero_point")


class QuantizedTable(DeployedModule):
    """A table of integer rows, each with its scale and zero point; base of the two classes below.

    Args:
        geometry: arguments of the float layer's constructor, by name.
        qtype: the quantized type of the codes.
        tensors: ``weight`` (the codes), ``weight_scale`` and ``weight_zero_point``, by name; their memory is shared.

    Attributes:
        weight: the float32 values of the codes, (rows, embedding_dim), read-only, computed when something reads them.
        stored_weight: the codes, (rows, embedding_dim), in the smallest integer dtype that holds them.
        weight_scale: float32 (rows,).
        weight_zero_point: int32 (rows,).
        qtype: the quantized type of the codes.
        target: name of the engine that the model was prepared for, one of :data:`tritonq.targets.TARGETS`; None:
            unknown, or not set yet.

    Raises:
        ValueError: a tensor whose shape doesn't fit the geometry.
    """

    weight_scale: Tensor
    weight_zero_point: Tensor
    target: str | None = None
    tensor_names = TABLE_TENSOR_NAMES
    parameter_names = ("weight", "weight_scale")

    float_type: ClassVar[type[nn.Module]]
    geometry_names: ClassVar[tuple[str, ...]] = (
        *("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    )

    def __init__(self, geometry: dict[str, Any], qtype: QuantizedType, tensors: dict[str, Tensor]) -> None:
        self.float_type.__init__(self, **geometry, device="meta")
        check_shape("weight", tensors["weight"], tuple(self.stored_weight.shape))
        for name in ("weight_scale", "weight_zero_point"):
            check_shape(name, tensors[name], (len(self.stored_weight),))
        del self._parameters["weight"]
        self.qtype = qtype
        self.keep(**{name: tensors[name] for name in TABLE_TENSOR_NAMES})
        self.eval()

    @property
    def geometry(self) -> dict[str, Any]:
        """Arguments of the float layer's constructor by name, such as ``padding_idx``; not weight, device and dtype."""
        return {name: getattr(self, name) for name in self.geometry_names}

    @property
    def stored_weight(self) -> Tensor:
        """The tensor that the state dict has as ``weight``, which holds integer codes.

        In the copy of a model from which an export writes its file, it may hold the table's float32 values instead.
        """
        return cast(Tensor, stored(self, "weight"))

    def _float_weight(self) -> Tensor:
        codes = self.stored_weight
        return codes if codes.is_floating_point() else lazy_values(codes, self.dequantized_weight)

    weight: Tensor = property(_float_weight)  # type: ignore[assignment]

    def dequantized_weight(self) -> Tensor:
        """Return the whole table as float32 values (rows, embedding_dim): ``(codes - zero_point) · scale``.

        ``stored_weight`` must hold codes, not values of an export.
        """
        return (self.stored_weight - self.weight_zero_point[:, None]).float() * self.weight_scale[:, None]


class QuantizedEmbedding(QuantizedTable, nn.Embedding):
    """``nn.Embedding`` over a table of integers; only the rows that are looked up become float.

    With ``max_norm`` the whole table does, in each call.
    """

    float_type = nn.Embedding

    def forward(self, input: Tensor) -> Tensor:
        """Return the float32 values (..., embedding_dim) of the rows with the integer indices ``input`` (...).

        With ``max_norm`` the returned rows are scaled as ``nn.Embedding`` does it. The stored table does not change.
        """
        if self.max_norm is not None:
            return F.embedding(input, self.dequantized_weight(), self.padding_idx, self.max_norm, self.norm_type)
        codes, zero = F.embedding(input, self.stored_weight), self.weight_zero_point[input].unsqueeze(-1)
        return (codes - zero).float() * self.weight_scale[input].unsqueeze(-1)


class QuantizedEmbeddingBag(QuantizedTable, nn.EmbeddingBag):
    """``nn.EmbeddingBag`` over a table of integers; each call computes the whole table as float32."""

    float_type = nn.EmbeddingBag
    geometry_names = (*QuantizedTable.geometry_names, "mode", "include_last_offset")

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Return float32 (bags, embedding_dim): the sum, mean or maximum (``mode``) of each bag's rows.

        Rows of index ``padding_idx`` are left out; a bag without rows gives 0.

        Args:
            input: integer indices: (n,) with ``offsets``, else (bags, indices per bag).
            offsets: where each bag begins in ``input``, with ``include_last_offset`` also the end of the last bag; None
                if ``input`` is a matrix.
            per_sample_weights: float32 factors of the rows, shaped as ``input``, for mode "sum" only; None for 1.
        """
        return embedding_bag(self, self.dequantized_weight(), input, offsets, per_sample_weights)


# By the float table that a quantization-aware one is derived from.
TABLE_TYPES: dict[type[nn.Module], type[QuantizedTable]] = {
    cls.float_type: cls for cls in (QuantizedEmbedding, QuantizedEmbeddingBag)
}


def deployed_table(table: Embedding | EmbeddingBag) -> nn.Module:
    """Return the deployed form of an embedding: a table of integers, or of ``torch.nn`` if nothing rounds the weight.

    A table of floats of few bits becomes a module of ``torch.nn``, too, which holds the rounded values. Nothing is
    shared with ``table``.

    Raises:
        ValueError: the weight's quantizer has scales per column or per group.
    """
    kind = nn.Embedding if isinstance(table, nn.Embedding) else nn.EmbeddingBag
    target: Any = TABLE_TYPES[kind]
    geometry = {name: getattr(table, name) for name in target.geometry_names}
    quantizer = table.weight_fake_quant
    if isinstance(quantizer, FloatFakeQuantize) and quantizer.rounds():
        # A table of numbers that the format has: nothing computes on its codes.
        return kind(**geometry, _weight=quantizer.rounded(table.weight.detach()))
    if not isinstance(quantizer, FakeQuantizeBase) or not quantizer.is_enabled_on_host():
        return kind(**geometry, _weight=table.weight.detach().clone())
    weight = table.weight if quantizer.rounds_to_nearest else quantizer(table.weight)
    codes, scale, zero = codes_of_rows(weight, quantizer.grid())
    tensors = {"weight": codes, "weight_scale": scale, "weight_zero_point": zero}
    made: QuantizedEmbedding | QuantizedEmbeddingBag = target(geometry, quantizer.qtype, tensors)
    made.target = table.qconfig.target
    return made
