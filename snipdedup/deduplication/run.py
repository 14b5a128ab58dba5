"""``snip dedup``, from its settings to the files of OUT: open, search, decide, check, write.

`dedup` is the library's function and `run` the command; both do the same. With an OUT, it is
claimed before the search, and its manifest is written last.
"""

from __future__ import annotations

import dataclasses
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from snipdedup.commands import keep_rules, parse_epsilons
from snipdedup.config import Dedup, Plan
from snipdedup.deduplication.decisions import Decisions, read_decisions
from snipdedup.deduplication.inputs import (
    KIND,
    Inputs,
    open_inputs,
    open_metadata_of,
    split_sources,
)
from snipdedup.deduplication.methods import check_given, search_pairs
from snipdedup.deduplication.pair_search import PairSearch, load_search, read_search, save_search
from snipdedup.deduplication.read_out import whole_groups
from snipdedup.deduplication.result import Result, check_threshold, checked, choose, choose_fraction
from snipdedup.deduplication.second_features import (
    check_keys,
    recorded_seconds,
    second_sources,
)
from snipdedup.deduplication.settings import (
    DECISIONS,
    describe_request,
    fill_settings,
    finished_run,
    inherit,
    saved_settings,
)
from snipdedup.deduplication.write_out import (
    PAGE,
    MetadataPlan,
    grouping_folder,
    plan_metadata,
    write_files,
    write_pair_files,
)
from snipdedup.errors import DamagedError, InputError, SnipError, UsageError
from snipdedup.features.shards import accept_dates
from snipdedup.groups.keep import ColumnRank, keep_rank, rank_by
from snipdedup.groups.members import Rank, concatenate, no_members
from snipdedup.metadata.additions import ColumnSettings
from snipdedup.metadata.kept_rows import LISTS
from snipdedup.metadata.tables import Metadata, try_column_uses
from snipdedup.parallel import library_threads, pick_device
from snipdedup.progress import Clock
from snipdedup.runners import open_runner
from snipdedup.runners.local import Runner
from snipdedup.runners.slurm import Share, ShareDone, share_of
from snipdedup.storage import atomic, locks, out_folder
from snipdedup.storage.out_folder import as_written, is_finished, read_manifest
from snipdedup.storage.upload import local_folder, uploading


class Job(NamedTuple):
    """One run: its settings, filled, and its inputs, opened and checked; its keep order."""

    options: Dedup
    inputs: Inputs
    metadata: Metadata | None
    rank: Rank
    plan: MetadataPlan | None
    threshold_from: str  # see `settings.fill_settings`
    decisions: Decisions | None


def dedup(features: Any, **settings: Any) -> Result:
    """Find near-duplicates among features: an (n, d) array, a path, or a sequence of either.

    ``settings`` are those of ``snip dedup``; with ``out`` the result is also written there.
    """
    options = Dedup(features=features, **settings)
    if options.out is not None:
        result = execute(options, in_memory=True)
        if isinstance(result, str):
            raise SnipError(result)
        return result
    share_of(options, {})  # refused, since nothing would be shared
    job = prepare(options, writes=False)
    check_given(job.inputs.features, job.options.index, job.options.encoder)
    with (
        tempfile.TemporaryDirectory(prefix="snip-") as work,
        open_runner(options.runner, job.options.threads, options.device) as runner,
    ):
        search = search_pairs(job.inputs, job.options, Path(work), runner, Clock().stage)
        return decide_job(job, search, None)


def run(options: Dedup) -> Result | str:
    """Run ``snip dedup``; return its result, or a line where this process has none."""
    if options.dry_run:
        return plan(options)
    if options.out is None:
        raise UsageError("dedup needs --out; for example: snip dedup img_emb --out clean")
    return execute(options)


def open_result(out: str | Path, features: Any = None) -> Result:
    """Read back a finished OUT: the same result that `dedup` returned.

    Its features are read again. It is a `SnipError` if they are missing or changed, or if the pairs
    of OUT are unverified. An array or a table has no path: without ``features`` the result is that
    of the files of OUT, and only ``at(threshold, "components")`` decides again.
    """
    folder = Path(out).expanduser()
    with as_written(folder):
        manifest = read_manifest(folder, KIND)
        settings = manifest["settings"]
        needs = manifest.get("references"), recorded_seconds(manifest), settings.get("decisions")
        if settings["features"] is None and features is None and not any(needs):
            return read_files(folder, manifest)
        again = Dedup(features=str(folder), threshold=settings["threshold"])
        options = inherit(again, folder, features)
        job = prepare(options, writes=False)
        return read_result(folder, job)


