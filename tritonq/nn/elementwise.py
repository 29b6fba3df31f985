"""Sums, differences, products, minima and maxima with a quantizer of their own, and torch.ao's stubs.

FQ is fake quantization by the child ``activation_post_process``, which ``qconfig=`` makes; without it nothing is
rounded. ``relu?`` is a ReLU up to the argument ``ceiling`` (infinity: a plain one); None, the default: no ReLU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.functional.coded_joins import CodedJoin, coded_join
from tritonq.functional.codes import can_use_codes, give_codes, take_codes
from tritonq.functional.gradients import needs_gradient, with_gradient_of
from tritonq.functional.integer_joins import JoinKind, divided, float_join, integer_join, joint_dtype
from tritonq.functional.memo import Memo, held_tensors
from tritonq.functional.residual import residual_join, rounded_product, rounded_result
from tritonq.grid import Grid, RangeStatistics

# Models that earlier versions pickled name it here.
from tritonq.nn.concatenation import Cat as Cat
from tritonq.nn.fusable import checked_ceiling, describe_relu, input_grid, observed_grid, warn_if_unobserved
from tritonq.nn.output_quantizer import (
    GridSource,
    WithOutputQuantizer,
    deployed_grid,
    ends_in_relu,
    is_grid_source,
    meet_hooks,
    quantizer_of,
)
from tritonq.nn.reference import Reference, Referred
from tritonq.qconfig import QConfig
from tritonq.reference.activation import rectify


class Joint(WithOutputQuantizer):
    """``FQ(relu?(f(a, b)))`` for an operation f of two tensors.

    In eval mode, if operands and result have known grids of integers, each with one scale and switched on, it computes
    as integer runtimes do, on codes u, v minus zero points: ``round(u v · (s_a s_b / s_out) + z)`` for a product,
    ``round(u s_a/s_out ± v s_b/s_out + z)`` for a sum (order of operations:
    :mod:`tritonq.functional.integer_joins`). A product of matrices is ``round(Σ u v · (s_a s_b / s_out)) + z``. A
    minimum or maximum needs no grids of operands: it is ``round(f(a, b) / s_out) + z`` of their values. The ReLU and
    the clip to the codes follow. A *producer* is the module that puts an operand on its grid: a quantizer, or a module
    with an output quantizer ``activation_post_process``.

    Args:
        ceiling: upper bound of the ReLU: infinity for a plain one, 6 for ReLU6; None: no ReLU.
        qconfig: makes the quantizer of the output; None: the output stays in float.

    Attributes:
        kind: name of f, set by the subclass: "add", "sub", "mul", "matmul", "minimum" or "maximum".

    Raises:
        TypeError: a ceiling that is not a number.
        ValueError: a ceiling that is not positive.

    Examples:
        >>> import torch, tritonq
        >>> issubclass(tritonq.nn.Add, tritonq.nn.Joint), tritonq.nn.Mul(6).extra_repr()
        (True, 'relu up to 6')
    """

    kind: ClassVar[JoinKind]

    def __init__(self, ceiling: float | None = None, *, qconfig: QConfig | None = None) -> None:
        super().__init__(qconfig)
        self.ceiling = checked_ceiling(ceiling)
        self._producers: tuple[Reference[nn.Module], ...] = (Reference(), Reference())
        # In models that version 0.1.0 pickled, which hold quantizers and no producers: see `after_relu`.
        self._pickled_after_relu: tuple[bool, ...] | None = None

    def set_producers(self, a: Referred, b: Referred) -> None:
        """Set the producers of a and b, whose grids the forward reads; None: unknown, eval mode computes in float."""
        self._producers, self._pickled_after_relu = (Reference.to(a), Reference.to(b)), None

    def set_operand_producers(self, *producers: Referred) -> None:
        """Set the producers of the forward's tensors, in order: two, or more in some subclasses; None: unknown."""
        self.set_producers(*producers)

    def set_input_quantizers(self, a: nn.Module | None, b: nn.Module | None) -> None:
        """Set quantizers as producers of a and b (None: unknown); :attr:`after_relu` is then (False, False)."""
        self.set_producers(a, b)

    def replace_producers(self, replacements: Mapping[nn.Module, nn.Module]) -> None:
        """Replace producers as ``replacements`` maps old to new; others stay; all lose their `Reference.route`."""
        self._producers = tuple(
            Reference(None if held.module is None else replacements.get(held.module, held.module))
            for held in self._producers
        )

    @property
    def producers(self) -> tuple[nn.Module | None, ...]:
        """The producers of the operands, in order, None if unknown or if a later hook or module changes the tensor."""
        return tuple(held.module for held in self._producers)

    @property
    def input_quantizers(self) -> tuple[nn.Module | None, ...]:
        """The quantizers on whose grids the operands lie; None, or an ``nn.Identity``, for one without a known grid."""
        return tuple(quantizer_of(producer) for producer in self.producers)

    @property
    def linked_quantizers(self) -> tuple[nn.Module | None, ...]:
        """The operands' quantizers, None for one that is unknown; other modules own them.

        A converted file holds their names in the model, such as "conv1.activation_post_process".
        """
        return self.input_quantizers

    @property
    def after_relu(self) -> tuple[bool, ...]:
        """For each operand whether its producer computes a ReLU before its quantizer.

        False if the producer is not known or is a quantizer itself; models pickled by version 0.1.0 keep their values.
        The rounding of a sum depends on it: behind a ReLU deployment stores only codes from the zero point up.
        """
        if self._pickled_after_relu is not None:
            return self._pickled_after_relu
        return tuple(ends_in_relu(producer) for producer in self.producers)

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_producers" not in state:
            quantizers = state.pop("_input_quantizers")
            held = {"_producers": tuple(map(Reference, quantizers)), "_pickled_after_relu": state.pop("after_relu")}
            state = {**state, **held}
        super().__setstate__(state)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Return ``FQ(relu?(f(a, b)))`` of floats that broadcast, in torch's dtype for f; FQ observes in training."""
        return self.joined(a, b)

    def joined(self, a: Tensor, b: Tensor) -> Tensor:
        """Return ``FQ(relu?(f(a, b)))``; forward calls it, and ONNX export puts another function in its place."""
        meet_hooks(self._producers, (a, b), self.training)
        if not self.training and can_use_codes(a) and can_use_codes(b) and (y := self._on_codes(a, b)) is not None:
            return y
        exact = None if self.training else self._exact(a, b)
        if exact is not None:
            if needs_gradient(self, a, b):
                exact = with_gradient_of(exact, float_join(self.kind, a, b))
            return cast(Tensor, self.activation_post_process(rectify(exact, self.ceiling)))
        observed = observed_grid(self.activation_post_process, a)
        if observed is not None and _has_operator(a, b, observed[0]):
            y = self._rounded(a, b, *observed)
            warn_if_unobserved(self.activation_post_process)
            return y
        return cast(Tensor, self.activation_post_process(rectify(float_join(self.kind, a, b), self.ceiling)))

    def _rounded(self, a: Tensor, b: Tensor, grid: Grid, statistics: RangeStatistics) -> Tensor:
        """Return ``FQ(relu?(f(a, b)))`` of a training step by one operator that updates ``statistics`` and ``grid``."""
        if self.kind not in ("add", "sub") or a.shape != b.shape or a.dtype != b.dtype:
            return rounded_result(float_join(self.kind, a, b), grid, statistics, self.ceiling)
        return residual_join(a, -b if self.kind == "sub" else b, grid, statistics, self.ceiling)

    def _on_codes(self, a: Tensor, b: Tensor) -> Tensor | None:
        """Return the result of eval mode from 8-bit codes of a and b (attached or nearest); None if it can't be."""
        own = self.activation_post_process
        if self.kind not in ("add", "sub", "mul") or own._forward_pre_hooks or not a.numel() or needs_gradient(own):
            return None
        producers = self.producers
        sources = self._grid_sources(producers)
        if sources is None or not all(source.is_enabled_on_host() for source in sources):
            return None
        # A sum's operands are added in an order that depends on which one is broadcast; those of a product commute.
        whole = a if a.numel() >= b.numel() else b
        if a.shape != b.shape:
            joint: torch.Size = torch.broadcast_shapes(a.shape, b.shape)
            if self.kind != "mul" or whole.shape != joint:
                return None
        elif self.kind != "mul" and a.numel() == 1:
            return None

        def prepare() -> CodedJoin | None:
            first, second, output = (source.grid() for source in sources)
            relus = (*self.after_relu, self.ceiling is not None)
            deployed = [deployed_grid(grid, relu) for grid, relu in zip((first, second, output), relus, strict=True)]
            return coded_join(self.kind, (first, second, output), deployed, self.ceiling)

        held = tuple([tensor for source in sources for tensor in held_tensors(cast(nn.Module, source))])
        ceilings = [None if producer is None else vars(producer).get("ceiling") for producer in producers]
        key = (self.kind, self.ceiling, producers, ceilings, [source.qtype for source in sources])
        join = self._coded.get(held, prepare, key)
        codes = None if join is None else (take_codes(a, join.a), take_codes(b, join.b))
        if join is None or codes is None or codes[0] is None or codes[1] is None:
            return None
        y = give_codes(join(codes[0], codes[1]), join.output, whole)
        # Who listens to the quantizer's results is told.
        return cast(Tensor, own(y)) if own._forward_hooks else y

    @property
    def _coded(self) -> Memo[CodedJoin | None]:
        """The memo of the prepared operation on codes (None if there is none); it is not copied with the module."""
        return cast("Memo[CodedJoin | None]", self.__dict__.setdefault("_coded_join", Memo()))

    def _grid_sources(self, producers: tuple[nn.Module | None, ...]) -> list[GridSource] | None:
        """Return the quantizers of both operands and of the result; None unless each has one grid of integers."""
        quantizers = [*map(quantizer_of, producers), self.activation_post_process]
        sources = [each for each in quantizers if is_grid_source(each) and each.qtype.axis is None]
        return sources if len(sources) == len(quantizers) else None

    @torch.no_grad()
    def _exact(self, a: Tensor, b: Tensor) -> Tensor | None:
        """Return ``f(a, b)`` on the output's grid as integer runtimes do, not rectified or clipped, without gradient.

        None if a grid is unknown or off. In a traced graph it is the float result if a grid is off when the graph runs.
        """
        sources = self._grid_sources(self.producers)
        if sources is None:
            return None
        trained = [isinstance(source, FakeQuantizeBase) for source in sources]
        reads_later = torch.compiler.is_compiling() and any(trained)
        if not (all(trained) if reads_later else all(source.is_enabled_on_host() for source in sources)):
            return None
        relus = (*self.after_relu, self.ceiling is not None)
        grids = [deployed_grid(source.grid(), relu) for source, relu in zip(sources, relus, strict=True)]
        if reads_later:
            from tritonq.functional.traced import eval_mode

            return eval_mode.join(self.kind, a, b, *grids)
        return integer_join(self.kind, a, b, *grids).to(joint_dtype(a, b))

    def extra_repr(self) -> str:
        """Return the text for ``repr``: "relu", or "relu up to 6" with the ceiling 6; "" without a ReLU."""
        return describe_relu(self.ceiling)


