"""``snip index``: each row as a coarse list and a short PQ code, row numbers implied.

A folder holds the trained quantisers once and, for each shard of features, one file of codes
sorted by list. What a row's code is depends on the row, its global number and the quantisers only:
rows are encoded in whole blocks aligned to global rows, one thread a block.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from snipdedup import config, progress
from snipdedup.errors import InputError, SnipError
from snipdedup.features.cosine import bad_rows
from snipdedup.features.hashing import checksum_text, sum_checksums
from snipdedup.features.scan import bad_rows_error
from snipdedup.features.shards import Features, accept_dates, open_features, request_of, source_name
from snipdedup.index import quantizer
from snipdedup.index.folder import (
    ENCODER,
    QUANTISER,
    Index,
    PlainRows,
    ShardCodes,
    agreed_encoder,
    export_faiss,
    held_encoder,
    is_descriptors,
    load_encoder,
    load_shard,
    pack_rows,
    packed_width,
    shard_name,
)
from snipdedup.index.kmeans import Vectors, draw_sample
from snipdedup.index.quantizer import Quantiser, read_quantiser
from snipdedup.parallel import ALIGNED_ROWS, aligned_spans, cores, in_aligned_blocks, ordered_map
from snipdedup.storage import atomic, locks, out_folder
from snipdedup.storage.out_folder import MANIFEST, is_finished, read_manifest
from snipdedup.storage.remote import absolute_location

if TYPE_CHECKING:
    from snipdedup.encoder.network import Encoder

READ_ROWS = 8 * ALIGNED_ROWS  # rows read and encoded by one thread at a time
ROWS = ("features", "features_changed")  # entries of a request that grow with --append


def run(options: config.BuildIndex) -> Index:
    """Build, continue or grow an index, and export it where that is asked for; see `build`."""
    features = open_features(options.features, **options.some("parts", "array", "column"))
    source = options.features if isinstance(options.features, str | Path) else None
    given = [Path(name).expanduser() for name in (options.base, options.encoder) if name]
    inputs, out = [*features.inputs(), *given], Path(options.out).expanduser()
    out_folder.refuse_output_inside(out, inputs)
    if options.export_faiss is None:
        return build(features, out, options, as_stored=is_descriptors(source))
    export = Path(options.export_faiss).expanduser()
    out_folder.refuse_output_file(export, inputs)
    index = build(features, out, options, as_stored=is_descriptors(source))
    out_folder.refuse_output_file(export)  # now that it is known what is in OUT
    index.exported = f"wrote {export} for plain faiss, {export_faiss(index, export):,} bytes"
    return index


@locks.released()
def build(
    features: Features, out: Path, options: config.BuildIndex, *, as_stored: bool = False
) -> Index:
    """Train quantisers, or take those of ``--base``, and write the codes of each shard to ``out``.

    What a stopped run left there is used. ``as_stored``: rows are not scaled to norm 1 (an encoder
    decides by itself).
    """
    sizes = options.some("nlist", "m", "nbits")
    nbits, threads = options.nbits or quantizer.NBITS, cores(options.threads)
    base = None if options.base is None else find_base(options.base)
    known = None if base is None else read_quantiser(base)
    own = None if base is None or base.name != QUANTISER else held_encoder(base.parent)
    folder = agreed_encoder(options.encoder, own, "the quantisers of --base were trained")
    encoder = open_encoder(folder, features, known, as_stored, options.m, nbits)
    request = {
        **request_of(features),
        "as_stored": as_stored,
        "encoder": atomic.sha256(folder / MANIFEST) if folder else None,
        "base": atomic.sha256(base) if base else None,
        **sizes,
        **options.some("train_rows", "seed"),
    }
    m = options.m or quantizer.default_m(encoder.dim)
    check_index_sizes(known, encoder.dim, m, sizes)
    quantizer.check_nlist(options.nlist, features.rows)
    state, request, held = claim_index(out, request, features, options.append, options.overwrite)
    if state == "done":
        return Index(out, "already indexed")
    work = out / locks.WORK / out_folder.FILES
    done_file = work.parent / f"{QUANTISER}.json"
    with out_folder.released_on(InputError, out):
        if held:  # new rows are encoded as those before them were
            encoder = Index(out).encoder
        elif not atomic.is_done(done_file, work):
            known = known or train_on_sample(
                features, encoder.encode, nlist=options.nlist, m=m, nbits=nbits,
                train_rows=options.train_rows, seed=options.seed, threads=threads,
            )  # fmt: skip
            quantizer.write_quantiser(work / QUANTISER, known)
            atomic.write_done_file(done_file, [work / QUANTISER], {})
        quantiser = read_quantiser((out if held else work) / QUANTISER)
        write_codes(
            features, held, encoder.encode, quantiser, work, threads,
            keep_bad=options.bad_rows == "keep",
        )  # fmt: skip
        features.refuse_changed()
    source = options.features
    entries = {
        "command": "index",
        "settings": {**options.as_dict(), "features": source_name(source), "out": str(out)},
        "features_at": absolute_location(source) if isinstance(source, str | Path) else None,
        "request": request,
    }
    finish_index(out, entries, quantiser, folder, held)
    return Index(out, "added to" if held else "indexed")


def find_base(base: str) -> Path:
    """Return the quantiser file that ``--base`` means: a folder of ours, or a faiss file."""
    path = Path(base).expanduser()
    if path.is_dir():
        read_manifest(path, "index")
        path = path / QUANTISER
    if not path.is_file():
        raise SnipError(f"--base: no such file or index folder: {base}")
    return path


def open_encoder(
    folder: Path | None, features: Features, base: Quantiser | None, as_stored: bool,
    m: int | None, nbits: int,
) -> Encoder | PlainRows:  # fmt: skip
    """Return what makes the vectors of rows: a short code keeps more of a head of an encoder."""
    if folder is None:
        return PlainRows(features.dim, as_stored)
    encoder = load_encoder(folder, None if base is None else base.dim)
    encoder.check_width(features, str(folder))
    m = m or quantizer.default_m(encoder.dim)
    return encoder if base is not None else encoder.for_codes(m, nbits)


def check_index_sizes(
    base: Quantiser | None, dim: int, m: int, sizes: dict[str, int | None]
) -> None:
    """Refuse sub-quantisers that do not divide the width, and what contradicts the base."""
    if base is None and dim % m:
        possible = ", ".join(str(n) for n in range(1, min(dim, 256) + 1) if dim % n == 0)
        raise SnipError(f"--m {m} must divide the width {dim} of the vectors: one of {possible}")
    if base is not None and base.dim != dim:
        raise SnipError(
            f"--base quantises vectors {base.dim} wide, these are {dim} wide; give the encoder "
            "(or its absence) that it was trained with"
        )
    for name, value in sizes.items():
        if base is not None and value and value != getattr(base, name):
            raise SnipError(f"--base has {name} {getattr(base, name)}; leave --{name} {value} away")


def claim_index(
    out: Path, request: dict[str, Any], features: Features, append: bool, overwrite: bool
) -> tuple[str, dict[str, Any], int]:
    """Take ``out`` as `out_folder.claim` does; with ``append``, go on where it has fewer shards.

    Returns the state, the request of the index that is to be, and how many shards stay. Settings
    left at their default are those of the index there.
    """
    held = 0
    if is_finished(out):
        manifest = read_manifest(out, "index")
        accept_dates(request, features, manifest)
        earlier, now = manifest["request"], len(request["features"])
        count = len(earlier["features"])
        longer = now > count and all(request[n][:count] == earlier.get(n) for n in ROWS)
        if longer and not append and not overwrite:
            raise SnipError(
                f"--out {out} holds an index of the first {count} of {now} shards; add the "
                "others with --append, or replace it with --overwrite"
            )
        if append and not overwrite:
            given = {name: value for name, value in request.items() if value not in (None, 0)}
            request = {**earlier, **{name: request[name] for name in ROWS}}
            differing = out_folder.differences({n: request.get(n) for n in given}, given)
            if differing:
                raise SnipError(
                    f"--out {out} was built with other {'; '.join(differing)}; --append goes on "
                    "with its own quantisers and encoder: leave these flags away"
                )
            held = count if longer else 0
    # a stopped build from the start and a stopped append do not go on with one another's codes
    work = {**request, "held": held} if held else request
    state = out_folder.claim(out, "index", work, overwrite=overwrite or held > 0)
    return state, request, held


def train_on_sample(
    features: Features, vectors: Vectors, *, nlist: int, m: int, nbits: int, train_rows: int,
    seed: int, threads: int,
) -> Quantiser:  # fmt: skip
    """Train quantisers on ``train_rows`` rows; 0 stands for a number that suits the rows."""
    wanted = train_rows or quantizer.default_sample(features.rows, nlist)
    sample = draw_sample(features, vectors, wanted, seed, threads)
    nlist = nlist or quantizer.default_nlist(features.rows, len(sample))
    return quantizer.train_quantiser(
        sample, nlist=nlist, m=m, nbits=nbits, seed=seed, threads=threads
    )


def write_codes(
    features: Features, held: int, vectors: Vectors, quantiser: Quantiser, work: Path,
    threads: int, *, keep_bad: bool,
) -> None:  # fmt: skip
    """Write the codes of shards from number ``held`` on that are not there yet."""
    with progress.bar(features.rows, "indexing", "rows") as bar:
        for number, shard in enumerate(features.shards):
            path = work / shard_name(number)
            if number >= held and not atomic.is_done(shard_done_file(path), work):
                codes, checksum = encode_shard(features, number, vectors, quantiser, threads)
                if len(codes.bad) and not keep_bad:
                    raise bad_rows_error(features, codes.bad + features.offsets[number])
                atomic.save_npz(path, **codes._asdict())
                body = {"checksum": checksum_text(checksum)}
                atomic.write_done_file(shard_done_file(path), [path], body)
            bar.update(shard.rows)


def shard_done_file(path: Path) -> Path:
    """Return the done file of a shard's codes, which holds the checksum of its features."""
    return path.parent.parent / f"{path.name}.json"


