"""No two files import each other, none imports private names of another, none is long; kernels take few values.

The lists below hold what broke these rules when they were written down. They only shrink: who mends an entry
removes it.
"""

import ast
import importlib
import re
from functools import cache
from inspect import ismodule
from pathlib import Path

import tritonq

ROOT = Path(__file__).parent.parent.parent
FOLDERS = {"tritonq": "tritonq", "kernels": "tritonq.kernels", "perf": "tritonq.perf"}
MOST_LINES = 400
# Parameters of a jitted function besides constants. A tuple of strides or sizes is one.
MOST_VALUES = 30
# Named by documents, made by commands.
MADE = {".matrix/"}

RINGS: set[tuple[str, ...]] = set()
PRIVATE_IMPORTS: set[tuple[str, str]] = set()
LONG_FILES: set[str] = set()


def modules():
    """Module name: path, for every module of the package."""
    for folder, package in FOLDERS.items():
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            yield ".".join((package, *(part for part in parts if part != "__init__"))), path


def files():
    """Every Python file of the repository's folders."""
    for folder in (*FOLDERS, "tests", "examples", "tools"):
        yield from (ROOT / folder).rglob("*.py")


MODULES = dict(modules())


@cache
def nodes(path):
    """The imports of a file, and where it reads attributes."""
    kinds = (ast.Import, ast.ImportFrom, ast.Attribute)
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)]


def imported_modules(path):
    """The project's modules that a file imports anywhere, by what is imported: a package or a module in it."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in MODULES or node.module in MODULES:
                    yield inner if inner in MODULES else node.module


def rings(edges):
    """The sets of more than one module in which each imports every other, perhaps by way of others."""

    def reachable(start):
        seen, pending = set(), [start]
        while pending:
            new = edges[pending.pop()] - seen
            seen |= new
            pending += new
        return seen

    reach = {module: reachable(module) for module in edges}
    return {
        tuple(sorted(other for other in reach[module] if module in reach[other]))
        for module in edges
        if module in reach[module]
    }


def test_rings_are_found():
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": set()}
    assert rings(edges) == {("a", "b", "c")}


def test_no_modules_import_each_other():
    found = rings({module: set(imported_modules(path)) - {module} for module, path in MODULES.items()})
    assert found - RINGS == set(), "import each other"
    assert RINGS - found == set(), "mended: remove the entries"


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def private_imports(path):
    """Private names of other modules of the project that a file imports."""
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "tritonq":
            yield from (f"{node.module}.{alias.name}" for alias in node.names if is_private(alias.name))


def private_attributes(path):
    """Private names that a file reads from modules of the project which it imports."""
    names = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in nodes(path)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
        if f"{node.module}.{alias.name}" in MODULES
    }
    for node in nodes(path):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and getattr(node.value, "id", None) in names:
            yield f"{names[node.value.id]}.{node.attr}"


def test_no_file_imports_private_names_of_another():
    found = {(str(path.relative_to(ROOT)), name) for path in files() for name in private_imports(path)}
    assert found - PRIVATE_IMPORTS == set(), "import a private name of another file"
    assert PRIVATE_IMPORTS - found == set(), "mended: remove the entries"


def test_no_module_reads_private_names_of_another():
    assert {module: found for module, path in MODULES.items() if (found := list(private_attributes(path)))} == {}


def test_no_file_is_over_400_lines():
    found = {str(path.relative_to(ROOT)) for path in files() if len(path.read_text().splitlines()) > MOST_LINES}
    assert found - LONG_FILES == set(), f"over {MOST_LINES} lines: a file has one subject"
    assert LONG_FILES - found == set(), "mended: remove the entries"


# What an expression without names consists of, such as `2**-7`.
CONSTANT_PARTS = (ast.Constant, ast.BinOp, ast.UnaryOp, ast.operator, ast.unaryop)


def number_written(node):
    """The number that an expression without names amounts to; 0 for any other expression."""
    if not all(isinstance(part, CONSTANT_PARTS) for part in ast.walk(node)):
        return 0
    value = eval(compile(ast.Expression(node), "", "eval"))
    return value if isinstance(value, (int, float)) else 0


def literal_tolerances(path):
    """Lines of a file where a small number is written as the bound of a comparison, or in a dict of its arguments."""
    for node in ast.walk(ast.parse(path.read_text())):
        bounds = []
        if isinstance(node, ast.Call):
            bounds = [(keyword.arg, keyword.value) for keyword in node.keywords]
        elif isinstance(node, ast.Dict):
            bounds = [(getattr(key, "value", None), value) for key, value in zip(node.keys, node.values, strict=True)]
        if any(name in ("rtol", "atol") and 0 < number_written(value) < 0.01 for name, value in bounds):
            yield node.lineno


def test_tolerances_are_those_of_the_table():
    found = {str(path.relative_to(ROOT)): list(literal_tolerances(path)) for path in (ROOT / "tests").rglob("*.py")}
    assert {path: lines for path, lines in found.items() if lines} == {}, "take one of tests/support/tolerances.py"


def jitted(path):
    """Each function of a file that Triton compiles, and its parameters besides constants."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and "triton.jit" in map(ast.unparse, node.decorator_list):
            values = [a.arg for a in node.args.args if "constexpr" not in ast.unparse(a.annotation or ast.Constant(0))]
            yield node.name, values


