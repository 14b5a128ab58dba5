"""Build the index: each row as a coarse list and a short PQ code, row numbers implied.

A folder holds the trained quantisers once and, for each shard of features, one file of codes
sorted by list. What a row's code is depends on the row, its global number and the quantisers only:
rows are encoded in whole blocks aligned to global rows, one thread a block.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from snipdedup import config, progress
from snipdedup.errors import InputError, SnipError
from snipdedup.features.cosine import bad_rows
from snipdedup.features.hashing import checksum_text, sum_checksums
from snipdedup.features.scan import describe_bad
from snipdedup.features.shards import Features, accept_dates, open_features, request_of
from snipdedup.index.codes import ShardCodes, load_shard, pack, packed_width, save_shard, shard_name
from snipdedup.index.export import export_faiss
from snipdedup.index.folder import (
    ENCODER,
    QUANTISER,
    Index,
    Space,
    held_encoder,
    identity,
    is_descriptors,
    same_encoder,
)
from snipdedup.index.quantizer import (
    LEAST_SAMPLE,
    POINTS_A_LIST,
    Quantiser,
    check_m,
    default_m,
    default_nlist,
    draw_sample,
    read_quantiser,
    train,
    write_quantiser,
)
from snipdedup.parallel import ALIGNED_ROWS, cores, in_aligned_blocks, ordered_map
from snipdedup.storage import atomic, locks, out_folder
from snipdedup.storage.manifest import MANIFEST, is_finished, read_manifest
from snipdedup.storage.remote import is_remote
from snipdedup.storage.urls import redacted

FILES = "files"  # below the work folder: what is written before all of it is whole
READ_ROWS = 8 * ALIGNED_ROWS  # rows read and encoded by one thread at a time


def run(options: config.Index) -> str:
    """Build, continue or grow an index; see `build`."""
    features = open_features(
        options.features, parts=options.parts, array=options.array, column=options.column
    )
    options = expanded(options)
    out = Path(options.out)
    source = options.features if isinstance(options.features, str | Path) else None
    read = [Path(name) for name in (options.base, options.encoder) if name is not None]
    out_folder.refuse_output_inside(out, [*features.inputs(), *read])
    if options.export_faiss is not None:
        out_folder.refuse_output_file(Path(options.export_faiss), [*features.inputs(), *read])
    index, state = build(features, out, options, as_stored=is_descriptors(source))
    said = describe(index, state)
    if options.export_faiss is not None:
        out_folder.refuse_output_file(Path(options.export_faiss))  # now OUT's files are known
        size = export_faiss(index, Path(options.export_faiss))
        said += f"\nwrote {options.export_faiss} for plain faiss, {size:,} bytes"
    return said


def expanded(options: config.Index) -> config.Index:
    """Return settings with ``~`` replaced in every path."""
    names = ("features", "out", "encoder", "base", "export_faiss")
    given = options.as_dict()
    for name in names:
        if isinstance(given[name], str | Path) and not is_remote(given[name]):
            given[name] = str(Path(given[name]).expanduser())
    return config.Index(**given)


def located(source: Any) -> str | None:
    """Return where features lie, as a path from anywhere; None for arrays in memory."""
    if is_remote(source):
        return redacted(str(source))
    return os.path.abspath(source) if isinstance(source, str | Path) else None  # noqa: PTH100


@locks.released()
def build(
    features: Features, out: Path, options: config.Index, *, as_stored: bool = False
) -> tuple[Index, str]:
    """Train quantisers, or take those of ``--base``, and write the codes of each shard.

    Parameters
    ----------
    features : Features
    out : Path
        The index; what a stopped run left there is used.
    options : settings.Index
    as_stored : bool
        Take rows as they are instead of scaling them to norm 1; an encoder decides by itself.

    Returns
    -------
    index : Index
    state : str
        ``new``, ``resume``, ``append`` or ``done``.

    Raises
    ------
    SnipError
        For bad rows (unless ``bad_rows`` is ``keep``), a width that ``m`` does not divide, a base
        that does not fit, or an ``out`` that holds something else.
    """
    base = open_base(options.base)
    encoder = choose_encoder(options.encoder, base)
    request = {
        **request_of(features),
        "as_stored": as_stored,
        "encoder": identity(encoder / MANIFEST) if encoder else None,
        "base": identity(base) if base else None,
        **{n: getattr(options, n) for n in ("nlist", "m", "nbits", "train_rows", "seed")},
    }
    space = code_space(Space.of(encoder, features.dim, as_stored), base, options)
    check_shape(features, space, base, options)
    state, request = claim(out, request, features, options)
    if state == "done":
        return Index.open(out), state
    held = len(read_manifest(out, "index")["shards"]) if state == "append" else 0
    if held:
        space = Space.of(held_encoder(out), features.dim, bool(request["as_stored"]))
        space = space.of_width(read_quantiser(out / QUANTISER).dim)
    work = out / locks.WORK / FILES
    try:
        note = work.parent / f"{QUANTISER}.json"
        if not held and not atomic.is_done(note, work):
            write_quantiser(work / QUANTISER, make_quantiser(features, space, base, options))
            atomic.write_done_file(note, [work / QUANTISER], {})
        quantiser = read_quantiser((out if held else work) / QUANTISER)
        write_shards(features, held, space, quantiser, work, options)
        features.refuse_changed()
    except InputError:
        out_folder.release(out)  # what stood there before, stands
        raise
    if encoder is not None and not held:
        copy_encoder(encoder, work / ENCODER)
    finish(out, request, options, held)
    return Index.open(out), state


def code_space(space: Space, base: Path | None, options: config.Index) -> Space:
    """Return the space that codes are made in: a short code keeps more of an encoder's head."""
    if space.encoder is None:
        return space
    if base is not None:
        return space.of_width(read_quantiser(base).dim)
    m = options.m or default_m(space.dim, config.INDEX_M)
    return space.of_width(space.encoder.for_codes(m, options.nbits or config.INDEX_NBITS).dim)


