"""Quantization-aware embeddings: ``embedding(indices, FQ(table))``, where FQ is fake quantization of the table.

The table's quantizer is the child ``weight_fake_quant``, made by the qconfig's ``weight``; by default it has one scale
and zero point per row.
"""

from __future__ import annotations

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn

from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.granularity import describe_granularity, granularity_of
from tritonq.nn.conv import check_float_type
from tritonq.nn.qat import checked_qconfig, without_qconfig
from tritonq.qconfig import QConfig


class _QATTable(nn.Module):
    """The constructor of both embeddings, and the quantizer of their tables.

    Outputs are rows of the quantized table and get no quantizer of their own.
    """

    num_embeddings: int
    max_norm: float | None

    def __init__(self, *args: Any, qconfig: QConfig | None = None, **kwargs: Any) -> None:
        args, qconfig = without_qconfig(args, qconfig)
        super().__init__(*args, **kwargs)
        self.attach_quantizer(qconfig, self.num_embeddings)

    def attach_quantizer(self, qconfig: QConfig | None, rows: int) -> None:
        """Keep ``qconfig`` and create its weight quantizer; one with a scale per row gets buffers for ``rows`` rows.

        Raises:
            TypeError: ``qconfig`` is None or no QConfig of tritonq.
            ValueError: the quantizer has scales per group, or along another axis than the rows.
        """
        self.qconfig = qconfig = checked_qconfig(self, qconfig)
        self.weight_fake_quant = qconfig.weight()
        if isinstance(self.weight_fake_quant, FakeQuantizeBase):
            self.weight_fake_quant.batch_axis = None
        granularity = granularity_of(self.weight_fake_quant)
        if granularity.group is not None or granularity.axis not in (None, 0):
            raise ValueError(
                f"the table of an {type(self).__name__} can't have a scale per {describe_granularity(granularity)}: "
                "give it one per row or per table, by a QConfigMapping"
            )
        if granularity.axis is not None:
            self.weight_fake_quant.allocate(rows)  # type: ignore[operator]

    def table(self) -> Tensor:
        """Return the quantized table, (rows, embedding_dim), whose rows a caller with ``max_norm`` scales in place.

        If the quantizer returns ``weight`` itself, so does this method; with ``max_norm`` it returns a copy of it.
        """
        weight = cast(Tensor, self.weight)
        table = cast(Tensor, self.weight_fake_quant(weight))
        return table.clone() if table is weight and self.max_norm is not None else table