def save_result(result: Result, out: str | Path, *, overwrite: bool = False) -> Result:
    """Write a result as a run with its settings would, without a search; see `Result.save`."""
    if result.options is None:
        raise SnipError(f"{result.out} was read without its features; give them to open_result")
    asked: dict[str, Any] = {"out": str(out), "overwrite": overwrite}
    if result.search.verified and result.search.best is None:
        asked |= {"threshold": result.threshold, "grouping": result.grouping, "keep_fraction": None}
    elif result.threshold != result.options.threshold:
        asked |= {"threshold": result.threshold, "epsilon": None}
    made = execute(dataclasses.replace(result.options, **asked), in_memory=True, made=result)
    if isinstance(made, str):
        raise SnipError(made)
    return made


def plan(options: Dedup) -> str:
    """Return what a run would cost; its inputs are opened and checked as the run would."""
    from snipdedup import planning

    if options.features is None or finished_run(options.features) is not None:
        raise UsageError("--dry_run plans a search of FEATURES")
    job = prepare(options)
    out = None if options.out is None else local_folder(options.out)
    if out is not None:
        out_folder.refuse_output_inside(out, read_paths(job))
    settings = Plan(
        features=options.features, parts=options.parts, array=options.array, column=options.column,
        threshold=job.options.threshold, recall=job.options.recall, seed=job.options.seed or 0,
        cores=options.threads, max_memory=options.max_memory,
        disk=None if out is None else str(planning.free_space(out)),
    )  # fmt: skip
    return str(planning.run(settings))


@uploading
@locks.released()
def execute(options: Dedup, *, in_memory: bool = False, made: Result | None = None) -> Result | str:
    """Claim OUT, search, decide, check and write; return the result.

    A result that was ``made`` with these settings lends its search.

    A result that is not ``in_memory`` has its large arrays in files that no longer have a name. Of
    a run that is finished already, or that another process finishes, a line is returned, or with
    ``in_memory`` the result that is read back.
    """
    clock, out = Clock(), local_folder(str(options.out))
    earlier = finished_run(options.features) if made is None else None
    share = None if earlier or made else share_of(options)
    if earlier is not None:
        with as_written(earlier):
            options = inherit(options, earlier)
    job = prepare(options, inputs=None if made is None else made.search.inputs)
    if made is not None:
        job = job._replace(threshold_from=made.threshold_from)
    out_folder.refuse_output_inside(out, read_paths(job, earlier))
    request = describe_request(job.options, job.inputs, job.metadata)
    request["decisions"] = job.decisions and job.decisions.digest()
    search = known_search(job, earlier, made)
    if job.inputs.features is not None and is_finished(out):
        accept_dates(request, job.inputs.features, read_manifest(out, KIND))
    state = out_folder.claim(
        out,
        KIND,
        request,
        overwrite=options.overwrite,
        shared=share is not None,
        decisions=DECISIONS - ({"keep"} if job.options.method == "semdedup" else set()),
    )
    message = f"{out} is finished already with these settings; --overwrite makes it anew"
    if state != "done":
        try:
            return search_and_write(job, search, out, request, clock, share, in_memory)
        except ShareDone as done:
            message = str(done)
            while in_memory and not is_finished(out):
                time.sleep(1)
        except (OSError, SnipError) as error:
            if share is None and isinstance(error, SnipError):
                out_folder.release_unbegun(out)
            if share is None or not is_finished(out):
                raise
            message = f"{out} is finished; another process wrote it"  # while this one slept
        if not is_finished(out):
            return message
        if not options.keep_work and locks.acquire(out / locks.WORK / locks.LOCK) is None:
            locks.end_work(out)  # of a process that slept while others finished the run
    with as_written(out):
        remove_left_work(out)
        return read_result(out, job) if in_memory else message


