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
from typing import Any

import numpy as np

from snipdedup import cli, demo_pictures, progress
from snipdedup.config import Demo
from snipdedup.errors import SnipError
from snipdedup.storage import atomic, locks, out_folder
from snipdedup.storage.manifest import MANIFEST, read_manifest, write_manifest

KIND = "demo"
SHARD_ROWS = 800
COPIES = 5  # one picture in so many is copied, by each edit
SHEET = 8  # pictures shown with their copies
PARTS = ("img_emb", "metadata", "images", "encoder", "descriptors", "index", "clean", "adc", "kept")


@dataclass(frozen=True)
class Planted:
    """What the demo made.

    Attributes
    ----------
    features : (rows, d) float16
    picture : (rows,) int64
        Which picture a row shows.
    edit : (rows,) str
        How the row's copy was made; empty for the picture itself.
    pixels : (rows, h, w, 3) uint8
        What each row shows.
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
    """Draw pictures, copy some by each edit, describe all, and shuffle the rows.

    Parameters
    ----------
    count : int
        Pictures to draw; a fifth of them is copied by each edit.
    seed : int
    """
    rng = np.random.default_rng(seed)
    drawn = [
        demo_pictures.stored(demo_pictures.draw(rng))
        for _ in progress.track(range(count), "drawing", "pictures", count)
    ]
    rows = [(number, "", drawn[number]) for number in range(count)]
    for name, edit in demo_pictures.EDITS.items():
        for number in rng.choice(count, max(count // COPIES, 1), replace=False):
            rows.append((int(number), name, demo_pictures.stored(edit(drawn[number], rng))))
    sheet = np.concatenate(
        [
            np.concatenate(
                [p, *(demo_pictures.stored(e(p, rng)) for e in demo_pictures.EDITS.values())], 1
            )
            for p in drawn[:SHEET]
        ]
    )
    rows = [rows[i] for i in rng.permutation(len(rows))]
    described = np.stack([demo_pictures.describe(picture) for _, _, picture in rows])
    return Planted(
        features=demo_pictures.features_of(described),
        picture=np.array([number for number, _, _ in rows], np.int64),
        edit=np.array([name for _, name, _ in rows]),
        pixels=np.stack([np.round(picture * 255).astype(np.uint8) for _, _, picture in rows]),
        sheet=sheet,
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

    What stands already keeps its date, by which the commands know their input again.
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
        keys = rows["key"].to_pylist()
        save_tar(
            out / "images" / f"{part:05d}.tar", keys, planted.pixels[start : start + SHARD_ROWS]
        )
    with atomic.replacing(out / "pictures.png") as temporary:
        temporary.write_bytes(demo_pictures.png(planted.sheet))


def save_tar(path: Path, keys: list[str], pixels: np.ndarray) -> None:
    """Write pictures as a tar shard, named by their keys as img2dataset names them."""
    with atomic.replacing(path) as part, tarfile.open(part, "w") as tar:
        for key, picture in zip(keys, pixels, strict=True):
            data = demo_pictures.png(picture.astype(np.float32) / 255)
            entry = tarfile.TarInfo(f"{key}.png")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))


def metadata_of(planted: Planted) -> Any:
    """Return key, url, caption, and of a copy: the key of its original and its edit."""
    import pyarrow as pa

    keys = pa.array([f"{row:09d}" for row in range(len(planted.picture))])
    is_original = planted.edit == ""
    return pa.table(
        {
            "key": keys,
            "url": [f"https://demo.invalid/{key}.png" for key in keys.to_pylist()],
            "caption": [f"drawn picture {number}" for number in planted.picture],
            "planted_copy_of": pa.array(
                keys.take(pa.array(planted.originals[planted.picture])).to_pylist(),
                mask=is_original,
            ),
            "edit": pa.array(planted.edit.tolist(), mask=is_original),
        }
    )


def describe(planted: Planted, out: Path) -> str:
    """Return what was found against what was planted, read from the files that were written."""
    join, adc = Judged(planted, out / "clean"), Judged(planted, out / "adc")
    lines = ["", "planted, and found by             join      adc (the index)"]
    for name in demo_pictures.EDITS:
        copies = np.flatnonzero(planted.edit == name)
        shares = [f"{100 * judged.found(copies):7.1f} %" for judged in (join, adc)]
        lines.append(f"  {len(copies):>6,} copies, {name:<12} {'   '.join(shares)}")
    for judged, method in ((join, "join"), (adc, "adc")):
        lines.append(
            f"{method}: {judged.removed:,} rows removed, {judged.right:,} of them "
            f"({100 * judged.precision:.1f} %) beside a row of the same picture that stays"
        )
    drawn = len(planted.originals)
    lines += [
        f"{len(planted.picture) - join.removed:,} rows stay, of {drawn:,} pictures drawn: "
        f"{join.twice:,} more than one a picture, {join.lost:,} pictures lost",
        f"the rows that stay: {out / 'clean' / 'metadata'}",
        f"what went because of what: {out / 'clean' / 'groups.parquet'}",
    ]
    if can_report():
        lines.append(f"look at it, in a browser: {out / 'clean' / 'report.html'}")
    else:
        lines.append("to look at it: pip install 'snipdedup-toolkit[report]', then snip report")
    lines += ["", "what to try next:", *(f"  snip {shlex.join(words)}" for words in suggested(out))]
    return "\n".join(lines)


def suggested(out: Path) -> list[list[str]]:
    """Return command lines to go on with, without the first word ``snip``."""
    clean, features = str(out / "clean"), str(out / "img_emb")
    return [
        ["top", clean],
        ["audit", clean, features],
        ["search", "0", "--index", str(out / "index"), "--metadata", str(out / "metadata")],
    ]


class Judged:
    """A finished OUT against what was planted.

    Attributes
    ----------
    removed, right : int
        Rows removed, and those whose representative shows the same picture.
    twice, lost : int
        Rows that stay beside another of the same picture; pictures of which no row stays.
    """

    def __init__(self, planted: Planted, out: Path) -> None:
        import pyarrow.parquet as pq

        table = pq.read_table(out / "groups.parquet")
        member, group, representative = (
            table[name].to_numpy() for name in ("row", "group", "representative")
        )
        self.group = np.arange(len(planted.picture))  # a row without a group is its own
        self.group[member] = group
        self.original = planted.originals[planted.picture]
        is_dup = np.load(out / "is_dup.npy")
        gone = is_dup[member]
        same = planted.picture[member] == planted.picture[representative]
        self.removed, self.right = int(is_dup.sum()), int((gone & same).sum())
        staying = np.bincount(planted.picture[~is_dup], minlength=len(planted.originals))
        self.twice, self.lost = int(np.maximum(staying - 1, 0).sum()), int((staying == 0).sum())

    @property
    def precision(self) -> float:
        """Share of the removed rows that are right."""
        return self.right / self.removed if self.removed else 1.0

    def found(self, copies: np.ndarray) -> float:
        """Return the share of planted copies that are in one group with their original."""
        return float((self.group[copies] == self.group[self.original[copies]]).mean())
