"""``snip apply``: files of removed pictures go to a folder, or those that stay are linked.

A file goes if all rows that name it are removed, and the pictures that stay for them lie elsewhere
and are whole; `moves` does it, and puts it back.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from snipdedup import config, progress
from snipdedup.deduplication.inputs import KIND as DEDUP
from snipdedup.deduplication.read_out import whole_groups
from snipdedup.errors import SnipError
from snipdedup.metadata.gather import open_row_texts
from snipdedup.metadata.masks import MASK, load_mask
from snipdedup.metadata.tables import Metadata
from snipdedup.parallel import cores
from snipdedup.pictures import moves
from snipdedup.pictures.moves import FOLDER, LEFT, Log, Move, Outcome
from snipdedup.pictures.run_metadata import read_texts, refuse_other_metadata
from snipdedup.storage import atomic, locks, out_folder
from snipdedup.storage.out_folder import as_written, read_manifest

GROUPS = "groups.parquet"
LINKS = "links.json"  # in `moves.FOLDER`: what asked for a folder of links
LONGEST_CHAIN = 64  # representatives are followed so often, each time twice as far
SHOWN = 5  # files, of what is left and of a dry run
NO_PATH = "its metadata names no file of this machine by a plain absolute path"
NO_HASH = "its rows have no sha256, or different ones"
IS_KEPT = "a row that stays names the same file, by another path"
NO_REPRESENTATIVE = "no row that stays is known for it"
NO_FILE = "the row that stays for it lies in a reference, or has no file"
CONTAINERS = {
    "tar": "tars; take the keys that stay: snip filter {0} --is_dup {1} --out kept --export keys, "
    "and give them to webdataset or img2dataset",
    "parquet": "parquet files; filter these: snip filter FILES --is_dup {1} --out kept",
}


@dataclass(frozen=True)
class Applied:
    """What ``snip apply`` did; `str` of it is the summary.

    ``left`` are files that were not moved, each with the reason.
    """

    folder: Path
    moved: int  # files that were moved, moved back or linked by this call
    done: int  # files that were in place already
    left: list[tuple[str, str]]
    summary: str

    def __str__(self) -> str:
        return self.summary


class Files(NamedTuple):
    """The files that metadata names, and the rows that name them."""

    names: list[str]  # (files,)
    hashes: list[str]  # (files,) sha256, empty where rows have none or disagree
    of_row: np.ndarray  # (rows,) int64: which file; -1 for rows that name none
    gone: np.ndarray  # (files,) bool: all its rows are removed


@locks.released()
def run(options: config.Apply) -> Applied:
    """Move, link or put back; see `config.Apply`."""
    threads = cores(options.threads)
    if options.undo is not None:
        return undo(Path(options.undo).expanduser(), threads, dry=options.dry_run)
    out = Path(options.out or "").expanduser()
    folder = Path(options.move or options.link or "").expanduser().absolute()
    with as_written(out):
        manifest = read_manifest(out, DEDUP)
        check_result(out, manifest)
        texts = open_row_texts(out, manifest, options.metadata)
        if texts.metadata is None or texts.is_dup is not None:
            raise SnipError(
                f"{out}: the metadata that the run read is not there any more, or has changed; "
                "name it with --metadata"
            )
        out_folder.refuse_output_inside(folder, [out, *texts.inputs()])
        check_folder(folder, options.move is not None)
        is_dup = load_mask(out / MASK)
        refuse_other_metadata(
            out, manifest, texts.metadata, is_dup, named=options.metadata is not None
        )
        files = read_files(texts.metadata, is_dup, out)
        root = common_folder([name for name in files.names if is_plain(name)])
        if root != "/" and folder.resolve().is_relative_to(Path(root).resolve()):
            raise SnipError(
                f"{folder} lies in {root}, the folder of the pictures, and would be embedded with "
                "them the next time; choose a folder outside"
            )
        request = {
            "result": [manifest["outputs"][name]["sha256"] for name in (MASK, GROUPS)],
            "files": atomic.short_hash([files.names, files.hashes, files.of_row.tolist()]),
            "root": root,
        }
    if options.link is not None:
        return link(folder, files, root, request, dry=options.dry_run)
    return move(folder, out, files, request, threads, dry=options.dry_run)


def check_result(out: Path, manifest: dict[str, Any]) -> None:
    """Refuse a result whose mask or groups are not those that its run wrote."""
    for name in (MASK, GROUPS):
        if atomic.sha256(out / name) != manifest["outputs"][name]["sha256"]:
            raise SnipError(f"{out / name}: changed since snip dedup wrote it; make it anew")


def check_folder(folder: Path, moving: bool) -> None:
    """Refuse a folder that holds anything but what an earlier call of the same kind put there."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    other = LINKS if moving else moves.LOG
    if not (folder / FOLDER).is_dir() or (folder / FOLDER / other).exists():
        what = "--move" if moving else "--link"
        raise SnipError(
            f"{what} {folder} exists and is not a folder of snip apply {what}; choose a new one"
        )


