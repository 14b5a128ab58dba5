"""``snip filter``: what a mask keeps of metadata, and of the features beside it.

The mask's rows are found by position, or by what columns say (`join_by_key`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from snipdedup import progress
from snipdedup.config import Filter
from snipdedup.errors import InputError, SnipError, TemporaryError, UsageError, WriteError
from snipdedup.features.shards import Features, FileRows, open_features, request_of
from snipdedup.metadata import kept_rows
from snipdedup.metadata.join_by_key import KeyJoin, check_removed_keys, plan_key_join
from snipdedup.metadata.masks import Mask, describe_kept, file_version, open_mask, place_metadata
from snipdedup.metadata.tables import ColumnUse, Metadata, open_metadata, try_column_uses
from snipdedup.storage import atomic, locks, out_folder
from snipdedup.storage.out_folder import read_manifest
from snipdedup.storage.upload import local_folder, uploading

KIND = "filter"
RESERVED = ("metadata", kept_rows.LISTS)
DONE = "whole"  # below the work folder: which of these files are


@dataclass(frozen=True)
class FilterResult:
    """What ``snip filter`` wrote to ``out``.

    ``files`` has each file's ``name``, ``number`` in the whole set (None where unknown), ``rows``
    and ``kept``; ``rows`` and ``kept`` are those of all files. ``join`` are, with ``--on``, rows by
    how they were found, as the manifest has them.
    """

    out: Path
    files: list[dict[str, Any]]
    rows: int
    kept: int
    join: dict[str, Any] | None
    text: str  # the summary that the command prints

    def __str__(self) -> str:
        """Return the summary."""
        return self.text


def describe_filter(
    out: Path, body: dict[str, Any], note: str = "", lines: Sequence[str] = ()
) -> FilterResult:
    """Return the result from the manifest's ``body``."""
    files = body["files"]
    rows, kept = (sum(file[name] for file in files) for name in ("rows", "kept"))
    text = "\n".join([f"{out}{note}: {describe_kept(rows, kept, len(files))}", *lines])
    return FilterResult(out, files, rows, kept, body.get("join"), text)


@dataclass(frozen=True)
class FilterInputs:
    """The files that are meant, the features beside them, and their place in the mask's set.

    ``number`` is the first file's number in the whole set (None: rows are found by key), ``row``
    the mask's row of the first file's row 0.
    """

    metadata: Metadata
    features: dict[str, Features]
    number: int | None = None
    row: int = 0


@uploading
@locks.released()
def run(options: Filter) -> FilterResult:
    """Apply a mask to metadata files, and to features that match them: ``snip filter``."""
    out = local_folder(options.out)
    metadata = open_metadata(options.metadata)
    features = open_embeddings(options.embeddings, metadata)
    files = (options.is_dup, options.cumulative_sizes, options.keys)
    inputs = [*metadata.inputs(), *(path for f in features.values() for path in f.inputs())]
    inputs += [Path(name).expanduser() for name in files if name]
    out_folder.refuse_output_inside(out, inputs)
    mask = open_mask(options.is_dup, options.cumulative_sizes)
    chosen, join = FilterInputs(metadata, features), None
    if options.on is not None:
        policies = options.unmatched, options.ambiguous
        join = plan_key_join(metadata, mask, options.on, options.keys, *policies)
    else:
        chosen = choose_files_of_range(chosen, mask, options.start, options.end)
    metadata = chosen.metadata
    kept_rows.kept_names(metadata.files)  # refused before anything is written
    kinds = options.words("export")
    columns = kept_rows.list_columns(kinds, metadata, options.key)
    write = ColumnUse(None, kept_rows.try_writing, "leave it out of the metadata", by_schema=True)
    try_column_uses(metadata, [*kept_rows.list_uses(columns, metadata), write])
    flags = options.some("on", "unmatched", "ambiguous", "export", "key")
    request = filter_request(chosen, mask, join, flags)
    if out_folder.claim(out, KIND, request, overwrite=options.overwrite) == "done":
        return describe_filter(out, read_manifest(out, KIND), " is finished already")
    body = {"settings": options.as_dict(), "request": request}
    return filter_rows(out, chosen, mask, join, columns, "mask" in kinds, body)


def filter_rows(
    out: Path,
    chosen: FilterInputs,
    mask: Mask,
    join: KeyJoin | None,
    columns: dict[str, str],
    export_mask: bool,
    body: dict[str, Any],
) -> FilterResult:
    """Decide the rows, write those that are kept, and publish them with the manifest's ``body``."""
    work, metadata, note = out / locks.WORK, chosen.metadata, None
    lists_folder = work / out_folder.FILES / kept_rows.LISTS
    with out_folder.released_on(SnipError, out, WriteError, TemporaryError):
        if join is not None:
            is_dup = join.run(mask, work / "join")
            body["join"], note = join.describe(), join.report()
        else:
            is_dup = mask.is_dup[chosen.row : chosen.row + metadata.rows]
            note = check_removed_keys(metadata, mask, chosen.row, work)
        lists = kept_rows.write_lists(columns, metadata, is_dup, lists_folder, work)
    if export_mask:
        lists.append(lists_folder / "is_dup.npy")
        atomic.save_npy(lists[-1], is_dup)
    body["files"], written = write_rows(chosen, is_dup, work)
    read: list[FileRows | None] = [mask.opened, metadata, *chosen.features.values()]
    with out_folder.released_on(InputError, out):
        for files in filter(None, [*read, join.known if join else None]):
            files.refuse_changed()
    out_folder.publish(out, KIND, body, [*written, *lists])
    return describe_filter(out, body, lines=[note] if note else [])


