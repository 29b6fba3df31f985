"""Results that nothing reads: an exporter leaves out what computes them, and the quantizers behind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from tritonq.deploy.codes import Codes, Runner


def without_unread(
    codes: Codes,
    outputs: list[Tensor],
    lacking: Iterable[str],
    run: Runner,
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]],
) -> tuple[Codes, list[str]]:
    """Return the codes of a run without those that nothing reads, and the names of quantizers that lost some.

    A call's codes are unread if, with others in their place, neither an output nor the codes of another call change.
    Codes that only other unread calls' codes follow from are unread, too. A quantizer that lost all its calls is left
    out of the codes, but is among the names. The names are in the order of ``lacking``.

    Args:
        codes: of each quantizer, by its name: one tensor per call. The dict and its lists are not changed.
        outputs: of the same run.
        lacking: names of the quantizers to try, keys of ``codes``, in the order in which the model runs them.
        run: called as ``run(args, kwargs, {name: given})``, it runs the model and returns its codes and outputs.
            ``given`` holds other codes for one call of a quantizer in ``lacking``, and None for the quantizer's other
            calls, which keep their own. There are one or two runs for each call.
        arguments: of that run, positional and named.
    """
    lacking = list(lacking)
    left = {name: list(enumerate(calls)) for name, calls in codes.items()}
    names: list[str] = []
    # Backwards: what only an unread call reads is met after it.
    for name in reversed(lacking):
        for place in reversed(range(len(codes[name]))):
            others = {other: [at for at, _ in calls] for other, calls in left.items()}
            others[name].remove(place)
            if not _is_read(name, place, codes, outputs, others, run, arguments):
                left[name] = [pair for pair in left[name] if pair[0] != place]
                names += [] if name in names else [name]
    return {name: [made for _, made in calls] for name, calls in left.items() if calls}, names[::-1]


def _is_read(
    name: str,
    place: int,
    codes: Codes,
    outputs: list[Tensor],
    others: Mapping[str, list[int]],
    run: Runner,
    arguments: tuple[tuple[Any, ...], Mapping[str, Any]],
) -> bool:
    """Whether outputs or codes of some other calls follow from the codes of one call of a quantizer.

    The model runs again, up to twice, with that call's codes changed: if anything else changes, they are read.

    Args:
        name: name of the quantizer.
        place: index of its call.
        codes: codes of all quantizers in the unchanged run, one tensor per call.
        outputs: outputs of that run.
        others: for each other quantizer, by name, the indices of the calls to compare.
        run: runs the model, with given codes in place of its own.
        arguments: positional and named arguments of the model.
    """
    made = codes[name][place]
    for changed in (made + 1, made.amax() + made.amin() - made if made.numel() else made):
        given: list[Tensor | None] = [None] * len(codes[name])
        given[place] = changed
        found, results = run(arguments[0], dict(arguments[1]), {name: given})
        kept = ((codes[other][at], found[other][at]) for other, calls in others.items() for at in calls)
        if not all(torch.equal(one, two) for one, two in (*kept, *zip(outputs, results, strict=True))):
            return True
    return False
