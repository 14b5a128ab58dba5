"""The table of commands. The only file that prints an error or sets an exit status.

Fire matches words to parameters; the table hands it functions that only note the call. It runs
after every word has found its place and every value its type, so a mistyped flag costs nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import difflib
import gc
import importlib
import inspect
import io
import os
import select
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_type_hints

from snipdedup import __version__, config
from snipdedup.errors import SnipError, UsageError, VerdictError

WIDTH = 96
GC_OBJECTS = 100_000  # new ones between looks for dead ones: those of imports all live on
DONE, FAILED, WRONG_USAGE, INTERRUPTED = 0, 1, 2, 130
CLOSED = 141  # as a shell says that a process ended by SIGPIPE


@dataclass(frozen=True)
class Command:
    """One command: where its settings are declared and which function runs it."""

    name: str
    group: str
    does: str
    options: type[config.Settings]
    target: str
    example: str

    def fields(self, positional: bool) -> list[dataclasses.Field]:
        """Return the positional arguments, or the flags."""
        fields = dataclasses.fields(self.options)
        return [f for f in fields if bool(f.metadata.get("positional")) == positional]

    def run(self, options: config.Settings) -> str | None:
        """Import the room that does the work, do it, return what to print."""
        module, _, name = self.target.partition(":")
        return getattr(importlib.import_module(module), name)(options)


COMMANDS = (
    Command(
        "train", "the chain", "train the SNIP encoder on features", config.Train,
        "snipdedup.encoder.training:run", "snip train img_emb --out encoder",
    ),
    Command(
        "compress", "the chain", "write descriptors, shard for shard", config.Compress,
        "snipdedup.encoder.compress:run",
        "snip compress img_emb --encoder encoder --out descriptors",
    ),
    Command(
        "index", "the chain", "build a sharded IVFPQ index", config.Index,
        "snipdedup.index.build:run", "snip index img_emb --encoder encoder --out index",
    ),
    Command(
        "dedup", "the chain", "find duplicates, prove them, write the rows that stay",
        config.Dedup, "snipdedup.deduplication.run:run",
        "snip dedup img_emb --metadata metadata --out clean",
    ),
    Command(
        "filter", "the chain", "apply a mask to metadata and features", config.Filter,
        "snipdedup.metadata.filter:run", "snip filter metadata --is_dup clean --out kept",
    ),
    Command(
        "download", "the chain", "fetch a range of metadata files, filtered by a mask if given",
        config.Download, "snipdedup.downloading.run:run",
        "snip download 'https://host/metadata_{part:04d}.parquet' meta --start 0 --end 10",
    ),
    Command(
        "report", "looking", "one page to look at what goes, with pictures where there are some",
        config.Report, "snipdedup.inspection.report:run", "snip report clean --images images",
    ),
    Command(
        "top", "looking", "the rows that stand for most others", config.Top,
        "snipdedup.inspection.top:run", "snip top clean -n 20",
    ),
    Command(
        "diff", "looking", "what changed between two runs over the same rows", config.Diff,
        "snipdedup.inspection.diff:run", "snip diff clean stricter",
    ),
    Command(
        "audit", "trust", "prove a finished run against the raw features", config.Audit,
        "snipdedup.auditing.audit:run", "snip audit clean img_emb",
    ),
    Command(
        "search", "looking", "find the nearest rows to a row, a vector or a text", config.Search,
        "snipdedup.inspection.search:run", "snip search 123 --index index --metadata metadata",
    ),
    Command(
        "eval", "trust", "measure what descriptors and codes keep, against brute force",
        config.Eval, "snipdedup.evaluation.evaluate:run", "snip eval img_emb --out eval",
    ),
    Command(
        "plan", "trying", "time, memory and disk of a run, before it", config.Plan,
        "snipdedup.evaluation.plan:run",
        "snip plan --rows 2.1e9 --dim 768 --cores 16 --memory 32GB",
    ),
    Command(
        "demo", "trying", "the whole chain on pictures that it makes itself", config.Demo,
        "snipdedup.demo:run", "snip demo",
    ),
)  # fmt: skip
BY_NAME = {command.name: command for command in COMMANDS}
GO_ON = ("train", "compress", "index", "dedup", "filter", "download", "demo")  # when run again


def main(argv: Sequence[str] | None = None) -> None:
    """Run ``snip`` and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    if argv is not None or sys.getprofile() or sys.gettrace():  # a caller, who goes on
        sys.exit(run(list(sys.argv[1:] if argv is None else argv)))
    gc.set_threshold(GC_OBJECTS)
    status = run(sys.argv[1:])
    # To take apart what torch and a large run hold, object by object, takes a third of a second.
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe, which was dealt with
            stream.flush()
    os._exit(status)


