"""Files moved into a folder and back: no step overwrites a file, and any step can be done again.

A log of all moves is whole on disk before the first of them. It is never changed: what is done is
seen from where the files lie. A file moves as a second name (a hard link) and the end of the first
one; to another file system as a copy that is read back before the first one goes. So after a kill a
file lies at one of its two places, or at both, and never at neither.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from snipdedup import progress
from snipdedup.errors import SnipError, WriteError
from snipdedup.parallel import ordered_map
from snipdedup.storage import atomic, locks

FOLDER = "snip_apply"  # in the folder of moved files, all that is not one of them
LOG, LOCK, LEFT = "moves.jsonl", "run.lock", "left.parquet"
FORMAT = 1
READ = 1 << 20  # bytes
FREE, DONE = "free", "done"  # a file that can move, one that has; all else is why it cannot
MISSING = "it is missing"
# of these a path follows: the summary counts what is before the colon
TAKEN, CAME = "something else is at its place", "something came to its place"
CHANGED = "the picture that stays for it has changed"


class Move(NamedTuple):
    """A file and its place in the folder of moved files; ``refused`` says why it never moves."""

    source: str  # absolute
    target: str  # in the folder; empty if it never moves
    sha256: str  # of its bytes
    stays: tuple[tuple[str, str], ...] = ()  # (path, sha256) of files without which it stays too
    refused: str = ""


class Log(NamedTuple):
    """All moves of a folder, and what asked for them."""

    request: dict[str, Any]
    mark: str  # in the names of unfinished copies
    moves: list[Move]

    @property
    def part(self) -> str:
        """The name of an unfinished copy, in any folder."""
        return f".{self.mark}.snip_apply.part"


@dataclass
class Outcome:
    """How many files moved, and were moved already; the others, each with the reason."""

    moved: int = 0
    done: int = 0
    size: int = 0  # bytes that moved
    left: list[tuple[str, str]] = field(default_factory=list)
    going: list[Move] = field(default_factory=list)  # of a dry run: what would move


# ---- the log


def make_log(request: dict[str, Any], moves: list[Move]) -> Log:
    """Return a log with a mark of its own."""
    return Log(request, secrets.token_hex(4), moves)


def write_log(folder: Path, log: Log) -> None:
    """Write the log, and wait until the disk has it and the folders that lead to it."""
    path = folder / FOLDER / LOG
    head = {"format": FORMAT, "moves": len(log.moves), "mark": log.mark, "request": log.request}
    with atomic.replacing(path) as part, part.open("w", encoding="ascii") as file:
        for value in (head, *log.moves):
            file.write(json.dumps(value) + "\n")
    for above in (path.parent, folder, folder.parent):
        atomic.sync_folder(above)


def read_log(folder: Path) -> Log | None:
    """Return the log of a folder, None without one; refuse one that is damaged."""
    path = folder / FOLDER / LOG
    try:
        with path.open(encoding="ascii") as file:
            head, *lines = [json.loads(line) for line in file]
        if head["format"] > FORMAT:
            raise SnipError(f"{path}: written by a newer snipdedup; upgrade it")
        moves = [Move(a, b, c, tuple(map(tuple, d)), e) for a, b, c, d, e in lines]
        log = Log(head["request"], str(head["mark"]), moves)
        whole = len(moves) == head["moves"] and all(map(is_plain, moves))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise SnipError(f"{path}: cannot be read as a log of moves: {error}") from error
    if not whole:
        raise SnipError(f"{path}: damaged: it does not hold the moves that its first line names")
    return log


def is_plain(move: Move) -> bool:
    """Tell whether a move leads from an absolute path to one inside the folder, or never moves."""
    if move.refused:
        return True
    inside = not {"", ".", ".."} & set(move.target.split("/"))
    return Path(move.source).is_absolute() and inside and move.target.split("/")[0] != FOLDER


def lock(folder: Path) -> None:
    """Be the only one that moves files of a folder; see `locks.released`."""
    path = folder / FOLDER / LOCK
    with atomic.explained(path):
        other = locks.acquire(path)
    if other is not None:
        raise SnipError(f"{folder}: files are being moved by another run ({other}); wait for it")
    atomic.remove_parts(path.parent)  # that a kill left


# ---- both directions


class Way(NamedTuple):
    """Where a move begins and ends, in one of both directions, and where a copy is made."""

    begin: Path
    end: Path
    part: Path


def way_of(folder: Path, log: Log, move: Move, *, back: bool) -> Way:
    """Return the way of a move into the folder, or back."""
    source, target = Path(move.source), folder / move.target
    if back:
        return Way(target, source, source.parent / log.part)
    return Way(source, target, folder / FOLDER / log.part)


def run_moves(
    folder: Path, log: Log, threads: int, *, back: bool = False, dry: bool = False
) -> Outcome:
    """Move the files of a log, or move them back; ``dry`` only tells which files these are.

    A file whose bytes are no more those of the log is left, and so is one whose place is taken.
    Into the folder, one is left too if a file that must stay (`Move.stays`) is missing or changed.
    """
    outcome = Outcome()
    moves = [move for move in log.moves if not (back and move.refused)]
    seen: dict[str, tuple[Any, str]] = {}  # of files that stay: their state and sha256
    if not dry:
        for parent in {folder / FOLDER, *(Path(m.source).parent for m in moves if not m.refused)}:
            with suppress(OSError):  # missing, as usual; else a copy that a kill left unfinished
                (parent / log.part).unlink()

    def check(move: Move) -> tuple[Move, Way, str, Any]:
        way = way_of(folder, log, move, back=back)
        if move.refused:
            return move, way, move.refused, None
        try:
            found = entry(way.begin)
            return move, way, obstacle(way, move, () if back else move.stays, seen), found
        except OSError as error:
            return move, way, f"it cannot be read: {error.strerror or error}", None

    verb = "checking" if dry else "moving back" if back else "moving"
    with progress.bar(len(moves), verb, "files") as bar:
        for move, way, checked, found in ordered_map(check, moves, threads):
            what = checked
            if checked == FREE and not dry:
                what = FREE if back else change(move.stays, seen)
                what = transfer(way, move.sha256, found) if what == FREE else what
            if what == FREE:
                outcome.moved += 1
                outcome.size += found.st_size
                outcome.going += [move] if dry else []
            elif what == DONE:
                outcome.done += 1
            else:
                outcome.left.append((str(way.begin) if back else move.source, what))
            bar.update(1)
    if not dry:
        sync_folders(folder, [move for move in moves if not move.refused])
    return outcome


def obstacle(
    way: Way, move: Move, stays: tuple[tuple[str, str], ...], seen: dict[str, tuple[Any, str]]
) -> str:
    """Return why a file cannot move, `FREE` if it can, `DONE` if it has."""
    if entry(way.begin) is None:
        return MISSING if entry(way.end) is None else DONE
    if (why := difference(way.begin, move.sha256)) is not None:
        return why
    if entry(way.end) is not None and difference(way.end, move.sha256) is not None:
        return f"{TAKEN}: {way.end}"
    for path, sha256 in stays:
        try:
            known = Path(path).stat()
            if os.path.samestat(known, way.begin.stat()):
                return "the picture that stays for it is the same file, by another name"
            if path not in seen or state(seen[path][0]) != state(known):
                seen[path] = known, digest(Path(path))
        except (OSError, ValueError):
            return f"the picture that stays for it is missing: {path}"
        if seen[path][1] != sha256:
            return f"{CHANGED}: {path}"
    return FREE


def change(stays: tuple[tuple[str, str], ...], seen: dict[str, tuple[Any, str]]) -> str:
    """Return which file that must stay is not as it was when `obstacle` read it, else `FREE`."""
    for path, _ in stays:
        try:
            same = state(Path(path).stat()) == state(seen[path][0])
        except OSError:
            same = False
        if not same:
            return f"{CHANGED}: {path}"
    return FREE


def entry(path: Path) -> os.stat_result | None:
    """Return what lies at a path, a link as itself; None if there is nothing."""
    try:
        return path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def difference(path: Path, sha256: str) -> str | None:
    """Return how a file differs from the plain one with a sha256, None if it is that."""
    found = entry(path)
    if found is None or not stat.S_ISREG(found.st_mode):
        return "it is no plain file (a link?)"
    return None if digest(path) == sha256 else "its bytes changed"


def digest(path: Path) -> str:
    """Return the sha256 of a plain file, or of one that a link leads to."""
    if not path.is_file():  # a pipe would never end
        raise FileNotFoundError(errno.ENOENT, "no plain file", str(path))
    return atomic.sha256(path)


def state(found: os.stat_result) -> tuple[int, ...]:
    """Return what changes with a file's bytes."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


