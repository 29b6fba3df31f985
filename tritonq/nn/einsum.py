"""Einsums of two activations, computed as one product of batches of matrices.

FQ in formulas is fake quantization, and ``relu?`` a ReLU if there is one. In eval mode, if both operands lie on known
grids, the products are summed in exact integers and rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from tritonq.nn.products import MatMul
from tritonq.qconfig import QConfig

# Stands for the axes of an ellipsis until operands say how many there are. These then get names that no equation has.
_ELLIPSIS = "."
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


class Einsum(MatMul):
    """``FQ(relu?(einsum(equation, a, b)))`` for an equation that is one product of batches of matrices.

    Every index of an operand must be in the other operand or in the result, and none may occur twice in one operand or
    in the result. Axes of size 1 broadcast. The operands are permuted and reshaped to batches of matrices, and
    multiplied as by :class:`MatMul`.

    Args:
        equation: text as :func:`torch.einsum` takes it, with two operands, with or without ``->``.
        ceiling: upper bound of the ReLU, infinity for a plain one; None: no ReLU.
        qconfig: makes the quantizer of the output; None: the output stays in float.

    Raises:
        TypeError: an equation that is no text, or a ceiling that is not a number.
        ValueError: an equation that breaks these rules, or a ceiling that is not positive; in the forward, operands
            whose axes or sizes don't fit the equation, or in eval mode sums that :class:`MatMul` refuses as too large.

    Examples:
        >>> import torch, tritonq
        >>> tritonq.nn.Einsum("bhqd,bhkd->bhqk")(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 5, 4)).shape
        torch.Size([1, 2, 3, 5])
        >>> tritonq.nn.Einsum("...qd,...kd")(torch.ones(1, 2, 3, 4), torch.ones(2, 5, 4)).shape
        torch.Size([1, 2, 5, 3])
    """

    def __init__(self, equation: str, ceiling: float | None = None, *, qconfig: QConfig | None = None) -> None:
        super().__init__(ceiling, qconfig=qconfig)
        if not isinstance(equation, str):
            raise TypeError(f"equation must be a str as torch.einsum takes it, got {equation!r}")
        self.equation = equation
        self._contraction = Contraction.of(equation)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return ``FQ(relu?(einsum(equation, a, b)))`` for two float tensors, in the axes of the equation's result.

        Raises:
            ValueError: operands whose axes or sizes don't fit the equation, or in eval mode, on known grids, sums that
                may pass 31 bits (53 where an operand has more than 8 bits).
        """
        contraction = self._contraction.without_ellipsis(a.dim(), b.dim())
        sizes = contraction.sizes(a, b)
        first, second = contraction.matrices(a, b, sizes)
        return contraction.result(self.joined(first, second), sizes)

    def extra_repr(self) -> str:
        """Return the equation for ``repr``, and the ReLU if there is one, such as "'ij,jk->ik', relu up to 6"."""
        return ", ".join(filter(None, (repr(self.equation), super().extra_repr())))


def einsum_call(args: Sequence[Any]) -> tuple[Any, tuple[Any, ...]]:
    """Return ``(equation, operands)`` from ``args``, the positional arguments of a valid call of :func:`torch.einsum`.

    They may be: an equation and operands; an equation and a list of operands; operands each followed by a list of
    indices, with a list for the result at the end or without. In the last case the lists become an equation: 0 to 25
    are "A" to "Z", 26 to 51 "a" to "z", an Ellipsis is "...", so that ``(a, [0, 1], b, [1, 26], [0, 26])`` gives
    ``("AB,Ba->Aa", (a, b))``. Without a list for the result the equation has no ``->``.
    """
    first, *rest = args
    if not isinstance(first, str):
        has_result = len(args) % 2
        result = f"->{_letters(args[-1])}" if has_result else ""
        pairs = args[: len(args) - has_result]
        return ",".join(map(_letters, pairs[1::2])) + result, tuple(pairs[::2])
    operands = rest[0] if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else rest
    return first, tuple(operands)


