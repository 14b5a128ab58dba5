"""An index folder: one file of codes a shard, the quantisers, and how a row becomes a vector.

Row numbers are implied by the shard's offset and a packed local number, so a row costs its code
and a few bytes. Files are plain arrays behind a header, so that they can be mapped: what is not
looked at is never read. `export_faiss` writes all as one file that plain faiss reads.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from snipdedup.errors import InputError, SnipError
from snipdedup.features.cosine import unit_rows
from snipdedup.features.formats import BROKEN_ZIP, check_member, load_npz, map_npy, member_begin
from snipdedup.features.shards import Features
from snipdedup.index.quantizer import read_quantiser
from snipdedup.storage import atomic
from snipdedup.storage.listing import is_folder
from snipdedup.storage.out_folder import MANIFEST, as_written, read_manifest
from snipdedup.storage.remote import RemotePath, is_remote

if TYPE_CHECKING:
    from snipdedup.encoder.network import Encoder

QUANTISER, ENCODER = "quantizer.faiss", "encoder"
WALK_ROWS = 1 << 20  # entries of the lists looked at together


class ShardCodes(NamedTuple):
    """One shard's rows, sorted by list; row numbers are of the shard."""

    codes: np.ndarray  # (n, code_size) uint8
    ids: np.ndarray  # (n, width) uint8: rows, packed by `pack_rows`; ascending in each list
    sizes: np.ndarray  # (nlist,) unsigned: rows a list
    bad: np.ndarray  # (b,) int64: rows that are NaN, infinity or zero, in no list
    self_adc: np.ndarray  # () float64: sum of ‖x − q(x)‖² over the rows


class CodeLists(NamedTuple):
    """Codes of many rows in memory, sorted by list; row numbers are global."""

    codes: np.ndarray  # (n, code_size) uint8
    ids: np.ndarray  # (n, width) uint8: rows, packed by `pack_rows`; ascending in each list
    starts: np.ndarray  # (nlist + 1,) int64: where each list begins, then n

    def rows(self, places: np.ndarray | slice) -> np.ndarray:
        """Return the global rows at places in the sorted order, (n,) int64."""
        return unpack_rows(self.ids[places])

    def list_at(self, places: np.ndarray) -> np.ndarray:
        """Return the list of each of some places, (n,) int64."""
        return np.searchsorted(self.starts, places, side="right") - 1

    def spans(self) -> Iterator[tuple[int, int]]:
        """Yield (low, high) places of whole lists, about `WALK_ROWS` at a time."""
        low = 0
        for high in self.starts[1:].tolist():
            if high - low >= WALK_ROWS:
                yield low, high
                low = high
        if low < len(self.ids):
            yield low, len(self.ids)


