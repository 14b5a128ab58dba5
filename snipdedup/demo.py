"""The whole chain on pictures that the demo draws itself, with copies it plants among them.

Everything after the drawing goes through the public commands, printed before they run. Since the
demo knows what it planted, it can say what was found, what was missed and what was removed wrongly.
"""

from __future__ import annotations

import importlib.util
import io
import shlex
import shutil
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from snipdedup import cli, demo_pictures, progress
from snipdedup.config import Demo
from snipdedup.errors import SnipError
from snipdedup.storage import atomic, locks, out_folder
from snipdedup.storage.out_folder import MANIFEST, read_manifest, write_manifest

KIND = "demo"
SHARD_ROWS = 800
COPIES = 5  # one picture in so many is copied, by each edit
SHEET = 8  # pictures shown with their copies
PARTS = ("img_emb", "metadata", "images", "encoder", "descriptors", "index", "clean", "adc", "kept")


@dataclass(frozen=True)
class Planted:
    """What the demo drew: ``rows`` pictures and copies of them, in random order.

    Attributes
    ----------
    features : (rows, d) float16
    picture : (rows,) int64
        Which picture a row shows.
    edit : (rows,) str
        How the row's copy was made; empty for the picture itself.
    pixels : (rows, h, w, 3) uint8
    sheet : (h, w, 3) float32
        Some pictures beside their copies.
    """

    features: np.ndarray
    picture: np.ndarray
    edit: np.ndarray
    pixels: np.ndarray
    sheet: np.ndarray

    @property
    def originals(self) -> np.ndarray:
        """Rows that are no copies, by picture: (pictures,) int64."""
        rows = np.flatnonzero(self.edit == "")
        return rows[np.argsort(self.picture[rows])]


@locks.released()
def run(options: Demo) -> str:
    """Run ``snip demo`` and return what it found."""
    out = Path(options.out).expanduser()
    request = {"pictures": options.pictures, "seed": options.seed}
    if out_folder.claim(out, KIND, request, overwrite=options.overwrite) == "done":
        report = read_manifest(out, KIND)["report"]
        return f"{report}\n\n{out} is finished already; --overwrite makes it anew"
    if options.overwrite:
        (out / MANIFEST).unlink(missing_ok=True)
        for name in PARTS:
            shutil.rmtree(out / name, ignore_errors=True)
    say(f"drawing {options.pictures:,} pictures and their copies")
    planted = plant(options.pictures, options.seed)
    write(planted, out)
    say(
        f"{len(planted.picture):,} rows of {planted.features.shape[1]} numbers in {out / 'img_emb'}"
    )
    say(f"some pictures (left) beside their copies: {out / 'pictures.png'}")
    alike = most_alike(planted.features[planted.originals])
    threshold = round((1 + alike) / 2, 2)
    say(
        f"the two most alike pictures that are no copies have cosine {alike:.2f}; halfway to 1, "
        f"{threshold:.2f}, is the threshold.\nEach kind of feature needs its own: .95 is for CLIP"
    )
    for words in commands(out, threshold, options.seed):
        command(words)
    report = describe(planted, out)
    files = [path for path in out.rglob("*") if path.is_file() and locks.WORK not in path.parts]
    body = {"request": request, "threshold": threshold, "report": report}
    write_manifest(out, KIND, body, files)
    locks.end_work(out)
    return report


def say(text: str) -> None:
    """Print at once, also into a file or a pipe."""
    print(text, flush=True)


def commands(out: Path, threshold: float, seed: int) -> list[list[str]]:
    """Return the command lines of the chain, without the first word ``snip``.

    Training is cut short: a few thousand rows teach little more than PCA, where it starts.
    """
    features, metadata = str(out / "img_emb"), str(out / "metadata")
    encoder, index, clean = str(out / "encoder"), str(out / "index"), str(out / "clean")
    short = "--dim 64 --hidden 256 --batch 512 --steps 40 --learning_rate 2e-4"
    limit, same = ["--threshold", f"{threshold:g}"], ["--seed", str(seed)]
    return [
        ["train", features, "--out", encoder, *short.split(), *same],
        ["compress", features, "--encoder", encoder, "--out", str(out / "descriptors")],
        ["index", features, "--encoder", encoder, "--out", index, *same],
        ["dedup", features, "--metadata", metadata, "--out", clean, *limit, *same],
        ["dedup", features, "--index", index, "--out", str(out / "adc"), *limit, *same],
        ["filter", metadata, "--is_dup", clean, "--out", str(out / "kept")],
        *([["report", clean, "--images", str(out / "images")]] if can_report() else []),
    ]


