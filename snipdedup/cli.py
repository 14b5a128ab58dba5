"""The command line: words to settings, results to stdout, errors to one line and an exit status.

Fire matches words to a command's parameters. Words that it would not refuse, or not in one line,
are refused before, so a mistyped flag costs nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import gc
import inspect
import io
import itertools
import json
import os
import re
import select
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO, get_type_hints

from snipdedup import __version__, progress
from snipdedup.commands import (
    FOLDER,
    Command,
    Settings,
    bare_type,
    did_you_mean,
    is_required,
    parameter_of,
    setting_name,
    usual_value,
)
from snipdedup.config import COMMANDS, FLAG_GROUPS
from snipdedup.errors import SnipError, UsageError

WIDTH = 96
GC_OBJECTS = 100_000  # new objects between collections: imports make many that all live on
DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130
CLOSED = 141  # as a shell says that a process ended by SIGPIPE
LOUDNESS = {"--quiet": progress.QUIET, "--verbose": progress.VERBOSE}
KINDS = {"out": "dedup", "is_dup": "dedup", "encoder": "encoder", "index": "index"}  # of folders
FEATURES, TABLES = (".npy", ".npz"), (".parquet", ".csv")
RESUMED = ("embed", "train", "compress", "index", "dedup", "filter", "download", "demo")


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``snip`` and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    if argv is not None or sys.getprofile() or sys.gettrace():  # called from Python
        sys.exit(run(list(sys.argv[1:] if argv is None else argv)))
    gc.set_threshold(GC_OBJECTS)
    # Before numpy is loaded: its threads would wait busily after each product, for 0.1 s.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    status = run(sys.argv[1:])
    # Freeing what torch and a large run hold, object by object, takes a third of a second.
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a pipe that was closed
            stream.flush()
    os._exit(status)


def run(words: list[str]) -> int:
    """Run one command line and return its exit status."""
    status = FAILED
    try:
        result = answer(words)
        return show(str(result), DONE if getattr(result, "passed", True) else FAILED, sys.stdout)
    except UsageError as error:
        what, status = str(error), WRONG_USAGE
    except SnipError as error:
        what = str(error)
    except KeyboardInterrupt:
        what, status = "interrupted; unfinished work is not kept", INTERRUPTED
        if words and words[0] in RESUMED:
            what = "interrupted; the same command continues from what is complete"
    except MemoryError as error:
        what = f"out of memory: {error}; lower --max_memory or --chunk_rows"
    except RuntimeError as error:
        if "home directory" not in str(error):  # pathlib's, of ~SOMEONE
            raise
        what = f"a path begins with ~ and an unknown user name: {error}"
    except OSError as error:
        if isinstance(error, BrokenPipeError) and stdout_is_closed():
            return CLOSED
        what = f"{error.filename or 'input/output'}: {error.strerror or error}"
    return show(f"snip: {what}", status, sys.stderr)


def show(text: str, status: int, stream: TextIO) -> int:
    """Print a text, if anyone still reads it; return the status."""
    with contextlib.suppress(BrokenPipeError):  # the reader (head, less) has seen enough
        print(text, end="\n" if text else "", file=stream, flush=True)
    return status


def stdout_is_closed() -> bool:
    """Tell whether stdout is a pipe that nobody reads any more."""
    if not hasattr(select, "poll"):  # Windows, where only this can be meant
        return True
    poll = select.poll()
    with contextlib.suppress(OSError, ValueError):  # stdout is no file, in a test for example
        poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def answer(words: list[str]) -> object:
    """Do what a command line asks for; return what to print."""
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    if not words or words in (["--help"], ["-h"]):
        return overview()
    if words == ["--version"]:
        return f"snip {__version__}"
    name = words[0]
    if name not in COMMANDS:
        what = "flag" if name.startswith("-") else "command"
        raise UsageError(f"no {what} {name!r}{did_you_mean(name, COMMANDS)}; see: snip --help")
    command = COMMANDS[name]
    if {"--help", "-h"} & set(words[1:]):
        return command_help(command)
    progress.loudness = progress.USUAL
    for flag, loudness in LOUDNESS.items():
        if flag in words:
            words = [word for word in words if word != flag]
            progress.loudness = loudness
    options = parse(command, words[1:])
    with progress.phase(f"snip {name}"):
        result = command.run(options)
    return json.dumps(result.as_json(), indent=2) if getattr(options, "json", False) else result


def parse(command: Command, words: list[str]) -> Settings:
    """Turn the words after a command's name into its settings; refuse what is wrong usage."""
    kinds = get_type_hints(command.options)
    places, texts = match_words(command, words, kinds)
    positional, flags = command.fields(positional=True), command.fields(positional=False)
    stray = places[len(positional) :]
    if stray:
        hint = did_you_mean(stray[0], kinds, "--")
        if stray[0].lower() in ("true", "false"):
            hint = " (a switch takes no value)"
        elif (pattern := expanded_glob(stray[0], [*places, *texts.values()])) is not None:
            hint = f" (the shell put many files for one word: quote it, such as '{pattern}')"
        raise UsageError(f"unexpected word {stray[0]!r}{hint}; see: snip {command.name} --help")
    placed = [field.name for field in positional[: len(places)]]
    for name in placed:
        if name in texts:
            raise UsageError(f"{name.upper()} is given more than once")
    needed = [field for field in (*positional, *flags) if is_required(field)]
    missing = [setting_name(f) for f in needed if f.name not in {*placed, *texts}]
    if missing:
        raise UsageError(
            f"{command.name} needs {', '.join(missing)}; for example: {command.example}"
        )
    given = bind(command, [*places, *(f"--{name}={text}" for name, text in texts.items())])
    values = {name: coerce(name, text, kinds[name]) for name, text in given.items()}
    refuse_swapped(command, values)
    return command.options(**values)


