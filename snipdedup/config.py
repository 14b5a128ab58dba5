"""Every setting of every command: its name, type, default and meaning, once.

The command line, its help, ``docs/cli.md`` and the library functions all read these classes.
They are frozen and check their own ranges, so a wrong value is refused before any work.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from snipdedup.errors import UsageError

INDEX_M, INDEX_NBITS = 16, 8  # a PQ code: sub-quantisers at the most, bits of each
EXPORTS = ("datacomp", "keys", "mask")
MOST_FILES = 10**6  # of a set, by their numbers
MAX_SEED = 2**63 - 1  # the largest that every library takes
BYTE_UNITS = ("", "k", "m", "g", "t")
SEMDEDUP_KEEPS = ("hard", "random", "easy")
DEVICES = ("auto", "cpu", "cuda")
THRESHOLD = 0.95  # cosine of two duplicates, for CLIP
# What a path may be: on this machine (a file to write, a folder, a file to read) or anywhere.
WRITTEN, FOLDER, FILE, ANYWHERE = "written", "folder", "file", "anywhere"
URL = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)  # a Path makes one slash of two


def argument(help: str, default: Any = dataclasses.MISSING, *, path: str = "") -> Any:
    """Declare a positional argument; ``path`` as in `option`."""
    return dataclasses.field(
        default=default, metadata={"help": help, "positional": True, "path": path}
    )


def required(help: str, *, path: str = "") -> Any:
    """Declare a flag without a default; ``path`` as in `option`."""
    return dataclasses.field(metadata={"help": help, "path": path})


def option(default: Any, help: str, low: Any = None, high: Any = None, **about: Any) -> Any:
    """Declare a flag.

    Parameters
    ----------
    default : Any
    help : str
    low, high : int or float, optional
        The range of a number, both ends allowed.
    **about
        ``choices``: the allowed values. ``usual``: what happens by default, where None or True
        does not say it. ``path``: `WRITTEN`, `FOLDER`, `FILE` or `ANYWHERE`. ``amount``: it is read
        by `parse_bytes`. ``command_only``: the library function does not have it.
    """
    about |= {"help": help, "range": None if low is None else (low, high)}
    return dataclasses.field(default=default, metadata=about)


def usual_value(field: dataclasses.Field[Any]) -> str:
    """Return what a flag is when it is not given, for its help; empty where that is nothing."""
    usual = str(field.metadata.get("usual", ""))
    none = field.default is None or field.default is False or field.default is dataclasses.MISSING
    return usual if usual or none else str(field.default)


def setting_name(field: dataclasses.Field[Any]) -> str:
    """Return a setting as it is typed: ``FEATURES`` or ``--out``."""
    return field.name.upper() if field.metadata.get("positional") else f"--{field.name}"


SAVED = {  # what JSON gives back for a declared type: 1 may stand for 1.0 or for True
    bool: (bool, int),
    int: (int,),
    float: (float, int),
    str: (str,),
    NoneType: (NoneType,),
}


def mistyped(kind: type[Settings], saved: dict[str, Any]) -> str | None:
    """Return the first of a run's saved settings that is not of its declared type, or None.

    What may be anything (paths, numbers by comma) is saved as a text or a list of plain values.
    """
    for name, declared in get_type_hints(kind).items():
        value, bare = saved.get(name), get_args(declared) or (declared,)
        if name not in saved:
            continue
        kinds = (str, float, NoneType) if Any in bare else bare
        types = [saved_as for known in kinds for saved_as in SAVED[known]]
        for plain in value if Any in bare and isinstance(value, list) else [value]:
            whole = isinstance(plain, float) and plain.is_integer() and int in types
            if type(plain) not in types and not whole:
                return name
    return None


def refuse_url(field: dataclasses.Field[Any], value: Any) -> None:
    """Refuse a URL where a local path is meant: it would become a folder named ``s3:``."""
    if not isinstance(value, str | Path) or not URL.match(str(value)):
        return
    url = re.sub(r"(:/+)[^/]*@", r"\1", str(value)).partition("?")[0]  # without secrets
    todo = "fetch it first"
    if field.metadata["path"] == WRITTEN:
        todo = "snip writes to this machine only: give a path, and copy what is there afterwards"
    elif field.metadata["path"] == FOLDER and not Path(url).suffix:
        todo += f": snip download {url} FOLDER"
    raise UsageError(f"{setting_name(field)} {url}: expected a local path, found a URL; {todo}")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of all: checks choices, ranges and paths, then what each class checks itself."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, about = getattr(self, field.name), field.metadata
            if value is None:
                continue
            if about.get("choices") and value not in about["choices"]:
                raise UsageError(
                    f"--{field.name} must be one of {', '.join(about['choices'])}, found {value!r}"
                )
            if about.get("range") and not about["range"][0] <= value <= about["range"][1]:
                low, high = about["range"]
                raise UsageError(
                    f"--{field.name} must lie between {low:g} and {high:g}, found {value}"
                )
            if about.get("path") in (WRITTEN, FOLDER, FILE):
                refuse_url(field, value)
            if about.get("amount"):
                parse_bytes(value)
        self.check()

    def check(self) -> None:
        """Raise UsageError for settings that do not go together."""

    def check_file_range(self, start: int | None, end: int | None) -> None:
        """Check that ``--start`` and ``--end`` are a range of file numbers."""
        if (start or 0) < 0 or (end is not None and end <= (start or 0)):
            raise UsageError(
                "--start and --end are file numbers from 0, the end exclusive; found "
                f"--start {start or 0} --end {end}"
            )
        if max(start or 0, end or 0) > MOST_FILES:
            raise UsageError(f"--start and --end are file numbers up to {MOST_FILES:,}, not rows")

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values, for manifests."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclass(frozen=True, kw_only=True)
class Input(Settings):
    """What commands that read features share."""

    features: Any = argument("folder, glob, file or {part:04d} pattern of features, or a URL")
    parts: str | None = option(None, "part numbers of a {part:04d} pattern: 0:2, end exclusive")
    array: str | None = option(None, "array of an .npz file")
    column: str | None = option(None, "list column of a parquet file")


@dataclass(frozen=True, kw_only=True)
class Train(Input):
    """Train the SNIP encoder on features."""

    out: str = required("folder for the encoder", path=WRITTEN)
    loss: str = option("snip", "training loss", choices=("snip", "mse"))
    dim: int = option(128, "width of the descriptor", 2, 4096)
    hidden: int = option(1024, "width of the hidden layer", 1, 10**5)
    steps: int = option(1600, "most training steps; it stops when validation stalls", 1, 10**7)
    batch: int = option(1024, "rows a step", 16, 10**6)
    learning_rate: float = option(1e-3, "peak learning rate of AdamW", 1e-9, 1)
    temperature: float | None = option(
        None, "softmax temperature of the snip loss, teacher and student", 1e-4, 10,
        usual="fitted to the features",
    )  # fmt: skip
    text_features: Any = option(
        None, "text features, row for row: keep the similarities of texts and images too"
    )
    text_temperature: float = option(0.01, "softmax temperature between texts and images", 1e-4, 10)
    subset_rows: int = option(262_144, "rows held in memory at a time", 64, 10**9)
    validation_rows: int = option(
        4096, "rows for validation, never trained on (at most a fifth of all)", 16, 10**6
    )
    device: str = option("auto", "where to compute", choices=DEVICES)
    threads: int = option(0, "CPU threads, 0 for all", 0, 4096)
    seed: int = option(0, "seed of every random choice", 0, MAX_SEED)
    overwrite: bool = option(False, "replace a finished encoder")


@dataclass(frozen=True, kw_only=True)
class Compress(Input):
    """Write descriptors, shard for shard."""

    encoder: str = required("folder of a trained encoder", path=FOLDER)
    out: str = required("folder for the descriptors, one .npy a shard", path=WRITTEN)
    dtype: str = option("float16", "type of the descriptors", choices=("float16", "float32"))
    device: str = option("auto", "where to compute", choices=DEVICES)
    threads: int = option(0, "CPU threads, 0 for all", 0, 4096)
    overwrite: bool = option(False, "replace finished descriptors")


@dataclass(frozen=True, kw_only=True)
class Index(Input):
    """Build a sharded IVFPQ index."""

    out: str = required("folder for the index; an unfinished one is continued", path=WRITTEN)
    encoder: str | None = option(
        None, "encoder to apply first; without it, rows are indexed as they are", path=FOLDER
    )
    base: str | None = option(
        None, "index whose trained quantisers are used (ours, or a faiss IVFPQ file)", path=FOLDER
    )
    nlist: int = option(0, "coarse lists, 0 to choose by the number of rows", 0, 2**24)
    m: int | None = option(
        None, "sub-quantisers of the PQ, a byte each at 8 bits", 1, 256,
        usual="the most that fit, up to 16",
    )  # fmt: skip
    nbits: int | None = option(None, "bits of a sub-quantiser", 4, 8, usual="8")
    train_rows: int = option(0, "rows to train on, 0 for 64 a list (at least 65,536)", 0, 10**9)
    export_faiss: str | None = option(
        None, "also write a file that plain faiss reads", path=WRITTEN
    )
    model: str | None = option(
        None, "CLIP model of the features, ARCHITECTURE/WEIGHTS: snip search by text needs it"
    )
    append: bool = option(False, "add the shards that a finished index does not have yet")
    bad_rows: str = option(
        "refuse", "NaN, infinity and zero rows: refuse the input, or keep them, never returned",
        choices=("refuse", "keep"),
    )  # fmt: skip
    threads: int = option(0, "CPU threads, 0 for all", 0, 4096)
    seed: int = option(0, "seed of every random choice", 0, MAX_SEED)
    overwrite: bool = option(False, "replace a finished index")


@dataclass(frozen=True, kw_only=True)
class Dedup(Input):
    """Find duplicates, verify them, write the rows that are kept."""

    features: Any = argument(
        "folder, glob, file or {part:04d} pattern of features, or a URL; or a finished OUT, for "
        "another threshold",
        None,
    )
    out: str | None = option(None, "folder for the result; --dry_run needs none", path=WRITTEN)
    metadata: str | None = option(
        None, "parquet or CSV files that match the features by position", path=ANYWHERE
    )
    method: str | None = option(
        None, "how duplicates are found", choices=("join", "exact", "adc", "semdedup"),
        usual="join, with --index adc",
    )  # fmt: skip
    threshold: float = option(THRESHOLD, "cosine at and above which two rows are duplicates", -1, 1)
    keep_fraction: float | None = option(
        None, "raise the threshold by .001 until at least this share of rows is kept", 0, 1
    )
    grouping: str | None = option(
        None,
        "which rows of a group are kept. star: each removed row is a duplicate of a kept row; "
        "components: one row is kept",
        choices=("star", "components"), usual="star",
    )  # fmt: skip
    keep: str | None = option(
        None,
        "which copy is kept: first, last, random, max:COLUMN or min:COLUMN of the metadata; or "
        "several in order: max:width,max:similarity,first; semdedup: hard, random or easy",
        usual="first; semdedup: hard",
    )
    text_features: Any = option(None, "features of the captions: a pair must match in these too")
    text_threshold: float = option(0.9, "cosine at and above which two captions match", -1, 1)
    reference: Any = option(
        None,
        "rows to compare with that are never removed: features, or an earlier OUT (its kept rows "
        "and its own references); several by comma",
    )
    references_only: bool = option(
        False, "compare rows with --reference only, not with one another"
    )
    keep_work: bool = option(False, "keep model and codes in OUT/work, for a later --reference OUT")
    pairs: bool = option(
        False, "write pairs.parquet, all pairs of distinct rows inside groups, and copies.parquet"
    )
    max_pairs: int = option(10**9, "refuse to write more pairs than this", 0, 2**62)
    recall: float = option(
        0.999, "join: target recall, the share of duplicate rows to find", 0.5, 1
    )
    encoder: str | None = option(
        None, "adc: encoder for the index that it builds; join: encoder that makes its codes",
        path=FOLDER,
    )  # fmt: skip
    index: str | None = option(
        None, "adc: finished index", path=FOLDER, usual="built from features"
    )
    rule: str = option(
        "two_sided",
        "adc: what is compared with a constant: the distances of both rows, d_ADC - self_adc, or "
        "d_ADC / self_adc; mutual is an older name of two_sided",
        choices=("two_sided", "difference", "ratio", "mutual"),
    )
    margin: float | None = option(
        None, "adc: constant of the rule", -1e30, 1e30, usual="calibrated"
    )
    precision: float = option(0.91, "adc: share of right flags to calibrate the margin for", 0, 1)
    calibration_rows: int = option(4096, "adc: rows whose true duplicates set the margin", 1, 10**6)
    k: int = option(16, "adc: neighbours searched for a row; more if all of them pass", 1, 1024)
    nprobe: int = option(4, "adc: lists visited for a row", 1, 2**24)
    clusters: int = option(0, "semdedup: clusters of k-means, 0 for one in 8,700 rows", 0, 2**24)
    epsilon: Any = option(
        None,
        "semdedup: a row is removed if its cosine with an earlier row of its cluster is above 1 - "
        "epsilon; several by comma: the first decides, all are tabulated",
        usual="1 - threshold",
    )
    borders: bool = option(
        True,
        "semdedup: also search by join, and count the duplicates in different clusters; "
        "--noborders turns it off",
        usual="on",
    )
    key: str | None = option(
        None, "metadata column for groups.parquet", usual="the first of key, uid, sample_id, hash"
    )
    merge_captions: int | None = option(
        None, "add merged_captions: so many captions of removed duplicates", 1, 10**6
    )
    caption: str | None = option(
        None, "metadata column of captions", usual="first of caption, text"
    )
    weights: bool = option(False, "write all rows, with a column weight that duplicates share")
    export: str | None = option(
        None,
        "lists for other tools, by comma: datacomp (uids that are kept), keys (for webdataset), "
        "mask (is_dup.npy, always written)",
    )
    bad_rows: str = option(
        "refuse", "NaN, infinity and zero rows: refuse the input, or keep them, never matched",
        choices=("refuse", "keep"),
    )  # fmt: skip
    chunk_rows: int = option(8192, "rows read at a time", 1, 10**9)
    max_memory: str | None = option(
        None,
        "limit of memory, libraries apart, such as 2GB; a run that needs more is refused",
        usual="a quarter of the RAM, or what the run needs if that is more", amount=True,
    )  # fmt: skip
    device: str = option("auto", "join: where products of codes are computed", choices=DEVICES)
    runner: str = option(
        "local",
        "join: what runs the tasks: this machine, or Ray workers (RAY_ADDRESS names a cluster)",
        choices=("local", "ray"),
    )
    num_tasks: int | None = option(
        None,
        "join: number of processes that run this command at the same time with the same --out",
        1, 10**6, usual="that of a Slurm array",
    )  # fmt: skip
    task_index: int | None = option(
        None, "join: rank of this process among them, from 0", 0, 10**6,
        usual="that of a Slurm array",
    )  # fmt: skip
    threads: int = option(0, "CPU threads, 0 for all", 0, 4096)
    seed: int | None = option(None, "seed of every random choice", 0, MAX_SEED, usual="0")
    overwrite: bool = option(False, "replace a finished OUT")
    dry_run: bool = option(
        False, "join: print what the run will cost, and write nothing", command_only=True
    )

    def check(self) -> None:
        """See `Settings.check`."""
        if self.dry_run and (
            self.method not in (None, "join")
            or self.index
            or self.encoder
            or self.reference
            or self.text_features
        ):
            raise UsageError("--dry_run plans a join of FEATURES alone")
        if self.method in ("join", "exact") and self.index:
            raise UsageError(f"--index goes with --method adc, not {self.method}")
        if self.method == "exact" and self.encoder:
            raise UsageError("--encoder goes with --method join or adc, not exact")
        if self.features is None and self.rule == "ratio":
            raise UsageError("--rule ratio needs FEATURES: without them a row is its own code")
        if self.features is None and (self.index is None or self.method not in (None, "adc")):
            raise UsageError("dedup compares raw rows: give FEATURES, or --index for method adc")
        if self.keep is not None and self.method != "semdedup":
            keep_rules(self.keep)
        self.check_methods()
        self.check_runners()
        named_kinds("export", self.export, EXPORTS)
        if self.weights and self.merge_captions is not None:
            raise UsageError("--weights keeps all rows with their captions: nothing is to merge")
        if self.caption is not None and self.merge_captions is None:
            raise UsageError("--caption names the column for --merge_captions: give that too")
        parse_epsilons(self.epsilon)

    def check_methods(self) -> None:
        """Raise UsageError for flags that the method does not have."""
        sem, compared = self.method == "semdedup", self.method in (None, "join", "exact")
        if sem and self.keep not in (None, *SEMDEDUP_KEEPS):
            raise UsageError(
                f"--keep of semdedup must be one of {', '.join(SEMDEDUP_KEEPS)}, "
                f"found {self.keep!r}"
            )
        for name in ("grouping", "keep_fraction", "index", "encoder"):
            if sem and getattr(self, name) is not None:
                raise UsageError(f"--{name} does not apply to --method semdedup")
        for name in ("text_features", "reference"):
            if getattr(self, name) is not None and (not compared or self.index):
                raise UsageError(f"--{name} goes with --method join or exact")
        if self.references_only and self.reference is None:
            raise UsageError("--references_only compares with --reference: give that too")
        if self.text_features is not None and self.reference is not None:
            raise UsageError("--text_features and --reference do not go together yet")
        if self.pairs and (sem or self.features is None):
            raise UsageError("--pairs needs FEATURES and --method join, exact or adc")
        if self.keep_fraction is not None and self.features is None:
            raise UsageError("--keep_fraction needs FEATURES: unverified pairs have no cosines")

    def check_runners(self) -> None:
        """Raise UsageError for ways to run that do not go together."""
        if self.num_tasks is not None and not (self.task_index or 0) < self.num_tasks:
            raise UsageError(
                f"--task_index must lie between 0 and {self.num_tasks - 1}, found {self.task_index}"
            )
        shared = self.num_tasks is not None or self.task_index is not None
        if not shared and self.runner == "local":
            return
        flag = "--num_tasks" if shared else f"--runner {self.runner}"
        if self.method not in (None, "join") or self.index:
            raise UsageError(f"{flag} goes with --method join, not {self.method or 'adc'}")
        if shared and self.runner != "local":
            raise UsageError("--num_tasks and --runner ray are two ways to share work: give one")
        if shared and self.overwrite:
            raise UsageError(
                "--num_tasks does not go with --overwrite: each process would remove the work of "
                "the others; remove the folder first"
            )
        if self.runner == "ray" and self.device == "cuda":
            raise UsageError("--runner ray computes on CPUs: leave --device cuda out")
        if self.runner == "ray" and not isinstance(self.features, str | Path):
            raise UsageError("--runner ray reads features from files: give their folder")

    def filled(self) -> Dedup:
        """Return the settings with defaults for what a re-threshold would take over.

        Raises
        ------
        UsageError
            For flags of SemDeDup's rule with another method, which only now is known.
        """
        if self.method != "semdedup" and (self.clusters or self.epsilon is not None):
            other = f", not {self.method}" if self.method else ""
            raise UsageError(f"--clusters and --epsilon go with --method semdedup{other}")
        known: dict[str, Any] = {"grouping": "star", "keep": "first", "seed": 0}
        if self.method == "semdedup":
            known = {"keep": "hard", "seed": 0}
        given = {name: getattr(self, name) for name in known if getattr(self, name) is not None}
        epsilons = parse_epsilons(self.epsilon)  # the first decides
        threshold = 1 - epsilons[0] if epsilons else self.threshold
        return dataclasses.replace(self, **{**known, **given, "threshold": threshold})


@dataclass(frozen=True, kw_only=True)
class Filter(Settings):
    """Apply a mask to metadata and features."""

    metadata: Any = argument("folder, glob or file of parquet or CSV metadata")
    is_dup: str = required("mask: is_dup.npy, or a folder that snip dedup wrote", path=FOLDER)
    out: str = required("folder for the kept rows", path=WRITTEN)
    start: int | None = option(None, "first file number, counted from 0 in the whole set")
    end: int | None = option(None, "file number to stop before")
    cumulative_sizes: str | None = option(
        None, ".npy of running row totals a file, as upstream publishes beside its mask", path=FILE
    )
    on: str | None = option(
        None, "find rows by this column, not by position: url, uid, key, hash; several by comma"
    )
    keys: str | None = option(
        None, "with --on: metadata that matches the mask by position", path=ANYWHERE,
        usual="what OUT names",
    )  # fmt: skip
    unmatched: str | None = option(
        None, "with --on: what becomes of rows that the mask's set does not have",
        choices=("keep", "remove"), usual="they are kept, if they are fewer than half",
    )  # fmt: skip
    ambiguous: str | None = option(
        None, "with --on: what becomes of rows whose key is both kept and removed",
        choices=("keep", "remove"), usual="they are kept, if they are fewer than half",
    )  # fmt: skip
    embeddings: str | None = option(
        None,
        "features that match the metadata by position (several folders by comma): write their kept "
        "rows too, beside metadata/",
        path=ANYWHERE,
    )
    export: str | None = option(
        None,
        "lists for other tools, by comma: datacomp (uids that are kept), keys (for webdataset), "
        "mask (of these rows)",
    )
    key: str | None = option(
        None, "column for --export keys", usual="the first of key, uid, sample_id, hash"
    )
    overwrite: bool = option(False, "replace a finished folder")

    def check(self) -> None:
        """See `Settings.check`."""
        self.check_file_range(self.start, self.end)
        named_kinds("export", self.export, EXPORTS)
        places = (self.start, self.end, self.cumulative_sizes)
        if self.on is not None and any(place is not None for place in places):
            raise UsageError("--on finds rows by key: leave out --start, --end, --cumulative_sizes")
        for name in ("keys", "unmatched", "ambiguous"):
            if self.on is None and getattr(self, name) is not None:
                raise UsageError(f"--{name} goes with --on: name the column to find rows by")


@dataclass(frozen=True, kw_only=True)
class Download(Settings):
    """Fetch a range of metadata files, filtered by a mask if given."""

    source: str = argument(
        "hf://datasets/OWNER/NAME[/folder][@revision], a URL or path with {part:04d}, a folder or "
        "file; datacomp_small, datacomp_1b, relaion2B-en-research-safe; or a folder published with "
        "its snip.json (encoder, index, OUT)",
        path=ANYWHERE,
    )
    out: str | None = argument("folder for the files", None, path=WRITTEN)
    start: int | None = option(None, "first file number")
    end: int | None = option(None, "file number to stop before")
    is_dup: str | None = option(None, "mask (file or URL): write only the kept rows", path=ANYWHERE)
    cumulative_sizes: str | None = option(
        None,
        ".npy (file or URL) of running row totals per file, if files before --start are missing",
        path=ANYWHERE,
    )  # fmt: skip
    embeddings: bool = option(False, "also the features of these files, to img_emb/ in OUT")
    embeddings_source: str | None = option(
        None, "folder or {part:04d} template of the features", path=ANYWHERE,
        usual="beside the metadata",
    )  # fmt: skip
    jobs: int = option(4, "files fetched at a time", 1, 256)
    overwrite: bool = option(False, "replace a finished folder")
    dl_dedup_set: str | None = option(
        None, "flag of the snip-dedup package: explains where its sets are today"
    )

    def check(self) -> None:
        """See `Settings.check`."""
        if self.out is None and self.dl_dedup_set is None:
            raise UsageError("download needs SOURCE and OUT; see: snip download --help")
        if self.out is not None and self.dl_dedup_set is not None:
            raise UsageError("--dl_dedup_set is upstream's flag: name a mask with --is_dup instead")
        self.check_file_range(self.start, self.end)
        if self.cumulative_sizes is not None and self.is_dup is None:
            raise UsageError("--cumulative_sizes places a mask: give --is_dup too")


@dataclass(frozen=True, kw_only=True)
class Audit(Settings):
    """Check a finished run against the raw features."""

    out: str = argument("folder that snip dedup wrote", path=FOLDER)
    features: Any = argument("the features it was made from; without them those it names", None)
    parts: str | None = option(None, "part numbers of a {part:04d} pattern: 0:2, end exclusive")
    array: str | None = option(None, "array of an .npz file")
    column: str | None = option(None, "list column of a parquet file")
    metadata: str | None = option(None, "input table, if it is not where it was", path=ANYWHERE)
    sample: int = option(0, "removed rows to check, chosen at random; 0 for all", 0, 2**40)
    probe_rows: int = option(1000, "kept rows to search for missed matches; 0 for none", 0, 10**6)
    sheet: str | None = option(
        None, "write random removed pairs as CSV, for you to judge", path=WRITTEN
    )
    n: int = option(200, "pairs of --sheet", 1, 10**6)
    judged: str | None = option(
        None, "read a sheet with your verdicts (yes, no) and print the precision; no audit",
        path=FILE,
    )  # fmt: skip
    max_memory: str | None = option(
        None, "limit of the rows held at a time, such as 2GB", usual="a quarter of the RAM",
        amount=True,
    )  # fmt: skip
    threads: int = option(0, "CPU threads, 0 for all", 0, 4096)
    seed: int = option(0, "seed of every random choice", 0, MAX_SEED)

    def check(self) -> None:
        """See `Settings.check`."""
        if self.sheet is not None and self.judged is not None:
            raise UsageError("--sheet writes a sheet, --judged reads one: give one of them")


@dataclass(frozen=True, kw_only=True)
class Top(Settings):
    """List the rows with the most duplicates."""

    out: str = argument("folder that snip dedup wrote", path=FOLDER)
    n: int = option(100, "rows shown", 1, 10**7)
    metadata: str | None = option(None, "input table, if it is not where it was", path=ANYWHERE)
    json: bool = option(False, "print JSON", command_only=True)
    prompts: str | None = option(
        None, "also write their captions, one a line, as prompts for a generator", path=WRITTEN
    )


@dataclass(frozen=True, kw_only=True)
class Diff(Settings):
    """Compare two runs over the same rows."""

    out1: str = argument("folder that snip dedup wrote", path=FOLDER)
    out2: str = argument("another one, over the same rows", path=FOLDER)
    n: int = option(5, "examples of each kind", 0, 10**6)
    json: bool = option(False, "print JSON", command_only=True)


@dataclass(frozen=True, kw_only=True)
class Report(Settings):
    """Write a page that shows what is removed, with pictures if given."""

    out: str = argument("folder that snip dedup wrote", path=FOLDER)
    html: str | None = option(None, "the page to write", usual="report.html in OUT", path=WRITTEN)
    images: str | None = option(
        None, "pictures by key: a folder of files or of tar shards, a tar, or a glob of tars",
        path=FILE,
    )  # fmt: skip
    image_column: str | None = option(
        None, "metadata column of local picture files; with --images, below that folder only"
    )
    metadata: str | None = option(
        None, "table of captions and urls, if it is not where the run found it", path=ANYWHERE
    )
    rows: str | None = option(None, "also show these rows (from 0, by comma), with their kept rows")
    seed: int = option(0, "seed of the samples that are shown", 0, MAX_SEED)
    overwrite: bool = option(False, "replace a file that is no report, or a page with pictures")

    def check(self) -> None:
        """See `Settings.check`."""
        if self.rows is not None:
            whole_numbers("rows", self.rows, 2**48, least=0)


@dataclass(frozen=True, kw_only=True)
class Search(Settings):
    """Find the nearest rows to a row, a vector or a text."""

    query: Any = argument("row number, .npy or .npz of vectors, or a text")
    index: str = required("folder that snip index wrote", path=FOLDER)
    k: int = option(10, "neighbours to show", 1, 10**6)
    nprobe: int = option(64, "lists visited", 1, 2**24)
    rerank: int = option(2000, "nearest codes to compare by raw features; 0 for none", 0, 10**6)
    features: str | None = option(
        None, "the rows that were indexed, if they moved or changed their date", path=ANYWHERE
    )
    parts: str | None = option(None, "of --features: numbers of a {part:04d} pattern")
    array: str | None = option(None, "array of an .npz, of QUERY or --features")
    column: str | None = option(None, "of --features: list column of a parquet file")
    metadata: str | None = option(None, "key, url, caption of the rows, by position", path=ANYWHERE)
    encoder: str | None = option(
        None, "for vectors and texts, if the index has descriptors", path=FOLDER
    )
    text: bool = option(False, "QUERY is a text, though it looks like a row or a file")
    model: str | None = option(
        None, "CLIP model for texts, as open_clip names it: ARCHITECTURE/WEIGHTS or /FILE"
    )
    download: bool = option(False, "fetch the model's weights if they are not cached")
    json: bool = option(False, "print JSON", command_only=True)
    html: str | None = option(None, "also write a page of the neighbours", path=WRITTEN)

    def check(self) -> None:
        """See `Settings.check`."""
        query = self.query if isinstance(self.query, str) and not self.text else ""
        if URL.match(query) and query.endswith((".npy", ".npz")):
            raise UsageError("QUERY is a URL of vectors: fetch the file first, or say --text")


@dataclass(frozen=True, kw_only=True)
class Eval(Input):
    """Measure what descriptors and codes keep, against brute force."""

    out: str = required("folder for table, JSON and picture", path=WRITTEN)
    encoder: str | None = option(
        None, "SNIP encoder to judge", path=FOLDER, usual="one is trained, without the queries"
    )
    text_features: Any = option(None, "text features: also judge how texts find their images")
    dim: int = option(128, "width of the descriptors", 2, 4096)
    code_bytes: str = option("4,8,16", "bytes of a code, by comma")
    nprobe: str = option("1,4,8,16", "lists visited, by comma; all lists are added")
    nlist: int = option(0, "coarse lists, 0 to choose by the number of rows", 0, 2**24)
    queries: int = option(4096, "rows whose neighbours are found (at most a quarter)", 1, 10**6)
    train_rows: int = option(  # at least evaluate.LEAST_LEARNT
        65_536, "rows that encoders, PCA and OPQ learn from", 256, 10**8
    )
    steps: int = option(400, "most training steps of each encoder", 1, 10**7)
    threshold: float = option(THRESHOLD, "cosine at and above which two rows are duplicates", -1, 1)
    flag_nprobe: int = option(4, "lists visited for duplicate flags", 1, 2**24)
    picture: bool = option(
        True, "draw the curves (extra plot); --nopicture turns it off", usual="on"
    )
    threads: int = option(0, "CPU threads, 0 for all", 0, 4096)
    seed: int = option(0, "seed of every random choice", 0, MAX_SEED)
    overwrite: bool = option(False, "replace a finished folder")

    def check(self) -> None:
        """See `Settings.check`."""
        self.sizes()
        self.nprobes()

    def sizes(self) -> list[int]:
        """Return the code sizes in bytes, ascending."""
        return whole_numbers("code_bytes", self.code_bytes, 256)

    def nprobes(self) -> list[int]:
        """Return how many lists are visited, ascending."""
        return whole_numbers("nprobe", self.nprobe, 2**24)


@dataclass(frozen=True, kw_only=True)
class Plan(Settings):
    """Estimate time, memory and disk of a run."""

    features: Any = argument("features to plan for, of which a sample is read", None)
    parts: str | None = option(None, "part numbers of a {part:04d} pattern: 0:2, end exclusive")
    array: str | None = option(None, "array of an .npz file")
    column: str | None = option(None, "list column of a parquet file")
    rows: float | None = option(
        None, "rows, such as 2.1e9, if FEATURES are not all there yet", 1, 1e13,
        usual="those of FEATURES",
    )  # fmt: skip
    dim: int = option(768, "without FEATURES: width of the rows; they are float16", 2, 65536)
    duplicates: float | None = option(
        None, "share of the rows that are removed", 0, 0.99,
        usual="estimated from a sample of FEATURES, else .3",
    )  # fmt: skip
    cores: int = option(0, "cores of the machine; 0: those of this machine", 0, 4096)
    memory: str | None = option(
        None, "RAM of the machine, such as 32GB", usual="that of this machine", amount=True
    )
    max_memory: str | None = option(
        None, "--max_memory of snip dedup", usual="a quarter of the RAM", amount=True
    )
    nodes: int = option(1, "number of such machines that share a file system", 1, 10**5)
    disk: str | None = option(None, "free space for OUT, such as 4TB", amount=True)
    disk_speed: str | None = option(
        None, "bytes a second that a disk reads or writes, such as 2GB", amount=True,
        usual="all is in RAM already",
    )  # fmt: skip
    probe: bool = option(False, "measure rates now, and write them to the file of --rates")
    rates: str | None = option(
        None, "file of rates that an earlier --probe measured", usual="measured now", path=WRITTEN
    )
    threshold: float = option(THRESHOLD, "as of snip dedup", -1, 1)
    recall: float = option(0.999, "as of snip dedup", 0.5, 1)
    seed: int = option(0, "seed of the sample", 0, MAX_SEED)
    json: bool = option(False, "print JSON", command_only=True)

    def check(self) -> None:
        """See `Settings.check`."""
        if self.features is None and self.rows is None:
            raise UsageError("give FEATURES or --rows: snip plan --rows 2.1e9 --dim 768")


@dataclass(frozen=True, kw_only=True)
class Demo(Settings):
    """Run all commands on pictures that it draws itself."""

    out: str = option("snip_demo", "folder for everything the demo makes", path=WRITTEN)
    pictures: int = option(1500, "pictures to draw before copies are made", 50, 100_000)
    seed: int = option(0, "seed of every random choice", 0, MAX_SEED)
    overwrite: bool = option(False, "replace a finished demo")


def parse_epsilons(value: Any) -> list[float]:
    """Parse ``.05,.03``, a number or a list of them; an empty list for None.

    Raises
    ------
    UsageError
        If it is no such list, or a number does not lie between 0 and 2.
    """
    items = value.split(",") if isinstance(value, str) else value
    items = [] if items is None else items if isinstance(items, list | tuple) else [items]
    try:
        numbers = [float(item) for item in items]
    except (TypeError, ValueError):
        numbers = [-1.0]
    if not all(0 <= number <= 2 for number in numbers):
        raise UsageError(f"--epsilon must be numbers from 0 to 2, by comma, found {value!r}")
    return numbers


def keep_rules(text: str) -> tuple[list[tuple[str, str]], str]:
    """Parse ``max:similarity,min:width,last``.

    Returns
    -------
    rules : list of (str, str)
        ``max`` or ``min``, and the column.
    last : str
        ``first``, ``last`` or ``random``: what decides among rows that are still even.

    Raises
    ------
    UsageError
        If the text is no such list.
    """
    *words, last = (word.strip() for word in text.split(","))
    if last not in ("first", "last", "random"):
        words, last = [*words, last], "first"
    rules = [(way, column) for way, _, column in (word.partition(":") for word in words)]
    if not all(way in ("max", "min") and column for way, column in rules):
        raise UsageError(
            "--keep must be first, last or random, or rules such as max:width,min:similarity,first "
            f"(the one without a column last), found {text!r}"
        )
    return rules, last


def named_kinds(flag: str, text: str | None, known: tuple[str, ...]) -> list[str]:
    """Parse a list by comma, such as ``--export datacomp,keys``, of known words."""
    kinds = [kind.strip() for kind in (text or "").split(",") if kind.strip()]
    if not set(kinds) <= set(known):
        raise UsageError(f"--{flag} must be one or more of {', '.join(known)}, found {text!r}")
    return kinds


def whole_numbers(name: str, text: str, most: int, least: int = 1) -> list[int]:
    """Parse ``4,8,16``: whole numbers, ascending, each once.

    Raises
    ------
    UsageError
        If it is anything else.
    """
    try:
        numbers = sorted({int(word) for word in str(text).split(",")})
    except ValueError:
        numbers = []
    if not numbers or not least <= numbers[0] <= numbers[-1] <= most:
        raise UsageError(
            f"--{name} must be whole numbers from {least} to {most} such as 4,8,16, found {text!r}"
        )
    return numbers


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