def check_shape(features: Features, space: Space, base: Path | None, options: config.Index) -> None:
    """Refuse settings that do not fit the width or the rows, before anything is written."""
    if options.nlist > features.rows:
        raise SnipError(
            f"--nlist {options.nlist}: there are only {features.rows:,} rows; give fewer lists, or "
            "leave it away to have them chosen"
        )
    if base is not None:
        check_base(base, read_quantiser(base), space.dim, options)
    elif options.m is not None:
        check_m(options.m, space.dim)


def write_shards(
    features: Features,
    held: int,
    space: Space,
    quantiser: Quantiser,
    work: Path,
    options: config.Index,
) -> None:
    """Write the codes of shards from number ``held`` on that are not there yet.

    Raises
    ------
    InputError
        If rows cannot be compared, and ``bad_rows`` is not ``keep``.
    """
    threads = cores(options.threads)
    with progress.bar(features.rows, "indexing", "rows") as bar:
        for number, shard in enumerate(features.shards):
            path = work / shard_name(number)
            if number >= held and not atomic.is_done(checksum_note(path), work):
                codes, checksum = encode_shard(features, number, space, quantiser, threads)
                refuse_bad(features, number, codes.bad, options.bad_rows)
                save_shard(path, codes)
                atomic.write_done_file(
                    checksum_note(path), [path], {"checksum": checksum_text(checksum)}
                )
            bar.update(shard.rows)


def checksum_note(path: Path) -> Path:
    """Return where the checksum of a shard of features is noted until the manifest holds it."""
    return path.parent.parent / f"{path.name}.json"


def claim(
    out: Path, request: dict[str, Any], features: Features, options: config.Index
) -> tuple[str, dict[str, Any]]:
    """Claim ``out`` (`out_folder.claim`); with ``--append``, go on where it has fewer shards."""
    if is_finished(out):
        manifest = read_manifest(out, "index")
        accept_dates(request, features, manifest)
        if not options.overwrite:
            earlier = manifest["request"]
            if is_longer(request, earlier):
                if not options.append:
                    held, now = len(earlier["features"]), len(request["features"])
                    raise SnipError(
                        f"--out {out} holds an index of the first {held} of {now} shards; add the "
                        "others with --append, or replace it with --overwrite"
                    )
                locks.lock_run(out)
                return "append", grow(out, earlier, request)
            if options.append:
                request = merged_request(out, earlier, request)
    state = out_folder.claim(out, "index", request, overwrite=options.overwrite)
    return state, request


def is_longer(request: dict[str, Any], earlier: dict[str, Any]) -> bool:
    """Tell whether a request has the same shards as an earlier one, and more after them."""
    held = len(earlier["features"])
    return len(request["features"]) > held and all(
        request[name][:held] == earlier.get(name) for name in ("features", "features_changed")
    )


