"""Stop a training that diverges.

Notice it on the device, read it on the host one step later, before anything is lost.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tritonq.prepare.record.structure import tensors_in
from tritonq.switched_quantizer import SwitchedQuantizer

_STATISTICS = ("running_mean", "running_var")

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


class DivergenceError(ValueError):
    """A loss, a gradient, a weight or a BatchNorm statistic that is not finite.

    The message names the step and, where it was found, the layer or tensor: "step 3: the loss is inf: the first layer
    whose output is not finite is 'conv1'".
    """


@dataclass(frozen=True)
class _Noted:
    """A training step whose outcome is being copied to the host.

    Attributes:
        step: its number.
        images: the batch that it trained with.
        labels: of the batch.
        outcome: (2,): 1 if something was not finite, else 0; and the loss.
        arrived: the event that ends the copy; None on a CPU, where nothing is copied.
    """

    step: int
    images: Tensor
    labels: Tensor
    outcome: Tensor
    arrived: torch.cuda.Event | None

    def read(self) -> tuple[bool, float]:
        if self.arrived is not None:
            self.arrived.synchronize()
        failed, loss = self.outcome.tolist()
        return bool(failed), loss


class DivergenceWatch:
    """Watches whether all steps so far had a finite loss and finite gradients; :meth:`check` raises if not.

    ``failed`` is 1 from the first bad step on. If the caller sets it as ``found_inf`` of a fused optimizer, that step
    and later ones leave the weights as they are, without the host. The host reads the outcome of a GPU's step while the
    next one runs.

    Args:
        device: where the model is.
        gradients_may_overflow: True if gradients are scaled for float16, so that infinite ones are no fault.
        shared: whether processes train together, in torch's default process group; if one fails, all stop.

    Attributes:
        failed: float32 (1,), on the device; 0 or 1. It is changed in place.
    """

    def __init__(self, device: torch.device, gradients_may_overflow: bool = False, shared: bool = False) -> None:
        self.failed = torch.zeros(1, device=device)
        self._gradients_may_overflow, self._shared = gradients_may_overflow, shared
        self._noted: list[_Noted] = []

    def note(self, step: int, images: Tensor, labels: Tensor, loss: Tensor, parameters: Iterable[nn.Parameter]) -> None:
        """Remember the outcome of a step: call it between backward and the optimizer's step. The host reads nothing.

        If the loss or a gradient is not finite, ``failed`` becomes 1 on the device; with ``gradients_may_overflow``
        only the loss counts. With ``shared`` it becomes so in all processes; each of them must call this once per step,
        or the others wait.

        Args:
            step: the step's number, from 1, for messages.
            images: the batch that it trained with, which is kept, not copied, until :meth:`check` reads the outcome.
            labels: of the batch; kept likewise.
            loss: 0-d, not scaled.
            parameters: those whose gradients are looked at; one without a gradient is left out.
        """
        norm = loss.detach().float()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if gradients and not self._gradients_may_overflow:
            # The largest magnitude: a sum of squares overflows where gradients do not.
            norm = norm + nn.utils.get_total_norm(gradients, norm_type=math.inf)
        torch.maximum(self.failed, (~torch.isfinite(norm)).float().view(1), out=self.failed)
        if self._shared:
            dist.all_reduce(self.failed, dist.ReduceOp.MAX)
        outcome = torch.cat([self.failed, loss.detach().float().view(1)])
        arrived = None
        if outcome.is_cuda:
            host = torch.empty(2, pin_memory=True)
            host.copy_(outcome, non_blocking=True)
            outcome, arrived = host, torch.cuda.Event()
            arrived.record()
        self._noted.append(_Noted(step, images, labels, outcome, arrived))

    def check(self, model: nn.Module, loss: Loss, late: bool = True) -> None:
        """Raise an error if a step failed among those that :meth:`note` noted and no earlier call has read.

        If one failed, its batch is run once more to find the cause, unless its images are not finite. That overwrites
        gradients. BatchNorm statistics that are not finite are reset in any case: means to 0, variances to 1.

        Args:
            model: the model that is trained; the message names its layers.
            loss: called as ``loss(model, images, labels)`` with the batch that was noted; returns the loss, 0-d.
            late: on a GPU, leave the newest step to the next call, because it may still run. On a CPU it has no effect.

        Raises:
            DivergenceError: names the first step that failed, its loss, and where its first value that is not finite
                comes from, if the second run has one; with ``shared`` it may be in another process.
        """
        while len(self._noted) > int(late and self.failed.is_cuda):
            noted = self._noted.pop(0)
            failed, value = noted.read()
            if failed:
                raise DivergenceError(f"step {noted.step}: {_cause(model, loss, noted, value)}")


def check_finite(model: nn.Module, step: int) -> None:
    """Raise an error if a parameter or a BatchNorm's running statistic is not finite. The host waits for the device.

    ``step`` is the number of steps done, for the message.

    Raises:
        DivergenceError: names the first such tensor by its qualified name, such as "conv1.weight".
    """
    names, sums = [], []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        kept = isinstance(tensor, nn.Parameter) or name.endswith(_STATISTICS)
        if kept and tensor.is_floating_point():
            names.append(name)
            sums.append(torch.isfinite(tensor).all())
    if not sums:
        return
    finite = torch.stack(sums).tolist()
    if not all(finite):
        raise DivergenceError(f"after step {step} {names[finite.index(False)]!r} is not finite, though the loss was")


def _cause(model: nn.Module, loss: Loss, noted: _Noted, value: float) -> str:
    """Run the failed step again, and return in words where the first value that is not finite comes from.

    ``value`` is the loss that the step had.
    """
    said = f"the loss is {value:.4g}"
    _mend_statistics(model)
    images, labels = noted.images, noted.labels
    if not bool(torch.isfinite(images).all()):
        return f"{said}: its images hold values that are not finite"
    bad = _not_finite_gradients(model)
    found: list[str] = []
    names = dict(_layers_by_module(model))

    def look(module: nn.Module, args: object, output: object) -> None:
        if not found and not all(bool(torch.isfinite(t).all()) for _, t in tensors_in(output) if t.is_floating_point()):
            found.append(names[module] or type(model).__name__)

    handles = [module.register_forward_hook(look) for module in model.modules()]
    try:
        model.zero_grad(set_to_none=True)
        loss(model, images, labels).backward()
    except ValueError as error:  # layers that check what they are given
        return f"{said}: {error}"
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return f"{said}: the first layer whose output is not finite is {found[0]!r}"
    bad = bad or _not_finite_gradients(model)
    if bad:
        return f"{said}, but gradients are not finite: that of {bad[-1]!r} is the first on the way back"
    return said


def _layers_by_module(model: nn.Module) -> Iterable[tuple[nn.Module, str]]:
    """Yield each module with the name that a user knows: that of its layer for a quantizer in a layer."""
    for name, module in model.named_modules():
        layer = name.rpartition(".")[0] if isinstance(module, SwitchedQuantizer) else ""
        yield module, layer or name


def _not_finite_gradients(model: nn.Module) -> list[str]:
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all())
    ]


@torch.no_grad()
def _mend_statistics(model: nn.Module) -> None:
    """Reset the BatchNorm statistics that are not finite, so that the model can run once more."""
    for name, buffer in model.named_buffers():
        if name.endswith(_STATISTICS):
            buffer.copy_(torch.where(torch.isfinite(buffer), buffer, float(name.endswith("var"))))
