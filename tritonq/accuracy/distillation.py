"""A loss that draws the outputs of the model in training towards those of the float model (distillation)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Distillation:
    """A loss that draws a student's outputs, and features by name, towards those of its teacher.

    With outputs z of shape (batch, classes, ...) and features f,

        ``loss = T² KL(softmax(z_teacher / T) ‖ softmax(z_student / T)) + w Σ_f E |f_s - f_t|² / E |f_t|²``,

    the divergence averaged over samples and positions. Added to the task's own loss it costs one evaluation of the
    teacher per step. The loss is computed in float32, also under autocast, in which the teacher runs as the student
    does. The student may be wrapped by DistributedDataParallel or ``torch.compile``, since features come from its
    modules and the loss is a plain tensor.

    Args:
        student: the prepared model, before it is wrapped.
        teacher: the float model. It is switched to eval mode here, and gets no gradients from the loss.
        features: qualified names of modules, the same in both models, or a mapping from the student's names to the
            teacher's; hooks keep their last results. These must be single tensors, of the same shape in both models,
            such as results of whole blocks. Empty: the outputs are compared, and no features.
        temperature: T, by which outputs are divided before softmax.
        feature_weight: w, the factor of the features' errors.

    Raises:
        ValueError: a temperature that is not positive, a negative ``feature_weight``, a name that a model does not
            have, or one model as both student and teacher.

    Source: Hinton et al., "Distilling the Knowledge in a Neural Network" (2015), for outputs; Romero et al., "FitNets"
        (2015), for features, here relative to their size; Mishra & Marr, "Apprentice" (2018), for few bits.

    Examples:
        >>> import copy, tritonq
        >>> teacher = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
        >>> x, labels = torch.randn(2, 3, 8, 8), torch.tensor([0, 3])
        >>> student = tritonq.prepare_qat(copy.deepcopy(teacher), example_inputs=x)
        >>> distillation = tritonq.Distillation(student, teacher, features=["1"])
        >>> outputs = student(x)
        >>> loss = F.cross_entropy(outputs, labels) + distillation.loss(outputs, x)
        >>> loss.backward()
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        features: Sequence[str] | Mapping[str, str] = (),
        temperature: float = 4.0,
        feature_weight: float = 1.0,
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        if not feature_weight >= 0:
            raise ValueError(f"feature_weight must not be negative, got {feature_weight}")
        if student is teacher:
            raise ValueError("the student is its own teacher: prepare_qat a copy, and keep the float model")
        self.teacher = teacher.eval()
        self.temperature, self.feature_weight = temperature, feature_weight
        self._names = dict(features) if isinstance(features, Mapping) else {name: name for name in features}
        self._found: dict[tuple[str, str], Tensor] = {}
        found = []
        for role, model, names in (
            ("student", student, self._names.keys()),
            ("teacher", teacher, self._names.values()),
        ):
            modules = dict(model.named_modules())
            for name in names:
                if name not in modules:
                    raise ValueError(f"the {role} has no module {name!r}")
                found.append((modules[name], self._keeper(role, name)))
        self._hooks = [module.register_forward_hook(keeper) for module, keeper in found]

    def _keeper(self, role: str, name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if role == "teacher" or module.training:
                self._found[role, name] = output

        return keep

    def loss(self, outputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the distillation loss, a float32 scalar with gradients to the student.

        Args:
            outputs: what the student returned: one tensor (batch, classes, ...).
            *args: the positional arguments that the student was called with; the teacher is called with the same.
            **kwargs: the student's named arguments, likewise.

        Raises:
            ValueError: outputs or features of another shape than the teacher's, or a module of ``features`` that did
                not run in training mode in the student since the last loss.
        """
        with torch.no_grad():
            wanted = self.teacher(*args, **kwargs)
        if outputs.shape != wanted.shape:
            raise ValueError(f"the student returns {tuple(outputs.shape)}, the teacher {tuple(wanted.shape)}")
        with torch.autocast(outputs.device.type, enabled=False):
            student, teacher = (F.log_softmax(z.float() / self.temperature, 1) for z in (outputs, wanted))
            pointwise = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
            total = self.temperature**2 * pointwise.mean()
            for ours, theirs in self._names.items():
                total = total + self.feature_weight * self._difference(ours, theirs)
        self._found.clear()
        return total

    def _difference(self, ours: str, theirs: str) -> Tensor:
        if ("student", ours) not in self._found:
            raise ValueError(f"the student's module {ours!r} did not run in training mode since the last loss")
        student, teacher = self._found["student", ours].float(), self._found["teacher", theirs].float()
        if student.shape != teacher.shape:
            raise ValueError(
                f"{ours!r} of the student returns {tuple(student.shape)}, {theirs!r} of the teacher "
                f"{tuple(teacher.shape)}"
            )
        return F.mse_loss(student, teacher) / teacher.square().mean().clamp(min=torch.finfo(torch.float32).tiny)

    def close(self) -> None:
        """Remove the hooks from both models; with features, :meth:`loss` raises ValueError from then on."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._found.clear()
