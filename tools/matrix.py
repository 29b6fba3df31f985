"""Run the test suite under several versions of Python, PyTorch and Triton, and write the results as one table.

    python tools/matrix.py                            # every row, then COMPATIBILITY.md
    python tools/matrix.py --rows oldest newest       # these rows; the table keeps the others
    python tools/matrix.py --rows newest --continue   # goes on where an interrupted run stopped
    python tools/matrix.py --rows newest --files test_onnx.py test_doctor.py
    python tools/matrix.py --quick                    # the commands of the pages and a sample of the tests

Each file of tests is a process of its own, whose report lies in the environment's folder and names the commit it ran
on. The table is made from the reports: its column "files" says how many of the files they cover. Each row gets a
virtual environment of its own in `.matrix/`, which stays for the next run (about 6 GB each where PyPI's torch brings
CUDA). Python is searched as `pythonX.Y` under pyenv and on the path.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from markdown_table import markdown_table

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "COMPATIBILITY.md"
# The order of the table's columns.
# The runs of pytest that make up the suite (`make test`); all but the first are of operators' tests.
RUNS = ("compiled", "interpreter", "sanitizer")
COLUMNS = tuple(
    ["row", "tritonq", "commit", "date", "Python", "torch", "triton", "numpy", "files", "passed", "skipped", "failed"]
)
# What `--quick` runs: the commands and code of README and the pages, and a file or two per part of the package.
SAMPLE = (
    *("test_commands.py", "test_docs.py", "test_pages.py", "test_examples.py", "test_doctor.py"),
    *("test_fake_quant.py", "test_min_max.py", "test_conv_bn_tail.py", "test_modules.py", "test_compile_eval.py"),
    *("test_prepare.py", "test_calibration.py", "test_convert.py", "test_converted_file.py", "test_onnx.py"),
)
# Installed without what they depend on, as by `make test`; see the Makefile.
WITHOUT_DEPENDENCIES = ("torchvision", "timm", "triton-viz")


@dataclass(frozen=True)
class Row:
    """One row of the table: an environment in which the tests run.

    Attributes:
        name: first cell of the row.
        python: version of the interpreter, "3.11".
        pins: versions that replace those of constraints.txt.
        absent: distributions that are uninstalled before the tests run.
    """

    name: str
    python: str
    pins: Mapping[str, str] = field(default_factory=dict)
    absent: tuple[str, ...] = ()


ROWS = (
    Row("pinned", "3.11"),
    Row("python-3.12", "3.12"),
    Row("python-3.13", "3.13"),
    Row("oldest", "3.11", {"torch": "2.11.0", "triton": "3.6.0", "torchvision": "0.26.0"}),
    Row("newest", "3.11", {"torch": "2.14.1", "triton": "3.8.0", "torchvision": "0.29.1"}),
    Row("without-triton", "3.11", absent=("triton", "triton-viz")),
)


def main() -> int:
    """Run the chosen rows; return 1 if a test failed, else 0."""
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=names, default=names, metavar="ROW", help=", ".join(names))
    parser.add_argument("--environments", type=Path, default=ROOT / ".matrix", help="folder of the environments")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--files", nargs="+", metavar="FILE", help="names of files in tests/ (default: all)")
    quick = f"{len(SAMPLE)} files: the commands and code of the pages, and a sample of the suite"
    chosen.add_argument("--quick", action="store_const", dest="files", const=SAMPLE, help=quick)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="files at a time (default: one per core)")
    parser.add_argument("--continue", action="store_true", dest="go_on", help="keep the reports that are there")
    parser.add_argument("--build-only", action="store_true", help="build the environments, run nothing")
    arguments = parser.parse_args()
    failed = 0
    for row in ROWS:
        if row.name in arguments.rows:
            folder = arguments.environments.resolve() / row.name
            build(row, folder, arguments.go_on)
            if not arguments.build_only:
                run(folder, arguments.files or all_files(), arguments.workers, arguments.go_on)
                cells = summarize(row, folder)
                print(" | ".join(f"{name} {value}" for name, value in cells.items()), flush=True)
                failed += int(cells["failed"])
                write([*(old for old in read(TABLE.read_text()) if old["row"] != row.name), cells])
    return 1 if failed else 0


def all_files() -> list[str]:
    """Return the names of the files of tests."""
    return sorted(path.name for path in (ROOT / "tests").rglob("test_*.py"))


def build(row: Row, folder: Path, go_on: bool) -> None:
    """Make the environment of ``row`` in ``folder``; what is there with the same pins and dependencies is kept.

    If the project depends on more than before, the rest is installed. If pins have changed the environment is made
    anew; where a run goes on, the changed versions are installed into it instead, and its reports stay.
    """
    python = folder / "bin" / "python"
    constraints, wanted = constraints_of(row), dependencies()
    stamp, installed = folder / "constraints.txt", folder / "dependencies.txt"
    is_pinned = stamp.exists() and stamp.read_text() == constraints
    if is_pinned and installed.exists() and installed.read_text() == wanted:
        return
    if not is_pinned and not (go_on and python.exists()):
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([interpreter(row.python), "-m", "venv", str(folder)], check=True)
    pending = folder / "constraints.pending"
    pending.write_text(constraints)
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(pending)]
    subprocess.run([*install, "-e", f"{ROOT}[dev]"], check=True)
    present = [name for name in WITHOUT_DEPENDENCIES if name not in row.absent]
    subprocess.run([*install, "--no-deps", *present], check=True)
    if row.absent:
        subprocess.run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *row.absent], check=True)
    pending.rename(stamp)
    installed.write_text(wanted)


def dependencies() -> str:
    """Return what the project and its extras depend on, one line each."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    return "\n".join([*project["dependencies"], *(f"{name}: {', '.join(extras[name])}" for name in sorted(extras))])


