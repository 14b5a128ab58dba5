"""Shards of pictures: some files, a tar, or a parquet file; what one task embeds.

Workers read local files and members of local tars. The bytes of remote tars and of tables go with
the item.
"""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa

from snipdedup.errors import InputError, SnipError
from snipdedup.features.formats import identity_of
from snipdedup.metadata.tables import ANY_KEY, Metadata, Table, explain_damage, stream_parquet
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
GROUP_BYTES = 64 << 20  # of the members of one key that are held in memory
READ_BYTES = 1 << 20
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

    def items(self, left_out: Counter[str]) -> Iterator[Item]:
        """Yield the pictures in order; count in ``left_out``, by suffix, what is none."""
        del left_out  # counted where the files were found
        for key, path, beside in zip(self.keys, self.paths, self.beside, strict=True):
            kind = "video" if suffix_of(path.name) in VIDEOS else "path"
            place = absolute_location(path)
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

    beside: Sequence[tuple[Path, ...]] = ()

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


class Member(NamedTuple):
    """A picture or a text in a tar."""

    name: str
    begin: int = 0  # where its bytes lie
    size: int = 0
    data: bytes | None = None
    refused: str | None = None  # why it cannot be read

    @property
    def key(self) -> str:
        """The name up to the first dot."""
        folder, slash, name = self.name.rpartition("/")
        return folder + slash + name.partition(".")[0]

    @property
    def stem(self) -> str:
        """The name without the last suffix."""
        return self.name[: -len(suffix_of(self.name))]

    def read(self, file: IO[bytes]) -> bytes:
        """Return its bytes, at most `FILE_BYTES`."""
        if self.data is not None:
            return self.data
        file.seek(self.begin)
        return file.read(min(self.size, FILE_BYTES))


def member_of(
    found: tarfile.TarInfo, places: dict[str, Member], left_out: Counter[str]
) -> Member | None:
    """Return a picture or a text; count another file, and a text that cannot be read.

    ``places`` are the members that came before, which hard links name.
    """
    suffix, is_link = suffix_of(found.name), found.islnk() or found.issym()
    if found.isdir() or found.name.rpartition("/")[2][:1] == ".":
        return None
    member = None
    if suffix in (*SUFFIXES, *TEXTS) and (found.isfile() or is_link):
        member = Member(found.name, found.offset_data, found.size)
    if member is not None and is_link:
        target = places.get(found.linkname) if found.islnk() else None
        why = f"a link in a tar: to {clean(found.linkname)}, which does not lie before it"
        if found.issym():
            why = f"a link in a tar: a symbolic one, to {clean(found.linkname)}"
        member = Member(found.name, refused=why)
        member = member if target is None else target._replace(name=found.name)
    elif member is not None and found.issparse():
        member = Member(found.name, refused="a sparse file in a tar: pack it without --sparse")
    if member is None or (member.refused and suffix in TEXTS):
        left_out[suffix] += 1
        return None
    places[found.name] = member
    return member


def fault_at_end(file: IO[bytes], at: int) -> str | None:
    """Return what is wrong where the members of a tar end, None if only zeros follow.

    `tarfile` takes a bad header for the end.
    """
    file.seek(at)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        where = "within a header" if block else "without an end mark"
        return f"truncated: the tar ends too early, {where}, at byte {at:,}"
    if block.strip(b"\0"):
        return f"damaged: the tar has a bad header at byte {at:,}; what follows was not read"
    while block := file.read(READ_BYTES):
        if block.strip(b"\0"):
            return f"damaged: the tar goes on after its end mark at byte {at:,}; two in one file?"
    return None


