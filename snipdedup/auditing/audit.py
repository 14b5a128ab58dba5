"""``snip audit``: files, checksums, each removed row and the metadata of a finished OUT."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from snipdedup import progress
from snipdedup.auditing.removed_rows import (
    AuditedFeatures,
    AuditedReference,
    AuditedRun,
    RemovedRows,
    Violations,
    check_groups,
)
from snipdedup.auditing.sheet import human_precision, sample_pairs, write_sheet
from snipdedup.config import Audit
from snipdedup.deduplication.decisions import FILE as DECISIONS
from snipdedup.deduplication.decisions import read_decisions
from snipdedup.deduplication.inputs import KIND
from snipdedup.deduplication.second_features import (
    also_column,
    recorded_seconds,
)
from snipdedup.errors import SnipError
from snipdedup.features.cosine import bad_rows
from snipdedup.features.hashing import checksum_text, shard_checksum
from snipdedup.features.nearest import nearest
from snipdedup.features.shards import Features, open_features, parts_for, plan_blocks
from snipdedup.metadata.gather import RowTexts, kept_rows, open_row_texts
from snipdedup.metadata.masks import load_mask
from snipdedup.metadata.tables import BATCH_ROWS, Metadata, Table
from snipdedup.parallel import cores, memory_bound, ordered_map
from snipdedup.statistics import proportion_interval, sample_rows
from snipdedup.storage.atomic import sha256
from snipdedup.storage.out_folder import as_written, read_manifest, refuse_output_file


@dataclass(frozen=True)
class AuditResult:
    """The result of ``snip audit``; ``str()`` is what the command prints."""

    folder: Path  # the finished run that was audited
    checked: dict[str, list[str]] = field(default_factory=dict)  # what was compared, by subject
    violations: dict[str, Violations] = field(default_factory=dict)  # what is wrong, by kind
    precision: str = ""  # with ``judged``: what a person found; then nothing else is checked

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.violations

    def __str__(self) -> str:
        if self.precision:
            return self.precision
        total = sum(kind.count for kind in self.violations.values())
        outcome = f"FAILED, {total:,} violation{'s' * (total != 1)}" if total else "passed"
        lines = [f"audit of {self.folder}: {outcome}"]
        for kind in self.violations.values():
            lines += [f"  ! {message}" for message in kind.shown]
            if kind.count > len(kind.shown):
                lines.append(f"  ! and {kind.count - len(kind.shown):,} more like that")
        for subject, texts in self.checked.items():
            heads = [subject, *[""] * (len(texts) - 1)]
            lines += [f"  {head:<9} {text}" for head, text in zip(heads, texts, strict=True)]
        return "\n".join(lines)


def run(options: Audit) -> AuditResult:
    """Run ``snip audit``; the result says whether OUT passed, and what is wrong."""
    folder = Path(options.out).expanduser()
    with as_written(folder):
        manifest = read_manifest(folder, KIND)
        if options.judged is not None:
            precision = human_precision(folder, Path(options.judged).expanduser())
            return AuditResult(folder, precision=precision)
        settings = manifest["settings"]
        source = options.features if options.features is not None else settings["features"]
        if source is None:
            raise SnipError(f"{options.out} names no features: give them after it")
        parts = options.parts or parts_for(source, settings["parts"])
        kind = {name: getattr(options, name) or settings[name] for name in ("array", "column")}
        features = open_features(source, parts=parts, **kind)
        sheet = None if options.sheet is None else Path(options.sheet).expanduser()
        if sheet is not None:
            if sheet.exists():
                raise SnipError(
                    f"{sheet} exists and may hold verdicts; read it with --judged, or choose "
                    "another name for --sheet"
                )
            refuse_output_file(sheet, [folder, *features.inputs()])
        texts = open_row_texts(folder, manifest, options.metadata)
        threads, memory = cores(options.threads), memory_bound(options.max_memory)
        audited = AuditedRun(folder, manifest, threads, memory)
        readable = audit(audited, features, texts, options.sample, options.probe_rows, options.seed)
        if sheet is not None and readable:
            pairs = sample_pairs(audited, features, texts, options.n, options.seed)
            write_sheet(sheet, pairs)
            text = f"{len(pairs):,} removed pairs to judge in {sheet}; then --judged"
            audited.note("sheet", text)
        for source in (features, texts.metadata):
            if source is not None:
                source.refuse_changed()
        return AuditResult(folder, audited.checked, audited.violations)


def audit(
    run: AuditedRun, features: Features, texts: RowTexts, sample: int, probe_rows: int, seed: int
) -> bool:
    """Check everything; what is wrong is added to ``run``.

    Returns whether OUT could be read, and the rows of the features are those of OUT.
    """
    if not run.manifest["verified"]:
        run.fail(
            "verified",
            "snip.json has verified false: adc without FEATURES, no pair was verified by the run",
        )
    check_outputs(run)
    same_rows = check_shards(run, "shards", run.manifest["shards"], features)
    seconds = reopen_seconds(run)
    try:
        run.is_dup = load_mask(run.folder / "is_dup.npy")
        if len(run.is_dup) != run.rows:
            raise SnipError(f"is_dup.npy: {len(run.is_dup):,} rows, expected {run.rows:,}")
        check_decisions(run)
    except (SnipError, OSError) as error:
        run.fail("mask", str(error))
        return False
    compared = features if same_rows else None
    rng, total = np.random.default_rng(seed), int(np.count_nonzero(run.is_dup))
    chosen = sample_rows(total, sample, rng) if sample else None
    references = open_references(run)
    readable = True
    try:
        removed = RemovedRows(run, compared, seconds, references, chosen)
        dup_counts = check_groups(run)
        removed.check()
    except (SnipError, OSError, KeyError, pa.ArrowException) as error:
        run.fail("groups", f"groups.parquet cannot be checked: {error}")
        readable = False
    else:
        describe_removed(run, removed, total)
        check_metadata(run, dup_counts, texts.metadata if texts.is_dup is None else None)
    if compared is not None and probe_rows and not recorded_seconds(run.manifest):
        estimate_missed(run, compared, references, probe_rows, seed)
    return readable and same_rows


def check_decisions(run: AuditedRun) -> None:
    """Compare the mask with what a person decided."""
    path = run.folder / DECISIONS
    if DECISIONS in run.manifest["outputs"]:
        run.decisions = read_decisions([path], run.rows)
        for rows, stays, told in zip(run.decisions, (True, False), ("stay", "go"), strict=True):
            wrong = run.is_dup[rows] == stays
            run.fail_rows("decisions", rows, wrong, f"told to {told} by {DECISIONS}, and does not")
            run.note("decisions", f"{len(rows):,} rows are told to {told}")


def check_outputs(run: AuditedRun) -> None:
    """Compare each file of OUT with the size and SHA-256 in the manifest."""
    agree, outputs = 0, run.manifest["outputs"]
    for name, known in progress.track(outputs.items(), "checksums", "files", len(outputs)):
        path = run.folder / name
        if not path.is_file():
            run.fail("outputs", f"{name} is missing")
        elif path.stat().st_size != known["size"] or sha256(path) != known["sha256"]:
            run.fail("outputs", f"{name} is not the file that was written: other SHA-256")
        else:
            agree += 1
    run.note("files", f"{agree:,} of {len(outputs):,} agree with their SHA-256")


def check_shards(
    run: AuditedRun, what: str, listed: list[dict[str, Any]], features: Features, name: str = ""
) -> bool:
    """Compare shards with rows, sizes and checksums in the manifest; tell if rows are the same."""
    found = features.describe()
    if len(listed) != len(found):
        run.fail("shards", f"{name or what}: expected {len(listed):,} files, found {len(found):,}")
        return False
    same_rows, agree = True, 0
    checksums = ordered_map(shard_checksum, features.shards, run.threads)
    for number, own in enumerate(progress.track(checksums, "checksums", "shards", len(found))):
        known, now = listed[number], {**found[number], "checksum": checksum_text(own)}
        same_rows &= known["rows"] == now["rows"]
        differing = [
            f"{name} {known[name]}, found {now[name]}"
            for name in ("rows", "size", "dtype", "checksum")
            if name in known and known[name] != now[name]
        ]
        if differing:
            path = features.shards[number].path
            run.fail("shards", f"{path} is not what was searched: {'; '.join(differing)}")
        else:
            agree += 1
    known_by = "size and checksum" if "checksum" in listed[0] else "rows; no checksum was taken"
    run.note(what, f"{agree:,} of {len(found):,} agree with their {known_by}")
    return same_rows


def open_again(
    run: AuditedRun, what: str, source: Any, listed: list[dict[str, Any]], name: str = ""
) -> Features | None:
    """Open features that the manifest names; None if they are not what they were.

    Messages call them ``name``, or ``what`` they are.
    """
    settings = run.manifest["settings"]
    try:
        if not source:
            raise SnipError("an array in memory cannot be read again")
        features = open_features(
            source, parts=parts_for(source, settings.get("parts")), array=settings["array"],
            column=settings["column"],
        )  # fmt: skip
    except (SnipError, OSError) as error:
        run.fail(what, f"{name or what} cannot be read: {error}")
        return None
    return features if check_shards(run, what, listed, features, name) else None


def reopen_seconds(run: AuditedRun) -> list[AuditedFeatures]:
    """Open the second features that can be read and are still what they were."""
    found = []
    for number, entry in enumerate(recorded_seconds(run.manifest)):
        features = open_again(run, "also", entry["source"], entry["shards"], entry["name"])
        if features is not None:
            column = also_column(number) if "also" in run.manifest else None
            threshold = float(entry["threshold"])
            found.append(AuditedFeatures(entry["name"], features, threshold, column))
    return found


def open_references(run: AuditedRun) -> list[AuditedReference]:
    """Open the references that can be read and are still what they were."""
    references = []
    for described in run.manifest.get("references", []):
        name, mask = described["name"], described["request"]["mask"]
        path = None if mask is None else Path(described["path"]) / "is_dup.npy"
        if path is not None and (not path.is_file() or sha256(path) != mask):
            run.fail("references", f"reference {name}: {path} was made anew since, or is missing")
            continue
        features = open_again(run, "references", described["files"], described["shards"])
        if features is not None:  # removed rows of an earlier OUT are no reference rows
            is_dup = np.zeros(features.rows, bool) if path is None else load_mask(path)
            references.append(AuditedReference(name, features, is_dup))
    return references


def describe_removed(run: AuditedRun, found: RemovedRows, removed: int) -> None:
    """Note what was compared, and what is so by design."""
    share = 100 * removed / run.rows
    run.note("mask", f"{removed:,} of {run.rows:,} rows are removed ({share:.2f} %)")
    if all(kind.is_second for kind in found.kinds):
        run.note("matches", "not proved: the features are others")
        return
    of = "removed rows" if found.chosen is None else "sampled removed rows"
    first = found.kinds[0]
    lowest = f"; the lowest cosine is {first.lowest:.6f}" if found.compared else ""
    for kind in found.kinds:
        reach = f"{kind.reach:,} of {found.compared:,} {of} reach {kind.threshold:g}"
        if kind.is_second:
            run.note("also", f"{reach} in {kind.name}, too")
        else:
            run.note("matches", f"{reach} with their representative{lowest}")
    if found.chosen is not None and found.compared:
        _, high = proportion_interval(found.compared - first.reach, found.compared)
        run.note("matches", f"so at most {100 * high:.2f} % of all removed rows do not (95 %)")
    if run.components:
        run.note("by design", "components keep one row a group: rows below the threshold chain")
    if run.semdedup:
        run.note("by design", "semdedup: a representative may be removed itself")


def estimate_missed(
    run: AuditedRun, features: Features, references: list[AuditedReference],
    probe_rows: int, seed: int,
) -> None:  # fmt: skip
    """Estimate how many kept rows match another kept row, by brute force on a sample.

    Where rows were compared with references only, they are compared with these only.
    """
    kept = run.rows - int(np.count_nonzero(run.is_dup))
    ordinals = sample_rows(kept, probe_rows, np.random.default_rng(seed))
    sample = kept_rows(run.is_dup, ordinals)
    raw = features.gather(sample)
    good = ~bad_rows(raw)
    sample, raw = sample[good], raw[good]
    limit = np.float32(run.threshold)
    if not run.references_only:
        D, I = nearest(raw, features, 1, run.threads, own=sample, skip=run.is_dup)
        missed = np.flatnonzero(D[:, 0] >= limit)
        text = f"{len(missed):,} of all {len(sample):,} kept rows match another kept row"
        if len(ordinals) < kept:
            low, high = proportion_interval(len(missed), len(sample))
            text = (
                f"{len(missed):,} of {len(sample):,} sampled kept rows match another kept row: "
                f"{100 * low:.2f} to {100 * high:.2f} % of them (95 %)"
            )
        run.note("missed", text)
        if len(missed):
            worst = missed[np.argmax(D[missed, 0])]
            a, b = run.place(int(sample[worst])), run.place(int(I[worst, 0]))
            run.note("missed", f"such as {a} and {b}: cosine {D[worst, 0]:.6f}")
    of = f"{len(sample):,} kept rows" if run.references_only else "them"
    for reference in references:
        D, _ = nearest(raw, reference.features, 1, run.threads, skip=reference.is_dup)
        missed = np.flatnonzero(D[:, 0] >= limit)
        run.note("missed", f"{len(missed):,} of {of} match a row of {reference.name}")


def check_metadata(
    run: AuditedRun, dup_counts: tuple[np.ndarray, np.ndarray], source: Metadata | None
) -> None:
    """Compare the files of OUT/metadata with the mask, and with the input table ``source``.

    ``dup_counts`` are the rows that represent others, ascending, and how many each, (m,) int64. A
    ``source`` that has other files than the input had is refused. Without one, only the number of
    rows and dup_count are compared.
    """
    described = run.manifest["request"].get("metadata")
    if described is None:
        run.note("metadata", "none was given to the run")
        return
    if source is not None and [f.rows for f in source.files] != [f["rows"] for f in described]:
        raise SnipError(
            "the metadata is not in the files that were filtered: expected "
            f"{', '.join(file['name'] for file in described)}"
        )
    rows = begin = 0
    for number, file in enumerate(described):
        end = begin + file["rows"]
        table = None if source is None else source.files[number]
        try:
            written = Table(run.folder / "metadata" / f"{Path(file['name']).stem}.parquet")
            check_file(run, written, expected_rows(run, begin, end, dup_counts, table))
            rows += written.rows
        except SnipError as error:
            run.fail("metadata", str(error))
        begin = end
    compared = "compared with the input"
    if source is None:
        compared = "only their number and dup_count: the input is not where it was"
    run.note("metadata", f"{rows:,} rows in {len(described):,} files, {compared}")


def expected_rows(
    run: AuditedRun, begin: int, end: int, dup_counts: tuple[np.ndarray, np.ndarray],
    source: Table | None,
) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:  # fmt: skip
    """Yield rows that the file of rows ``begin`` to ``end`` should hold, and their columns."""
    all_rows = bool(run.manifest["settings"].get("weights"))  # then removed rows are written too
    parts: Any = ((at, None) for at, _ in plan_blocks(end - begin, BATCH_ROWS))
    for at, batch in parts if source is None else source.batches():
        first = begin + at
        size = min(BATCH_ROWS, end - first) if batch is None else batch.num_rows
        kept = np.full(size, True) if all_rows else ~np.asarray(run.is_dup[first : first + size])
        low, high = np.searchsorted(dup_counts[0], [first, first + size])
        counts = np.zeros(size, np.int64)
        counts[dup_counts[0][low:high] - first] = dup_counts[1][low:high]
        columns = {} if batch is None else dict(zip(batch.schema.names, batch.columns, strict=True))
        columns["dup_count"] = pa.array(counts)
        mask = pa.array(kept)
        yield (
            first + np.flatnonzero(kept),
            {name: values.filter(mask) for name, values in columns.items()},
        )


def check_file(
    run: AuditedRun, written: Table, expected: Iterator[tuple[np.ndarray, dict[str, Any]]]
) -> None:
    """Compare one file with what it should hold; name its first row that is wrong."""
    name, batches = f"metadata/{written.path.name}", (batch for _, batch in written.batches())
    waiting: Any = pa.Table.from_batches([], written.schema)
    wanted, place, wrong = 0, 0, None
    for rows, columns in expected:
        while waiting.num_rows < len(rows) and (batch := next(batches, None)) is not None:
            waiting = pa.concat_tables([waiting, pa.Table.from_batches([batch], written.schema)])
        if wrong is None:
            equal = equal_rows(waiting.slice(0, len(rows)), columns, len(rows))
            if not equal.all():
                at = int(np.argmin(equal))
                wrong, place = run.place(int(rows[at])), wanted + at
        waiting = waiting.slice(len(rows))
        wanted += len(rows)
    if written.rows != wanted:
        late = f"; {wrong} is missing or comes too late" if wrong and written.rows < wanted else ""
        found = f"{name}: {written.rows:,} rows, is_dup.npy keeps {wanted:,} of this file{late}"
        run.fail("metadata", found)
    elif wrong is not None:
        run.fail("metadata", f"{name} row {place:,}: expected {wrong}, found other values")


def equal_rows(found: Any, expected: dict[str, Any], size: int) -> np.ndarray:
    """Return in which of ``size`` rows a table is as expected, (size,) bool; NaN equals NaN."""
    rows = found.num_rows
    equal = np.arange(size) < rows
    for name, wanted in expected.items():
        if name not in found.schema.names:
            raise SnipError(f"metadata: expected a column {name}, found {found.schema.names}")
        x, y = found[name].combine_chunks(), wanted.slice(0, rows)
        if pa.types.is_floating(x.type) and x.type == y.type:  # compared by their bits
            x, y = (values.view(f"int{values.type.bit_width}") for values in (x, y))
        if not x.equals(y):  # repr: NaN inside lists too
            pairs = zip(x.to_pylist(), y.to_pylist(), strict=True)
            equal[:rows] &= np.array([repr(a) == repr(b) for a, b in pairs], bool)
    return equal
