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
from snipdedup.errors import InputError, SnipError
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
from snipdedup.shards import CrcLedger, Features, accept_dates, open_features, request_of

if TYPE_CHECKING:
    from snipdedup.encoder import Encoder

QUANTISER, ENCODER = "quantizer.faiss", "encoder"
FILES = "files"  # below the work folder: what is written before all of it is whole
READ_ROWS = 8 * BLOCK  # rows read and encoded by one thread at a time
WALK_ROWS = 1 << 20  # entries of the lists looked at together


def run(options: settings.Index) -> str:
    """Build, continue or grow an index; see `build`."""
    features = open_features(
        options.features, parts=options.parts, array=options.array, column=options.column
    )
    options = expanded(options)
    out = Path(options.out)
    source = Path(options.features) if isinstance(options.features, str | Path) else None
    read = [Path(name) for name in (options.base, options.encoder) if name is not None]
    for target in (out, *([Path(options.export_faiss)] if options.export_faiss else [])):
        store.refuse_output_inside(target, [*features.inputs(), *read])
    index, state = build(features, out, options, as_stored=is_descriptors(source))
    said = describe(index, state)
    if options.export_faiss is not None:
        size = export_faiss(index, Path(options.export_faiss))
        said += f"\nwrote {options.export_faiss} for plain faiss, {size:,} bytes"
    return said


def expanded(options: settings.Index) -> settings.Index:
    """Return settings with ``~`` replaced in every path."""
    names = ("features", "out", "encoder", "base", "export_faiss")
    given = options.as_dict()
    for name in names:
        if isinstance(given[name], str | Path):
            given[name] = str(Path(given[name]).expanduser())
    return settings.Index(**given)


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
    base = open_base(options.base)
    encoder = choose_encoder(options.encoder, base)
    request = {
        **request_of(features),
        "as_stored": as_stored,
        "encoder": identity(encoder / store.MANIFEST) if encoder else None,
        "base": identity(base) if base else None,
        **{n: getattr(options, n) for n in ("nlist", "m", "nbits", "train_rows", "seed")},
    }
    space = Space.of(encoder, features.dim, as_stored)
    check_shape(features, space, base, options)
    state, request = claim(out, request, features, options)
    if state == "done":
        return Index.open(out), state
    held = len(store.read_manifest(out, "index")["shards"]) if state == "append" else 0
    if held:
        space = Space.of(held_encoder(out), features.dim, bool(request["as_stored"]))
    work = out / store.WORK / FILES
    try:
        if not held and not (work / QUANTISER).is_file():
            write_quantiser(work / QUANTISER, make_quantiser(features, space, base, options))
        quantiser = read_quantiser((out if held else work) / QUANTISER)
        write_shards(features, held, space, quantiser, work, options)
    except InputError:
        store.release(out)  # what stood there before, stands
        raise
    if encoder is not None and not held:
        copy_encoder(encoder, work / ENCODER)
    finish(out, request, options, held)
    return Index.open(out), state


def check_shape(
    features: Features, space: Space, base: Path | None, options: settings.Index
) -> None:
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
    options: settings.Index,
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
            if number >= held and not (path.is_file() and crc_note(path).is_file()):
                codes, crc = encode_shard(features, number, space, quantiser, threads)
                refuse_bad(features, number, codes.bad, options.bad_rows)
                save_shard(path, codes)
                store.save_json(crc_note(path), {"crc32": f"{crc:08x}"})
            bar.update(shard.rows)


def crc_note(path: Path) -> Path:
    """Return where the CRC32 of a shard of features is noted until the manifest holds it."""
    return path.parent.parent / f"{path.name}.json"


def claim(
    out: Path, request: dict[str, Any], features: Features, options: settings.Index
) -> tuple[str, dict[str, Any]]:
    """Take ``out`` as `store.claim` does; with ``--append``, go on where it has fewer shards."""
    if (out / store.MANIFEST).is_file():
        manifest = store.read_manifest(out, "index")
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
                return "append", grow(out, earlier, request)
            if options.append:
                request = merged_request(out, earlier, request)
    state = store.claim(out, "index", request, overwrite=options.overwrite, late=True)
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
    note = out / store.WORK / store.REQUEST
    if not note.is_file() or store.load_json(note) != request:
        store.empty_work(out)
        store.save_json(note, request)
    return request


