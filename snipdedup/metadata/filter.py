"""``snip filter``: what a mask leaves of metadata, and of the features beside it.

The mask's rows are found by position, or by what a column says of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snipdedup import progress
from snipdedup.config import EXPORTS, Filter, named_kinds
from snipdedup.errors import InputError, SnipError, UsageError
from snipdedup.features.shards import Features, open_features, plan_blocks, request_of
from snipdedup.metadata.export import FOLDER, count_staying, list_columns, uses, write_lists
from snipdedup.metadata.filter_by_key import ByKey, plan_join
from snipdedup.metadata.filter_by_row import check_keys
from snipdedup.metadata.masks import (
    FILES,
    SCAN_ROWS,
    Mask,
    open_mask,
    place_metadata,
    rows_of,
    stamp,
)
from snipdedup.metadata.masks import summary as counted
from snipdedup.metadata.precheck import Use, rehearse
from snipdedup.metadata.tables import (
    Metadata,
    kept_names,
    open_metadata,
    try_writing,
    write_kept,
)
from snipdedup.storage import atomic, locks, out_folder
from snipdedup.storage.manifest import read_manifest

KIND = "filter"
BLOCK_ROWS = 16_384  # rows of features copied at a time
RESERVED = ("metadata", FOLDER)
NOTES = "whole"  # in the work: which of its files are


class Chosen(NamedTuple):
    """The files that are meant, the features beside them, and their place in the mask's set.

    ``number`` is the first file's in the whole set, None where rows are found by key.
    """

    metadata: Metadata
    features: dict[str, Features]
    number: int | None = None
    row: int = 0


@locks.released()
def run(options: Filter) -> str:
    """Apply a mask to metadata files, and to features that match them: ``snip filter``."""
    out = Path(options.out).expanduser()
    metadata = open_metadata(options.metadata)
    found = open_embeddings(options.embeddings, metadata)
    out_folder.refuse_output_inside(out, list_inputs(options, metadata, found))
    mask = open_mask(options.is_dup, options.cumulative_sizes)
    join = plan_join(options, metadata, mask) if options.on else None
    chosen = Chosen(metadata, found) if join else choose(metadata, found, mask, options)
    kept_names(chosen.metadata.files)  # refused before anything is written
    kinds = named_kinds("export", options.export, EXPORTS)
    columns = list_columns(kinds, chosen.metadata, options.key)
    rehearse_uses(chosen.metadata, columns, join)
    request = describe_request(options, chosen, mask, join)
    if out_folder.claim(out, KIND, request, overwrite=options.overwrite) == "done":
        return f"{out} is finished already: {counted(read_manifest(out, KIND)['files'])}"
    work = out / locks.WORK
    body: dict[str, Any] = {"settings": options.as_dict(), "request": request}
    try:
        is_dup, said = mask.is_dup[chosen.row : chosen.row + chosen.metadata.rows], []
        if join is not None:
            joined = join.run(chosen.metadata, mask, work)
            is_dup, body["join"] = joined.is_dup, join.describe(joined)
            said = [join.report(joined, chosen.metadata)]
        elif checked := check_keys(chosen.metadata, mask, chosen.row):
            said = [checked]
        lists = write_lists(columns, chosen.metadata, is_dup, work / FILES / FOLDER, work)
    except SnipError:
        out_folder.release(out)  # what stood there before, stands
        raise
    if "mask" in kinds:
        lists.append(write_mask(work / FILES / FOLDER / "is_dup.npy", is_dup))
    body["files"], written = write_rows(chosen, is_dup, work / FILES)
    try:
        mask.refuse_changed()
        for table in (chosen.metadata, *([join.source.metadata] if join else [])):
            table.refuse_changed()
        for features in chosen.features.values():
            features.refuse_changed()
    except InputError:
        out_folder.release(out)
        raise
    out_folder.publish(out, KIND, body, [*written, *lists])
    return "\n".join([f"{out}: {counted(body['files'])}", *said])


def rehearse_uses(metadata: Metadata, columns: dict[str, str], join: ByKey | None) -> None:
    """Refuse columns of which lists, keys or files could not be made once the work is done."""
    write = Use(None, try_writing, "leave it out of the metadata", by_schema=True)
    rehearse(metadata, [*uses(columns, metadata), *(join.mine() if join else []), write])
    if join is not None:
        rehearse(join.source.metadata, join.others())


def list_inputs(options: Filter, metadata: Metadata, features: dict[str, Features]) -> list[Path]:
    """Return the files and folders that are read, in which the output must not lie."""
    named = (options.is_dup, options.cumulative_sizes, options.keys)
    return [
        *metadata.inputs(),
        *(path for found in features.values() for path in found.inputs()),
        *(Path(name).expanduser() for name in named if name),
    ]


def open_embeddings(specs: str | None, metadata: Metadata) -> dict[str, Features]:
    """Return the features of ``--embeddings``, by the name of the folder to write.

    Raises
    ------
    SnipError
        If their rows are not those of the metadata.
    UsageError
        If two of them would be written to one folder.
    """
    found: dict[str, Features] = {}
    for spec in [spec.strip() for spec in (specs or "").split(",") if spec.strip()]:
        features = open_features(spec)
        metadata.check_matches(features)
        name = features.shards[0].path.absolute().parent.name or "img_emb"
        if name in found or name in RESERVED:
            raise UsageError(
                f"--embeddings {spec} would be written to {name}/, which something else is; rename "
                "its folder"
            )
        refuse_names(spec, [shard.path.stem for shard in features.shards], metadata)
        found[name] = features
    return found


def refuse_names(spec: str, stems: list[str], metadata: Metadata) -> None:
    """Refuse shards of one name, and names that readers would pair with other files' than ours.

    embedding-reader and what stands on it take both folders' files in alphabetical order.
    """
    if len(set(stems)) < len(stems):
        raise SnipError(f"{spec}: two shards have one name; rename one")
    names = [file.path.stem for file in metadata.files]
    by_name = [sorted(range(len(list_)), key=list_.__getitem__) for list_ in (stems, names)]
    if len(names) == len(stems) and by_name[0] != by_name[1]:
        raise SnipError(
            f"{spec}: in alphabetical order, in which embedding-reader pairs files, its shards "
            f"are not beside the metadata that is theirs ({stems[0]} beside {names[0]}, ...); "
            "number both with as many digits"
        )


def choose(
    metadata: Metadata, features: dict[str, Features], mask: Mask, options: Filter
) -> Chosen:
    """Return the files that ``--start`` and ``--end`` mean, and the shards beside them."""
    place = place_metadata(metadata, mask, options.start, options.end)
    row = place.offset + int(metadata.offsets[place.first])
    if (place.first, place.last) == (0, len(metadata.files)):
        return Chosen(metadata, features, place.number, row)
    for name, found in features.items():
        if len(found.shards) != len(metadata.files):
            raise SnipError(
                f"--start and --end choose files: expected as many shards in {name} as files of "
                f"metadata, {len(metadata.files)}, found {len(found.shards)}"
            )
    cut = slice(place.first, place.last)
    held = {name: Features(found.shards[cut], found.folders) for name, found in features.items()}
    return Chosen(Metadata(metadata.files[cut], metadata.folders), held, place.number, row)


def describe_request(
    options: Filter, chosen: Chosen, mask: Mask, join: ByKey | None
) -> dict[str, Any]:
    """Return all that the result depends on, by name."""
    request: dict[str, Any] = {
        "files": describe_files(chosen.metadata),
        "mask": {"rows": mask.rows, "sha256": atomic.sha256(mask.path)},
        "first_row": chosen.row,
        "embeddings": {name: request_of(found) for name, found in chosen.features.items()},
        **{name: getattr(options, name) for name in ("on", "unmatched", "ambiguous", "export")},
        "key": options.key,
    }
    if join is not None:
        request["keys"] = describe_files(join.source.metadata)
    return request


def describe_files(metadata: Metadata) -> list[dict[str, Any]]:
    """Return what tells files of metadata from others."""
    return [{"name": f.path.name, "rows": f.rows, **stamp(f.path)} for f in metadata.files]


def write_rows(
    chosen: Chosen, is_dup: np.ndarray, folder: Path
) -> tuple[list[dict[str, Any]], list[Path]]:
    """Write metadata and features of the rows that stay; return what a manifest says, and paths.

    Metadata alone lies in the folder itself, beside features in ``metadata/``. Where each shard
    has its file of metadata, of a shard without rows neither is left: embedding-reader skips
    features of no rows, but not their metadata, and all rows after them would be wrong.
    """
    files = chosen.metadata.files
    inner = folder / "metadata" if chosen.features else folder
    parts = write_kept(chosen.metadata, is_dup, inner, notes=folder.parent / NOTES / "metadata")
    first = chosen.number
    described = [
        {
            "name": part.name,
            "number": None if first is None else first + place,
            "rows": file.rows,
            "kept": rows_of(part),
        }
        for place, (part, file) in enumerate(zip(parts, files, strict=True))
    ]
    for name, features in chosen.features.items():
        parts += write_features(features, is_dup, folder / name, folder.parent / NOTES / name)
    shards = {len(found.shards) for found in chosen.features.values()}
    if shards == {len(files)}:
        empty = {place for place, file in enumerate(described) if not file["kept"]}
        parts = [path for place, path in enumerate(parts) if place % len(files) not in empty]
    return described, parts


def write_features(features: Features, is_dup: np.ndarray, folder: Path, notes: Path) -> list[Path]:
    """Write the rows of each shard that stay as ``.npy`` of the same name and type.

    ``notes`` say which files of a stopped run are whole.
    """
    paths = []
    with progress.bar(features.rows, folder.name, "rows") as bar:
        for shard, first in zip(features.shards, features.offsets, strict=False):
            paths.append(folder / f"{shard.path.stem}.npy")
            goes = is_dup[first : first + shard.rows]
            note = notes / f"{paths[-1].name}.json"
            if atomic.is_done(note, folder):
                bar.update(shard.rows)
                continue
            shape = (count_staying(goes), features.dim)
            with atomic.writing_npy(paths[-1], shard.dtype, shape) as file:
                for start, stop in plan_blocks(shard.rows, BLOCK_ROWS):
                    shard.read(start, stop)[~np.asarray(goes[start:stop])].tofile(file)
                    bar.update(stop - start)
            atomic.write_done_file(note, [paths[-1]], {})
    return paths


def write_mask(path: Path, is_dup: np.ndarray) -> Path:
    """Write the mask of the rows at hand, block by block."""
    with atomic.writing_npy(path, np.dtype(bool), (len(is_dup),)) as file:
        for start, stop in plan_blocks(len(is_dup), SCAN_ROWS):
            np.ascontiguousarray(is_dup[start:stop]).tofile(file)
    return path