def encode_shard(
    features: Features, number: int, vectors: Vectors, quantiser: Quantiser, threads: int
) -> tuple[ShardCodes, int]:
    """Encode the rows of one shard, wherever it lies among the others; return its checksum too."""
    first, stop = (int(n) for n in features.offsets[number : number + 2])
    checksums = []

    def encode_block(block: np.ndarray) -> tuple[np.ndarray, ...]:
        lists, codes, errors = quantiser.own_code(vectors(block))
        return lists.astype(np.int32), codes, errors

    def encode(span: tuple[int, int]) -> tuple[np.ndarray, ...]:
        rows = features.read(*span)
        checksums.append(features.checksums(span[0], rows))
        bad = bad_rows(rows)
        rows[bad] = 0
        return *in_aligned_blocks(encode_block, rows, span[0]), bad

    no_codes = np.empty((0, quantiser.code_size), np.uint8)
    none = np.empty(0, np.int32), no_codes, np.empty(0, np.float32), np.empty(0, bool)
    parts = [none, *ordered_map(encode, aligned_spans(first, stop, READ_ROWS), threads)]
    lists, codes, errors, bad = (np.concatenate(c) for c in zip(*parts, strict=True))
    good = np.flatnonzero(~bad)
    order = good[np.argsort(lists[good], kind="stable")]
    sizes = np.bincount(lists[good], minlength=quantiser.nlist)
    return ShardCodes(
        codes[order],
        pack_rows(order, packed_width(stop - first)),
        sizes.astype(np.min_scalar_type(int(sizes.max(initial=0)))),
        np.flatnonzero(bad),
        np.array(errors[good].sum(dtype=np.float64)),
    ), sum_checksums(checksums, len(features.shards))[number]