def can_report() -> bool:
    """Tell whether what a report with pictures needs is installed."""
    return all(importlib.util.find_spec(name) for name in ("jinja2", "PIL"))


def command(words: list[str]) -> None:
    """Print a command line as one would type it, and run it.

    Raises
    ------
    SnipError
        If the command fails; it has said why.
    """
    say(f"\n$ snip {shlex.join(words)}")
    status = cli.run(words)
    if status == cli.INTERRUPTED:
        raise KeyboardInterrupt
    if status != cli.DONE:
        raise SnipError(f"the demo stopped at: snip {shlex.join(words)}")
    sys.stdout.flush()


def plant(count: int, seed: int) -> Planted:
    """Draw ``count`` pictures, copy a fifth of them by each edit, and shuffle all rows."""
    rng = np.random.default_rng(seed)
    drawn = [
        demo_pictures.stored(demo_pictures.draw(rng))
        for _ in progress.track(range(count), "drawing", "pictures", count)
    ]
    rows = [(number, "", drawn[number]) for number in range(count)]
    for name, edit in demo_pictures.EDITS.items():
        for number in rng.choice(count, max(count // COPIES, 1), replace=False):
            rows.append((int(number), name, demo_pictures.stored(edit(drawn[number], rng))))
    lines = []
    for picture in drawn[:SHEET]:
        edited = [edit(picture, rng) for edit in demo_pictures.EDITS.values()]
        lines.append(np.concatenate([picture, *map(demo_pictures.stored, edited)], axis=1))
    rows = [rows[i] for i in rng.permutation(len(rows))]
    described = np.stack([demo_pictures.describe(picture) for _, _, picture in rows])
    return Planted(
        features=demo_pictures.features_of(described),
        picture=np.array([number for number, _, _ in rows], np.int64),
        edit=np.array([name for _, name, _ in rows]),
        pixels=np.stack([np.round(picture * 255).astype(np.uint8) for _, _, picture in rows]),
        sheet=np.concatenate(lines),
    )


def most_alike(features: np.ndarray) -> float:
    """Return the highest cosine between two different rows."""
    rows = features.astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    highest = -1.0
    for start in range(0, len(rows), SHARD_ROWS):
        cosines = rows[start : start + SHARD_ROWS] @ rows.T
        np.fill_diagonal(cosines[:, start:], -1)
        highest = max(highest, float(cosines.max()))
    return highest


def write(planted: Planted, out: Path) -> None:
    """Write shards and metadata in the layout of LAION, pictures in tars, and a sheet of some.

    A file that is there already keeps its date, so that the commands know their input again.
    """
    import pyarrow.parquet as pq

    table = metadata_of(planted)
    for part, start in enumerate(range(0, len(planted.picture), SHARD_ROWS)):
        features = planted.features[start : start + SHARD_ROWS]
        path = out / "img_emb" / f"img_emb_{part:04d}.npy"
        if not (path.is_file() and np.array_equal(np.load(path), features)):
            atomic.save_npy(path, features)
        rows = table.slice(start, SHARD_ROWS)
        path = out / "metadata" / f"metadata_{part:04d}.parquet"
        if not (path.is_file() and pq.read_table(path).equals(rows)):
            atomic.save_parquet(path, rows)
        pixels = planted.pixels[start : start + SHARD_ROWS]
        path = out / "images" / f"{part:05d}.tar"  # as img2dataset names shards and members
        with atomic.replacing(path) as temporary, tarfile.open(temporary, "w") as tar:
            for key, picture in zip(rows["key"].to_pylist(), pixels, strict=True):
                data = demo_pictures.png(picture.astype(np.float32) / 255)
                entry = tarfile.TarInfo(f"{key}.png")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    with atomic.replacing(out / "pictures.png") as temporary:
        temporary.write_bytes(demo_pictures.png(planted.sheet))


def metadata_of(planted: Planted) -> Any:
    """Return key, url, caption, and of a copy: the key of its original and its edit."""
    import pyarrow as pa

    keys = [f"{row:09d}" for row in range(len(planted.picture))]
    originals = [keys[row] for row in planted.originals[planted.picture]]
    is_original = planted.edit == ""
    return pa.table(
        {
            "key": keys,
            "url": [f"https://demo.invalid/{key}.png" for key in keys],
            "caption": [f"drawn picture {number}" for number in planted.picture],
            "planted_copy_of": pa.array(originals, mask=is_original),
            "edit": pa.array(planted.edit.tolist(), mask=is_original),
        }
    )


def describe(planted: Planted, out: Path) -> str:
    """Return what was found against what was planted, read from the files that were written."""
    found = {"join": score(planted, out / "clean"), "adc": score(planted, out / "adc")}
    lines = ["", "planted, and found by             join      adc (the index)"]
    for name in demo_pictures.EDITS:
        copies = found["join"].copies[name]
        shares = [f"{100 * scores.found[name]:7.1f} %" for scores in found.values()]
        lines.append(f"  {copies:>6,} copies, {name:<12} {'   '.join(shares)}")
    for method, scores in found.items():
        share = scores.right / scores.removed if scores.removed else 1.0
        lines.append(
            f"{method}: {scores.removed:,} rows removed, {scores.right:,} of them "
            f"({100 * share:.1f} %) beside a kept row of the same picture"
        )
    join, clean = found["join"], out / "clean"
    lines += [
        f"{len(planted.picture) - join.removed:,} rows are kept, of {len(planted.originals):,} "
        f"pictures drawn: {join.twice:,} more than one a picture, {join.lost:,} pictures lost",
        f"the kept rows: {clean / 'metadata'}",
        f"which row was removed for which: {clean / 'groups.parquet'}",
    ]
    if can_report():
        lines.append(f"look at it, in a browser: {clean / 'report.html'}")
    else:
        lines.append("to look at it: pip install 'snipdedup-toolkit[report]', then snip report")
    next_words = [
        ["top", str(clean)],
        ["audit", str(clean), str(out / "img_emb")],
        ["search", "0", "--index", str(out / "index"), "--metadata", str(out / "metadata")],
    ]
    lines += ["", "what to try next:", *(f"  snip {shlex.join(words)}" for words in next_words)]
    return "\n".join(lines)


class Scores(NamedTuple):
    """A finished OUT against what was planted.

    ``right`` of the ``removed`` rows have a representative of the same picture. ``twice`` rows are
    kept beside another of their picture; of ``lost`` pictures no row is kept. Of the ``copies`` by
    each edit this share was ``found``: it is in one group with its original.
    """

    removed: int
    right: int
    twice: int
    lost: int
    copies: dict[str, int]
    found: dict[str, float]


def score(planted: Planted, out: Path) -> Scores:
    """Compare a finished OUT with what was planted."""
    import pyarrow.parquet as pq

    columns = ("row", "group", "representative")
    table = pq.read_table(out / "groups.parquet", columns=list(columns))
    member, members_group, representative = (table[name].to_numpy() for name in columns)
    group = np.arange(len(planted.picture))  # a row without a group is its own
    group[member] = members_group
    together = group == group[planted.originals[planted.picture]]
    is_dup = np.load(out / "is_dup.npy")
    same = planted.picture[member] == planted.picture[representative]
    kept = np.bincount(planted.picture[~is_dup], minlength=len(planted.originals))
    return Scores(
        removed=int(is_dup.sum()),
        right=int((is_dup[member] & same).sum()),
        twice=int(np.maximum(kept - 1, 0).sum()),
        lost=int((kept == 0).sum()),
        copies={name: int((planted.edit == name).sum()) for name in demo_pictures.EDITS},
        found={name: float(together[planted.edit == name].mean()) for name in demo_pictures.EDITS},
    )
