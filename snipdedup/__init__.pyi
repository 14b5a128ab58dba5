"""Types of the library's functions.

Generated from `snipdedup/config.py` by `python scripts/make_cli_docs.py`; do not edit.
"""

from os import PathLike
from typing import Any, Literal

from snipdedup.auditing.audit import AuditResult as AuditResult
from snipdedup.deduplication.result import Result as Result
from snipdedup.deduplication.run import open_result as open_result
from snipdedup.downloading.push import Pushed as Pushed
from snipdedup.downloading.run import DownloadResult as DownloadResult
from snipdedup.encoder.compress import Descriptors as Descriptors
from snipdedup.encoder.network import Encoder as Encoder
from snipdedup.errors import SnipError as SnipError
from snipdedup.errors import UsageError as UsageError
from snipdedup.evaluation.evaluate import Evaluation as Evaluation
from snipdedup.index.folder import Index as Index
from snipdedup.inspection.diff import DiffResult as DiffResult
from snipdedup.inspection.report import ReportResult as ReportResult
from snipdedup.inspection.search import SearchResult as SearchResult
from snipdedup.inspection.threshold import ThresholdAdvice as ThresholdAdvice
from snipdedup.inspection.top import TopResult as TopResult
from snipdedup.inspection.why import WhyResult as WhyResult
from snipdedup.metadata.filter import FilterResult as FilterResult
from snipdedup.pictures.apply import Applied as Applied
from snipdedup.pictures.embed import Embedded as Embedded
from snipdedup.planning import RunPlan as RunPlan

__version__: str

def apply(
    out: str | PathLike[str] | None = None,
    *,
    move: str | PathLike[str] | None = None,
    link: str | PathLike[str] | None = None,
    undo: str | PathLike[str] | None = None,
    dry_run: bool = False,
    metadata: str | PathLike[str] | None = None,
    threads: int = 0,
) -> Applied:
    """Move the picture files of removed rows, or link those that stay: ``snip apply``.

    Parameters
    ----------
    out
        folder that snip dedup wrote, of pictures that snip embed read from files
    move
        new folder for the files of removed rows
    link
        new folder for links to the files that stay
    undo
        put the files in this folder of --move back
    dry_run
        only say what would be done
    metadata
        input table, if it moved
    threads
        CPU threads that check files, 0 for all (default: 0)

    Raises
    ------
    snipdedup.SnipError
        If it cannot be done: says what was expected, what was found and what to do.
    """

def audit(
    out: str | PathLike[str],
    features: Any = None,
    *,
    parts: str | None = None,
    array: str | None = None,
    column: str | None = None,
    metadata: str | PathLike[str] | None = None,
    sample: int = 0,
    probe_rows: int = 1000,
    sheet: str | PathLike[str] | None = None,
    n: int = 200,
    judged: str | PathLike[str] | None = None,
    max_memory: str | None = None,
    threads: int = 0,
    seed: int = 0,
) -> AuditResult:
    """Check a finished run against the raw features: ``snip audit``.

    Parameters
    ----------
    out
        folder that snip dedup wrote
    features
        the features it was made from (default: those it names)
    parts
        part numbers of a {part:04d} pattern: 0:2, end exclusive
    array
        array of an .npz file
    column
        list column of a parquet file
    metadata
        input table, if it moved
    sample
        removed rows to check, chosen at random; 0 for all (default: 0)
    probe_rows
        kept rows to search for missed matches; 0 for none (default: 1000)
    sheet
        write random removed pairs as CSV, to judge
    n
        pairs of --sheet (default: 200)
    judged
        read a judged sheet, print its precision only
    max_memory
        rows held at a time (default: a quarter of the RAM)
    threads
        CPU threads, 0 for all (default: 0)
    seed
        seed of every random choice (default: 0)

    Raises
    ------
    snipdedup.SnipError
        If it cannot be done: says what was expected, what was found and what to do.
    """

