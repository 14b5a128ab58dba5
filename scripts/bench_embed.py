"""Pictures a second of ``snip embed``, beside a plain loop of Pillow and the same model.

The loop opens, turns, converts and prepares one picture after another, and embeds them in batches.
Both run in turns, and the median of their times counts. The command is timed with its processes
and all that it writes.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

import snipdedup
from snipdedup.pictures.models import Model, open_model

COPIES = 20


def draw(folder: Path, count: int, width: int) -> list[Path]:
    """Write JPEG files, three by four, with shapes at all scales; one in `COPIES` is drawn anew."""
    rng, paths = np.random.default_rng(0), []
    size, data = (width, width * 3 // 4), io.BytesIO()
    folder.mkdir()
    for number in range(count):
        paths.append(folder / f"{number:06d}.jpg")
        if number % COPIES:
            paths[-1].write_bytes(data.getvalue())
            continue
        whole = np.zeros((size[1], size[0], 3), np.float32)
        for side in (4, 16, 64, 256):
            layer = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
            whole += np.asarray(layer.resize(size, Image.Resampling.BICUBIC)) * (2 / side)
        data = io.BytesIO()
        Image.fromarray(np.uint8(whole * (255 / whole.max()))).save(data, "JPEG", quality=90)
        paths[-1].write_bytes(data.getvalue())
    return paths


def plain_loop(paths: list[Path], model: Model) -> np.ndarray:
    """Return the features of pictures, (n, dim) float32."""
    features, waiting = [], []
    for number, path in enumerate(paths):
        with Image.open(path) as opened:
            waiting.append(model.prepare(ImageOps.exif_transpose(opened).convert("RGB")))
        if len(waiting) == model.batch or number == len(paths) - 1:
            features.append(model.encode(np.stack(waiting)))
            waiting = []
    return np.concatenate(features)


def main(words: list[str] | None = None) -> None:
    """Draw pictures, run both, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="phash")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1600])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args(words)
    print(f"model {given.model}, {given.count} JPEG files, --threads {given.threads}\n")
    print("| width | loop, pictures/s | snip embed, pictures/s | ratio |\n|--:|--:|--:|--:|")
    for width in given.widths:
        with tempfile.TemporaryDirectory() as scratch:
            folder, out = Path(scratch) / "pictures", Path(scratch) / "out"
            paths = draw(folder, given.count, width)
            model = open_model(given.model, device="cpu", threads=1)
            times: dict[str, list[float]] = {"loop": [], "snip": []}
            for _ in range(given.rounds):
                start = time.perf_counter()
                plain_loop(paths, model)
                middle = time.perf_counter()
                snipdedup.embed(
                    folder, out=out, model=given.model, threads=given.threads, device="cpu",
                    overwrite=True,
                )  # fmt: skip
                times["loop"].append(middle - start)
                times["snip"].append(time.perf_counter() - middle)
            loop, snip = (given.count / statistics.median(times[name]) for name in ("loop", "snip"))
            print(f"| {width} | {loop:,.0f} | {snip:,.0f} | {snip / loop:.2f} |")


if __name__ == "__main__":
    main()
