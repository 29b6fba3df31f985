"""What stands in the place of a QConfig: is it one, and does it hold factories?"""

from __future__ import annotations

from torch import nn

from tritonq.qconfig import QConfig


def check_qconfig(found: object, where: str, expected: str = "a QConfig or None") -> None:
    """Check a QConfig that a user gave; None is not one.

    Args:
        found: what was given.
        where: what it was given as, for the error's text.
        expected: what may stand there.

    Raises:
        TypeError: it is something else, or what should make its quantizers does not.
    """
    if not isinstance(found, QConfig):
        raise TypeError(f"{where} must be {expected}, got {describe_wrong_qconfig(found)}")
    for side in ("activation", "weight"):
        factory = getattr(found, side)
        if isinstance(factory, nn.Module):
            name = type(factory).__qualname__
            raise TypeError(
                f"{side} in {where} is one {name}, and each layer needs its own: give {name}.with_args(...)"
            )
        if not callable(factory):
            raise TypeError(
                f"{side} in {where} must be a factory of quantizers, such as FakeQuantize.with_args(...), got "
                f"{factory!r}; torch.nn.Identity leaves that side in float"
            )


def describe_wrong_qconfig(found: object) -> str:
    """Say what was found in the place of a QConfig, for an error's text."""
    kind = type(found)
    if kind.__name__ == "QConfig":
        return (
            f"{kind.__module__}.QConfig, which makes that library's quantizers: use tritonq.get_default_qat_qconfig "
            "for the same numbers, or tritonq.QConfig"
        )
    if isinstance(found, str):
        return f"the string {found!r}: tritonq.get_qconfig({found!r}) gives a preset's"
    return "None" if found is None else kind.__qualname__
