"""The chain: scan, search, verify, group, write.

``dedup`` is the library's function, ``run`` the command. Both do the same; ``run`` adds what paths
need: an OUT folder that is claimed first and whose manifest is written last.
"""

from __future__ import annotations

import dataclasses
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from snipdedup.config import Dedup, keep_rules, parse_epsilons
from snipdedup.deduplication.adc_method import check_given
from snipdedup.deduplication.found import Found
from snipdedup.deduplication.foundfile import load_found_kept, save_found
from snipdedup.deduplication.inputs import Inputs, open_inputs
from snipdedup.deduplication.methods import method_of, search
from snipdedup.deduplication.outputs import (
    EXPORT,
    KIND,
    PAGE,
    check_metadata,
    check_order,
    describe_run,
    grouping_folder,
    prepare_pairs,
    saved_settings,
    side_by_side,
    write_tables,
)
from snipdedup.deduplication.precheck import rehearse_end, rehearse_order
from snipdedup.deduplication.result import (
    Result,
    check_threshold,
    choose,
    decide,
    decide_fraction,
    proved,
)
from snipdedup.deduplication.rethreshold import finished_run, load_found, load_result
from snipdedup.deduplication.summary import summary
from snipdedup.errors import DamagedError, InputError, SnipError, UsageError
from snipdedup.evaluation.plan import plan_features
from snipdedup.features.shards import (
    Features,
    accept_dates,
    implied_metadata,
    request_of,
)
from snipdedup.groups.keep import rank_by
from snipdedup.metadata.tables import Metadata, open_metadata
from snipdedup.parallel import cores, library_threads, pick_device, run_all
from snipdedup.progress import Clock
from snipdedup.runners.base import Runner, open_runner
from snipdedup.runners.slurm import ShareDone, Slurm, share_of
from snipdedup.storage import atomic, locks, out_folder
from snipdedup.storage.manifest import MANIFEST, as_written, is_finished, read_manifest

# Settings that say how a result is computed, not what it is.
HOW = {
    "out", "overwrite", "chunk_rows", "threads", "max_memory", "device", "features", "metadata",
    "max_pairs", "keep_work", "runner", "num_tasks", "task_index", "dry_run",
}  # fmt: skip

# What is decided and written once the search is done: a stopped run goes on with others of these.
DECISIONS = {
    "metadata", "grouping", "keep", "keep_fraction", "pairs", "epsilon", "key", "merge_captions",
    "caption", "weights", "export",
}  # fmt: skip
DRAFT = "draft"  # in the work: OUT before it is whole

SOURCES = {"text": "text_features", "references": "reference"}  # manifest entry: its setting


def dedup(features: Any, **settings: Any) -> Result:
    """Find near-duplicates among features.

    Parameters
    ----------
    features : (n, d) float array, path, or a sequence of either
        As `snipdedup.features.shards.open_features` takes them.
    **settings
        Any setting of ``snip dedup``: ``threshold``, ``method``, ``grouping``, ``keep``, ...
        With ``out`` the result is also written there.

    Returns
    -------
    Result
        ``is_dup`` (n,) bool, ``groups`` and ``forest`` tables, ``at(threshold)``.

    Raises
    ------
    SnipError
        If the input cannot be used; says what was found, where, and what to do.
    """
    options = Dedup(features=features, **settings)
    if options.out is not None:
        return execute(options, load=True)[0]
    share_of(options, {})  # refused, since nothing would be shared
    options = options.filled()
    if options.device != "auto":
        pick_device(options.device)
    inputs = open_inputs(options)
    by_column = options.method != "semdedup" and keep_rules(str(options.keep))[0]
    metadata = open_table(options, inputs.features) if by_column else None
    check_order(options, metadata)  # refused now, not after the search
    rehearse_order(options, metadata)
    with (
        tempfile.TemporaryDirectory(prefix="snip-") as work,
        open_runner(options.runner, cores(options.threads), options.device) as runner,
    ):
        found = search(inputs, options, Path(work), Clock(), runner)
        return decide_by(found, inputs.features, metadata, options)


def run(options: Dedup) -> str:
    """Run ``snip dedup`` and return its summary."""
    if options.dry_run:
        return plan(options)
    if options.out is None:
        raise UsageError("dedup needs --out; for example: snip dedup img_emb --out clean")
    return execute(options)[1]


