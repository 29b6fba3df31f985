"""torch.ao's QConfigMapping, whose methods change the mapping itself, and the mappings of its engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from tritonq import qconfig_mapping
from tritonq.qconfig import QConfig, get_default_qat_qconfig
from tritonq.torch_ao.defaults import get_default_qconfig

if TYPE_CHECKING:
    from typing import Self

Choice = QConfig | None


class QConfigMapping(qconfig_mapping.QConfigMapping):
    """:class:`tritonq.QConfigMapping` whose ``set_`` methods change the mapping itself and return it, as torch.ao's do.

    Where several rules fit a module, the strongest wins: its name, or that of the nearest module around it; first and
    last layer; of the patterns that match its name, the one set first; its type, or that of the nearest module around
    it; the global qconfig. Unlike in torch.ao, ``prepare_qat`` raises ValueError for a rule that fits no module. Each
    ``set_`` method raises TypeError for a qconfig that is neither None nor a QConfig with two factories of quantizers,
    and ValueError for one with an unknown option.

    Source: torch.ao.quantization.QConfigMapping.

    Examples:
        >>> import tritonq
        >>> mapping = QConfigMapping()
        >>> _ = mapping.set_global(tritonq.get_default_qat_qconfig("x86"))
        >>> mapping.set_module_name("head", None).names
        (Rule(key='head', qconfig=None),)
    """

    __hash__ = None  # type: ignore[assignment]  # it changes

    def _become(self, changed: qconfig_mapping.QConfigMapping) -> Self:
        vars(self).update(vars(changed))
        return self

    @classmethod
    def from_dict(cls, qconfig_dict: Mapping[str, Any]) -> Self:
        """Return the mapping that a dict of torch.ao's older form describes.

        Args:
            qconfig_dict: ``""`` to the qconfig of all other modules; ``"object_type"``, ``"module_name_regex"`` and
                ``"module_name"`` to lists of pairs: a class, pattern or path and its qconfig. None as a qconfig leaves
                its modules in float, and a missing ``""`` all other modules.

        Raises:
            ValueError: another key in ``qconfig_dict``, a path that is empty or no string, a pattern that is no regular
                expression, or a qconfig with an unknown option.
            TypeError: a qconfig that is neither None nor a QConfig, a type that is neither a module class nor a string,
                or a pattern that is no string.

        Source: torch.ao.quantization.QConfigMapping.from_dict.

        Examples:
            >>> mapping = QConfigMapping.from_dict({"": None, "module_name": [("head", None)]})
            >>> [rule.key for rule in mapping.names]
            ['head']
        """
        mapping = cls()
        setters = {
            "object_type": mapping.set_object_type,
            "module_name_regex": mapping.set_module_name_regex,
            "module_name": mapping.set_module_name,
        }
        unknown = [key for key in qconfig_dict if key not in ("", *setters)]
        if unknown:
            raise ValueError(
                f"no counterpart of {', '.join(map(repr, unknown))} in a dict of qconfigs; known: '', "
                + ", ".join(map(repr, setters))
            )
        if "" in qconfig_dict:
            mapping.set_global(qconfig_dict[""])
        for name, set_rule in setters.items():
            for key, qconfig in qconfig_dict.get(name, ()):
                set_rule(key, qconfig)
        return mapping

    def set_global(self, global_qconfig: Choice) -> Self:
        """Set the qconfig of modules that no other rule fits, in place, and return the mapping itself.

        None leaves them in float.
        """
        return self._become(super().set_global(global_qconfig))

    def set_object_type(self, object_type: type[nn.Module] | str, qconfig: Choice) -> Self:
        """Set the qconfig of modules of exactly this class, and of what is inside of them, in place.

        Return the mapping itself. The class may be given by its name, such as ``"torch.nn.Conv2d"``. None leaves them
        in float.

        Raises:
            TypeError: ``object_type`` is neither a module class nor a string.
        """
        return self._become(super().set_object_type(object_type, qconfig))

    def set_module_name_regex(self, module_name_regex: str, qconfig: Choice) -> Self:
        """Set the qconfig of modules whose path the pattern matches (``re.match``), in place.

        Return the mapping itself. None leaves these modules in float.

        Raises:
            ValueError: the pattern is no regular expression.
            TypeError: it is no string.
        """
        return self._become(super().set_module_name_regex(module_name_regex, qconfig))

    def set_module_name(self, module_name: str, qconfig: Choice) -> Self:
        """Set the qconfig of the module at a path such as ``"layer1.0"``, and of what is inside of it, in place.

        Return the mapping itself. None leaves these modules in float. A rule with the same path is replaced.

        Raises:
            ValueError: ``module_name`` is empty or no string, or ``qconfig`` has an unknown option.
            TypeError: ``qconfig`` is neither None nor a QConfig with two factories of quantizers.
        """
        return self._become(super().set_module_name(module_name, qconfig))

    def set_first_layer(self, qconfig: Choice) -> Self:
        """Set the qconfig of the first quantizable layer that runs, in place; return the mapping itself.

        None leaves it in float.
        """
        return self._become(super().set_first_layer(qconfig))

    def set_last_layer(self, qconfig: Choice) -> Self:
        """Set the qconfig of the last quantizable layer that runs, in place; return the mapping itself.

        None leaves it in float. This rule wins if the last layer is the first one, too.
        """
        return self._become(super().set_last_layer(qconfig))

    def set_input(self, qconfig: Choice) -> Self:
        """Set the qconfig of the model's inputs, in place; return the mapping itself.

        None leaves them in float, and with them the layers that read them. Without this rule an input gets the
        activation quantizer of the layer that reads it first.
        """
        return self._become(super().set_input(qconfig))

    def __setattr__(self, name: str, value: Any) -> None:
        """Raise an error: rules are set by the ``set_`` methods alone."""
        raise AttributeError(f"{name!r} is set by a method of the mapping")


def get_default_qat_qconfig_mapping(backend: str = "x86", version: int = 1) -> QConfigMapping:
    """Return torch.ao's mapping for QAT on an engine: one qconfig for all, :func:`tritonq.get_default_qat_qconfig`'s.

    Args:
        backend: ``"fbgemm"``, ``"x86"``, ``"qnnpack"`` or ``"onednn"``.
        version: how ranges become scales: 0, by the arithmetic of torch.ao's observers; 1, by that of torch's fused
            fake-quantize operator.

    Raises:
        ValueError: an unknown backend or version.

    Source: torch.ao.quantization.get_default_qat_qconfig_mapping, without its rules for functions of fixed range.

    Examples:
        >>> get_default_qat_qconfig_mapping("qnnpack").global_rule.qconfig.target
        'qnnpack'
    """
    return QConfigMapping().set_global(get_default_qat_qconfig(backend, version))


def get_default_qconfig_mapping(backend: str = "x86", version: int = 0) -> QConfigMapping:
    """Return torch.ao's mapping for quantization after training: one qconfig for all, :func:`get_default_qconfig`'s.

    It calibrates a histogram of each activation and the ranges of weights.

    Args:
        backend: ``"fbgemm"``, ``"x86"``, ``"qnnpack"`` or ``"onednn"``.
        version: 0.

    Raises:
        ValueError: an unknown backend or version.

    Source: torch.ao.quantization.get_default_qconfig_mapping, without its rules for functions of fixed range.

    Examples:
        >>> get_default_qconfig_mapping("x86").global_rule.qconfig.target
        'x86'
    """
    return QConfigMapping().set_global(get_default_qconfig(backend, version))
