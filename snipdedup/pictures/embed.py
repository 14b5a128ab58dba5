"""``snip embed``: pictures to features and metadata, shard for shard.

Of each shard, worker processes read, decode and prepare the pictures; this process embeds them in
batches that begin at fixed rows of the shard. So what is written depends on the pictures and the
model only.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import metadata as packages
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from snipdedup import config, progress
from snipdedup.errors import InputError, SnipError
from snipdedup.features.origin import EMBEDDED
from snipdedup.parallel import cores, ordered_map, pick_device
from snipdedup.pictures import decode, video
from snipdedup.pictures.containers import Shard
from snipdedup.pictures.models import Model, open_model
from snipdedup.pictures.reading import Failure, ReadSettings, Row
from snipdedup.pictures.sources import Pictures, find_pictures, locations
from snipdedup.pictures.workers import Workers
from snipdedup.runners import open_runner
from snipdedup.runners.slurm import ShareDone, share_of
from snipdedup.storage import atomic, locks, out_folder
from snipdedup.storage.listing import FEATURES, METADATA
from snipdedup.storage.out_folder import is_finished, read_manifest
from snipdedup.storage.remote import absolute_location
from snipdedup.storage.upload import local_folder, uploading

TEXT_FEATURES, FAILED = "text_emb", "failed.parquet"
TYPES = {
    "key": pa.string(), "path": pa.string(), "tar": pa.string(), "member": pa.string(),
    "parquet": pa.string(), "parquet_row": pa.int64(),
    "video": pa.string(), "second": pa.float64(),
    "width": pa.int32(), "height": pa.int32(), "bytes": pa.int64(), "sha256": pa.string(),
    "exif_time": pa.string(), "camera": pa.string(), "caption": pa.string(), "url": pa.string(),
}  # fmt: skip
PLACES = ("path", "tar", "member", "parquet", "parquet_row", "video", "second")
MEASURED = ("width", "height", "bytes", "sha256", "exif_time", "camera", "caption", "url")
FAILURES = pa.schema([("source", pa.string()), ("key", pa.string()), ("reason", pa.string())])
LIBRARIES = (
    "pillow",
    "pillow-heif",
    "av",
    "onnxruntime",
    "onnxruntime-gpu",
    "open-clip-torch",
    "timm",
)
SHOWN = 6  # reasons, and suffixes


@dataclass(frozen=True)
class Embedded:
    """What ``snip embed`` wrote; `str` of it is the summary."""

    folder: Path
    rows: int  # pictures that were embedded
    failed: dict[str, int]  # of the others: how many, by reason
    dim: int
    summary: str

    def __str__(self) -> str:
        return self.summary


@uploading
@locks.released()
def run(options: config.Embed) -> Embedded | str:
    """Embed all shards that are not there yet; return a line where another process goes on."""
    started, share = time.monotonic(), share_of(options)
    device = pick_device(options.device)
    out = local_folder(options.out)
    decode.require()
    if options.every is not None:
        video.require()
    pictures = find_pictures(
        options.images, options.shard_rows, parts=options.parts, column=options.column,
        videos=options.every is not None,
    )  # fmt: skip
    out_folder.refuse_output_inside(out, pictures.inputs)
    asked = Asked(
        options.model, options.preprocess, options.download, device, options.threads,
        options.max_pixels, options.every,
    )  # fmt: skip
    tasks = EmbedTasks(pictures, asked, out / locks.WORK)
    request = {
        **pictures.request(),
        "model": tasks.model.described,
        "max_pixels": options.max_pixels,
        "every": options.every,
        "shard_rows": options.shard_rows,
        "column": options.column,
    }
    claimed = out_folder.claim(
        out, EMBEDDED, request, overwrite=options.overwrite, shared=share is not None
    )
    if claimed == "done":
        return read_result(out, " is finished already with these settings")
    threads = cores(options.threads)
    try:
        with (
            open_runner(options.runner, threads, device, share=share, out=out) as runner,
            progress.bar(pictures.total, "embedding", "pictures") as tasks.bar,
        ):
            numbers = range(len(pictures.shards))
            for _ in runner.each(tasks.embed, numbers, tasks.done_file, runner.here, last=True):
                pass
            publish(tasks, out, request, options, started)
    except ShareDone as done:
        return str(done)
    except InputError:
        if share is None:
            out_folder.release(out)  # what was made of the files that changed is of no use
        raise
    except (OSError, SnipError):
        if share is not None and is_finished(out):  # while this process slept
            return f"{out} is finished; another process wrote it"
        if share is None:
            out_folder.release_unbegun(out)
        raise
    finally:
        tasks.close()
    return read_result(out, "", time.monotonic() - started)


class Asked(NamedTuple):
    """What tasks need of the settings."""

    model: str
    preprocess: str | None
    download: bool
    device: str
    threads: int
    max_pixels: int
    every: float | None


@dataclass
class EmbedTasks:
    """The shards of a run and the folder that holds what their tasks leave.

    It may be sent to other machines; each opens the model and starts its workers itself.
    """

    pictures: Pictures
    asked: Asked
    work: Path
    bar: Any = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"pictures": self.pictures, "asked": self.asked, "work": self.work, "bar": None}

    @cached_property
    def model(self) -> Model:
        """The model; on a CPU each batch is embedded by one thread, so that bits do not differ."""
        asked = self.asked
        return open_model(
            asked.model, device=asked.device, threads=1, preprocess=asked.preprocess,
            download=asked.download,
        )  # fmt: skip

    @cached_property
    def workers(self) -> Workers:
        """The processes that decode."""
        asked = self.asked
        settings = ReadSettings(self.model.prepare, self.model.size, asked.max_pixels, asked.every)
        return Workers(settings, cores(self.asked.threads))

    def close(self) -> None:
        """End the processes that decode."""
        if "workers" in self.__dict__:
            self.workers.close()

    def done_file(self, number: int) -> Path:
        """Return the done file of a shard, which tells how many rows it has and what failed."""
        return self.work / "done" / f"{number:04d}.json"

    def files(self, number: int) -> dict[str, Path]:
        """Return the files that a shard's task leaves, by their paths below the work."""
        names = [f"{out_folder.FILES}/{name}" for name in outputs(number)]
        names += [f"failed/{number:04d}.parquet"]
        return {name: self.work / name for name in names}

    def embed(self, number: int) -> None:
        """Embed a shard."""
        shard = self.pictures.shards[number]
        done = atomic.read_done(self.done_file(number), self.work)
        if done is None:
            failures: list[Failure] = []
            left_out: Counter[str] = Counter()
            threads = cores(self.asked.threads) if self.asked.device == "cpu" else 1
            with closing(self.workers.results(shard.items(left_out))) as results:
                batches = cut(self.good(results, failures), self.model.batch)
                parts = list(ordered_map(partial(self.encode, shard), batches, threads))
            shard.refuse_changed()
            done = self.write(number, parts, failures, left_out)
        elif self.bar is not None:
            self.bar.update(count_of(done))
        if self.bar is not None:
            self.bar.total += count_of(done) - shard.count()  # of a tar it was an estimate

    def good(self, results: Iterable[Row | Failure], failures: list[Failure]) -> Iterator[Row]:
        """Yield the rows; put the failures aside."""
        for result in results:
            if self.bar is not None:
                self.bar.update(1)
            if isinstance(result, Failure):
                failures.append(result)
            else:
                yield result

    def encode(self, shard: Shard, batch: list[Row]) -> tuple[pa.Table, np.ndarray]:
        """Return the metadata and the features of a batch, (n, dim) float16."""
        made = self.model.encode(np.stack([row.prepared for row in batch]))
        values = [row.values for row in batch]
        return pa.Table.from_pylist(values, schema_of(shard)), made.astype(np.float16)

    def write(
        self,
        number: int,
        parts: list[tuple[pa.Table, np.ndarray]],
        failures: list[Failure],
        left_out: Counter[str],
    ) -> dict[str, Any]:
        """Write the files of a shard, and its done file, whose body is returned."""
        shard, files = self.pictures.shards[number], self.files(number)
        table = pa.concat_tables([schema_of(shard).empty_table(), *(part for part, _ in parts)])
        empty = np.empty((0, self.model.dim), np.float16)
        features = np.concatenate([empty, *(made for _, made in parts)])
        whole = np.isfinite(features).all(1) & (features != 0).any(1)
        for row in table.filter(pa.array(~whole)).to_pylist():
            source = ": ".join(str(row[name]) for name in shard.columns if row[name] is not None)
            failures.append(Failure(source, row["key"], "the model returned no finite feature"))
        table = with_own_columns(shard, table.filter(pa.array(whole)).combine_chunks())
        captions = table["caption"].fill_null("").to_pylist()
        texts = self.embed_texts(captions) if any(captions) else np.empty((len(captions), 0))
        failed = pa.Table.from_pylist([part._asdict() for part in failures], FAILURES)
        for path, value in zip(
            files.values(), (features[whole], table, texts, failed), strict=True
        ):
            if isinstance(value, np.ndarray):
                atomic.save_npy(path, value, lasting=False)
            else:
                atomic.save_parquet(path, value)
        body = {
            "rows": table.num_rows,
            "captions": table.num_rows - table["caption"].null_count,
            "failed": dict(sorted(Counter(kind_of(part.reason) for part in failures).items())),
            "left_out": dict(sorted(left_out.items())),
        }
        atomic.write_done_file(self.done_file(number), files, body)
        return body

    def embed_texts(self, texts: list[str]) -> np.ndarray:
        """Return features of captions, (n, dim) float16; no columns where the model has none."""
        distinct = sorted(set(texts))
        place = {text: number for number, text in enumerate(distinct)}
        parts = []
        for some in cut(distinct, self.model.batch):
            made = self.model.encode_texts(some)
            if made is None:
                return np.empty((len(texts), 0), np.float16)
            parts.append(made.astype(np.float16))
        if not parts:
            return np.empty((0, self.model.dim), np.float16)
        return np.concatenate(parts)[[place[text] for text in texts]]


