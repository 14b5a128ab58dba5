"""``snip compress``: the descriptors of features, shard for shard, as ``.npy``."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from snipdedup import config, progress
from snipdedup.encoder.network import WEIGHTS, Encoder
from snipdedup.errors import InputError, SnipError
from snipdedup.features.hashing import Checksums, checksum_text, sum_checksums
from snipdedup.features.scan import refuse_bad
from snipdedup.features.shards import Features, accept_dates, open_features, request_of, source_name
from snipdedup.parallel import ALIGNED_ROWS, aligned_spans, cores, ordered_map
from snipdedup.storage import atomic, locks, out_folder
from snipdedup.storage.out_folder import is_finished, read_manifest

READ_ROWS = 8 * ALIGNED_ROWS  # rows read and encoded by one thread at a time
DESCRIPTORS = "descriptors"  # what a manifest calls such a folder


@dataclass(frozen=True)
class Descriptors:
    """What ``snip compress`` wrote; `str` of it is the summary."""

    folder: Path
    files: list[Path]  # one .npy a shard of the features, (rows, dim), in their order
    rows: int
    dim: int
    summary: str

    def __str__(self) -> str:
        return self.summary


@locks.released()
def run(options: config.Compress) -> Descriptors:
    """Write the descriptors of all shards; what a stopped run finished is not made again."""
    started = time.monotonic()
    features = open_features(options.features, **options.some("parts", "array", "column"))
    encoder = Encoder.load(options.encoder, options.device)
    encoder.check_width(features, options.encoder)
    names = descriptor_names(features)
    out = Path(options.out).expanduser()
    out_folder.refuse_output_inside(out, [*features.inputs(), Path(options.encoder).expanduser()])
    request = {
        "encoder": encoder.manifest["outputs"][WEIGHTS]["sha256"],
        "dtype": options.dtype,
        "array": options.array,
        "column": options.column,
        **request_of(features),
    }
    if is_finished(out):  # other dates of the same rows are the same input
        accept_dates(request, features, read_manifest(out, DESCRIPTORS))
    result = partial(Descriptors, out, [out / name for name in names], features.rows, encoder.dim)
    if out_folder.claim(out, DESCRIPTORS, request, overwrite=options.overwrite) == "done":
        return result(f"{out} is finished already with these settings; --overwrite makes it anew")
    work, threads = out / locks.WORK, cores(options.threads) if encoder.device == "cpu" else 1
    with out_folder.released_on(InputError, out):
        checksums = compress_shards(features, encoder, work, names, options.dtype, threads)
        features.refuse_changed()
    described = zip(features.describe(), checksums, strict=True)
    seconds = time.monotonic() - started
    body = {
        "command": "compress",
        "settings": {**options.as_dict(), "features": source_name(options.features)},
        "request": request,
        "encoder_sha256": request["encoder"],
        "shards": [{**shard, "checksum": checksum} for shard, checksum in described],
        "counts": {"rows": features.rows, "dim": encoder.dim},
        "seconds": {"all": round(seconds, 3)},
    }
    out_folder.publish(out, DESCRIPTORS, body, [work / out_folder.FILES / name for name in names])
    size = features.rows * encoder.dim * np.dtype(options.dtype).itemsize
    return result(
        f"{features.rows:,} rows in {len(names)} shards: {encoder.dim_in} wide to {encoder.dim} "
        f"({size / 1e6:,.1f} MB {options.dtype}) in {seconds:.1f} s, in {out}"
    )


def descriptor_names(features: Features) -> list[str]:
    """Return the file name of each shard's descriptors; refuse two shards of one name."""
    names: dict[str, Path] = {}
    for shard in features.shards:
        name = f"{shard.path.stem}.npy"
        if name in names:
            raise SnipError(
                f"{names[name]} and {shard.path} would both be written as {name}; compress them "
                "into two folders"
            )
        names[name] = shard.path
    return list(names)


def compress_shards(
    features: Features, encoder: Encoder, work: Path, names: list[str], dtype: str, threads: int
) -> list[str]:
    """Write the shards that are not there yet; return the checksum of each input shard."""
    checksums = []
    with progress.bar(features.rows, "compressing", "rows") as bar:
        for number, name in enumerate(names):
            path, done_file = work / out_folder.FILES / name, work / f"{name}.json"
            if not atomic.is_done(done_file, path.parent):
                checksum = compress_shard(features, number, encoder, path, dtype, threads)
                atomic.write_done_file(done_file, [path], {"checksum": checksum})
            checksums.append(atomic.load_json(done_file)["checksum"])
            bar.update(features.shards[number].rows)
    return checksums


def compress_shard(
    features: Features, number: int, encoder: Encoder, path: Path, dtype: str, threads: int
) -> str:
    """Write one shard's descriptors as they are made; return the checksum of the input shard."""
    first, stop = (int(row) for row in features.offsets[number : number + 2])

    def encode(span: tuple[int, int]) -> tuple[np.ndarray, Checksums]:
        rows = features.read(*span)
        refuse_bad(features, np.arange(*span), rows)
        return encoder.encode(rows, span[0]), features.checksums(span[0], rows)

    checksums, spans = [], aligned_spans(first, stop, READ_ROWS)
    with atomic.writing_npy(path, np.dtype(dtype), (stop - first, encoder.dim)) as file:
        for block, read in ordered_map(encode, spans, threads):
            block.astype(dtype).tofile(file)
            checksums.append(read)
    return checksum_text(sum_checksums(checksums, len(features.shards))[number])
