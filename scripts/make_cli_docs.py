"""Write docs/cli.md from the table of commands; with --check, say whether it is up to date."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import get_type_hints

from snipdedup.cli import COMMANDS, Command, bare_type, is_required
from snipdedup.config import usual_value

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
KINDS = {bool: "switch", int: "integer", float: "number", str: "text"}

HEAD = """\
# The command line

Generated from `snipdedup/config.py` by `python scripts/make_cli_docs.py`; do not edit.

`snip COMMAND --help` prints the same. Flags are written `--with_underscores` or `--with-dashes`,
and `--flag value` or `--flag=value`. A switch takes no value; `--noSWITCH` turns it off.

| exit status | meaning |
|---|---|
| 0 | done |
| 1 | it cannot be done: one line says what was expected, found and what to do; or an audit failed |
| 2 | wrong usage, found before anything is read or written |
| 130 | interrupted |

Results go to stdout, progress and errors to stderr.
"""


def page() -> str:
    """Return the whole document."""
    return "\n".join([HEAD, contents(), *(section(command) for command in COMMANDS)])


def contents() -> str:
    """Return the list of commands, by group as in ``snip --help``."""
    lines = ["| command | does |", "|---|---|"]
    lines += [f"| [`snip {c.name}`](#snip-{c.name}) | {escaped(c.does)} |" for c in COMMANDS]
    return "\n".join([*lines, ""])


def section(command: Command) -> str:
    """Return the section of one command."""
    words = "".join(
        f" {f.name.upper()}" if is_required(f) else f" [{f.name.upper()}]"
        for f in command.fields(positional=True)
    )
    needed = [f for f in command.fields(positional=False) if is_required(f)]
    words += "".join(f" --{f.name} {f.name.upper()}" for f in needed)
    lines = [f"## snip {command.name}", "", f"{command.does[0].upper()}{command.does[1:]}.", ""]
    lines += ["```sh", f"snip {command.name}{words} [flags]", command.example, "```", ""]
    lines += ["| setting | type | default | meaning |", "|---|---|---|---|"]
    kinds = get_type_hints(command.options)
    for positional in (True, False):
        for field in command.fields(positional):
            lines.append(row(field, bare_type(kinds[field.name])))
    return "\n".join([*lines, ""])


def row(field: dataclasses.Field[object], kind: type) -> str:
    """Return the table row of one setting."""
    positional = field.metadata.get("positional")
    name = field.name.upper() if positional else f"--{field.name}"
    meaning = field.metadata["help"]
    if field.metadata.get("choices"):
        choices = field.metadata["choices"]
        meaning += ": " + ", ".join(f"`{choice}`" for choice in choices)
    default = "needed" if is_required(field) else usual_value(field)
    if default and not is_required(field) and " " not in default:
        default = f"`{default}`"
    kind_name = "text" if positional else KINDS.get(kind, "text")  # Any: the library takes more
    return f"| `{name}` | {kind_name} | {default} | {escaped(meaning)} |"


def escaped(text: str) -> str:
    """Keep a text inside its table cell."""
    return text.replace("|", "\\|").replace("][", "]\\[")  # else Markdown takes it for a link


def main() -> int:
    """Write the page, or compare it; return the exit status."""
    made = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(made, encoding="utf-8")
        return 0
    if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == made:
        return 0
    print(f"{PAGE} is out of date; run: python scripts/make_cli_docs.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