def open_embeddings(specs: str | None, metadata: Metadata) -> dict[str, Features]:
    """Return the features of ``--embeddings``, by the name of the folder to write."""
    found: dict[str, Features] = {}
    for spec in [spec.strip() for spec in (specs or "").split(",") if spec.strip()]:
        features = open_features(spec)
        metadata.check_matches(features.describe())
        name = features.shards[0].path.absolute().parent.name or "img_emb"
        if name in found or name in RESERVED:
            raise UsageError(
                f"--embeddings {spec} would be written to {name}/, which something else is; rename "
                "its folder"
            )
        stems = [shard.path.stem for shard in features.shards]
        refuse_names(spec, stems, [file.path.stem for file in metadata.files])
        found[name] = features
    return found


def refuse_names(spec: str, shards: list[str], tables: list[str]) -> None:
    """Refuse shards of one name, and names that readers would pair with other tables' than ours.

    embedding-reader, and tools built on it, take both folders' files in alphabetical order.
    """
    if len(set(shards)) < len(shards):
        raise SnipError(f"{spec}: two shards have one name; rename one")
    order = [sorted(range(len(names)), key=names.__getitem__) for names in (shards, tables)]
    if len(tables) == len(shards) and order[0] != order[1]:
        raise SnipError(
            f"{spec}: in alphabetical order, in which embedding-reader pairs files, its shards "
            f"are not beside the metadata that is theirs ({shards[0]} beside {tables[0]}, ...); "
            "number both with as many digits"
        )


def choose_files_of_range(
    inputs: FilterInputs, mask: Mask, start: int | None, end: int | None
) -> FilterInputs:
    """Return the files that ``--start`` and ``--end`` mean, and the shards beside them."""
    metadata = inputs.metadata
    first, last, row = place_metadata(metadata, mask, start, end)
    if (first, last) == (0, len(metadata.files)):
        return replace(inputs, number=start or 0, row=row)
    for name, features in inputs.features.items():
        if len(features.shards) != len(metadata.files):
            raise SnipError(
                f"--start and --end choose files: expected as many shards in {name} as files of "
                f"metadata, {len(metadata.files)}, found {len(features.shards)}"
            )
    cut = slice(first, last)
    shards = {n: Features(f.shards[cut], f.folders) for n, f in inputs.features.items()}
    part = Metadata(metadata.files[cut], metadata.folders)
    return FilterInputs(part, shards, start or 0, row)


def filter_request(
    chosen: FilterInputs, mask: Mask, join: KeyJoin | None, flags: dict[str, Any]
) -> dict[str, Any]:
    """Return all that the result depends on, by name."""

    def describe(metadata: Metadata) -> list[dict[str, Any]]:
        files = metadata.files
        return [{"name": f.path.name, "rows": f.rows, **file_version(f.path)} for f in files]

    request: dict[str, Any] = {
        "files": describe(chosen.metadata),
        "mask": {"rows": mask.rows, "sha256": atomic.sha256(mask.path)},
        "first_row": chosen.row,
        "embeddings": {name: request_of(found) for name, found in chosen.features.items()},
        **flags,
    }
    return request if join is None else request | {"keys": describe(join.known)}


def write_rows(
    chosen: FilterInputs, is_dup: np.ndarray, work: Path
) -> tuple[list[dict[str, Any]], list[Path]]:
    """Write metadata and features of the kept rows; return the manifest's entries, and paths.

    Metadata alone lies in the folder itself, beside features in ``metadata/``. Where each shard
    has its file of metadata, of a shard without rows neither is left: embedding-reader skips
    features of no rows, but not their metadata, and all rows after them would be wrong.
    """
    files, folder, done = chosen.metadata.files, work / out_folder.FILES, work / DONE
    inner = folder / "metadata" if chosen.features else folder
    parts = kept_rows.write_kept(chosen.metadata, is_dup, inner, done=done / "metadata")
    described = [
        {
            "name": part.name,
            "number": None if chosen.number is None else chosen.number + place,
            "rows": file.rows,
            "kept": int(pq.read_metadata(part).num_rows),
        }
        for place, (part, file) in enumerate(zip(parts, files, strict=True))
    ]
    for name, features in chosen.features.items():
        parts += write_features(features, is_dup, folder / name, done / name)
    if {len(features.shards) for features in chosen.features.values()} == {len(files)}:
        empty = {place for place, file in enumerate(described) if not file["kept"]}
        parts = [path for place, path in enumerate(parts) if place % len(files) not in empty]
    return described, parts


def write_features(features: Features, is_dup: np.ndarray, folder: Path, done: Path) -> list[Path]:
    """Write the kept rows of each shard as ``.npy`` of the same name and type.

    ``done`` is a folder of done files: what a stopped run finished is not written again.
    """
    paths = [folder / f"{shard.path.stem}.npy" for shard in features.shards]
    with progress.bar(features.rows, folder.name, "rows") as bar:
        for shard, first, path in zip(features.shards, features.offsets, paths, strict=False):
            done_file = done / f"{path.name}.json"
            if not atomic.is_done(done_file, folder):
                kept_rows.write_kept_npy(shard, path, is_dup[first : first + shard.rows])
                atomic.write_done_file(done_file, [path], {})
            bar.update(shard.rows)
    return paths
