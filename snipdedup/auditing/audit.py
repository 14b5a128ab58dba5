"""Proves OUT: what goes has a match that stays, on the raw features, and the files agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from snipdedup import progress
from snipdedup.auditing.metadata import check_kept
from snipdedup.auditing.proof import Captions, Proof, Run, raw_cosines
from snipdedup.auditing.references import Held, check_references, open_held
from snipdedup.auditing.sheet import precision_text, read_verdicts, refuse_existing, write_sheet
from snipdedup.auditing.verdict import Verdict, pick_ordinals
from snipdedup.config import Audit
from snipdedup.deduplication.out_reader import pick, read_keys, whole_groups
from snipdedup.errors import SnipError, VerdictError
from snipdedup.features.cosine import bad_rows
from snipdedup.features.hashing import checksum_text, shard_checksum
from snipdedup.features.nearest import nearest
from snipdedup.features.shards import Features, open_features
from snipdedup.groups.members import Members, concatenate, no_members
from snipdedup.metadata.files import open_parquet
from snipdedup.metadata.masks import load_mask
from snipdedup.metadata.tables import KEY_COLUMNS
from snipdedup.metadata.texts import CAPTIONS, URLS, RowTexts, open_texts
from snipdedup.parallel import cores, memory_bound, ordered_map
from snipdedup.statistics import proportion_interval
from snipdedup.storage import atomic, out_folder
from snipdedup.storage.manifest import as_written, read_manifest

KIND = "dedup"


def run(options: Audit) -> str:
    """Run ``snip audit`` and return its verdict.

    Raises
    ------
    VerdictError
        If anything is wrong with OUT.
    """
    folder = Path(options.out).expanduser()
    with as_written(folder):
        return judge(folder, options)


def judge(folder: Path, options: Audit) -> str:
    """Return the verdict of a finished OUT, or raise it."""
    manifest = read_manifest(folder, KIND)
    if options.judged is not None:
        return human_precision(folder, Path(options.judged).expanduser())
    sheet = None if options.sheet is None else Path(options.sheet).expanduser()
    features = open_input(options, manifest)
    if sheet is not None:
        refuse_existing(sheet)
        out_folder.refuse_output_file(sheet, [folder, *features.inputs()])
    texts = open_texts(folder, manifest, options.metadata)
    verdict = Verdict()
    readable = audit(folder, manifest, features, texts, options, verdict)
    if sheet is not None and readable:
        pairs = sample_pairs(folder, manifest, features, texts, options)
        write_sheet(sheet, pairs)
        verdict.say("sheet", f"{len(pairs):,} removed pairs to judge in {sheet}; then --judged")
    for source in (features, texts.metadata):
        if source is not None:
            source.refuse_changed()
    if not verdict.passed:
        raise VerdictError(verdict.text(str(folder)))
    return verdict.text(str(folder))


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
    folder: Path,
    manifest: dict[str, Any],
    features: Features,
    texts: RowTexts,
    options: Audit,
    verdict: Verdict,
) -> bool:
    """Check everything; what is wrong is noted in ``verdict``.

    Returns
    -------
    bool
        Whether OUT could be read, and the rows of the features are those of OUT.
    """
    threads, memory = cores(options.threads), memory_bound(options.max_memory)
    if not manifest["verified"]:
        verdict.fail(
            "verified",
            "snip.json says verified false: adc without FEATURES, no pair was proved when this "
            "was made",
        )
    check_outputs(folder, manifest, verdict)
    same_rows = check_shards("shards", manifest["shards"], features, threads, verdict)
    captions = open_captions(manifest, threads, verdict)
    run = open_run(folder, manifest, verdict)
    if run is None:
        return False
    proved = features if same_rows else None
    removed = int(np.count_nonzero(run.is_dup))
    chosen = pick_ordinals(removed, options.sample, options.seed) if options.sample else None
    proof = Proof(run, proved, captions, verdict, chosen=chosen, threads=threads, memory=memory)
    held = open_references(manifest, threads, verdict)
    readable = check_groups(run, proof, verdict)
    if readable:
        if manifest.get("references"):
            check_references(run, held, proof, verdict)
        describe_proof(run, proof, verdict)
        source = texts.metadata if texts.is_dup is None else None
        check_kept(run, proof.dup_counts(), source, verdict)
    if proved is not None and options.probe_rows and "text" not in manifest:
        estimate_missed(run, proved, held, options, threads, verdict)
    return readable and same_rows


def open_captions(manifest: dict[str, Any], threads: int, verdict: Verdict) -> Captions | None:
    """Open the features of captions, where pairs had to match in them too."""
    settings = manifest["settings"]
    if "text" not in manifest:
        return None
    shards, source = manifest["text"]["shards"], settings["text_features"]
    try:
        features = open_features(source, array=settings["array"], column=settings["column"])
    except SnipError as error:
        verdict.fail("captions", f"features of captions cannot be read: {error}")
        return None
    if not check_shards("captions", shards, features, threads, verdict):
        return None
    return Captions(features, settings["text_threshold"])


def open_references(manifest: dict[str, Any], threads: int, verdict: Verdict) -> list[Held]:
    """Open the references that are what they were."""
    held = []
    for described in manifest.get("references", []):
        try:
            reference = open_held(described, manifest["settings"])
        except (SnipError, OSError) as error:
            verdict.fail("references", str(error))
            continue
        shards = described["shards"]
        if check_shards("references", shards, reference.features, threads, verdict):
            held.append(reference)
    return held


def check_outputs(folder: Path, manifest: dict[str, Any], verdict: Verdict) -> None:
    """Compare each file of OUT with the size and SHA-256 in the manifest."""
    outputs = manifest["outputs"]
    agree = 0
    for name, known in progress.track(outputs.items(), "checksums", "files", len(outputs)):
        path = folder / name
        if not path.is_file():
            verdict.fail("outputs", f"{name} is missing")
        elif path.stat().st_size != known["size"] or atomic.sha256(path) != known["sha256"]:
            verdict.fail("outputs", f"{name} is not the file that was written: other SHA-256")
        else:
            agree += 1
    verdict.say("files", f"{agree:,} of {len(outputs):,} agree with their SHA-256")


def check_shards(
    what: str, listed: list[dict[str, Any]], features: Features, threads: int, verdict: Verdict
) -> bool:
    """Compare shards with rows, sizes and checksums in the manifest; tell if rows are the same."""
    found = features.describe()
    if len(listed) != len(found):
        verdict.fail("shards", f"{what}: expected {len(listed):,} files, found {len(found):,}")
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
            verdict.fail("shards", f"{path} is not what was searched: {'; '.join(differing)}")
        else:
            agree += 1
    kept = "size and checksum" if "checksum" in listed[0] else "rows; no checksum was taken"
    verdict.say(what, f"{agree:,} of {len(found):,} agree with their {kept}")
    return same_rows


def open_run(folder: Path, manifest: dict[str, Any], verdict: Verdict) -> Run | None:
    """Open the mask; None if it cannot be one of these rows."""
    offsets = np.cumsum([0, *(shard["rows"] for shard in manifest["shards"])], dtype=np.int64)
    names = [shard["name"] for shard in manifest["shards"]]
    try:
        is_dup = load_mask(folder / "is_dup.npy")
    except (SnipError, OSError) as error:
        verdict.fail("mask", str(error))
        return None
    if len(is_dup) != offsets[-1]:
        verdict.fail("mask", f"is_dup.npy: {len(is_dup):,} rows, expected {offsets[-1]:,}")
        return None
    return Run(folder, manifest, names, offsets, is_dup)


def check_groups(run: Run, proof: Proof, verdict: Verdict) -> bool:
    """Take all groups through the proof; tell if they could be read."""
    path = run.folder / "groups.parquet"
    try:
        with progress.bar(int(np.count_nonzero(run.is_dup)), "proving", "removed rows") as bar:
            for members in whole_groups(path, marked=True):
                proof.add(members)
                bar.update(int(members.is_dup.sum()))
        proof.finish()
        check_places(run, verdict)
    except (SnipError, OSError, KeyError, pa.ArrowException) as error:
        verdict.fail("groups", f"groups.parquet cannot be read: {error}")
        return False
    return True


def check_places(run: Run, verdict: Verdict) -> None:
    """Compare the file and the row in it that groups.parquet gives with its row number."""
    names, columns = pa.array(run.names, pa.string()), ["row", "shard", "shard_row"]
    for batch in open_parquet(run.folder / "groups.parquet").iter_batches(columns=columns):
        row = np.clip(batch.column("row").to_numpy(), 0, run.rows - 1)  # others are named already
        shard = np.searchsorted(run.offsets, row, side="right") - 1
        other = pc.not_equal(names.take(pa.array(shard)), batch.column("shard"))
        wrong = other.to_numpy(zero_copy_only=False)
        wrong |= batch.column("shard_row").to_numpy() != row - run.offsets[shard]
        verdict.fail_each(
            "places", row[wrong], lambda row: f"groups.parquet: {run.place(row)} has another place"
        )


def describe_proof(run: Run, proof: Proof, verdict: Verdict) -> None:
    """Say what was proved, and what is so by design."""
    share = 100 * proof.removed / run.rows
    verdict.say("mask", f"{proof.removed:,} of {run.rows:,} rows go ({share:.2f} %)")
    if proof.features is None:
        verdict.say("matches", "not proved: the features are others")
        return
    of = "removed rows" if proof.chosen is None else "sampled removed rows"
    lowest = f"; the lowest cosine is {proof.lowest:.6f}" if proof.proved else ""
    verdict.say(
        "matches",
        f"{proof.reach:,} of {proof.proved:,} {of} reach {run.threshold:g} with their "
        f"representative{lowest}",
    )
    if proof.chosen is not None and proof.proved:
        _, high = proportion_interval(proof.proved - proof.reach, proof.proved)
        verdict.say("matches", f"so at most {100 * high:.2f} % of all removed rows do not (95 %)")
    if run.by_design == "components":
        verdict.say("by design", "components keep one row a group: rows below the threshold chain")
    if run.by_design == "semdedup":
        verdict.say("by design", "semdedup: a representative may be removed itself")


def estimate_missed(
    run: Run,
    features: Features,
    held: list[Held],
    options: Audit,
    threads: int,
    verdict: Verdict,
) -> None:
    """Estimate how many rows that stay match another that stays, by brute force on a sample.

    Where rows were compared with references only, another is a row of these.
    """
    stay = run.rows - int(np.count_nonzero(run.is_dup))
    ordinals = pick_ordinals(stay, options.probe_rows, options.seed)
    sample = staying(run.is_dup, ordinals)
    raw = features.gather(sample)
    good = ~bad_rows(raw)
    sample, raw = sample[good], raw[good]
    if not run.references_only:
        D, I = nearest(raw, features, 1, threads, own=sample, skip=run.is_dup)
        cosine = D[:, 0]
        missed = np.flatnonzero(cosine >= np.float32(run.threshold))
        verdict.say("missed", missed_text(len(missed), len(sample), len(ordinals) < stay))
        if len(missed):
            worst = missed[np.argmax(cosine[missed])]
            verdict.say(
                "missed",
                f"such as {run.place(int(sample[worst]))} and {run.place(int(I[worst, 0]))}: "
                f"cosine {cosine[worst]:.6f}",
            )
    of = f"{len(sample):,} rows that stay" if run.references_only else "them"
    for reference in held:
        D, _ = nearest(raw, reference.features, 1, threads, skip=reference.gone)
        missed = np.flatnonzero(D[:, 0] >= np.float32(run.threshold))
        verdict.say("missed", f"{len(missed):,} of {of} match a row of {reference.name}")


def missed_text(missed: int, rows: int, sampled: bool) -> str:
    """Say how many rows that stay match another one, of a sample or of all."""
    if not sampled:
        return f"{missed:,} of all {rows:,} rows that stay match another one that stays"
    low, high = proportion_interval(missed, rows)
    return (
        f"{missed:,} of {rows:,} sampled rows that stay match another one that stays: "
        f"{100 * low:.2f} to {100 * high:.2f} % of them (95 %)"
    )


def staying(is_dup: np.ndarray, ordinals: np.ndarray) -> np.ndarray:
    """Return the rows that stay of some numbers among them, both ascending, (n,) int64."""
    rows, before = [np.empty(0, np.int64)], 0
    for start in range(0, len(is_dup), 1 << 24):
        stay = start + np.flatnonzero(~is_dup[start : start + (1 << 24)])
        low, high = np.searchsorted(ordinals, [before, before + len(stay)])
        rows.append(stay[ordinals[low:high] - before])
        before += len(stay)
    return np.concatenate(rows)


def removed_members(folder: Path, numbers: np.ndarray) -> Members:
    """Return rows that go for another of these rows, by their numbers, ascending."""
    parts, before = [], 0
    for members in whole_groups(folder / "groups.parquet", marked=True):
        gone = pick(members, members.is_dup & (members.representative >= 0))
        low, high = np.searchsorted(numbers, [before, before + len(gone.row)])
        parts.append(pick(gone, numbers[low:high] - before))
        before += len(gone.row)
    return concatenate(no_members(), *parts)


def sample_pairs(
    folder: Path, manifest: dict[str, Any], features: Features, texts: RowTexts, options: Audit
) -> list[dict[str, Any]]:
    """Return random removed pairs with what is known of both rows, in random order."""
    counts = manifest["counts"]  # captions of references are not known: only pairs of FEATURES
    own = counts["removed"] - counts.get("removed_for_reference", 0)
    chosen = pick_ordinals(own, options.n, options.seed)
    gone = removed_members(folder, chosen)
    order = np.random.default_rng(options.seed).permutation(len(gone.row))
    a, b = gone.row[order], gone.representative[order]
    memory, threads = memory_bound(options.max_memory), cores(options.threads)
    cosine = raw_cosines(features, a, b, threads=threads, memory=memory)
    rows = np.concatenate([a, b])
    known = {
        "url": texts.read(texts.find(None, URLS), rows),
        "caption": texts.read(texts.find(None, CAPTIONS), rows),
        "key": texts.read(texts.find(None, KEY_COLUMNS), rows),
    }
    known["key"] |= read_keys(folder / "groups.parquet", rows)
    pairs = []
    for x, y, value in zip(a.tolist(), b.tolist(), cosine.tolist(), strict=True):
        pair = {"row": x, "representative": y, "cosine": f"{value:.6f}"}
        for prefix, row in (("", x), ("representative_", y)):
            path, place = features.place(row)
            pair |= {prefix + name: said.get(row, "") for name, said in known.items()}
            pair[prefix + "place"] = f"{path.name} row {place}"
        pairs.append(pair)
    return pairs


def human_precision(folder: Path, path: Path) -> str:
    """Return the precision that a person found in a sheet of this OUT."""
    rows, representatives, verdicts = read_verdicts(path)
    known: dict[int, int] = {}
    for members in whole_groups(folder / "groups.parquet"):
        here = pick(members, members.is_dup & np.isin(members.row, rows))
        known |= zip(here.row.tolist(), here.representative.tolist(), strict=True)
    for row, representative in zip(rows.tolist(), representatives.tolist(), strict=True):
        if known.get(row) != representative:
            raise SnipError(
                f"{path}: row {row:,} is not removed for row {representative:,} in {folder}; the "
                "sheet is of another run"
            )
    return precision_text(verdicts)
