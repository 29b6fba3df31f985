"""Shells complete commands, options and choices."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tritonq.__main__ import COMMANDS
from tritonq.cli.completion import script

BASH = shutil.which("bash")


def completed(*words):
    """What bash offers for the last word."""
    quoted = " ".join(f"'{word}'" for word in words)
    code = (
        f"{script('bash')}\nCOMP_WORDS=({quoted})\nCOMP_CWORD={len(words) - 1}\n_tritonq\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    return subprocess.run([BASH, "-c", code], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.skipif(BASH is None, reason="there is no bash")
def test_bash_completes():
    assert completed("tritonq", "") == list(COMMANDS)
    assert completed("tritonq", "e") == ["evaluate", "export"]
    assert completed("tritonq", "train", "m:f", "--pre") == ["--preprocessing"]
    assert completed("tritonq", "train", "m:f", "--amp", "b") == ["bfloat16"]
    assert completed("tritonq", "report", "--amp") == []
    assert completed("tritonq", "completion", "z") == ["zsh"]


@pytest.mark.skipif(BASH is None, reason="there is no bash")
def test_bash_completes_names_with_spaces(tmp_path, monkeypatch):
    (tmp_path / "my photos").mkdir()
    monkeypatch.chdir(tmp_path)
    words = "COMP_WORDS=(tritonq train m:f my)\nCOMP_CWORD=3"
    code = f"{script('bash')}\n{words}\n_tritonq\nprintf '%s|' \"${{COMPREPLY[@]}}\""
    ended = subprocess.run([BASH, "-c", code], capture_output=True, text=True, check=True)
    assert ended.stdout == "my photos|"


def test_zsh_takes_the_same():
    assert "bashcompinit" in script("zsh")
    assert script("zsh").endswith(script("bash").partition("_tritonq()")[2])
