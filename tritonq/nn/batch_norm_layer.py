"""The base class of layers whose BatchNorm is part of them.

To *fold* a BatchNorm is to multiply the weight by γ/σ, so that one layer remains. FQ_w and FQ_b are fake quantization
of weight and bias. FQ_b rounds the bias to multiples of input scale × weight scale if input and weight have integer
grids that are known and switched on; in training only if these are symmetric and have 8 bits. Else it changes nothing.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.float_fake_quantize import FloatFakeQuantize
from tritonq.functional.conv_bn import check_running_var
from tritonq.functional.fake_quant import fake_quantize
from tritonq.functional.gradients import needs_gradient, with_gradient_of
from tritonq.functional.recomputation import StepMemory
from tritonq.grid import Grid
from tritonq.nn.batch_norm import FrozenBatchNorm, gamma_signs, is_plain
from tritonq.nn.fusable import has_observed_grid
from tritonq.nn.paths import LayerState, Mode, check_mode, choose_path
from tritonq.nn.qat import QATLayer
from tritonq.nn.reference import Reference
from tritonq.qparams import TORCH_EPS
from tritonq.reference.fold import fold_bias, fold_scale, scale_out_channels

# Of a channel whose γ is 0: its codes are 0, whatever the scale is.
_LEAST_SCALE = TORCH_EPS


class QATBatchNormLayer(QATLayer):
    """A convolution or linear layer whose BatchNorm is part of it.

    ``mode`` says how training folds the BatchNorm into the quantized weight. ``op`` is the convolution or product, W
    and b are its weight and bias, γ and β those of the BatchNorm (1 and 0 without them), which is the child ``bn``.
    σ(v) is ``sqrt(v + eps)``. A ReLU, if the layer has one, and fake quantization of the output follow y:

    - ``"approximate"`` (torch.ao's default): ``y = BN(op(x, FQ_w(W s)) / s + b)`` with ``s = γ/σ(running_var)`` from
      before this step's update. In a channel with γ = 0, ``s = 1/σ``, so that nothing is divided by zero and γ can
      leave zero. The fastest: the layer runs once, and saves only its input and the convolution's output.
    - ``"exact"`` (MegEngine's ``approx=False``): ``y = op(x, FQ_w(W t)) + FQ_b(β - t μ)`` with ``t = γ/σ(v)``, where μ
      and v are mean and biased variance of this batch's ``op(x, W)``; gradients flow through them.
    - ``"corrected"`` (torch.ao's slow path): ``y = op(x, FQ_w(W γ/σ(r))) σ(r)/σ(v) + β - t μ``, where r is the running
      variance after this step's update; v, t and μ as in ``"exact"``.
    - ``"scale"``: ``y = BN(op(x, u FQ_w(u W; s_w)) + b)`` with ``u = -1`` where γ < 0, else 1, and s_w the scale of the
      weight's quantizer. Deployment folds the BatchNorm into that scale: ``s_w |t|``, t as in eval mode. In the other
      modes each step's statistics move ``W s`` relative to a trained scale, so that codes flip; and running statistics
      are averages over other weights than the deployed ones. At 2 bits that costs points of accuracy. For symmetric
      signed types.

    In eval mode, and in training with a frozen BatchNorm, all four compute ``y = op(x, FQ_w(W t)) + FQ_b(β + t (b -
    running_mean))`` with ``t = γ/σ(running_var)``. In mode ``"scale"`` the grid of ``W t`` has the scale ``s_w |t|``.

    Attributes:
        bn: the BatchNorm.
        freeze_bn: whether training normalises with the running statistics too, and does not update them.
        batch_norm_place: a Reference to the module that stands where the BatchNorm was in the model; while that is in
            eval mode, the statistics are frozen, as the BatchNorm's were. Empty: there is none.
        grouping: ``(whether the operation is a transposed convolution, its number of groups)``.

    Raises:
        ValueError: an unknown mode, or ``"scale"`` for a weight whose type is not symmetric and signed; in training, a
            running variance on a CPU that is negative or not finite; in training whose BatchNorm is not frozen, a
            single value per channel; then with ``"exact"`` or ``"corrected"`` also a BatchNorm that has hooks, is of
            another class than torch's, or is synchronized over ranks; and an input that :meth:`check_input` refuses, if
            one operator computes the step.

    Source: torch.ao.nn.intrinsic.qat; docs/conv-bn.md, "Modes of training"; "scale" is Esser et al. (2020), LSQ, whose
        weights are rounded before BatchNorm.

    Examples:
        >>> import torch, tritonq
        >>> layer = tritonq.nn.ConvBn2d(1, 4, 3, qconfig=tritonq.get_qconfig("tensorrt"))
        >>> layer.mode = "corrected"
        >>> isinstance(layer, QATBatchNormLayer), layer(torch.randn(2, 1, 8, 8)).shape
        (True, torch.Size([2, 4, 6, 6]))
    """

    bn: nn.modules.batchnorm._BatchNorm
    freeze_bn: bool = False
    # What stands where the BatchNorm was: in eval mode it freezes the statistics, as the BatchNorm did.
    batch_norm_place: Reference[nn.Module] = Reference()
    grouping: tuple[bool, int] = (False, 1)
    _bn_type: ClassVar[type[nn.modules.batchnorm._BatchNorm]]
    _mode: Mode = "approximate"

    def attach_batch_norm(
        self, features: int, eps: float, momentum: float | None, freeze_bn: bool, mode: str | None = None
    ) -> None:
        """Create the child ``bn``, of the class ``_bn_type``, and choose the mode of folding.

        A subclass's constructor calls it, after :meth:`attach_quantizers`: the qconfig may name the mode, and the
        weight's type may forbid it.

        Args:
            features: number of out channels.
            eps: of the BatchNorm.
            momentum: of the BatchNorm; None: running statistics are plain averages.
            freeze_bn: whether to begin with frozen statistics.
            mode: how training folds it; None: the qconfig's mode, or "approximate".

        Raises:
            ValueError: an unknown mode, or ``"scale"`` for a weight whose type is not symmetric and signed.
        """
        self.bn = self._bn_type(features, eps, momentum, device=self.weight.device, dtype=self.weight.dtype)
        self.mode = check_mode(mode or self.qconfig.folding or "approximate")
        self.step_memory = StepMemory()
        if freeze_bn:
            self.freeze_bn_stats()

    @property
    def mode(self) -> Mode:
        """How training folds the BatchNorm into the weight.

        One of "approximate", "exact", "corrected" and "scale", whose formulas the class has. It can be set. Setting any
        other text, or "scale" for a weight whose type is not symmetric and signed, raises ValueError.
        """
        return self._mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        mode = check_mode(mode)
        qtype = getattr(self.weight_fake_quant, "qtype", None)
        if mode == "scale" and qtype is not None and qtype.fixed_zero_point != 0:
            raise ValueError(f"a BatchNorm folds into the scale of a symmetric signed weight, got {qtype}")
        self._mode = mode

    def quantized_folded_weight(self, folded: Tensor) -> Tensor:
        """Return ``folded``, the weight with the BatchNorm folded in, rounded to its grid.

        In mode "scale" the codes are those of :meth:`weight_to_quantize`; only their scale is multiplied by ``|t|``,
        t of :meth:`fold_factors`. Without a weight quantizer the result is ``folded``.
        """
        quantizer = self.weight_fake_quant
        if self._mode != "scale" or isinstance(quantizer, nn.Identity):
            return super().quantized_folded_weight(folded)
        rounded = None
        if _rounds_to_one_grid(quantizer):
            op = self.linear_map
            rounded = op.from_rows(fake_quantize(op.to_rows(folded), self.weight_grid()))
            if not needs_gradient(self, folded):
                return rounded
        scale = self.fold_factors().abs()
        # Dividing by 0 would give a gradient of NaN, whatever `where` chooses.
        inverse = torch.where(scale == 0, 0, 1 / torch.where(scale == 0, 1, scale))
        unfolded = scale_out_channels(folded, inverse, *self.grouping)
        # It may observe, as in calibration; a module that is no fake quantizer of tritonq's may round, too.
        quantized = scale_out_channels(self.quantized_weight(unfolded), scale, *self.grouping)
        return quantized if rounded is None else with_gradient_of(rounded, quantized)

    def weight_grid(self) -> Grid:
        """Return the grid of the folded weight, for a layer with a weight quantizer.

        In mode "scale" its scales are those of the unfolded weight times ``|t|``, t of :meth:`fold_factors`, one for
        each channel or group, and at least 2^-23.
        """
        grid = super().weight_grid()
        if self._mode != "scale":
            return grid
        factors = self.fold_factors().detach().abs()
        if grid.qtype.group is None:
            qtype = grid.qtype.with_axis(0)
        else:
            qtype, factors = grid.qtype, factors.repeat_interleave(grid.scale.numel() // len(factors))
        return Grid((grid.scale.detach() * factors).clamp(min=_LEAST_SCALE), None, qtype, grid.enabled)

    def weight_to_quantize(self) -> Tensor:
        """Return the present weight as its quantizer gets it while the BatchNorm is frozen; not rounded.

        In mode "scale" it is W, multiplied by -1 where γ < 0. In the other modes it is ``W t`` with
        ``t = γ/σ(running_var)``. Without freezing, a training step of mode "approximate" has ``W/σ`` where γ = 0,
        "exact" folds the batch's variance, and "corrected" the running variance after the step's update.
        """
        if self._mode != "scale":
            return super().weight_to_quantize()
        return scale_out_channels(self.float_parameters()[0], gamma_signs(self.bn), *self.grouping)

    def fold_factors(self) -> Tensor:
        """Return ``t = γ/σ(running_var)`` per channel, by which eval mode multiplies the weight; (out channels,)."""
        return fold_scale(cast(Tensor, self.bn.running_var), self.bn.weight, self.bn.eps)

    def folded_parameters(self, weight: Tensor | None = None, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return weight ``W t`` and bias ``β + t (b - running_mean)`` with ``t = γ/σ(running_var)``, not rounded.

        ``weight`` and ``bias`` are the W and b to fold, with b = 0 for a bias of None. Without ``weight`` they are the
        layer's own, and ``bias`` is not read.
        """
        weight, bias = super().folded_parameters(weight, bias)
        running_mean, scale = cast(Tensor, self.bn.running_mean), self.fold_factors()
        folded_bias = fold_bias(bias, running_mean, scale, self.bn.bias)
        return scale_out_channels(weight, scale, *self.grouping), folded_bias

    def eval_key(self) -> tuple[Any, ...]:
        """Return the values besides tensors on which eval mode depends: those of the base class, eps and the mode.

        What eval mode keeps from call to call is made anew when one of them changes.
        """
        return (*super().eval_key(), self.bn.eps, self._mode)

    def path_state(self) -> LayerState:
        """Return a `LayerState`, by which :meth:`forward` chooses its computation (`tritonq.nn.paths`).

        Besides training, tracing and known grids it tells the mode of folding, whether the BatchNorm is frozen, and
        whether one operator can do the training step.
        """
        place = self.batch_norm_place.module
        frozen = self.freeze_bn or not self.bn.training or (place is not None and not place.training)
        fits = self.training and not frozen and self._mode == "approximate" and self._fits_operator()
        state = super().path_state()
        return LayerState(state.training, state.tracing, state.knows_grids, self._mode, frozen, fits)

    def _fits_operator(self) -> bool:
        """Whether one operator can take over the weight's quantizer and the BatchNorm in a training step."""
        quantizer = self.weight_fake_quant
        rounds = isinstance(quantizer, nn.Identity) or has_observed_grid(quantizer)
        return rounds and is_plain(self.bn)

    @property
    def trains_in_one_operator(self) -> bool:
        """Whether one operator computes a training step, in the present state of the layer.

        It does in training mode, in mode "approximate", with a plain BatchNorm (torch's own class, not synchronized
        over ranks) that is not frozen and has no hooks, if the weight has no quantizer or one in whose place the
        operator can observe and round. Such a quantizer is a plain `FakeQuantize` to integers, without groups, with one
        of the four observers of `tritonq.observers.min_max`, which has no process group; neither has hooks. The rest is
        in :func:`tritonq.nn.fusable.has_observed_grid`.
        """
        return choose_path(self.path_state()) == "train_operator"

    def compute(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return operation, BatchNorm, ReLU (if there is one) and fake quantization, with the given weight and bias.

        These are neither folded nor rounded yet; a bias of None is none. An empty batch has no statistics: in training
        it is computed as with a frozen BatchNorm, except in a graph of ``torch.compile``.
        """
        if self.training:
            check_running_var(cast(Tensor, self.bn.running_var))
            if input.numel() == 0 and not torch.compiler.is_compiling():  # it has no statistics
                return self.paths["train_frozen"](self, self.quantized_input(input), weight, bias)
        return super().compute(input, weight, bias)

    def check_input(self, x: Tensor) -> None:
        """Raise ValueError unless ``x`` has the dimensions of a batch: 4 for a two-dimensional convolution.

        They are batch, channels and one for each axis of the kernel. A linear layer takes 2, batch and features.
        """
        expected = len(cast(nn.modules.conv._ConvNd, self).kernel_size) + 2
        if x.dim() != expected:
            raise ValueError(f"expected an input of {expected} dimensions, got {tuple(x.shape)}")

    def along_channels(self, vector: Tensor, y: Tensor) -> Tensor:
        """Return a vector (out channels,) in the dtype of the output ``y``, shaped to broadcast along its channels."""
        shape = [1] * y.dim()
        shape[self.linear_map.output_axis] = -1
        return vector.to(y.dtype).view(shape)

    def freeze_bn_stats(self) -> QATBatchNormLayer:
        """Normalise with the running statistics from now on, in training too, and do not update them.

        Return the layer.
        """
        self.freeze_bn = True
        self.bn.training = False
        return self

    def update_bn_stats(self) -> QATBatchNormLayer:
        """Undo :meth:`freeze_bn_stats`, and return the layer.

        A `FrozenBatchNorm`, whose numbers are fixed, stays frozen. So does any BatchNorm while the module at
        ``batch_norm_place`` is in eval mode.
        """
        if isinstance(self.bn, FrozenBatchNorm):
            return self
        self.freeze_bn = False
        self.bn.training = self.training
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Add the key ``freeze_bn`` to the state dict of a frozen layer.

        Other layers have the same keys as torch.ao's.
        """
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.freeze_bn:
            destination[f"{prefix}freeze_bn"] = torch.ones(1, dtype=torch.uint8)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Freeze the layer if the state dict has the key ``freeze_bn``; without it the layer stays as it is."""
        if state_dict.pop(f"{prefix}freeze_bn", None) is not None:
            self.freeze_bn_stats()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def reset_running_stats(self) -> None:
        """Reset the BatchNorm's running statistics: mean 0, variance 1, and no batch counted."""
        self.bn.reset_running_stats()

    def train(self, mode: bool = True) -> QATBatchNormLayer:
        """Switch to training or eval mode, and return the layer; with ``freeze_bn`` set, ``bn`` stays in eval mode.

        The mode of the module at ``batch_norm_place`` has no effect here; each forward reads it.
        """
        super().train(mode)
        if self.freeze_bn:
            self.bn.training = False
        return self


def _rounds_to_one_grid(quantizer: nn.Module) -> bool:
    """Whether a weight quantizer rounds to a grid now: it is tritonq's, switched on, and has no format in blocks."""
    if isinstance(quantizer, FloatFakeQuantize):
        return quantizer.qtype is not None and quantizer.rounds()
    return isinstance(quantizer, FakeQuantizeBase) and quantizer.rounds_to_nearest and quantizer.is_enabled_on_host()