def plan(options: Dedup) -> str:
    """Return what a run would cost; its inputs are opened and checked as the run would."""
    if options.features is None or finished_run(options.features) is not None:
        raise UsageError("--dry_run plans a search of FEATURES")
    options = options.filled()
    inputs = open_inputs(options)
    features, metadata = inputs.features, open_table(options, inputs.features)
    out = None if options.out is None else Path(str(options.out)).expanduser()
    if out is not None:
        out_folder.refuse_output_inside(out, list_inputs(options, inputs, metadata, None))
    rehearse_end(options, metadata, check_metadata(options, metadata))
    if features is None:
        raise UsageError("--dry_run plans a search of FEATURES")
    return plan_features(
        features,
        out,
        threshold=options.threshold,
        recall=options.recall,
        seed=options.seed or 0,
        threads=options.threads,
        max_memory=options.max_memory,
    )


@locks.released()
def execute(options: Dedup, *, load: bool = False) -> tuple[Any, str]:
    """Claim OUT, search, decide, write; return the result and its summary.

    Of a run that is finished already the result is read back with ``load``, else None.
    """
    clock, out = Clock(), Path(str(options.out)).expanduser()
    if options.device != "auto":
        pick_device(options.device)
    earlier = finished_run(options.features)
    share = None if earlier else share_of(options)
    if earlier is not None:
        with as_written(earlier):
            options = inherit(options, earlier)
    options = options.filled()
    inputs = open_inputs(options)
    features, metadata = inputs.features, open_table(options, inputs.features)
    out_folder.refuse_output_inside(out, list_inputs(options, inputs, metadata, earlier))
    key = check_metadata(options, metadata)  # refused now, not after the search
    rehearse_end(options, metadata, key)
    request = describe_request(options, inputs, metadata)
    if earlier is None and method_of(options) in ("adc", "join"):
        check_given(features, options)
    found = None if earlier is None else reuse(earlier, inputs, options)
    if features is not None and is_finished(out):
        accept_dates(request, features, read_manifest(out, KIND))
    state = out_folder.claim(
        out,
        KIND,
        request,
        overwrite=options.overwrite,
        shared=share is not None,
        decisions=decisions_of(options),
    )
    said = f"{out} is finished already with these settings; --overwrite makes it anew"
    if state != "done":
        try:
            rows = 0 if load or features is None else features.rows  # others' processes stay whole
            with open_runner(
                options.runner, cores(options.threads), options.device, rows=rows, share=share,
                out=out,
            ) as runner:  # fmt: skip
                found = find(inputs, options, out, clock, runner, found)
                return conclude(
                    found, out, draft_folder(out), inputs, metadata, key, request, options, clock,
                    load,
                )  # fmt: skip
        except ShareDone as done:
            said = str(done)
            while load and not is_finished(out):
                time.sleep(1)
        except (OSError, SnipError) as error:
            if share is None and isinstance(error, SnipError):
                out_folder.release_unbegun(out)
            if share is None or not is_finished(out):
                raise
            said = f"{out} is finished; another process wrote it"  # this one slept meanwhile
        if not is_finished(out):
            return None, said
        # a task that a sleeping process had begun leaves its files
        if not options.keep_work and locks.acquire(out / locks.WORK / locks.LOCK) is None:
            locks.end_work(out)
    with as_written(out):
        remove_left(out)
        return load_result(out, inputs, options, metadata) if load else None, said


def remove_left(out: Path) -> None:
    """Remove the work of a finished run that was killed just then, or of its last helpers."""
    kept = read_manifest(out, KIND)["settings"].get("keep_work")
    lock = out / locks.WORK / locks.LOCK  # without it a folder of that name is someone's own
    with suppress(OSError):  # OUT may be read-only by now
        if not kept and lock.is_file() and locks.acquire(lock) is None:
            locks.end_work(out)


def search_once(inputs: Inputs, options: Dedup, work: Path, clock: Clock, runner: Runner) -> Found:
    """Search, or read back what this run had found when it was stopped."""
    if method_of(options) == "join":  # whose tasks leave what they found
        return search(inputs, options, work, clock, runner)
    found = load_found_kept(work, inputs, options)
    if found is None:
        found = search(inputs, options, work, clock, runner)
        save_found(found, work)
    return found


def find(
    inputs: Inputs,
    options: Dedup,
    out: Path,
    clock: Clock,
    runner: Runner,
    reused: Found | None,
) -> Found:
    """Search, unless it is done; give OUT up where the input is refused: a mended one may come.

    One of several processes leaves it as it is for the others, who say the same.
    """
    try:
        found = reused or search_once(inputs, options, out / locks.WORK, clock, runner)
        inputs.refuse_changed()
    except InputError:
        if not isinstance(runner, Slurm):
            out_folder.release(out)
        raise
    except DamagedError as error:
        if isinstance(runner, Slurm):
            work = out / locks.WORK
            raise DamagedError(
                f"{error}; stop all processes that write {out}, remove {work}, and start them again"
            ) from error
        locks.empty_work(out)  # all of it hangs on what is damaged
        raise
    return found


