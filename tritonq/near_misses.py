"""Suggest known words for a mistyped one, as the end of an error message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'a' or 'b'?"`` with up to three known words most like ``word``; "" if none is like it.

    A known word is like it if difflib's ratio of both is at least 0.5, or if it contains ``word``; without regard to
    leading dashes, which the result keeps.

    Examples:
        >>> did_you_mean("tensort", ["onnxruntime", "tensorrt"])
        "; did you mean 'tensorrt'?"
    """
    # The dashes of options, which all share, say nothing about likeness.
    words, word = {each.lstrip("-"): each for each in known if each.strip("-")}, word.lstrip("-")
    near = difflib.get_close_matches(word, words, n=3, cutoff=0.5)
    near += [each for each in words if word and word in each and each not in near][: 3 - len(near)]
    return f"; did you mean {' or '.join(repr(words[each]) for each in near)}?" if near else ""