class Add(Joint):
    """``FQ(relu?(a + b))``, such as the sum of a residual block. Arguments: ``ceiling=None, *, qconfig=None``.

    Examples:
        >>> import torch, tritonq
        >>> add = tritonq.nn.Add(float("inf"), qconfig=tritonq.get_qconfig())
        >>> add(torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 1.0]]))
        tensor([[1.5000, 0.0000]])
    """

    kind = "add"


class Sub(Joint):
    """``FQ(relu?(a - b))``. Arguments: ``ceiling=None, *, qconfig=None``.

    Examples:
        >>> import torch, tritonq
        >>> tritonq.nn.Sub()(torch.tensor([1.0]), torch.tensor([0.25]))
        tensor([0.7500])
    """

    kind = "sub"


class Mul(Joint):
    """``FQ(relu?(a * b))``, such as the gate of squeeze-and-excitation. Arguments: ``ceiling=None, *, qconfig=None``.

    Examples:
        >>> import torch, tritonq
        >>> tritonq.nn.Mul()(torch.tensor([2.0]), torch.tensor([0.25]))
        tensor([0.5000])
    """

    kind = "mul"

    def _rounded(self, a: Tensor, b: Tensor, grid: Grid, statistics: RangeStatistics) -> Tensor:
        grid_a, grid_b = (
            input_grid(quantizer if isinstance(quantizer, FakeQuantizeBase) else None)
            for quantizer in self.input_quantizers
        )
        return rounded_product(a, b, grid_a, grid_b, grid, statistics, self.ceiling)


