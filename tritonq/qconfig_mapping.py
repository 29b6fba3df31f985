"""Which layer of a model gets which qconfig: by default, by type, by pattern, by name, by place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast, get_args

from torch import nn

from tritonq.near_misses import did_you_mean
from tritonq.qconfig import Folding, Islands, QConfig

# A rule that leaves layers in float holds None.
Choice = QConfig | None


class Rule(NamedTuple):
    """A qconfig for some modules.

    Attributes:
        key: in ``types`` of the mapping a class's name, ``"torch.nn.Conv2d"`` or ``"Conv2d"``; in ``patterns`` a
            regular expression, matched from the beginning of a path; in ``names`` a module's path.
        qconfig: for the modules that the key fits and, by type or name, those inside them; None leaves them in float.
    """

    key: str
    qconfig: Choice


class Place(NamedTuple):
    """The global rule of a mapping, or the one for the first layer, the last layer, or the model's inputs.

    The mapping's attribute that holds it (``global_rule``, ``first``, ``last``, ``inputs``) tells which; it is None
    where there is no such rule.

    Attributes:
        qconfig: for what the rule is about; None leaves it in float.
    """

    qconfig: Choice


@dataclass(frozen=True)
class QConfigMapping:
    """Chooses a qconfig for each layer of a model; None leaves a layer in float.

    Where several rules fit a module, the strongest wins: its name, or that of the nearest module around it; then first
    and last layer; the first pattern that fits its name; its type, or that of the nearest module around it; the global
    qconfig. Each ``set_`` method returns a new mapping: chain the calls, or keep the result. (torch.ao's change the
    mapping itself.)

    A ``qconfig`` attribute on a module of the model wins over the mapping, as it does over ``prepare_qat(qconfig=…)``.

    Attributes:
        global_rule: rule of every module that no other rule fits; None: no such rule, they stay in float.
        types: rules by class name, the full one (``"torch.nn.modules.conv.Conv2d"``) or the bare one (``"Conv2d"``).
        patterns: rules by regular expression, which has to match at the beginning of a module's path.
        names: rules by module path, such as ``"layer1.0"``.
        first: rule of the first quantizable layer that the model runs; None: no such rule.
        last: rule of the last quantizable layer that the model runs; None: no such rule.
        inputs: rule whose activation quantizer rounds the model's inputs; None: each input has the activation quantizer
            of the layer that reads it first.

    Source: torch.ao.quantization.QConfigMapping; first and last layer and inputs are tritonq's.

    Examples:
        >>> import tritonq
        >>> mapping = (
        ...     tritonq.QConfigMapping()
        ...     .set_global(tritonq.get_qconfig("tensorrt"))
        ...     .set_object_type(nn.ConvTranspose2d, None)
        ...     .set_last_layer(None)
        ... )
        >>> mapping.types
        (Rule(key='torch.nn.modules.conv.ConvTranspose2d', qconfig=None),)
    """

    global_rule: Place | None = None
    types: tuple[Rule, ...] = ()
    patterns: tuple[Rule, ...] = ()
    names: tuple[Rule, ...] = ()
    first: Place | None = None
    last: Place | None = None
    inputs: Place | None = None

    def set_global(self, global_qconfig: Choice) -> QConfigMapping:
        """Return a copy of the mapping with another qconfig for modules that no other rule fits.

        None leaves them in float.

        Raises:
            TypeError: ``global_qconfig`` is neither None nor a QConfig with factories of quantizers, or its
                ``round_summands`` is no bool.
            ValueError: it has an unknown target, folding or choice for islands.
        """
        return replace(self, global_rule=Place(_checked(global_qconfig)))

    def set_object_type(self, object_type: type[nn.Module] | str, qconfig: Choice) -> QConfigMapping:
        """Return a copy of the mapping with a qconfig for modules of exactly this class and what is inside of them.

        None leaves them in float. Subclasses do not count. A class may be given by its name, ``"torch.nn.Conv2d"`` or
        ``"Conv2d"``. Additions and concatenations follow the module in whose forward they stand. Rules for names, first
        and last layer, and patterns win over this one. Of two rules for one class, by its full and its bare name, the
        one that was set last wins.

        Raises:
            TypeError: ``object_type`` is neither a module class nor a string, or ``qconfig`` neither None nor a QConfig
                with factories of quantizers and a bool as ``round_summands``.
            ValueError: ``qconfig`` has an unknown target, folding or choice for islands.
        """
        name = type_name(object_type)
        others = tuple(rule for rule in self.types if rule.key != name)  # so that the new rule comes last
        return replace(self, types=_added(others, name, qconfig))

    def set_module_name_regex(self, module_name_regex: str, qconfig: Choice) -> QConfigMapping:
        """Return a copy of the mapping with a qconfig for modules whose path the pattern matches (``re.match``).

        None leaves them in float. A match at the beginning of the path is enough: ``"layer1"`` matches ``"layer10"``.
        Of several patterns that match, the one that was set first wins. A pattern that is set again keeps its place and
        gets the new qconfig.

        Raises:
            ValueError: not a regular expression, or ``qconfig`` has an unknown target, folding or choice for islands.
            TypeError: the pattern is no string, or ``qconfig`` is neither None nor a QConfig with factories of
                quantizers and a bool as ``round_summands``.
        """
        if not isinstance(module_name_regex, str):
            raise TypeError(f"a pattern is a string, got {module_name_regex!r}")
        try:
            re.compile(module_name_regex)
        except re.error as error:
            raise ValueError(f"{module_name_regex!r} is not a regular expression: {error}") from error
        return replace(self, patterns=_added(self.patterns, module_name_regex, qconfig))

    def set_module_name(self, module_name: str, qconfig: Choice) -> QConfigMapping:
        """Return a copy of the mapping with a qconfig for the module at a path such as ``"layer1.0"`` and all in it.

        None leaves them in float. A path that is set again gets the new qconfig.

        Raises:
            ValueError: ``module_name`` is empty or no string, or ``qconfig`` has an unknown target, folding or choice
                for islands.
            TypeError: ``qconfig`` is neither None nor a QConfig with factories of quantizers and a bool as
                ``round_summands``.
        """
        if not isinstance(module_name, str) or not module_name:
            raise ValueError(f"module_name must be a qualified name such as 'layer1.0.conv1', got {module_name!r}")
        return replace(self, names=_added(self.names, module_name, qconfig))

    def set_first_layer(self, qconfig: Choice) -> QConfigMapping:
        """Return a copy of the mapping with a qconfig for the first quantizable layer that the model runs.

        None leaves it in float.

        Raises:
            TypeError: ``qconfig`` is neither None nor a QConfig with factories of quantizers and a bool as
                ``round_summands``.
            ValueError: ``qconfig`` has an unknown target, folding or choice for islands.
        """
        return replace(self, first=Place(_checked(qconfig)))

    def set_last_layer(self, qconfig: Choice) -> QConfigMapping:
        """Return a copy of the mapping with a qconfig for the last quantizable layer that the model runs.

        None leaves it in float. This rule wins if the last layer is the first one, too.

        Raises:
            TypeError: ``qconfig`` is neither None nor a QConfig with factories of quantizers and a bool as
                ``round_summands``.
            ValueError: ``qconfig`` has an unknown target, folding or choice for islands.
        """
        return replace(self, last=Place(_checked(qconfig)))

    def set_input(self, qconfig: Choice) -> QConfigMapping:
        """Return a copy of the mapping with a qconfig for the model's inputs and what only moves their values.

        None leaves them in float, and with them the layers that read them. Without this rule an input gets the
        activation quantizer of the qconfig of the layer that reads it first, or, if that qconfig makes none, that of
        the model's qconfig.

        Raises:
            TypeError: ``qconfig`` is neither None nor a QConfig with factories of quantizers and a bool as
                ``round_summands``.
            ValueError: ``qconfig`` has an unknown target, folding or choice for islands.

        Examples:
            >>> import tritonq
            >>> four_bits = tritonq.get_qconfig("megengine_lowbit")
            >>> mapping = tritonq.QConfigMapping().set_global(four_bits).set_input(tritonq.get_qconfig())
        """
        return replace(self, inputs=Place(_checked(qconfig)))

    @property
    def needs_order(self) -> bool:
        """Whether a rule is for the first or last layer, so that :meth:`resolve` must be told which these are."""
        return self.first is not None or self.last is not None

    def qconfigs(self) -> Iterator[Choice]:
        """Yield the qconfig of every rule that is set, that of ``inputs`` too; None if the rule leaves layers in float.

        They come in the order global_rule, first, last, inputs, names, patterns, types.
        """
        places = (self.global_rule, self.first, self.last, self.inputs)
        yield from (place.qconfig for place in places if place is not None)
        yield from (rule.qconfig for rule in (*self.names, *self.patterns, *self.types))

    def resolve(self, model: nn.Module, order: tuple[str, str] | None = None) -> dict[nn.Module, Choice]:
        """Return the qconfig of every module of ``model`` by the strongest rule that fits; None leaves it in float.

        Keys are ``model`` and all modules in it; one with several paths goes by the first, but a rule by name may have
        any of them. Each value is the rule's own ``QConfig``, not a copy, or None. A ``qconfig`` attribute on a module
        does not count here: `prepare_qat` puts it in place of the rule's afterwards.

        Args:
            model: the float model.
            order: paths of the first and the last quantizable layer that it runs; None: unknown.

        Raises:
            ValueError: a rule by name, pattern or type that fits no module (the message names near misses), a mapping
                without rules, or one with a rule for the first or last layer where ``order`` is None.
        """
        if not list(self.qconfigs()):
            raise ValueError("the qconfig mapping has no rule: its set_ methods return a new mapping, keep that")
        if self.needs_order and order is None:
            raise ValueError("first and last layer are known from a run of the model: pass example_inputs")
        modules = dict(model.named_modules(remove_duplicate=False))
        self._check_rules(modules)
        ends = () if order is None else zip(order, (self.first, self.last), strict=True)
        places = {name: place for name, place in ends if place is not None}
        paths: dict[nn.Module, list[str]] = {}
        for name, module in modules.items():
            paths.setdefault(module, []).append(name)
        return {module: self._choose(own, modules, places.get(own[0])) for module, own in paths.items()}

    def _choose(self, paths: list[str], modules: dict[str, nn.Module], place: Place | None) -> Choice:
        name, names = paths[0], {rule.key: rule.qconfig for rule in self.names}
        for parent in (*paths, *(parent for path in paths for parent in _upwards(path))):
            if parent in names:
                return names[parent]
        if place is not None:
            return place.qconfig
        for rule in self.patterns:
            if re.match(rule.key, name):
                return rule.qconfig
        for parent in _upwards(name):
            fitting = [rule.qconfig for rule in self.types if _is_type(modules[parent], rule.key)]
            if fitting:
                return fitting[-1]
        return None if self.global_rule is None else self.global_rule.qconfig

    def _check_rules(self, modules: dict[str, nn.Module]) -> None:
        for rule in self.names:
            if rule.key not in modules:
                raise ValueError(f"no module is called {rule.key!r}{did_you_mean(rule.key, modules)}")
        for rule in self.patterns:
            if not any(re.match(rule.key, name) for name in modules if name):
                literal = re.sub(r"[\\^$*+?()\[\]{}|]", "", rule.key)
                raise ValueError(f"the pattern {rule.key!r} matches no module's name{did_you_mean(literal, modules)}")
        kinds = sorted({type(module).__name__ for module in modules.values()})
        for rule in self.types:
            if not any(_is_type(module, rule.key) for module in modules.values()):
                bare = rule.key.rpartition(".")[2]
                raise ValueError(f"the model has no module of type {rule.key!r}{did_you_mean(bare, kinds)}")


def type_name(kind: type[nn.Module] | str) -> str:
    """Return the full name of a class: ``"torch.nn.modules.conv.Conv2d"`` for ``nn.Conv2d`` or ``"torch.nn.Conv2d"``.

    Any other string is returned as it is, ``"Conv2d"`` too.

    Raises:
        TypeError: neither a module class nor a string.
    """
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        return f"{kind.__module__}.{kind.__qualname__}"
    if not isinstance(kind, str):
        raise TypeError(f"object_type must be a module class or its name, got {kind!r}")
    public = getattr(nn, kind.removeprefix("torch.nn."), None) if kind.startswith("torch.nn.") else None
    return type_name(public) if isinstance(public, type) and issubclass(public, nn.Module) else kind


def _is_type(module: nn.Module, name: str) -> bool:
    kind = getattr(type(module), "stands_for", type(module))
    return name in (kind.__name__, kind.__qualname__, f"{kind.__module__}.{kind.__qualname__}")


def _checked(qconfig: Any) -> Choice:
    if qconfig is not None:
        check_qconfig(qconfig, "a qconfig")
    return cast(Choice, qconfig)


def _added(rules: tuple[Rule, ...], key: str, qconfig: Choice) -> tuple[Rule, ...]:
    """Return ``rules`` with one more. One with the same key is replaced at its place, as in a dict."""
    return tuple(Rule(*item) for item in {**dict(rules), key: _checked(qconfig)}.items())


def _upwards(name: str) -> Iterator[str]:
    """Yield a module's path and those of the modules around it: "a.b.c", "a.b", "a", ""."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield ""


