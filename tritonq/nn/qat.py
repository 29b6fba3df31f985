"""What every quantization-aware layer shares: its quantizers, and the arithmetic of eval mode."""

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
    """A linear operation with a fake-quantized weight and a fake-quantized output.

    Attributes:
        weight_fake_quant: quantizer of the weight (of the folded weight where there is a BatchNorm).
        activation_post_process: quantizer of the output, after ReLU where there is one.
        input_fake_quant: quantizer of the input, only where nothing before the layer quantizes that.
        qconfig: where both came from.
        ceiling: upper bound of the ReLU between the operation and its quantizer: infinity for a plain one, 6 for ReLU6;
            None without a ReLU.

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
    # Keep the input for the backward as 8-bit codes where it lies on the grid of a known quantizer.
    save_input_codes: bool = True

    # Evaluates weight and bias where they are no parameters of the layer's own.
    computed: ComputedParameters | None = None

    _references = ("_input_quantizer",)
    # The computation of each path that layers of the class take.
    paths: ClassVar[dict[Path, Callable[..., Tensor]]]

    def attach_quantizers(self, qconfig: QConfig | None, out_channels: int) -> None:
        """Create the quantizers of ``qconfig`` with buffers of their final shape.

        Raises:
            TypeError: no QConfig.
            ValueError: a weight quantizer whose channel axis is not the layer's out-channel axis, or groups that don't
                divide its input channels.
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
        """Give a weight quantizer with groups its buffers.

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
        """Put the quantizers' buffers on ``device``."""
        self.weight_fake_quant.to(device)
        self.activation_post_process.to(device)

    def set_input_quantizer(self, quantizer: FakeQuantizeBase | None) -> None:
        """Set the quantizer whose grid this layer's input lies on; None: unknown.

        With it, eval mode computes in exact integers with an int32 bias, as the deployed layer does.
        """
        self._input_quantizer = Reference(quantizer)

    def extra_repr(self) -> str:
        """Return geometry, and the ReLU where the class's name does not say all of it."""
        text = super().extra_repr() if self.computed is None else self._computed_repr()
        return text if self.ceiling in (None, math.inf) else f"{text}, {describe_relu(self.ceiling)}"

    def _computed_repr(self) -> str:
        """Return sizes and geometry of a layer without parameters, which torch's own text reads."""
        held = vars(self)
        return ", ".join(
            [*(f"{name}={held[name]}" for name in (*_SIZES, *_GEOMETRY) if name in held), "weight=computed"]
        )

    @property
    def input_quantizer(self) -> FakeQuantizeBase | None:
        """The quantizer whose grid this layer's input lies on, where known."""
        return self._input_quantizer.module

    @property
    def linear_map(self) -> LinearMap:
        """The convolution or product of input and weight that the layer computes, with its geometry."""
        return linear_map_of(self)

    def float_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias before folding and quantization: its own, or computed from other parameters."""
        return (self.weight, self.bias) if self.computed is None else self.computed()

    def take_computed(self, computed: ComputedParameters) -> None:
        """Go without weight and bias of its own: :meth:`forward` is given them, and ``computed`` evaluates them."""
        self._parameters.pop("weight")
        self._parameters.pop("bias")
        self.computed = computed

    def folded_parameters(
        self, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias that eval mode and deployment use, with any BatchNorm folded in.

        They are made of ``weight`` and ``bias``, by default :meth:`float_parameters`.
        """
        return self.float_parameters() if weight is None else (weight, bias)

    def weight_to_map(self, weight: Tensor) -> tuple[Tensor, Grid | None]:
        """Observe ``weight`` in training; return it and the grid to round it to, or it rounded and None.

        The latter is so where the weight's quantizer, or a class's own :meth:`quantized_weight`, must run by itself.
        """
        quantizer = self.weight_fake_quant
        is_own = type(self).quantized_weight is QATLayer.quantized_weight
        if torch.compiler.is_compiling() or not is_own or not has_observed_grid(quantizer):
            return self.quantized_weight(weight), None
        ranging = cast(FakeQuantize, quantizer)
        ranging.observe_in_training(self.linear_map.to_rows(weight))
        return weight, ranging.grid_or_warning()

    def mapped(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, weight_grid: Grid | None = None) -> Tensor:
        """Return the operation, which saves little for its backward; weight and grid as of :meth:`weight_to_map`."""
        if torch.compiler.is_compiling():
            return self.linear_map(x, weight, bias)
        return rounded_map(x, weight, bias, self.linear_map, self.saved_input_grid(), weight_grid)

    def saved_input_grid(self) -> Grid | None:
        """Return the grid whose codes are kept of the input for a backward; None: the input is."""
        return input_grid(self.input_quantizer) if self.save_input_codes else None

    def quantized_weight(self, weight: Tensor) -> Tensor:
        """Return ``weight`` after its fake quantizer, which observes it while training."""
        op = self.linear_map
        return op.from_rows(self.weight_fake_quant(op.to_rows(weight)))

    def quantized_folded_weight(self, folded: Tensor) -> Tensor:
        """Return the weight of :meth:`folded_parameters` rounded to its grid, as eval mode and deployment use it."""
        return self.quantized_weight(folded)

    def weight_grid(self) -> Grid:
        """Return the grid, with its switch, that the weight of :meth:`folded_parameters` is deployed on."""
        return cast(FakeQuantizeBase, self.weight_fake_quant).grid()

    def weight_near_codes(self, folded: Tensor) -> Tensor:
        """Return the weight of :meth:`folded_parameters`, moved where its quantizer does not choose the nearest codes.

        What is nearest to the result are the codes that the quantizer chooses.
        """
        is_nearest = getattr(self.weight_fake_quant, "rounds_to_nearest", True)
        return folded if is_nearest else self.quantized_folded_weight(folded)

    def weight_to_quantize(self) -> Tensor:
        """Return the present weight as its quantizer sees it in training."""
        return self.folded_parameters()[0]

    def path_state(self) -> LayerState:
        """Return the state by which :func:`choose_path` chooses the path of :meth:`forward`."""
        tracing = torch.compiler.is_compiling()
        knows_grids = not (self.training or tracing) and self._knows_grids()
        return LayerState(self.training, tracing, knows_grids)

    def forward(self, input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        """Return the operation, what follows it, and fake quantization; shapes as the float layer's.

        ``weight`` and ``bias`` are those of a layer whose weight is computed elsewhere, in each step anew.
        """
        if weight is None:
            weight, bias = self.float_parameters()
        if torch.compiler.is_compiling():
            return self.compute(input, weight, bias)
        with RestingModes():
            return self.compute(input, weight, bias)

    def compute(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Compute :meth:`forward` with a given weight and bias, outside of the mode that answers a forward's calls."""
        return self.paths[choose_path(self.path_state())](self, self.quantized_input(input), weight, bias)

    def rectified(self, y: Tensor) -> Tensor:
        """Return ``y`` after what stands between the operation and the output's quantizer: a ReLU, or nothing."""
        return rectify(y, self.ceiling)

    @property
    def ends_in_ceiling(self) -> bool:
        """Whether :attr:`ceiling` is all of what :meth:`rectified` does, so that a kernel can do it."""
        return True

    def quantized_output(self, y: Tensor) -> Tensor:
        """Return the layer's output from the operation's."""
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
        """The layer as torch's integer kernels run it; derived, and part of no copy."""
        found: Memo[PackedLayer | None] = self.__dict__.setdefault("_packed", Memo())
        return found

    def train(self, mode: bool = True) -> Self:
        """Switch mode; what eval derives of weights takes no memory in training."""
        self.packed.clear()
        return super().train(mode)

    def eval_key(self) -> tuple[Any, ...]:
        """Return the values besides tensors on which the layer's integers in eval mode depend."""
        types = [getattr(held, "qtype", None) for held in (self.input_quantizer, self.weight_fake_quant)]
        return (self.ceiling, types, [vars(self).get(name) for name in (*_GEOMETRY, "output_padding")])

    def _knows_grids(self) -> bool:
        """Whether input and weight have grids that are switched on; may synchronise with a device."""
        source, quantizer = self.input_quantizer, self.weight_fake_quant
        if source is None or source.qtype.axis is not None or not source.is_enabled_on_host():
            return False
        if not isinstance(quantizer, FakeQuantizeBase) or not quantizer.is_enabled_on_host():
            return False
        # Sums of groups have several units.
        is_integer = source.qtype.float_format is None and quantizer.qtype.float_format is None
        return is_integer and quantizer.qtype.group is None

    def output_quantizer(self) -> FakeQuantizeBase | None:
        """Return the quantizer that takes all of the output to one grid, at once or behind a clip, or None."""
        quantizer = self.last_quantizer(self.activation_post_process)
        return quantizer if isinstance(quantizer, FakeQuantizeBase) and quantizer.qtype.axis is None else None

    def output_grid(self) -> Grid | None:
        """Return the one grid that the output goes onto, or None where there is none, or it is switched off."""
        quantizer = self.output_quantizer()
        if quantizer is None or not quantizer.is_enabled_on_host():
            return None
        return quantizer.grid()

    @torch.no_grad()
    def integer_layer(self, weight: Tensor, bias: Tensor | None) -> IntegerAffine | None:
        """Return this layer in integers, or None where input grid or weight grid are unknown or switched off."""
        if not self._knows_grids():
            return None
        source = cast(FakeQuantizeBase, self.input_quantizer)
        weight = self.weight_near_codes(weight)
        return to_integers(weight, bias, self.linear_map, source.grid(), self.weight_grid())


def without_qconfig(args: tuple[Any, ...], qconfig: QConfig | None) -> tuple[tuple[Any, ...], QConfig | None]:
    """Take a QConfig out of a constructor's positional arguments, among which torch.ao's have it.

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
    """Return ``qconfig`` if it is tritonq's.

    Raises:
        TypeError: something else; the message says where a class of the same name comes from.
    """
    check_qconfig(qconfig, f"qconfig of {type(layer).__name__}", "a QConfig")
    return cast(QConfig, qconfig)


def linear_map_of(layer: nn.Module) -> LinearMap:
    """Return the convolution or product of a layer derived from torch's convolutions or ``nn.Linear``."""
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