# ---- which files go


def read_files(metadata: Metadata, is_dup: np.ndarray, out: Path) -> Files:
    """Read which files the rows name; refuse metadata that names none."""
    path, sha256 = (metadata.column(None, [name]) for name in ("path", "sha256"))
    for name, todo in CONTAINERS.items():
        column = metadata.column(None, [name])
        if column is not None and read_texts(metadata, column).null_count < metadata.rows:
            raise SnipError(
                f"{metadata.describe()}: these pictures lie in "
                f"{todo.format(metadata.files[0].path.parent, out)}"
            )
    if path is None or sha256 is None:
        raise SnipError(
            f"{metadata.describe()}: expected the columns path and sha256, as snip embed writes "
            f"them for files, found {', '.join(metadata.columns)}"
        )
    coded = [
        read_texts(metadata, column).combine_chunks().dictionary_encode()
        for column in (path, sha256)
    ]
    of_row, hash_of_row = (
        pc.fill_null(column.indices, -1).to_numpy(zero_copy_only=False).astype(np.int64)
        for column in coded
    )
    names, hashes = (column.dictionary.to_pylist() for column in coded)
    named = of_row >= 0
    if not named.any():
        raise SnipError(
            f"{metadata.describe()}: no row names a file of its own in the column {path}; frames "
            "of videos cannot be moved"
        )
    first = np.full(len(names), len(of_row), np.int64)
    np.minimum.at(first, of_row[named], np.flatnonzero(named))
    gone = np.bincount(of_row[named & ~np.asarray(is_dup)], minlength=len(names)) == 0
    differs = named & (hash_of_row != hash_of_row[first[of_row]])
    known = hash_of_row[first]
    known[of_row[differs]] = -1
    return Files(names, [hashes[n] if n >= 0 else "" for n in known.tolist()], of_row, gone)


def is_plain(name: str) -> bool:
    """Tell whether a path is absolute, without ``..`` and the like, and one of this machine."""
    with suppress(ValueError):
        os.fsencode(name)
        return name.startswith("/") and "\0" not in name and os.path.normpath(name) == name
    return False


def common_folder(names: Sequence[str]) -> str:
    """Return the folder that all of some absolute paths lie in; ``/`` of none."""
    shared = os.path.commonprefix([min(names), max(names)]) if names else "/"  # noqa: RUF071
    return shared[: shared.rindex("/")] or "/"


def final_representatives(groups: Path, is_dup: np.ndarray) -> np.ndarray:
    """Return the kept row that each removed row goes for at last, (rows,) int64.

    Representatives that are removed themselves (of semdedup, or unverified) are followed to one
    that stays. -1 where there is none, < -1 for a row of a reference; kept rows name themselves.
    """
    last = np.where(is_dup, -1, np.arange(len(is_dup)))
    for members in whole_groups(groups):
        removed = members.is_dup
        named = members.representative[removed]
        last[members.row[removed]] = np.where(named < 0, -2, named)
    for _ in range(LONGEST_CHAIN):
        on = last >= 0
        on[on] = is_dup[last[on]]
        last[on] = last[last[on]]
    last[(last >= 0) & is_dup[np.maximum(last, 0)]] = -1  # a ring
    return last


