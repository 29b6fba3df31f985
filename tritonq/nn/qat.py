"""The base class of quantization-aware layers: their quantizers, and the arithmetic of eval mode.

``op`` is the layer's convolution or product. A *grid* is the set of values that a quantizer rounds to; its *switch*
turns rounding on and off on the device. To *fold* a BatchNorm is to multiply the weight by γ/σ.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from tritonq.fake_quantize import FakeQuantize
from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.functional.integer import IntegerAffine, to_integers
from tritonq.functional.integer_kernels import PackedLayer
from tritonq.functional.linear_map import Convolution, LinearMap, MatrixProduct, PaddedConvolution
from tritonq.functional.memo import Memo
from tritonq.functional.residual import rounded_result
from tritonq.functional.rounded_map import rounded_map
from tritonq.granularity import Granularity, granularity_of
from tritonq.grid import Grid
from tritonq.nn.computed import ComputedParameters
from tritonq.nn.forward_mode import RestingModes
from tritonq.nn.fusable import describe_relu, has_observed_grid, input_grid, observed_grid, warn_if_unobserved
from tritonq.nn.output_quantizer import meet_hooks
from tritonq.nn.own_input import QuantizedBehindClip, QuantizesInput
from tritonq.nn.paths import LayerState, Path, choose_path
from tritonq.nn.reference import Reference, ReferringModule
from tritonq.qconfig import QConfig
from tritonq.qconfig_mapping import check_qconfig
from tritonq.reference.activation import rectify

if TYPE_CHECKING:
    from typing import Self


_SIZES = ("in_features", "out_features", "in_channels", "out_channels", "kernel_size")
_GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode")


class QATLayer(QuantizesInput, QuantizedBehindClip, ReferringModule):
    """A convolution or product with a fake-quantized weight and a fake-quantized output.

    Attributes:
        weight_fake_quant: quantizer of the weight (with a BatchNorm, of the folded weight).
        activation_post_process: quantizer of the output, behind the ReLU if there is one.
        input_fake_quant: quantizer of the input; only if no module before the layer quantizes it.
        qconfig: the qconfig that made the quantizers.
        ceiling: upper bound of the ReLU between the operation and its quantizer: infinity for a plain one, 6 for ReLU6;
            None without a ReLU.
        save_input_codes: whether the input is kept for the backward as codes, if on a known grid of 8 bits at most.
        computed: computes weight and bias from other parameters, if the layer has none of its own; else None.
        paths: the function for each computation that :func:`~tritonq.nn.paths.choose_path` can choose.

    Examples:
        >>> import torch, tritonq
        >>> model = tritonq.prepare_qat(torch.nn.Sequential(torch.nn.Linear(3, 2)), example_inputs=torch.randn(4, 3))
        >>> [name for name, module in model.named_modules() if isinstance(module, tritonq.nn.QATLayer)]
        ['0']
        >>> model[0].weight_fake_quant.qtype.bits, model[0].ceiling
        (8, None)
    """

    weight: Tensor
    bias: Tensor | None
    qconfig: QConfig
    weight_fake_quant: nn.Module
    activation_post_process: nn.Module
    ceiling: float | None = None
    save_input_codes: bool = True
    computed: ComputedParameters | None = None
    _references = ("_input_quantizer",)
    paths: ClassVar[dict[Path, Callable[..., Tensor]]]

    def attach_quantizers(self, qconfig: QConfig | None, out_channels: int) -> None:
        """Create ``weight_fake_quant`` and ``activation_post_process`` as children, with buffers in final shapes.

        Raises:
            TypeError: no QConfig, or a factory or option of a wrong type in it.
            ValueError: an unknown option; a weight quantizer with another channel axis than 0 (also if transposed);
                groups along another axis than 1, or of a size that does not divide a row's input channels.
        """
        self.qconfig = qconfig = checked_qconfig(self, qconfig)
        self.weight_fake_quant = qconfig.weight()
        if isinstance(self.weight_fake_quant, FakeQuantizeBase):
            self.weight_fake_quant.batch_axis = None
        self.activation_post_process = qconfig.activation()
        self._input_quantizer: Reference[FakeQuantizeBase] = Reference()
        granularity = granularity_of(self.weight_fake_quant)
        if granularity.group is not None:
            self._allocate_groups(granularity)
        elif granularity.axis is not None:
            if granularity.axis != 0:
                raise ValueError(
                    f"the weight quantizer of {type(self).__name__} keeps one scale per index of axis "
                    f"{granularity.axis}; weight quantizers use ch_axis=0, the out channels, here for transposed "
                    "convolutions too"
                )
            self.weight_fake_quant.allocate(out_channels)  # type: ignore[operator]
        if self.weight.device.type != "meta":
            self.move_quantizers(self.weight.device)

    def _allocate_groups(self, granularity: Granularity) -> None:
        """Give a weight quantizer with scales per group its buffers.

        Raises:
            ValueError: groups along another axis than the input channels, or of a size that does not divide these.
        """
        shape = tuple(self.linear_map.to_rows(self.weight).shape)
        if granularity.axis != 1:
            raise ValueError(f"groups of weights lie along axis 1, the input channels, got axis {granularity.axis}")
        if shape[1] % cast(int, granularity.group):
            raise ValueError(
                f"a {type(self).__name__} with {shape[1]} input channels can't have groups of {granularity.group} of "
                "them: give this layer smaller groups or one scale per channel, by a QConfigMapping"
            )
        self.weight_fake_quant.allocate(granularity.count(shape))  # type: ignore[operator]

    def move_quantizers(self, device: torch.device) -> None:
        """Move parameters and buffers of the weight's and the output's quantizer, not of the input's, to ``device``."""
        self.weight_fake_quant.to(device)
        self.activation_post_process.to(device)

    def set_input_quantizer(self, quantizer: FakeQuantizeBase | Reference[FakeQuantizeBase] | None) -> None:
        """Set the quantizer on whose grid this layer's input lies, or a Reference to it; None: unknown. It is no child.

        Eval mode computes in exact integers, as the deployed layer does, if ``quantizer`` has one scale, the weight's
        no groups, and both are on and round to integers; else in float. Training may save codes: ``save_input_codes``.
        """
        self._input_quantizer = Reference.to(quantizer)

    def extra_repr(self) -> str:
        """Return the float layer's text for ``repr``, with a finite :attr:`ceiling` at its end: "…, relu up to 6"."""
        text = super().extra_repr() if self.computed is None else self._computed_repr()
        return text if self.ceiling in (None, math.inf) else f"{text}, {describe_relu(self.ceiling)}"

    def _computed_repr(self) -> str:
        """Return sizes and stride of a layer whose weight is computed; torch's own text would read the weight."""
        held = vars(self)
        return ", ".join(
            [*(f"{name}={held[name]}" for name in (*_SIZES, *_GEOMETRY) if name in held), "weight=computed"]
        )

    @property
    def input_quantizer(self) -> FakeQuantizeBase | None:
        """The quantizer on whose grid the input lies; None: unknown, or cut off by a new module or a hook."""
        return self._input_quantizer.module

    @property
    def linear_map(self) -> LinearMap:
        """The layer's convolution or product, its stride included; called as ``linear_map(x, weight, bias)``."""
        return linear_map_of(self)

    def float_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias (or None) before folding and quantization.

        They are the layer's own, not copies, or computed anew from other parameters by :attr:`computed`.
        """
        return (self.weight, self.bias) if self.computed is None else self.computed()

    def take_computed(self, computed: ComputedParameters) -> None:
        """Remove the layer's own weight and bias; ``computed`` computes them, and :meth:`forward` may be given them."""
        self._parameters.pop("weight")
        self._parameters.pop("bias")
        self.computed = computed

    def folded_parameters(
        self, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias (or None) that eval mode and deployment round, with a BatchNorm folded in, if any.

        Args:
            weight: the weight to fold, in float, as is the result; None: weight and bias of :meth:`float_parameters`.
            bias: the bias that belongs to ``weight``; None without one. Not read if ``weight`` is None.
        """
        return self.float_parameters() if weight is None else (weight, bias)

    def weight_to_map(self, weight: Tensor) -> tuple[Tensor, Grid | None]:
        """Return ``(weight, grid)`` to give to :meth:`mapped`: the weight as it is, and the grid to round it to.

        In training the weight's quantizer observes it. The grid is None while nothing was observed: the weight is not
        rounded then. In a graph of ``torch.compile``, if a subclass has its own :meth:`quantized_weight`, or if no
        operator can round in the quantizer's place (`has_observed_grid`), the result is (rounded weight, None).
        """
        quantizer = self.weight_fake_quant
        is_own = type(self).quantized_weight is QATLayer.quantized_weight
        if torch.compiler.is_compiling() or not is_own or not has_observed_grid(quantizer):
            return self.quantized_weight(weight), None
        ranging = cast(FakeQuantize, quantizer)
        ranging.observe_in_training(self.linear_map.to_rows(weight))
        return weight, ranging.grid_or_warning()

    def mapped(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, weight_grid: Grid | None = None) -> Tensor:
        """Return the layer's convolution or product, plus bias; for the backward ``x`` is saved as codes if it can be.

        Args:
            x: the input.
            weight: the weight, as :meth:`weight_to_map` returned it.
            bias: the bias, (out channels,); None: none is added.
            weight_grid: the grid that :meth:`weight_to_map` returned with it; None: the weight is used as it is.
        """
        if torch.compiler.is_compiling():
            return self.linear_map(x, weight, bias)
        return rounded_map(x, weight, bias, self.linear_map, self.saved_input_grid(), weight_grid)

    def saved_input_grid(self) -> Grid | None:
        """Return the `input_grid`, of any bits, to save input codes by; None also without ``save_input_codes``."""
        return input_grid(self.input_quantizer) if self.save_input_codes else None

    def quantized_weight(self, weight: Tensor) -> Tensor:
        """Return ``weight`` rounded by its fake quantizer, which observes it in training."""
        op = self.linear_map
        return op.from_rows(self.weight_fake_quant(op.to_rows(weight)))

    def quantized_folded_weight(self, folded: Tensor) -> Tensor:
        """Return the weight of :meth:`folded_parameters` rounded to its grid, as eval mode and deployment use it."""
        return self.quantized_weight(folded)

    def weight_grid(self) -> Grid:
        """Return the grid to which eval mode and deployment round the weight, with its switch (``Grid.enabled``).

        With a BatchNorm the folded weight is rounded. The weight's quantizer must be a FakeQuantizeBase.
        """
        return cast(FakeQuantizeBase, self.weight_fake_quant).grid()

    def weight_near_codes(self, folded: Tensor) -> Tensor:
        """Return a weight whose nearest codes are those that the weight's quantizer chooses for ``folded``.

        Eval mode and conversion make codes of it: ``folded``, or if its quantizer isn't to nearest, the rounded weight.
        """
        is_nearest = getattr(self.weight_fake_quant, "rounds_to_nearest", True)
        return folded if is_nearest else self.quantized_folded_weight(folded)

    def weight_to_quantize(self) -> Tensor:
        """Return the weight that the weight's quantizer gets in eval mode: W, with a BatchNorm folded in, if any."""
        return self.folded_parameters()[0]

    def path_state(self) -> LayerState:
        """Return a `LayerState`, by which forward's computation is chosen: training, tracing, known grids."""
        tracing = torch.compiler.is_compiling()
        knows_grids = not (self.training or tracing) and self._knows_grids()
        return LayerState(self.training, tracing, knows_grids)

    def forward(self, input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Return operation, BatchNorm and ReLU (if there are such) and fake quantization; shapes as the float layer's.

        ``weight`` and ``bias`` (None: no bias) replace the layer's own; they are given if a forward computes them in
        each step. Without ``weight``, ``bias`` is not read.
        """
        if weight is None:
            weight, bias = self.float_parameters()
        if torch.compiler.is_compiling():
            return self.compute(input, weight, bias)
        with RestingModes():
            return self.compute(input, weight, bias)

    def compute(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the layer's output for a weight and bias that are neither folded nor rounded yet.

        The forward calls it, with torch function modes switched off outside of ``torch.compile``.
        """
        input = self.quantized_input(input)
        meet_hooks((self._input_quantizer,), (input,), self.training)
        return self.paths[choose_path(self.path_state())](self, input, weight, bias)

    def rectified(self, y: Tensor) -> Tensor:
        """Return ``y`` after the activation between the operation and the output's quantizer: a ReLU, or nothing."""
        return rectify(y, self.ceiling)

    @property
    def ends_in_ceiling(self) -> bool:
        """Whether :meth:`rectified` is only the ReLU of :attr:`ceiling`, or nothing, so that a kernel can do it.

        True here. A subclass with another activation returns False.
        """
        return True

    def quantized_output(self, y: Tensor) -> Tensor:
        """Return the layer's output, given the operation's result ``y``: activation and fake quantization."""
        quantizer = self.activation_post_process
        if self.training and y.requires_grad and self.ends_in_ceiling and not torch.compiler.is_compiling():
            observed = observed_grid(quantizer, y)
            if observed is not None and observed[0].qtype.axis is None:
                y = rounded_result(y, *observed, self.ceiling)
                warn_if_unobserved(quantizer)
                return y
        return cast(Tensor, quantizer(self.rectified(y)))

    @property
    def packed(self) -> Memo[PackedLayer | None]:
        """A memo, filled by eval mode, of the layer as torch's integer kernels take it, or of None if they can't.

        It is made anew when a weight or grid has changed, emptied by ``train()``, and not copied with the layer.
        """
        found: Memo[PackedLayer | None] = self.__dict__.setdefault("_packed", Memo())
        return found

    def train(self, mode: bool = True) -> Self:
        """Switch to training or eval mode; what eval mode derived from weights is deleted."""
        self.packed.clear()
        return super().train(mode)

    def eval_key(self) -> tuple[Any, ...]:
        """Return what eval mode's integers depend on besides tensors: they are made anew if the result differs."""
        types = [getattr(held, "qtype", None) for held in (self.input_quantizer, self.weight_fake_quant)]
        return (self.ceiling, types, [vars(self).get(name) for name in (*_GEOMETRY, "output_padding")])

    def integer_quantizers(self) -> tuple[FakeQuantizeBase, FakeQuantizeBase] | None:
        """Return the quantizers of input and weight if sums can be integers on their grids, on or off; else None.

        Both round to integers, the input's has one scale, and the weight's no groups, whose sums have several units.
        """
        source, quantizer = self.input_quantizer, self.weight_fake_quant
        if source is None or not isinstance(quantizer, FakeQuantizeBase):
            return None
        is_integer = source.qtype.float_format is None and quantizer.qtype.float_format is None
        fits = is_integer and source.qtype.axis is None and quantizer.qtype.group is None
        return (source, quantizer) if fits else None

    def _knows_grids(self) -> bool:
        """Whether the :meth:`integer_quantizers` are known and switched on; may synchronise with a device."""
        quantizers = self.integer_quantizers()
        return quantizers is not None and all(quantizer.is_enabled_on_host() for quantizer in quantizers)

    def output_quantizer(self) -> FakeQuantizeBase | None:
        """Return the quantizer that rounds the whole output to one grid.

        It is the layer's own or a following clip's; None if there is none, or it is per channel or no FakeQuantizeBase.
        """
        quantizer = self.last_quantizer(self.activation_post_process)
        return quantizer if isinstance(quantizer, FakeQuantizeBase) and quantizer.qtype.axis is None else None

    def output_grid(self) -> Grid | None:
        """Return the grid of :meth:`output_quantizer`; None if there is none, or it is off or has no scale."""
        quantizer = self.output_quantizer()
        if quantizer is None or not quantizer.is_enabled_on_host():
            return None
        return quantizer.grid()

    @torch.no_grad()
    def integer_layer(self, weight: Tensor, bias: Tensor | None) -> IntegerAffine | None:
        """Return codes of weight and bias as an `IntegerAffine`, for a given folded weight and bias (None: no bias).

        None if a grid of input or weight is unknown, off, not of integers or in groups, or the input's per channel.
        """
        if not self._knows_grids():
            return None
        source = cast(FakeQuantizeBase, self.input_quantizer)
        weight = self.weight_near_codes(weight)
        return to_integers(weight, bias, self.linear_map, source.grid(), self.weight_grid())


def without_qconfig(args: tuple[Any, ...], qconfig: QConfig | None) -> tuple[tuple[Any, ...], QConfig | None]:
    """Return a constructor's positional arguments without the QConfig among them, and that QConfig.

    torch.ao's constructors take it by position. If it is not there, ``qconfig`` is returned, which may be None.

    Raises:
        TypeError: it is given by name too.
    """
    places = [index for index, value in enumerate(args) if isinstance(value, QConfig)]
    if not places:
        return args, qconfig
    if qconfig is not None:
        raise TypeError("qconfig is given twice, by position and by name")
    return (*args[: places[0]], *args[places[0] + 1 :]), args[places[0]]


def checked_qconfig(layer: nn.Module, qconfig: object) -> QConfig:
    """Return ``qconfig`` if it is a valid QConfig of tritonq; error messages name the class of ``layer``.

    Raises:
        TypeError: anything else (the message says where a class of that name comes from), or wrong types in it.
        ValueError: an unknown target, folding or choice for islands.
    """
    check_qconfig(qconfig, f"qconfig of {type(layer).__name__}", "a QConfig")
    return cast(QConfig, qconfig)


def linear_map_of(layer: nn.Module) -> LinearMap:
    """Return the convolution or product of a layer, which must be an ``nn.Linear`` or one of torch's convolutions."""
    if isinstance(layer, nn.Linear):
        return MatrixProduct()
    conv = cast(nn.modules.conv._ConvNd, layer)
    padding = conv.padding
    if conv.padding_mode == "zeros" and not isinstance(padding, str):
        return Convolution(conv.stride, padding, conv.dilation, conv.output_padding, conv.transposed, conv.groups)
    pairs, mode = conv._reversed_padding_repeated_twice, str(conv.padding_mode)
    if conv.padding_mode != "zeros":
        common, rest = [0] * len(conv.kernel_size), pairs
    else:
        common = [min(before, after) for before, after in zip(pairs[0::2], pairs[1::2], strict=True)]
        rest, mode = [side - common[i // 2] for i, side in enumerate(pairs)], "constant"
    padding = tuple(reversed(common))
    plain = Convolution(conv.stride, padding, conv.dilation, conv.output_padding, conv.transposed, conv.groups)
    return PaddedConvolution(plain, tuple(rest), mode) if any(rest) else plain
