"""The base class of all modules of a converted model, and its quantizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor, nn

from tritonq.code_precision import to_hold_codes
from tritonq.functional.codes import can_use_codes, quantize_to_codes
from tritonq.functional.fake_quant import fake_quantize
from tritonq.functional.host_grid import HostGrid, host_grid
from tritonq.functional.memo import Memo
from tritonq.grid import Grid
from tritonq.observers.base import FixedDtypeBuffers
from tritonq.qparams import QParams
from tritonq.quantized_type import QuantizedType

if TYPE_CHECKING:
    from typing import Self


class DeployedModule(FixedDtypeBuffers):
    """Base class of the modules of a converted model. It has one mode, eval, and refuses to be trained.

    If ``train()`` were ignored instead, dropout and BatchNorm layers that stayed in float would be switched on
    unnoticed.

    Attributes:
        tensor_names: names of the module's own tensors, without its children's, in the order of the state dict.
        parameter_names: names of those that are parameters where they hold floats, and buffers where they hold codes;
            all others are buffers.
        zero_points: names of zero points that may be None for all 0, which the state dict then lacks; each with the
            names of its codes and of its scale. A state dict with codes is loaded whether it has them or not.
    """

    tensor_names: ClassVar[tuple[str, ...]] = ()
    parameter_names: ClassVar[tuple[str, ...]] = ()
    zero_points: ClassVar[Mapping[str, tuple[str, str]]] = {}

    # Of a module that was rewritten for an ONNX file: the oldest opset with its operators; 0: any will do.
    least_opset: int = 0

    # The dtype that the model was given last, by ``half()`` and the like, which the module's own tensors don't take.
    float_dtype: torch.dtype = torch.float32

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move parameters and buffers to another device, as ``to()`` and ``half()`` do; their dtypes stay.

        The dtype that parameters would have got is noted as ``float_dtype``: what users read as weight has it.
        """
        before = {name: held.detach() for name, held in self._parameters.items() if held is not None}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = cast(nn.Parameter, self._parameters[name])
            self.float_dtype = new.dtype
            if new.dtype != old.dtype:
                self._parameters[name] = nn.Parameter(old.to(device=new.device), requires_grad=False)
        return self

    def train(self, mode: bool = True) -> Self:
        """Accept ``train(False)`` only.

        Raises:
            RuntimeError: ``mode`` is true.
        """
        if mode:
            raise RuntimeError("a converted model only runs in eval mode; train the model that it was converted from")
        return super().train(False)

    def keep(self, **tensors: Tensor | None) -> None:
        """Register tensors, detached and in their memory format, as parameters or buffers of these names.

        Float tensors named in ``parameter_names`` become parameters without gradient, so that code which reads
        ``next(model.parameters())`` finds device and dtype. Memory is shared with the given tensors, but those of
        inference mode are copied: they have no version, by which `memo.Memo` notices changes. None is registered as a
        buffer that is None. A tensor that the module has under the name is replaced.
        """
        for name, tensor in tensors.items():
            if tensor is not None and tensor.is_inference():
                with torch.inference_mode(False):
                    tensor = tensor.clone()
            self._parameters.pop(name, None)
            self._buffers.pop(name, None)
            if tensor is not None and tensor.is_floating_point() and name in self.parameter_names:
                self.register_parameter(name, nn.Parameter(tensor.detach(), requires_grad=False))
            else:
                self.register_buffer(name, None if tensor is None else tensor.detach())

    def read_tensors(self) -> None:
        """Compute from the tensors what forward would otherwise read from the device, as plain numbers on the host.

        Called after each load of a state dict, and by the constructor of each class that overrides it. The base class
        computes nothing.
        """

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Save parameters and buffers in the order of ``tensor_names``."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key in (prefix + name for name in self.tensor_names if prefix + name in destination):
            destination[key] = destination.pop(key)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load parameters and buffers; a zero point becomes None, or a tensor, as the state dict has it."""
        for name, (codes, scale) in self.zero_points.items():
            held, scales, is_saved = self._buffers.get(name), getattr(self, scale, None), prefix + name in state_dict
            if held is not None and not is_saved and prefix + codes in state_dict:
                self.keep(**{name: None})
            elif held is None and is_saved and scales is not None:
                self.keep(**{name: torch.zeros_like(scales, dtype=torch.int32)})
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.read_tensors()


class Quantizer(DeployedModule):
    """Rounds values to one fixed grid: a fake quantizer in a converted model.

    Args:
        qtype: the quantized type: range of codes, axis and rounding.
        scale: float32 of any shape, one element, or one per index of the input's axis ``qtype.axis``; not copied.
        zero_point: int32, as many as there are scales; not copied.

    Attributes:
        scale: float32, (1,) or (channels,).
        zero_point: int32, as ``scale``.
        qtype: the quantized type: range of codes, axis and rounding.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, qtype: QuantizedType, scale: Tensor, zero_point: Tensor) -> None:
        super().__init__()
        self.qtype = qtype
        self._on_host: Memo[HostGrid | None] = Memo()
        self.keep(scale=scale.reshape(-1), zero_point=zero_point.reshape(-1))
        self.read_tensors()
        self.eval()

    def read_tensors(self) -> None:
        """Note on the host whether any zero point is not 0; called after each load."""
        self._has_zero_point = bool(self.zero_point.any())

    def is_enabled_on_host(self) -> bool:
        """Return True: a converted quantizer always rounds."""
        return True

    def calculate_qparams(self) -> QParams:
        """Return ``(scale, zero_point)``: the buffers themselves. The name is that of torch.ao's fake quantizers."""
        return QParams(self.scale, self.zero_point)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(clamp(round(x/s) + z, quant_min, quant_max) - z) · s`` in ``x``'s dtype.

        Ties are rounded as ``qtype`` says. Under autocast a bfloat16 or float16 ``x`` gives float32. Elsewhere a
        UserWarning says, once per module, if ``x``'s dtype can't tell the codes apart. A float32 ``x`` on the CPU that
        needs no gradient (:func:`can_use_codes`) gives a tensor that carries its codes, inside a call of a converted
        model a CodedTensor (it computes its values when they are read); not for NaN, an empty ``x``, more than 256
        codes or several scales.
        """
        if can_use_codes(x):
            grid = self._on_host.get((self.scale, self.zero_point), lambda: host_grid(self.grid()), self.qtype)
            y = None if grid is None else quantize_to_codes(x, grid)
            if y is not None:
                return y
        return fake_quantize(to_hold_codes(x, self.qtype, self), self.grid())

    def grid(self) -> Grid:
        """Return the grid, always on, with the buffers themselves; its ``zero_point`` is None if all are 0."""
        return Grid(self.scale, self.zero_point if self._has_zero_point else None, self.qtype)

    def fused_grid(self) -> Grid | None:
        """Return the grid, for an operator that rounds to it in place of this module.

        None if the module must run itself: it has a scale per channel, or forward hooks or pre-hooks.
        """
        if self.qtype.axis is not None or self._forward_hooks or self._forward_pre_hooks:
            return None
        return self.grid()

    def extra_repr(self) -> str:
        """Return the text for ``repr``, such as ``codes 0..255, scale=0.05, zero_point=3``.

        Of several scales it has their number and axis: ``codes -127..127, 64 scales along axis 0``.
        """
        if self.scale.numel() == 1:
            grid = f"scale={self.scale.item():.6g}, zero_point={int(self.zero_point)}"
        else:
            grid = f"{self.scale.numel()} scales along axis {self.qtype.axis}"
        return f"codes {self.qtype.quant_min}..{self.qtype.quant_max}, {grid}"