def build_index(
    features: Any,
    *,
    parts: str | None = None,
    array: str | None = None,
    column: str | None = None,
    out: str | PathLike[str],
    encoder: str | PathLike[str] | None = None,
    base: str | PathLike[str] | None = None,
    nlist: int = 0,
    m: int | None = None,
    nbits: int | None = None,
    train_rows: int = 0,
    export_faiss: str | PathLike[str] | None = None,
    model: str | None = None,
    append: bool = False,
    bad_rows: Literal["refuse", "keep"] = "refuse",
    threads: int = 0,
    seed: int = 0,
    overwrite: bool = False,
) -> Index:
    """Build a sharded IVFPQ index: ``snip index``.

    Parameters
    ----------
    features
        folder, glob, file or {part:04d} pattern of features, or a URL
    parts
        part numbers of a {part:04d} pattern: 0:2, end exclusive
    array
        array of an .npz file
    column
        list column of a parquet file
    out
        folder for the index; an unfinished one is continued
    encoder
        encoder to apply first (default: rows as they are)
    base
        index, or faiss file, whose quantisers to use
    nlist
        coarse lists, 0 to choose by the number of rows (default: 0)
    m
        sub-quantisers of the PQ (default: the most that fit, up to 16)
    nbits
        bits of a sub-quantiser (default: 8)
    train_rows
        rows to train on, 0 for 64 a list (at least 65,536) (default: 0)
    export_faiss
        also write a file for plain faiss
    model
        CLIP model, ARCHITECTURE/WEIGHTS, for snip search by text
    append
        add the shards that a finished index does not have yet
    bad_rows
        NaN, infinite and zero rows (default: refuse)
    threads
        CPU threads, 0 for all (default: 0)
    seed
        seed of every random choice (default: 0)
    overwrite
        replace a finished index

    Raises
    ------
    snipdedup.SnipError
        If it cannot be done: says what was expected, what was found and what to do.
    """

def compress(
    features: Any,
    *,
    parts: str | None = None,
    array: str | None = None,
    column: str | None = None,
    encoder: str | PathLike[str],
    out: str | PathLike[str],
    dtype: Literal["float16", "float32"] = "float16",
    device: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int = 0,
    overwrite: bool = False,
) -> Descriptors:
    """Write descriptors, shard for shard: ``snip compress``.

    Parameters
    ----------
    features
        folder, glob, file or {part:04d} pattern of features, or a URL
    parts
        part numbers of a {part:04d} pattern: 0:2, end exclusive
    array
        array of an .npz file
    column
        list column of a parquet file
    encoder
        folder of a trained encoder
    out
        folder for the descriptors, one .npy a shard
    dtype
        type of the descriptors (default: float16)
    device
        where to compute (default: auto)
    threads
        CPU threads, 0 for all (default: 0)
    overwrite
        replace finished descriptors

    Raises
    ------
    snipdedup.SnipError
        If it cannot be done: says what was expected, what was found and what to do.
    """

