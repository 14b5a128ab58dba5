"""Every command and every setting of it: name, type, default and meaning, once.

The command line, its help, ``docs/cli.md`` and the library functions all read these classes.
They are frozen and check their own ranges, so a wrong value is refused before any work.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snipdedup.commands import (
    ANYWHERE,
    DECLARED,
    FILE,
    FOLDER,
    STORED,
    URL,
    WRITTEN,
    Settings,
    argument,
    check_file_range,
    command,
    keep_rules,
    option,
    parse_epsilons,
    refuse,
    required,
    split_also,
)
from snipdedup.errors import InternalError, UsageError

EXPORTS = ("datacomp", "keys", "mask")
MAX_SEED = 2**63 - 1  # the largest that every library takes
METHODS = ("join", "exact", "adc", "semdedup")
ONLY_WITH = (  # methods, and the settings that the others do not have
    (("join",), ("runner", "num_tasks", "task_index")),
    (("adc",), ("index",)),
    (("semdedup",), ("clusters", "epsilon")),
    (("join", "adc"), ("encoder",)),
    (("join", "exact"), ("also", "text_features", "reference")),
    (("join", "exact", "adc"), ("grouping", "keep_fraction", "pairs", "decisions")),
)
RULES = ("two_sided", "difference", "ratio", "mutual")  # mutual is an older name of two_sided
KEEP_REMOVE = ("keep", "remove")
SEMDEDUP_KEEPS = ("hard", "random", "easy")
DEVICES = ("auto", "cpu", "cuda")
SHARED_URL = (
    "processes that share --out need a folder that all of them see: give one, then snip push it"
)
THRESHOLD = 0.95  # cosine of two duplicates, for CLIP; see `features.origin.usual_threshold`


def check_sharing(asked: Any) -> None:
    """Refuse settings of processes, machines and devices that do not go together."""
    shared = asked.num_tasks is not None or asked.task_index is not None
    ray = asked.runner == "ray"
    refuse(
        (asked.num_tasks is not None and (asked.task_index or 0) >= asked.num_tasks,
         f"--task_index must lie between 0 and {(asked.num_tasks or 1) - 1}, found "
         f"{asked.task_index}"),
        (shared and ray, "--num_tasks and --runner ray are two ways to share work: give one"),
        (shared and asked.overwrite,
         "--num_tasks does not go with --overwrite: each process would remove the work of the "
         "others; remove the folder first"),
        ((shared or ray) and asked.out is not None and URL.match(str(asked.out)), SHARED_URL),
        (ray and asked.device == "cuda", "--runner ray computes on CPUs: leave --device cuda out"),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Format(Settings):
    """Which rows of which files are features."""

    parts: str | None = option(None, "part numbers of a {part:04d} pattern: 0:2, end exclusive")
    array: str | None = option(None, "array of an .npz file")
    column: str | None = option(None, "list column of a parquet file")


@dataclass(frozen=True, kw_only=True, repr=False, eq=False)
class Input(Format):
    """What commands that read features share."""

    features: Any = argument("folder, glob, file or {part:04d} pattern of features, or a URL")


@command("embed", "the chain", "pictures.embed", "photos --out embedded")
class Embed(Settings):
    """Make features and metadata of pictures."""

    images: Any = argument(
        "folder of pictures (subfolders too), glob, tars, parquet files with picture bytes, .txt "
        "list of paths; or a URL of one of these; several by comma"
    )
    out: str = required("folder, or URL of a store, for img_emb/ and metadata/", path=STORED)
    model: str = option(
        "phash",
        "phash, pdq, clip:ARCHITECTURE/WEIGHTS, timm:NAME, timm:NAME/FILE, onnx:FILE, "
        "torchscript:FILE",
    )
    preprocess: str | None = option(
        None,
        "of a learned model: JSON file, or words such as size=224 [its own, or JSON beside it]",
    )
    download: bool = option(False, "fetch weights of clip: and timm: that are not on this machine")
    parts: str | None = option(None, "part numbers of a {part:04d} pattern: 0:2, end exclusive")
    column: str | None = option(None, "column of the pictures in parquet files [the first]")
    shard_rows: int = option(10_000, "picture files in a shard; a tar is a shard", 1, 10**7)
    max_pixels: int = option(200_000_000, "larger pictures fail", 1, 2**40)
    every: float | None = option(
        None, "seconds between frames of videos (extra video) [videos are left out]", 1e-2, 10**6
    )
    device: str = option("auto", "where the model computes", choices=DEVICES)
    runner: str = option("local", "this machine, or Ray workers", choices=("local", "ray"))
    num_tasks: int | None = option(
        None, "processes that run this with the same --out [those of a Slurm array]", 1, 10**6
    )
    task_index: int | None = option(
        None, "rank of this process among them, from 0 [that of a Slurm array]", 0, 10**6
    )
    threads: int = option(0, "CPU threads, and processes that decode; 0 for all", 0, 4096)
    overwrite: bool = option(False, "replace a finished folder")

    def _check(self) -> None:
        check_sharing(self)


@command("train", "the chain", "encoder.training", "img_emb --out encoder")
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
        None, "softmax temperature of the snip loss [fitted to the features]", 1e-4, 10
    )
    text_features: Any = option(None, "text features, row for row: keep their similarities too")
    text_temperature: float = option(0.01, "softmax temperature between texts and images", 1e-4, 10)
    subset_rows: int = option(262_144, "rows held in memory at a time", 64, 10**9)
    validation_rows: int = option(4096, "rows held out (at most a fifth of all)", 16, 10**6)
    device: str = option("auto", "where to compute", choices=DEVICES)
    threads: int = option(0, "CPU threads, 0 for all", 0, 4096)
    seed: int = option(0, "seed of every random choice", 0, MAX_SEED)
    overwrite: bool = option(False, "replace a finished encoder")


@command("compress", "the chain", "encoder.compress", "img_emb --encoder encoder --out descriptors")
class Compress(Input):
    """Write descriptors, shard for shard."""

    encoder: str = required("folder of a trained encoder", path=FOLDER)
    out: str = required("folder for the descriptors, one .npy a shard", path=WRITTEN)
    dtype: str = option("float16", "type of the descriptors", choices=("float16", "float32"))
    device: str = option("auto", "where to compute", choices=DEVICES)
    threads: int = option(0, "CPU threads, 0 for all", 0, 4096)
    overwrite: bool = option(False, "replace finished descriptors")


@command(
    "index", "the chain", "index.build", "img_emb --encoder encoder --out index", "build_index"
)
class BuildIndex(Input):
    """Build a sharded IVFPQ index."""

    out: str = required("folder for the index; an unfinished one is continued", path=WRITTEN)
    encoder: str | None = option(None, "encoder to apply first [rows as they are]", path=FOLDER)
    base: str | None = option(None, "index, or faiss file, whose quantisers to use", path=FOLDER)
    nlist: int = option(0, "coarse lists, 0 to choose by the number of rows", 0, 2**24)
    m: int | None = option(None, "sub-quantisers of the PQ [the most that fit, up to 16]", 1, 256)
    nbits: int | None = option(None, "bits of a sub-quantiser [8]", 4, 8)
    train_rows: int = option(0, "rows to train on, 0 for 64 a list (at least 65,536)", 0, 10**9)
    export_faiss: str | None = option(None, "also write a file for plain faiss", path=WRITTEN)
    model: str | None = option(None, "CLIP model, ARCHITECTURE/WEIGHTS, for snip search by text")
    append: bool = option(False, "add the shards that a finished index does not have yet")
    bad_rows: str = option("refuse", "NaN, infinite and zero rows", choices=("refuse", "keep"))
    threads: int = option(0, "CPU threads, 0 for all", 0, 4096)
    seed: int = option(0, "seed of every random choice", 0, MAX_SEED)
    overwrite: bool = option(False, "replace a finished index")


@command("dedup", "the chain", "deduplication.run", "img_emb --metadata metadata --out clean")
class Dedup(Input):
    """Find duplicates, verify them, write the rows that are kept."""

    features: Any = argument(
        "folder, glob, file, {part:04d} pattern or URL; or an OUT, for another threshold", None
    )
    out: str | None = option(
        None, "folder, or URL of a store, for the result; --dry_run needs none", path=STORED
    )
    metadata: str | None = option(None, "parquet or CSV files, row for row", path=ANYWHERE)
    method: str | None = option(None, "how to search [join, with --index adc]", choices=METHODS)
    threshold: float | None = option(
        None,
        "cosine at and above which two rows are duplicates [the model's, else .95; OUT's own]",
        -1, 1,
    )  # fmt: skip
    keep_fraction: float | None = option(None, "raise the threshold until this share is kept", 0, 1)
    grouping: str | None = option(
        None,
        "star: each removed row matches a kept row; components: one row a group is kept [star]",
        choices=("star", "components"),
    )
    keep: str | None = option(
        None,
        "first, last, random, max:COLUMN, min:COLUMN of the metadata, or several in order, such as "
        "max:width,max:similarity,first; semdedup: hard, random, easy [first; semdedup: hard]",
    )
    also: Any = option(
        None,
        "other features of the same images, as FEATURES:THRESHOLD: a pair must match in these too; "
        "several by comma, or given again; for features of snip embed no threshold is needed",
        several=True,
    )
    text_features: Any = option(None, "features of the captions: a pair must match in these too")
    text_threshold: float = option(0.9, "cosine at and above which two captions match", -1, 1)
    reference: Any = option(
        None, "rows to compare with, never removed: features, or an earlier OUT; several by comma"
    )
    references_only: bool = option(False, "compare with --reference only, not with one another")
    keep_work: bool = option(False, "keep model and codes in OUT/work, for a later --reference OUT")
    pairs: bool = option(False, "write all pairs inside groups (pairs.parquet, copies.parquet)")
    max_pairs: int = option(10**9, "refuse to write more pairs than this", 0, 2**62)
    recall: float = option(0.999, "join: share of the duplicate rows to find", 0.5, 1)
    encoder: str | None = option(None, "join, adc: encoder that makes the codes", path=FOLDER)
    index: str | None = option(None, "adc: finished index [built from features]", path=FOLDER)
    rule: str = option(
        "two_sided", "adc: the adaptive rule; mutual: older name of two_sided", choices=RULES
    )
    margin: float | None = option(None, "adc: margin of the rule [calibrated]", -1e30, 1e30)
    precision: float = option(0.91, "adc: precision that the margin is calibrated to", 0, 1)
    calibration_rows: int = option(4096, "adc: rows whose true duplicates set the margin", 1, 10**6)
    k: int = option(16, "adc: neighbours searched for a row; more if all of them pass", 1, 1024)
    nprobe: int = option(4, "adc: lists visited for a row", 1, 2**24)
    clusters: int = option(0, "semdedup: clusters of k-means, 0: one for 8,700 rows", 0, 2**24)
    epsilon: Any = option(
        None,
        "semdedup: remove above cosine 1 - epsilon; the first of several is used [1 - threshold]",
    )
    borders: bool = option(
        True, "semdedup: also count, by join, what its clusters miss; --noborders turns it off [on]"
    )
    decisions: Any = option(
        None,
        "CSV with a column decision (keep or drop) beside row or key: these rows stay or go in any "
        "case; several by comma, the last one counts",
    )
    key: str | None = option(None, "column for groups.parquet [first of key, uid, ...]")
    merge_captions: int | None = option(
        None, "add up to so many captions of a row's duplicates", 1, 10**6
    )
    caption: str | None = option(None, "metadata column of captions [first of caption, text]")
    weights: bool = option(False, "write all rows, with a column weight; copies add up to 1")
    export: str | None = option(
        None,
        "lists by comma: datacomp (kept uids), keys (for webdataset), mask (is_dup.npy)",
        words=EXPORTS,
    )
    bad_rows: str = option("refuse", "NaN, infinite and zero rows", choices=("refuse", "keep"))
    chunk_rows: int = option(8192, "rows read at a time", 1, 10**9)
    max_memory: str | None = option(
        None,
        "limit such as 2GB, without libraries [a quarter of the RAM, or more if needed]",
        amount=True,
    )
    device: str = option("auto", "join: where products of codes are computed", choices=DEVICES)
    runner: str = option("local", "join: this machine, or Ray workers", choices=("local", "ray"))
    num_tasks: int | None = option(
        None, "join: processes that run this with the same --out [those of a Slurm array]", 1, 10**6
    )
    task_index: int | None = option(
        None, "join: rank of this process among them, from 0 [that of a Slurm array]", 0, 10**6
    )
    threads: int = option(0, "CPU threads, 0 for all", 0, 4096)
    seed: int | None = option(None, "seed of every random choice [0]", 0, MAX_SEED)
    overwrite: bool = option(False, "replace a finished OUT")
    dry_run: bool = option(False, "join: print the cost, and write nothing", command_only=True)

    def _check(self) -> None:
        method = self.method or ("adc" if self.index is not None else None)  # None: join, or of OUT
        for methods, names in ONLY_WITH:
            for name in names:
                if method not in (None, *methods) and self.is_given(name):
                    given = f"{name} {self.runner}" if name == "runner" else name
                    known = " or ".join(methods)
                    raise UsageError(f"--{given} goes with --method {known}, not {method}")
        split_also(self.also)
        beside = (self.encoder, self.reference, self.text_features, self.also)
        alone = all(x is None for x in beside)
        clusters, rowless = method == "semdedup", self.features is None
        ray = self.runner == "ray"
        refuse(
            (self.dry_run and not (method in (None, "join") and alone),
             "--dry_run plans a join of FEATURES alone"),
            (rowless and self.index is None,
             "dedup compares raw rows: give FEATURES, or --index for method adc"),
            (rowless and self.rule == "ratio",
             "--rule ratio needs FEATURES: without them a row is its own code"),
            (rowless and (self.pairs or self.keep_fraction is not None),
             "--pairs and --keep_fraction need FEATURES: unverified pairs have no cosines"),
            (rowless and self.decisions is not None,
             "--decisions decides groups again: give FEATURES, to compare their rows"),
            (self.weights and self.decisions is not None,
             "--weights writes all rows, and --decisions says that some go: give one of them"),
            (clusters and self.keep not in (None, *SEMDEDUP_KEEPS),
             f"--keep of semdedup must be one of {', '.join(SEMDEDUP_KEEPS)}, found {self.keep!r}"),
            (self.references_only and self.reference is None,
             "--references_only compares with --reference: give that too"),
            (self.reference is not None and self.text_features is not None,
             "--text_features and --reference do not go together yet"),
            (self.reference is not None and self.also is not None,
             "--also and --reference do not go together yet"),
            (ray and not isinstance(self.features, str | Path),
             "--runner ray reads features from files: give their folder"),
            (self.weights and self.merge_captions is not None,
             "--weights keeps all rows with their captions: nothing is to merge"),
            (self.caption is not None and self.merge_captions is None,
             "--caption names the column for --merge_captions: give that too"),
        )  # fmt: skip
        check_sharing(self)
        if self.keep is not None and not clusters:
            keep_rules(self.keep)
        parse_epsilons(self.epsilon)

    @property
    def cosine(self) -> float:
        """The threshold of filled settings (`deduplication.settings.fill_settings`)."""
        if self.threshold is None:
            raise InternalError("the threshold was not filled in")
        return self.threshold

    def filled(self) -> Dedup:
        """Return the settings of a new search, with the method and what depends on it.

        A run that decides an earlier one again takes these from that one.
        """
        method = self.method or ("join" if self.index is None else "adc")
        clusters, epsilons = method == "semdedup", parse_epsilons(self.epsilon)
        return dataclasses.replace(
            self,
            method=method,
            grouping=None if clusters else self.grouping or "star",
            keep=self.keep or ("hard" if clusters else "first"),
            threshold=1 - epsilons[0] if epsilons else self.threshold,  # the first decides
            seed=self.seed or 0,
        )


@command("filter", "the chain", "metadata.filter", "metadata --is_dup clean --out kept")
class Filter(Settings):
    """Apply a mask to metadata and features."""

    metadata: Any = argument("folder, glob or file of parquet or CSV metadata")
    is_dup: str = required("mask: is_dup.npy, or a folder that snip dedup wrote", path=FOLDER)
    out: str = required("folder, or URL of a store, for the kept rows", path=STORED)
    start: int | None = option(None, "first file number, counted from 0 in the whole set")
    end: int | None = option(None, "file number to stop before")
    cumulative_sizes: str | None = option(None, ".npy of running row totals a file", path=FILE)
    on: str | None = option(None, "find rows by columns, not by position: url, uid, key, hash")
    keys: str | None = option(None, "--on: metadata of the mask [what OUT names]", path=ANYWHERE)
    unmatched: str | None = option(
        None, "--on: rows that the mask does not know [kept, if under half]", choices=KEEP_REMOVE
    )
    ambiguous: str | None = option(
        None, "--on: rows whose key is kept and removed [kept, if under half]", choices=KEEP_REMOVE
    )
    embeddings: str | None = option(
        None,
        "features, row for row: write their kept rows beside metadata/; several by comma",
        path=ANYWHERE,
    )
    export: str | None = option(
        None,
        "lists by comma: datacomp (kept uids), keys (for webdataset), mask (of these rows)",
        words=EXPORTS,
    )
    key: str | None = option(None, "column for --export keys [first of key, uid, sample_id, hash]")
    overwrite: bool = option(False, "replace a finished folder")

    def _check(self) -> None:
        check_file_range(self.start, self.end)
        by_key, by_place = self.on is not None, (self.start, self.end, self.cumulative_sizes)
        refuse(
            (by_key and by_place != (None, None, None),
             "--on finds rows by key: leave out --start, --end, --cumulative_sizes"),
            *((not by_key and getattr(self, name) is not None,
               f"--{name} goes with --on: name the column to find rows by")
              for name in ("keys", "unmatched", "ambiguous")),
        )  # fmt: skip


@command("apply", "the chain", "pictures.apply", "clean --move removed")
class Apply(Settings):
    """Move the picture files of removed rows, or link those that stay."""

    out: str | None = argument(
        "folder that snip dedup wrote, of pictures that snip embed read from files", None,
        path=FOLDER,
    )  # fmt: skip
    move: str | None = option(None, "new folder for the files of removed rows", path=WRITTEN)
    link: str | None = option(None, "new folder for links to the files that stay", path=WRITTEN)
    undo: str | None = option(None, "put the files in this folder of --move back", path=FOLDER)
    dry_run: bool = option(False, "only say what would be done")
    metadata: str | None = option(None, "input table, if it moved", path=ANYWHERE)
    threads: int = option(0, "CPU threads that check files, 0 for all", 0, 4096)

    def _check(self) -> None:
        given = [name for name in ("move", "link", "undo") if getattr(self, name) is not None]
        refuse(
            (len(given) != 1, "give one of --move, --link and --undo: snip apply OUT --move DIR"),
            (given == ["undo"] and (self.out or self.metadata) is not None,
             "--undo needs the folder alone: snip apply --undo DIR"),
            (given != ["undo"] and self.out is None,
             f"--{given[0] if given else 'move'} needs OUT, a folder that snip dedup wrote"),
        )  # fmt: skip


@command("download", "the chain", "downloading.run",
         "'https://host/metadata_{part:04d}.parquet' meta --start 0 --end 10")  # fmt: skip
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
        None, ".npy of running row totals, if files before --start are missing", path=ANYWHERE
    )
    embeddings: bool = option(False, "also the features of these files, to img_emb/ in OUT")
    embeddings_source: str | None = option(
        None, "folder or {part:04d} template of the features [beside the metadata]", path=ANYWHERE
    )
    jobs: int = option(4, "files fetched at a time", 1, 256)
    overwrite: bool = option(False, "replace a finished folder")
    dl_dedup_set: str | None = option(None, "flag of snip-dedup: prints where its sets are today")

    def _check(self) -> None:
        check_file_range(self.start, self.end)
        upstream = self.dl_dedup_set is not None
        refuse(
            (self.out is None and not upstream,
             "download needs SOURCE and OUT; see: snip download --help"),
            (self.out is not None and upstream,
             "--dl_dedup_set is upstream's flag: name a mask with --is_dup instead"),
            (self.cumulative_sizes is not None and self.is_dup is None,
             "--cumulative_sizes places a mask: give --is_dup too"),
        )  # fmt: skip


@command("push", "the chain", "downloading.push", "clean hf://datasets/OWNER/NAME")
class Push(Settings):
    """Upload a finished folder, with a card made from its manifest."""

    out: str = argument("folder that snip wrote", path=FOLDER)
    url: str = argument(
        "place in a store, such as hf://datasets/OWNER/NAME or s3://bucket/folder", path=ANYWHERE
    )
    overwrite: bool = option(False, "replace a result that is there")


@command("report", "looking", "inspection.report", "clean --images images")
class Report(Settings):
    """Write a page that shows what is removed, with pictures if given."""

    out: str = argument("folder that snip dedup wrote", path=FOLDER)
    html: str | None = option(None, "the page to write [report.html in OUT]", path=WRITTEN)
    images: str | None = option(
        None, "pictures by key: a folder of files or tars, a tar, or a glob of tars", path=FILE
    )
    image_column: str | None = option(None, "metadata column of picture files (below --images)")
    metadata: str | None = option(None, "table of captions and urls, if it moved", path=ANYWHERE)
    rows: Any = option(
        None, "also show these rows (numbers or keys, by comma), with their kept rows"
    )
    groups: int = option(2000, "groups in the page, the largest first", 1, 100_000)
    seed: int = option(0, "seed of the samples that are shown", 0, MAX_SEED)
    overwrite: bool = option(False, "replace any file, also a page with pictures")


@command("why", "looking", "inspection.why", "clean 000000064")
class Why(Settings):
    """Say why a row is removed or kept, and how alike its group is."""

    out: str = argument("folder that snip dedup wrote", path=FOLDER)
    key: Any = argument(
        "key or row number, several by comma; key:123 is a key, row:123 a row, 123 a row if there "
        "is one"
    )
    features: str | None = option(None, "the searched rows, if they moved", path=ANYWHERE)
    metadata: str | None = option(None, "input table, if it moved", path=ANYWHERE)
    html: str | None = option(None, "also write a page of the group", path=WRITTEN)
    images: str | None = option(None, "pictures by key, as of snip report", path=FILE)
    json: bool = option(False, "print JSON", command_only=True)


@command("threshold", "looking", "inspection.threshold", "img_emb", "suggest_threshold")
class Threshold(Input):
    """Suggest a threshold for features of unknown origin."""

    metadata: str | None = option(None, "table with --same, row for row", path=ANYWHERE)
    same: str | None = option(None, "its column in which rows of one picture have one value")
    html: str | None = option(None, "also write a page with the curves", path=WRITTEN)
    sample: int = option(2000, "rows that are compared with others", 2, 10_000)
    pool: int = option(200_000, "rows that each is compared with, at most", 2, 10**9)
    threads: int = option(0, "CPU threads, 0 for all", 0, 4096)
    seed: int = option(0, "seed of the samples", 0, MAX_SEED)
    json: bool = option(False, "print JSON", command_only=True)


@command("top", "looking", "inspection.top", "clean -n 20")
class Top(Settings):
    """List the rows with the most duplicates."""

    out: str = argument("folder that snip dedup wrote", path=FOLDER)
    n: int = option(100, "rows shown", 1, 10**7)
    metadata: str | None = option(None, "input table, if it moved", path=ANYWHERE)
    json: bool = option(False, "print JSON", command_only=True)
    prompts: str | None = option(None, "also write captions, one a line, as prompts", path=WRITTEN)


@command("diff", "looking", "inspection.diff", "clean stricter")
class Diff(Settings):
    """Compare two runs over the same rows."""

    out1: str = argument("folder that snip dedup wrote", path=FOLDER)
    out2: str = argument("another one, over the same rows", path=FOLDER)
    n: int = option(5, "examples of each kind", 0, 10**6)
    json: bool = option(False, "print JSON", command_only=True)


@command("audit", "trust", "auditing.audit", "clean img_emb")
class Audit(Format):
    """Check a finished run against the raw features."""

    out: str = argument("folder that snip dedup wrote", path=FOLDER)
    features: Any = argument("the features it was made from [those it names]", None)
    metadata: str | None = option(None, "input table, if it moved", path=ANYWHERE)
    sample: int = option(0, "removed rows to check, chosen at random; 0 for all", 0, 2**40)
    probe_rows: int = option(1000, "kept rows to search for missed matches; 0 for none", 0, 10**6)
    sheet: str | None = option(None, "write random removed pairs as CSV, to judge", path=WRITTEN)
    n: int = option(200, "pairs of --sheet", 1, 10**6)
    judged: str | None = option(None, "read a judged sheet, print its precision only", path=FILE)
    max_memory: str | None = option(None, "rows held at a time [a quarter of the RAM]", amount=True)
    threads: int = option(0, "CPU threads, 0 for all", 0, 4096)
    seed: int = option(0, "seed of every random choice", 0, MAX_SEED)

    def _check(self) -> None:
        both = self.sheet is not None and self.judged is not None
        refuse((both, "--sheet writes a sheet, --judged reads one: give one of them"))


@command("search", "looking", "inspection.search", "123 --index index --metadata metadata")
class Search(Format):
    """Find the nearest rows to a row, a vector or a text."""

    query: Any = argument("row number, key, .npy or .npz of vectors, or a text")
    index: str = required("folder that snip index wrote", path=FOLDER)
    k: int = option(10, "neighbours to show", 1, 10**6)
    nprobe: int = option(64, "lists visited", 1, 2**24)
    rerank: int = option(2000, "nearest codes to compare by raw features; 0 for none", 0, 10**6)
    features: Any = option(None, "the indexed rows, if they moved or changed")
    metadata: str | None = option(None, "key, url, caption of the rows, by position", path=ANYWHERE)
    encoder: str | None = option(None, "for vectors and texts, if codes are encoded", path=FOLDER)
    text: bool = option(False, "QUERY is a text, though it looks like a row, a key or a file")
    model: str | None = option(None, "CLIP model for texts: ARCHITECTURE/WEIGHTS or /FILE")
    download: bool = option(False, "fetch the model's weights if they are not cached")
    json: bool = option(False, "print JSON", command_only=True)
    html: str | None = option(None, "also write a page of the neighbours", path=WRITTEN)

    def _check(self) -> None:
        query = self.query if isinstance(self.query, str) and not self.text else ""
        vectors = URL.match(query) and query.endswith((".npy", ".npz"))
        refuse((vectors, "QUERY is a URL of vectors: fetch the file first, or say --text"))


@command("eval", "trust", "evaluation.evaluate", "img_emb --out eval", "evaluate")
class Eval(Input):
    """Measure what descriptors and codes keep, against brute force."""

    out: str = required("folder for table, JSON and picture", path=WRITTEN)
    encoder: str | None = option(None, "encoder to judge [one is trained]", path=FOLDER)
    text_features: Any = option(None, "text features: also judge how texts find their images")
    dim: int = option(128, "width of the descriptors", 2, 4096)
    code_bytes: str = option("4,8,16", "bytes of a code, by comma", 1, 256)
    nprobe: str = option("1,4,8,16", "lists visited, by comma; all lists are added", 1, 2**24)
    nlist: int = option(0, "coarse lists, 0 to choose by the number of rows", 0, 2**24)
    queries: int = option(4096, "rows whose neighbours are found (at most a quarter)", 1, 10**6)
    # The least is evaluate.LEAST_LEARNT.
    train_rows: int = option(65_536, "rows that encoders, PCA and OPQ learn from", 256, 10**8)
    steps: int = option(400, "most training steps of each encoder", 1, 10**7)
    threshold: float | None = option(
        None, "cosine at and above which two rows are duplicates [the model's, else .95]", -1, 1
    )
    flag_nprobe: int = option(4, "lists visited for duplicate flags", 1, 2**24)
    picture: bool = option(True, "draw the curves (extra plot); --nopicture turns it off [on]")
    threads: int = option(0, "CPU threads, 0 for all", 0, 4096)
    seed: int = option(0, "seed of every random choice", 0, MAX_SEED)
    overwrite: bool = option(False, "replace a finished folder")


@command("plan", "trying", "planning", "--rows 2.1e9 --dim 768 --cores 16 --memory 32GB")
class Plan(Format):
    """Estimate time, memory and disk of a run."""

    features: Any = argument("features to plan for, of which a sample is read", None)
    rows: float | None = option(None, "rows, such as 2.1e9 [those of FEATURES]", 1, 1e13)
    dim: int = option(768, "without FEATURES: width of the rows; they are float16", 2, 65536)
    duplicates: float | None = option(None, "share of removed rows [sampled, or .3]", 0, 0.99)
    cores: int = option(0, "cores of the machine; 0: those of this machine", 0, 4096)
    memory: str | None = option(None, "RAM, such as 32GB [that of this machine]", amount=True)
    max_memory: str | None = option(None, "as of snip dedup [a quarter of the RAM]", amount=True)
    nodes: int = option(1, "number of such machines that share a file system", 1, 10**5)
    disk: str | None = option(None, "free space for OUT, such as 4TB", amount=True)
    disk_speed: str | None = option(None, "bytes a second of a disk [all is in RAM]", amount=True)
    probe: bool = option(False, "measure rates now, and write them to the file of --rates")
    rates: str | None = option(None, "file of rates of --probe [measured now]", path=WRITTEN)
    threshold: float | None = option(None, "as of snip dedup [the model's, else .95]", -1, 1)
    recall: float = option(0.999, "as of snip dedup", 0.5, 1)
    seed: int = option(0, "seed of the sample", 0, MAX_SEED)
    json: bool = option(False, "print JSON", command_only=True)

    def _check(self) -> None:
        unknown = self.features is None and self.rows is None
        refuse((unknown, "give FEATURES or --rows: snip plan --rows 2.1e9 --dim 768"))


@command("completion", "trying", "completion", "bash")
class Completion(Settings):
    """Print what makes a shell complete commands and flags."""

    shell: str = argument("shell, such as bash", choices=("bash", "zsh", "fish"))


@command("demo", "trying", "demo", "")
class Demo(Settings):
    """Run all commands on pictures that it draws itself."""

    out: str = option("snip_demo", "folder for everything the demo makes", path=WRITTEN)
    pictures: int = option(800, "pictures to draw before copies are made", 50, 100_000)
    seed: int = option(0, "seed of every random choice", 0, MAX_SEED)
    overwrite: bool = option(False, "replace a finished demo")


COMMANDS = DECLARED  # by name, in the order of the help
# Commands that are functions of the library, by their names there.
BY_FUNCTION = {
    made.function: made for made in COMMANDS.values() if made.options not in (Demo, Completion)
}
# Flags in the help of a command by what they are for; those not named here come last.
FLAG_GROUPS = {
    "dedup": {
        "common flags": "out metadata threshold keep grouping reference method overwrite",
        "which rows go": "decisions recall keep_fraction also text_features text_threshold "
        "references_only bad_rows",
        "which rows of FEATURES": "parts array column",
        "what is written": "key merge_captions caption weights export pairs max_pairs "
        "keep_work dry_run",
        "method adc (--encoder: join, too)": "index encoder rule margin precision calibration_rows "
        "k nprobe",
        "method semdedup": "clusters epsilon borders",
        "time, memory, machines": "threads max_memory chunk_rows device runner num_tasks "
        "task_index seed",
    }
}