def merged_request(out: Path, earlier: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return the finished request with more shards; settings left at their default are kept."""
    kept = {**earlier, **{name: now[name] for name in ("features", "features_changed")}}
    given = {name: value for name, value in now.items() if value not in (None, 0, False)}
    differing = store.differences({n: kept.get(n) for n in given}, given)
    if differing:
        raise SnipError(
            f"--out {out} was built with other {'; '.join(differing)}; --append goes on with its "
            "own quantisers and encoder: leave these flags away"
        )
    return kept


def remove_files(out: Path) -> None:
    """Remove an index's files that no manifest names, of a run stopped at its last step."""
    for path in (*out.glob("lists_*.npz"), out / QUANTISER):
        path.unlink(missing_ok=True)
    shutil.rmtree(out / ENCODER, ignore_errors=True)


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
            store.read_manifest(Path(given).expanduser(), "encoder")
        return Path(given).expanduser() if given is not None else None
    if given is not None and not same_encoder(given, of_base):
        raise SnipError(
            f"--encoder {given} is not the one that the quantisers of --base were trained with "
            f"({of_base}); leave --encoder away"
        )
    return of_base


def same_encoder(given: str | Path, held: Path) -> bool:
    """Tell whether a folder that was given holds the encoder of another one."""
    manifest = Path(given).expanduser() / store.MANIFEST
    return identity(manifest) == identity(held / store.MANIFEST)


def held_encoder(folder: Path) -> Path | None:
    """Return the encoder's folder in an index, None where it holds none."""
    return folder / ENCODER if (folder / ENCODER / store.MANIFEST).is_file() else None


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
    def of(cls, folder: Path | None, dim_in: int, as_stored: bool) -> Space:
        """Return the space of an encoder's folder, or of rows by themselves."""
        if folder is None:
            return cls(None, as_stored, dim_in, dim_in)
        from snipdedup.encoder import Encoder

        encoder = Encoder.load(folder, device="cpu")
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
        return read_quantiser(base)
    m = options.m or default_m(space.dim, settings.INDEX_M)
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
) -> tuple[ShardCodes, int]:
    """Encode the rows of one shard, wherever it lies among the others; return its CRC32 too."""
    first, stop = (int(n) for n in features.offsets[number : number + 2])
    cuts = range(first - first % READ_ROWS, stop, READ_ROWS)
    spans = [(max(cut, first), min(cut + READ_ROWS, stop)) for cut in cuts]

    ledger = CrcLedger(len(features.shards))

    def encode(span: tuple[int, int]) -> tuple[np.ndarray, ...]:
        rows, crcs = features.read_with_crc(*span)
        ledger.add(crcs)
        bad = bad_rows(rows)
        if bad.any():  # a copy: rows may be the caller's own array
            rows = np.where(bad[:, None], 0, rows)
        return *in_blocks(lambda b: encode_block(b, space, quantiser), rows, span[0]), bad

    parts = [empty_block(quantiser), *in_order(encode, spans, threads)]
    lists, codes, errors, bad = (np.concatenate(c) for c in zip(*parts, strict=True))
    good = np.flatnonzero(~bad)
    order = good[np.argsort(lists[good], kind="stable")]
    sizes = np.bincount(lists[good], minlength=quantiser.nlist)
    shard = features.shards[number]
    crc = ledger.totals()[number] if shard.rows else shard.crc_piece(0, shard.read(0, 0))[0]
    return ShardCodes(
        codes[order],
        pack(order, packed_width(stop - first)),
        sizes.astype(np.min_scalar_type(int(sizes.max(initial=0)))),
        np.flatnonzero(bad),
        np.array(errors[good].sum(dtype=np.float64)),
    ), crc


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


def finish(out: Path, request: dict[str, Any], options: settings.Index, held: int) -> None:
    """Put everything in place, and write the manifest, which makes the folder an index.

    The first ``held`` shards, the quantisers and the encoder are there where shards were added.
    """
    work = out / store.WORK / FILES
    earlier = store.read_manifest(out, "index")["shards"] if held else []
    quantiser = read_quantiser((out if held else work) / QUANTISER)
    shards, stored, errors, bad, row_bytes = [], 0, 0.0, 0, 0
    for number, described in enumerate(request["features"]):
        path = (out if number < held else work) / shard_name(number)
        shard = load_shard(path)
        stored, bad = stored + len(shard.ids), bad + len(shard.bad)
        errors, row_bytes = errors + float(shard.self_adc), row_bytes + path.stat().st_size
        crc = earlier[number] if number < held else store.load_json(crc_note(path))
        crc = {name: crc[name] for name in ("crc32",) if name in crc}
        shards.append({**described, **crc, "file": path.name, "stored": len(shard.ids)})
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
        "quantiser_bytes": ((out if held else work) / QUANTISER).stat().st_size,
    }
    kept = []
    if held:
        kept = [out / name for name in store.load_json(out / store.MANIFEST)["outputs"]]
    else:
        store.clear(out, keep_work=True)
        remove_files(out)
    store.publish(out, "index", body, [p for p in work.rglob("*") if p.is_file()], kept)


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
        self.space = Space.of(held_encoder(folder), self._dim_in(), as_stored)
        self.rows, self.nlist = int(self.manifest["rows"]), self.quantiser.nlist
        self.dim, self.code_size = self.quantiser.dim, self.quantiser.code_size
        sizes = [shard["rows"] for shard in self.manifest["shards"]]
        self.offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    def _dim_in(self) -> int:
        folder = held_encoder(self.folder)
        if folder is None:
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