def grow(out: Path, earlier: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """Note that shards are being added; keep those that the same stopped run added."""
    request = merged_request(out, earlier, request)
    note = out / locks.WORK / locks.REQUEST
    if not note.is_file() or atomic.load_json(note) != request:
        locks.empty_work(out)
        atomic.save_json(note, request)
    return request


def merged_request(out: Path, earlier: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return the finished request with more shards; settings left at their default are kept."""
    kept = {**earlier, **{name: now[name] for name in ("features", "features_changed")}}
    given = {name: value for name, value in now.items() if value not in (None, 0, False)}
    differing = out_folder.differences({n: kept.get(n) for n in given}, given)
    if differing:
        raise SnipError(
            f"--out {out} was built with other {'; '.join(differing)}; --append goes on with its "
            "own quantisers and encoder: leave these flags away"
        )
    return kept


def open_base(base: str | None) -> Path | None:
    """Return the quantiser file that ``--base`` means: a folder of ours, or a faiss file."""
    if base is None:
        return None
    path = Path(base).expanduser()
    if path.is_dir():
        read_manifest(path, "index")
        path = path / QUANTISER
    if not path.is_file():
        raise SnipError(f"--base: no such file or index folder: {base}")
    return path


def choose_encoder(given: str | None, base: Path | None) -> Path | None:
    """Return the encoder's folder; quantisers of ours that were trained on one keep it."""
    of_base = base.parent / ENCODER if base is not None and base.name == QUANTISER else None
    if of_base is None or not of_base.is_dir():
        if given is not None:
            read_manifest(Path(given).expanduser(), "encoder")
        return Path(given).expanduser() if given is not None else None
    if given is not None and not same_encoder(given, of_base):
        raise SnipError(
            f"--encoder {given} is not the one that the quantisers of --base were trained with "
            f"({of_base}); leave --encoder away"
        )
    return of_base


def copy_encoder(source: Path, target: Path) -> None:
    """Put the encoder into the index, so that the folder is all that a search needs."""
    manifest = read_manifest(source, "encoder")
    for name in (*manifest["outputs"], MANIFEST):  # the manifest last, as everywhere
        with atomic.replacing(target / name) as part:
            shutil.copyfile(source / name, part)


def make_quantiser(
    features: Features, space: Space, base: Path | None, options: config.Index
) -> Quantiser:
    """Return the base's quantisers, or train new ones on a sample."""
    if base is not None:
        return read_quantiser(base)
    m = options.m or default_m(space.dim, config.INDEX_M)
    lists = options.nlist or default_nlist(features.rows, features.rows)
    wanted = options.train_rows or max(POINTS_A_LIST * lists, LEAST_SAMPLE)
    threads = cores(options.threads)
    sample = draw_sample(features, space.vectors, wanted, options.seed, threads)
    return train(
        sample,
        nlist=options.nlist or default_nlist(features.rows, len(sample)),
        m=m,
        nbits=options.nbits or config.INDEX_NBITS,
        seed=options.seed,
        threads=threads,
    )


def check_base(path: Path, quantiser: Quantiser, dim: int, options: config.Index) -> None:
    """Refuse a base of another width, or flags that contradict it."""
    if quantiser.dim != dim:
        raise SnipError(
            f"--base {path} quantises vectors {quantiser.dim} wide, these are {dim} wide; give "
            "the encoder (or its absence) that it was trained with"
        )
    for name in ("nlist", "m", "nbits"):
        asked, held = getattr(options, name), getattr(quantiser, name)
        if asked and asked != held:
            raise SnipError(f"--base {path} has {name} {held}; leave --{name} {asked} away")


def encode_shard(
    features: Features, number: int, space: Space, quantiser: Quantiser, threads: int
) -> tuple[ShardCodes, int]:
    """Encode the rows of one shard, wherever it lies among the others; return its checksum too."""
    first, stop = (int(n) for n in features.offsets[number : number + 2])
    cuts = range(first - first % READ_ROWS, stop, READ_ROWS)
    spans = [(max(cut, first), min(cut + READ_ROWS, stop)) for cut in cuts]

    checksums = []

    def encode(span: tuple[int, int]) -> tuple[np.ndarray, ...]:
        rows = features.read(*span)
        checksums.append(features.checksums(span[0], rows))
        bad = bad_rows(rows)
        if bad.any():  # a copy: rows may be the caller's own array
            rows = np.where(bad[:, None], 0, rows)
        return *in_aligned_blocks(lambda b: encode_block(b, space, quantiser), rows, span[0]), bad

    parts = [empty_block(quantiser), *ordered_map(encode, spans, threads)]
    lists, codes, errors, bad = (np.concatenate(c) for c in zip(*parts, strict=True))
    good = np.flatnonzero(~bad)
    order = good[np.argsort(lists[good], kind="stable")]
    sizes = np.bincount(lists[good], minlength=quantiser.nlist)
    return ShardCodes(
        codes[order],
        pack(order, packed_width(stop - first)),
        sizes.astype(np.min_scalar_type(int(sizes.max(initial=0)))),
        np.flatnonzero(bad),
        np.array(errors[good].sum(dtype=np.float64)),
    ), sum_checksums(checksums, len(features.shards))[number]


def encode_block(block: np.ndarray, space: Space, quantiser: Quantiser) -> tuple[np.ndarray, ...]:
    """Return list, code and squared error of each row of a block."""
    x = space.vectors(block)
    lists = quantiser.assign(x, 1)[1][:, 0]
    codes = quantiser.encode(x, lists)
    errors = x - quantiser.decode(lists, codes)
    return lists.astype(np.int32), codes, np.einsum("ij,ij->i", errors, errors)


def empty_block(quantiser: Quantiser) -> tuple[np.ndarray, ...]:
    """Return what encoding no rows gives."""
    codes = np.empty((0, quantiser.code_size), np.uint8)
    return np.empty(0, np.int32), codes, np.empty(0, np.float32), np.empty(0, bool)


def refuse_bad(features: Features, number: int, bad: np.ndarray, mode: str) -> None:
    """Refuse a shard with rows that cannot be compared, unless they are to be left out."""
    if len(bad) and mode != "keep":
        raise InputError(describe_bad(features, bad + features.offsets[number]))


def finish(out: Path, request: dict[str, Any], options: config.Index, held: int) -> None:
    """Put everything in place, and write the manifest, which makes the folder an index.

    The first ``held`` shards, the quantisers and the encoder are there where shards were added.
    """
    work = out / locks.WORK / FILES
    earlier = read_manifest(out, "index")["shards"] if held else []
    quantiser = read_quantiser((out if held else work) / QUANTISER)
    shards, stored, errors, bad, row_bytes = [], 0, 0.0, 0, 0
    for number, described in enumerate(request["features"]):
        path = (out if number < held else work) / shard_name(number)
        shard = load_shard(path)
        stored, bad = stored + len(shard.ids), bad + len(shard.bad)
        errors, row_bytes = errors + float(shard.self_adc), row_bytes + path.stat().st_size
        read = earlier[number] if number < held else atomic.load_json(checksum_note(path))
        read = {name: read[name] for name in ("checksum",) if name in read}
        shards.append({**described, **read, "file": path.name, "stored": len(shard.ids)})
    body = {
        "command": "index",
        "settings": {**options.as_dict(), "features": str(options.features)},
        "features_at": located(options.features),
        "request": request,
        "shards": shards,
        "rows": sum(shard["rows"] for shard in shards),
        "stored_rows": stored,
        "bad_rows": bad,
        **{n: getattr(quantiser, n) for n in ("dim", "nlist", "m", "nbits", "code_size")},
        "mean_self_adc": errors / max(stored, 1),
        "bytes_a_row": row_bytes / max(stored, 1),
        "quantiser_bytes": ((out if held else work) / QUANTISER).stat().st_size,
    }
    kept = []
    if held:
        kept = [out / name for name in atomic.load_json(out / MANIFEST)["outputs"]]
    atomic.remove_parts(work)  # of a run that was killed
    out_folder.publish(out, "index", body, [p for p in work.rglob("*") if p.is_file()], kept)


def describe(index: Index, state: str) -> str:
    """Return the summary that the command prints."""
    held = index.manifest
    did = {"done": "already indexed", "append": "added to"}.get(state, "indexed")
    lines = [
        f"{did} {index.folder}: {held['rows']:,} rows of {len(held['shards'])} shards in "
        f"{index.nlist:,} lists, codes of {held['m']} x {held['nbits']} bits",
        f"{held['bytes_a_row']:.2f} bytes a row on disk; centroids and codebooks "
        f"{held['quantiser_bytes']:,} bytes apart",
        f"mean squared quantisation error {held['mean_self_adc']:.4f}",
    ]
    if held["bad_rows"]:
        lines.append(f"{held['bad_rows']:,} NaN, infinite or zero rows are in no list")
    return "\n".join(lines)