def run(words: list[str]) -> int:
    """Run one command line and return its exit status."""
    try:
        try:
            said, status = answer(words), DONE
        except VerdictError as verdict:
            said, status = str(verdict), FAILED
        return show(said, status)
    except UsageError as error:
        return complain(error, WRONG_USAGE)
    except SnipError as error:
        return complain(error, FAILED)
    except KeyboardInterrupt:
        return complain(interrupted(words), INTERRUPTED)
    except MemoryError as error:
        return complain(f"out of memory: {error}; lower --max_memory or --chunk_rows", FAILED)
    except RuntimeError as error:
        if "home directory" not in str(error):  # pathlib's, of ~SOMEONE
            raise
        return complain(f"a path begins with ~ and a name that no user here has: {error}", FAILED)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and nobody_reads():  # of a command that shows steps
            return hush(CLOSED)
        return complain(f"{error.filename or 'input/output'}: {error.strerror or error}", FAILED)


def show(said: str | None, status: int) -> int:
    """Print what a command came to; return the status, whether or not anyone reads on."""
    try:
        if said:
            print(said)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe (head, less) has seen enough
        hush(status)
    return status


def nobody_reads() -> bool:
    """Tell whether stdout is a pipe whose reader is gone."""
    if not hasattr(select, "poll"):
        return False
    asked = select.poll()
    with contextlib.suppress(OSError, ValueError):  # no file: a test's, say
        asked.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in asked.poll(0))


def hush(status: int) -> int:
    """Let stdout lead nowhere, so that nothing fails when it is closed; return the status."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def answer(words: list[str]) -> str | None:
    """Do what a command line asks for; return what to print."""
    if words[:1] == ["help"]:
        words = [*words[1:], "--help"]
    if not words or words in (["--help"], ["-h"]):
        return overview()
    if words == ["--version"]:
        return f"snip {__version__}"
    command = find_command(words)
    if {"--help", "-h"} & set(words[1:]):
        return command_help(command)
    return command.run(parse(command, words[1:]))


def interrupted(words: list[str]) -> str:
    """Say what is left of a command that was interrupted."""
    if words[:1] and words[0] in GO_ON:
        return "interrupted; the same command goes on from what is complete"
    return "interrupted; what it had not finished is not kept"


def complain(what: object, status: int) -> int:
    """Print one line to stderr, if anyone reads it; return the status."""
    with contextlib.suppress(BrokenPipeError):
        print(f"snip: {what}", file=sys.stderr, flush=True)
    return status


def find_command(words: list[str]) -> Command:
    """Return the command that the first word names."""
    name = words[0]
    if name not in BY_NAME:
        what = "flag" if name.startswith("-") else "command"
        raise UsageError(f"no {what} {name!r}{nearest(name, BY_NAME)}; see: snip --help")
    return BY_NAME[name]


def parse(command: Command, words: list[str]) -> config.Settings:
    """Turn the words after a command's name into its settings, by way of fire.

    Raises
    ------
    UsageError
        For an unknown flag, a stray or missing word, or a value of the wrong type.
    """
    kinds = get_type_hints(command.options)
    words = [spell_out(word, kinds) for word in words]
    check_flags(command, words)
    texts = bind(command, words)
    values = {name: coerce(name, text, kinds[name]) for name, text in texts.items()}
    return command.options(**values)


def bind(command: Command, words: list[str]) -> dict[str, str]:
    """Let fire match words to parameters; return the texts given, by parameter."""
    import fire

    calls: list[dict[str, str]] = []
    table = {command.name: recorder(command, calls)}
    noise = io.StringIO()
    try:
        with contextlib.redirect_stderr(noise), contextlib.redirect_stdout(noise):
            fire.Fire(table, [command.name, *words], name="snip", serialize=lambda _: "")
    except fire.core.FireExit:
        raise UsageError(explain(command, words, bool(calls))) from None
    return calls[-1]


class Noted:
    """What a recorded call returns to fire: nothing that further words could reach into."""

    __slots__ = ()

    def __dir__(self) -> list[str]:
        return []


def recorder(command: Command, calls: list[dict[str, str]]) -> Callable[..., Noted]:
    """Return a function with the command's signature that notes its arguments as texts."""
    import fire

    def call(**given: str) -> Noted:
        calls.append({name: text for name, text in given.items() if text is not None})
        return Noted()

    def positional(*given: str, **flags: str) -> Noted:
        names = [field.name for field in command.fields(positional=True)]
        return call(**dict(zip(names, given, strict=False)), **flags)

    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = [
        inspect.Parameter(
            field.name, kind, default=inspect.Parameter.empty if is_required(field) else None
        )
        for kind, is_positional in zip(kinds, (True, False), strict=True)
        for field in command.fields(is_positional)
    ]
    positional.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return fire.decorators.SetParseFn(str)(positional)  # 2024_01 stays a text