def draft_folder(out: Path) -> Path:
    """Return a new folder to decide and write in; remove those of stopped runs."""
    for path in (out / locks.WORK).glob(f"{DRAFT}-*"):
        shutil.rmtree(path, ignore_errors=True)
    return out / locks.WORK / f"{DRAFT}-{secrets.token_hex(4)}"


def conclude(
    found: Found,
    out: Path,
    draft: Path,
    inputs: Inputs,
    metadata: Metadata | None,
    key: str | None,
    request: dict[str, Any],
    options: Dedup,
    clock: Clock,
    load: bool,
) -> tuple[Result, str]:
    """Decide, write all to ``draft``, and put it into OUT; return the result and its summary.

    ``draft`` is laid out as OUT, with a work folder of its own. Whatever fails, the search stays.
    With ``load`` the result is held in memory, else what is large lies in the draft, which goes at
    the end.
    """
    with clock.stage("group"):
        folder = None if load else grouping_folder(draft)
        result = decide_by(found, inputs.features, metadata, options, folder)
    options = dataclasses.replace(options, threshold=result.threshold)
    if options.pairs:
        with clock.stage("pairs"):
            prepare_pairs(result, draft, options)
    with clock.stage("write"):
        jobs: tuple[Callable[[], Any], ...] = (
            partial(write_tables, result, draft, metadata, key, options),
            partial(describe_run, result, draft, inputs, metadata, options),
        )
        outputs, described = run_all(jobs, side_by_side(result, options))
        refuse_changed(inputs, metadata, out, options)
    body = {
        "request": request,
        "settings": saved_settings(options, method_of(options)),
        **described,
        "seconds": {stage: round(spent, 3) for stage, spent in clock.seconds.items()},
    }
    for folder in (out, out / "metadata", out / EXPORT):
        atomic.remove_parts(folder)  # of what was killed there
    # the page would tell of rows that are no more
    out_folder.publish(out, KIND, body, outputs, removed=[PAGE], keep_work=options.keep_work)
    return result, summary(result, out, body)


def refuse_changed(inputs: Inputs, metadata: Metadata | None, out: Path, options: Dedup) -> None:
    """Refuse inputs that changed while OUT was made of them; with features the search goes."""
    try:
        inputs.refuse_changed()
    except InputError:
        if share_of(options) is None:  # else the others say the same
            out_folder.release(out)
        raise
    if metadata is not None:
        metadata.refuse_changed()


def decide_by(
    found: Found,
    features: Features | None,
    metadata: Metadata | None,
    options: Dedup,
    folder: Path | None = None,
) -> Result:
    """Decide by the settings, which are `Dedup.filled`; ``folder`` is for what is too large."""
    grouping, keep, seed = str(options.grouping), str(options.keep), options.seed or 0
    rank = None if options.method == "semdedup" else rank_by(keep, seed, metadata)
    with library_threads(cores(options.threads)):
        if options.keep_fraction is None:
            return decide(found, features, options.threshold, grouping, keep, seed, rank, folder)

        def decide_at(threshold: float) -> Result:
            return choose(found, features, threshold, grouping, keep, seed, rank, folder)

        result = proved(decide_fraction(found, options.keep_fraction, decide_at))
    return dataclasses.replace(result, found=found.at(result.threshold))


def reuse(earlier: Path, inputs: Inputs, options: Dedup) -> Found:
    """Return what a finished run found, as if it had searched at this threshold."""
    with as_written(earlier):
        found = load_found(earlier, inputs, options)
    if options.keep_fraction is not None:  # looks from the searched threshold on
        return found
    check_threshold(found, options.threshold)
    return found.at(options.threshold)


def list_inputs(
    options: Dedup, inputs: Inputs, metadata: Metadata | None, earlier: Path | None
) -> list[Path]:
    """Return the files and folders that are read, in which OUT must not lie."""
    folders = [Path(str(name)).expanduser() for name in (options.index, options.encoder) if name]
    return [
        *inputs.paths(),
        *(metadata.inputs() if metadata else []),
        *(folder for folder in folders if folder.is_dir()),
        *([earlier] if earlier else []),
    ]


