"""Run the commands of docs/tutorial.md and write what they print into the page.

In a ``console`` block lines that begin with ``$`` are commands and the others what they print; a
``python`` block may be followed by a ``text`` block with what it prints. All run in one new folder.

    python scripts/make_tutorial.py            # writes the page
    python scripts/make_tutorial.py --check    # exits 1 if it would be another

But for times, and decimals from the fifth on, which another processor may round otherwise.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "tutorial.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```\n", re.M | re.S)
TIMES = re.compile(r"^(seconds: ).*$|( in )[\d.]+ s \([\d,]+ a second\)", re.M)
DECIMALS = re.compile(r"(\d\.\d{4})\d+")


def main(argv: list[str] | None = None) -> int:
    """Write the page, or check it; return the exit status."""
    before = PAGE.read_text("utf-8")
    with tempfile.TemporaryDirectory(prefix="snip-tutorial-") as folder:
        after = rewritten(before, Path(folder).resolve())
    if "--check" not in (sys.argv[1:] if argv is None else argv):
        PAGE.write_text(after, "utf-8")
    elif masked(before) != masked(after):
        print(f"{PAGE} is out of date; run: python scripts/make_tutorial.py", file=sys.stderr)
        return 1
    return 0


def masked(page: str) -> str:
    """Return the page without what differs from run to run, or from machine to machine."""
    return DECIMALS.sub(r"\1", TIMES.sub(r"\1\2...", page))


def rewritten(page: str, folder: Path) -> str:
    """Return the page with what its commands print in ``folder``."""
    shell = runner(folder)
    program = ""

    def block(match: re.Match[str]) -> str:
        nonlocal program
        kind, text = match[1], match[2]
        if kind == "console":
            commands = [line for line in text.splitlines() if line.startswith("$ ")]
            text = "".join(f"{line}\n{shell(line[2:])}" for line in commands)
        elif kind == "text" and program:
            text = shell(f"{shlex.quote(sys.executable)} -c {shlex.quote(program)}")
        program = text if kind == "python" else ""
        return f"```{kind}\n{text}```\n"

    return BLOCK.sub(block, page)


def runner(folder: Path) -> Callable[[str], str]:
    """Return a function that runs a command line in ``folder``, where ``snip`` is this one."""
    tools = folder / ".tools"
    tools.mkdir()
    snip = tools / "snip"
    snip.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m snipdedup "$@"\n', "utf-8")
    snip.chmod(0o755)
    root = str(PAGE.parent.parent)
    environment = os.environ | {
        "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }

    def run(line: str) -> str:
        done = subprocess.run(
            ["bash", "-o", "pipefail", "-c", line],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"{line}\n{done.stdout}{done.stderr}")
        return done.stdout.replace(f"{folder}/", "/home/you/")

    return run


if __name__ == "__main__":
    sys.exit(main())
