"""The index: each row as a coarse list and a short PQ code, row numbers implied.

A folder holds the trained quantisers once and, for each shard of features, one file of codes
sorted by list. A row's number is the shard's offset plus a packed local number, so a row costs
its code and a few bytes. What a row's code is depends on the row, its global number and the
quantisers only: rows are encoded in whole blocks aligned to global rows, one thread a block.
"""

from __future__ import annotations

import shutil
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from snipdedup import progress, settings, store
from snipdedup.compute import cores, in_order
from snipdedup.cosine import bad_rows, unit_rows
from snipdedup.errors import SnipError
from snipdedup.quantise import (
    BLOCK,
    LEAST_SAMPLE,
    POINTS_A_LIST,
    Quantiser,
    check_m,
    default_m,
    default_nlist,
    draw_sample,
    in_blocks,
    read_quantiser,
    train,
    write_quantiser,
)
from snipdedup.scan import describe_bad
from snipdedup.shards import Features, open_features

if TYPE_CHECKING:
    from snipdedup.encoder import Encoder

QUANTISER, ENCODER = "quantizer.faiss", "encoder"
READ_ROWS = 8 * BLOCK  # rows read and encoded by one thread at a time
WALK_ROWS = 1 << 20  # entries of the lists looked at together


def run(options: settings.Index) -> str:
    """Build, continue or grow an index; see `build`."""
    features = open_features(
        options.features, parts=options.parts, array=options.array, column=options.column
    )
    out = Path(options.out)
    source = Path(options.features) if isinstance(options.features, str | Path) else None
    store.refuse_output_inside(out, features.inputs())
    if options.export_faiss is not None:
        store.refuse_output_inside(Path(options.export_faiss), features.inputs())
    index, state = build(features, out, options, as_stored=is_descriptors(source))
    said = describe(index, state)
    if options.export_faiss is not None:
        size = export_faiss(index, Path(options.export_faiss))
        said += f"\nwrote {options.export_faiss} for plain faiss, {size:,} bytes"
    return said


def is_descriptors(source: Path | None) -> bool:
    """Tell whether FEATURES is what ``snip compress`` wrote: vectors to be taken as they are."""
    if source is None or not (source / store.MANIFEST).is_file():
        return False
    return bool(store.load_json(source / store.MANIFEST).get("kind") == "descriptors")