def plan_moves(files: Files, root: str, last: np.ndarray) -> Iterator[Move]:
    """Yield the files all of whose rows are removed, in the order of their first rows."""
    kept = identities(files)
    order = np.argsort(files.of_row, kind="stable")
    starts = np.searchsorted(files.of_row[order], np.arange(len(files.names) + 1))
    for number in np.flatnonzero(files.gone).tolist():
        name, sha256 = files.names[number], files.hashes[number]
        ends = last[order[starts[number] : starts[number + 1]]]
        stays = files.of_row[ends] if (ends >= 0).all() else np.array([-1])
        refused = ""
        if not is_plain(name):
            refused = NO_PATH
        elif not sha256:
            refused = NO_HASH
        elif (stays < 0).any():
            refused = NO_REPRESENTATIVE if (ends == -1).any() else NO_FILE
        elif identity(name) in kept:
            refused = IS_KEPT
        others = [] if refused else np.unique(stays).tolist()
        yield Move(
            name,
            "" if refused else name[len(root) :].strip("/"),
            sha256,
            tuple((files.names[n], files.hashes[n]) for n in others),
            refused,
        )


def identities(files: Files) -> set[int]:
    """Return the `identity` of all files that stay."""
    stay = np.flatnonzero(~files.gone).tolist() if files.gone.any() else []
    found = progress.track((identity(files.names[n]) for n in stay), "looking", "files", len(stay))
    return {one for one in found if one is not None}


def identity(name: str) -> int | None:
    """Return what two paths of one file have in common, None of a missing file."""
    with suppress(OSError, ValueError):
        found = os.stat(name)  # noqa: PTH116 - there are millions
        return hash((found.st_dev, found.st_ino))
    return None


# ---- what is done


def move(
    folder: Path, out: Path, files: Files, request: dict[str, Any], threads: int, *, dry: bool
) -> Applied:
    """Move the files of removed rows, or go on with moves that were stopped."""
    if not dry:
        moves.lock(folder)
    log = moves.read_log(folder)
    if log is not None and log.request != request:
        if any(one.target and os.path.lexists(folder / one.target) for one in log.moves):
            raise SnipError(
                f"--move {folder} holds the files of another result; choose another folder, or "
                f"put these back first: snip apply --undo {folder}"
            )
        log = None
    if log is None:
        with as_written(out):
            last = final_representatives(out / GROUPS, load_mask(out / MASK))
        planned = list(plan_moves(files, request["root"], last))
        if any(one.target.split("/")[0] == FOLDER for one in planned):
            raise SnipError(f"{request['root']}/{FOLDER}: a name that snip apply needs; rename it")
        log = moves.make_log(request, planned)
        if not dry:
            moves.write_log(folder, log)
    outcome = moves.run_moves(folder, log, threads, dry=dry)
    if dry:
        lines = [f"{len(log.moves):,} files of removed rows; {outcome.moved:,} would be moved "
                 f"({outcome.size / 1e6:,.1f} MB)"]  # fmt: skip
        lines += [f"  {quoted(one.source)} -> {quoted(folder / one.target)}"
                  for one in outcome.going[:SHOWN]]  # fmt: skip
        more = outcome.moved - SHOWN
        lines += [f"  and {more:,} more"] if more > 0 else []
    else:
        lines = [f"{quoted(folder)}: {outcome.moved:,} files moved ({outcome.size / 1e6:,.1f} MB)"]
    if outcome.done:
        lines[0] += f", {outcome.done:,} were moved already"
    lines += describe_left(outcome, folder, dry=dry)
    if not dry:
        lines.append(f"to put them back: snip apply --undo {quoted(folder)}")
    return Applied(folder, outcome.moved, outcome.done, outcome.left, "\n".join(lines))


