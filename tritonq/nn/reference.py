"""References from a module to modules that other modules own.

A *place* is an attribute of a module under which a child stood when `prepare_qat` made the reference. A user may put
another module there later. A *route* is all that a tensor passes between the module that rounds it and the module that
reads it: places, and modules' hooks. A hook is *watched* if it was replaced by one that notes whether it changes
tensors.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar, Generic, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class ChildPlace(NamedTuple):
    """Where a module stood when a Reference was made.

    Attributes:
        siblings: the children of the module's parent, by attribute: the parent's own ``_modules``, not a copy.
        attribute: the attribute of the parent, such as "conv".
        module: the module.
        name: the module's qualified name, such as "layer1.conv", for messages.
    """

    siblings: dict[str, nn.Module | None]
    attribute: str
    module: nn.Module
    name: str

    def is_kept(self) -> bool:
        """Whether :attr:`module` still stands under :attr:`attribute`, or a wrapper that returns its results.

        Such wrappers are those of ``torch.compile``, FSDP and others that :func:`hands_on` knows.
        """
        occupant = self.siblings.get(self.attribute)
        return occupant is self.module or hands_on(occupant, self.module)


def hands_on(wrapper: nn.Module | None, module: nn.Module) -> bool:
    """Whether ``wrapper`` is ``module``, or torch's own wrapper of it, which returns what ``module`` returns.

    Such wrappers are what ``torch.compile`` makes, checkpoint wrappers, FSDP, DistributedDataParallel, DataParallel,
    and an ``nn.Sequential`` of one module. Wrappers may lie around wrappers. A wrapper of another class gives False,
    one of torch's too, such as attention or a ``torch.fx.GraphModule``; so does None.
    """
    while wrapper is not None and wrapper is not module:
        if type(wrapper) is not nn.Sequential and not type(wrapper).__module__.startswith(_WRAPPING_PACKAGES):
            return False
        children = list(wrapper.children())
        wrapper = children[0] if len(children) == 1 else None
    return wrapper is module


# Where torch keeps its wrappers. Modules of these packages with one child return what the child returns.
_WRAPPING_PACKAGES = ("torch._dynamo.", "torch.distributed.", "torch.nn.parallel.")


class WatchedHook:
    """A forward hook or forward pre-hook, which remembers whether it ever changed what it was given.

    Args:
        hook: the hook.

    Attributes:
        hook: the hook.
        changes: whether the hook ever returned other objects than it was given, even equal ones (None is no change), or
            changed in place a tensor that it was given by itself or in a tuple. In-place changes of inference tensors,
            and of tensors in lists or dicts, are not seen. :meth:`Reference.meet` may set it to True, too.
    """

    def __init__(self, hook: Callable[..., Any]) -> None:
        self.hook, self.changes = hook, False

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        """Return what the hook returns."""
        before = _versions(given)
        result = self.hook(module, *given)
        # A pre-hook may return (args,) or the one argument; with keywords (args, kwargs).
        given_back = result is None or _same(result, given[-1]) or _same((result,), given[-1]) or _same(result, given)
        if not given_back or _versions(given) != before:
            self.changes = True
        return result


def _same(result: Any, given: Any) -> bool:
    """Whether a hook's result is what it was given, or a tuple of the same objects."""
    if result is given:
        return True
    is_pair = isinstance(result, tuple) and isinstance(given, tuple) and len(result) == len(given)
    return is_pair and all(_same(item, other) for item, other in zip(result, given, strict=True))


def _versions(given: Any) -> list[int]:
    """Return how often the tensors among a hook's arguments were changed in place."""
    if isinstance(given, torch.Tensor):
        return [] if given.is_inference() else [given._version]
    return [count for item in given for count in _versions(item)] if isinstance(given, tuple) else []


class HookPlace(NamedTuple):
    """A module's hooks that a tensor passes: those on what the module returns, or those on what it is given.

    Attributes:
        name: the module's qualified name.
        hooks: the hooks by torch's keys for them: the module's own ``_forward_hooks`` or ``_forward_pre_hooks``.
        known: keys of the hooks that were there when the model was recorded.
    """

    name: str
    hooks: dict[int, Callable[..., Any]]
    known: frozenset[int]

    def unwatched(self) -> list[int]:
        """Return the keys of users' hooks that were put here after the model was recorded and are not watched yet.

        A user's hook is one that is defined in neither torch nor tritonq.
        """
        return [
            key
            for key, hook in self.hooks.items()
            if key not in self.known
            and not isinstance(hook, WatchedHook)
            and not str(getattr(hook, "__module__", "")).startswith(("torch.", "tritonq."))
        ]


