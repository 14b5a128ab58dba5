"""The table of commands: each one's settings, the function that runs it, its name in Python.

The command line and the library both read this table. A library function takes a command's
settings as keywords and returns what the command returns; the command line prints ``str()`` of it.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import os
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_type_hints

from snipdedup import config

WIDTH = 88  # of docstrings


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes
    ----------
    name : str
        As typed after ``snip``.
    group : str
        Its heading in ``snip --help``.
    options : type
        The class that declares its settings; its docstring is the line of help.
    target : str
        ``module:function`` that takes the settings and returns the result.
    function : str
        Its name in Python; empty for a command that is no library function.
    example : str
        A command line.
    """

    name: str
    group: str
    options: type[config.Settings]
    target: str
    function: str
    example: str

    @property
    def does(self) -> str:
        """One line of help, without a capital or a full stop."""
        text = (self.options.__doc__ or "").strip().removesuffix(".")
        return text[:1].lower() + text[1:]

    def fields(self, positional: bool) -> list[dataclasses.Field]:
        """Return the positional arguments, or the flags."""
        fields = dataclasses.fields(self.options)
        return [f for f in fields if bool(f.metadata.get("positional")) == positional]

    def run(self, options: config.Settings) -> Any:
        """Import the room that does the work and do it."""
        return load(self.target)(options)


COMMANDS = (
    Command(
        "train", "the chain", config.Train, "snipdedup.encoder.training:run", "train",
        "snip train img_emb --out encoder",
    ),
    Command(
        "compress", "the chain", config.Compress, "snipdedup.encoder.compress:run", "compress",
        "snip compress img_emb --encoder encoder --out descriptors",
    ),
    Command(
        "index", "the chain", config.Index, "snipdedup.index.build:run", "build_index",
        "snip index img_emb --encoder encoder --out index",
    ),
    Command(
        "dedup", "the chain", config.Dedup, "snipdedup.deduplication.run:run", "dedup",
        "snip dedup img_emb --metadata metadata --out clean",
    ),
    Command(
        "filter", "the chain", config.Filter, "snipdedup.metadata.filter:run", "filter",
        "snip filter metadata --is_dup clean --out kept",
    ),
    Command(
        "download", "the chain", config.Download, "snipdedup.downloading.run:run", "download",
        "snip download 'https://host/metadata_{part:04d}.parquet' meta --start 0 --end 10",
    ),
    Command(
        "report", "looking", config.Report, "snipdedup.inspection.report:run", "report",
        "snip report clean --images images",
    ),
    Command(
        "top", "looking", config.Top, "snipdedup.inspection.top:run", "top",
        "snip top clean -n 20",
    ),
    Command(
        "diff", "looking", config.Diff, "snipdedup.inspection.diff:run", "diff",
        "snip diff clean stricter",
    ),
    Command(
        "audit", "trust", config.Audit, "snipdedup.auditing.audit:run", "audit",
        "snip audit clean img_emb",
    ),
    Command(
        "search", "looking", config.Search, "snipdedup.inspection.search:run", "search",
        "snip search 123 --index index --metadata metadata",
    ),
    Command(
        "eval", "trust", config.Eval, "snipdedup.evaluation.evaluate:run", "evaluate",
        "snip eval img_emb --out eval",
    ),
    Command(
        "plan", "trying", config.Plan, "snipdedup.planning:run", "plan",
        "snip plan --rows 2.1e9 --dim 768 --cores 16 --memory 32GB",
    ),
    Command(
        "demo", "trying", config.Demo, "snipdedup.demo:run", "",
        "snip demo",
    ),
)  # fmt: skip
BY_NAME = {command.name: command for command in COMMANDS}
BY_FUNCTION = {command.function: command for command in COMMANDS if command.function}
# Names of `snipdedup` that are no commands.
LATE = {
    "Result": "snipdedup.deduplication.result:Result",
    "open_result": "snipdedup.deduplication.run:open_result",
}
# Functions that take an array, and so return their result in memory.
IN_MEMORY = {"dedup": "snipdedup.deduplication.run:dedup"}


