"""RepVGG blocks: three branches in training, one convolution in deployment, and QAT of that convolution.

To *fold* a BatchNorm is to multiply the kernel before it by γ/σ, with ``σ = sqrt(running_var + eps)``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.functional.conv2d import find_kernel
from tritonq.functional.linear_map import Convolution
from tritonq.functional.memo import Memo, held_tensors
from tritonq.nn.conv import check_float_type
from tritonq.nn.conv_bn import checked_batch_norm
from tritonq.nn.eval_mode import PATHS
from tritonq.nn.folding_modes import bias_on_grid
from tritonq.nn.fusable import ceiling_of
from tritonq.nn.paths import Path
from tritonq.nn.qat import QATLayer
from tritonq.qconfig import QConfig
from tritonq.reference.activation import rectify
from tritonq.reference.fold import fold_bias, fold_scale, scale_out_channels

_KERNEL = 3


class RepVGGBlock(nn.Module):
    """``act(BN3(conv3x3(x)) + α BN1(conv1x1(x)) + BN_id(x))``, computed branch by branch in training and eval mode.

    In eval mode the sum equals one 3×3 convolution, which :meth:`reparametrize` makes. The identity branch
    ``BN_id(x)`` needs as many channels in as out, and stride 1.

    Args:
        in_channels: of the input.
        out_channels: of the output.
        stride: of both convolutions.
        groups: of both convolutions.
        activation: after the sum: a module, a name ("relu", "relu6", "silu", "swish", "gelu", "hardswish",
            "leaky_relu", "sigmoid"), or None for no activation.
        identity: whether there is an identity branch; None: if the shapes allow it. PaddleDetection's blocks have none.
        learned_alpha: whether α is a parameter that starts at 1; else it is the constant 1.
        eps: of the BatchNorms.
        momentum: of the BatchNorms.
        device: of the parameters, as in torch.
        dtype: of the parameters, as in torch.

    Raises:
        ValueError: an unknown name of an activation, an identity branch although the shapes don't allow it, or channels
            that ``groups`` doesn't divide.
        TypeError: an activation that is neither a module nor a name.

    Source: Ding et al. (2021), "RepVGG"; PaddleDetection (learned α).

    Examples:
        >>> import torch
        >>> block = RepVGGBlock(4, 4).eval()
        >>> x = torch.randn(2, 4, 6, 6)
        >>> torch.allclose(block.activation(block.reparametrize()(x)), block(x), atol=1e-5)
        True
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        groups: int = 1,
        *,
        activation: nn.Module | str | None = "relu",
        identity: bool | None = None,
        learned_alpha: bool = False,
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        place = {"device": device, "dtype": dtype}
        norm = {"eps": eps, "momentum": momentum, **place}
        self.in_channels, self.out_channels, self.stride, self.groups = in_channels, out_channels, stride, groups
        self.conv3 = nn.Conv2d(in_channels, out_channels, _KERNEL, stride, 1, groups=groups, bias=False, **place)
        self.bn3 = nn.BatchNorm2d(out_channels, **norm)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 1, stride, groups=groups, bias=False, **place)
        self.bn1 = nn.BatchNorm2d(out_channels, **norm)
        fits = in_channels == out_channels and stride == 1
        if identity and not fits:
            raise ValueError(
                f"an identity branch needs as many channels in as out, and stride 1; got {in_channels}, {out_channels} "
                f"and stride {stride}"
            )
        has_identity = fits if identity is None else identity
        self.bn_identity = nn.BatchNorm2d(out_channels, **norm) if has_identity else None
        self.alpha = nn.Parameter(torch.ones((), **place)) if learned_alpha else None
        self.activation = _activation(activation)

    def forward(self, input: Tensor) -> Tensor:
        """Return the block's output (batch, out_channels, h', w') for ``input`` (batch, in_channels, h, w).

        h' is h / stride, rounded up, and w' is w / stride, rounded up.
        """
        pointwise = self.bn1(self.conv1(input))
        y = self.bn3(self.conv3(input)) + (pointwise if self.alpha is None else self.alpha * pointwise)
        if self.bn_identity is not None:
            y = y + self.bn_identity(input)
        return self.activated(y)

    @property
    def weight(self) -> Tensor:
        """The weight of the 3×3 branch, whose device and dtype are the block's."""
        return self.conv3.weight

    def activated(self, y: Tensor) -> Tensor:
        """Return ``y`` after the activation, or as it is without one."""
        return y if self.activation is None else cast(Tensor, self.activation(y))

    def merged_parameters(self) -> tuple[Tensor, Tensor]:
        """Return kernel (out, in/groups, 3, 3) and bias (out,) of the one convolution, differentiable in every branch.

        ``K = t3 K3 + pad(α t1 K1) + t_id I`` and ``B = B3 + α B1 + B_id``, with ``t = γ/σ(running_var)`` and ``B_i = β
        - running_mean t`` of each branch's BatchNorm. ``pad`` puts a 1×1 kernel in the centre of a 3×3 kernel of zeros;
        I is the kernel that passes its input through. Without an identity branch its terms are missing.
        """
        kernel, bias = _folded(self.conv3.weight, self.bn3)
        point, point_bias = _folded(self.conv1.weight, self.bn1)
        if self.alpha is not None:
            point, point_bias = self.alpha * point, self.alpha * point_bias
        margin = _KERNEL // 2
        kernel, bias = kernel + F.pad(point, [margin] * 4), bias + point_bias
        if self.bn_identity is not None:
            identity, identity_bias = _folded(self._identity_kernel(), self.bn_identity)
            kernel, bias = kernel + identity, bias + identity_bias
        return kernel, bias

    def _identity_kernel(self) -> Tensor:
        """Return the kernel I that passes its input through: ``I[i, i mod (C/groups), centre] = 1``, else 0."""
        weight = self.conv3.weight
        kernel = torch.zeros_like(weight)
        channel = torch.arange(self.out_channels, device=weight.device)
        kernel[channel, channel % weight.shape[1], _KERNEL // 2, _KERNEL // 2] = 1
        return kernel

    def reparametrize(self) -> nn.Conv2d:
        """Return one float convolution that computes the sum of the branches in eval mode, before the activation.

        Its parameters are new, on the block's device and in its dtype; the block is not changed.
        """
        kernel, bias = self.merged_parameters()
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            _KERNEL,
            self.stride,
            1,
            groups=self.groups,
            device=kernel.device,
            dtype=kernel.dtype,
        )
        with torch.no_grad():
            conv.weight.copy_(kernel)
            cast(Tensor, conv.bias).copy_(bias)
        return conv

    def extra_repr(self) -> str:
        """Return channels, stride and groups for ``repr``, such as "4, 4, stride=1, groups=1"."""
        return f"{self.in_channels}, {self.out_channels}, stride={self.stride}, groups={self.groups}"