def dedup(
    features: Any = None,
    *,
    parts: str | None = None,
    array: str | None = None,
    column: str | None = None,
    out: str | PathLike[str] | None = None,
    metadata: str | PathLike[str] | None = None,
    method: Literal["join", "exact", "adc", "semdedup"] | None = None,
    threshold: float | None = None,
    keep_fraction: float | None = None,
    grouping: Literal["star", "components"] | None = None,
    keep: str | None = None,
    also: Any = None,
    text_features: Any = None,
    text_threshold: float = 0.9,
    reference: Any = None,
    references_only: bool = False,
    keep_work: bool = False,
    pairs: bool = False,
    max_pairs: int = 1000000000,
    recall: float = 0.999,
    encoder: str | PathLike[str] | None = None,
    index: str | PathLike[str] | None = None,
    rule: Literal["two_sided", "difference", "ratio", "mutual"] = "two_sided",
    margin: float | None = None,
    precision: float = 0.91,
    calibration_rows: int = 4096,
    k: int = 16,
    nprobe: int = 4,
    clusters: int = 0,
    epsilon: Any = None,
    borders: bool = True,
    decisions: Any = None,
    key: str | None = None,
    merge_captions: int | None = None,
    caption: str | None = None,
    weights: bool = False,
    export: str | None = None,
    bad_rows: Literal["refuse", "keep"] = "refuse",
    chunk_rows: int = 8192,
    max_memory: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    runner: Literal["local", "ray"] = "local",
    num_tasks: int | None = None,
    task_index: int | None = None,
    threads: int = 0,
    seed: int | None = None,
    overwrite: bool = False,
) -> Result:
    """Find duplicates, verify them, write the rows that are kept: ``snip dedup``.

    Parameters
    ----------
    features
        folder, glob, file, {part:04d} pattern or URL; or an OUT, for another threshold
    parts
        part numbers of a {part:04d} pattern: 0:2, end exclusive
    array
        array of an .npz file
    column
        list column of a parquet file
    out
        folder, or URL of a store, for the result; --dry_run needs none
    metadata
        parquet or CSV files, row for row
    method
        how to search (default: join, with --index adc)
    threshold
        cosine at and above which two rows are duplicates (default: the model's, else .95;
        OUT's own)
    keep_fraction
        raise the threshold until this share is kept
    grouping
        star: each removed row matches a kept row; components: one row a group is kept
        (default: star)
    keep
        first, last, random, max:COLUMN, min:COLUMN of the metadata, or several in order,
        such as max:width,max:similarity,first; semdedup: hard, random, easy (default:
        first; semdedup: hard)
    also
        other features of the same images, as FEATURES:THRESHOLD: a pair must match in these
        too; several by comma, or given again; for features of snip embed no threshold is
        needed
    text_features
        features of the captions: a pair must match in these too
    text_threshold
        cosine at and above which two captions match (default: 0.9)
    reference
        rows to compare with, never removed: features, or an earlier OUT; several by comma
    references_only
        compare with --reference only, not with one another
    keep_work
        keep model and codes in OUT/work, for a later --reference OUT
    pairs
        write all pairs inside groups (pairs.parquet, copies.parquet)
    max_pairs
        refuse to write more pairs than this (default: 1000000000)
    recall
        join: share of the duplicate rows to find (default: 0.999)
    encoder
        join, adc: encoder that makes the codes
    index
        adc: finished index (default: built from features)
    rule
        adc: the adaptive rule; mutual: older name of two_sided (default: two_sided)
    margin
        adc: margin of the rule (default: calibrated)
    precision
        adc: precision that the margin is calibrated to (default: 0.91)
    calibration_rows
        adc: rows whose true duplicates set the margin (default: 4096)
    k
        adc: neighbours searched for a row; more if all of them pass (default: 16)
    nprobe
        adc: lists visited for a row (default: 4)
    clusters
        semdedup: clusters of k-means, 0: one for 8,700 rows (default: 0)
    epsilon
        semdedup: remove above cosine 1 - epsilon; the first of several is used (default: 1
        - threshold)
    borders
        semdedup: also count, by join, what its clusters miss; --noborders turns it off
        (default: on)
    decisions
        CSV with a column decision (keep or drop) beside row or key: these rows stay or go
        in any case; several by comma, the last one counts
    key
        column for groups.parquet (default: first of key, uid, ...)
    merge_captions
        add up to so many captions of a row's duplicates
    caption
        metadata column of captions (default: first of caption, text)
    weights
        write all rows, with a column weight; copies add up to 1
    export
        lists by comma: datacomp (kept uids), keys (for webdataset), mask (is_dup.npy)
    bad_rows
        NaN, infinite and zero rows (default: refuse)
    chunk_rows
        rows read at a time (default: 8192)
    max_memory
        limit such as 2GB, without libraries (default: a quarter of the RAM, or more if
        needed)
    device
        join: where products of codes are computed (default: auto)
    runner
        join: this machine, or Ray workers (default: local)
    num_tasks
        join: processes that run this with the same --out (default: those of a Slurm array)
    task_index
        join: rank of this process among them, from 0 (default: that of a Slurm array)
    threads
        CPU threads, 0 for all (default: 0)
    seed
        seed of every random choice (default: 0)
    overwrite
        replace a finished OUT

    Raises
    ------
    snipdedup.SnipError
        If it cannot be done: says what was expected, what was found and what to do.
    """

def diff(
    out1: str | PathLike[str],
    out2: str | PathLike[str],
    *,
    n: int = 5,
) -> DiffResult:
    """Compare two runs over the same rows: ``snip diff``.

    Parameters
    ----------
    out1
        folder that snip dedup wrote
    out2
        another one, over the same rows
    n
        examples of each kind (default: 5)

    Raises
    ------
    snipdedup.SnipError
        If it cannot be done: says what was expected, what was found and what to do.
    """