class Extremum(Joint):
    """The base of Minimum and Maximum: ``FQ(relu?(f(a, b)))`` with f the smaller or larger of two values.

    Engines compare values in float32, and only rounding the result to its grid makes codes of it. So the operands need
    no grid: one may be a constant tensor.

    Examples:
        >>> import torch, tritonq
        >>> tritonq.nn.Maximum()(torch.tensor([1.0, 3.0]), torch.tensor(2.0))
        tensor([2., 3.])
    """

    @torch.no_grad()
    def _exact(self, a: Tensor, b: Tensor) -> Tensor | None:
        output = self.activation_post_process
        if not is_grid_source(output) or output.qtype.axis is not None:
            return None
        y = float_join(self.kind, a, b)
        if torch.compiler.is_compiling() and isinstance(output, FakeQuantizeBase):
            from tritonq.functional.traced import eval_mode

            return eval_mode.on_grid(y, output.grid())
        return divided(y, output.grid()).to(y.dtype) if output.is_enabled_on_host() else None


class Minimum(Extremum):
    """``FQ(relu?(min(a, b)))``. Arguments: ``ceiling=None, *, qconfig=None``.

    Examples:
        >>> import torch, tritonq
        >>> tritonq.nn.Minimum()(torch.tensor([1.0, 3.0]), torch.tensor(2.0))
        tensor([1., 2.])
    """

    kind = "minimum"