def expanded_glob(stray: str, words: list[str]) -> str | None:
    """Return a glob that the shell may have put a file for, where another word is one like it."""
    path = Path(stray)
    like = [w for w in words if Path(w).parent == path.parent and Path(w).suffix == path.suffix]
    with contextlib.suppress(OSError, ValueError):
        if {word for word in like if Path(word).is_file()} > {stray}:
            return str(path.parent / f"*{path.suffix}")
    return None


def refuse_swapped(command: Command, values: dict[str, Any]) -> None:
    """Refuse two settings of which each names what the other expects."""
    fields = {f.name: f for f in dataclasses.fields(command.options) if values.get(f.name)}
    paths = {name: Path(str(values[name])) for name in fields}
    for name, other in itertools.permutations(fields, 2):
        kind = KINDS.get(name) if fields[name].metadata.get("path") == FOLDER else None
        made = kind is not None and kind_of(paths[other]) == kind != kind_of(paths[name])
        tables = (name, other) == ("metadata", "features") and (
            holds(paths[name], FEATURES) > holds(paths[name], TABLES)
            and holds(paths[other], TABLES) > holds(paths[other], FEATURES)
        )
        if tables or (made and KINDS.get(other) != kind and not paths[name].is_file()):
            one, two = setting_name(fields[name]), setting_name(fields[other])
            raise UsageError(
                f"{one} and {two} are swapped: {one} is {paths[other]}, {two} is {paths[name]}; "
                f"see: snip {command.name} --help"
            )


def kind_of(folder: Path) -> str | None:
    """Return what a folder is that snip wrote, None of others; only the manifest's head is read."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # the last: ~NOBODY
        with (folder.expanduser() / "snip.json").open("rb") as file:
            found = re.search(rb'"kind": "(\w+)"', file.read(200))
        return found[1].decode() if found else None
    return None


def holds(path: Path, suffixes: tuple[str, ...]) -> bool:
    """Tell whether a file, or one in a folder, has one of these suffixes."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        path = path.expanduser()
        files = path.iterdir() if path.is_dir() else [path]
        return any(file.suffix.lower() in suffixes for file in files)
    return False


def bind(command: Command, words: list[str]) -> dict[str, str]:
    """Let fire match words to a function with the command's parameters; return the text of each."""
    import fire

    given: dict[str, str] = {}
    positional, flags = command.fields(positional=True), command.fields(positional=False)

    def note(*places: str, **texts: str) -> None:
        given.update(zip((field.name for field in positional), places, strict=False))
        given.update(texts)

    parameters = [parameter_of(f, str).replace(default=None) for f in (*positional, *flags)]
    note.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    noise = io.StringIO()  # fire prints what a function returns
    with contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
        fire.Fire(fire.decorators.SetParseFn(str)(note), words, name="snip", serialize=str)
    return {name: text for name, text in given.items() if text is not None}


def match_words(
    command: Command, words: list[str], kinds: dict[str, Any]
) -> tuple[list[str], dict[str, str]]:
    """Tell words in places from flags; return the former, and the text of each flag."""
    see = f"see: snip {command.name} --help"
    places: list[str] = []
    texts: dict[str, str] = {}
    several = {f.name for f in command.fields(positional=False) if f.metadata.get("several")}
    rest = iter(words)
    for word in rest:
        if word in ("--", "-"):
            raise UsageError(f"unexpected {word!r}; {see}")
        if not is_flag(word):
            places.append(word)
            continue
        flag, equals, text = word.partition("=")
        name = flag.removeprefix("--" if flag.startswith("--") else "-").replace("-", "_")
        if flag == "-o" and "out" in kinds:
            flag, name = "--out", "out"
        switch = name.removeprefix("no").lstrip("_")
        if not equals and kinds.get(name) is bool:
            text = "true"
        elif not equals and name not in kinds and kinds.get(switch) is bool:
            name, text = switch, "false"
        elif name not in kinds or (not flag.startswith("--") and len(name) > 1):
            raise UsageError(
                f"{command.name} has no flag {flag}{did_you_mean(name, kinds, '--')}; {see}"
            )
        elif not equals:
            text = next(rest, "--")
            if is_flag(text):
                hint = f" (one that begins with a dash: {flag}={text})" if text != "--" else ""
                raise UsageError(f"{flag} needs a value{hint}; {see}")
        if name in texts and name not in several:
            raise UsageError(f"--{name} is given more than once")
        texts[name] = f"{texts[name]},{text}" if name in texts else text
    return places, texts