def download(
    source: str | PathLike[str],
    out: str | PathLike[str] | None = None,
    *,
    start: int | None = None,
    end: int | None = None,
    is_dup: str | PathLike[str] | None = None,
    cumulative_sizes: str | PathLike[str] | None = None,
    embeddings: bool = False,
    embeddings_source: str | PathLike[str] | None = None,
    jobs: int = 4,
    overwrite: bool = False,
    dl_dedup_set: str | None = None,
) -> DownloadResult:
    """Fetch a range of metadata files, filtered by a mask if given: ``snip download``.

    Parameters
    ----------
    source
        hf://datasets/OWNER/NAME[/folder][@revision], a URL or path with {part:04d}, a
        folder or file; datacomp_small, datacomp_1b, relaion2B-en-research-safe; or a folder
        published with its snip.json (encoder, index, OUT)
    out
        folder for the files
    start
        first file number
    end
        file number to stop before
    is_dup
        mask (file or URL): write only the kept rows
    cumulative_sizes
        .npy of running row totals, if files before --start are missing
    embeddings
        also the features of these files, to img_emb/ in OUT
    embeddings_source
        folder or {part:04d} template of the features (default: beside the metadata)
    jobs
        files fetched at a time (default: 4)
    overwrite
        replace a finished folder
    dl_dedup_set
        flag of snip-dedup: prints where its sets are today

    Raises
    ------
    snipdedup.SnipError
        If it cannot be done: says what was expected, what was found and what to do.
    """

def embed(
    images: Any,
    *,
    out: str | PathLike[str],
    model: str = "phash",
    preprocess: str | None = None,
    download: bool = False,
    parts: str | None = None,
    column: str | None = None,
    shard_rows: int = 10000,
    max_pixels: int = 200000000,
    every: float | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    runner: Literal["local", "ray"] = "local",
    num_tasks: int | None = None,
    task_index: int | None = None,
    threads: int = 0,
    overwrite: bool = False,
) -> Embedded | str:
    """Make features and metadata of pictures: ``snip embed``.

    Parameters
    ----------
    images
        folder of pictures (subfolders too), glob, tars, parquet files with picture bytes,
        .txt list of paths; or a URL of one of these; several by comma
    out
        folder, or URL of a store, for img_emb/ and metadata/
    model
        phash, pdq, clip:ARCHITECTURE/WEIGHTS, timm:NAME, timm:NAME/FILE, onnx:FILE,
        torchscript:FILE (default: phash)
    preprocess
        of a learned model: JSON file, or words such as size=224 (default: its own, or JSON
        beside it)
    download
        fetch weights of clip: and timm: that are not on this machine
    parts
        part numbers of a {part:04d} pattern: 0:2, end exclusive
    column
        column of the pictures in parquet files (default: the first)
    shard_rows
        picture files in a shard; a tar is a shard (default: 10000)
    max_pixels
        larger pictures fail (default: 200000000)
    every
        seconds between frames of videos (extra video) (default: videos are left out)
    device
        where the model computes (default: auto)
    runner
        this machine, or Ray workers (default: local)
    num_tasks
        processes that run this with the same --out (default: those of a Slurm array)
    task_index
        rank of this process among them, from 0 (default: that of a Slurm array)
    threads
        CPU threads, and processes that decode; 0 for all (default: 0)
    overwrite
        replace a finished folder

    Raises
    ------
    snipdedup.SnipError
        If it cannot be done: says what was expected, what was found and what to do.
    """

