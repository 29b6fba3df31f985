"""Resolve references in docstrings: to the page of a public name, or to nothing where the name is internal.

Docstrings name things by the module that defines them (``tritonq.observers.base.ObserverBase``), the pages by their
public name (``tritonq.observers.ObserverBase``). An internal name, which has no page, is shown as code. A name that
does not exist stays unresolved, and Sphinx reports it.
"""

from __future__ import annotations

import importlib
import re
import sys
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import tritonq
import tritonq.observers

_PUBLIC = {
    id(getattr(package, name)): f"{package.__name__}.{name}"
    for package in (tritonq.observers, tritonq.nn, tritonq)
    for name in package.__all__
}


def resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, contnode: nodes.Element) -> nodes.Element | None:
    """Return the reference to what ``node`` names, its text if that has no page, or None if there is no such thing."""
    if node.get("refdomain") != "py":
        return None
    for scope in _scopes(node):
        found, target = _find(f"{scope}.{node['reftarget']}" if scope else node["reftarget"])
        if found:
            name = _PUBLIC.get(id(target))
            domain = env.get_domain("py")
            page = name and domain.resolve_xref(env, node["refdoc"], app.builder, "obj", name, node, contnode)
            return page or contnode
    return contnode if _is_annotation_of_some_module(node["reftarget"]) else None


def _is_annotation_of_some_module(name: str) -> bool:
    """Whether a module of tritonq defines ``name``: signatures name types (``Folding``) without their module."""
    loaded = [module for path, module in list(sys.modules.items()) if path.startswith("tritonq.")]
    return any(name in vars(module) for module in loaded)


def link_pages(app: Sphinx, what: str, name: str, described: object, options: object, lines: list[str]) -> None:
    """Turn the pages that a docstring cites, such as ``docs/numbers.md, "Histograms"``, into links."""
    lines[:] = [re.sub(r"docs/([\w-]+)\.md", r":doc:`/\1`", line) for line in lines]


def _scopes(node: pending_xref) -> list[str]:
    """Return prefixes that make a name complete: none, the described class or module, and the module of the class."""
    module, described = node.get("py:module"), node.get("py:class")
    scopes = ["", *([f"{module}.{described}"] if described else []), module or "tritonq"]
    found, target = _find(f"{module}.{described}")
    return [*scopes, *([target.__module__] if described and found else [])]


def _find(path: str) -> tuple[bool, Any]:
    """Return whether a dotted path names something in tritonq, and what."""
    parts = path.split(".")
    if parts[0] != "tritonq":
        return False, None
    for cut in range(len(parts), 0, -1):
        try:
            target = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        try:
            for part in parts[cut:]:
                annotated = part in getattr(target, "__annotations__", {})
                target = getattr(target, part, None) if annotated else getattr(target, part)
        except AttributeError:
            return False, None
        return True, target
    return False, None


def setup(app: Sphinx) -> dict[str, bool]:
    """Register what this file offers."""
    app.connect("autodoc-process-docstring", link_pages)
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
