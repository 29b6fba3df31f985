"""Modules that were put into a prepared model, or in the place of one of its modules, after preparation.

A prepared model keeps two attributes: its *report*, a ``LayerRecord`` (name, class, status, reason and more) for each
layer of the float model, and the class of each of its modules by name. What is new is found by comparing these with the
modules that are there now. A *row* is a record.
"""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import nn

from tritonq.fake_quantize_base import FakeQuantizeBase
from tritonq.nn.folded import FoldedBatchNorm
from tritonq.nn.original_class import original_class
from tritonq.nn.reference import references_of
from tritonq.observers import ObserverBase
from tritonq.prepare.decide.layer_records import WITHOUT_COMPUTATION, LayerRecord, part_of_module
from tritonq.prepare.record.operations import is_leaf

# The attributes of a prepared model: what became of each layer, and the class of each module by its name.
REPORT, _CLASSES = "tritonq_report", "_tritonq_classes"
# Why a module is in float that `prepare_qat` has not seen.
ADDED = "it was put into the model after prepare_qat"
# How the reason ends of what had become part of a layer that is gone.
_LOST = ", which is gone: it does nothing now"
_NAMES_SHOWN = 5


def note_report(model: nn.Module, records: tuple[LayerRecord, ...]) -> None:
    """Keep ``records`` as a model's report, and the class of each of its modules by name, in attributes of it."""
    vars(model)[REPORT] = records
    vars(model)[_CLASSES] = {name: _class_name(original_class(module)) for name, module in model.named_modules()}


def report_of(model: nn.Module) -> tuple[LayerRecord, ...] | None:
    """Return the records of what became of each layer of a model, as it is now; None if no module of it has a report.

    Layers that moved, into an adapter around them, have their present names. Added layers have rows of status "float".
    A prepared model that became part of ``model``, such as one with adapters, is found in it.
    """
    holders = [(name, module) for name, module in model.named_modules() if REPORT in vars(module)]
    if not holders:
        return None
    return tuple(_renamed(record, prefix) for prefix, holder in holders for record in _present_records(holder))


def take_report(model: nn.Module) -> tuple[LayerRecord, ...] | None:
    """Return the records of what became of each layer of a model, and delete them and the noted classes from it.

    None if no module of the model has a report (:func:`report_of`).
    """
    records = report_of(model)
    for module in model.modules():
        vars(module).pop(REPORT, None)
        vars(module).pop(_CLASSES, None)
    return records


def warn_of_changes(model: nn.Module, stacklevel: int = 1) -> None:
    """Warn (UserWarning) of layers that were put into a prepared model and so stay in float, if there are any.

    The warning also names what had become part of layers that are gone, so that nothing computes it now. Layers and
    joins that read the results of the new ones compute in float, and one of them warns of that when it runs, once per
    model. After the warning of this function none of them does.

    Args:
        model: the prepared model.
        stacklevel: which line the warning names: 1 is the one that calls this function, 2 the one that calls its
            caller.
    """
    records = report_of(model) or ()
    added = [record.name for record in records if record.reason == ADDED]
    lost = [record.name for record in records if record.reason.endswith(_LOST)]
    if not added:
        return
    text = (
        f"{len(added)} modules were put into the model after prepare_qat ({_listed(added)}): they stay in float, and "
        "what reads their results computes in float"
    )
    if lost:
        text += f". {_listed(lost)} had become part of layers that are gone, and nothing does their work now"
    warnings.warn(f"{text}. tritonq.summary lists them", stacklevel=stacklevel + 1)
    silence_references(model)


def silence_references(model: nn.Module) -> None:
    """Keep the layers and joins of a model from warning that what they read comes from a module put into the model.

    A layer or join that finds such a module between itself and the quantizer of its input computes in float, and warns
    once per model. That warning counts as given: call this after telling the user which modules were put in.
    """
    for reference in (reference for module in model.modules() for reference in references_of(module)):
        if reference.route is not None:
            reference.route.told[0] = True