def evaluate(
    features: Any,
    *,
    parts: str | None = None,
    array: str | None = None,
    column: str | None = None,
    out: str | PathLike[str],
    encoder: str | PathLike[str] | None = None,
    text_features: Any = None,
    dim: int = 128,
    code_bytes: str = "4,8,16",
    nprobe: str = "1,4,8,16",
    nlist: int = 0,
    queries: int = 4096,
    train_rows: int = 65536,
    steps: int = 400,
    threshold: float | None = None,
    flag_nprobe: int = 4,
    picture: bool = True,
    threads: int = 0,
    seed: int = 0,
    overwrite: bool = False,
) -> Evaluation:
    """Measure what descriptors and codes keep, against brute force: ``snip eval``.

    Parameters
    ----------
    features
        folder, glob, file or {part:04d} pattern of features, or a URL
    parts
        part numbers of a {part:04d} pattern: 0:2, end exclusive
    array
        array of an .npz file
    column
        list column of a parquet file
    out
        folder for table, JSON and picture
    encoder
        encoder to judge (default: one is trained)
    text_features
        text features: also judge how texts find their images
    dim
        width of the descriptors (default: 128)
    code_bytes
        bytes of a code, by comma (default: 4,8,16)
    nprobe
        lists visited, by comma; all lists are added (default: 1,4,8,16)
    nlist
        coarse lists, 0 to choose by the number of rows (default: 0)
    queries
        rows whose neighbours are found (at most a quarter) (default: 4096)
    train_rows
        rows that encoders, PCA and OPQ learn from (default: 65536)
    steps
        most training steps of each encoder (default: 400)
    threshold
        cosine at and above which two rows are duplicates (default: the model's, else .95)
    flag_nprobe
        lists visited for duplicate flags (default: 4)
    picture
        draw the curves (extra plot); --nopicture turns it off (default: on)
    threads
        CPU threads, 0 for all (default: 0)
    seed
        seed of every random choice (default: 0)
    overwrite
        replace a finished folder

    Raises
    ------
    snipdedup.SnipError
        If it cannot be done: says what was expected, what was found and what to do.
    """

def filter(
    metadata: Any,
    *,
    is_dup: str | PathLike[str],
    out: str | PathLike[str],
    start: int | None = None,
    end: int | None = None,
    cumulative_sizes: str | PathLike[str] | None = None,
    on: str | None = None,
    keys: str | PathLike[str] | None = None,
    unmatched: Literal["keep", "remove"] | None = None,
    ambiguous: Literal["keep", "remove"] | None = None,
    embeddings: str | PathLike[str] | None = None,
    export: str | None = None,
    key: str | None = None,
    overwrite: bool = False,
) -> FilterResult:
    """Apply a mask to metadata and features: ``snip filter``.

    Parameters
    ----------
    metadata
        folder, glob or file of parquet or CSV metadata
    is_dup
        mask: is_dup.npy, or a folder that snip dedup wrote
    out
        folder, or URL of a store, for the kept rows
    start
        first file number, counted from 0 in the whole set
    end
        file number to stop before
    cumulative_sizes
        .npy of running row totals a file
    on
        find rows by columns, not by position: url, uid, key, hash
    keys
        --on: metadata of the mask (default: what OUT names)
    unmatched
        --on: rows that the mask does not know (default: kept, if under half)
    ambiguous
        --on: rows whose key is kept and removed (default: kept, if under half)
    embeddings
        features, row for row: write their kept rows beside metadata/; several by comma
    export
        lists by comma: datacomp (kept uids), keys (for webdataset), mask (of these rows)
    key
        column for --export keys (default: first of key, uid, sample_id, hash)
    overwrite
        replace a finished folder

    Raises
    ------
    snipdedup.SnipError
        If it cannot be done: says what was expected, what was found and what to do.
    """

def plan(
    features: Any = None,
    *,
    parts: str | None = None,
    array: str | None = None,
    column: str | None = None,
    rows: float | None = None,
    dim: int = 768,
    duplicates: float | None = None,
    cores: int = 0,
    memory: str | None = None,
    max_memory: str | None = None,
    nodes: int = 1,
    disk: str | None = None,
    disk_speed: str | None = None,
    probe: bool = False,
    rates: str | PathLike[str] | None = None,
    threshold: float | None = None,
    recall: float = 0.999,
    seed: int = 0,
) -> RunPlan:
    """Estimate time, memory and disk of a run: ``snip plan``.

    Parameters
    ----------
    features
        features to plan for, of which a sample is read
    parts
        part numbers of a {part:04d} pattern: 0:2, end exclusive
    array
        array of an .npz file
    column
        list column of a parquet file
    rows
        rows, such as 2.1e9 (default: those of FEATURES)
    dim
        without FEATURES: width of the rows; they are float16 (default: 768)
    duplicates
        share of removed rows (default: sampled, or .3)
    cores
        cores of the machine; 0: those of this machine (default: 0)
    memory
        RAM, such as 32GB (default: that of this machine)
    max_memory
        as of snip dedup (default: a quarter of the RAM)
    nodes
        number of such machines that share a file system (default: 1)
    disk
        free space for OUT, such as 4TB
    disk_speed
        bytes a second of a disk (default: all is in RAM)
    probe
        measure rates now, and write them to the file of --rates
    rates
        file of rates of --probe (default: measured now)
    threshold
        as of snip dedup (default: the model's, else .95)
    recall
        as of snip dedup (default: 0.999)
    seed
        seed of the sample (default: 0)

    Raises
    ------
    snipdedup.SnipError
        If it cannot be done: says what was expected, what was found and what to do.
    """

