"""How commands and their settings are declared and parsed, and how commands become functions.

`config` declares them. The command line, its help, ``docs/cli.md`` and the library read what it
declares, so that each name, type, default and meaning is written once.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import os
import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, dataclass_transform, get_args, get_type_hints

from snipdedup.errors import UsageError

# What a path may be: on this machine (a file to write, a folder, a file to read), on it or in a
# store (a folder to write), or anywhere.
WRITTEN, FOLDER, FILE, STORED, ANYWHERE = "written", "folder", "file", "stored", "anywhere"
URL = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # a Path makes one slash of two
DECIMAL = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
BYTE_UNITS = ("", "k", "m", "g", "t")
MOST_FILES = 10**6  # of a set, by their numbers
# The Python types in which JSON returns a value of a declared type.
SAVED = {
    bool: (bool, int), int: (int,), float: (float, int), str: (str,), NoneType: (NoneType,),
}  # fmt: skip
WIDTH = 88  # of docstrings
# Names of `snipdedup` that are no commands.
LATE = {
    "Result": "snipdedup.deduplication.result:Result",
    "open_result": "snipdedup.deduplication.run:open_result",
}
# Functions that take an array, and so return their result in memory.
IN_MEMORY = {"dedup": "snipdedup.deduplication.run:dedup"}


def option(default: Any, help: str, low: Any = None, high: Any = None, **about: Any) -> Any:
    """Declare a flag; a number lies from ``low`` to ``high``, both ends allowed.

    So does each number of a text such as ``4,8,16``. ``[...]`` at the end of the help is what
    happens by default, where None or True does not say it. Others are ``choices``: the allowed
    values; ``words``: those of a list by comma; ``path``: `WRITTEN`, `FOLDER`, `FILE`,
    `STORED` or `ANYWHERE`; ``amount``: it is read by `parse_bytes`; ``several``: it may be typed
    again, which adds to it; ``command_only``: the library does not have it.
    """
    meaning, _, usual = help.partition(" [")
    about |= {"help": meaning, "usual": usual.removesuffix("]"), "low": low, "high": high}
    return dataclasses.field(default=default, metadata=about)


def required(help: str, **about: Any) -> Any:
    """Declare a flag without a default; see `option`."""
    return option(dataclasses.MISSING, help, **about)


def argument(help: str, default: Any = dataclasses.MISSING, **about: Any) -> Any:
    """Declare a positional argument; see `option`."""
    return option(default, help, positional=True, **about)


def refuse(*rules: tuple[object, str]) -> None:
    """Raise UsageError with the text of the first rule whose condition holds."""
    for wrong, text in rules:
        if wrong:
            raise UsageError(text)


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Settings:
    """Base of all settings: checks what `option` declares of each, then how they go together."""

    def __post_init__(self) -> None:
        kinds = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            name, value, about = field.name, getattr(self, field.name), field.metadata
            if value is None:
                continue
            choices, low, high = about.get("choices"), about["low"], about["high"]
            if bare_type(kinds[name]) is not str or low is None:  # not numbers by comma
                refuse_type(name, value, bare_type(kinds[name]))
            if choices and value not in choices:
                known = ", ".join(choices)
                raise UsageError(f"{setting_name(field)} must be one of {known}, found {value!r}")
            if low is not None and isinstance(value, Real):
                # numpy's numbers become Python's, which JSON can hold
                value = int(value) if isinstance(value, Integral) else float(value)
                object.__setattr__(self, name, value)
                if not low <= value <= high:
                    raise UsageError(
                        f"--{name} must lie between {low:g} and {high:g}, found {value}"
                    )
            elif low is not None and re.search("str|Any", str(field.type)):
                self.numbers(name)
            elif low is not None:
                raise UsageError(f"--{name} must be a number, found {value!r}")
            if about.get("words"):
                self.words(name)
            if about.get("path") in (WRITTEN, FOLDER, FILE, STORED):
                refuse_url(field, value)
            if about.get("amount"):
                parse_bytes(value)
        self._check()

    def __hash__(self) -> int:
        return hash(type(self))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in vars(self).items())})"

    def _check(self) -> None:
        """Raise UsageError for settings that do not go together."""

    def is_given(self, name: str) -> bool:
        """Tell whether a setting that has a default differs from it."""
        value, default = getattr(self, name), getattr(type(self), name)
        return value is not default and not (isinstance(default, str | int) and value == default)

    def numbers(self, name: str) -> list[int]:
        """Return the whole numbers of a setting such as ``4,8,16``: ascending, each once."""
        text, about = getattr(self, name), self.__dataclass_fields__[name].metadata
        try:
            numbers = [] if text is None else sorted({int(n) for n in str(text).split(",")})
        except ValueError:
            numbers = [-1]
        low, high = about["low"], about["high"]
        if numbers and not low <= numbers[0] <= numbers[-1] <= high:
            raise UsageError(
                f"--{name} must be whole numbers from {low} to {high} such as 4,8,16, found "
                f"{text!r}"
            )
        return numbers

    def words(self, name: str) -> list[str]:
        """Return the words of a list by comma, such as ``--export datacomp,keys``."""
        text, known = getattr(self, name) or "", self.__dataclass_fields__[name].metadata["words"]
        words = [word.strip() for word in text.split(",") if word.strip()]
        if not set(words) <= set(known):
            raise UsageError(f"--{name} must be one or more of {', '.join(known)}, found {text!r}")
        return words

    def some(self, *names: str) -> dict[str, Any]:
        """Return some of the settings by their names."""
        return {name: getattr(self, name) for name in names}

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values for manifests, positional ones first."""
        flags_last = sorted(dataclasses.fields(self), key=lambda f: "positional" not in f.metadata)
        return self.some(*(field.name for field in flags_last))


