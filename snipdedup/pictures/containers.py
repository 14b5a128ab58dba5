"""Shards of pictures: some files, a tar, or a parquet file; what one task embeds.

Workers read local files and members of local tars. The bytes of remote tars and of tables go with
the item.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from snipdedup.errors import InputError, SnipError
from snipdedup.features.formats import identity_of
from snipdedup.metadata.tables import KEY_COLUMNS, explain_damage, stream_parquet
from snipdedup.pictures.items import (
    CAPTIONS,
    FILE_BYTES,
    SUFFIXES,
    TEXTS,
    URLS,
    VIDEOS,
    Item,
    Text,
    clean,
    read_texts,
    suffix_of,
)
from snipdedup.storage.remote import RemotePath, absolute_location

MEMBER_BYTES = 60_000  # of a usual tar: a picture and its texts
ROWS_A_READ = 16  # of a table: each may hold megabytes
BYTES = ("image", "jpg", "jpeg", "png", "webp", "img", "bytes", "image_bytes", "content")


@dataclass(frozen=True)
class FileShard:
    """Files, by their keys; ``beside`` are the texts that there are."""

    paths: Sequence[Path]
    keys: Sequence[str]
    beside: Sequence[tuple[Path, ...]]
    columns: tuple[str, ...] = ("path",)  # that say where a picture lies

    @property
    def name(self) -> str:
        """How messages name it."""
        return f"{self.keys[0]} .. {self.keys[-1]}"

    def items(self) -> Iterator[Item]:
        """Yield the pictures in order."""
        for key, path, beside in zip(self.keys, self.paths, self.beside, strict=True):
            kind, place = (
                "video" if suffix_of(path.name) in VIDEOS else "path",
                absolute_location(path),
            )
            why = None if clean(place) == place else "not UTF-8: rename the file"
            yield Item(key, {kind: clean(place)}, path=path, beside=beside, refused=why)

    def count(self) -> int:
        """Return how many pictures it has, for the progress; of a tar it is an estimate."""
        return len(self.keys)

    def own(self, rows: pa.Table) -> pa.Table | None:
        """Return the columns that the source has itself, of these pictures; None without any."""
        del rows
        return None

    def refuse_changed(self) -> None:
        """Do nothing: the sha256 in the metadata is that of the bytes which were embedded."""


class Container:
    """A file that holds pictures."""

    def __init__(self, path: Path) -> None:
        self.path, self.identity = path, identity_of(path)

    @property
    def name(self) -> str:
        """How messages name it."""
        return str(self.path)

    def refuse_changed(self) -> None:
        """Refuse a file that was changed since it was found."""
        if isinstance(self.path, RemotePath):
            self.path.forget_version()
        if identity_of(self.path) != self.identity:
            raise InputError(f"{self.path}: changed while it was read; run it again")


class TarShard(Container):
    """A tar of pictures, with texts of the same keys, as webdataset and img2dataset write it.

    A key is a member's name up to the first dot. If several pictures have one key, each is named by
    its whole name without the last suffix, or with it where that is needed.
    """

    columns = ("tar", "member")

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with path.open("rb") as file:
            if file.read(3) in (b"\x1f\x8b\x08", b"BZh", b"\xfd7z"):
                raise SnipError(
                    f"{path}: a compressed tar; expected a plain one, as webdataset writes: unpack "
                    "it first, with gunzip, bunzip2 or unxz"
                )

    def count(self) -> int:
        """See `FileShard.count`."""
        return -(-self.identity[1] // MEMBER_BYTES)

    def items(self) -> Iterator[Item]:
        """Yield the pictures in order; what is wrong with a damaged tar comes as its last item."""
        group: list[tuple[tarfile.TarInfo, bytes | None]] = []
        last, why = "", ""
        try:
            with self.path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                for member, data in self.members(tar):
                    folder, slash, name = member.name.rpartition("/")
                    key = folder + slash + name.partition(".")[0]
                    if key != last:
                        yield from self.pictures(last, group)
                        group, last = [], key
                    group.append((member, data))
        except (tarfile.TarError, EOFError, OSError) as error:
            why = f"truncated: the tar ends too early, or is none: {error}"
        yield from self.pictures(last, group)
        if why:
            place = {"tar": absolute_location(self.path), "member": ""}
            yield Item(self.path.stem, place, refused=why)

    def members(self, tar: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, bytes | None]]:
        """Yield pictures and texts; with the bytes of texts, and of all that is not local."""
        remote = isinstance(self.path, RemotePath)
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # else each stays in memory
            suffix, hidden = suffix_of(member.name), member.name.rpartition("/")[2][:1] == "."
            if not member.isfile() or hidden or suffix not in (*SUFFIXES, *TEXTS):
                continue
            data = None
            if (remote or suffix in TEXTS) and member.size <= FILE_BYTES:
                opened = tar.extractfile(member)
                data = b"" if opened is None else opened.read()
            yield member, data

    def pictures(
        self, key: str, group: list[tuple[tarfile.TarInfo, bytes | None]]
    ) -> Iterator[Item]:
        """Yield the pictures among the members of a key."""
        texts = {suffix_of(member.name): data for member, data in group}
        text = read_texts(texts.get(".txt"), texts.get(".json"))
        found = [(m, data) for m, data in group if suffix_of(m.name) in SUFFIXES]
        stems = [member.name[: -len(suffix_of(member.name))] for member, _ in found]
        for stem, (member, data) in zip(stems, found, strict=True):
            own = key if len(found) == 1 else stem if stems.count(stem) == 1 else member.name
            yield Item(
                clean(own), {"tar": absolute_location(self.path), "member": clean(member.name)},
                data, self.path, member.offset_data, member.size, text,
            )  # fmt: skip

    def own(self, rows: pa.Table) -> pa.Table | None:
        """See `FileShard.own`."""
        del rows
        return None


class ParquetShard(Container):
    """A parquet file with a column of picture files: bytes, or a struct of ``bytes`` and ``path``.

    ``asked`` names the column; else it is the first of either kind. Other columns are carried on.
    """

    columns = ("parquet", "parquet_row")

    def __init__(self, path: Path, asked: str | None = None) -> None:
        super().__init__(path)
        file = stream_parquet(path)
        self.schema, self.rows = file.schema_arrow, int(file.metadata.num_rows)
        self.column = image_column(self.schema, asked)
        if self.column is None:
            raise SnipError(
                f"{path}: expected a column of picture files (binary, or a struct of bytes and "
                f"path), found {', '.join(f'{f.name} {f.type}' for f in self.schema)}; name one "
                "with --column"
            )

    def count(self) -> int:
        """See `FileShard.count`."""
        return self.rows

    def items(self) -> Iterator[Item]:
        """Yield the pictures in order."""
        names = {what: first_of(self.schema.names, kinds) for what, kinds in
                 (("key", KEY_COLUMNS), ("caption", CAPTIONS), ("url", URLS))}  # fmt: skip
        columns = [self.column, *filter(None, names.values())]
        row, place = 0, absolute_location(self.path)
        file = stream_parquet(self.path)
        with explain_damage(self.path, "damaged: its rows cannot be read"):
            for batch in file.iter_batches(ROWS_A_READ, columns=list(dict.fromkeys(columns))):
                for values in batch.to_pylist():
                    found = values[self.column]
                    data = found.get("bytes") if isinstance(found, dict) else found
                    key, caption, url = (
                        None if values.get(name) is None else str(values[name])
                        for name in names.values()
                    )
                    yield Item(
                        key or f"{self.path.stem}-{row:06d}",
                        {"parquet": place, "parquet_row": row},
                        data,
                        text=Text(caption, url),
                        refused=None if data is not None else without_bytes(found),
                    )
                    row += 1

    def own(self, rows: pa.Table) -> pa.Table | None:
        """See `FileShard.own`; of a struct of bytes and path, the path is carried on."""
        own = [name for name in self.schema.names if name != self.column]
        paths = pa.types.is_struct(self.schema.field(self.column).type) and "path" in {
            field.name for field in self.schema.field(self.column).type
        }
        with explain_damage(self.path, "damaged: its rows cannot be read"):
            columns = own + [f"{self.column}.path"] * paths
            table = stream_parquet(self.path).read(columns) if columns else None
        if table is None:
            return None
        found = table.select(own).replace_schema_metadata(None)
        if paths:
            kept = pa.chunked_array(table[self.column].combine_chunks().field("path"))
            found = found.append_column(f"{self.column}_path", kept)
        return found.take(rows["parquet_row"])


Shard = FileShard | TarShard | ParquetShard


def first_of(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    """Return the first wanted name that is there, in any case."""
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[name] for name in wanted if name in lower), None)


def without_bytes(found: Any) -> str:
    """Return why a row cannot be embedded; HF datasets writes paths alone if not told otherwise."""
    path = found.get("path") if isinstance(found, dict) else None
    return "no bytes in this row" + (f": only the path {path}" if path else "")


def image_column(schema: pa.Schema, asked: str | None = None) -> str | None:
    """Return the column that holds picture files, None if there is none."""

    def is_binary(kind: Any) -> bool:
        return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    structs, plain = [], []
    for field in schema:
        if pa.types.is_struct(field.type):
            names = {inner.name: inner.type for inner in field.type}
            if "bytes" in names and is_binary(names["bytes"]):
                structs.append(field.name)
        elif is_binary(field.type):
            plain.append(field.name)
    if asked is not None:
        return asked if asked in structs + plain else None
    named = first_of(plain, BYTES)
    return next(iter([*structs, *filter(None, [named]), *plain]), None)