def is_required(field: dataclasses.Field) -> bool:
    """Tell whether a setting has no default."""
    return field.default is dataclasses.MISSING


def spell_out(word: str, kinds: dict[str, Any]) -> str:
    """Give a switch its value, so that fire does not take the next word for it."""
    name = flag_name(word)
    if not is_flag(word) or "=" in word:
        return word
    if kinds.get(name) is bool:
        return f"--{name}=true"
    switch = name.removeprefix("no").lstrip("_")
    return f"--{switch}=false" if kinds.get(switch) is bool else word


def check_flags(command: Command, words: list[str]) -> None:
    """Refuse unknown flags, and flags that lack their value."""
    kinds = get_type_hints(command.options)
    for place, word in enumerate(words):
        if word in ("--", "-"):
            raise UsageError(f"unexpected {word!r}; see: snip {command.name} --help")
        if not is_flag(word):
            continue
        flag, equals, _ = word.partition("=")
        name = flag_name(word)
        if name not in kinds or (not flag.startswith("--") and len(name) > 1):
            raise UsageError(
                f"{command.name} has no flag {flag}{nearest(name, kinds, '--')}; "
                f"see: snip {command.name} --help"
            )
        follows = words[place + 1] if place + 1 < len(words) else None
        if not equals and (follows is None or is_flag(follows)):
            hint = f" (one that begins with a dash: {flag}={follows})" if follows else ""
            raise UsageError(f"{flag} needs a value{hint}; see: snip {command.name} --help")
        if sum(is_flag(other) and flag_name(other) == name for other in words) > 1:
            raise UsageError(f"{flag} is given more than once")


def flag_name(word: str) -> str:
    """Return the setting that a flag names: ``--with-dashes=3`` is ``with_dashes``."""
    flag = word.partition("=")[0]
    return flag.removeprefix("--" if flag.startswith("--") else "-").replace("-", "_")


def is_flag(word: str) -> bool:
    """Tell a flag from a value; a negative number is a value."""
    return word.startswith("--") or (len(word) > 1 and word[0] == "-" and word[1].isalpha())