# ---- one file


def transfer(way: Way, sha256: str, found: os.stat_result) -> str:
    """Move a file that was checked; return `FREE`, or why it is left."""
    now = entry(way.begin)
    if now is None or state(now) != state(found):
        return "it was changed just now"
    with stopping(way):
        way.end.parent.mkdir(parents=True, exist_ok=True)
        if (there := entry(way.end)) is not None:  # both places, the same bytes: after a kill
            twice = os.path.samestat(now, there)
            if twice and (now.st_nlink < 2 or way.begin.resolve() == way.end.resolve()):
                return "its old and new place are one, by a link or a mount"
            atomic.sync_folder(way.end.parent)
            way.begin.unlink()
            return FREE
        try:
            place(way.begin, way.end)
        except FileExistsError:
            return f"{CAME}: {way.end}"
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            return copy(way, sha256)
    return FREE


def place(path: Path, end: Path) -> None:
    """Give a file another path, on one file system; `FileExistsError` where it is taken."""
    try:
        os.link(path, end, follow_symlinks=False)
    except (OSError, NotImplementedError) as error:  # the latter on Windows
        if getattr(error, "errno", None) in (errno.EEXIST, errno.EXDEV):
            raise
    else:
        path.unlink()
        return
    if os.path.lexists(end):  # a file system without hard links, or a file of another user
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(end))
    path.rename(end)