def refuse_type(name: str, value: Any, kind: Any) -> None:
    """Refuse a value of another type than is declared, which the command line would not make."""
    fits, expected = True, ""
    if kind is bool:
        fits, expected = not isinstance(value, str) and value in (0, 1), "True or False"
    elif kind is int:
        whole = isinstance(value, Real) and value is not True and value is not False
        fits, expected = whole and value % 1 == 0, "a whole number"
    elif kind is str:
        fits, expected = isinstance(value, str | os.PathLike), "a text"
    if not fits:
        raise UsageError(f"--{name} must be {expected}, found {value!r}")


def refuse_url(field: dataclasses.Field[Any], value: Any) -> None:
    """Refuse a URL where a local path is meant: it would become a folder named ``s3:``."""
    if not isinstance(value, str | Path) or not URL.match(str(value)):
        return
    stored = field.metadata["path"] == STORED
    if stored and "://" in str(value) and not re.match("https?:|file:", str(value), re.I):
        return
    url = re.sub(r"(:/+)[^/]*@", r"\1", str(value)).partition("?")[0]  # without secrets
    todo = "fetch it first"
    if field.metadata["path"] == WRITTEN:
        todo = "snip writes to this machine only: give a path, and copy what is there afterwards"
        todo += "; SOURCE comes first" if field.metadata.get("positional") else ""
    elif stored:
        todo = "or give one of a store, such as s3://bucket/folder, as a text"
    elif field.metadata["path"] == FOLDER and not Path(url).suffix:
        todo += f": snip download {url} FOLDER"
    raise UsageError(f"{setting_name(field)} {url}: expected a local path, found a URL; {todo}")


def mistyped(kind: type[Settings], saved: dict[str, Any]) -> str | None:
    """Return the first of a run's saved settings that is not of its declared type, or None.

    What may be anything (paths, numbers by comma) is saved as a text or a list of plain values.
    """
    for name, declared in get_type_hints(kind).items():
        bare = get_args(declared) or (declared,)
        kinds = (str, float, NoneType) if Any in bare else bare
        types = [saved_as for known in kinds for saved_as in SAVED[known]]
        value = saved.get(name)
        for plain in value if Any in bare and isinstance(value, list) else [value]:
            whole = isinstance(plain, float) and plain.is_integer() and int in types
            if name in saved and type(plain) not in types and not whole:
                return name
    return None


@dataclass(frozen=True)
class Command:
    """One command, as `config` declares it."""

    name: str  # as typed after ``snip``
    group: str  # its heading in ``snip --help``
    module: str  # its function ``run`` takes the settings and returns the result
    example: str  # a command line
    function: str  # its name in Python
    options: type[Settings]  # the docstring is the line of help

    @property
    def does(self) -> str:
        """One line of help, without a capital or a full stop."""
        text = (self.options.__doc__ or "").strip().removesuffix(".")
        return text[:1].lower() + text[1:]

    def fields(self, positional: bool) -> list[dataclasses.Field[Any]]:
        """Return the positional arguments, or the flags."""
        fields = dataclasses.fields(self.options)
        return [f for f in fields if bool(f.metadata.get("positional")) == positional]

    def run(self, options: Settings) -> Any:
        """Import the room that does the work and do it."""
        return load(f"{self.module}:run")(options)


