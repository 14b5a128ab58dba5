"""Write docs/cli.md and snipdedup/__init__.pyi from the table of commands; --check compares."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import textwrap
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import snipdedup
from snipdedup.cli import usage_words
from snipdedup.commands import (
    LATE,
    Command,
    bare_type,
    is_required,
    load,
    setting_name,
    usual_value,
)
from snipdedup.config import BY_FUNCTION, COMMANDS

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "cli.md"
STUB = ROOT / "snipdedup" / "__init__.pyi"
KINDS = {bool: "switch", int: "integer", float: "number", str: "text"}

HEAD = """\
# The command line

Generated from `snipdedup/config.py` by `python scripts/make_cli_docs.py`; do not edit.

`snip COMMAND --help` prints the same. Flags are written `--with_underscores` or `--with-dashes`,
and `--flag value` or `--flag=value`. A switch takes no value; `--noSWITCH` turns it off.

| exit status | meaning |
|---|---|
| 0 | done |
| 1 | failed: one line says what was expected, what was found, what to do; or an audit failed |
| 2 | wrong usage, found before anything is read or written |
| 130 | interrupted |

Results go to stdout, progress and errors to stderr.
"""
STUB_HEAD = '''\
"""Types of the library's functions.

Generated from `snipdedup/config.py` by `python scripts/make_cli_docs.py`; do not edit.
"""

from os import PathLike
from typing import Any, Literal
'''


def page() -> str:
    """Return docs/cli.md."""
    contents = ["| command | does |", "|---|---|"]
    contents += [
        f"| [`snip {c.name}`](#snip-{c.name}) | {escaped(c.does)} |" for c in COMMANDS.values()
    ]
    return "\n".join([HEAD, *contents, "", *(section(command) for command in COMMANDS.values())])


def section(command: Command) -> str:
    """Return the section of one command."""
    lines = [f"## snip {command.name}", "", f"{command.does[0].upper()}{command.does[1:]}.", ""]
    lines += ["```sh", f"{' '.join(usage_words(command))} [flags]", command.example, "```", ""]
    lines += ["| setting | type | default | meaning |", "|---|---|---|---|"]
    kinds = get_type_hints(command.options)
    for positional in (True, False):
        for field in command.fields(positional):
            lines.append(row(field, bare_type(kinds[field.name])))
    return "\n".join([*lines, ""])


def row(field: dataclasses.Field[object], kind: type) -> str:
    """Return the table row of one setting."""
    meaning = field.metadata["help"]
    if field.metadata.get("choices"):
        choices = field.metadata["choices"]
        meaning += "; one of " + ", ".join(f"`{choice}`" for choice in choices)
    default = "needed" if is_required(field) else usual_value(field)
    if default and not is_required(field) and " " not in default:
        default = f"`{default}`"
    # Any: the library takes more than a text
    kind_name = "text" if field.metadata.get("positional") else KINDS.get(kind, "text")
    return f"| `{setting_name(field)}` | {kind_name} | {default} | {escaped(meaning)} |"


def escaped(text: str) -> str:
    """Keep a text inside its table cell."""
    return text.replace("|", "\\|").replace("][", "]\\[")  # else Markdown takes it for a link


def stub() -> str:
    """Return snipdedup/__init__.pyi: each function with its types, defaults and docstring."""
    functions = [stub_function(name) for name in sorted(BY_FUNCTION)]
    late = set(map(load, LATE.values()))
    named = {snipdedup.SnipError, snipdedup.UsageError, *late}
    for name in BY_FUNCTION:
        named |= classes_in(returned_type(name))
    lines = [STUB_HEAD]
    for kind in sorted(named, key=lambda kind: (kind.__module__, kind.__name__)):
        if (isinstance(kind, type) or kind in late) and kind.__module__ != "builtins":
            lines.append(f"from {kind.__module__} import {kind.__name__} as {kind.__name__}")
    lines += ["", "__version__: str", ""]
    return "\n".join([*lines, "\n".join(functions)])


def returned_type(function: str) -> Any:
    """Return the class of a function's result, by the annotation of what does the work."""
    return get_type_hints(load(getattr(snipdedup, function).target))["return"]


def classes_in(kind: Any) -> set[Any]:
    """Return the classes that a type names."""
    parts = get_args(kind)
    return set().union(*map(classes_in, parts)) if parts else {kind}


def stub_function(name: str) -> str:
    """Return one function of the stub."""
    function = getattr(snipdedup, name)
    lines, keywords = [f"def {name}("], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not keywords:
            lines, keywords = [*lines, "    *,"], True
        default = f" = {parameter.default!r}".replace("'", '"')
        default = "" if parameter.default is inspect.Parameter.empty else default
        lines.append(f"    {parameter.name}: {type_text(parameter.annotation)}{default},")
    lines.append(f") -> {type_text(returned_type(name))}:")
    first, _, rest = function.__doc__.partition("\n")
    body = textwrap.indent(f'"""{first}\n{rest}\n"""', "    ")
    return "\n".join([*lines, body, ""])


def type_text(kind: Any) -> str:
    """Return a type as a stub spells it."""
    if isinstance(kind, UnionType) or get_origin(kind) is Union:
        return " | ".join(type_text(part) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return "Literal[" + ", ".join(f'"{choice}"' for choice in get_args(kind)) + "]"
    if get_args(kind):
        return f"{get_origin(kind).__name__}[{', '.join(map(type_text, get_args(kind)))}]"
    return "None" if kind is NoneType else str(kind.__name__)


def main() -> int:
    """Write both files, or compare them; return the exit status."""
    stale = []
    for path, made in ((PAGE, page()), (STUB, stub())):
        if "--check" not in sys.argv[1:]:
            path.write_text(made, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != made:
            stale.append(str(path))
    if stale:
        print(
            f"{' and '.join(stale)}: out of date; run: python scripts/make_cli_docs.py",
            file=sys.stderr,
        )
    return int(bool(stale))


if __name__ == "__main__":
    sys.exit(main())