def outputs(number: int) -> list[str]:
    """Return the files of a shard in OUT: features, metadata, features of captions."""
    names = ((FEATURES, "npy"), (METADATA, "parquet"), (TEXT_FEATURES, "npy"))
    return [f"{folder}/{folder}_{number:04d}.{suffix}" for folder, suffix in names]


def cut(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of ``size`` items; the last may be shorter."""
    rest = iter(items)
    while some := list(islice(rest, size)):
        yield some


def kind_of(reason: str) -> str:
    """Return what a reason begins with, to be counted."""
    return reason.partition(":")[0]


def count_of(done: dict[str, Any]) -> int:
    """Return how many pictures a shard has, by its done file."""
    return int(done["rows"]) + sum(done["failed"].values())


def schema_of(shard: Shard) -> pa.Schema:
    """Return the columns that each picture of a shard has."""
    return pa.schema([(name, TYPES[name]) for name in ("key", *shard.columns, *MEASURED)])


def with_own_columns(shard: Shard, table: pa.Table) -> pa.Table:
    """Add the columns that the source of a shard has itself; of names that are taken, as others.

    Names of places are taken, in any case: others must not pass for where a picture lies.
    """
    own = shard.own(table)
    if own is None:
        return table
    for name, values in zip(own.column_names, own.columns, strict=True):
        if name not in ("key", "caption", "url"):  # which are there already, as texts
            free = f"source_{name}" if name.lower() in PLACES else name
            while free in table.column_names or (free != name and free in own.column_names):
                free = f"source_{free}"
            table = table.append_column(free, values)
    return table


def publish(
    tasks: EmbedTasks, out: Path, request: dict[str, Any], options: config.Embed, started: float
) -> None:
    """Put the result into OUT."""
    shards, made = tasks.pictures.shards, tasks.work / out_folder.FILES
    done = [atomic.load_json(tasks.done_file(number)) for number in range(len(shards))]
    failed, left_out = Counter[str](), Counter(tasks.pictures.left_out)
    for each in done:
        failed.update(each["failed"])
        left_out.update(each.get("left_out", {}))
    tables = [pq.read_table(tasks.work / f"failed/{n:04d}.parquet") for n in range(len(shards))]
    failures = pa.concat_tables(tables)
    rows, count = sum(each["rows"] for each in done), failures.num_rows
    if not rows:
        first = failures.slice(0, 1).to_pylist() or [{"source": "IMAGES", "reason": "no picture"}]
        out_folder.release(out)
        raise SnipError(
            f"none of {count:,} pictures could be embedded; the first, {first[0]['source']}: "
            f"{first[0]['reason']}"
        )
    atomic.save_parquet(made / FAILED, failures)
    with_texts = (
        any(each["captions"] for each in done) and tasks.model.encode_texts([""]) is not None
    )
    names = [FAILED]
    for number, each in enumerate(done):
        names += outputs(number)[: 3 if with_texts else 2]
        if with_texts and not each["captions"]:  # no text of this shard was embedded
            empty = np.repeat(tasks.embed_texts([""]), each["rows"], axis=0)
            atomic.save_npy(made / names[-1], empty, lasting=False)
    model = {"name": tasks.model.name, "dim": tasks.model.dim, "threshold": tasks.model.threshold}
    body = {
        "command": "embed",
        "versions": versions(),
        "settings": {
            **options.as_dict(),
            "images": list(map(absolute_location, locations(options.images))),
        },
        "request": request,
        "model": {**model, **tasks.model.described},
        "shards": [
            {"name": Path(outputs(n)[0]).name, "rows": each["rows"], "source": shards[n].name}
            for n, each in enumerate(done)
        ],
        "counts": {"pictures": rows + count, "embedded": rows, "failed": count},
        "failed": dict(failed.most_common()),
        "left_out": dict(left_out.most_common()),
        "seconds": {"all": round(time.monotonic() - started, 3)},
    }
    out_folder.publish(out, EMBEDDED, body, [made / name for name in names])


def versions() -> dict[str, str]:
    """Return the versions of all libraries that can change a feature and are installed."""
    found = out_folder.versions()
    for name in LIBRARIES:
        with suppress(packages.PackageNotFoundError):
            found[name] = packages.version(name)
    return found


def read_result(out: Path, note: str, seconds: float | None = None) -> Embedded:
    """Return the result of a finished run, from its manifest."""
    manifest = read_manifest(out, EMBEDDED)
    counts, model, failed = manifest["counts"], manifest["model"], manifest["failed"]
    lines = [
        f"{out}{note}: {counts['embedded']:,} of {counts['pictures']:,} pictures embedded by "
        f"{model['name']}, {model['dim']} wide"
    ]
    if seconds is not None:
        lines[0] += f", in {seconds:,.1f} s ({counts['pictures'] / seconds:,.0f} a second)"
    if failed:
        lines += [f"failed: {shown(failed)}; see {out / FAILED}"]
    if manifest["left_out"]:
        kinds = {kind or "no suffix": count for kind, count in manifest["left_out"].items()}
        lines += [f"left out, as no pictures by their names: {shown(kinds)}"]
    lines += [f"next: snip dedup {out} --out clean"]
    return Embedded(out, counts["embedded"], failed, model["dim"], "\n".join(lines))


def shown(counts: dict[str, int]) -> str:
    """Return the first counts, and how many more there are."""
    parts = [f"{count:,} {what}" for what, count in list(counts.items())[:SHOWN]]
    return ", ".join(parts) + (f", {len(counts) - SHOWN} more" if len(counts) > SHOWN else "")