def finish_index(
    out: Path, entries: dict[str, Any], quantiser: Quantiser, encoder: Path | None, held: int
) -> None:
    """Put everything in place, and write the manifest, which makes the folder an index.

    The first ``held`` shards, the quantisers and the encoder are there where shards were added.
    """
    work = out / locks.WORK / out_folder.FILES
    if encoder is not None and not held:  # the folder is all that a search needs
        manifest = read_manifest(encoder, "encoder")
        for name in (*manifest["outputs"], MANIFEST):  # the manifest last, as everywhere
            with atomic.replacing(work / ENCODER / name) as part:
                shutil.copyfile(encoder / name, part)
    earlier = atomic.load_json(out / MANIFEST) if held else {}
    shards, sums = [], []
    for number, described_shard in enumerate(entries["request"]["features"]):
        path = (out if number < held else work) / shard_name(number)
        codes, done_file = load_shard(path), shard_done_file(path)
        sums.append((len(codes.ids), len(codes.bad), float(codes.self_adc), path.stat().st_size))
        read = earlier["shards"][number] if number < held else atomic.load_json(done_file)
        checksum = {"checksum": read["checksum"]} if "checksum" in read else {}
        shards.append({**described_shard, **checksum, "file": path.name, "stored": len(codes.ids)})
    stored, bad, errors, row_bytes = map(sum, zip(*sums, strict=True))
    body = {
        **entries,
        "shards": shards,
        "rows": sum(shard["rows"] for shard in shards),
        "stored_rows": stored,
        "bad_rows": bad,
        **{n: getattr(quantiser, n) for n in ("dim", "nlist", "m", "nbits", "code_size")},
        "mean_self_adc": errors / max(stored, 1),
        "bytes_a_row": row_bytes / max(stored, 1),
        "quantiser_bytes": ((out if held else work) / QUANTISER).stat().st_size,
    }
    kept = [out / name for name in earlier.get("outputs", [])]
    atomic.remove_parts(work)  # of a run that was killed
    out_folder.publish(out, "index", body, [p for p in work.rglob("*") if p.is_file()], kept)
