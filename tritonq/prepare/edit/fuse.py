"""Fuse named modules by hand, with torch.ao's calling convention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tritonq.nn import intrinsic
from tritonq.nn.fusable import ceiling_of
from tritonq.prepare.decide.rows import ROWS, Types, batch_norm_obstacle, out_channels
from tritonq.prepare.record.snapshot import copied, undone_on_error

FuserMethod = Callable[..., nn.Module]


def fuse_row(parts: Sequence[nn.Module], types: Types | None = None) -> intrinsic.FusedModule:
    """Return the fused float module of a row such as Conv2d, BatchNorm2d, ReLU, in the mode of its first part.

    Args:
        parts: the modules in order of execution, which become children of the fused module as they are.
        types: the type to look up for each part, such as nn.Conv2d for a subclass; None: their own types, and nn.ReLU
            for each ReLU, clipped or not.

    Raises:
        ValueError: no such row exists, or its BatchNorm can't be fused; the message says why.
    """
    types = types or tuple(type(part) if ceiling_of(part) is None else nn.ReLU for part in parts)
    if types not in ROWS:
        known = "; ".join(", ".join(kind.__name__ for kind in row) for row in ROWS)
        raise ValueError(f"can't fuse {', '.join(type(part).__name__ for part in parts)}; known rows: {known}")
    for part in parts[1:]:
        obstacle = batch_norm_obstacle(out_channels(parts[0]), part) if isinstance(part, _BatchNorm) else None
        if obstacle is not None:
            raise ValueError(f"can't fuse {', '.join(type(part).__name__ for part in parts)}: {obstacle}")
    fused = ROWS[types](*parts)
    fused.training = parts[0].training
    return fused


def fuse_known_modules(
    mod_list: Sequence[nn.Module],
    is_qat: bool,
    additional_fuser_method_mapping: Mapping[Types, FuserMethod] | None = None,
) -> list[nn.Module]:
    """Return the modules that replace a row: the fused one first, ``nn.Identity`` for the others.

    Forward pre-hooks of the first module, and forward and backward hooks of the last one, move to the fused module.

    Args:
        mod_list: the modules in order of execution.
        is_qat: passed on to the fuser method; the rows known here are made for QAT.
        additional_fuser_method_mapping: for tuples of the modules' exact types, fuser methods ``f(is_qat, *modules)``
            that return the fused module; they win over the known rows. None: there are none.

    Raises:
        ValueError: an unknown row, modules in different modes, or a BatchNorm that can't be fused.
    """
    types = tuple(type(module) for module in mod_list)
    if len({module.training for module in mod_list}) > 1:
        modes = ", ".join("train" if module.training else "eval" for module in mod_list)
        raise ValueError(f"modules to fuse must be in one mode, got {modes}")
    custom = (additional_fuser_method_mapping or {}).get(types)
    fused = fuse_row(mod_list) if custom is None else custom(is_qat, *mod_list)
    move_hooks(mod_list[0], mod_list[-1], fused)
    rest = [nn.Identity().train(mod_list[0].training) for _ in mod_list[1:]]
    return [fused, *rest]


def fuse_modules_qat(
    model: nn.Module,
    modules_to_fuse: Sequence[str] | Sequence[Sequence[str]],
    inplace: bool = False,
    fuser_func: Callable[..., Sequence[nn.Module]] = fuse_known_modules,
    fuse_custom_config_dict: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Fuse named rows of modules, such as ``[["conv1", "bn1", "relu1"], ["fc", "relu2"]]``, for QAT.

    The first module of each row is replaced by the fused one (:mod:`tritonq.nn.intrinsic`), the others by
    ``nn.Identity``.

    Args:
        model: the model that holds the modules.
        modules_to_fuse: one row of qualified names in order of execution, or a list of rows.
        inplace: whether to change ``model`` itself instead of a copy.
        fuser_func: returns the replacements of one row, as :func:`~tritonq.prepare.edit.fuse.fuse_known_modules` does.
        fuse_custom_config_dict: ``{"additional_fuser_method_mapping": {types: fuser method}}``; None: no further rows.

    Returns:
        The model with fused modules: ``model`` itself if ``inplace``.

    Raises:
        ValueError: an unknown name or row, modules in different modes, a BatchNorm that can't be fused, or a
            ``fuser_func`` that returns more or fewer modules than the row has; ``model`` is then as it was.

    Source: torch.ao.quantization.fuse_modules_qat.

    Examples:
        >>> import tritonq
        >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).train()
        >>> [type(module).__name__ for module in tritonq.fuse_modules_qat(model, [["0", "1", "2"]])]
        ['ConvBnReLU2d', 'Identity', 'Identity']
    """
    return fuse_rows(model, modules_to_fuse, inplace, fuser_func, fuse_custom_config_dict, is_qat=True)


def fuse_rows(
    model: nn.Module,
    modules_to_fuse: Sequence[str] | Sequence[Sequence[str]],
    inplace: bool,
    fuser_func: Callable[..., Sequence[nn.Module]],
    fuse_custom_config_dict: Mapping[str, Any] | None,
    *,
    is_qat: bool,
) -> nn.Module:
    """Fuse named rows of modules by ``fuser_func``, for :func:`fuse_modules_qat` and torch.ao's ``fuse_modules``.

    Arguments, result and errors are those of the former; ``fuser_func`` is called with the modules of a row, ``is_qat``
    and the mapping "additional_fuser_method_mapping", ``{}`` without one.
    """
    custom = (fuse_custom_config_dict or {}).get("additional_fuser_method_mapping", {})
    is_one_row = all(isinstance(item, str) for item in modules_to_fuse)
    rows = cast(Sequence[Sequence[str]], [modules_to_fuse] if is_one_row else modules_to_fuse)
    if not inplace:
        model = copied(model)
    with undone_on_error(model):
        for row in rows:
            parts = [_submodule(model, name) for name in row]
            for name, replacement in zip(row, fuser_func(parts, is_qat, custom), strict=True):
                parent, _, attribute = name.rpartition(".")
                setattr(model.get_submodule(parent), attribute, replacement)
    return model


def move_hooks(first: nn.Module, last: nn.Module, new: nn.Module) -> None:
    """Move the forward pre-hooks of ``first``, and all forward and backward hooks of ``last``, to ``new``.

    They come before hooks that ``new`` has already. Handles that users got when they registered the hooks still remove
    them.
    """
    for source, registries in ((first, _PRE_HOOKS), (last, _HOOKS)):
        for registry in registries:
            kept = getattr(new, registry)
            moved = getattr(source, registry)
            # The same dict object: a handle removes its hook from that.
            moved.update({key: hook for key, hook in kept.items() if key not in moved})
            setattr(new, registry, moved)
            setattr(source, registry, type(moved)())
    if last._is_full_backward_hook is not None:
        new._is_full_backward_hook, last._is_full_backward_hook = last._is_full_backward_hook, None


_PRE_HOOKS = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")
_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_backward_pre_hooks", "_backward_hooks"),
)


def _submodule(model: nn.Module, name: str) -> nn.Module:
    """Return a submodule by its name; raise ValueError if there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{type(model).__name__} has no submodule {name!r}") from None