def is_flag(word: str) -> bool:
    """Tell a flag from a value; a negative number is a value."""
    return word.startswith("--") or (len(word) > 1 and word[0] == "-" and word[1].isalpha())


def coerce(name: str, text: str, kind: Any) -> Any:
    """Turn the text of a setting into its declared type."""
    kind = bare_type(kind)
    if not text:  # an unset shell variable, say, which would mean the current folder
        raise UsageError(f"{name} is empty; give it a value or leave it out")
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise UsageError(f"--{name} is a switch: give it without a value, found {text!r}")
    try:
        if kind is int:
            value = float(text)
            if value != int(value):
                raise ValueError
            return int(text) if text.lstrip("+-").isdecimal() else int(value)
        if kind is float:
            return float(text)
    except (ValueError, OverflowError):
        what = "a whole number" if kind is int else "a number"
        raise UsageError(f"--{name} must be {what}, found {text!r}") from None
    return text


def overview() -> str:
    """Return what ``snip`` and ``snip --help`` print."""
    lines = [
        f"snip {__version__}: find near-duplicate image features, prove each one, keep the rest",
        "",
        "usage: snip COMMAND ...",
        "",
        "start here",
        f"  {COMMANDS['dedup'].example}    (you have features)",
        f"  {COMMANDS['embed'].example}    (you have pictures; then:)",
        "  snip dedup embedded --out clean",
        "  snip demo    (to try it)",
    ]
    for group in dict.fromkeys(command.group for command in COMMANDS.values()):
        lines += ["", group]
        lines += [f"  {c.name:<10} {c.does}" for c in COMMANDS.values() if c.group == group]
    lines += [
        "",
        "snip COMMAND --help says more.",
        "Every command takes --quiet (no progress) and --verbose (the time of each stage).",
    ]
    return "\n".join(lines)


def usage_words(command: Command) -> list[str]:
    """Return ``snip COMMAND PLACES --needed NEEDED``."""
    places = [
        field.name.upper() if is_required(field) else f"[{field.name.upper()}]"
        for field in command.fields(positional=True)
    ]
    needed = [f.name for f in command.fields(positional=False) if is_required(f)]
    return ["snip", command.name, *places, *(f"--{name} {name.upper()}" for name in needed)]


def command_help(command: Command) -> str:
    """Return what ``snip COMMAND --help`` prints."""
    places, flags = command.fields(positional=True), command.fields(positional=False)
    lines = [f"snip {command.name}: {command.does}", ""]
    lines += [f"usage: {' '.join(usage_words(command))} ..."]
    lines += ["", "arguments"] if places else []
    for field in places:
        lines += described(setting_name(field), field.metadata["help"])
    by_name = {field.name: field for field in sorted(flags, key=is_required, reverse=True)}
    groups = {head: names.split() for head, names in FLAG_GROUPS.get(command.name, {}).items()}
    named = {name for names in groups.values() for name in names}
    groups["other flags" if groups else "flags"] = [name for name in by_name if name not in named]
    for head, names in groups.items():
        lines += ["", head] if names else []
        for name in names:
            lines += described(setting_name(by_name[name]), meaning(by_name[name]))
    lines += ["", "example", f"  {command.example}"]
    return "\n".join([*lines, *(["", "-o is short for --out."] if "out" in by_name else [])])


def meaning(field: dataclasses.Field[Any]) -> str:
    """Return what a flag means, its choices, and its default."""
    choices = " | ".join(field.metadata.get("choices") or ())
    text = field.metadata["help"] + (f": {choices}" if choices else "")
    default = "needed" if is_required(field) else usual_value(field)
    return f"{text} [{default}]" if default else text


def described(name: str, text: str) -> list[str]:
    """Lay out one entry of a help page."""
    margin = " " * 22
    first = f"  {name:<19} " if len(name) < 20 else f"  {name}\n{margin}"
    body = textwrap.wrap(text, WIDTH - len(margin))
    return [first + body[0], *(margin + line for line in body[1:])]