def packed_width(rows: int) -> int:
    """Return the bytes that a row number below ``rows`` needs."""
    return max(1, (max(rows - 1, 0).bit_length() + 7) // 8)


def pack_rows(numbers: np.ndarray, width: int) -> np.ndarray:
    """Return numbers as their lowest ``width`` bytes, (n, width) uint8."""
    wide = np.ascontiguousarray(numbers, "<i8").view(np.uint8).reshape(-1, 8)
    return np.ascontiguousarray(wide[:, :width])


def unpack_rows(packed: np.ndarray) -> np.ndarray:
    """Return the numbers that `pack_rows` took, (n,) int64."""
    wide = np.zeros((len(packed), 8), np.uint8)
    wide[:, : packed.shape[1]] = packed
    return wide.view("<i8")[:, 0].astype(np.int64, copy=False)


def shard_name(number: int) -> str:
    """Return the name of a shard's file."""
    return f"lists_{number:05d}.npz"


def load_shard(path: Path, *, mapped: bool = False) -> ShardCodes:
    """Read one shard, or refuse it; ``mapped``, its arrays are read where they are looked at."""
    try:
        if mapped:
            with zipfile.ZipFile(path) as archive:
                shard = ShardCodes(*(map_member(path, archive, n) for n in ShardCodes._fields))
        else:
            shard = ShardCodes(**load_npz(path, ShardCodes._fields))
        kinds = [(array.ndim, array.dtype.kind) for array in shard]
        bytes_ = shard.codes.dtype.itemsize * shard.ids.dtype.itemsize
        if kinds != [(2, "u"), (2, "u"), (1, "u"), (1, "i"), (0, "f")] or bytes_ != 1:
            raise ValueError("its arrays are of other shapes or types")
        count = len(shard.ids)
        if len(shard.codes) != count or not 1 <= shard.ids.shape[1] <= 8:
            raise ValueError("as many codes as row numbers expected")
        if shard.sizes.sum(dtype=np.int64) != count or shard.sizes.max(initial=0) > count:
            raise ValueError("its lists do not add up")
    except (InputError, KeyError, *BROKEN_ZIP) as error:
        raise damaged_shard(path, str(error)) from error
    return shard


def map_member(path: Path, archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """Return one array of an uncompressed ``.npz`` without reading it."""
    member = archive.getinfo(f"{name}.npy")
    if member.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    check_member(member, path.stat().st_size)
    return map_npy(path, member_begin(path, member), member.file_size)


def damaged_shard(path: Path, why: str) -> SnipError:
    """Return the refusal of a shard's file."""
    return SnipError(
        f"{path}: not a shard of an index, or damaged ({why}); remove it and run snip index again"
    )


def held_encoder(folder: Path) -> Path | None:
    """Return the encoder's folder in an index, None where it holds none."""
    return folder / ENCODER if (folder / ENCODER / MANIFEST).is_file() else None


def agreed_encoder(given: str | None, held: Path | None, user: str) -> Path | None:
    """Return the folder of the encoder that is held, or else given; both must be the same one.

    ``user`` says in a refusal what the held one was used for.
    """
    if given is None or held is None:
        return held or (None if given is None else Path(given).expanduser())
    folder = Path(given).expanduser()
    read_manifest(folder, "encoder")
    if atomic.sha256(folder / MANIFEST) != atomic.sha256(held / MANIFEST):
        raise SnipError(
            f"--encoder {given} is not the one that {user} with ({held}); leave --encoder away"
        )
    return held


def is_descriptors(source: str | Path | None) -> bool:
    """Tell whether FEATURES is what ``snip compress`` wrote: vectors to be taken as they are."""
    if source is None or (is_remote(source) and not is_folder(str(source))):
        return False
    manifest = Path(source).expanduser() / MANIFEST
    if is_remote(source):
        manifest = RemotePath(f"{str(source).rstrip('/')}/{MANIFEST}")
    return manifest.is_file() and atomic.load_json(manifest).get("kind") == "descriptors"


class PlainRows(NamedTuple):
    """Takes the place of an encoder: rows are scaled to norm 1, or taken ``as_stored``."""

    dim: int
    as_stored: bool

    @property
    def dim_in(self) -> int:
        """The width of the rows, which is that of the vectors."""
        return self.dim

    def encode(self, rows: np.ndarray) -> np.ndarray:
        """Return the vectors of rows, (n, dim) float32."""
        return rows.astype(np.float32) if self.as_stored else unit_rows(rows)


def load_encoder(folder: str | Path, dim: int | None = None) -> Encoder:
    """Load an encoder, or its head that is ``dim`` wide; this takes torch a second."""
    from snipdedup.encoder.network import Encoder

    encoder = Encoder.load(folder, device="cpu")
    return encoder if dim is None else encoder.of_width(dim)


class Index:
    """A finished index folder; `str` of it is what ``snip index`` prints.

    Attributes
    ----------
    folder : Path
    manifest : dict
    quantiser : Quantiser
    rows, nlist, dim, code_size : int
        ``rows`` counts bad ones too, which are in no list; ``dim`` is the width of the vectors.
    files : list of Path
        Of the shards, in order.
    offsets : (shards + 1,) int64
        Global row of each shard's first row, then the number of rows.
    """

    def __init__(self, folder: str | Path, done: str = "index in") -> None:
        self.folder, self.done, self.exported = Path(folder).expanduser(), done, ""
        self.manifest = read_manifest(self.folder, "index")
        self.quantiser = read_quantiser(self.folder / QUANTISER)
        self.nlist = self.quantiser.nlist
        self.dim, self.code_size = self.quantiser.dim, self.quantiser.code_size
        with as_written(self.folder):
            self.rows = int(self.manifest["rows"])
            self.shard_rows = [shard["rows"] for shard in self.manifest["shards"]]
            self.files = [self.folder / shard["file"] for shard in self.manifest["shards"]]
            self.as_stored = bool(self.manifest["request"]["as_stored"])
        self.offsets = np.concatenate([[0], np.cumsum(self.shard_rows, dtype=np.int64)])
        if self.rows != self.offsets[-1]:
            raise SnipError(
                f"{self.folder / MANIFEST}: damaged: {self.rows:,} rows, its shards have "
                f"{self.offsets[-1]:,}"
            )

    def __str__(self) -> str:
        body = self.manifest
        lines = [
            f"{self.done} {self.folder}: {self.rows:,} rows of {len(self.files)} shards in "
            f"{self.nlist:,} lists, codes of {body['m']} x {body['nbits']} bits",
            f"{body['bytes_a_row']:.2f} bytes a row on disk; centroids and codebooks "
            f"{body['quantiser_bytes']:,} bytes apart",
            f"mean squared quantisation error {body['mean_self_adc']:.4f}",
        ]
        if body["bad_rows"]:
            lines.append(f"{body['bad_rows']:,} NaN, infinite or zero rows are in no list")
        return "\n".join([*lines, *([self.exported] if self.exported else [])])

    @cached_property
    def encoder(self) -> Encoder | PlainRows:
        """What makes the vectors of rows that are quantised."""
        folder = held_encoder(self.folder)
        if folder is None:
            return PlainRows(self.dim, self.as_stored)
        return load_encoder(folder, self.dim)

    def refuse_other_rows(self, features: Features, name: str = "FEATURES") -> None:
        """Refuse features whose shards have other numbers of rows than those indexed."""
        rows = [shard.rows for shard in features.shards]
        if rows != self.shard_rows:
            raise SnipError(
                f"{self.folder} holds {self.rows:,} rows of {len(self.files)} shards, {name} has "
                f"{sum(rows):,} rows of {len(rows)}; give the features that were indexed, or add "
                "new shards with: snip index --append"
            )

    def shard(self, number: int, *, mapped: bool = False) -> ShardCodes:
        """Return a shard's codes, or refuse those of another index; see `load_shard`."""
        shard, rows = load_shard(self.files[number], mapped=mapped), self.shard_rows[number]
        fits = len(shard.sizes) == self.nlist and shard.codes.shape[1] == self.code_size
        if not fits or len(shard.ids) + len(shard.bad) != rows:
            raise damaged_shard(self.files[number], f"not a shard of {rows:,} rows of this index")
        if len(shard.bad) and not 0 <= shard.bad.min() <= shard.bad.max() < rows:
            raise damaged_shard(self.files[number], "its bad rows are none of its rows")
        return shard

    def bad_rows(self) -> np.ndarray:
        """Return the rows that are in no list, ascending, (b,) int64."""
        parts = [self.shard(n).bad + self.offsets[n] for n in range(len(self.files))]
        return np.concatenate([np.empty(0, np.int64), *parts])

    def lists(self) -> CodeLists:
        """Load all codes, shard by shard, into one array sorted by list.

        A row takes its code and as many bytes as its number needs; in a list, rows ascend.
        """
        sizes, numbers = np.zeros(self.nlist, np.int64), range(len(self.files))
        for number in numbers:
            sizes += self.shard(number).sizes
        starts = np.concatenate([[0], np.cumsum(sizes)])
        codes = np.empty((int(starts[-1]), self.code_size), np.uint8)
        ids = np.empty((int(starts[-1]), packed_width(self.rows)), np.uint8)
        cursor = starts[:-1].copy()
        for number in numbers:
            shard = self.shard(number)
            counts = shard.sizes.astype(np.int64)
            begins = np.cumsum(counts) - counts
            places = np.repeat(cursor - begins, counts) + np.arange(len(shard.ids))
            codes[places] = shard.codes
            ids[places] = pack_rows(unpack_rows(shard.ids) + self.offsets[number], ids.shape[1])
            cursor += counts
        return CodeLists(codes, ids, starts)


def export_faiss(index: Index, path: Path) -> int:
    """Write one IndexIVFPQ that plain faiss reads, with int64 ids that are global rows.

    faiss would hold 8 bytes an id in memory to write it; here its file is laid out by hand: the
    empty index as faiss serialises it, with the lists put in place of its empty ones (format of
    faiss/impl/index_write.cpp, "ilar"). Returns the bytes written.
    """
    import faiss

    def lists_header(layout: bytes, sizes: np.ndarray) -> bytes:
        counts = np.array([index.nlist, index.code_size], "<u8").tobytes()
        return b"ilar" + counts + layout + np.array([len(sizes), *sizes], "<u8").tobytes()

    lists = index.lists()
    ivfpq = read_quantiser(index.folder / QUANTISER).ivfpq
    ivfpq.ntotal = len(lists.ids)
    head = faiss.serialize_index(ivfpq).tobytes()
    empty = lists_header(b"sprs", np.empty(0, np.int64))
    if not head.endswith(empty):
        raise SnipError(f"this faiss ({faiss.__version__}) writes indexes in an unknown layout")
    with atomic.replacing(path) as part, part.open("wb") as file:
        file.write(head.removesuffix(empty) + lists_header(b"full", np.diff(lists.starts)))
        for low, high in pairwise(lists.starts.tolist()):
            file.write(lists.codes[low:high].tobytes())
            file.write(lists.rows(slice(low, high)).astype("<i8").tobytes())
    return path.stat().st_size
