"""The settings of a run, beside those of others: what its result depends on, what a manifest says.

A stopped run goes on where all is the same that its search depends on. A finished run that is
decided again lends its search settings.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from snipdedup.commands import parse_epsilons
from snipdedup.config import Dedup
from snipdedup.deduplication.decisions import FILE
from snipdedup.deduplication.inputs import KIND, Inputs, split_sources
from snipdedup.deduplication.second_features import (
    known_thresholds,
    recorded_seconds,
    saved_also,
)
from snipdedup.errors import SnipError, UsageError
from snipdedup.features.origin import usual_threshold
from snipdedup.features.shards import request_of
from snipdedup.metadata.tables import Metadata
from snipdedup.parallel import cores, memory_bound
from snipdedup.storage import atomic
from snipdedup.storage.out_folder import MANIFEST, is_finished, read_manifest
from snipdedup.storage.remote import absolute_location

GIVEN, FRACTION, DEFAULT = "given", "keep_fraction", "default"  # where a threshold comes from
# How a result is computed and where it goes; the result does not depend on them.
HOW = {
    "out", "overwrite", "chunk_rows", "threads", "max_memory", "device", "features", "metadata",
    "max_pairs", "keep_work", "runner", "num_tasks", "task_index", "dry_run",
}  # fmt: skip
# What is decided and written after the search: a stopped run goes on with others of these.
DECISIONS = {
    "metadata", "grouping", "keep", "keep_fraction", "pairs", "epsilon", "key", "merge_captions",
    "caption", "weights", "export", "decisions",
}  # fmt: skip
# What a re-threshold takes over from the search; a finished run's features come first.
SEARCHED = (
    "features", "parts", "array", "column", "method", "index", "encoder", "bad_rows",
    "recall", "rule", "margin", "precision", "calibration_rows", "k", "nprobe",
    "text_features", "text_threshold", "also", "reference", "references_only", "clusters",
    "borders",
)  # fmt: skip


def finished_run(features: Any) -> Path | None:
    """Return FEATURES where it is a finished OUT, to be decided again."""
    if isinstance(features, str | Path):
        folder = Path(features).expanduser()
        if is_finished(folder):
            manifest = atomic.load_json(folder / MANIFEST)
            if isinstance(manifest, dict) and manifest.get("kind") == KIND:
                return folder
    return None


def fill_settings(options: Dedup) -> tuple[Dedup, str]:
    """Return the settings with their defaults, and where the threshold comes from.

    An index without a method means ``adc``. The threshold is `GIVEN`, decided by `FRACTION`, of a
    model, which is named, or the `DEFAULT`.
    """
    filled, source = options.filled(), GIVEN if options.keep_fraction is None else FRACTION
    if filled.threshold is None:
        usual, model = usual_threshold(filled.features)
        filled = dataclasses.replace(filled, threshold=usual)
        source = source if source == FRACTION else model or DEFAULT
    also = known_thresholds(filled.also) or None
    return dataclasses.replace(filled, also=also, threads=cores(options.threads)), source


def describe_request(options: Dedup, inputs: Inputs, metadata: Metadata | None) -> dict[str, Any]:
    """Return what the result depends on, by name."""
    request = {name: value for name, value in options.as_dict().items() if name not in HOW}
    request["epsilon"] = parse_epsilons(options.epsilon)
    if request["rule"] == "two_sided":
        request["rule"] = "mutual"  # its older name, which finished folders have
    seconds = [second.request() for second in inputs.seconds]
    if options.text_features is not None:  # as they were before there was --also
        request["text_features"] = request_of(inputs.seconds[0].features)
        seconds = seconds[1:]
    request["also"] = seconds or None
    if inputs.references is not None:
        request["reference"] = [item.request() for item in inputs.references.items]
    for name in ("index", "encoder"):  # what they are, not where
        if request[name] is not None:
            manifest = Path(request[name]).expanduser() / MANIFEST
            request[name] = atomic.sha256(manifest) if manifest.is_file() else request[name]
    request["features"] = request["metadata"] = None
    if inputs.features is not None:
        request |= request_of(inputs.features)
    if metadata is not None:
        request["metadata"] = [
            {
                "name": file.path.name,
                "rows": file.rows,
                "size": file.path.stat().st_size,
                "changed": file.path.stat().st_mtime_ns,
            }
            for file in metadata.files
        ]
    return request


def saved_settings(options: Dedup, threshold: float | None) -> dict[str, Any]:
    """Return settings as a manifest holds them: paths absolute, so that a later run finds them."""
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in options.as_dict().items()
    }
    settings |= {
        "threshold": threshold,
        "threads": cores(options.threads),
        "max_memory": memory_bound(options.max_memory),
        "epsilon": parse_epsilons(options.epsilon),
    }
    for name in ("features", "metadata", "index", "encoder", "text_features"):
        value = settings[name]
        settings[name] = absolute_location(value) if isinstance(value, str | Path) else None
    settings["also"] = saved_also(options.also)
    decided = [] if options.decisions is None else split_sources(options.decisions)
    settings["decisions"] = [absolute_location(name) for name in decided] or None
    sources = [] if options.reference is None else split_sources(options.reference)
    are_paths = bool(sources) and all(isinstance(source, str | Path) for source in sources)
    settings["reference"] = [absolute_location(source) for source in sources] if are_paths else None
    return settings


def inherit(options: Dedup, earlier: Path, features: Any = None) -> Dedup:
    """Return settings for a re-threshold: the input and the search of the finished run.

    ``features`` are those that it searched, where its manifest cannot name them.
    """
    manifest = read_manifest(earlier, KIND)
    searched = {"also": None, **manifest["settings"]}
    if features is not None:
        searched["features"] = features
    if options.runner != "local" or options.num_tasks is not None:
        raise UsageError(
            "--runner and --num_tasks share a search, and a finished folder needs none: leave them "
            "out"
        )
    lost = ["references"] if manifest.get("references") and not searched["reference"] else []
    if any(entry["source"] is None for entry in recorded_seconds(manifest)):
        lost.append("second features")
    if searched["features"] is None or lost:
        what = lost[0] if lost else "features"
        raise SnipError(f"{earlier} names no {what}; use Result.at(threshold), or search again")
    refuse_search_flags(options, searched, earlier)
    settings = {name: searched[name] for name in SEARCHED if name in searched}
    for name in ("threshold", "grouping", "keep", "seed", "key"):  # as they were, unless given
        given = getattr(options, name)
        settings[name] = searched[name] if given is None else given
    settings["metadata"] = options.metadata or searched["metadata"]
    if (earlier / FILE).is_file():  # they hold on, unless newer ones say otherwise
        newer = [] if options.decisions is None else split_sources(options.decisions)
        settings["decisions"] = [str(earlier / FILE), *map(str, newer)]
    return Dedup(**{**options.as_dict(), **settings})


def refuse_search_flags(options: Dedup, searched: dict[str, Any], earlier: Path) -> None:
    """Refuse settings of the search that are not those by which the finished run was searched."""
    defaults = {field.name: field.default for field in dataclasses.fields(Dedup)}
    saved = saved_settings(options, options.threshold)  # None for an array
    keep = ["keep"] if searched["method"] == "semdedup" else []
    for name in (*SEARCHED[1:], *keep):
        given, usual = getattr(options, name), (defaults[name], searched.get(name))
        same = given is None or (saved[name] is not None and saved[name] in usual)
        if same or name not in searched:
            continue
        known = searched[name]
        was = f"with {','.join(known) if isinstance(known, list) else known}"
        was = "without it" if known is None else was
        value = f" {given}" if isinstance(given, str | int | float | Path) else ""
        raise UsageError(
            f"--{name}{value} belongs to the search, and {earlier} was searched {was}; search the "
            "features again to change it"
        )