def test_no_jitted_function_takes_many_values():
    found = {name: len(values) for path in (ROOT / "kernels").glob("*.py") for name, values in jitted(path)}
    assert len(found) > 40
    too_long = {name: count for name, count in found.items() if count > MOST_VALUES}
    assert too_long == {}, f"more than {MOST_VALUES} parameters besides constants: pass tuples"


def test_public_names_are_those_of_the_list():
    """Removing a name takes a deprecation first, see CONTRIBUTING.md; a new one is a promise to keep it."""
    listed = (ROOT / "tests" / "public_names.txt").read_text().split()
    modules_ = {name.rpartition(".")[0] for name in listed}
    modules_ |= {f"tritonq.{name}" for name in tritonq.__all__ if ismodule(getattr(tritonq, name))}
    found = [f"{module}.{name}" for module in modules_ for name in importlib.import_module(module).__all__]
    assert sorted(listed) == sorted(found)
    assert all(hasattr(importlib.import_module(module), name) for module, _, name in (n.rpartition(".") for n in found))


def test_parameters_of_kernels_have_a_comment_or_are_words_of_the_package():
    """So what a launch hands over can be told from the signature; `kernels/__init__.py` has what many kernels take."""
    words = set(re.findall(r"\w+", (ROOT / "kernels" / "__init__.py").read_text()))
    found = []
    for path in (ROOT / "kernels").glob("*.py"):
        lines = path.read_text().splitlines()
        kernels = [
            node
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef) and any(ast.unparse(d) == "Launcher" for d in node.decorator_list)
        ]
        for kernel in kernels:
            bare = [argument.arg for argument in kernel.args.args if "#" not in lines[argument.lineno - 1]]
            bare = [name for name in bare if name not in words and not name.endswith("_strides")]
            found += [(path.name, kernel.name, name) for name in bare]
    assert found == []


def test_files_that_the_documents_name_exist():
    for document in ("CONTRIBUTING.md", "SECURITY.md", "UPGRADING.md"):
        text = (ROOT / document).read_text()
        paths = re.findall(r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:py|toml|txt|in))`", text)
        paths += re.findall(r"\]\(([\w./-]+)\)", text)
        missing = [path for path in paths if not (ROOT / path).exists() and path not in MADE]
        assert missing == [], f"{document} names files that are not there"


def table_rows(text):
    """The cells of each row of the tables in a text, without the rows that name and rule the columns."""
    for header, row in zip(text.splitlines(), text.splitlines()[1:], strict=False):
        if header.startswith("|") and row.startswith("|") and "---" not in row:
            yield [cell.strip() for cell in row.strip("|").split("|")]


def test_each_change_of_the_table_names_what_to_touch_and_its_test():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = list(table_rows(text.partition("## To change X")[2].partition("\n## ")[0]))
    assert len(rows) > 80
    assert [row[0] for row in rows if not row[1]] == []
    assert [row[0] for row in rows if len(row) == 4 and not ("`" in row[2] or "below" in row[2])] == []
    assert [row[0] for row in rows if any(len(cell) > 520 for cell in row)] == [], "too long to be read at a glance"


def test_the_architecture_has_a_line_for_each_file_at_the_top():
    text = (ROOT / "docs" / "architecture.md").read_text()
    section = text.partition("## The files at the top")[2].partition("\n### ")[0]
    named = [name for row in table_rows(section) for name in re.findall(r"`(\w+\.py)`", row[0])]
    assert sorted(named) == sorted(path.name for path in (ROOT / "tritonq").glob("*.py"))