def undo(folder: Path, threads: int, *, dry: bool) -> Applied:
    """Put the moved files of a folder back."""
    if not (folder / FOLDER / moves.LOG).is_file():
        raise SnipError(
            f"--undo {folder}: expected a folder of snip apply --move, found no "
            f"{FOLDER}/{moves.LOG} in it"
        )
    if not dry:
        moves.lock(folder)
    log = moves.read_log(folder) or Log({}, "", [])
    outcome = moves.run_moves(folder, log, threads, back=True, dry=dry)
    verb = "would be put back" if dry else "put back"
    lines = [f"{quoted(folder)}: {outcome.moved:,} files {verb} ({outcome.size / 1e6:,.1f} MB)"]
    if outcome.done:
        lines[0] += f", {outcome.done:,} are at their old places"
    lines += describe_left(outcome, folder, dry=dry)
    return Applied(folder, outcome.moved, outcome.done, outcome.left, "\n".join(lines))


def link(folder: Path, files: Files, root: str, request: dict[str, Any], *, dry: bool) -> Applied:
    """Make a folder of links to the files of kept rows."""
    if not dry:
        moves.lock(folder)
    note = folder / FOLDER / LINKS
    if note.is_file() and atomic.load_json(note) != request:
        raise SnipError(f"--link {folder} holds links of another result; choose a new folder")
    if not dry:
        atomic.save_json(note, request)
    outcome, stay = Outcome(), np.flatnonzero(~files.gone).tolist()
    for number in progress.track(stay, "linking", "files", len(stay)):
        name = files.names[number]
        if not is_plain(name):
            outcome.left.append((name, NO_PATH))
        elif not Path(name).is_file():
            outcome.left.append((name, moves.MISSING))
        else:
            make_link(name, folder / name[len(root) :].strip("/"), outcome, dry=dry)
    verb = "links would be made" if dry else "links made"
    lines = [f"{quoted(folder)}: {outcome.moved:,} {verb} to the files of rows that stay"]
    if outcome.done:
        lines[0] += f", {outcome.done:,} are there already"
    lines += describe_left(outcome, folder, dry=dry)
    return Applied(folder, outcome.moved, outcome.done, outcome.left, "\n".join(lines))


def make_link(name: str, target: Path, outcome: Outcome, *, dry: bool) -> None:
    """Make a symbolic link, a hard one where the file system has none; overwrite nothing."""
    if os.path.lexists(target):
        if target.exists() and target.samefile(name):
            outcome.done += 1
        else:
            outcome.left.append((name, f"{moves.TAKEN}: {target}"))
        return
    if not dry:
        with atomic.explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                target.symlink_to(name)
            except OSError:
                target.hardlink_to(name)
    outcome.moved += 1


def describe_left(outcome: Outcome, folder: Path, *, dry: bool) -> list[str]:
    """Say how many files are left and why; write all of them to a table."""
    path = folder / FOLDER / LEFT
    if not dry:
        table = pa.table(
            {name: [safe(pair[n]) for pair in outcome.left]
             for n, name in enumerate(("path", "reason"))},
            schema=pa.schema([("path", pa.string()), ("reason", pa.string())]),
        )  # fmt: skip
        atomic.save_parquet(path, table)
    if not outcome.left:
        return []
    counts = Counter(reason.partition(":")[0] for _, reason in outcome.left)
    lines = [f"{len(outcome.left):,} files are left where they are"]
    lines += [f"  {count:,}: {reason}" for reason, count in counts.most_common()]
    lines += [f"  such as {quoted(name)}" for name, _ in outcome.left[:SHOWN]]
    return lines if dry else [*lines, f"all of them: {quoted(path)}"]


def safe(text: str) -> str:
    """Return a text that can be written as UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def quoted(path: str | Path) -> str:
    """Return a path for a terminal: one with odd letters in quotes."""
    text = str(path)
    return text if text.isprintable() else json.dumps(text)