def _present_records(holder: nn.Module) -> list[LayerRecord]:
    """Return the records of a prepared model, by the names that its layers have now, with rows for added ones."""
    noted: Mapping[str, str] = vars(holder).get(_CLASSES, {})
    records: tuple[LayerRecord, ...] = vars(holder)[REPORT]
    present = dict(holder.named_modules())
    moved = {name: _moved_to(name, noted, present) for name in _replaced(noted, present)}
    if not noted or (not moved and len(present) == len(noted)):
        return list(records)
    added = _added({_present_name(name, moved) for name in noted}, present)
    found: list[LayerRecord] = []
    for record in records:
        place = next((name for name in moved if _is_in(record.name, name)), None)
        if place is not None:
            found += [row for row in added if _is_in(row.name, place)]
            added = [row for row in added if row not in found]
        now = _present_name(record.name, moved)
        if now is not None:
            found.append(_without_lost(replace(record, name=now), moved, present.get(now)))
    return [*found, *added]


def _added(known: Container[str | None], present: Mapping[str, nn.Module]) -> list[LayerRecord]:
    """Return rows for the layers in ``present`` whose names are not ``known``, except parts of other such layers.

    Their status is "float". Modules without computation, dropout, quantizers and observers get none.
    """
    found: list[LayerRecord] = []
    for name, module in present.items():
        is_inside = bool(found) and _is_in(name, found[-1].name)
        if name not in known and not is_inside and is_leaf(module) and not isinstance(module, _SILENT):
            found.append(LayerRecord(name, type(module).__name__, (), "float", ADDED, part_of_module(module)))
    return found


_SILENT = (*WITHOUT_COMPUTATION, nn.Dropout, FakeQuantizeBase, ObserverBase)


def _without_lost(record: LayerRecord, moved: Mapping[str, str | None], module: nn.Module | None) -> LayerRecord:
    """Return a record with its present names; as in float if it had become part of a layer that is gone.

    ``moved`` has the present name of what stood at each replaced place (None: it is gone); ``module`` is what stands
    under the record's name now.
    """
    partners = {partner: _present_name(partner, moved) for partner in record.fused_with}
    left = tuple(now for now in partners.values() if now is not None)
    if left or not partners or not isinstance(module, (FoldedBatchNorm, nn.Identity)):
        return replace(record, fused_with=left)
    return replace(record, fused_with=(), status="float", reason=f"it had become part of {record.fused_with[0]}{_LOST}")


def _replaced(noted: Mapping[str, str], present: Mapping[str, nn.Module]) -> Iterator[str]:
    """Yield the names of places where another module stands than was noted, or none; outermost only."""
    outer: list[str] = []
    for name, kind in noted.items():
        if any(name.startswith(f"{place}.") for place in outer):
            continue
        module = present.get(name)
        if module is None or not _is_of(module, kind):
            outer.append(name)
            yield name


def _moved_to(name: str, noted: Mapping[str, str], present: Mapping[str, nn.Module]) -> str | None:
    """Return the present name of the module that was noted as ``name``; it has moved inside of what stands there.

    It is the one with its class; None if there is none. ``noted`` has the noted classes by name, ``present`` the
    modules.
    """
    inside = [
        other
        for other, module in present.items()
        if _is_in(other, name) and _is_of(module, noted[name]) and other not in noted
    ]
    return min(inside, key=len) if inside else None


def _present_name(name: str, replaced: Mapping[str, str | None]) -> str | None:
    """Return the present name of what was noted under a name; None where it is gone."""
    for place, now in replaced.items():
        if _is_in(name, place):
            return None if now is None else now + name[len(place) :]
    return name


def _is_in(name: str, place: str) -> bool:
    """Whether a name is that of a place, or of something inside of it."""
    return f"{name}.".startswith(f"{place}.")


def _renamed(record: LayerRecord, prefix: str) -> LayerRecord:
    if not prefix:
        return record
    partners = tuple(f"{prefix}.{partner}" for partner in record.fused_with)
    return replace(record, name=f"{prefix}.{record.name}", fused_with=partners)


def _is_of(module: nn.Module, kind: str) -> bool:
    """Whether a module is of a class, by its name, or of one that derives from it, as parametrizations make them."""
    return any(_class_name(base) == kind for base in original_class(module).__mro__)


def _class_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")