def einsum_operands(args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> tuple[Any, ...]:
    """Return the operands in ``args`` of a call of :func:`torch.einsum`, which has no ``kwargs``: they are ignored."""
    return einsum_call(args)[1]


def _letters(indices: Any) -> str:
    """Return a list of indices (numbers from 0 to 51, and an ellipsis) as a part of an equation.

    ``[0, 27]`` gives "Ab".
    """
    return "".join("..." if index is ... else _LETTERS[index] for index in indices)


@dataclass(frozen=True)
class Contraction:
    """An einsum equation of two operands, seen as a product of batches of matrices.

    ``Contraction.of("bqd,bkd->bqk")`` is ``Contraction("bqd", "bkd", "bqk")``: the index "b" numbers the products of
    the batch, "d" is summed.

    Attributes:
        a: the indices of the first operand, one letter per axis, in order; ``.`` stands for an ellipsis.
        b: the indices of the second operand, written likewise.
        out: the indices of the result, written likewise.
    """

    a: str
    b: str
    out: str

    @classmethod
    def of(cls, equation: str) -> Contraction:
        """Return the contraction of an equation such as ``"bqd,bkd->bqk"``.

        Without ``->`` the result has the ellipsis, if there is one, and then the indices that occur once, in
        alphabetical order.

        Raises:
            ValueError: there are not two operands; an index that is no letter; or an index is repeated within an
                operand or the result, is in only one operand and not in the result, or is only in the result; an
                ellipsis counts as an index.
        """
        left, arrow, out = equation.replace(" ", "").replace("...", _ELLIPSIS).partition("->")
        a, comma, b = left.partition(",")
        if not comma or "," in b:
            raise ValueError(f"expected two operands, got {equation!r}")
        if not {*a, *b, *out} <= {*_LETTERS, _ELLIPSIS}:
            raise ValueError(f"indices are letters, got {equation!r}")
        if not arrow:
            once = sorted(index for index in {*a, *b} - {_ELLIPSIS} if (a + b).count(index) == 1)
            out = (_ELLIPSIS if _ELLIPSIS in a + b else "") + "".join(once)
        return cls(a, b, out).checked(equation)

    def checked(self, equation: str) -> Contraction:
        """Return this contraction if it is one product of batches of matrices; errors quote the text ``equation``.

        Raises:
            ValueError: an index is repeated within an operand or the result, is in only one operand and not in the
                result, or is only in the result.
        """
        repeated = any(len(set(part)) < len(part) for part in (self.a, self.b, self.out))
        lone = {*self.a} ^ {*self.b}
        if repeated or not lone <= {*self.out} or not {*self.out} <= {*self.a, *self.b}:
            raise ValueError(
                f"{equation!r} is no product of batches of matrices: it sums or repeats an index by itself"
            )
        return self

    def without_ellipsis(self, a_axes: int, b_axes: int) -> Contraction:
        """Return the contraction for operands with ``a_axes`` and ``b_axes`` axes, without an ellipsis.

        Each axis of an ellipsis gets a digit as its index: for 4 and 3 axes "...qd,...kd->...qk" becomes
        "01qd,1kd->01qk". The axes of two ellipses are matched from the last one on, as in broadcasting. A contraction
        without an ellipsis is returned as it is, whatever the numbers of axes.

        Raises:
            ValueError: an operand has fewer axes than indices, or only one ellipsis has an axis that the result lacks;
                too many axes of an operand without an ellipsis may be found only by :meth:`sizes`.
        """
        if _ELLIPSIS not in self.a + self.b:
            return self
        counts = [axes - len(part.replace(_ELLIPSIS, "")) for part, axes in ((self.a, a_axes), (self.b, b_axes))]
        if min(counts) < 0:
            raise ValueError(f"operands with {a_axes} and {b_axes} axes have fewer than the indices of {self}")
        names = [chr(ord("0") + axis) for axis in range(max(counts))]

        def named(part: str, count: int) -> str:
            return part.replace(_ELLIPSIS, "".join(names[len(names) - count :]))

        shown = f"{self.a},{self.b}->{self.out}".replace(_ELLIPSIS, "...")
        return Contraction(named(self.a, counts[0]), named(self.b, counts[1]), named(self.out, len(names))).checked(
            shown
        )

    @property
    def batch(self) -> str:
        """The indices that both operands and the result have, in the order of ``a``, such as "b" for "bij,bjk->bik"."""
        return "".join(index for index in self.a if index in self.b and index in self.out)

    @property
    def summed(self) -> str:
        """The indices that both operands have and the result lacks, in the order of ``a``."""
        return "".join(index for index in self.a if index in self.b and index not in self.out)

    def sizes(self, a: Tensor, b: Tensor) -> dict[str, int]:
        """Return the size of each index by its letter, such as ``{"b": 2, "q": 3}``, for the operands ``a`` and ``b``.

        An axis of size 1 broadcasts to the other operand's. Ellipses must have been replaced
        (:meth:`without_ellipsis`).

        Raises:
            ValueError: an operand has more or fewer axes than indices, or an index has two sizes of which none is 1.
        """
        found: dict[str, int] = {}
        for name, operand in ((self.a, a), (self.b, b)):
            if operand.dim() != len(name):
                raise ValueError(f"expected {len(name)} axes ({name}), got the shape {tuple(operand.shape)}")
            for index, size in zip(name, operand.shape, strict=True):
                before = found.get(index, 1)
                if 1 not in (before, size) and before != size:
                    raise ValueError(f"index {index!r} has the sizes {before} and {size}")
                found[index] = size if before == 1 else before
        return found

    def matrices(self, a: Tensor, b: Tensor, sizes: Mapping[str, int]) -> tuple[Tensor, Tensor]:
        """Return the operands as matrices (batch..., m, k) and (batch..., k, n), for a product by ``torch.matmul``.

        The batch axes are those of :attr:`batch`, of size 1 where an operand broadcasts; k is the product of the sizes
        of :attr:`summed`, m and n those of the indices that only ``a`` or only ``b`` has, 1 if there are none.
        ``sizes`` is what :meth:`sizes` returned for ``a`` and ``b``. Views where possible, else copies.
        """
        rows, columns = self._free(self.a), self._free(self.b)
        first = self._arranged(a, self.a, (rows, self.summed), sizes)
        return first, self._arranged(b, self.b, (self.summed, columns), sizes)

    def result(self, y: Tensor, sizes: Mapping[str, int]) -> Tensor:
        """Return ``y``, the product of the matrices, with the axes of the equation's result.

        ``y`` is (batch..., m, n), the product of what :meth:`matrices` returned; ``sizes`` is what that was given.
        """
        order = self.batch + self._free(self.a) + self._free(self.b)
        return y.reshape([sizes[index] for index in order]).permute([order.index(index) for index in self.out])

    def _free(self, indices: str) -> str:
        """Return those of some indices that are neither batch indices nor summed."""
        return "".join(index for index in indices if index not in self.batch + self.summed)

    def _arranged(self, x: Tensor, indices: str, matrix: tuple[str, str], sizes: Mapping[str, int]) -> Tensor:
        """Return ``x`` permuted to (batch..., rows..., columns...), with rows and columns flattened to one axis each.

        A summed axis of size 1 is repeated if the other operand's is longer; batch axes broadcast in the product.

        Args:
            x: an operand.
            indices: its indices, in order.
            matrix: the indices of its rows and of its columns.
            sizes: the size of each index.
        """
        order = self.batch + matrix[0] + matrix[1]
        moved = x.permute([indices.index(index) for index in order])
        own = dict(zip(order, moved.shape, strict=True))
        whole = {index: sizes[index] if index in self.summed else own[index] for index in order}
        if whole != own:
            moved = moved.expand(list(whole.values()))
        return moved.reshape(
            [whole[index] for index in self.batch] + [prod(whole[index] for index in part) for part in matrix]
        )