def explain(command: Command, words: list[str], was_called: bool) -> str:
    """Say which word fire could not place."""
    kinds = get_type_hints(command.options)
    values, skip = [], False
    for word in words:
        if is_flag(word):
            skip = "=" not in word
        elif skip:
            skip = False
        else:
            values.append(word)
    stray = values[len(command.fields(positional=True)) :]
    if was_called and stray:
        close = nearest(stray[0], kinds, "--")
        if stray[0].lower() in ("true", "false"):
            close = " (a switch takes no value)"
        return f"unexpected word {stray[0]!r}{close}; see: snip {command.name} --help"
    given = {flag_name(word) for word in words if is_flag(word)}
    names = [f.name for f in command.fields(positional=True)][: len(values)]
    if given & set(names):
        return f"{min(given & set(names)).upper()} is given more than once"
    missing = [
        f.name.upper() if f.metadata.get("positional") else f"--{f.name}"
        for f in (*command.fields(positional=True), *command.fields(positional=False))
        if is_required(f) and f.name not in given and f.name not in names
    ]
    return f"{command.name} needs {', '.join(missing)}; for example: {command.example}"


def nearest(word: str, names: Any, mark: str = "") -> str:
    """Return ``, did you mean X?``, or nothing where no name is close."""
    found = difflib.get_close_matches(word.lstrip("-").replace("-", "_"), list(names), 1, 0.6)
    return f", did you mean {mark}{found[0]}?" if found else ""


def coerce(name: str, text: str, kind: Any) -> Any:
    """Turn the text of a setting into its declared type.

    Raises
    ------
    UsageError
        If the text is not of that type.
    """
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


def bare_type(kind: Any) -> Any:
    """Return ``T`` of ``T | None``."""
    if isinstance(kind, UnionType):
        return next(k for k in get_args(kind) if k is not NoneType)
    return kind


def overview() -> str:
    """Return what ``snip`` and ``snip --help`` print."""
    lines = [
        f"snip {__version__}: find near-duplicate image features, prove each one, keep the rest",
        "",
        "usage: snip COMMAND ...",
    ]
    for group in dict.fromkeys(command.group for command in COMMANDS):
        lines += ["", group]
        lines += [f"  {c.name:<10} {c.does}" for c in COMMANDS if c.group == group]
    lines += [
        "",
        "start here",
        "  snip demo",
        "  snip dedup img_emb --metadata metadata --out clean",
        "",
        "snip COMMAND --help says more.",
    ]
    return "\n".join(lines)


def command_help(command: Command) -> str:
    """Return what ``snip COMMAND --help`` prints."""
    places = command.fields(positional=True)
    usage = ["snip", command.name]
    usage += [f.name.upper() if is_required(f) else f"[{f.name.upper()}]" for f in places]
    needed = [f for f in command.fields(positional=False) if is_required(f)]
    usage += [*(f"--{f.name} {f.name.upper()}" for f in needed), "..."]
    lines = [f"snip {command.name}: {command.does}", "", f"usage: {' '.join(usage)}"]
    lines += ["", "arguments"] if places else []
    for field in places:
        lines += described(field.name.upper(), field.metadata["help"])
    lines += ["", "flags"]
    for field in (*needed, *(f for f in command.fields(positional=False) if not is_required(f))):
        lines += described(f"--{field.name}", flag_help(field))
    lines += ["", "example", f"  {command.example}"]
    return "\n".join(lines)


def flag_help(field: dataclasses.Field) -> str:
    """Return a flag's meaning, its choices and its default."""
    text = field.metadata["help"]
    choices = field.metadata.get("choices")
    if choices:
        text += f": {' | '.join(choices)}"
    if is_required(field):
        return f"{text} [needed]"
    usual = config.usual_value(field)
    return f"{text} [{usual}]" if usual else text


def described(name: str, text: str) -> list[str]:
    """Lay out one entry of a help page."""
    body = textwrap.wrap(text, WIDTH - 22)
    first = f"  {name:<19} {body[0]}" if len(name) < 20 else f"  {name}\n{'':22}{body[0]}"
    return [first, *(f"{'':22}{line}" for line in body[1:])]