def build(
    features: Features, out: Path, options: settings.Index, *, as_stored: bool = False
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
    threads = cores(options.threads)
    base = open_base(options.base)
    encoder = choose_encoder(options.encoder, base)
    request = {
        "features": features.describe(),
        "as_stored": as_stored,
        "encoder": identity(encoder / store.MANIFEST) if encoder else None,
        "base": identity(base) if base else None,
        **{n: getattr(options, n) for n in ("nlist", "m", "nbits", "train_rows", "seed")},
    }
    state, request = claim(out, request, options)
    if state == "done":
        return Index.open(out), state
    if encoder is not None and state != "append":
        copy_encoder(encoder, out / ENCODER)
    space = Space.of(out, features.dim, as_stored)
    if not (out / QUANTISER).is_file():
        write_quantiser(out / QUANTISER, make_quantiser(features, space, base, options))
    quantiser = read_quantiser(out / QUANTISER)
    names = [shard_name(number) for number in range(len(features.shards))]
    with progress.bar(features.rows, "indexing", "rows") as bar:
        for number, name in enumerate(names):
            if not (out / name).is_file():
                shard = encode_shard(features, number, space, quantiser, threads)
                refuse_bad(features, number, shard.bad, options.bad_rows)
                save_shard(out / name, shard)
            bar.update(features.shards[number].rows)
    finish(out, request, options, names)
    return Index.open(out), state


def claim(
    out: Path, request: dict[str, Any], options: settings.Index
) -> tuple[str, dict[str, Any]]:
    """Take ``out`` as `store.claim` does; with ``--append``, go on where it has fewer shards."""
    if not options.overwrite and (out / store.MANIFEST).is_file():
        earlier = store.read_manifest(out, "index")["request"]
        held, now = earlier["features"], request["features"]
        if len(held) < len(now) and now[: len(held)] == held:
            if not options.append:
                raise SnipError(
                    f"--out {out} holds an index of the first {len(held)} of {len(now)} shards; "
                    "add the others with --append, or replace it with --overwrite"
                )
            return "append", grow(out, earlier, request)
        if options.append:
            request = merged_request(out, earlier, request)
    state = store.claim(out, "index", request, overwrite=options.overwrite)
    if state == "new":  # a run that was stopped and is replaced leaves files without a manifest
        drop_shards(out, 0)
        (out / QUANTISER).unlink(missing_ok=True)
        shutil.rmtree(out / ENCODER, ignore_errors=True)
    return state, request


def grow(out: Path, earlier: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """Note that shards are being added; keep those that the same stopped run added."""
    request = merged_request(out, earlier, request)
    note = out / store.WORK / store.REQUEST
    if not note.is_file() or store.load_json(note) != request:
        drop_shards(out, len(earlier["features"]))
        store.save_json(note, request)
    return request


def merged_request(out: Path, earlier: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return the finished request with more shards; settings left at their default are kept."""
    kept = {**earlier, "features": now["features"]}
    given = {name: value for name, value in now.items() if value not in (None, 0, False)}
    differing = store.differences({n: kept.get(n) for n in given}, given)
    if differing:
        raise SnipError(
            f"--out {out} was built with other {'; '.join(differing)}; --append goes on with its "
            "own quantisers and encoder: leave these flags away"
        )
    return kept


def drop_shards(out: Path, first: int) -> None:
    """Remove shard files from number ``first`` on."""
    number = first
    for path in sorted(out.glob("lists_*.npz")):
        number = int(path.stem.removeprefix("lists_"))
        if number >= first:
            path.unlink()


def identity(path: Path) -> str:
    """Return what tells one encoder or base from another: the file's SHA-256."""
    if not path.is_file():
        raise SnipError(f"no such file: {path}")
    return store.sha256(path)


def open_base(base: str | None) -> Path | None:
    """Return the quantiser file that ``--base`` means: a folder of ours, or a faiss file."""
    if base is None:
        return None
    path = Path(base).expanduser()
    if path.is_dir():
        store.read_manifest(path, "index")
        path = path / QUANTISER
    if not path.is_file():
        raise SnipError(f"--base: no such file or index folder: {base}")
    return path


def choose_encoder(given: str | None, base: Path | None) -> Path | None:
    """Return the encoder's folder; quantisers of ours that were trained on one keep it."""
    of_base = base.parent / ENCODER if base is not None and base.name == QUANTISER else None
    if of_base is None or not of_base.is_dir():
        if given is not None:
            store.read_manifest(Path(given), "encoder")
        return Path(given) if given is not None else None
    if given is not None and identity(Path(given) / store.MANIFEST) != identity(
        of_base / store.MANIFEST
    ):
        raise SnipError(
            f"--encoder {given} is not the one that the quantisers of --base were trained with "
            f"({of_base}); leave --encoder away"
        )
    return of_base


def copy_encoder(source: Path, target: Path) -> None:
    """Put the encoder into the index, so that the folder is all that a search needs."""
    manifest = store.read_manifest(source, "encoder")
    for name in (*manifest["outputs"], store.MANIFEST):  # the manifest last, as everywhere
        with store.replacing(target / name) as part:
            shutil.copyfile(source / name, part)


@dataclass(frozen=True)
class Space:
    """How a row becomes the vector that is quantised."""

    encoder: Encoder | None
    as_stored: bool
    dim_in: int
    dim: int

    @classmethod
    def of(cls, folder: Path, dim_in: int, as_stored: bool) -> Space:
        """Return the space of an index folder, which may hold an encoder."""
        if not (folder / ENCODER / store.MANIFEST).is_file():
            return cls(None, as_stored, dim_in, dim_in)
        from snipdedup.encoder import Encoder

        encoder = Encoder.load(folder / ENCODER, device="cpu")
        if encoder.dim_in != dim_in:
            raise SnipError(
                f"the encoder expects rows {encoder.dim_in} wide, the features are {dim_in} wide"
            )
        return cls(encoder, as_stored, encoder.dim_in, encoder.dim)

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Return what is quantised: descriptors, unit rows, or rows as they are, float32."""
        if self.encoder is not None:
            return self.encoder.encode(rows)
        return rows.astype(np.float32) if self.as_stored else unit_rows(rows)


def make_quantiser(
    features: Features, space: Space, base: Path | None, options: settings.Index
) -> Quantiser:
    """Return the base's quantisers, or train new ones on a sample."""
    if base is not None:
        quantiser = read_quantiser(base)
        check_base(base, quantiser, space.dim, options)
        return quantiser
    m = options.m or default_m(space.dim, settings.INDEX_M)
    check_m(m, space.dim)
    lists = options.nlist or default_nlist(features.rows, features.rows)
    wanted = options.train_rows or max(POINTS_A_LIST * lists, LEAST_SAMPLE)
    threads = cores(options.threads)
    sample = draw_sample(features, space.vectors, wanted, options.seed, threads)
    return train(
        sample,
        nlist=options.nlist or default_nlist(features.rows, len(sample)),
        m=m,
        nbits=options.nbits or settings.INDEX_NBITS,
        seed=options.seed,
        threads=threads,
    )


def check_base(path: Path, quantiser: Quantiser, dim: int, options: settings.Index) -> None:
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


class ShardCodes(NamedTuple):
    """One shard's rows, sorted by list.

    Attributes
    ----------
    codes : (n, code_size) uint8
    ids : (n, width) uint8
        Rows of the shard, packed by `pack`; ascending in each list.
    sizes : (nlist,) unsigned
        Rows a list.
    bad : (b,) int64
        Rows of the shard that are NaN, infinity or zero: in no list.
    self_adc : () float64
        Sum of ‖x − q(x)‖² over the rows.
    """

    codes: np.ndarray
    ids: np.ndarray
    sizes: np.ndarray
    bad: np.ndarray
    self_adc: np.ndarray


def encode_shard(
    features: Features, number: int, space: Space, quantiser: Quantiser, threads: int
) -> ShardCodes:
    """Encode the rows of one shard, wherever it lies among the others."""
    first, stop = (int(n) for n in features.offsets[number : number + 2])
    cuts = range(first - first % READ_ROWS, stop, READ_ROWS)
    spans = [(max(cut, first), min(cut + READ_ROWS, stop)) for cut in cuts]

    def encode(span: tuple[int, int]) -> tuple[np.ndarray, ...]:
        rows = features.read(*span)
        bad = bad_rows(rows)
        rows[bad] = 0
        return *in_blocks(lambda b: encode_block(b, space, quantiser), rows, span[0]), bad

    parts = [empty_block(quantiser), *in_order(encode, spans, threads)]
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
    )


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
        raise SnipError(describe_bad(features, bad + features.offsets[number]))


def packed_width(rows: int) -> int:
    """Return the bytes that a row number below ``rows`` needs."""
    return max(1, (max(rows - 1, 0).bit_length() + 7) // 8)


def pack(numbers: np.ndarray, width: int) -> np.ndarray:
    """Return numbers as their lowest ``width`` bytes, (n, width) uint8."""
    wide = np.ascontiguousarray(numbers, "<i8").view(np.uint8).reshape(-1, 8)
    return np.ascontiguousarray(wide[:, :width])


def unpack(packed: np.ndarray) -> np.ndarray:
    """Return the numbers that `pack` took, (n,) int64."""
    wide = np.zeros((len(packed), 8), np.uint8)
    wide[:, : packed.shape[1]] = packed
    return wide.view("<i8")[:, 0].astype(np.int64, copy=False)


def shard_name(number: int) -> str:
    """Return the name of a shard's file."""
    return f"lists_{number:05d}.npz"


def save_shard(path: Path, shard: ShardCodes) -> None:
    """Write one shard."""
    store.save_npz(path, **shard._asdict())


def load_shard(path: Path) -> ShardCodes:
    """Read one shard.

    Raises
    ------
    SnipError
        If the file is missing, truncated or of another layout.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            shard = ShardCodes(*(arrays[name] for name in ShardCodes._fields))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise SnipError(
            f"{path}: not a shard of an index, or damaged ({error}); remove it and run snip index "
            "again"
        ) from error
    if len(shard.codes) != len(shard.ids) or int(shard.sizes.sum(dtype=np.int64)) != len(shard.ids):
        raise SnipError(f"{path}: damaged: its lists do not add up; remove it and index again")
    return shard


def finish(out: Path, request: dict[str, Any], options: settings.Index, names: list[str]) -> None:
    """Write the manifest, which makes the folder an index."""
    quantiser = read_quantiser(out / QUANTISER)
    shards, stored, errors, bad = [], 0, 0.0, 0
    for name, described in zip(names, request["features"], strict=True):
        shard = load_shard(out / name)
        stored, bad = stored + len(shard.ids), bad + len(shard.bad)
        errors += float(shard.self_adc)
        shards.append({**described, "file": name, "stored": len(shard.ids)})
    outputs = [out / QUANTISER, *(out / name for name in names)]
    if (out / ENCODER).is_dir():
        outputs += [path for path in (out / ENCODER).iterdir() if not path.name.startswith(".")]
    row_bytes = sum((out / name).stat().st_size for name in names)
    body = {
        "command": "index",
        "settings": {**options.as_dict(), "features": str(options.features)},
        "request": request,
        "shards": shards,
        "rows": sum(shard["rows"] for shard in shards),
        "stored_rows": stored,
        "bad_rows": bad,
        **{n: getattr(quantiser, n) for n in ("dim", "nlist", "m", "nbits", "code_size")},
        "mean_self_adc": errors / max(stored, 1),
        "bytes_a_row": row_bytes / max(stored, 1),
        "quantiser_bytes": (out / QUANTISER).stat().st_size,
    }
    store.write_manifest(out, "index", body, outputs)
    shutil.rmtree(out / store.WORK, ignore_errors=True)


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


class Lists:
    """Codes of many rows, sorted by list, with packed row numbers, in memory.

    Attributes
    ----------
    codes : (n, code_size) uint8
    ids : (n, width) uint8
        Global rows, packed; ascending in each list.
    starts : (nlist + 1,) int64
        Where each list begins, then n.
    """

    def __init__(self, codes: np.ndarray, ids: np.ndarray, starts: np.ndarray) -> None:
        self.codes, self.ids, self.starts = codes, ids, starts

    def rows(self, places: np.ndarray | slice) -> np.ndarray:
        """Return the global rows at places in the sorted order, (n,) int64."""
        return unpack(self.ids[places])

    def list_of(self, low: int, high: int) -> np.ndarray:
        """Return the list of each place from ``low`` to ``high``, (n,) int64."""
        return np.searchsorted(self.starts, np.arange(low, high), side="right") - 1

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield (low, high) places of whole lists, about `WALK_ROWS` at a time."""
        low = 0
        for high in self.starts[1:].tolist():
            if high - low >= WALK_ROWS:
                yield low, high
                low = high
        if low < len(self.ids):
            yield low, len(self.ids)


class Index:
    """A finished index folder.

    Attributes
    ----------
    folder : Path
    manifest : dict
    quantiser : Quantiser
    space : Space
    rows, nlist, dim, code_size : int
        ``rows`` counts bad ones too, which are in no list; ``dim`` is the width of the vectors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = store.read_manifest(folder, "index")
        self.quantiser = read_quantiser(folder / QUANTISER)
        as_stored = bool(self.manifest["request"]["as_stored"])
        self.space = Space.of(folder, self._dim_in(), as_stored)
        self.rows, self.nlist = int(self.manifest["rows"]), self.quantiser.nlist
        self.dim, self.code_size = self.quantiser.dim, self.quantiser.code_size
        sizes = [shard["rows"] for shard in self.manifest["shards"]]
        self.offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    def _dim_in(self) -> int:
        folder = self.folder / ENCODER
        if not (folder / store.MANIFEST).is_file():
            return self.quantiser.dim
        from snipdedup.encoder import Encoder

        return Encoder.load(folder, device="cpu").dim_in

    @classmethod
    def open(cls, folder: str | Path) -> Index:
        """Open a folder that ``snip index`` finished."""
        return cls(Path(folder).expanduser())

    @property
    def encoder(self) -> Encoder | None:
        """The encoder that rows go through, if any."""
        return self.space.encoder

    def shards(self) -> Iterator[tuple[int, ShardCodes]]:
        """Yield (first global row, codes) of each shard, in order."""
        for first, shard in zip(self.offsets[:-1], self.manifest["shards"], strict=True):
            yield int(first), load_shard(self.folder / shard["file"])

    def bad_rows(self) -> np.ndarray:
        """Return the rows that are in no list, ascending, (b,) int64."""
        parts = [shard.bad + first for first, shard in self.shards()]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def lists(self) -> Lists:
        """Load all codes, shard by shard, into one array sorted by list.

        A row takes its code and as many bytes as its number needs; in a list, rows ascend.
        """
        sizes = np.zeros(self.nlist, np.int64)
        for _, shard in self.shards():
            sizes += shard.sizes
        starts = np.concatenate([[0], np.cumsum(sizes)])
        codes = np.empty((int(starts[-1]), self.code_size), np.uint8)
        ids = np.empty((int(starts[-1]), packed_width(self.rows)), np.uint8)
        cursor = starts[:-1].copy()
        for first, shard in self.shards():
            counts = shard.sizes.astype(np.int64)
            begins = np.cumsum(counts) - counts
            places = np.repeat(cursor - begins, counts) + np.arange(len(shard.ids))
            codes[places] = shard.codes
            ids[places] = pack(unpack(shard.ids) + first, ids.shape[1])
            cursor += counts
        return Lists(codes, ids, starts)

    def decode(self, lists: Lists, low: int, high: int) -> np.ndarray:
        """Return q(y) of the places ``low`` to ``high``, (n, dim) float32."""
        return self.quantiser.decode(lists.list_of(low, high), lists.codes[low:high])


def export_faiss(index: Index, path: Path) -> int:
    """Write one IndexIVFPQ that plain faiss reads, with int64 ids that are global rows.

    faiss would hold 8 bytes an id in memory to write it; here its file is laid out by hand: the
    empty index as faiss serialises it, with the lists put in place of its empty ones (format of
    faiss/impl/index_write.cpp, "ilar").

    Returns
    -------
    int
        Bytes written.
    """
    import faiss

    lists = index.lists()
    ivfpq = read_quantiser(index.folder / QUANTISER).ivfpq
    ivfpq.ntotal = len(lists.ids)
    head = faiss.serialize_index(ivfpq).tobytes()
    empty = array_lists_header(index.nlist, index.code_size, b"sprs", np.empty(0, "<u8"))
    if not head.endswith(empty):
        raise SnipError(f"this faiss ({faiss.__version__}) writes indexes in an unknown layout")
    sizes = np.diff(lists.starts).astype("<u8")
    with store.replacing(path) as part, part.open("wb") as file:
        file.write(head.removesuffix(empty))
        file.write(array_lists_header(index.nlist, index.code_size, b"full", sizes))
        for low, high in pairwise(lists.starts.tolist()):
            file.write(lists.codes[low:high].tobytes())
            file.write(lists.rows(slice(low, high)).astype("<i8").tobytes())
    return path.stat().st_size


def array_lists_header(nlist: int, code_size: int, layout: bytes, sizes: np.ndarray) -> bytes:
    """Return what precedes the lists in a faiss file: full or sparse sizes."""
    counts = np.array([nlist, code_size], "<u8").tobytes()
    return b"ilar" + counts + layout + np.array([sizes.size], "<u8").tobytes() + sizes.tobytes()
