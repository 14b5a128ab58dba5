"""Completion: the script for bash does what it should; each shell that is here can read its own."""

from __future__ import annotations

import shutil
import subprocess

import pytest
import truth

from snipdedup.config import COMMANDS
from snipdedup.errors import UsageError


def completed(*words: str) -> list[str]:
    """What bash would offer for the last word."""
    script = truth.snip("completion", "bash")[1]
    listed = " ".join(f"'{word}'" for word in words)
    script += f"COMP_WORDS=({listed}); COMP_CWORD={len(words) - 1}\n_snip\n"
    script += 'printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_bash_completes_commands_flags_and_values():
    assert completed("snip", "") == list(COMMANDS)
    assert completed("snip", "de") == ["dedup", "demo"]
    every = [f"--{field.name}" for field in COMMANDS["dedup"].fields(positional=False)]
    assert completed("snip", "dedup", "img_emb", "--") == every
    assert completed("snip", "dedup", "img_emb", "--thresh") == ["--threshold"]
    assert completed("snip", "dedup", "--method", "") == ["join", "exact", "adc", "semdedup"]
    assert completed("snip", "dedup", "--grouping", "s") == ["star"]
    assert completed("snip", "completion", "") == ["bash", "zsh", "fish"]
    assert completed("snip", "dedup", "img") == []  # a file, which bash completes itself
    assert completed("snip", "top", "--", "--n") == ["--n"]


def test_fish_has_each_flag_with_its_meaning():
    lines = truth.snip("completion", "fish")[1].splitlines()
    for command in COMMANDS.values():
        for field in command.fields(positional=False):
            begin = f"complete -c snip -n '__fish_seen_subcommand_from {command.name}'"
            own = [one for one in lines if one.startswith(f"{begin} -l {field.name} ")]
            assert len(own) == 1
    assert sum("-n __fish_use_subcommand -xa " in line for line in lines) == len(COMMANDS)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_can_read_its_script(shell, tmp_path):
    status, script, _ = truth.snip("completion", shell)
    assert status == 0
    if shell == "zsh":
        assert script.startswith("autoload -Uz compinit bashcompinit")
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} on this machine")
    (tmp_path / "script").write_text(script)
    subprocess.run([shell, "-n", tmp_path / "script"], check=True, capture_output=True)


def test_another_shell_is_refused():
    status, _, said = truth.snip("completion", "tcsh")
    assert status == 2
    assert "SHELL must be one of bash, zsh, fish, found 'tcsh'" in said
    with pytest.raises(UsageError):
        COMMANDS["completion"].options(shell="tcsh")
