"""A finished index folder: its quantisers, how a row becomes a vector, its lists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from snipdedup.errors import SnipError
from snipdedup.features.cosine import unit_rows
from snipdedup.index.codes import Lists, ShardCodes, damaged, load_shard, pack, packed_width, unpack
from snipdedup.index.quantizer import read_quantiser
from snipdedup.storage import atomic
from snipdedup.storage.listing import is_remote_folder
from snipdedup.storage.manifest import MANIFEST, as_written, read_manifest
from snipdedup.storage.remote import RemotePath, is_remote

if TYPE_CHECKING:
    from snipdedup.encoder.network import Encoder

QUANTISER, ENCODER = "quantizer.faiss", "encoder"


def identity(path: Path) -> str:
    """Return what tells one encoder or base from another: the file's SHA-256."""
    if not path.is_file():
        raise SnipError(f"no such file: {path}")
    return atomic.sha256(path)


def held_encoder(folder: Path) -> Path | None:
    """Return the encoder's folder in an index, None where it holds none."""
    return folder / ENCODER if (folder / ENCODER / MANIFEST).is_file() else None


def same_encoder(given: str | Path, held: Path) -> bool:
    """Tell whether a folder that was given holds the encoder of another one."""
    manifest = Path(given).expanduser() / MANIFEST
    return identity(manifest) == identity(held / MANIFEST)


def is_descriptors(source: str | Path | None) -> bool:
    """Tell whether FEATURES is what ``snip compress`` wrote: vectors to be taken as they are."""
    if source is None or (is_remote(source) and not is_remote_folder(str(source))):
        return False
    manifest = Path(source) / MANIFEST
    if is_remote(source):
        manifest = RemotePath(f"{str(source).rstrip('/')}/{MANIFEST}")
    if not manifest.is_file():
        return False
    return bool(atomic.load_json(manifest).get("kind") == "descriptors")


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
        space = cls.encoded(folder)
        if space.dim_in != dim_in:
            raise SnipError(
                f"the encoder expects rows {space.dim_in} wide, the features are {dim_in} wide"
            )
        return space

    @classmethod
    def encoded(cls, folder: str | Path) -> Space:
        """Return the space of an encoder, for rows as wide as it expects."""
        from snipdedup.encoder.network import Encoder

        encoder = Encoder.load(folder, device="cpu")
        return cls(encoder, False, encoder.dim_in, encoder.dim)

    def of_width(self, dim: int) -> Space:
        """Return this space, with the head of the encoder where that is ``dim`` wide."""
        if self.encoder is None:
            return self
        encoder = self.encoder.of_width(dim)
        return Space(encoder, self.as_stored, self.dim_in, encoder.dim)

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Return what is quantised: descriptors, unit rows, or rows as they are, float32."""
        if self.encoder is not None:
            return self.encoder.encode(rows)
        return rows.astype(np.float32) if self.as_stored else unit_rows(rows)


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
        self.manifest = read_manifest(folder, "index")
        self.quantiser = read_quantiser(folder / QUANTISER)
        self.nlist = self.quantiser.nlist
        self.dim, self.code_size = self.quantiser.dim, self.quantiser.code_size
        with as_written(folder):
            self.rows = int(self.manifest["rows"])
            sizes = [shard["rows"] for shard in self.manifest["shards"]]
            self.files = [folder / shard["file"] for shard in self.manifest["shards"]]
            self.as_stored = bool(self.manifest["request"]["as_stored"])
        self.offsets = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        if self.rows != self.offsets[-1]:
            raise SnipError(
                f"{folder / MANIFEST}: damaged: {self.rows:,} rows, its shards have "
                f"{self.offsets[-1]:,}"
            )

    @classmethod
    def open(cls, folder: str | Path) -> Index:
        """Open a folder that ``snip index`` finished."""
        return cls(Path(folder).expanduser())

    @cached_property
    def space(self) -> Space:
        """How rows become vectors; loading an encoder takes torch a second."""
        folder = held_encoder(self.folder)
        if folder is None:
            return Space.of(None, self.dim, self.as_stored)
        return Space.encoded(folder).of_width(self.dim)

    @property
    def encoder(self) -> Encoder | None:
        """The encoder that rows go through, if any."""
        return self.space.encoder

    def shards(self) -> Iterator[tuple[int, ShardCodes]]:
        """Yield (first global row, codes) of each shard, in order."""
        for number, path in enumerate(self.files):
            yield int(self.offsets[number]), self.fitting(number, load_shard(path))

    def fitting(self, number: int, shard: ShardCodes) -> ShardCodes:
        """Return a shard, or refuse one that is not of this index; bytes of codes stay unread."""
        rows = int(self.offsets[number + 1] - self.offsets[number])
        fits = len(shard.sizes) == self.nlist and shard.codes.shape[1] == self.code_size
        if not fits or len(shard.ids) + len(shard.bad) != rows:
            raise damaged(self.files[number], f"not a shard of {rows:,} rows of this index")
        if len(shard.bad) and not 0 <= shard.bad.min() <= shard.bad.max() < rows:
            raise damaged(self.files[number], "its bad rows are none of its rows")
        return shard

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
