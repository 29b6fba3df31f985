"""Find joins, which get a quantizer of their own. A *join* is an operation of several tensors.

Additions, subtractions, products, attention and concatenations are joins. To *read* a call is to return its operands,
as recorded, and what keeps it from becoming a module ("": nothing). Without operands, ``((), "")``, it is no join. To
add a kind, add how its calls are read, and its module, to ``KINDS``.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias, cast, get_args

from torch import nn

from tritonq.nn import GLU, Add, AddMatMul, Cat, Einsum, MatMul, Maximum, Minimum, Mul, ScaledDotProductAttention, Sub
from tritonq.nn.concatenation import Arrangement
from tritonq.nn.einsum import Contraction, einsum_call
from tritonq.prepare.decide.analysis import IN_TRANSFORM, Analysis
from tritonq.prepare.decide.layers import relus_after
from tritonq.prepare.forwards.answered import AnsweredForward
from tritonq.prepare.forwards.graph import (
    ForwardGraph,
    Operands,
    attention_operands,
    node_operands,
    product_operands,
    sequence_operand,
)
from tritonq.prepare.forwards.proof import Site
from tritonq.prepare.record.dataflow import Call, CallIndex, Ref, ValueIndex, refs_in
from tritonq.qconfig import QConfig

# Kinds whose results hold the elements of their operands.
CONCATENATIONS = frozenset(get_args(Arrangement))
_SUMS_WITH_PRODUCTS = frozenset(["addmm", "baddbmm"])
_PRODUCTS = frozenset(["matmul", "einsum", *_SUMS_WITH_PRODUCTS, "scaled_dot_product_attention"])
# Why a join stays in float that nothing quantized reads or feeds.
NO_NEIGHBOUR = "nothing that it reads, and nothing that reads it, is quantized"


@dataclass(frozen=True)
class Join:
    """An operation of several tensors, at one place in one forward.

    Attributes:
        kind: key into ``KINDS``, such as "add".
        owner: name of the module in whose forward it stands.
        site: its place there; None if it stays in float.
        reason: why it stays in float; "" if it does not.
        setting: a constant that its module needs: the axis of a concatenation or GLU, an einsum's equation; else None.
        calls: indices of its calls, in all recorded modes.
        ends: for each call the index of the ReLU behind it that becomes part of the join, or of the call itself.
        relus: indices of these ReLU calls.
        ceiling: upper bound of these ReLUs, infinity for plain ones; None if there are none.
    """

    kind: str
    owner: str
    site: Site | None
    reason: str
    setting: Any
    calls: tuple[CallIndex, ...]
    ends: tuple[CallIndex, ...]
    relus: tuple[CallIndex, ...]
    ceiling: float | None

    @property
    def home(self) -> str:
        """Name of the module whose qconfig and device the join has, which is the same module as ``owner``."""
        return self.owner

    @property
    def knows_operands(self) -> bool:
        """Whether its module refers to the quantizers of its operands, to use their codes; False for concatenations."""
        return self.operands is not sequence_operand

    @property
    def operands(self) -> Operands:
        """The function that takes the join's ``fx.Node`` and returns a tuple: the arguments of the join's module."""
        return KINDS[self.kind].operands

    @property
    def rounds_constants(self) -> bool:
        """Whether an operand that is computed from parameters and buffers alone is rounded like the others.

        True for products of matrices (einsum and addmm, too) and attention. For concatenations, minima and maxima such
        an operand stays in float; for other kinds a call with one is no join.
        """
        return KINDS[self.kind].constants == "rounded"

    @property
    def is_product(self) -> bool:
        """Whether its kind is matmul, einsum, addmm, baddbmm or attention; False for ``mul``, ``inner`` and so on."""
        return self.kind in _PRODUCTS

    def module(self, qconfig: QConfig | None) -> nn.Module:
        """Return a new module that takes the place of the join; with ``qconfig`` None it has no quantizer."""
        return KINDS[self.kind].module(self, qconfig)


# The recorded operands of a call, and what keeps it from becoming a module, or "".
Reading: TypeAlias = "tuple[tuple[Any, ...], str]"


@dataclass(frozen=True)
class JoinKind:
    """One kind of join.

    Attributes:
        read: takes a Call; returns its operands, and what keeps it from becoming a module ("" if nothing does).
        module: takes a Join and a QConfig or None; returns the module that takes the place of the join. Raises a
            ValueError for kinds that always stay in float, such as "inner".
        setting: takes a Call; returns what the module needs of it besides its operands, such as the axis of a
            concatenation. By default it returns None.
        operands: takes the ``fx.Node`` of a join and returns a tuple: the arguments of the module.
        takes_relu: whether the module computes the ReLU behind it as well.
        constants: what happens to an operand computed from parameters and buffers alone. ``"rounded"``: rounded as the
            others; ``"kept"``: not rounded; ``"refused"``: a call with such an operand is no join.
        in_training_alone: whether a call that only training makes is a join. False for differences, extrema and
            products of elements, which are dropout and the like there.
    """

    read: Callable[[Call], Reading]
    module: Callable[[Join, QConfig | None], nn.Module]
    setting: Callable[[Call], Any] = lambda call: None
    operands: Operands = node_operands
    takes_relu: bool = True
    constants: Literal["rounded", "kept", "refused"] = "refused"
    in_training_alone: bool = True


def _pair(call: Call) -> Reading:
    """Read a call of two tensors, such as an addition; one with a tensor and a number has no operands.

    Further arguments that change the result, such as alpha=2, keep it from becoming a module.
    """
    named = ("input", "other")
    items = (*call.args, *(value for key, value in call.kwargs.items() if key in named))
    tensors = tuple(item for item in items if isinstance(item, Ref))
    if len(tensors) != 2:
        return (), ""
    if len(items) > 2:
        return tensors, "it takes a third argument"
    further = [f"{key}={_short(value)}" for key, value in call.kwargs.items() if key not in named and value != 1]
    if getattr(call.target, "__name__", "").strip("_") == "rsub":
        further.append("its operands in reverse order")
    return tensors, f"it takes {', '.join(further)}" if further else ""


def _einsum(call: Call) -> Reading:
    """Read a call of ``torch.einsum`` with two tensors; one with more or fewer has no operands.

    An equation that ``Contraction`` does not take keeps it from becoming a module.
    """
    equation, tensors = einsum_call(call.args)
    if len(tensors) != 2:
        return (), ""
    try:
        Contraction.of(equation)
    except ValueError as error:
        return tensors, str(error)
    return tensors, ""


def _sum_with_product(call: Call) -> Reading:
    """Read a call of addmm or baddbmm: its operands are a summand and two matrices; with fewer tensors it has none.

    A factor alpha or beta other than 1 keeps it from becoming a module.
    """
    named = ("input", "mat1", "mat2", "batch1", "batch2")
    items = (*call.args, *(value for key, value in call.kwargs.items() if key in named))
    tensors = tuple(item for item in items if isinstance(item, Ref))
    further = [f"{key}={_short(value)}" for key, value in call.kwargs.items() if key not in named and value != 1]
    return (tensors, f"it takes {', '.join(further)}" if further else "") if len(tensors) == 3 else ((), "")


def _untaken(why: str) -> Callable[[Call], Reading]:
    """Return a function that reads calls of products which stay in float, for the reason ``why``."""

    def read(call: Call) -> Reading:
        first = call.args[0] if call.args and isinstance(call.args[0], tuple) else call.args
        tensors = tuple(item for item in first if isinstance(item, Ref))
        return (tensors, why) if len(tensors) > 1 else ((), "")

    return read


def _halves(call: Call) -> Reading:
    """Read a call of glu: its only operand is the tensor whose halves are multiplied; nothing hinders it."""
    item = call.args[0] if call.args else call.kwargs.get("input")
    return ((item,), "") if isinstance(item, Ref) else ((), "")


def _attention(call: Call) -> Reading:
    """Read a call of scaled dot-product attention: its operands are queries, keys and values; nothing hinders it."""
    given = {**dict(zip(("query", "key", "value"), call.args, strict=False)), **call.kwargs}
    return tuple(given[name] for name in ("query", "key", "value")), ""


def _sequence(call: Call) -> Reading:
    """Read a call that takes a sequence of tensors; a sequence of one tensor has no operands, as it is no join.

    The argument ``out`` keeps it from becoming a module.
    """
    parts = call.args[0] if call.args else call.kwargs.get("tensors")
    if not isinstance(parts, tuple) or len(parts) < 2:
        return (), ""
    return parts, "it takes out=" if "out" in call.kwargs else ""


def _stacked(call: Call) -> Reading:
    """Read a call of ``torch.stack``; if all its tensors are one tensor, it only moves values and has no operands."""
    parts, obstacle = _sequence(call)
    return (parts, obstacle) if len(set(parts)) > 1 else ((), "")


def _extremum(kind: type[Minimum | Maximum], join: Join, qconfig: QConfig | None) -> nn.Module:
    return kind(join.ceiling, qconfig=qconfig)


# torch.max and torch.min of two tensors are these, too.
_EXTREMA: Mapping[type[Minimum | Maximum], tuple[str, ...]] = {
    Minimum: ("minimum", "min"),
    Maximum: ("maximum", "max"),
}


def _concatenation(join: Join, qconfig: QConfig | None) -> nn.Module:
    return Cat(join.setting, arrangement=cast(Arrangement, join.kind), qconfig=qconfig)


def _dim(call: Call) -> int:
    """Return the axis of a concatenation or stack; 0 for functions such as ``hstack``, whose axis is fixed."""
    if call.name not in ("cat", "stack"):
        return 0
    dim: Any = call.kwargs.get("dim", call.kwargs.get("axis", call.args[1] if len(call.args) > 1 else 0))
    return int(dim)


def _no_module(join: Join, qconfig: QConfig | None) -> nn.Module:
    raise ValueError(f"{join.kind} has no module: {join.reason}")


# Products of activations that stay in float, and why.
_UNTAKEN = {
    "addbmm": "it adds up a batch of products: write it as an einsum and an addition",
    "addmv": "write it as a matrix product and an addition",
    "addr": "write it as a matrix product and an addition",
    "linalg_multi_dot": "it multiplies in an order of its own: write it as a @ b @ c",
    "tensordot": "write it as an einsum",
    "inner": "write it as a matrix product",
}

KINDS: Mapping[str, JoinKind] = {
    "add": JoinKind(_pair, lambda join, qconfig: Add(join.ceiling, qconfig=qconfig)),
    "sub": JoinKind(_pair, lambda join, qconfig: Sub(join.ceiling, qconfig=qconfig), in_training_alone=False),
    "mul": JoinKind(_pair, lambda join, qconfig: Mul(join.ceiling, qconfig=qconfig), in_training_alone=False),
    **{
        name: JoinKind(_pair, partial(_extremum, kind), constants="kept", in_training_alone=False)
        for kind, names in _EXTREMA.items()
        for name in names
    },
    "glu": JoinKind(
        _halves,
        lambda join, qconfig: GLU(join.setting, join.ceiling, qconfig=qconfig),
        setting=lambda call: call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else -1),
    ),
    "matmul": JoinKind(_pair, lambda join, qconfig: MatMul(join.ceiling, qconfig=qconfig), constants="rounded"),
    "einsum": JoinKind(
        _einsum,
        lambda join, qconfig: Einsum(join.setting, join.ceiling, qconfig=qconfig),
        setting=lambda call: einsum_call(call.args)[0],
        operands=product_operands,
        constants="rounded",
    ),
    **dict.fromkeys(
        sorted(_SUMS_WITH_PRODUCTS),
        JoinKind(
            _sum_with_product,
            lambda join, qconfig: AddMatMul(join.ceiling, qconfig=qconfig),
            constants="rounded",
        ),
    ),
    **{name: JoinKind(_untaken(why), _no_module, constants="rounded") for name, why in _UNTAKEN.items()},
    "scaled_dot_product_attention": JoinKind(
        _attention,
        lambda join, qconfig: ScaledDotProductAttention(qconfig=qconfig),
        operands=attention_operands,
        takes_relu=False,
        constants="rounded",
    ),
    **{
        name: JoinKind(
            _stacked if name == "stack" else _sequence,
            _concatenation,
            setting=_dim,
            operands=sequence_operand,
            takes_relu=False,
            constants="kept",
        )
        for name in CONCATENATIONS
    },
}


def find_joins(analysis: Analysis, kept: Container[CallIndex] = ()) -> list[Join]:
    """Return all joins of a recorded model, one per place in a forward, those that stay in float included.

    ``kept`` holds the indices of ReLU calls that no join may absorb. Left out are joins that only training makes, of
    kinds without ``in_training_alone``, and joins one of whose calls reads a constant that their kind refuses.
    """
    joins: list[Join] = []
    seen: set[int] = set()
    for call in analysis.flow.calls:
        if call.index in seen or not operands(call, analysis):
            continue
        join = _join(call, analysis, kept)
        seen.update(join.calls)
        if any(_reads_refused_constant(analysis.flow.calls[index], join.kind, analysis) for index in join.calls):
            continue  # a buffer that training writes to, say: what is deployed is no join
        in_training_alone = {analysis.flow.calls[index].run for index in join.calls} == {1}
        if KINDS[join.kind].in_training_alone or not in_training_alone:
            joins.append(join)
    return joins


def operands(call: Call, analysis: Analysis) -> tuple[ValueIndex, ...]:
    """Return the indices, among recorded values, of all operands of a join, constants too; empty if it is no join.

    It is no join if an operand is no float tensor, or if all operands are constants or masks of attention. For a kind
    that refuses constants, one such operand is enough.
    """
    if call.kind != "function" or call.name not in KINDS:
        return ()
    items, _ = KINDS[call.name].read(call)
    values = tuple(value for item in items for value in refs_in(item))
    mask = None if call.name in _SUMS_WITH_PRODUCTS else analysis.mask_of(call)
    constant = [value in analysis.constants.values or value == mask for value in values]
    computed = not (any(constant) if KINDS[call.name].constants == "refused" else all(constant))
    floating = all(analysis.flow.values[value].dtype.is_floating_point for value in values)
    return values if computed and floating and len(values) == len(items) else ()


def _reads_refused_constant(call: Call, kind: str, analysis: Analysis) -> bool:
    """Whether a call would be a join of ``kind``, a key into ``KINDS``, but for a constant operand it refuses."""
    refused = call.name == kind and KINDS[kind].constants == "refused"
    return refused and not operands(call, analysis) and not analysis.constants.values.isdisjoint(call.inputs)


def _join(call: Call, analysis: Analysis, kept: Container[CallIndex]) -> Join:
    """Return the join that a call belongs to, with all calls of the same place.

    ``kept`` holds the indices of ReLU calls that it may not absorb.
    """
    calls = analysis.calls_like(call)
    site, reason = analysis.site(call), ""
    # One place in the source may be reached by different calls where a forward branches.
    alike = all(other.name == call.name and operands(other, analysis) for other in calls)
    obstacles = [obstacle for other in calls if alike and (obstacle := KINDS[other.name].read(other)[1])]
    if not alike or (site is not None and any(analysis.site(other) != site for other in calls)):
        site, reason = None, "its forward does different things in different calls"
    elif any(other.transformed for other in calls):
        site, reason = None, IN_TRANSFORM
    elif obstacles:
        site, reason = None, obstacles[0]
    elif call.name in _SUMS_WITH_PRODUCTS and operands(call, analysis)[2] in analysis.constants.values:
        site, reason = None, "its second matrix is a parameter: F.linear has a quantized form"
    elif call.name in _SUMS_WITH_PRODUCTS and analysis.mask_of(call) is not None:
        site, reason = None, "its summand is a mask: write it as a matrix product and an addition"
    elif site is None:
        graph = analysis.forward(call.owner)
        why = "it differs in training" if isinstance(graph, ForwardGraph) else str(graph)
        if isinstance(graph, AnsweredForward):
            why = "it changes a tensor in place"
        reason = f"the forward of {call.owner or 'the model'} can't be edited: {why}"
    elif not analysis.runs_in_all_modes(calls):
        site, reason = None, analysis.missing_mode(calls)
    settings = [KINDS[other.name].setting(other) for other in calls] if alike else [None]
    if site is not None and any(setting != settings[0] for setting in settings):
        site, reason = None, "its forward does different things in different calls"
    takes_relu = site is not None and KINDS[call.name].takes_relu
    absorbed, ceiling = relus_after(calls, analysis, kept) if takes_relu else ([], None)
    return Join(
        kind=call.name,
        owner=call.owner,
        site=site,
        reason=reason,
        setting=settings[0],
        calls=tuple(other.index for other in calls),
        ends=tuple(other.index for other in (absorbed or calls)),
        relus=tuple(relu.index for relu in absorbed),
        ceiling=ceiling,
    )


def _short(value: Any) -> str:
    """Return an argument of a call as a short text for messages."""
    return "a tensor" if isinstance(value, Ref) else repr(value)
