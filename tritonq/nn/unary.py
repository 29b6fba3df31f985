"""The base class of operations of one tensor, such as means and SiLU, between codes of one grid and another.

A code is the integer that stands for a value on a grid. FQ in formulas is fake quantization: rounding to a grid, as a
float tensor.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.functional.codes import can_use_codes, give_codes, take_codes
from tritonq.functional.gradients import needs_gradient, with_gradient_of
from tritonq.functional.host_grid import HostGrid, host_grid
from tritonq.functional.memo import Memo
from tritonq.functional.residual import rounded_result
from tritonq.grid import Grid
from tritonq.nn.fusable import observed_grid, warn_if_unobserved
from tritonq.nn.output_quantizer import is_grid_source, meet_hooks
from tritonq.nn.reference import Reference, Referred
from tritonq.qconfig import QConfig
from tritonq.qconfig_mapping import check_qconfig


class UnaryLayer(nn.Module):
    """``FQ(f(x))`` for an operation f of one tensor.

    In eval mode the result is computed as integer runtimes do (:meth:`exact_codes`, else :meth:`exact`), if the grids
    of input and output are known, have integer codes and one scale each, and rounding to both is switched on. Otherwise
    torch computes the operation (:meth:`compute`). Subclasses call :meth:`attach_quantizers` when they are created.

    Attributes:
        activation_post_process: quantizer of the output; an Identity if another module quantizes it, or none does.

    Examples:
        >>> import torch, tritonq
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.SiLU(), torch.nn.Conv2d(2, 2, 1))
        >>> qat = tritonq.prepare_qat(model, example_inputs=torch.randn(2, 1, 4, 4))
        >>> isinstance(qat[1], tritonq.nn.UnaryLayer)
        True
    """

    activation_post_process: nn.Module

    def attach_quantizers(self, qconfig: QConfig | None) -> None:
        """Create the output's quantizer by ``qconfig``, as the child ``activation_post_process``.

        ``qconfig`` None: the output stays in float, or another module quantizes it; the child is then an Identity. The
        quantizers that :meth:`set_quantizers` was given are forgotten.
        """
        if qconfig is not None:
            check_qconfig(qconfig, f"qconfig of {type(self).__name__}")
        self.activation_post_process = nn.Identity() if qconfig is None else qconfig.activation()
        self._source: Reference[nn.Module] = Reference()
        self._output: Reference[nn.Module] = Reference()

    def set_quantizers(self, source: Referred, output: Referred = None) -> None:
        """Set the quantizers of input and output, which other modules own.

        Args:
            source: the quantizer on whose grid the input lies, or a reference to it; None: unknown.
            output: the quantizer that follows the module, if it is the only reader of the result; None: there is none.
                Not used while the module has a quantizer of its own.
        """
        self._source, self._output = Reference.to(source), Reference.to(output)

    def replace_quantizers(self, replacements: Mapping[nn.Module, nn.Module]) -> None:
        """Refer to the modules that took the places of the input's and the output's quantizer in the model.

        ``replacements`` maps each old module to the new one; a quantizer that it does not name is kept. The child
        ``activation_post_process`` stays.
        """
        found = [None if held is None else replacements.get(held, held) for held in self.linked_quantizers]
        self.set_quantizers(*found)

    @property
    def linked_quantizers(self) -> tuple[nn.Module | None, nn.Module | None]:
        """The quantizers of input and output, which a converted file names; None for one that is not known.

        The output's is the module's own if it has one, else the quantizer that :meth:`set_quantizers` was given.
        """
        return self.input_quantizer, self.output_quantizer

    @property
    def input_quantizer(self) -> nn.Module | None:
        """The quantizer on whose grid the input lies; None if it is not known."""
        return self._source.module

    @property
    def output_quantizer(self) -> nn.Module | None:
        """The quantizer of the result, the module's own or the one that follows it; None if there is neither."""
        own = self.activation_post_process
        # Not by type: while torch.export traces, modules have classes of its own.
        return self._output.module if isinstance(own, nn.Identity) else own

    @abstractmethod
    def compute(self, x: Tensor) -> Tensor:
        """Return the operation's result in float, as torch computes it: differentiable, and not rounded.

        Training calls it, and so does eval mode for the gradient of the exact result, and while a grid is unknown, is
        off, or has several scales or float codes.
        """

    @abstractmethod
    def exact(self, x: Tensor, source: Grid, output: Grid) -> Tensor:
        """Return the result as integer runtimes compute it: float32 on the output's grid, before clipping; no gradient.

        The output's quantizer clips it. Eval mode calls it outside of ``torch.compile`` while both grids are known and
        switched on, unless :meth:`exact_codes` gave the result.

        Args:
            x: float tensor of values on the grid of ``source``.
            source: the input's grid, with one scale for the tensor.
            output: the grid of the quantizer behind the operation, with one scale for the tensor.
        """

    @abstractmethod
    def traced(self, x: Tensor, source: Grid, output: Grid) -> Tensor:
        """Return the result for ``torch.compile`` in eval mode, in the dtype of ``x``, without gradient.

        While both grids are switched on, which the graph reads when it runs, it is what :meth:`exact` returns, which
        the output's quantizer clips; else it is the operation's result in float (:meth:`compute`).

        Args:
            x: float tensor of values on the grid of ``source``.
            source: the input's grid, with one scale for the tensor.
            output: the grid of the quantizer behind the operation, with one scale for the tensor.
        """

    def forward(self, input: Tensor) -> Tensor:
        """Return ``FQ(f(input))``; shapes as torch's operation has them. In training FQ observes ``f(input)`` first.

        FQ is the child ``activation_post_process``: with an Identity there the result is ``f(input)``. The gradient is
        that of :meth:`compute`, in eval mode too.
        """
        meet_hooks((self._source,), (input,), self.training)
        own = self.activation_post_process
        observed = observed_grid(own, input) if self.training else None
        if observed is None or observed[0].qtype.axis is not None or not input.is_floating_point():
            return cast(Tensor, own(self._result(input)))
        y = rounded_result(self.compute(input), *observed, None)
        warn_if_unobserved(own)
        return y

    def exact_codes(self, codes: Tensor, source: HostGrid, output: HostGrid) -> Tensor | None:
        """Return the codes of the result, clipped; None if only :meth:`exact` can compute it.

        Here it is always None; subclasses override it. Eval mode calls it on the CPU if no gradient is needed.
        The codes of input and result are uint8, counted from the smallest code of their grid: a quantizer's own code
        minus its ``quant_min``. Those of the result lie in ``0..output.largest``.

        Args:
            codes: codes of the input, in its shape.
            source: the input's grid.
            output: the result's grid.
        """
        return None

    def _result(self, x: Tensor) -> Tensor:
        """Return the operation's result, in eval mode as integer runtimes compute it if the grids are known.

        Its gradient is always that of the float result.
        """
        if self.training:
            return self.compute(x)
        exact = self._exact_result(x)
        if exact is None:
            return self.compute(x)
        exact = exact.to(x.dtype)
        return with_gradient_of(exact, self.compute(x)) if needs_gradient(self, x) else exact

    def _exact_result(self, x: Tensor) -> Tensor | None:
        """Return the result as integer runtimes compute it, without gradient; None if a grid is unknown or off."""
        source, output = self.input_quantizer, self.output_quantizer
        if not is_grid_source(source) or not is_grid_source(output):
            return None
        if source.qtype.axis is not None or output.qtype.axis is not None:
            return None
        if torch.compiler.is_compiling() and isinstance(source, FakeQuantizeBase):
            return self.traced(x, source.grid(), output.grid())
        if not source.is_enabled_on_host() or not output.is_enabled_on_host():
            return None
        grids = source.grid(), output.grid()
        if can_use_codes(x) and x.numel() and not needs_gradient(self):
            y = self._on_codes(x, *grids)
            if y is not None:
                return y
        return self.exact(x, *grids)

    def _on_codes(self, x: Tensor, source: Grid, output: Grid) -> Tensor | None:
        """Return the result, quantized, from 8-bit codes of ``x``: those attached to it, else each value's nearest.

        ``source`` and ``output`` are the grids of input and result. None if one has more than 256 codes, if a value
        lies beyond the grid's ends, or if the class can't compute on codes (:meth:`exact_codes`).
        """
        held = (source.scale, source.zero_point, output.scale, output.zero_point)
        memo: Memo[tuple[HostGrid | None, HostGrid | None]] = self.__dict__.setdefault("_host_grids", Memo())
        one, other = memo.get(held, lambda: (host_grid(source), host_grid(output)), (source.qtype, output.qtype))
        if one is None or other is None:
            return None
        codes = take_codes(x, one)
        result = None if codes is None else self.exact_codes(codes, one, other)
        return None if result is None else give_codes(result, other, x)
