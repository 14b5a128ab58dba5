"""``snip audit``: files, checksums, each removed row and the metadata of a finished OUT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from snipdedup import progress
from snipdedup.auditing.metadata import check_metadata
from snipdedup.auditing.proof import AuditedRun, Captions, Proof, Reference
from snipdedup.auditing.result import AuditResult
from snipdedup.auditing.sheet import (
    human_precision,
    pick_ordinals,
    refuse_existing,
    sample_pairs,
    write_sheet,
)
from snipdedup.config import Audit
from snipdedup.deduplication.inputs import KIND
from snipdedup.deduplication.read_out import whole_groups
from snipdedup.errors import SnipError
from snipdedup.features.cosine import bad_rows
from snipdedup.features.hashing import checksum_text, shard_checksum
from snipdedup.features.nearest import nearest
from snipdedup.features.shards import Features, open_features
from snipdedup.metadata.masks import load_mask
from snipdedup.metadata.tables import stream_parquet
from snipdedup.metadata.texts import RowTexts, open_row_texts
from snipdedup.parallel import cores, memory_bound, ordered_map
from snipdedup.statistics import proportion_interval
from snipdedup.storage.atomic import sha256
from snipdedup.storage.manifest import as_written, read_manifest
from snipdedup.storage.out_folder import refuse_output_file

MASK_ROWS = 1 << 24  # of the mask, looked at together


def run(options: Audit) -> AuditResult:
    """Run ``snip audit``; the result says whether OUT passed, and what is wrong."""
    folder = Path(options.out).expanduser()
    with as_written(folder):
        manifest = read_manifest(folder, KIND)
        if options.judged is not None:
            precision = human_precision(folder, Path(options.judged).expanduser())
            return AuditResult(folder, precision=precision)
        features = open_input(options, manifest)
        sheet = None if options.sheet is None else Path(options.sheet).expanduser()
        if sheet is not None:
            refuse_existing(sheet)
            refuse_output_file(sheet, [folder, *features.inputs()])
        texts = open_row_texts(folder, manifest, options.metadata)
        threads, memory = cores(options.threads), memory_bound(options.max_memory)
        result = AuditResult(folder)
        readable = audit(
            manifest, features, texts, result,
            sample=options.sample, probe_rows=options.probe_rows, seed=options.seed,
            threads=threads, memory=memory,
        )  # fmt: skip
        if sheet is not None and readable:
            pairs = sample_pairs(
                folder, manifest, features, texts,
                n=options.n, seed=options.seed, threads=threads, memory=memory,
            )  # fmt: skip
            write_sheet(sheet, pairs)
            result.note("sheet", f"{len(pairs):,} removed pairs to judge in {sheet}; then --judged")
        for source in (features, texts.metadata):
            if source is not None:
                source.refuse_changed()
        return result


def open_input(options: Audit, manifest: dict[str, Any]) -> Features:
    """Open FEATURES, or those that OUT names."""
    settings = manifest["settings"]
    source = options.features if options.features is not None else settings["features"]
    if source is None:
        raise SnipError(f"{options.out} names no features: give them after it")
    given = {name: getattr(options, name) or settings[name] for name in ("array", "column")}
    pattern = "{part" in str(source)
    return open_features(
        source, parts=options.parts or (settings["parts"] if pattern else None), **given
    )


def audit(
    manifest: dict[str, Any],
    features: Features,
    texts: RowTexts,
    result: AuditResult,
    *,
    sample: int,
    probe_rows: int,
    seed: int,
    threads: int,
    memory: int,
) -> bool:
    """Check everything; what is wrong is added to ``result``.

    Returns
    -------
    bool
        Whether OUT could be read, and the rows of the features are those of OUT.
    """
    if not manifest["verified"]:
        result.fail(
            "verified",
            "snip.json has verified false: adc without FEATURES, no pair was verified by the run",
        )
    check_outputs(manifest["outputs"], result)
    same_rows = check_shards("shards", manifest["shards"], features, threads, result)
    captions = open_captions(manifest, threads, result)
    run = open_run(manifest, result)
    if run is None:
        return False
    proved = features if same_rows else None
    chosen = pick_ordinals(int(np.count_nonzero(run.is_dup)), sample, seed) if sample else None
    proof = Proof(run, proved, captions, result, chosen, threads, memory)
    references = open_references(manifest, threads, result)
    readable = check_groups(run, proof, result)
    if readable:
        if manifest.get("references"):
            proof.check_references(references)
        describe_proof(run, proof, result)
        source = texts.metadata if texts.is_dup is None else None
        check_metadata(run, proof.dup_counts(), source, result)
    if proved is not None and probe_rows and "text" not in manifest:
        estimate_missed(run, proved, references, probe_rows, seed, threads, result)
    return readable and same_rows


def check_outputs(outputs: dict[str, Any], result: AuditResult) -> None:
    """Compare each file of OUT with the size and SHA-256 in the manifest."""
    agree = 0
    for name, known in progress.track(outputs.items(), "checksums", "files", len(outputs)):
        path = result.folder / name
        if not path.is_file():
            result.fail("outputs", f"{name} is missing")
        elif path.stat().st_size != known["size"] or sha256(path) != known["sha256"]:
            result.fail("outputs", f"{name} is not the file that was written: other SHA-256")
        else:
            agree += 1
    result.note("files", f"{agree:,} of {len(outputs):,} agree with their SHA-256")


def check_shards(
    what: str, listed: list[dict[str, Any]], features: Features, threads: int, result: AuditResult
) -> bool:
    """Compare shards with rows, sizes and checksums in the manifest; tell if rows are the same."""
    found = features.describe()
    if len(listed) != len(found):
        result.fail("shards", f"{what}: expected {len(listed):,} files, found {len(found):,}")
        return False
    same_rows = True
    checksums = ordered_map(shard_checksum, features.shards, threads)
    agree = 0
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
            result.fail("shards", f"{path} is not what was searched: {'; '.join(differing)}")
        else:
            agree += 1
    known_by = "size and checksum" if "checksum" in listed[0] else "rows; no checksum was taken"
    result.note(what, f"{agree:,} of {len(found):,} agree with their {known_by}")
    return same_rows


def open_captions(manifest: dict[str, Any], threads: int, result: AuditResult) -> Captions | None:
    """Open the features of captions, where pairs had to match in them too."""
    settings = manifest["settings"]
    if "text" not in manifest:
        return None
    try:
        features = open_features(
            settings["text_features"], array=settings["array"], column=settings["column"]
        )
    except SnipError as error:
        result.fail("captions", f"features of captions cannot be read: {error}")
        return None
    if not check_shards("captions", manifest["text"]["shards"], features, threads, result):
        return None
    return Captions(features, settings["text_threshold"])


def open_references(manifest: dict[str, Any], threads: int, result: AuditResult) -> list[Reference]:
    """Open the references that can be read and are still what they were."""
    settings, references = manifest["settings"], []
    for described in manifest.get("references", []):
        name, mask = described["name"], described["request"]["mask"]
        try:
            if not described["files"]:
                raise SnipError(f"reference {name} was an array, which cannot be read again")
            features = open_features(
                described["files"], array=settings["array"], column=settings["column"]
            )
            is_dup = np.zeros(features.rows, bool)
            if mask is not None:  # an earlier OUT: its removed rows are no reference rows
                path = Path(described["path"]) / "is_dup.npy"
                is_dup = load_mask(path)
                if sha256(path) != mask:
                    raise SnipError(f"reference {name}: {path} was made anew since")
        except (SnipError, OSError) as error:
            result.fail("references", str(error))
            continue
        if check_shards("references", described["shards"], features, threads, result):
            references.append(Reference(name, features, is_dup))
    return references


def open_run(manifest: dict[str, Any], result: AuditResult) -> AuditedRun | None:
    """Open the mask; None if it cannot be one of these rows."""
    offsets = np.cumsum([0, *(shard["rows"] for shard in manifest["shards"])], dtype=np.int64)
    try:
        is_dup = load_mask(result.folder / "is_dup.npy")
    except (SnipError, OSError) as error:
        result.fail("mask", str(error))
        return None
    if len(is_dup) != offsets[-1]:
        result.fail("mask", f"is_dup.npy: {len(is_dup):,} rows, expected {offsets[-1]:,}")
        return None
    names = [shard["name"] for shard in manifest["shards"]]
    return AuditedRun(result.folder, manifest, names, offsets, is_dup)


def check_groups(run: AuditedRun, proof: Proof, result: AuditResult) -> bool:
    """Prove the members of all groups; tell if they could be read."""
    path = run.folder / "groups.parquet"
    try:
        with progress.bar(int(np.count_nonzero(run.is_dup)), "proving", "removed rows") as bar:
            for members in whole_groups(path, marked=True):
                proof.add(members)
                bar.update(int(members.is_dup.sum()))
        proof.finish()
        # the file and the row in it that groups.parquet gives for each row
        names, columns = pa.array(run.names, pa.string()), ["row", "shard", "shard_row"]
        for batch in stream_parquet(path).iter_batches(columns=columns):
            row = np.clip(batch.column("row").to_numpy(), 0, run.rows - 1)  # others: noted above
            shard = np.searchsorted(run.offsets, row, side="right") - 1
            other = pc.not_equal(names.take(pa.array(shard)), batch.column("shard"))
            wrong = other.to_numpy(zero_copy_only=False)
            wrong |= batch.column("shard_row").to_numpy() != row - run.offsets[shard]
            result.fail_each(
                "places", row[wrong], lambda r: f"groups.parquet: {run.place(r)} has another place"
            )
    except (SnipError, OSError, KeyError, pa.ArrowException) as error:
        result.fail("groups", f"groups.parquet cannot be read: {error}")
        return False
    return True


def describe_proof(run: AuditedRun, proof: Proof, result: AuditResult) -> None:
    """Note what was proved, and what is so by design."""
    share = 100 * proof.removed / run.rows
    result.note("mask", f"{proof.removed:,} of {run.rows:,} rows are removed ({share:.2f} %)")
    if proof.features is None:
        result.note("matches", "not proved: the features are others")
        return
    of = "removed rows" if proof.chosen is None else "sampled removed rows"
    lowest = f"; the lowest cosine is {proof.lowest:.6f}" if proof.proved else ""
    result.note(
        "matches",
        f"{proof.reach:,} of {proof.proved:,} {of} reach {run.threshold:g} with their "
        f"representative{lowest}",
    )
    if proof.chosen is not None and proof.proved:
        _, high = proportion_interval(proof.proved - proof.reach, proof.proved)
        result.note("matches", f"so at most {100 * high:.2f} % of all removed rows do not (95 %)")
    if run.by_design == "components":
        result.note("by design", "components keep one row a group: rows below the threshold chain")
    if run.by_design == "semdedup":
        result.note("by design", "semdedup: a representative may be removed itself")


def estimate_missed(
    run: AuditedRun,
    features: Features,
    references: list[Reference],
    probe_rows: int,
    seed: int,
    threads: int,
    result: AuditResult,
) -> None:
    """Estimate how many kept rows match another kept row, by brute force on a sample.

    Where rows were compared with references only, they are compared with these only.
    """
    kept = run.rows - int(np.count_nonzero(run.is_dup))
    ordinals = pick_ordinals(kept, probe_rows, seed)
    sample = kept_rows(run.is_dup, ordinals)
    raw = features.gather(sample)
    good = ~bad_rows(raw)
    sample, raw = sample[good], raw[good]
    limit = np.float32(run.threshold)
    if not run.references_only:
        D, I = nearest(raw, features, 1, threads, own=sample, skip=run.is_dup)
        missed = np.flatnonzero(D[:, 0] >= limit)
        text = f"{len(missed):,} of all {len(sample):,} kept rows match another kept row"
        if len(ordinals) < kept:
            low, high = proportion_interval(len(missed), len(sample))
            text = (
                f"{len(missed):,} of {len(sample):,} sampled kept rows match another kept row: "
                f"{100 * low:.2f} to {100 * high:.2f} % of them (95 %)"
            )
        result.note("missed", text)
        if len(missed):
            worst = missed[np.argmax(D[missed, 0])]
            result.note(
                "missed",
                f"such as {run.place(int(sample[worst]))} and {run.place(int(I[worst, 0]))}: "
                f"cosine {D[worst, 0]:.6f}",
            )
    of = f"{len(sample):,} kept rows" if run.references_only else "them"
    for reference in references:
        D, _ = nearest(raw, reference.features, 1, threads, skip=reference.is_dup)
        missed = np.flatnonzero(D[:, 0] >= limit)
        result.note("missed", f"{len(missed):,} of {of} match a row of {reference.name}")


def kept_rows(is_dup: np.ndarray, ordinals: np.ndarray) -> np.ndarray:
    """Return kept rows by their numbers among all kept rows, both ascending, (n,) int64."""
    rows, before = [np.empty(0, np.int64)], 0
    for start in range(0, len(is_dup), MASK_ROWS):
        kept = start + np.flatnonzero(~is_dup[start : start + MASK_ROWS])
        low, high = np.searchsorted(ordinals, [before, before + len(kept)])
        rows.append(kept[ordinals[low:high] - before])
        before += len(kept)
    return np.concatenate(rows)