DECLARED: dict[str, Command] = {}  # by name, in the order of the help
S = TypeVar("S", bound=type[Settings])


@dataclass_transform(frozen_default=True, kw_only_default=True)
def command(
    name: str, group: str, module: str, example: str, function: str | None = None
) -> Callable[[S], S]:
    """Make a class a `Command`; ``function`` is the name in Python where that differs."""

    def declare(options: S) -> S:
        dataclass(frozen=True, kw_only=True, repr=False, eq=False)(options)
        words = f"snip {name} {example}".strip()
        made = Command(name, group, f"snipdedup.{module}", words, function or name, options)
        DECLARED[name] = made
        return options

    return declare


def load(target: str) -> Callable[..., Any]:
    """Import ``module:function``."""
    module, _, name = target.partition(":")
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return loaded


def setting_name(field: dataclasses.Field[Any]) -> str:
    """Return a setting as it is typed: ``FEATURES`` or ``--out``."""
    return field.name.upper() if field.metadata.get("positional") else f"--{field.name}"


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Tell whether a setting has no default."""
    return field.default is dataclasses.MISSING


def usual_value(field: dataclasses.Field[Any]) -> str:
    """Return what a setting is when it is not given, for its help; empty where that is nothing."""
    nothing = field.default is None or field.default is False or is_required(field)
    return field.metadata["usual"] or ("" if nothing else str(field.default))


def bare_type(kind: Any) -> Any:
    """Return ``T`` of ``T | None``."""
    if isinstance(kind, UnionType):
        return next(k for k in get_args(kind) if k is not NoneType)
    return kind


def did_you_mean(word: str, names: Iterable[str], mark: str = "") -> str:
    """Return ``, did you mean X?``, or nothing where no name is close."""
    close = difflib.get_close_matches(word.lstrip("-").replace("-", "_"), list(names), 1, 0.6)
    return f", did you mean {mark}{close[0]}?" if close else ""


def library_function(command: Command) -> Callable[..., Any]:
    """Make the function of ``snipdedup`` that does what a command does."""
    name = command.function
    fields = [*command.fields(positional=True), *command.fields(positional=False)]
    fields = [field for field in fields if not field.metadata.get("command_only")]
    kinds = get_type_hints(command.options)
    signature = inspect.Signature([parameter_of(field, kinds[field.name]) for field in fields])

    def call(*given: Any, **settings: Any) -> Any:
        for word in settings:
            if word not in signature.parameters:
                hint = did_you_mean(word, signature.parameters)
                raise TypeError(f"{name}() got an unexpected keyword {word!r}{hint}")
        try:
            bound = signature.bind(*given, **settings).arguments
        except TypeError as error:
            raise TypeError(f"{name}() {error}") from None
        values = {
            word: os.fspath(value) if isinstance(value, os.PathLike) else value
            for word, value in bound.items()
        }
        if name in IN_MEMORY:
            return load(IN_MEMORY[name])(**values)
        return command.run(command.options(**values))

    call.__name__ = call.__qualname__ = name
    call.__module__ = "snipdedup"
    call.__doc__ = docstring_of(command, fields)
    call.__signature__ = signature  # type: ignore[attr-defined]
    call.target = IN_MEMORY.get(name, f"{command.module}:run")  # type: ignore[attr-defined]
    return call


def parameter_of(field: dataclasses.Field[Any], kind: Any) -> inspect.Parameter:
    """Return a setting as a parameter: choices as literals, paths as text or path objects."""
    bare = bare_type(kind)
    if field.metadata.get("choices"):
        bare = Literal[tuple(field.metadata["choices"])]
    elif field.metadata.get("path"):
        bare = str | os.PathLike[str]
    return inspect.Parameter(
        field.name,
        inspect.Parameter.POSITIONAL_OR_KEYWORD
        if field.metadata.get("positional")
        else inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if is_required(field) else field.default,
        annotation=bare | None if NoneType in get_args(kind) else bare,
    )


def docstring_of(command: Command, fields: list[dataclasses.Field[Any]]) -> str:
    """Return the docstring of a library function, in numpy's style."""
    lines = [f"{command.does[0].upper()}{command.does[1:]}: ``snip {command.name}``.", ""]
    lines += ["Parameters", "----------"]
    for field in fields:
        usual = usual_value(field)
        text = field.metadata["help"] + (f" (default: {usual})" if usual else "")
        lines.append(field.name)
        lines += textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="    ")
    lines += ["", "Raises", "------", "snipdedup.SnipError"]
    lines += ["    If it cannot be done: says what was expected, what was found and what to do."]
    return "\n".join(lines)


