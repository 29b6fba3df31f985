"""Print the repository's files with what each holds: the first line of its docstring.

python tools/files.py              # all files
python tools/files.py histogram    # those whose path or docstring has the word
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def described(word: str = "") -> Iterator[tuple[str, str]]:
    """Yield path and first docstring line of each Python file, and path and heading of each page in ``docs/``.

    Args:
        word: only files whose path or line contains it, in upper or lower case; "": all.
    """
    listed = subprocess.run(
        ["git", "ls-files", "*.py", "docs/*.md"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.split():
        path = ROOT / name
        if not path.is_file():  # removed, and not committed yet
            continue
        text = path.read_text()
        held = (ast.get_docstring(ast.parse(text)) or "") if path.suffix == ".py" else text.lstrip("# ")
        if word.lower() in f"{name} {held if path.suffix == '.py' else held.partition(chr(10))[0]}".lower():
            yield name, held.partition("\n")[0]


if __name__ == "__main__":
    for name, line in described(" ".join(sys.argv[1:])):
        print(f"{name}: {line}")