def open_table(options: Dedup, features: Features | None) -> Metadata | None:
    """Open META where there is one, and check that its rows match the features'."""
    spec = options.metadata
    if spec is None and isinstance(options.features, str | Path):
        implied = implied_metadata(options.features)
        spec = None if implied is None else str(implied)
    if spec is None:
        if options.key is not None:
            raise UsageError("--key names a column of the metadata: give --metadata too")
        return None
    metadata = open_metadata(spec)
    if features is not None:
        metadata.check_matches(features)
    else:
        held = read_manifest(Path(str(options.index)).expanduser(), "index")["shards"]
        metadata.check_rows([(shard["name"], shard["rows"]) for shard in held])
    return metadata


def describe_request(options: Dedup, inputs: Inputs, metadata: Metadata | None) -> dict[str, Any]:
    """Return what the result depends on, by name."""
    settings = {k: v for k, v in options.as_dict().items() if k not in HOW}
    settings["epsilon"] = parse_epsilons(options.epsilon)
    if inputs.text is not None:
        settings["text_features"] = request_of(inputs.text)
    if inputs.references is not None:
        settings["reference"] = [item.request() for item in inputs.references.items]
    settings["method"] = method_of(options)
    for name in ("index", "encoder"):  # what they are, not where
        if settings[name] is not None:
            manifest = Path(settings[name]).expanduser() / MANIFEST
            settings[name] = atomic.sha256(manifest) if manifest.is_file() else settings[name]
    described = request_of(inputs.features) if inputs.features else {}
    table = None
    if metadata is not None:
        table = [describe_file(file.path, file.rows) for file in metadata.files]
    return {**settings, "features": None, **described, "metadata": table}


def decisions_of(options: Dedup) -> set[str]:
    """Return the entries of a request on which the search does not depend."""
    return DECISIONS - {"keep"} if options.method == "semdedup" else DECISIONS


def describe_file(path: Path, rows: int) -> dict[str, Any]:
    """Return what tells a metadata file from another."""
    stat = path.stat()
    return {"name": path.name, "rows": rows, "size": stat.st_size, "changed": stat.st_mtime_ns}


def inherit(options: Dedup, earlier: Path) -> Dedup:
    """Return settings for a re-threshold: the input and the search of the finished run."""
    manifest = read_manifest(earlier, KIND)
    searched = manifest["settings"]
    if options.runner != "local" or options.num_tasks is not None:
        raise UsageError(
            "--runner and --num_tasks share a search, and a finished folder needs none: leave them "
            "out"
        )
    gone = [name for name, flag in SOURCES.items() if manifest.get(name) and not searched[flag]]
    if searched["features"] is None or gone:
        what = gone[0] if gone else "features"
        raise SnipError(f"{earlier} names no {what}; use Result.at(threshold), or search again")
    if options.method not in (None, searched["method"]):
        raise UsageError(
            f"{earlier} was searched by {searched['method']}; search again to change it"
        )
    if searched["method"] == "semdedup" and options.keep not in (None, searched["keep"]):
        raise UsageError(f"{earlier} was searched with --keep {searched['keep']}; search again")
    kept = (
        "features", "parts", "array", "column", "method", "index", "encoder", "bad_rows",
        "recall", "rule", "margin", "precision", "calibration_rows", "k", "nprobe",
        "text_features", "text_threshold", "reference", "references_only", "clusters", "borders",
    )  # fmt: skip
    refuse_search_flags(options, searched, kept[1:], earlier)
    metadata = options.metadata or searched["metadata"]
    settings = {name: searched[name] for name in kept if name in searched}
    for name in ("grouping", "keep", "seed", "key"):  # what is not said now stays as it was
        settings[name] = (
            searched[name] if getattr(options, name) is None else getattr(options, name)
        )
    return Dedup(**{**options.as_dict(), **settings, "metadata": metadata})


def refuse_search_flags(
    options: Dedup, searched: dict[str, Any], names: Sequence[str], earlier: Path
) -> None:
    """Refuse settings of the search that are not those by which the finished run was searched."""
    plain = {field.name: field.default for field in dataclasses.fields(Dedup)}
    saved = saved_settings(options, searched["method"])
    for name in names:
        given = getattr(options, name)
        unsaid = given is None or (isinstance(given, str | int | float) and given == plain[name])
        same = saved[name] is not None and saved[name] == searched.get(name)
        if unsaid or same or name not in searched:
            continue
        was = "without it" if searched[name] is None else f"with {searched[name]}"
        value = f" {given}" if isinstance(given, str | int | float | Path) else ""
        raise UsageError(
            f"--{name}{value} belongs to the search, and {earlier} was searched {was}; search the "
            "features again to change it"
        )