def check_qconfig(found: object, where: str, expected: str = "a QConfig or None") -> None:
    """Check that what a user gave is a QConfig with factories of quantizers and known options.

    Args:
        found: what was given.
        where: what the error's text calls it, such as the name of an argument.
        expected: what the error's text says was expected. It may name None, which callers handle first.

    Raises:
        TypeError: it is something else, None too; a factory is a module or cannot be called; or ``round_summands`` is
            no bool.
        ValueError: an unknown target, folding or choice for islands.
    """
    if not isinstance(found, QConfig):
        raise TypeError(f"{where} must be {expected}, got {describe_wrong_qconfig(found)}")
    for side in ("activation", "weight"):
        factory = getattr(found, side)
        if isinstance(factory, nn.Module):
            name = type(factory).__qualname__
            raise TypeError(f"{side} in {where} is one {name}, and each layer needs its own: give {name}.with_args()")
        if not callable(factory):
            instead = f"got {factory!r}; torch.nn.Identity leaves that side in float"
            raise TypeError(f"{side} in {where} must be a factory of quantizers, {instead}")
    found.find_target()
    for name, known in (("folding", Folding), ("islands", Islands)):
        value = getattr(found, name)
        if value is not None and value not in get_args(known):
            raise ValueError(f"unknown {name} {value!r} in {where}; known: None, {', '.join(get_args(known))}")
    if not isinstance(found.round_summands, bool):
        raise TypeError(f"round_summands in {where} must be a bool, got {found.round_summands!r}")


def describe_wrong_qconfig(found: object) -> str:
    """Return what was given instead of a QConfig, in words for an error's text.

    Another library's QConfig and a string come with advice; else it is ``"None"`` or the name of the class of
    ``found``, such as ``"dict"``.
    """
    kind = type(found)
    if kind.__name__ == "QConfig":
        advice = "use tritonq.get_default_qat_qconfig for the same numbers, or tritonq.QConfig"
        return f"{kind.__module__}.QConfig, which makes that library's quantizers: {advice}"
    if isinstance(found, str):
        return f"the string {found!r}: tritonq.get_qconfig({found!r}) gives a preset's"
    return "None" if found is None else kind.__qualname__
