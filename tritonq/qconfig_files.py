"""Qconfig mappings in JSON files: presets by name, and factories of tritonq's classes; nothing else is read or run."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from tritonq import learned_bits, learned_fake_quantize, observers, paper_schemes
from tritonq.factory import Factory
from tritonq.fake_quantize import FakeQuantize
from tritonq.fixed_point_fake_quantize import FixedPointFakeQuantize
from tritonq.float_fake_quantize import FloatFakeQuantize
from tritonq.near_misses import did_you_mean
from tritonq.qconfig import (
    PRESETS,
    TORCH_BACKENDS,
    Folding,
    Islands,
    QConfig,
    get_default_qat_qconfig,
    observe_only,
)
from tritonq.qconfig_mapping import Choice, Place, QConfigMapping, Rule
from tritonq.quantized_type import QuantizedType
from tritonq.targets import find_target

FORMAT = "tritonq.qconfig_mapping"
VERSION = 1

# What a file may name as a factory.
_MAKERS: dict[str, Callable[..., Any]] = {
    maker.__name__: maker
    for maker in (
        FakeQuantize,
        FixedPointFakeQuantize,
        FloatFakeQuantize,
        *(learned_fake_quantize.LearnedStepFakeQuantize, learned_fake_quantize.TrainedThresholdFakeQuantize),
        learned_fake_quantize.ClippedFakeQuantize,
        *(getattr(observers, name) for name in observers.__all__ if name.endswith("Observer")),
        *(paper_schemes.BinaryWeight, paper_schemes.TernaryWeight, learned_bits.LearnedBitsFakeQuantize),
        *(paper_schemes.DoReFaWeight, paper_schemes.DoReFaActivation),
        observe_only,
        nn.Identity,
    )
}
_FACTORIES = ("activation", "weight")
# The other fields of a qconfig, and what they are where a file does not say.
_OPTIONS = QConfig._field_defaults
_DTYPES = {str(value): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_QSCHEMES = {
    str(value): value
    for value in (
        *(torch.per_tensor_affine, torch.per_tensor_symmetric),
        *(torch.per_channel_affine, torch.per_channel_symmetric),
    )
}


def save_qconfig_mapping(mapping: QConfigMapping, path: str | os.PathLike[str]) -> None:
    """Write a mapping as JSON; a file that is there already is replaced.

    A qconfig that equals a preset is written by its name. Any other is written as its two factories with their
    arguments, and its options (target, folding, ...) that are not the default.

    Raises:
        TypeError: ``mapping`` is no QConfigMapping.
        ValueError: a qconfig that JSON can't hold: a factory that is neither ``nn.Identity`` nor a class of tritonq's
            (with or without ``with_args``), or an argument that is no plain value, dtype, qscheme, QuantizedType or
            such a class; the message says which.
        OSError: the file can't be written.

    Examples:
        >>> import tempfile, tritonq
        >>> mapping = tritonq.QConfigMapping().set_global(tritonq.get_qconfig("tensorrt")).set_last_layer(None)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_qconfig_mapping(mapping, f"{folder}/mapping.json")
        ...     load_qconfig_mapping(f"{folder}/mapping.json") == mapping
        True
    """
    if not isinstance(mapping, QConfigMapping):
        raise TypeError(f"mapping must be a QConfigMapping, got {type(mapping).__qualname__}")
    text = json.dumps(mapping_to_data(mapping), indent=2, allow_nan=False)
    Path(path).write_text(text + "\n")


def load_qconfig_mapping(path: str | os.PathLike[str]) -> QConfigMapping:
    """Read a file of :func:`save_qconfig_mapping`, or one written by hand with such fields; return the mapping.

    In the example, ``last`` holds the rule for the last layer: its qconfig None leaves that layer in float.

    Raises:
        ValueError: not such a file, another version, an unknown preset, class or field, or a value that one does not
            take; the message says where.
        OSError: the file can't be read.

    Examples:
        >>> import pathlib, tempfile, tritonq
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "mapping.json")
        ...     tritonq.save_qconfig_mapping(tritonq.QConfigMapping().set_last_layer(None), path)
        ...     load_qconfig_mapping(path).last
        Place(qconfig=None)
    """
    try:
        data = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} is not JSON: {error}") from error
    try:
        return mapping_from_data(data)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from error


def mapping_to_data(mapping: QConfigMapping) -> dict[str, Any]:
    """Return ``mapping`` as dicts, lists, strings and numbers that JSON can hold.

    The dict has ``"format"`` and ``"version"``; a qconfig each under ``"global"``, ``"first"``, ``"last"`` and
    ``"inputs"``, as far as there is such a rule; and lists of ``[key, qconfig]`` under ``"types"``, ``"patterns"`` and
    ``"names"``; such a list is empty without rules. Keys are strings; that of a type is its class's full name
    (``"torch.nn.modules.conv.Conv2d"``), or the bare one that was given (``"Conv2d"``). A qconfig is None, ``{"preset":
    name}`` (with ``"version"`` for one of torch.ao's backends), or a dict with ``"activation"``, ``"weight"`` and the
    options that are not the default. The first two are factories: ``{"class": name}``, with ``"arguments"``, a dict of
    values by name, for one of ``with_args``.

    Raises:
        ValueError: a qconfig with a factory or an argument that JSON can't hold; the message says which.
    """
    data: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    for field in _KEYS:
        place: Place | None = getattr(mapping, field)
        if place is not None:
            data[_KEYS[field]] = _qconfig_to_data(place.qconfig, _KEYS[field])
    for field in ("types", "patterns", "names"):
        rules: tuple[Rule, ...] = getattr(mapping, field)
        data[field] = [[rule.key, _qconfig_to_data(rule.qconfig, f"{field} {rule.key!r}")] for rule in rules]
    return data


def mapping_from_data(data: Any) -> QConfigMapping:
    """Return the mapping that :func:`mapping_to_data` turned into ``data``.

    Raises:
        ValueError: not such data, another version, an unknown preset, class or field, or a value that one does not
            take; the message says where.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ValueError(f"not a qconfig mapping: it has no format {FORMAT!r}")
    version = data.get("version")
    if version != VERSION:
        raise ValueError(f"it has version {version!r}; this tritonq reads version {VERSION}")
    known = {"format", "version", *_KEYS.values(), *_SETTERS}
    unknown = [key for key in data if key not in known]
    if unknown:
        raise ValueError(f"unknown field {unknown[0]!r}; known: {', '.join(sorted(known))}")
    mapping = QConfigMapping()
    for field, key in _KEYS.items():
        if key in data:
            place: Any = Place(_qconfig_from_data(data[key], key))
            mapping = dataclasses.replace(mapping, **{field: place})
    for field, setter in _SETTERS.items():
        entries = data.get(field, [])
        if not isinstance(entries, list):
            raise ValueError(f"{field} must be a list of [key, qconfig], got {entries!r}")
        for entry in entries:
            if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
                raise ValueError(f"{field} must hold [key, qconfig], got {entry!r}")
            mapping = setter(mapping, entry[0], _qconfig_from_data(entry[1], f"{field} {entry[0]!r}"))
    return mapping


_KEYS = {"global_rule": "global", "first": "first", "last": "last", "inputs": "inputs"}
_SETTERS: dict[str, Callable[[QConfigMapping, str, Choice], QConfigMapping]] = {
    "types": QConfigMapping.set_object_type,
    "patterns": QConfigMapping.set_module_name_regex,
    "names": QConfigMapping.set_module_name,
}


def _qconfig_to_data(qconfig: Choice, where: str) -> Any:
    if qconfig is None:
        return None
    for name, preset in PRESETS.items():
        if qconfig == preset:
            return {"preset": name}
    for name in TORCH_BACKENDS:
        for version in (0, 1):
            if qconfig == get_default_qat_qconfig(name, version):
                return {"preset": name, "version": version}
    data = {field: _value_to_data(getattr(qconfig, field), f"{field} of {where}") for field in _FACTORIES}
    return data | {field: getattr(qconfig, field) for field in _OPTIONS if getattr(qconfig, field) != _OPTIONS[field]}


def _qconfig_from_data(data: Any, where: str) -> Choice:
    if data is None:
        return None
    if not isinstance(data, dict):
        raise ValueError(f"{where} must be null, a preset or a pair of factories, got {data!r}")
    if "preset" in data:
        return _preset(data, where)
    if sorted({*data} - {*_OPTIONS}) != sorted(_FACTORIES):
        raise ValueError(f"{where} must have the fields {' and '.join(_FACTORIES)}, got {sorted(data)}")
    options = {field: data[field] for field in _OPTIONS if field in data}
    try:
        find_target(options.get("target"))
    except (TypeError, ValueError) as error:
        raise ValueError(f"the target of {where} is none: {error}") from error
    if not isinstance(options.get("round_summands", True), bool):
        raise ValueError(f"round_summands of {where} must be true or false, got {options['round_summands']!r}")
    for field, kind in (("folding", Folding), ("islands", Islands)):
        known = get_args(kind)
        if options.get(field) not in (None, *known):
            raise ValueError(f"{field} of {where} must be null or one of {', '.join(known)}, got {options[field]!r}")
    factories = {field: _value_from_data(data[field], f"{field} of {where}") for field in _FACTORIES}
    for field, factory in factories.items():
        if not callable(factory):
            raise ValueError(f"{field} of {where} must name a class, got {data[field]!r}")
        try:
            made = factory()
        except Exception as error:  # whatever a constructor says about its arguments
            raise ValueError(f"{field} of {where} can't be made: {error}") from error
        if not isinstance(made, nn.Module) or isinstance(made, observers.ObserverBase):
            raise ValueError(f"{field} of {where} must make a fake quantizer, got {type(made).__name__}")
    return QConfig(**factories, **options)


def _preset(data: dict[str, Any], where: str) -> QConfig:
    name, rest = str(data["preset"]), {key: value for key, value in data.items() if key != "preset"}
    if name in PRESETS and not rest:
        return PRESETS[name]
    if name in TORCH_BACKENDS and set(rest) <= {"version"} and rest.get("version", 1) in (0, 1):
        return get_default_qat_qconfig(name, **rest)
    known = ", ".join((*PRESETS, *(f"{backend} (version 0 or 1)" for backend in TORCH_BACKENDS)))
    near = did_you_mean(name, (*PRESETS, *TORCH_BACKENDS))
    raise ValueError(f"{where} names an unknown preset {data!r}; known: {known}{near}")


def _value_to_data(value: Any, where: str) -> Any:
    """Return an argument or factory of a qconfig as data for JSON; ``where`` names it in the error's text.

    Plain values stay as they are. Others become ``{"dtype": name}``, ``{"qscheme": name}``, ``{"quantized_type":
    fields}``, ``{"class": name}``, or for a factory ``{"class": name, "arguments": …}``.

    Raises:
        ValueError: it is neither a plain value, a type, nor a class of tritonq (with arguments fixed by ``with_args``).
    """
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, torch.dtype):
        return {"dtype": str(value)}
    if isinstance(value, torch.qscheme) and str(value) in _QSCHEMES:
        return {"qscheme": str(value)}
    if isinstance(value, QuantizedType):
        return {"quantized_type": value.to_data()}
    make, arguments = (value.make, value.arguments) if isinstance(value, Factory) else (value, {})
    name = getattr(make, "__name__", None)
    if name is None or _MAKERS.get(name) is not make:
        raise ValueError(
            f"{where} can't be saved: {value!r} is neither plain data nor a class of tritonq's with arguments fixed "
            "by with_args"
        )
    data: dict[str, Any] = {"class": name}
    if isinstance(value, Factory):
        data["arguments"] = {key: _value_to_data(item, f"{key} of {where}") for key, item in arguments.items()}
    return data