class TarShard(Container):
    """A tar of pictures, with texts of the same keys, as webdataset and img2dataset write it.

    A key is a member's name up to the first dot. If several pictures have one key, each is named by
    its whole name without the last suffix, or with it where that is needed. Its texts are those of
    its whole name, else of the key. Hard links are followed back.
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

    def items(self, left_out: Counter[str]) -> Iterator[Item]:
        """See `FileShard.items`; what is wrong with a damaged tar comes as its last item."""
        faults: list[str] = []
        try:
            with self.path.open("rb") as file:
                members = self.members(file, left_out, faults)
                for key, group in groupby(members, lambda member: member.key):
                    yield from self.pictures(key, group, file)
        except OSError as error:
            faults.append(f"cannot be read: {error}")
        for why in faults:
            yield Item(self.path.stem, self.place(""), refused=why)

    def members(
        self, file: IO[bytes], left_out: Counter[str], faults: list[str]
    ) -> Iterator[Member]:
        """Yield pictures and texts; count other files, and say why the tar ends too early."""
        places: dict[str, Member] = {}  # of what came before, for hard links
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (found := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # else each stays in memory
                    if tar.offset < found.offset_data:
                        raise tarfile.ReadError(f"the header at byte {found.offset:,} leads back")
                    member = member_of(found, places, left_out)
                    if member is not None:
                        yield member
                fault = fault_at_end(file, tar.offset)
                faults += [fault] if fault else []
        except (tarfile.TarError, EOFError) as error:
            faults.append(f"truncated: the tar ends too early, or is none: {error}")
        except (ValueError, OverflowError, RecursionError, MemoryError) as error:
            faults.append(f"damaged: a header of the tar: {error}")

    def pictures(self, key: str, members: Iterable[Member], file: IO[bytes]) -> Iterator[Item]:
        """Yield the pictures among the members of a key."""
        remote = isinstance(self.path, RemotePath)
        found, texts, held = [], {}, 0
        for member in members:
            suffix, data = suffix_of(member.name), None
            is_text = suffix in TEXTS
            if (is_text or remote) and held + member.size <= GROUP_BYTES:
                data = member.read(file)  # at once: of a server, going back costs requests
                held += member.size
            if is_text:
                texts[member.stem, suffix] = member._replace(data=data)
            else:
                found.append(member._replace(data=data))
        count = Counter(member.stem for member in found)
        for member in found:
            whole = member.stem if count[member.stem] == 1 else member.name
            beside = (
                texts.get((member.stem, suffix)) or texts.get((key, suffix)) for suffix in TEXTS
            )
            text = read_texts(*(None if one is None else one.read(file) for one in beside))
            data = member.read(file) if remote and member.size <= FILE_BYTES else member.data
            yield Item(
                clean(key if len(found) == 1 else whole), self.place(member.name), data, self.path,
                member.begin, member.size, text, refused=member.refused,
            )  # fmt: skip

    def place(self, member: str) -> dict[str, Any]:
        """Return the columns that say where a member lies."""
        return {"tar": absolute_location(self.path), "member": clean(member)}

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
        self.table = Table(path)
        self.schema = self.table.schema
        self.column = image_column(self.schema, asked)
        if self.column is None:
            raise SnipError(
                f"{path}: expected a column of picture files (binary, or a struct of bytes and "
                f"path), found {', '.join(f'{f.name} {f.type}' for f in self.schema)}; name one "
                "with --column"
            )

    def count(self) -> int:
        """See `FileShard.count`."""
        return self.table.rows

    def items(self, left_out: Counter[str]) -> Iterator[Item]:
        """See `FileShard.items`."""
        del left_out  # there is nothing else in it
        metadata = Metadata([self.table])
        names = [metadata.column(wanted=kinds) for kinds in (ANY_KEY, CAPTIONS, URLS)]
        columns = [self.column, *filter(None, names)]
        row, place = 0, absolute_location(self.path)
        file = stream_parquet(self.path)
        with explain_damage(self.path, "damaged: its rows cannot be read"):
            for batch in file.iter_batches(ROWS_A_READ, columns=list(dict.fromkeys(columns))):
                for values in batch.to_pylist():
                    found = values[self.column]
                    data = found.get("bytes") if isinstance(found, dict) else found
                    key, caption, url = (
                        None if values.get(name) is None else str(values[name]) for name in names
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


def without_bytes(found: Any) -> str:
    """Return why a row cannot be embedded; HF datasets writes paths alone if not told otherwise."""
    path = found.get("path") if isinstance(found, dict) else None
    return "no bytes in this row" + (f": only the path {path}" if path else "")


def image_column(
    schema: pa.Schema, asked: str | None = None, *, by_name: bool = False
) -> str | None:
    """Return the column that holds picture files, None if there is none.

    ``by_name``: a binary column counts only if it is called as pictures are.
    """

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
    named = [name for wanted in BYTES for name in plain if name.lower() == wanted]
    return next(iter([*structs, *named, *(() if by_name else plain)]), None)