class Maximum(Extremum):
    """``FQ(relu?(max(a, b)))``. Arguments: ``ceiling=None, *, qconfig=None``.

    Examples:
        >>> import torch, tritonq
        >>> tritonq.nn.Maximum()(torch.tensor([1.0, 3.0]), torch.tensor(2.0))
        tensor([2., 3.])
    """

    kind = "maximum"


def _has_operator(a: Tensor, b: Tensor, grid: Grid) -> bool:
    """Whether one operator can do a training step: float tensors on one device, one scale for the output."""
    return a.device == b.device and a.is_floating_point() and b.is_floating_point() and grid.qtype.axis is None


class QuantStub(nn.Module):
    """Return the input, rounded if torch.ao's flow (`prepare_qat` without examples) has added a quantizer as a child.

    The argument ``qconfig`` becomes an attribute, which that flow reads; None sets no attribute.

    Examples:
        >>> QuantStub()(torch.ones(1))
        tensor([1.])
    """

    def __init__(self, qconfig: QConfig | None = None) -> None:
        super().__init__()
        if qconfig is not None:
            self.qconfig = qconfig

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x``; a quantizer that torch.ao's flow has added rounds it afterwards, in a forward hook."""
        return x


class DeQuantStub(QuantStub):
    """Mark where a tensor leaves the quantized part of a model. Source: torch.ao. The forward returns its input.

    Examples:
        >>> DeQuantStub()(torch.ones(1))
        tensor([1.])
    """


class FloatFunctional(WithOutputQuantizer):
    """torch.ao's module form of tensor arithmetic; FQ in its methods is the child ``activation_post_process``.

    Source: torch.ao.nn.quantized.FloatFunctional.

    Examples:
        >>> FloatFunctional().add_relu(torch.tensor([1.0, -3.0]), torch.tensor([1.0, 1.0]))
        tensor([2., 0.])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Raise RuntimeError: the module is used by its methods, such as :meth:`add`."""
        raise RuntimeError("FloatFunctional has no forward; call its methods, such as add()")

    def add(self, x: Tensor, y: Tensor | float) -> Tensor:
        """Return ``FQ(x + y)``."""
        return cast(Tensor, self.activation_post_process(torch.add(x, y)))

    def add_scalar(self, x: Tensor, y: float) -> Tensor:
        """Return ``x + y``, neither rounded nor observed."""
        return torch.add(x, y)

    def mul(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``FQ(x * y)``."""
        return cast(Tensor, self.activation_post_process(torch.mul(x, y)))

    def mul_scalar(self, x: Tensor, y: float) -> Tensor:
        """Return ``x * y``, neither rounded nor observed."""
        return torch.mul(x, y)

    def cat(self, x: Sequence[Tensor], dim: int = 0) -> Tensor:
        """Return ``FQ(cat(x, dim))``."""
        return cast(Tensor, self.activation_post_process(torch.cat(tuple(x), dim)))

    def add_relu(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``FQ(relu(x + y))``."""
        return cast(Tensor, self.activation_post_process(F.relu(torch.add(x, y))))

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``FQ(x @ y)``."""
        return cast(Tensor, self.activation_post_process(torch.matmul(x, y)))