def read_result(folder: Path, job: Job) -> Result:
    """Read back a finished run and decide as it did."""
    manifest = read_manifest(folder, KIND)
    threshold, grouping, keep = (manifest["settings"][n] for n in ("threshold", "grouping", "keep"))
    how = threshold, str(grouping), keep, job.rank, None, job.decisions
    result = choose(read_search(folder, job.inputs), *how)
    return dataclasses.replace(checked(result), manifest=manifest, out=folder, options=job.options)


def read_files(folder: Path, manifest: dict[str, Any]) -> Result:
    """Read back a finished run whose features were in memory, and are not given."""
    threshold, grouping, keep = (manifest["settings"][n] for n in ("threshold", "grouping", "keep"))
    search = read_search(folder, Inputs(None))

    def rank(rows: Any) -> Any:
        if keep_rules(keep)[0]:
            raise SnipError(f"keep {keep} needs the metadata: give open_result the features")
        return keep_rank(rows, keep, manifest["settings"]["seed"] or 0)

    groups = concatenate(no_members(), *whole_groups(folder / "groups.parquet"))
    return Result(
        search, groups, threshold, str(grouping), keep, rank, manifest=manifest, out=folder
    )


def prepare(options: Dedup, *, writes: bool = True, inputs: Inputs | None = None) -> Job:
    """Resolve the settings, open the inputs, unless they are open, and check them.

    Metadata must have all columns that a run ``writes``, else those of the keep order alone.
    """
    if options.device != "auto":
        pick_device(options.device)
    options, source = fill_settings(options)
    inputs = inputs or open_inputs(
        options.features,
        parts=options.parts,
        array=options.array,
        column=options.column,
        seconds=second_sources(options),
        reference=options.reference,
    )
    keep = "first" if options.method == "semdedup" else str(options.keep)  # it has its own order
    metadata, plan = None, None
    if writes or keep_rules(keep)[0]:
        metadata = open_metadata_of(
            options.metadata, options.features, inputs.features, options.index
        )
    rank = rank_by(keep, options.seed or 0, metadata)
    if writes:
        columns = ColumnSettings(options.merge_captions, options.caption, options.weights)
        kinds = options.words("export")
        plan = plan_metadata(metadata, rank, options.key, columns, kinds)
    elif metadata is not None and isinstance(rank, ColumnRank):
        try_column_uses(metadata, [rank.use()])
    check_keys(inputs.seconds, options.features, metadata)
    decisions = None
    if options.decisions is not None and inputs.features is not None:
        paths = [Path(name).expanduser() for name in split_sources(options.decisions)]
        decisions = read_decisions(paths, inputs.features.rows, metadata, options.key)
    return Job(options, inputs, metadata, rank, plan, source, decisions)


def read_paths(job: Job, earlier: Path | None = None) -> list[Path]:
    """Return the files and folders that are read, in which OUT must not lie."""
    named = (job.options.index, job.options.encoder)
    folders = [Path(str(name)).expanduser() for name in named if name]
    return [
        *job.inputs.paths(),
        *(job.metadata.inputs() if job.metadata else []),
        *(folder for folder in folders if folder.is_dir()),
        *([earlier] if earlier else []),
    ]


def known_search(job: Job, earlier: Path | None, made: Result | None) -> PairSearch | None:
    """Return what a finished run or a result found, None where it is still to be searched."""
    if made is not None:
        return made.search.at(made.threshold) if made.search.verified else made.search
    if earlier is not None:
        return search_of(earlier, job)
    check_given(job.inputs.features, job.options.index, job.options.encoder)
    return None


def search_of(earlier: Path, job: Job) -> PairSearch:
    """Return what a finished run found, as if it had searched at this threshold."""
    with as_written(earlier):
        search = read_search(earlier, job.inputs)
    if job.options.keep_fraction is not None:  # looks from the searched threshold on
        return search
    check_threshold(search, job.options.cosine)
    return search.at(job.options.cosine)