def _train(block: QATRepVGGBlock, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``FQ_a(act(conv(x, FQ_w(weight)) + FQ_b(bias)))``: a training step; both quantizers observe.

    ``weight`` and ``bias`` are the merged ones. FQ_b rounds the bias to multiples of input scale × weight scale, if
    both are symmetric 8-bit grids that are on.
    """
    kernel = find_kernel(x, weight, block.linear_map)
    weight, grid = (block.quantized_weight(weight), None) if kernel else block.weight_to_map(weight)
    # Behind the weight's quantizer, whose scale is the bias's too.
    on_grid = bias_on_grid(block, cast(Tensor, bias))
    return block.quantized_output(kernel(x, weight, on_grid) if kernel else block.mapped(x, weight, on_grid, grid))


class QATRepVGGBlock(QATLayer, RepVGGBlock):
    """A RepVGG block in QAT: each step merges the branches and runs one quantized convolution.

    ``y = FQ_a(act(conv(x, FQ_w(K)) + FQ_b(B)))`` with K and B of :meth:`RepVGGBlock.merged_parameters`; FQ_w, FQ_b and
    FQ_a are fake quantization of weight, bias and output. FQ_b rounds to multiples of input scale × weight scale if
    both are symmetric 8-bit grids that are on, else not at all. Gradients reach every branch. The BatchNorms use the
    running statistics of float training, which are not updated.

    Args:
        *args: arguments of :class:`RepVGGBlock`.
        qconfig: makes the quantizers of the merged weight and of the output.
        **kwargs: named arguments of :class:`RepVGGBlock`.

    Raises:
        TypeError: no QConfig given, or an activation that is neither a module nor a name.
        ValueError: arguments that :class:`RepVGGBlock` refuses, or a weight quantizer with ``ch_axis`` other than 0 or
            with groups that don't divide the input channels.

    Examples:
        >>> import torch, tritonq
        >>> model = torch.nn.Sequential(tritonq.nn.RepVGGBlock(4, 4))
        >>> qat = tritonq.prepare_qat(model, example_inputs=torch.randn(2, 4, 6, 6))
        >>> type(qat[0]).__name__
        'QATRepVGGBlock'
    """

    paths: ClassVar[dict[Path, Callable[..., Tensor]]] = {**PATHS, "train": _train}

    def __init__(self, *args: Any, qconfig: QConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attach_quantizers(qconfig, self.out_channels)
        self.ceiling = ceiling_of(self.activation)

    @property
    def bias(self) -> None:  # type: ignore[override]
        """Always None, as the block has no bias parameter; :meth:`float_parameters` returns the merged bias."""

    @property
    def linear_map(self) -> Convolution:
        """The geometry of the merged 3×3 convolution, without its kernel and bias.

        Stride and groups are the block's, padding and dilation are 1.
        """
        margin = (_KERNEL // 2, _KERNEL // 2)
        return Convolution((self.stride, self.stride), margin, (1, 1), (0, 0), False, self.groups)

    def float_parameters(self) -> tuple[Tensor, Tensor]:
        """Return the merged kernel (out, in/groups, 3, 3) and bias (out,) of the branches, not rounded.

        In eval mode without gradients each call returns the same two tensors until a branch or α changes: don't write
        to them.
        """
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.merged_parameters()
        branches = (self.conv3, self.bn3, self.conv1, self.bn1, self.bn_identity)
        held = [tensor for branch in branches if branch is not None for tensor in held_tensors(branch)]
        held += [*self._parameters.values(), *self._buffers.values()]
        # Averages of weights are often written through `data`, which leaves the tensor's version as it was.
        sums = [float(tensor.sum()) for tensor in held if tensor is not None and tensor.dim() > 1]
        memo: Memo[tuple[Tensor, Tensor]] = self.__dict__.setdefault("_merged", Memo())
        return memo.get(tuple(held), self._merged_outside_of_inference, (sums, self.eval_key()))

    def _merged_outside_of_inference(self) -> tuple[Tensor, Tensor]:
        """Return merged kernel and bias, without gradient, as ordinary tensors.

        Tensors made in inference mode have no version by which a change could be noticed.
        """
        with torch.inference_mode(False), torch.no_grad():
            return self.merged_parameters()

    def eval_key(self) -> tuple[Any, ...]:
        """Return the values besides tensors on which eval mode depends, such as ceiling, geometry and BatchNorms' eps.

        What eval mode keeps from call to call is made anew when one of them changes.
        """
        norms = (self.bn3, self.bn1, self.bn_identity)
        return (*super().eval_key(), [bn.eps for bn in norms if bn is not None])

    @property
    def ends_in_ceiling(self) -> bool:
        """Whether the activation is a ReLU, ReLU6 or ``Hardtanh(0, b)``, or missing, so that a kernel can do it."""
        return self.activation is None or self.ceiling is not None

    def rectified(self, y: Tensor) -> Tensor:
        """Return ``y`` after the block's activation, or as it is without one.

        In training the activation's module runs, so that its hooks do; in eval mode a ReLU, ReLU6 or ``Hardtanh(0, b)``
        is computed without its module.
        """
        return rectify(y, self.ceiling) if self.ends_in_ceiling and not self.training else self.activated(y)

    def train(self, mode: bool = True) -> QATRepVGGBlock:
        """Switch to training or eval mode and return the block; the BatchNorms stay in eval mode."""
        super().train(mode)
        self.__dict__.pop("_merged", None)
        for bn in (self.bn3, self.bn1, self.bn_identity):
            if bn is not None:
                bn.eval()
        return self

    def output_quantizer(self) -> FakeQuantizeBase | None:
        """Return the quantizer of the block's output if the convolution's sums can be rounded to its grid at once.

        It is the block's own; if that is an Identity, :attr:`quantizer_behind_clip`, which a clip behind the block
        owns. None if it is per channel, missing or no FakeQuantizeBase, or if the activation is neither missing nor an
        Identity, ReLU, ReLU6 or ``Hardtanh(0, b)``.
        """
        on_grid = self.ends_in_ceiling or isinstance(self.activation, nn.Identity)
        return super().output_quantizer() if on_grid else None

    @classmethod
    def from_float(cls, mod: nn.Module, use_precomputed_fake_quant: bool = False) -> QATRepVGGBlock:
        """Return a new block of this class that shares branches, α and activation of ``mod`` and uses ``mod.qconfig``.

        It has the mode, training or eval, of ``mod``. The shared BatchNorms are switched to eval mode.

        Args:
            mod: the float block.
            use_precomputed_fake_quant: not used; torch.ao has it.

        Raises:
            TypeError: not exactly a :class:`RepVGGBlock`, or no QConfig on it.
            ValueError: a BatchNorm without running statistics, or a weight quantizer that the class refuses.
        """
        check_float_type(cls, mod, RepVGGBlock)
        block = cast(RepVGGBlock, mod)
        qat = cls(
            block.in_channels,
            block.out_channels,
            block.stride,
            block.groups,
            activation=block.activation,
            identity=block.bn_identity is not None,
            device="meta",
            qconfig=getattr(mod, "qconfig", None),
        )
        for name in ("conv3", "bn3", "conv1", "bn1", "bn_identity", "alpha"):
            setattr(qat, name, getattr(block, name))
        for bn in (block.bn3, block.bn1, block.bn_identity):
            if bn is not None:
                checked_batch_norm(bn)
        qat.move_quantizers(block.conv3.weight.device)
        return qat.train(mod.training)


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
    "leaky_relu": nn.LeakyReLU,
    "sigmoid": nn.Sigmoid,
}


def _activation(given: nn.Module | str | None) -> nn.Module | None:
    """Return the activation module for a name, or the given module; None for None.

    Raises:
        ValueError: an unknown name.
        TypeError: neither a module, a name nor None.
    """
    if isinstance(given, str):
        if given not in _ACTIVATIONS:
            raise ValueError(f"unknown activation {given!r}; known: {', '.join(_ACTIVATIONS)}")
        return _ACTIVATIONS[given]()
    if given is not None and not isinstance(given, nn.Module):
        raise TypeError(f"activation must be a module, a name or None, got {type(given).__name__}")
    return given


def _folded(weight: Tensor, bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return ``W t`` and ``β - running_mean t``: kernel and bias of a branch, with ``t = γ/σ(running_var)``."""
    scale = fold_scale(cast(Tensor, bn.running_var), bn.weight, bn.eps)
    return scale_out_channels(weight, scale), fold_bias(None, cast(Tensor, bn.running_mean), scale, bn.bias)