def constraints_of(row: Row) -> str:
    """Return constraints.txt with the pins of ``row`` in place of its own."""
    lines = []
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name = line.partition("==")[0]
        lines.append(f"{name}=={row.pins[name]}" if name in row.pins else line)
    return "\n".join(lines) + "\n"


def interpreter(version: str) -> str:
    """Return the newest Python of this minor version, from the path or from pyenv."""
    found = sorted(
        Path.home().glob(f".pyenv/versions/{version}.*/bin/python"),
        key=lambda path: [int(number) for number in re.findall(r"\d+", path.parts[-3])],
    )
    candidate = str(found[-1]) if found else shutil.which(f"python{version}")
    if candidate is None:
        raise SystemExit(f"matrix: no python{version} on the path or under pyenv")
    return candidate


def run(folder: Path, files: Iterable[str], workers: int, go_on: bool) -> None:
    """Run files of tests in an environment, some at a time; their reports and output go to its folder ``reports``."""
    reports = folder / "reports"
    if not go_on:
        shutil.rmtree(reports, ignore_errors=True)
    reports.mkdir(exist_ok=True)

    def run_file(name: str) -> None:
        path = next((ROOT / "tests").rglob(name))
        for kernels in RUNS if path.parent.name == "operators" else RUNS[:1]:
            run_once(path, kernels)

    def run_once(path: Path, kernels: str) -> None:
        report = reports / f"{path.stem}-{kernels}.xml"
        if report.exists():
            return
        command = [str(folder / "bin" / "python"), "-m", "pytest", f"--junitxml={report}", "-p", "no:cacheprovider"]
        command += [f"--kernels={kernels}", "-o", f"junit_suite_name={commit()}", str(path)]
        with report.with_suffix(".log").open("w") as log:
            done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, check=False)
        if not report.exists():
            print(f"matrix: {path.name} ended with {done.returncode} and no report, see {log.name}", flush=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run_file, files))


def summarize(row: Row, folder: Path) -> dict[str, str]:
    """Return the cells of a row of the table, from the reports in an environment's folder."""
    names = all_files()
    reports = [path for path in (folder / "reports").glob("*.xml") if _file_of(path) in names]
    suites = [suite.attrib for report in reports for suite in ElementTree.parse(report).iter("testsuite")]
    total, failures, errors, skipped = (
        sum(int(suite[name]) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    return {
        "row": row.name,
        "commit": ", ".join(sorted({suite["name"] for suite in suites})) or commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **versions(folder / "bin" / "python"),
        "files": f"{len({_file_of(path) for path in reports})} of {len(names)}",
        "passed": str(total - failures - errors - skipped),
        "skipped": str(skipped),
        "failed": str(failures + errors),
    }


def commit() -> str:
    """Return the commit of the working tree, with a ``+`` if a file other than the table differs from it."""
    differing = _git("status", "--porcelain", "--", ".", f":!{TABLE.name}")
    return _git("rev-parse", "--short", "HEAD") + ("+" if differing else "")


def _file_of(report: Path) -> str:
    return f"{report.stem.partition('-')[0]}.py"


def versions(python: Path) -> dict[str, str]:
    """Return the versions in an environment, "none" for a distribution that is not installed."""
    code = (
        "import json, platform\n"
        "from importlib import metadata\n"
        "import tritonq\n"
        "found = {'Python': platform.python_version(), 'tritonq': tritonq.__version__}\n"
        "for name in ('torch', 'triton', 'numpy'):\n"
        "    try:\n"
        "        found[name] = metadata.version(name)\n"
        "    except metadata.PackageNotFoundError:\n"
        "        found[name] = 'none'\n"
        "print(json.dumps(found))\n"
    )
    output = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True, cwd=python.parent)
    found: dict[str, str] = json.loads(output.stdout)
    return found


def read(text: str) -> list[dict[str, str]]:
    """Return the rows of a table that `write` wrote."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[1:] if not set(row[0]) <= {"-"}]


def write(rows: Iterable[Mapping[str, str]]) -> None:
    """Replace the table in COMPATIBILITY.md, in the order of ``ROWS``; the text above it stays."""
    order = [row.name for row in ROWS]
    ordered = sorted((row for row in rows if row["row"] in order), key=lambda row: order.index(row["row"]))
    lines = markdown_table(COLUMNS, [[row[name] for name in COLUMNS] for row in ordered])
    before, _, _ = TABLE.read_text().partition("| row |")
    TABLE.write_text(before + "\n".join([*lines, ""]))


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
