"""``snip demo``: all commands on pictures that it draws itself, with copies that it plants.

Everything after the drawing goes through the public commands, printed before they run. The name of
a file says which picture it shows and how the copy was made (``000012_grey.jpg``), so the demo can
say what was found, what was missed and what was removed wrongly.
"""

from __future__ import annotations

import importlib.util
import math
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from snipdedup import cli, progress
from snipdedup.config import Demo
from snipdedup.errors import SnipError
from snipdedup.storage import atomic, locks, out_folder
from snipdedup.storage.out_folder import MANIFEST, read_manifest, write_manifest

if TYPE_CHECKING:
    from PIL.Image import Image

KIND = "demo"
COPIES = 5  # one picture in so many is copied, by each edit
SHEET = 6  # pictures shown with their copies
FOLDERS = ("photos", "embedded", "clean", "chosen", "encoder", "descriptors", "index", "adc")
SIZE = (160, 120)  # pixels, width and height
ORIGINAL = "original"


def re_saved(picture: Image, rng: np.random.Generator) -> Image:
    """Change nothing: what differs is the format of the file."""
    return picture


def smaller(picture: Image, rng: np.random.Generator) -> Image:
    """Shrink to two fifths up to four fifths."""
    share = rng.uniform(0.4, 0.8)
    return picture.resize((int(SIZE[0] * share), int(SIZE[1] * share)))


def brightness(picture: Image, rng: np.random.Generator) -> Image:
    """Make lighter or darker."""
    from PIL import ImageEnhance

    return ImageEnhance.Brightness(picture).enhance(float(rng.choice([0.7, 1.3])))


def grey(picture: Image, rng: np.random.Generator) -> Image:
    """Take the colours away."""
    return picture.convert("L")


def cropped(picture: Image, rng: np.random.Generator) -> Image:
    """Cut off a fiftieth at each side."""
    x, y = (round(side * 0.02) for side in SIZE)
    return picture.crop((x, y, SIZE[0] - x, SIZE[1] - y))


def mirrored(picture: Image, rng: np.random.Generator) -> Image:
    """Swap left and right."""
    from PIL import ImageOps

    return ImageOps.mirror(picture)


class Edit(NamedTuple):
    """How a copy is made: what is done to the picture, and how it is saved."""

    change: Callable[[Image, np.random.Generator], Image]
    suffix: str
    options: dict[str, Any]


USUAL: dict[str, Any] = {"quality": 90}
EDITS = {
    "exact": Edit(re_saved, "jpg", USUAL),
    "jpeg": Edit(re_saved, "jpg", {"quality": 25}),
    "webp": Edit(re_saved, "webp", {"quality": 80}),
    "smaller": Edit(smaller, "jpg", USUAL),
    "brightness": Edit(brightness, "jpg", USUAL),
    "grey": Edit(grey, "jpg", USUAL),
    "cropped": Edit(cropped, "jpg", USUAL),
    "mirrored": Edit(mirrored, "jpg", USUAL),
}