def copy(way: Way, sha256: str) -> str:
    """Move a file to another file system; return what `transfer` does.

    The first one goes only when the disk has the copy, and its bytes have been read back.
    """
    with suppress(FileNotFoundError):
        way.part.unlink()
    with way.begin.open("rb") as source, way.part.open("xb") as target:
        shutil.copyfileobj(source, target, READ)
        target.flush()
        os.fsync(target.fileno())
    with suppress(OSError):  # a file system without permissions
        shutil.copystat(way.begin, way.part)
    if atomic.sha256(way.part) != sha256:
        way.part.unlink()
        return "it was changed just now, or its copy is damaged"
    try:
        place(way.part, way.end)
    except FileExistsError:
        way.part.unlink()
        return f"{CAME}: {way.end}"
    atomic.sync_folder(way.end.parent)
    way.begin.unlink()
    return FREE


@contextmanager
def stopping(way: Way) -> Iterator[None]:
    """Turn an `OSError` of a move into the refusal to go on."""
    try:
        yield
    except OSError as error:
        raise WriteError(
            f"cannot move {way.begin} to {way.end}: {error.strerror or error}; what moved is in "
            "the log: run it again to go on, or put all back with --undo"
        ) from error


def sync_folders(folder: Path, moves: list[Move]) -> None:
    """Wait until the disk has all names; remove the folders of the log that are empty now."""
    for above in {Path(move.source).parent for move in moves}:
        atomic.sync_folder(above)
    inner = {parent for move in moves for parent in PurePosixPath(move.target).parents}
    for name in sorted(inner, key=lambda name: -len(name.parts)):
        atomic.sync_folder(folder / name)
        if name.parts:
            with suppress(OSError):  # not empty, as usual
                (folder / name).rmdir()