def parse_bytes(text: str) -> int:
    """Parse ``2GB``, ``500 MB``, ``1.5g``, ``2GiB`` (powers of 1024) or a plain number of bytes."""
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt]?)(i?b)?\s*", str(text).lower())
    try:
        base = 1024 if match and match[3] == "ib" else 1000
        value = float(match[1]) * base ** BYTE_UNITS.index(match[2]) if match else -1.0
    except ValueError:
        value = -1.0
    if value <= 0:
        raise UsageError(f"expected an amount of memory such as 2GB or 500MB, found {text!r}")
    return int(value)


def check_file_range(start: int | None, end: int | None) -> None:
    """Check that ``--start`` and ``--end`` are a range of file numbers."""
    first = start or 0
    refuse(
        (first < 0 or (end is not None and end <= first),
         "--start and --end are file numbers from 0, the end exclusive; found "
         f"--start {first} --end {end}"),
        (max(first, end or 0) > MOST_FILES,
         f"--start and --end are file numbers up to {MOST_FILES:,}, not rows"),
    )  # fmt: skip


def parse_epsilons(value: Any) -> list[float]:
    """Parse ``.05,.03``, a number or a list of them; an empty list for None."""
    items = value.split(",") if isinstance(value, str) else value
    items = [] if items is None else items if isinstance(items, list | tuple) else [items]
    try:
        numbers = [float(item) for item in items]
    except (TypeError, ValueError):
        numbers = [-1.0]
    if not all(0 <= number <= 2 for number in numbers):
        raise UsageError(f"--epsilon must be numbers from 0 to 2, by comma, found {value!r}")
    return numbers


def split_also(given: Any) -> list[tuple[Any, float | None]]:
    """Return the second features that ``--also`` names, each with its threshold or None.

    ``given`` is FEATURES:THRESHOLD as a text, several by comma; (features, threshold); or a list of
    such. The last colon counts, where a number follows: paths and URLs have others.
    """
    items = given if isinstance(given, list) else [] if given is None else [given]
    if isinstance(given, str):
        items = [word.strip() for word in given.split(",") if word.strip()]
    elif isinstance(given, tuple) and not (len(given) == 2 and is_limit(given[1])):
        items = list(given)
    found = []
    for item in items:
        source, limit = item if isinstance(item, tuple) and len(item) == 2 else (item, None)
        if isinstance(item, str):
            head, _, number = item.rpartition(":")
            if head and DECIMAL.fullmatch(number):
                source, limit = head, float(number)
        if not is_limit(limit) or (limit is not None and not -1 <= limit <= 1):
            raise UsageError(
                f"--also must be FEATURES:THRESHOLD, a cosine from -1 to 1, found threshold {limit}"
            )
        found.append((source, None if limit is None else float(limit)))
    if given is not None and not found:
        raise UsageError("--also names no features; expected FEATURES:THRESHOLD")
    return found


def is_limit(value: Any) -> bool:
    """Tell whether a value is a number, or None."""
    return value is None or (isinstance(value, Real) and not isinstance(value, bool))


def keep_rules(text: str) -> tuple[list[tuple[str, str]], str]:
    """Parse ``max:similarity,min:width,last``.

    Returns (``max`` or ``min``, column) for each rule; and ``first``, ``last`` or ``random``, which
    decides among rows that are still even.
    """
    *words, last = (word.strip() for word in text.split(","))
    if last not in ("first", "last", "random"):
        words, last = [*words, last], "first"
    rules = [(way, column) for way, _, column in (word.partition(":") for word in words)]
    if not all(way in ("max", "min") and column for way, column in rules):
        raise UsageError(
            "--keep must be first, last or random, or rules such as max:width,min:similarity,first "
            f"(the one without a column last), found {text!r}"
        )
    return rules, last
