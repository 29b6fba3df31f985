"""Compare two commits of this repository on one machine, measured in turns by one command.

    python -m tritonq.perf.compare v0.2.0 HEAD --case conv_bn --rounds 5

Each round runs the chosen cases of both commits, each in a process of its own over a checkout of its own, so that a
machine that is slow for a while slows both. A dot in place of a commit is the working tree as it is. Cases that one of
the commits lacks are named.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tritonq.perf import records
from tritonq.perf.gpu.__main__ import link_checkout
from tritonq.perf.machine import SOURCE
from tritonq.perf.records import Record
from tritonq.perf.stats import Spread, speed_up
from tritonq.perf.table import aligned, duration

WORKING_TREE = "."
# Case and implementation.
Key = tuple[str, str]


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and print; return 0, or 1 if a run failed, or 2 if a commit is not known."""
    options, bench_arguments = _parser().parse_known_args(argv)
    repository = SOURCE.parent
    unknown = [name for name in (options.before, options.after) if not _is_commit(repository, name)]
    if unknown:
        print(f"tritonq.perf.compare: {repository} has no commit {' or '.join(unknown)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="tritonq-compare-") as folder:
        sides = _measure((options.before, options.after), options.rounds, Path(folder), bench_arguments)
    if sides is None:
        return 1
    print(render(options.before, options.after, *sides))
    return 0


def _measure(
    commits: tuple[str, str], rounds: int, folder: Path, bench_arguments: Sequence[str]
) -> tuple[list[dict[Key, float]], list[dict[Key, float]]] | None:
    """Return the seconds of each round of both commits, by case and implementation.

    None if a run failed (it prints why).
    """
    times: tuple[list[dict[Key, float]], list[dict[Key, float]]] = ([], [])
    with checkouts(SOURCE.parent, commits, folder) as paths:
        for i in range(rounds):
            # The other one first in every second round: what runs first may find a colder processor.
            for side in (0, 1) if i % 2 == 0 else (1, 0):
                print(f"round {i + 1} of {rounds}: {commits[side]}", flush=True)
                out = folder / f"results-{side}" / str(i)
                status = _bench(paths[side], out, bench_arguments)
                if status != 0:
                    print(f"tritonq.perf.compare: bench of {commits[side]} ended with {status}", file=sys.stderr)
                    return None
                times[side].append(_times(out))
    return times


@contextmanager
def checkouts(repository: Path, commits: Sequence[str], folder: Path) -> Iterator[list[Path]]:
    """Check the commits out below ``folder``; yield their import paths.

    Each path offers a commit as if it were installed.
    """
    trees, paths = [], []
    try:
        for i, commit in enumerate(commits):
            tree = repository
            if commit != WORKING_TREE:
                tree = folder / f"commit-{i}"
                _git(repository, "worktree", "add", "--quiet", "--detach", str(tree), commit)
                trees.append(tree)
            path = folder / f"import-{i}"
            path.mkdir()
            link_checkout(tree, path)
            paths.append(path)
        yield paths
    finally:
        for tree in trees:
            _git(repository, "worktree", "remove", "--force", str(tree))


def render(before: str, after: str, first: Sequence[dict[Key, float]], second: Sequence[dict[Key, float]]) -> str:
    """Return the table: medians over the rounds, and how many times faster ``after`` is, paired by round.

    Args:
        before: name of the first commit.
        after: name of the second.
        first: seconds by case and implementation, of each round of the first commit.
        second: of the second.
    """
    rows: list[tuple[str, ...]] = [("case", "implementation", before, after, "times faster", "of rounds")]
    common = [key for key in first[0] if all(key in times for times in (*first, *second))]
    for key in common:
        one, other = ([times[key] for times in side] for side in (first, second))
        ratio = speed_up(one, other)
        medians = (duration(Spread.of(side).median) for side in (one, other))
        rows.append((*key, *medians, f"{ratio.median:.2f}", f"{ratio.p20:.2f} … {ratio.p80:.2f}"))
    lines = aligned(rows)
    for name, side in ((before, first), (after, second)):
        lines += [f"  {case}, {by}: measured at {name} alone" for case, by in side[0] if (case, by) not in common]
    return "\n".join(lines)


def _bench(path: Path, out: Path, arguments: Sequence[str]) -> int:
    """Run ``bench`` of the checkout that ``path`` links to, print its warnings, and return its exit code."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(path), os.environ.get("PYTHONPATH"))))}
    command = [sys.executable, "-m", "tritonq", "bench", *arguments, "--out", str(out)]
    # Not in a checkout, whose folder ``tritonq`` lacks the kernels and would be imported.
    return subprocess.run(command, cwd=path, env=environment, stdout=subprocess.DEVNULL, check=False).returncode


def _times(folder: Path) -> dict[Key, float]:
    """Return the median seconds of everything that the result files in ``folder`` say was timed."""
    found: list[Record] = records.read_folder(folder)
    return {(r["case"], r["implementation"]): r["median_s"] for r in found if "median_s" in r}


def _is_commit(repository: Path, name: str) -> bool:
    command = ["git", "-C", str(repository), "rev-parse", "--quiet", "--verify", f"{name}^{{commit}}"]
    return name == WORKING_TREE or subprocess.run(command, capture_output=True, check=False).returncode == 0


def _git(repository: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(repository), *arguments], check=True, stdout=subprocess.DEVNULL)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tritonq.perf.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Other options are those of python -m tritonq bench: --case, --quick, --device, --seconds, --threads.",
    )
    parser.add_argument("before", help="a commit, tag or branch, or . for the working tree")
    parser.add_argument("after", help="what is compared with it")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of each (default 3)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
