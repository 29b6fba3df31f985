"""Find the places in a model that a tensor passes between the quantizer that rounds it and what reads it.

A *place* is an attribute of a module under which a child stands. A *route* is all places and hooks on the way. A
``Reference`` from the reader to the quantizer keeps it, to find out later whether something else stands there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any

from torch import nn

from tritonq.nn.reference import ChildPlace, HookPlace, Route
from tritonq.prepare.decide.analysis import Analysis
from tritonq.prepare.record.dataflow import Call, FrameIndex, ValueIndex


class Routes:
    """Finds the places of an edited model that stand between a quantizer and its readers.

    A module that is put into one of them later, such as an adapter around a layer, may return another tensor than the
    quantizer's. A reader asks the ``Route`` for such a change, and computes in float after one.

    Args:
        analysis: the float model and its record.
        model: the edited model.
    """

    def __init__(self, analysis: Analysis, model: nn.Module) -> None:
        self._analysis, self._model = analysis, model
        self._told = [False]

    def to_reader(self, reader: nn.Module, source: nn.Module, reads: Iterable[tuple[Call, ValueIndex]]) -> Route:
        """Return the route between a module that rounds a tensor and one that reads it.

        The route is empty if one of the two is no module of the model, or if the source stands inside the reader.

        Args:
            reader: what reads.
            source: the quantizer, or a module whose output is quantized.
            reads: the recorded calls of the reader, each with the index of the value that it reads.
        """
        name, source_name = self._names.get(reader), self._names.get(source)
        if name is None or source_name is None or source_name.startswith(f"{name}."):
            return Route()
        passed = [name, source_name]
        for call, value in reads:
            passed += self._passed([call, *self._before(value)])
        return self._route(passed, name, source_name)

    def to_clip(self, layer: nn.Module, quantizer: nn.Module, ends: Iterable[Call]) -> Route:
        """Return the route between a layer and the quantizer behind the clip that alone reads the layer.

        A clip is a ReLU6, for example. The route is empty if ``layer`` or ``quantizer`` is no module of the model.

        Args:
            layer: the layer.
            quantizer: the clip's quantizer.
            ends: for each recorded call of the layer, the last call that became part of it, such as that of its
                BatchNorm, or the layer's own. The clip's call is the one that reads the result.
        """
        name, behind = self._names.get(layer), self._names.get(quantizer)
        if name is None or behind is None:
            return Route()
        passed = [name, behind]
        for call in ends:
            clip = self._analysis.follower(call)
            passed += self._passed([call] if clip is None else [call, clip])
        return self._route(passed, behind, name)

    def _route(self, passed: list[str], reader: str, source: str) -> Route:
        """Return the route by way of the modules named in ``passed``; ``reader`` and ``source`` are names, too.

        Hooks count that change what the reader, and modules around it, are given, and what the source, and modules
        around it, return.
        """
        places = tuple(self._places(dict.fromkeys(passed)))
        hooks = []
        for place in places:
            is_around_reader, is_around_source = (
                f"{inner}.".startswith(f"{place.name}.") for inner in (reader, source)
            )
            if not is_around_source:
                hooks.append(_hook_place(place.name, place.module._forward_pre_hooks))
            if not is_around_reader:
                hooks.append(_hook_place(place.name, place.module._forward_hooks))
        return Route(places, self._told, tuple(hooks))

    def _before(self, value: ValueIndex) -> Iterator[Call]:
        """Yield the calls that a value came through, last first: those that move values, and the one that made it."""
        call = self._analysis.flow.producer(value)
        while call is not None:
            yield call
            call = self._analysis.flow.producer(call.inputs[0]) if self._analysis.keeps_grid(call) else None

    def _passed(self, calls: list[Call]) -> list[str]:
        """Return the names of called modules, and of those whose forwards a tensor leaves or enters between calls."""
        stacks = [self._stack(call.frame) for call in calls]
        common = set(stacks[0]).intersection(*stacks)
        frames = dict.fromkeys(frame for stack in stacks for frame in stack if frame not in common)
        owners = [self._analysis.flow.frames[frame].owner for frame in frames]
        return [*(call.module_name for call in calls if call.module_name is not None), *owners]

    def _stack(self, frame: FrameIndex | None) -> list[FrameIndex]:
        found = []
        while frame is not None:
            found.append(frame)
            frame = self._analysis.flow.frames[frame].parent
        return found

    def _places(self, names: Iterable[str]) -> Iterator[ChildPlace]:
        """Yield the places that lead to modules from the innermost module that holds all of them."""
        paths = [name.split(".") for name in names if name]
        shared = 0
        while all(len(path) > shared + 1 and path[shared] == paths[0][shared] for path in paths):
            shared += 1
        seen = set()
        for path in paths:
            for depth in range(shared, len(path)):
                name = ".".join(path[: depth + 1])
                parent = self._modules.get(".".join(path[:depth]))
                child = None if parent is None else parent._modules.get(path[depth])
                if parent is None or child is None:
                    break
                if name not in seen:
                    seen.add(name)
                    yield ChildPlace(parent._modules, path[depth], child, name)

    @cached_property
    def _modules(self) -> dict[str, nn.Module]:
        return dict(self._model.named_modules(remove_duplicate=False))

    @cached_property
    def _names(self) -> dict[nn.Module, str]:
        """Names of modules: the first of each."""
        return {module: name for name, module in reversed(self._modules.items())}


def _hook_place(name: str, hooks: dict[int, Callable[..., Any]]) -> HookPlace:
    return HookPlace(name, hooks, frozenset(hooks))