def _value_from_data(data: Any, where: str) -> Any:
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    if isinstance(data, dict) and set(data) in ({"class"}, {"class", "arguments"}):
        return _factory(data, where)
    if isinstance(data, dict) and len(data) == 1:
        ((kind, value),) = data.items()
        if kind in ("dtype", "qscheme"):
            table: dict[str, Any] = _DTYPES if kind == "dtype" else _QSCHEMES
            if not isinstance(value, str) or value not in table:
                raise ValueError(f"{where} names an unknown {kind} {value!r}; known: {', '.join(table)}")
            return table[value]
        if kind == "quantized_type" and isinstance(value, dict):
            try:
                return QuantizedType(**value)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{where} holds no quantized type: {error}") from error
    raise ValueError(f"{where} holds {data!r}, which is no argument that a qconfig takes")


def _factory(data: dict[str, Any], where: str) -> Any:
    name, arguments = data["class"], data.get("arguments")
    if not isinstance(name, str) or name not in _MAKERS:
        raise ValueError(f"{where} names an unknown class {name!r}; known: {', '.join(sorted(_MAKERS))}")
    if arguments is None:
        return _MAKERS[name]
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of {where} must be an object, got {arguments!r}")
    values = {key: _value_from_data(item, f"{key} of {where}") for key, item in arguments.items()}
    return Factory(_MAKERS[name], _with_rounding_in_type(_MAKERS[name], values))


def _with_rounding_in_type(make: Callable[..., Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """Move the argument ``rounding`` of a factory into the type in its argument ``dtype``; return the new arguments.

    Without the argument it is the rounding that the class ``make`` fixes, if it does. Files of version 0.1.0 hold types
    whose own rounding did not count.
    """
    qtype = arguments.get("dtype")
    rounding = arguments.get("rounding", getattr(make, "rounding", None))
    if not isinstance(qtype, QuantizedType) or rounding is None:
        return arguments
    rest = {key: value for key, value in arguments.items() if key != "rounding"}
    return {**rest, "dtype": dataclasses.replace(qtype, rounding=rounding)}
