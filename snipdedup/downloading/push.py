"""``snip push``: a finished folder to a store or the hub, with a card made from its manifest."""

from __future__ import annotations

import shlex
import shutil
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snipdedup.commands import is_required
from snipdedup.config import COMMANDS, Push
from snipdedup.errors import SnipError, UsageError
from snipdedup.features.origin import origin_of
from snipdedup.storage import atomic, upload
from snipdedup.storage.out_folder import MANIFEST, is_finished, read_manifest
from snipdedup.storage.web import redacted, scheme_of

COMMAND_OF = {"encoder": "train"}  # kinds of folders whose command has another name
# Settings of the machine, and of what is not part of the result.
LEFT_OUT = {"out", "overwrite", "threads", "max_memory", "chunk_rows", "device", "runner", "jobs",
            "num_tasks", "task_index", "keep_work", "dry_run", "download"}  # fmt: skip
HOW = ("method", "grouping", "keep", "model", "threshold", "loss", "dim", "on", "seed")
MEANING = {
    "is_dup.npy": "one boolean a row of the whole set: True was removed",
    "groups.parquet": "each removed row with the row that it duplicates, and their cosine",
    "forest.parquet": "the pairs that tell the groups at any higher threshold",
    "histogram.parquet": "how many pairs have which cosine",
    "metadata": "the table of the kept rows",
    "img_emb": "the features of the rows",
    MANIFEST: "settings, counts, versions, and the SHA-256 of each file",
}


@dataclass(frozen=True)
class Pushed:
    """What ``snip push`` uploaded: where to, and the card."""

    url: str
    card: str
    text: str  # the summary that the command prints

    def __str__(self) -> str:
        """Return the summary."""
        return self.text


def run(options: Push) -> Pushed:
    """Upload a finished folder; a card that someone wrote is replaced with --overwrite only."""
    folder, url = Path(options.out).expanduser(), options.url.rstrip("/")
    if scheme_of(url) in ("", "http", "https", "file"):
        raise UsageError(
            "push needs the URL of a store, such as hf://datasets/OWNER/NAME or "
            f"s3://bucket/folder, found {redacted(url)}"
        )
    path = folder / MANIFEST
    known = atomic.load_json(path) if is_finished(folder) else {}
    kind = known.get("kind", "dedup") if isinstance(known, dict) else "dedup"
    manifest = read_manifest(folder, str(kind))
    card, shown = card_of(manifest, url.rpartition("/")[2]), redacted(url)
    with upload.place_of(url) as local:
        upload.probe(url)
        written = local.parent / upload.CARD
        written.write_text(card, encoding="utf-8")
        theirs = not options.overwrite and upload.stored(f"{url}/{upload.CARD}") is not None
        new = upload.upload(
            folder, url, overwrite=options.overwrite, card=None if theirs else written
        )
        shutil.rmtree(local.parent, ignore_errors=True)
    count = len(manifest["outputs"]) + 1
    text = f"{folder}: {count:,} files uploaded to {shown}" if new else f"{shown} has it already"
    if new and theirs:
        text += f"; its {upload.CARD} is left as it was"
    return Pushed(shown, card, text)


def card_of(manifest: dict[str, Any], name: str) -> str:
    """Return the card of a folder, in Markdown, with the header that the hub reads."""
    kind, version = manifest["kind"], manifest["versions"].get("snipdedup")
    settings, outputs = manifest.get("settings", {}), manifest["outputs"]
    lines = ["---", "tags:", "- snipdedup", "- deduplication"]
    if any(path.startswith("metadata/") for path in outputs):
        lines += ["configs:", "- config_name: default", "  data_files: metadata/*.parquet"]
    lines += ["---", "", f"# {name}", "", summary(manifest), ""]
    how = {key: value for key in HOW if (value := settings.get(key)) is not None}
    how["model"] = model_of(manifest)
    if kind == "dedup":
        how["checked"] = (
            "each removed row, on the raw features" if manifest.get("verified") else "no"
        )
    rows = [f"| {key} | {escaped(value)} |" for key, value in how.items() if value is not None]
    lines += ["| setting | |", "|---|---|", *rows, ""]
    if isinstance(counts := manifest.get("counts"), dict):
        lines += ["| count | |", "|---|---:|"]
        lines += [f"| {key.replace('_', ' ')} | {value:,} |" for key, value in counts.items()
                  if isinstance(value, int)] + [""]  # fmt: skip
    lines += ["| file | | bytes |", "|---|---|---:|", *file_lines(outputs), ""]
    if (line := command_of(kind, settings)) is not None:
        lines += ["Made by:", "", "```sh", f"pip install snipdedup-toolkit=={version}", line, "```"]
    return "\n".join([*lines, ""])


def summary(manifest: dict[str, Any]) -> str:
    """Say in a sentence what a folder is."""
    counts, version = manifest.get("counts", {}), manifest["versions"].get("snipdedup")
    made = f"Made by snipdedup {version}."
    if manifest["kind"] == "dedup":
        share = counts["removed"] / max(counts["rows"], 1)
        return (
            f"A set of {counts['rows']:,} images without near-duplicates: {counts['removed']:,} "
            f"rows ({100 * share:.2f} %) are removed, {counts['kept']:,} are kept. {made}"
        )
    if manifest["kind"] == "embed":
        return f"Features of {counts['embedded']:,} images by {manifest['model']['name']}. {made}"
    return f"A folder of kind {manifest['kind']}. {made}"


def model_of(manifest: dict[str, Any]) -> str | None:
    """Return the model of the features, where ``snip embed`` made them and they are still here."""
    if isinstance(model := manifest.get("model"), dict):
        return str(model.get("name"))
    with suppress(SnipError):
        origin = origin_of(manifest.get("settings", {}).get("features"))
        return origin.model if origin else None
    return None


def escaped(value: Any) -> str:
    """Return a value as the text of a cell."""
    return str(value).replace("|", "\\|").replace("\n", " ")


def file_lines(outputs: dict[str, Any]) -> list[str]:
    """Return a line for each file and for each folder of files."""
    sizes, counts = Counter[str](), Counter[str]()
    for name, entry in outputs.items():
        top = name.partition("/")[0]
        sizes[top] += entry["size"]
        counts[top] += 1
    shown = {top: f"`{top}`" if top in outputs else f"`{top}/`, {counts[top]:,} files"
             for top in sizes}  # fmt: skip
    lines = [f"| {shown[top]} | {MEANING.get(top, '')} | {sizes[top]:,} |" for top in sizes]
    return [*lines, f"| `{MANIFEST}` | {MEANING[MANIFEST]} | |"]


def command_of(kind: str, settings: dict[str, Any]) -> str | None:
    """Return the command line by the last names of its paths; None of an unknown kind."""
    command = COMMANDS.get(COMMAND_OF.get(kind, kind))
    if command is None or not settings:
        return None
    words = ["snip", command.name]
    for field in (*command.fields(positional=True), *command.fields(positional=False)):
        value = settings.get(field.name)
        unset = value in (None, [], "") or (not is_required(field) and value == field.default)
        if field.name in LEFT_OUT or unset:
            continue
        one = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        if "/" in one and isinstance(value, str | list):
            one = ",".join(part.rstrip("/").rpartition("/")[2] for part in one.split(","))
        if field.metadata.get("positional"):
            words.append(one)
        else:
            words += [f"--{field.name}"] if value is True else [f"--{field.name}", one]
    return shlex.join([*words, "--out", "OUT"])