def load(target: str) -> Callable[..., Any]:
    """Import ``module:function``."""
    module, _, name = target.partition(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return loaded


def is_required(field: dataclasses.Field) -> bool:
    """Tell whether a setting has no default."""
    return field.default is dataclasses.MISSING


def bare_type(kind: Any) -> Any:
    """Return ``T`` of ``T | None``."""
    if isinstance(kind, UnionType):
        return next(k for k in get_args(kind) if k is not NoneType)
    return kind


def nearest_name(word: str, names: Iterable[str]) -> str | None:
    """Return the name that ``word`` may be a misspelling of; None where none is close."""
    return next(iter(difflib.get_close_matches(word, list(names), 1, 0.6)), None)


def library_fields(command: Command) -> list[dataclasses.Field]:
    """Return the settings that a library function takes: positional ones first."""
    fields = [*command.fields(positional=True), *command.fields(positional=False)]
    return [field for field in fields if not field.metadata.get("command_only")]


def annotation(field: dataclasses.Field, kind: Any) -> Any:
    """Return a setting's type in Python: choices as literals, paths as text or path objects."""
    bare = bare_type(kind)
    if field.metadata.get("choices"):
        bare = Literal[tuple(field.metadata["choices"])]
    elif field.metadata.get("path"):
        bare = str | os.PathLike[str]
    return bare | None if NoneType in get_args(kind) else bare


def signature_of(command: Command) -> inspect.Signature:
    """Return the signature of a library function, each default as config.py declares it."""
    kinds = get_type_hints(command.options)
    positional, keyword = (
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )
    return inspect.Signature(
        [
            inspect.Parameter(
                field.name,
                positional if field.metadata.get("positional") else keyword,
                default=inspect.Parameter.empty if is_required(field) else field.default,
                annotation=annotation(field, kinds[field.name]),
            )
            for field in library_fields(command)
        ]
    )


def docstring_of(command: Command) -> str:
    """Return the docstring of a library function, in numpy's style."""
    lines = [f"{command.does[0].upper()}{command.does[1:]}: ``snip {command.name}``.", ""]
    lines += ["Parameters", "----------"]
    for field in library_fields(command):
        usual = config.usual_value(field)
        text = field.metadata["help"] + (f" (default: {usual})" if usual else "")
        lines.append(field.name)
        lines += textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ")
    lines += ["", "Raises", "------", "snipdedup.SnipError"]
    lines += ["    If it cannot be done: says what was expected, what was found and what to do."]
    return "\n".join(lines)


def library_function(name: str) -> Callable[..., Any]:
    """Make the function of ``snipdedup`` that does what a command does."""
    command, target = BY_FUNCTION[name], IN_MEMORY.get(name)
    signature = signature_of(command)

    def call(*given: Any, **settings: Any) -> Any:
        unknown = next((word for word in settings if word not in signature.parameters), None)
        if unknown is not None:
            close = nearest_name(unknown, signature.parameters)
            hint = f"; did you mean {close!r}?" if close else ""
            raise TypeError(f"{name}() got an unexpected keyword {unknown!r}{hint}")
        try:
            bound = signature.bind(*given, **settings).arguments
        except TypeError as error:
            raise TypeError(f"{name}() {error}") from None
        values = {
            word: os.fspath(value) if isinstance(value, os.PathLike) else value
            for word, value in bound.items()
        }
        if target is not None:
            return load(target)(**values)
        return command.run(command.options(**values))

    call.__name__ = call.__qualname__ = name
    call.__module__ = "snipdedup"
    call.__doc__ = docstring_of(command)
    call.__signature__ = signature  # type: ignore[attr-defined]
    call.target = target or command.target  # type: ignore[attr-defined]
    return call