def push(
    out: str | PathLike[str],
    url: str | PathLike[str],
    *,
    overwrite: bool = False,
) -> Pushed:
    """Upload a finished folder, with a card made from its manifest: ``snip push``.

    Parameters
    ----------
    out
        folder that snip wrote
    url
        place in a store, such as hf://datasets/OWNER/NAME or s3://bucket/folder
    overwrite
        replace a result that is there

    Raises
    ------
    snipdedup.SnipError
        If it cannot be done: says what was expected, what was found and what to do.
    """

def report(
    out: str | PathLike[str],
    *,
    html: str | PathLike[str] | None = None,
    images: str | PathLike[str] | None = None,
    image_column: str | None = None,
    metadata: str | PathLike[str] | None = None,
    rows: Any = None,
    groups: int = 2000,
    seed: int = 0,
    overwrite: bool = False,
) -> ReportResult:
    """Write a page that shows what is removed, with pictures if given: ``snip report``.

    Parameters
    ----------
    out
        folder that snip dedup wrote
    html
        the page to write (default: report.html in OUT)
    images
        pictures by key: a folder of files or tars, a tar, or a glob of tars
    image_column
        metadata column of picture files (below --images)
    metadata
        table of captions and urls, if it moved
    rows
        also show these rows (numbers or keys, by comma), with their kept rows
    groups
        groups in the page, the largest first (default: 2000)
    seed
        seed of the samples that are shown (default: 0)
    overwrite
        replace any file, also a page with pictures

    Raises
    ------
    snipdedup.SnipError
        If it cannot be done: says what was expected, what was found and what to do.
    """

def search(
    query: Any,
    *,
    parts: str | None = None,
    array: str | None = None,
    column: str | None = None,
    index: str | PathLike[str],
    k: int = 10,
    nprobe: int = 64,
    rerank: int = 2000,
    features: Any = None,
    metadata: str | PathLike[str] | None = None,
    encoder: str | PathLike[str] | None = None,
    text: bool = False,
    model: str | None = None,
    download: bool = False,
    html: str | PathLike[str] | None = None,
) -> SearchResult:
    """Find the nearest rows to a row, a vector or a text: ``snip search``.

    Parameters
    ----------
    query
        row number, key, .npy or .npz of vectors, or a text
    parts
        part numbers of a {part:04d} pattern: 0:2, end exclusive
    array
        array of an .npz file
    column
        list column of a parquet file
    index
        folder that snip index wrote
    k
        neighbours to show (default: 10)
    nprobe
        lists visited (default: 64)
    rerank
        nearest codes to compare by raw features; 0 for none (default: 2000)
    features
        the indexed rows, if they moved or changed
    metadata
        key, url, caption of the rows, by position
    encoder
        for vectors and texts, if codes are encoded
    text
        QUERY is a text, though it looks like a row, a key or a file
    model
        CLIP model for texts: ARCHITECTURE/WEIGHTS or /FILE
    download
        fetch the model's weights if they are not cached
    html
        also write a page of the neighbours

    Raises
    ------
    snipdedup.SnipError
        If it cannot be done: says what was expected, what was found and what to do.
    """