class Route:
    """The places that a tensor passes between the module that rounds it and one that reads it.

    The reader asks :meth:`change` before it trusts the rounding module's grid; if there is a change, it computes in
    float.

    Args:
        places: a :class:`ChildPlace` for each module on the way: it finds out whether another module stands there.
        told: a list of one bool that the routes of one model share: True once the model's warning of a change was
            given; None: a new list for this route alone.
        hooks: a :class:`HookPlace` for each dict of hooks on the way: it finds hooks that were added.
    """

    __slots__ = ("_dicts", "hooks", "places", "told")

    def __init__(
        self, places: tuple[ChildPlace, ...] = (), told: list[bool] | None = None, hooks: tuple[HookPlace, ...] = ()
    ) -> None:
        self.places, self.told, self.hooks = places, [False] if told is None else told, hooks
        self._dicts = tuple(place.hooks for place in hooks)

    def change(self) -> str | None:
        """Return what has changed on the way, such as "Adapter was put in the place of 'layer1.conv'"; None: nothing.

        A change is another module, or none, in one of the places, or a hook of a user that changes tensors; under
        ``torch.compile`` also a hook that is not watched yet.
        """
        for place in self.places:
            if place.siblings.get(place.attribute) is not place.module and not place.is_kept():
                occupant = place.siblings.get(place.attribute)
                what = "nothing" if occupant is None else type(occupant).__name__
                return f"{what} was put in the place of {place.name!r}"
        return self._changed_by_hook() if any(self._dicts) else None

    def _changed_by_hook(self) -> str | None:
        """Return which module has a hook that changes tensors; under ``torch.compile`` any that was not watched yet."""
        for place in self.hooks:
            found = any(isinstance(hook, WatchedHook) and hook.changes for hook in place.hooks.values())
            if found or (torch.compiler.is_compiling() and place.unwatched()):
                return f"a hook that changes tensors was put on {place.name!r}"
        return None

    def new_hooks(self) -> list[WatchedHook]:
        """Watch the users' hooks that were put on the way since the last call, and return their WatchedHooks.

        To watch is to put a :class:`WatchedHook` in the hook's place, in the module's own dict. Under ``torch.compile``
        nothing is done, and the list is empty.
        """
        found = []
        if any(self._dicts) and not torch.compiler.is_compiling():
            for place in self.hooks:
                for key in place.unwatched():
                    found.append(WatchedHook(place.hooks[key]))
                    place.hooks[key] = found[-1]
        return found

    def tell(self, change: str) -> None:
        """Warn (UserWarning), once per model, of a change on the way: the tensor there lies on no known grid.

        ``change`` is the text of :meth:`change`. Nothing is said under ``torch.compile``.
        """
        if self.told[0] or torch.compiler.is_compiling():
            return
        self.told[0] = True
        warnings.warn(
            f"{change} after prepare_qat: the tensor there lies on no known grid, "
            "and what reads it computes in float; tritonq.summary lists all such places",
            stacklevel=2,
        )


class Reference(Generic[M]):
    """A reference to a module that is used here and owned by another module; its ``module`` is None if there is none.

    ``nn.Module`` takes every module that is assigned to an attribute for a child: its tensors would appear in the state
    dict a second time, and ``to()``, ``train()`` and ``named_modules()`` would visit it twice. A Reference is an
    ordinary attribute instead. ``copy.deepcopy`` and ``pickle`` follow it: if both modules are copied together, the
    copy of the user refers to the copy of the owner. It keeps the module alive.

    Args:
        module: the module; None: the Reference refers to nothing.
        route: what lies between the module and whoever holds the Reference; None: nothing that counts. While another
            module stands in one of the route's places, such as an adapter around a layer, or once a hook has changed
            what passes, the property ``module`` is None.
    """

    __slots__ = ("_module", "route")

    def __init__(self, module: M | None = None, route: Route | None = None) -> None:
        self._module, self.route = module, route

    @classmethod
    def to(cls, module: M | Reference[M] | None) -> Reference[M]:
        """Return a Reference to ``module``, without a route; a Reference as it is; for None one that has no module."""
        return module if isinstance(module, Reference) else cls(module)

    @property
    def module(self) -> M | None:
        """The module; None if there is none, or while a place or hook on the route is not as it was.

        In the latter case a warning says so, once per model (:meth:`Route.tell`).
        """
        change = None if self.route is None else self.route.change()
        if change is None:
            return self._module
        self.route.tell(change)  # type: ignore[union-attr]
        return None

    @property
    def change(self) -> str | None:
        """What :meth:`Route.change` tells of the route, without a warning; None if nothing, or without a route."""
        return None if self.route is None else self.route.change()

    def meet(self, x: Tensor, lies_on_grid: Callable[[M, Tensor], bool] | None) -> None:
        """Watch users' hooks that are new on the route, and find out whether they have changed the tensor ``x``.

        The holder calls it with each tensor that it reads, before it asks for :attr:`module`. Without a route, or under
        ``torch.compile``, nothing is done. New hooks have run for ``x`` before they were watched: if ``x`` is off the
        grid, they all count as hooks that change tensors.

        Args:
            x: the tensor as it arrived.
            lies_on_grid: called as ``lies_on_grid(module, x)``, it says whether x lies on the module's grid; None: that
                can't be told, as in training mode, where dropout may stand between. New hooks are then watched, and
                count as changing nothing until one changes a tensor in a later call.
        """
        new = [] if self.route is None else self.route.new_hooks()
        if new and lies_on_grid is not None and self._module is not None and not lies_on_grid(self._module, x):
            for hook in new:
                hook.changes = True

    def __setstate__(self, state: Any) -> None:
        held = state[1]
        # Earlier versions held the module alone.
        self._module, self.route = held.get("_module", held.get("module")), held.get("route")

    def __repr__(self) -> str:
        return f"Reference({type(self._module).__name__})"


# A module to refer to, or a Reference to it; None: there is none.
Referred: TypeAlias = nn.Module | Reference[nn.Module] | None


def references_of(module: nn.Module) -> list[Reference[nn.Module]]:
    """Return the References, empty ones too, that a module holds as attributes or in tuples; not its children's."""
    held = (item if isinstance(item, tuple) else (item,) for item in vars(module).values())
    return [item for items in held for item in items if isinstance(item, Reference)]


class ReferringModule(nn.Module):
    """Base of modules that hold :class:`Reference` objects in the attributes that the class names in ``_references``.

    In version 0.1.0 these attributes were tuples of one module; they become References when such a pickle is loaded.
    """

    # Attributes that hold a Reference.
    _references: ClassVar[tuple[str, ...]] = ()

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name in self._references:
            if isinstance(state[name], tuple):
                state[name] = Reference(state[name][0])
        super().__setstate__(state)  # type: ignore[no-untyped-call]
