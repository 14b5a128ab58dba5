"""Every setting of every command: its name, type, default and meaning, once.

The command line, its help, ``docs/cli.md`` and the library functions all read these classes.
They are frozen and check their own ranges, so a wrong value is refused before any work.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from snipdedup.errors import UsageError

INDEX_M, INDEX_NBITS = 16, 8  # a PQ code: sub-quantisers at the most, bits of each
BYTE_UNITS = ("", "k", "m", "g", "t")


def argument(help: str, default: Any = dataclasses.MISSING) -> Any:
    """Declare a positional argument."""
    return dataclasses.field(default=default, metadata={"help": help, "positional": True})


def option(default: Any, help: str, *, choices: tuple[str, ...] = ()) -> Any:
    """Declare a flag; ``choices``, where given, are the values it may have."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


def required(help: str) -> Any:
    """Declare a flag without a default."""
    return dataclasses.field(metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of all: checks choices, then each class its own ranges."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            choices = field.metadata.get("choices")
            value = getattr(self, field.name)
            if choices and value is not None and value not in choices:
                raise UsageError(
                    f"--{field.name} must be one of {', '.join(choices)}, found {value!r}"
                )
        self.check()

    def check(self) -> None:
        """Raise UsageError where a value is out of its range."""

    def between(self, name: str, low: float, high: float) -> None:
        """Check that a setting lies in ``low .. high``, both allowed."""
        value = getattr(self, name)
        if value is not None and not low <= value <= high:
            raise UsageError(f"--{name} must lie between {low:g} and {high:g}, found {value}")

    def seeded(self) -> None:
        """Check that the seed is one that every library takes."""
        self.between("seed", 0, 2**63 - 1)

    def file_range(self, start: int | None, end: int | None) -> None:
        """Check that ``--start`` and ``--end`` are a range of file numbers."""
        if (start or 0) < 0 or (end is not None and end <= (start or 0)):
            raise UsageError(
                "--start and --end are file numbers from 0, the end exclusive; found "
                f"--start {start or 0} --end {end}"
            )

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values, for manifests."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclass(frozen=True, kw_only=True)
class Input(Settings):
    """What commands that read features share."""

    features: Any = argument("folder, glob, file or {part:04d} pattern of features")
    parts: str | None = option(None, "part numbers for a {part:04d} pattern: 0:2, end exclusive")
    array: str | None = option(None, "which array of an .npz file")
    column: str | None = option(None, "which list column of a parquet file")


@dataclass(frozen=True, kw_only=True)
class Train(Input):
    """Settings of ``snip train``."""

    out: str = required("folder for the encoder")
    loss: str = option("snip", "training loss", choices=("snip", "mse"))
    dim: int = option(128, "width of the descriptor")
    hidden: int = option(1024, "width of the hidden layer")
    steps: int = option(1600, "training steps at the most; it stops early when validation stalls")
    batch: int = option(1024, "rows a step")
    learning_rate: float = option(1e-3, "peak learning rate of AdamW")
    temperature: float = option(0.02, "softmax temperature of the snip loss, teacher and student")
    subset_rows: int = option(262_144, "rows held in memory at a time")
    validation_rows: int = option(4096, "rows held out and reported on (at most a fifth of all)")
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    threads: int = option(0, "CPU threads, 0 for all")
    seed: int = option(0, "seed of every random choice")
    overwrite: bool = option(False, "replace a finished encoder")

    def check(self) -> None:
        """See `Settings.check`."""
        self.seeded()
        self.between("dim", 2, 4096)
        self.between("steps", 1, 10**7)
        self.between("batch", 16, 10**6)
        self.between("hidden", 1, 10**5)
        self.between("learning_rate", 1e-9, 1)
        self.between("temperature", 1e-4, 10)
        self.between("subset_rows", 64, 10**9)
        self.between("validation_rows", 16, 10**6)
        self.between("threads", 0, 4096)


@dataclass(frozen=True, kw_only=True)
class Compress(Input):
    """Settings of ``snip compress``."""

    encoder: str = required("folder of a trained encoder")
    out: str = required("folder for the descriptors, one .npy a shard")
    dtype: str = option("float16", "type of the descriptors", choices=("float16", "float32"))
    device: str = option("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    threads: int = option(0, "CPU threads, 0 for all")
    overwrite: bool = option(False, "replace finished descriptors")

    def check(self) -> None:
        """See `Settings.check`."""
        self.between("threads", 0, 4096)


@dataclass(frozen=True, kw_only=True)
class Index(Input):
    """Settings of ``snip index``."""

    out: str = required("folder for the index; an unfinished one is continued")
    encoder: str | None = option(None, "encode with this first; without it, rows as they are")
    base: str | None = option(
        None, "take the trained quantisers of this index (ours, or a faiss IVFPQ file)"
    )
    nlist: int = option(0, "coarse lists, 0 to choose by the number of rows")
    m: int | None = option(
        None,
        "sub-quantisers of the PQ, a byte each at 8 bits; without it the most, up to 16, that fit",
    )
    nbits: int | None = option(None, "bits a sub-quantiser (8)")
    train_rows: int = option(0, "rows to train quantisers on, 0 for 64 a list (at least 65,536)")
    export_faiss: str | None = option(None, "also write one file that plain faiss reads")
    append: bool = option(False, "add the shards that a finished index does not hold yet")
    bad_rows: str = option(
        "refuse",
        "NaN, infinity and zero rows: refuse the input, or leave them out, never returned",
        choices=("refuse", "keep"),
    )
    threads: int = option(0, "CPU threads, 0 for all")
    seed: int = option(0, "seed of every random choice")
    overwrite: bool = option(False, "replace a finished index")

    def check(self) -> None:
        """See `Settings.check`."""
        self.seeded()
        self.between("nlist", 0, 2**24)
        self.between("m", 1, 256)
        self.between("nbits", 4, 8)
        self.between("train_rows", 0, 10**9)
        self.between("threads", 0, 4096)


@dataclass(frozen=True, kw_only=True)
class Dedup(Input):
    """Settings of ``snip dedup``."""

    features: Any = argument(
        "folder, glob, file or {part:04d} pattern of features; a finished OUT to re-threshold it",
        None,
    )
    out: str | None = option(None, "folder for the result")
    metadata: str | None = option(None, "parquet or CSV files that match the features by position")
    method: str | None = option(
        None,
        "how duplicates are found (join; adc if --index is given)",
        choices=("join", "exact", "adc"),
    )
    threshold: float = option(0.95, "cosine at and above which two rows are duplicates")
    grouping: str | None = option(
        None,
        "star (default): each removed row has a direct match that stays; components: one row a "
        "group stays",
        choices=("star", "components"),
    )
    keep: str | None = option(None, "which copy stays (first)", choices=("first", "last", "random"))
    recall: float = option(0.999, "join: share of the pairs that the lists should bring together")
    encoder: str | None = option(None, "adc: encoder for an index that is built on the way")
    index: str | None = option(None, "adc: a finished index; it is built when not given")
    rule: str = option(
        "difference",
        "adc: compare d_ADC - self_adc, or d_ADC / self_adc, with a constant",
        choices=("difference", "ratio"),
    )
    margin: float | None = option(None, "adc: the constant of the rule; calibrated when not given")
    precision: float = option(0.91, "adc: wanted share of right flags when calibrating")
    calibration_rows: int = option(4096, "adc: rows whose true matches set the margin")
    k: int = option(16, "adc: neighbours a row; more are asked for where all of them pass")
    nprobe: int = option(4, "adc: lists visited a row")
    key: str | None = option(
        None, "metadata column for groups.parquet (first of key, uid, sample_id, hash)"
    )
    bad_rows: str = option(
        "refuse",
        "NaN, infinity and zero rows: refuse the input, or keep them, never matched",
        choices=("refuse", "keep"),
    )
    chunk_rows: int = option(65_536, "rows read at a time")
    max_memory: str | None = option(
        None, "bound on what tasks load, 2GB say; without it a quarter of the RAM"
    )
    device: str = option(
        "auto",
        "join: where products of codes are computed",
        choices=("auto", "cpu", "cuda"),
    )
    threads: int = option(0, "CPU threads, 0 for all")
    seed: int | None = option(None, "seed of every random choice (0)")
    overwrite: bool = option(False, "replace a finished OUT")

    def check(self) -> None:
        """See `Settings.check`."""
        self.seeded()
        if self.method in ("join", "exact") and (self.index or self.encoder):
            raise UsageError(f"--index and --encoder go with --method adc, not {self.method}")
        if self.encoder and not self.index and self.method is None:
            raise UsageError("--encoder goes with --method adc; the join makes its own codes")
        if self.features is None and self.rule == "ratio":
            raise UsageError("--rule ratio needs FEATURES: without them a row is its own code")
        if self.features is None and (self.index is None or self.method in ("join", "exact")):
            raise UsageError("dedup compares raw rows: give FEATURES, or --index for method adc")
        self.between("threshold", -1, 1)
        self.between("recall", 0.5, 1)
        self.between("precision", 0, 1)
        self.between("k", 1, 1024)
        self.between("calibration_rows", 1, 10**6)
        self.between("nprobe", 1, 2**24)
        self.between("margin", -1e30, 1e30)
        self.between("chunk_rows", 1, 10**9)
        self.between("threads", 0, 4096)
        if self.max_memory is not None:
            parse_bytes(self.max_memory)

    def filled(self) -> Dedup:
        """Return the settings with defaults for what a re-threshold would take over."""
        known = {"grouping": "star", "keep": "first", "seed": 0}
        given = {name: getattr(self, name) for name in known if getattr(self, name) is not None}
        return dataclasses.replace(self, **{**known, **given})


@dataclass(frozen=True, kw_only=True)
class Filter(Settings):
    """Settings of ``snip filter``."""

    metadata: Any = argument("folder, glob or file of parquet or CSV metadata")
    is_dup: str = required("mask: is_dup.npy, or a folder that snip dedup wrote")
    out: str = required("folder for the rows that stay")
    start: int | None = option(None, "first file number, counted from 0 in the whole set")
    end: int | None = option(None, "file number to stop before")
    cumulative_sizes: str | None = option(
        None, ".npy of running row totals a file, as upstream publishes beside its mask"
    )
    overwrite: bool = option(False, "replace a finished folder")

    def check(self) -> None:
        """See `Settings.check`."""
        self.file_range(self.start, self.end)


@dataclass(frozen=True, kw_only=True)
class Download(Settings):
    """Settings of ``snip download``."""

    source: str = argument("http(s) template with {part:04d}, or a local folder or template")
    out: str = argument("folder for the files")
    start: int | None = option(None, "first file number")
    end: int | None = option(None, "file number to stop before")
    is_dup: str | None = option(None, "mask (file or URL): write only the rows that stay")
    cumulative_sizes: str | None = option(
        None, ".npy (file or URL) of running row totals a file, if the files before --start lack"
    )
    overwrite: bool = option(False, "replace a finished folder")

    def check(self) -> None:
        """See `Settings.check`."""
        self.file_range(self.start, self.end)
        if self.cumulative_sizes is not None and self.is_dup is None:
            raise UsageError("--cumulative_sizes places a mask: give --is_dup too")


@dataclass(frozen=True, kw_only=True)
class Demo(Settings):
    """Settings of ``snip demo``."""

    out: str = option("snip_demo", "folder for everything the demo makes")
    pictures: int = option(1500, "pictures to draw before copies are made")
    seed: int = option(0, "seed of every random choice")
    overwrite: bool = option(False, "replace a finished demo")

    def check(self) -> None:
        """See `Settings.check`."""
        self.seeded()
        self.between("pictures", 50, 100_000)


def parse_bytes(text: str) -> int:
    """Parse ``2GB``, ``500 MB``, ``1.5g``, ``2GiB`` (powers of 1024) or a plain number of bytes.

    Raises
    ------
    UsageError
        If the text is not an amount of memory.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt]?)(i?b)?\s*", str(text).lower())
    try:
        base = 1024 if match and match[3] == "ib" else 1000
        value = float(match[1]) * base ** BYTE_UNITS.index(match[2]) if match else -1.0
    except ValueError:
        value = -1.0
    if value <= 0:
        raise UsageError(f"expected an amount of memory such as 2GB or 500MB, found {text!r}")
    return int(value)