def suggest_threshold(
    features: Any,
    *,
    parts: str | None = None,
    array: str | None = None,
    column: str | None = None,
    metadata: str | PathLike[str] | None = None,
    same: str | None = None,
    html: str | PathLike[str] | None = None,
    sample: int = 2000,
    pool: int = 200000,
    threads: int = 0,
    seed: int = 0,
) -> ThresholdAdvice:
    """Suggest a threshold for features of unknown origin: ``snip threshold``.

    Parameters
    ----------
    features
        folder, glob, file or {part:04d} pattern of features, or a URL
    parts
        part numbers of a {part:04d} pattern: 0:2, end exclusive
    array
        array of an .npz file
    column
        list column of a parquet file
    metadata
        table with --same, row for row
    same
        its column in which rows of one picture have one value
    html
        also write a page with the curves
    sample
        rows that are compared with others (default: 2000)
    pool
        rows that each is compared with, at most (default: 200000)
    threads
        CPU threads, 0 for all (default: 0)
    seed
        seed of the samples (default: 0)

    Raises
    ------
    snipdedup.SnipError
        If it cannot be done: says what was expected, what was found and what to do.
    """

def top(
    out: str | PathLike[str],
    *,
    n: int = 100,
    metadata: str | PathLike[str] | None = None,
    prompts: str | PathLike[str] | None = None,
) -> TopResult:
    """List the rows with the most duplicates: ``snip top``.

    Parameters
    ----------
    out
        folder that snip dedup wrote
    n
        rows shown (default: 100)
    metadata
        input table, if it moved
    prompts
        also write captions, one a line, as prompts

    Raises
    ------
    snipdedup.SnipError
        If it cannot be done: says what was expected, what was found and what to do.
    """

def train(
    features: Any,
    *,
    parts: str | None = None,
    array: str | None = None,
    column: str | None = None,
    out: str | PathLike[str],
    loss: Literal["snip", "mse"] = "snip",
    dim: int = 128,
    hidden: int = 1024,
    steps: int = 1600,
    batch: int = 1024,
    learning_rate: float = 0.001,
    temperature: float | None = None,
    text_features: Any = None,
    text_temperature: float = 0.01,
    subset_rows: int = 262144,
    validation_rows: int = 4096,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    threads: int = 0,
    seed: int = 0,
    overwrite: bool = False,
) -> Encoder:
    """Train the SNIP encoder on features: ``snip train``.

    Parameters
    ----------
    features
        folder, glob, file or {part:04d} pattern of features, or a URL
    parts
        part numbers of a {part:04d} pattern: 0:2, end exclusive
    array
        array of an .npz file
    column
        list column of a parquet file
    out
        folder for the encoder
    loss
        training loss (default: snip)
    dim
        width of the descriptor (default: 128)
    hidden
        width of the hidden layer (default: 1024)
    steps
        most training steps; it stops when validation stalls (default: 1600)
    batch
        rows a step (default: 1024)
    learning_rate
        peak learning rate of AdamW (default: 0.001)
    temperature
        softmax temperature of the snip loss (default: fitted to the features)
    text_features
        text features, row for row: keep their similarities too
    text_temperature
        softmax temperature between texts and images (default: 0.01)
    subset_rows
        rows held in memory at a time (default: 262144)
    validation_rows
        rows held out (at most a fifth of all) (default: 4096)
    device
        where to compute (default: auto)
    threads
        CPU threads, 0 for all (default: 0)
    seed
        seed of every random choice (default: 0)
    overwrite
        replace a finished encoder

    Raises
    ------
    snipdedup.SnipError
        If it cannot be done: says what was expected, what was found and what to do.
    """

def why(
    out: str | PathLike[str],
    key: Any,
    *,
    features: str | PathLike[str] | None = None,
    metadata: str | PathLike[str] | None = None,
    html: str | PathLike[str] | None = None,
    images: str | PathLike[str] | None = None,
) -> WhyResult:
    """Say why a row is removed or kept, and how alike its group is: ``snip why``.

    Parameters
    ----------
    out
        folder that snip dedup wrote
    key
        key or row number, several by comma; key:123 is a key, row:123 a row, 123 a row if
        there is one
    features
        the searched rows, if they moved
    metadata
        input table, if it moved
    html
        also write a page of the group
    images
        pictures by key, as of snip report

    Raises
    ------
    snipdedup.SnipError
        If it cannot be done: says what was expected, what was found and what to do.
    """