class Embedding(_QATTable, nn.Embedding):
    """``nn.Embedding`` with a fake-quantized table; the constructor is the float one's, plus ``qconfig=``.

    torch.ao uses float zero points here; tritonq's are integers, so that zero is on the grid of every row. With
    ``max_norm`` the rounded rows are scaled; the parameter ``weight`` is not changed, while torch scales it in place.

    Args:
        *args: arguments of ``nn.Embedding``.
        qconfig: makes the quantizer of the table (its ``weight``).
        **kwargs: named arguments of ``nn.Embedding``.

    Raises:
        TypeError: no QConfig given, or one by position and one by name.
        ValueError: the quantizer has scales per group, or along another axis than the rows.

    Source: torch.ao.nn.qat.Embedding.

    Examples:
        >>> import torch, tritonq
        >>> table = tritonq.nn.Embedding(10, 4, qconfig=tritonq.default_embedding_qat_qconfig)
        >>> table(torch.tensor([1, 7])).shape, table.weight_fake_quant.scale.shape
        (torch.Size([2, 4]), torch.Size([10]))
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the rows (..., embedding_dim) of the quantized table for integer indices (...)."""
        return F.embedding(
            input,
            self.table(),
            self.padding_idx,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.sparse,
        )

    @classmethod
    def from_float(cls, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> Embedding:
        """Return the quantization-aware form of ``mod``, whose table it shares and whose ``qconfig`` it uses.

        Args:
            mod: the float embedding.
            use_precomputed_fake_quant: not used; torch.ao has it.

        Raises:
            TypeError: ``mod`` is no ``nn.Embedding``, is of a subclass of it, or has no QConfig.
            ValueError: the quantizer has scales per group, or along another axis than the rows.
        """
        check_float_type(cls, mod, nn.Embedding)
        return cast(Embedding, _from_float(cls, mod, ("padding_idx",)))


class EmbeddingBag(_QATTable, nn.EmbeddingBag):
    """``nn.EmbeddingBag`` with a fake-quantized table; the constructor is the float one's, plus ``qconfig=``.

    With ``max_norm`` the rounded rows are scaled; the parameter ``weight`` is not changed, while torch scales it in
    place.

    Args:
        *args: arguments of ``nn.EmbeddingBag``.
        qconfig: makes the quantizer of the table (its ``weight``).
        **kwargs: named arguments of ``nn.EmbeddingBag``.

    Raises:
        TypeError: no QConfig given, or one by position and one by name.
        ValueError: the quantizer has scales per group, or along another axis than the rows.

    Source: torch.ao.nn.qat.EmbeddingBag.

    Examples:
        >>> import torch, tritonq
        >>> table = tritonq.nn.EmbeddingBag(10, 4, mode="sum", qconfig=tritonq.default_embedding_qat_qconfig)
        >>> table(torch.tensor([[1, 7], [2, 2]])).shape
        torch.Size([2, 4])
    """

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Return (bags, embedding_dim): for each bag the sum, mean or maximum of its rows of the quantized table.

        Args:
            input: integer indices of rows: (bags, size), or one axis with all bags one after the other.
            offsets: the place in ``input`` where each bag begins, if ``input`` has one axis; None if it has two. With
                ``include_last_offset`` the length of ``input`` follows as one more element.
            per_sample_weights: a factor for each index, in the shape of ``input``, for mode "sum" only; None: 1.

        Raises:
            ValueError: ``input`` has one axis and no ``offsets``, two axes and ``offsets``, or more axes.
            NotImplementedError: ``per_sample_weights`` in mode "mean" or "max".
        """
        return embedding_bag(self, self.table(), input, offsets, per_sample_weights)

    @classmethod
    def from_float(cls, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> EmbeddingBag:
        """Return the quantization-aware form of ``mod``, whose table it shares and whose ``qconfig`` it uses.

        Args:
            mod: the float embedding bag.
            use_precomputed_fake_quant: not used; torch.ao has it.

        Raises:
            TypeError: ``mod`` is no ``nn.EmbeddingBag``, is of a subclass of it, or has no QConfig.
            ValueError: the quantizer has scales per group, or along another axis than the rows.
        """
        check_float_type(cls, mod, nn.EmbeddingBag)
        return cast(EmbeddingBag, _from_float(cls, mod, ("mode", "include_last_offset", "padding_idx")))


def embedding_bag(
    bag: nn.EmbeddingBag, table: Tensor, input: Tensor, offsets: Tensor | None, per_sample_weights: Tensor | None
) -> Tensor:
    """Return the result (bags, embedding_dim) of ``bag`` with ``table``, (rows, embedding_dim), in place of its weight.

    ``input`` has indices of rows: (bags, size) with ``offsets`` None, or one axis with all bags, where ``offsets`` are
    the places at which the bags begin. ``per_sample_weights``, in the shape of ``input``, are factors of the rows that
    are read, for mode "sum" only; None: 1. If ``bag`` has a ``max_norm``, rows of ``table`` that are read are scaled
    down in place to at most this norm.
    """
    return F.embedding_bag(
        input,
        table,
        offsets,
        bag.max_norm,
        bag.norm_type,
        bag.scale_grad_by_freq,
        bag.mode,
        bag.sparse,
        per_sample_weights,
        bag.include_last_offset,
        bag.padding_idx,
    )


def _from_float(cls: type[nn.Module], mod: nn.Module, extra: tuple[str, ...]) -> nn.Module:
    """Return an object of ``cls`` that shares the table of ``mod``; ``extra`` names further constructor arguments."""
    names = ("num_embeddings", "embedding_dim", "max_norm", "norm_type", "scale_grad_by_freq", "sparse", *extra)
    arguments = {name: getattr(mod, name) for name in names}
    qat = cls(**arguments, device="meta", qconfig=getattr(mod, "qconfig", None))
    qat.weight = mod.weight
    cast(nn.Module, qat.weight_fake_quant).to(cast(Tensor, mod.weight).device)
    return qat.train(mod.training)