def search_and_write(
    job: Job,
    search: PairSearch | None,
    out: Path,
    request: dict[str, Any],
    clock: Clock,
    share: Share | None,
    in_memory: bool,
) -> Result:
    """Search, unless it is done already; decide, write, and put the files into OUT.

    Whatever fails while files are written, the search is kept for the next run.
    """
    options, features = job.options, job.inputs.features
    rows = 0 if in_memory or features is None else features.rows  # a caller's process: no forks
    with open_runner(
        options.runner, options.threads, options.device, rows=rows, share=share, out=out
    ) as runner:
        with releasing(out, share):
            search = search or search_or_resume(job, out / locks.WORK, clock, runner)
            job.inputs.refuse_changed()
        for old in (out / locks.WORK).glob("draft-*"):  # of stopped runs
            shutil.rmtree(old, ignore_errors=True)
        draft = out / locks.WORK / f"draft-{secrets.token_hex(4)}"  # laid out as OUT
        with clock.stage("group"):
            result = decide_job(job, search, None if in_memory else grouping_folder(draft))
        if options.pairs:
            with clock.stage("pairs"):
                write_pair_files(result, draft, options.max_pairs, options.threads)
        with clock.stage("write"):
            epsilons = parse_epsilons(options.epsilon) or ()
            described = write_files(result, draft, job.plan, epsilons)
            with releasing(out, share):
                job.inputs.refuse_changed()
            if job.metadata is not None:
                job.metadata.refuse_changed()
        manifest = {
            **described,
            "request": request,
            "command": KIND,
            "settings": saved_settings(options, result.threshold),
            "seconds": {stage: round(spent, 3) for stage, spent in clock.seconds.items()},
        }
        for folder in (out, out / "metadata", out / LISTS):
            atomic.remove_parts(folder)  # of what was killed there
        files = [path for path in draft.rglob("*") if path.is_file()]
        outputs = [path for path in files if draft / locks.WORK not in path.parents]
        stale, keep_work = [PAGE], options.keep_work  # a page shows an earlier result
        out_folder.publish(out, KIND, manifest, outputs, removed=stale, keep_work=keep_work)
    return dataclasses.replace(result, manifest=manifest, out=out)


@contextmanager
def releasing(out: Path, share: Share | None) -> Iterator[None]:
    """If the input is refused in the block, release OUT so that a corrected run can use it.

    What several processes share is left as it is: each of them refuses the input.
    """
    try:
        yield
    except InputError:
        if share is None:
            out_folder.release(out)
        raise
    except DamagedError as error:
        if share is None:
            locks.empty_work(out)  # all of it depends on what is damaged
            raise
        raise DamagedError(
            f"{error}; stop all processes that write {out}, remove {out / locks.WORK}, and start "
            "them again"
        ) from error


def search_or_resume(job: Job, work: Path, clock: Clock, runner: Runner) -> PairSearch:
    """Search, or read back what this run had found when it was stopped."""
    joins = job.options.method == "join"  # its tasks are kept one by one
    search = None if joins else load_search(work, job.inputs)
    if search is None:
        search = search_pairs(job.inputs, job.options, work, runner, clock.stage)
        if not joins:
            save_search(search, work)
    return search


def decide_job(job: Job, search: PairSearch, folder: Path | None) -> Result:
    """Decide which rows are removed and check each; ``folder`` is for what memory cannot hold."""
    options = job.options
    grouping, keep, fraction = str(options.grouping), str(options.keep), options.keep_fraction

    def choose_at(threshold: float) -> Result:
        result = choose(search, threshold, grouping, keep, job.rank, folder, job.decisions)
        return dataclasses.replace(result, threshold_from=job.threshold_from, options=options)

    with library_threads(options.threads, torch_too=False):
        if fraction is None:
            return checked(choose_at(options.cosine))
        result = checked(choose_fraction(search, fraction, choose_at))
    return dataclasses.replace(result, search=search.at(result.threshold))


def remove_left_work(out: Path) -> None:
    """Remove the work of a finished run that was killed while it removed it."""
    kept = read_manifest(out, KIND)["settings"].get("keep_work")
    lock = out / locks.WORK / locks.LOCK  # without it a folder of that name is someone's own
    with suppress(OSError):  # OUT may be read-only by now
        if not kept and lock.is_file() and locks.acquire(lock) is None:
            locks.end_work(out)
