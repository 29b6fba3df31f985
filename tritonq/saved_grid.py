"""State dicts of quantizers tell the type of their codes, beside the tensors, so that another type can be refused."""

from __future__ import annotations

from typing import Any

from torch import nn

from tritonq.quantized_type import QuantizedType

# Under this key of what a state dict notes of a module, beside its version.
_NOTE = "tritonq.codes"


class SavesGrid(nn.Module):
    """Base class of modules with a grid, which refuse a state dict of a module with other codes.

    ``load_state_dict`` then raises RuntimeError, strict or not, and the error names both. The codes (smallest, largest,
    symmetric or not) are in the state dict's ``_metadata``, not among its keys, so that earlier versions can load it. A
    state dict that was copied as a plain dict lacks the metadata, and is loaded without a check.

    Attributes:
        qtype: type of the codes, which a subclass sets.
    """

    qtype: QuantizedType

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        notes = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if notes is not None:
            notes[_NOTE] = _codes(self.qtype)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        saved, own = local_metadata.get(_NOTE), _codes(self.qtype)
        if saved is not None and tuple(saved) != own:
            errors: list[str] = args[-1]
            errors.append(
                f"{prefix[:-1] or type(self).__name__}: saved for {_described(saved)}, loaded into a quantizer of "
                f"{_described(own)}; prepare the model with the preset that it was trained with"
            )


def _codes(qtype: QuantizedType) -> tuple[int, int, bool]:
    return qtype.quant_min, qtype.quant_max, qtype.symmetric


def _described(codes: Any) -> str:
    low, high, symmetric = codes
    return f"codes {low}..{high}, {'symmetric' if symmetric else 'affine'}"