@locks.released()
def run(options: Demo) -> str:
    """Run ``snip demo`` and return what it found."""
    if importlib.util.find_spec("PIL") is None:
        raise SnipError("snip demo needs Pillow: pip install 'snipdedup-toolkit[images,report]'")
    out = Path(options.out).expanduser()
    request = {"pictures": options.pictures, "seed": options.seed}
    if out_folder.claim(out, KIND, request, overwrite=options.overwrite) == "done":
        report = read_manifest(out, KIND)["report"]
        return f"{report}\n\n{out} is finished already; --overwrite makes it anew"
    if options.overwrite:
        (out / MANIFEST).unlink(missing_ok=True)
        for name in FOLDERS:
            shutil.rmtree(out / name, ignore_errors=True)
    copies = len(EDITS) * max(options.pictures // COPIES, 1)
    print(f"drawing {options.pictures:,} pictures and {copies:,} copies of them", flush=True)
    draw_files(out, options.pictures, options.seed)
    print(f"they are in {out / 'photos'}; some beside their copies: {out / 'pictures.png'}")
    for words in commands(out, options.seed):
        line = f"snip {shlex.join(words)}"
        print(f"\n$ {line}", flush=True)
        status = cli.run(words)
        if status == cli.INTERRUPTED:
            raise KeyboardInterrupt
        if status != cli.DONE:  # it has said why
            raise SnipError(f"the demo stopped at: {line}")
        sys.stdout.flush()
    report = describe_found(out, options.pictures)
    files = [path for path in out.rglob("*") if path.is_file() and locks.WORK not in path.parts]
    write_manifest(out, KIND, {"request": request, "report": report}, files)
    locks.end_work(out)
    return report


def commands(out: Path, seed: int) -> list[list[str]]:
    """Return the command lines, without the first word ``snip``.

    First the way from pictures to a clean folder, then the way by codes, for sets that are larger
    than memory. Training is cut short: a few thousand rows teach little more than PCA, where it
    starts.
    """
    made = {name: str(out / name) for name in FOLDERS}
    features = str(out / "embedded" / "img_emb")
    short = "--dim 64 --hidden 256 --batch 512 --steps 40 --learning_rate 2e-4"
    same = ["--seed", str(seed)]
    encoder = ["--encoder", made["encoder"], "--out"]
    return [
        ["embed", made["photos"], "--out", made["embedded"]],
        ["dedup", made["embedded"], "--keep", "max:width,max:bytes", "--out", made["clean"], *same],
        *([["report", made["clean"]]] if can_report() else []),
        ["apply", made["clean"], "--link", made["chosen"]],
        ["train", features, "--out", made["encoder"], *short.split(), *same],
        ["compress", features, *encoder, made["descriptors"]],
        ["index", features, *encoder, made["index"], *same],
        ["dedup", made["embedded"], "--index", made["index"], "--out", made["adc"], *same],
    ]


def can_report() -> bool:
    """Tell whether what a report needs is installed."""
    return importlib.util.find_spec("jinja2") is not None


def draw_files(out: Path, count: int, seed: int) -> None:
    """Draw ``count`` pictures, and copies of a fifth of them by each edit, into ``out/photos``.

    A file that is there already is the same, and keeps its date: the commands know their input.
    """
    from PIL import Image

    rng = np.random.default_rng(seed)
    copied = {
        name: set(rng.choice(count, max(count // COPIES, 1), replace=False).tolist())
        for name in EDITS
    }
    sheet = Image.new("RGB", (SIZE[0] * (1 + len(EDITS)) // 2, SIZE[1] * SHEET // 2))
    for number in progress.track(range(count), "drawing", "pictures", count):
        rng = np.random.default_rng([seed, number])
        picture = Image.fromarray(draw(rng))
        save(out, number, ORIGINAL, "jpg", picture, USUAL)
        for place, (name, edit) in enumerate([(ORIGINAL, EDITS["exact"]), *EDITS.items()]):
            copy = edit.change(picture, rng)
            if number in copied.get(name, ()):
                save(out, number, name, edit.suffix, copy, edit.options)
            if number < SHEET:
                half = copy.resize((SIZE[0] // 2, SIZE[1] // 2))
                sheet.paste(half, (place * half.width, number * half.height))
    with atomic.replacing(out / "pictures.png") as part:
        sheet.save(part, "PNG")


def save(
    out: Path, number: int, edit: str, suffix: str, picture: Image, options: dict[str, Any]
) -> None:
    """Save a picture whose name says what it is, a hundred originals a folder."""
    path = out / "photos" / f"{number // 100:04d}" / f"{number:06d}_{edit}.{suffix}"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic.replacing(path) as part:
            picture.save(part, "JPEG" if suffix == "jpg" else suffix, **options)


def draw(rng: np.random.Generator) -> np.ndarray:
    """Draw one picture, (height, width, 3) uint8: a background of two colours, shapes on it."""
    across, down = (np.linspace(-1, 1, side, dtype=np.float32) for side in SIZE)
    x, y = np.meshgrid(across, down)
    share = background(x, y, rng)[:, :, None]
    picture = rng.random(3, np.float32) * share + rng.random(3, np.float32) * (1 - share)
    for _ in range(rng.integers(6, 15)):
        inside = shape(x, y, rng)[:, :, None]
        picture += (rng.random(3, np.float32) - picture) * inside
    return np.asarray(np.clip(picture * 255 + 0.5, 0, 255), np.uint8)


def background(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the share of the first colour: two waves in directions of their own."""
    share = np.full(x.shape, 0.5, np.float32)
    for _ in range(2):
        turn, waves, phase = rng.uniform(0, np.pi), rng.uniform(1, 7), rng.uniform(0, 6)
        along = float(np.cos(turn)) * x + float(np.sin(turn)) * y
        share += np.sin(along * waves + phase) / 4
    return share


def shape(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return how far each pixel lies inside an ellipse, a box or a diamond, 0 to 1."""
    turn, left, up, long, wide = rng.uniform(
        [0, -0.9, -0.9, 0.1, 0.1], [np.pi, 0.9, 0.9, 0.5, 0.5]
    ).tolist()  # Python's numbers leave float32 as it is
    cosine, sine = math.cos(turn), math.sin(turn)
    u = (cosine * (x - left) + sine * (y - up)) / long
    v = (cosine * (y - up) - sine * (x - left)) / wide
    radii = (np.hypot(u, v), np.maximum(abs(u), abs(v)), abs(u) + abs(v))
    radius = radii[rng.integers(len(radii))]
    return np.clip((1 - radius) * 20 + 0.5, 0, 1)  # edges a few pixels wide


class Score(NamedTuple):
    """A result against what was planted."""

    found: dict[str, float]  # by edit: share of copies that are in one group with their picture
    removed: int
    right: int  # removed rows whose representative shows the same picture
    twice: int  # kept rows beside another one of their picture
    lost: int  # pictures of which no row is kept


def score(out: Path, pictures: int, names: list[str]) -> Score:
    """Compare a finished OUT with what the names of files, by row, say."""
    import pyarrow.parquet as pq

    picture = np.array([int(name[:6]) for name in names])
    edit = np.array([name[7:] for name in names])
    columns = ("row", "group", "representative")
    table = pq.read_table(out / "groups.parquet", columns=list(columns))
    member, members_group, representative = (table[name].to_numpy() for name in columns)
    group = np.arange(len(names))  # a row without a group is its own
    group[member] = members_group
    group_of_original = np.empty(pictures, np.int64)
    group_of_original[picture[edit == ORIGINAL]] = group[edit == ORIGINAL]
    together = group == group_of_original[picture]
    is_dup = np.load(out / "is_dup.npy")
    same = picture[member] == picture[representative]
    kept = np.bincount(picture[~is_dup], minlength=pictures)
    return Score(
        {name: float(together[edit == name].mean()) for name in EDITS},
        int(is_dup.sum()),
        int((is_dup[member] & same).sum()),
        int(np.maximum(kept - 1, 0).sum()),
        int((kept == 0).sum()),
    )


def describe_found(out: Path, pictures: int) -> str:
    """Return what was found against what was planted, read from the files that were written."""
    import pyarrow.parquet as pq

    paths = pq.read_table(out / "embedded" / "metadata", columns=["path"])["path"].to_pylist()
    names = [Path(path).stem for path in paths]
    by_join, by_codes = (score(out / name, pictures, names) for name in ("clean", "adc"))
    lines = ["", "planted, and found by              join     codes (the index)"]
    for name in EDITS:
        count = sum(one.endswith(f"_{name}") for one in names)
        shares = f"{100 * by_join.found[name]:7.1f} %  {100 * by_codes.found[name]:7.1f} %"
        lines.append(f"  {count:>6,} copies, {name:<12} {shares}")
    for way, scores in (("join", by_join), ("codes", by_codes)):
        share = 100 * scores.right / max(scores.removed, 1)
        lines.append(
            f"{way}: {scores.removed:,} rows removed, {scores.right:,} of them ({share:.1f} %) "
            "for a row of the same picture"
        )
    kept = f"{len(names) - by_join.removed:,} rows are kept, of {pictures:,} pictures drawn"
    page = f"look at it, in a browser: {out / 'clean' / 'report.html'}"
    next_words = [
        ["top", str(out / "clean")],
        ["why", str(out / "clean"), "0"],
        ["audit", str(out / "clean")],
        ["search", "0", "--index", str(out / "index")],
    ]
    lines += [
        f"{kept}: {by_join.twice:,} more than one a picture, {by_join.lost:,} pictures lost",
        "a hash of pixels sees no mirrored copies, and few cropped ones; a learned model may",
        f"links to the files that are kept: {out / 'chosen'}",
        page if can_report() else "for a page: pip install 'snipdedup-toolkit[report]'",
        "",
        "what to try next:",
        *(f"  snip {shlex.join(words)}" for words in next_words),
    ]
    return "\n".join(lines)
