"""Compare what two versions of the code write, byte for byte: the net under a refactoring.

    python scripts/golden.py against HEAD~1        # that commit beside this checkout
    python scripts/golden.py make BASE SIDE [--checkout FOLDER]
    python scripts/golden.py compare BASE ONE OTHER

``make`` writes the inputs to BASE/inputs, unless they are there, and runs every command of `CASES`
in BASE/SIDE with the code of a checkout. ``compare`` lists each file that differs between two
sides. Times and versions are left out, and so are the paths of the sides. Real features are taken
from $SNIP_TEST_DATA or ../shared/data where they are there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("SNIP_TEST_DATA", ROOT.parent / "shared" / "data")) / "keyframes"
# What a manifest says of the run, not of its result.
VOLATILE = {"seconds", "versions", "changed", "threads", "max_memory"}
TIMES = re.compile(
    r"^seconds: .*$| in [\d.,]+ s(?=,|$)|^ *&#34;\w+&#34;: \d+\.\d+,?$",
    re.MULTILINE | re.IGNORECASE,
)
LEARN = "--dim 32 --hidden 64 --steps 40 --batch 256 --threads 1"

# Each a command line; ``@`` stands for the folder of inputs, other paths are of the side.
CASES = """
dedup @small/img_emb --metadata @small/metadata --out star
dedup @small/img_emb --metadata @small/metadata --out components --grouping components
    --keep max:width,last --merge_captions 3 --export keys,mask
dedup @small/img_emb --metadata @small/metadata --out weights --keep random --seed 7 --weights
    --pairs --chunk_rows 3000 --threads 1
dedup @small/img_emb --text_features @small/text_emb --out captions
dedup @small/img_emb --also @small/text_emb:.8 --grouping components --out also
dedup @small/img_emb --out exact --method exact --keep_fraction .8
dedup @small/img_emb --out semdedup --method semdedup --clusters 4 --epsilon .05,.02
dedup @more/img_emb --metadata @more/metadata --reference star --out added
dedup star --threshold .97 --out stricter
dedup @many/img_emb --out many
dedup @many/img_emb --out many_kept --recall .99 --threshold .9 --keep_work
train @small/img_emb --out encoder LEARN
compress @small/img_emb --encoder encoder --out descriptors
index @small/img_emb --encoder encoder --out index --nlist 16 --m 8 --train_rows 5000 --threads 1
    --export_faiss index.faiss
dedup @small/img_emb --index index --out adc --threads 1
dedup --index index --out codes --threads 1 --rule difference --margin 0
filter @small/metadata --is_dup star --out filtered --export keys --embeddings @small/img_emb
filter @shuffled --is_dup star --out found --on url --keys @small/metadata
download @small/metadata/metadata_{part:04d}.parquet fetched --start 1 --end 3 --is_dup star
top star -n 20 --json
diff star stricter --json
audit star @small/img_emb
search 5 --index index --features @small/img_emb --json
report components --html components.html
eval @small/img_emb --out eval --dim 32 --steps 20 --train_rows 4000 --queries 500 --nopicture
    --threads 1 --code_bytes 4 --nprobe 1,4
"""
REAL_CASES = """
dedup @real/img_emb --metadata @real/metadata --out real
dedup @real/img_emb --metadata @real/metadata --out real_last --threshold .98 --keep last
"""


def main() -> None:
    """Run the command asked for; exit with 1 where sides differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    against = commands.add_parser("against", help="a commit beside this checkout")
    against.add_argument("commit")
    maker = commands.add_parser("make", help="run all commands with the code of a checkout")
    maker.add_argument("base", type=Path)
    maker.add_argument("side")
    maker.add_argument("--checkout", type=Path, default=ROOT)
    comparer = commands.add_parser("compare", help="list what differs between two sides")
    comparer.add_argument("base", type=Path)
    comparer.add_argument("one")
    comparer.add_argument("other")
    given = parser.parse_args()
    if given.command == "make":
        make(given.base, given.side, given.checkout)
        return
    if given.command == "compare":
        different = list(differences(given.base / given.one, given.base / given.other))
    else:
        different = compare_commit(given.commit)
    print("\n".join(different) if different else "no differences")
    sys.exit(bool(different))


def compare_commit(commit: str) -> list[str]:
    """Return what differs between a commit's results and this checkout's."""
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        base, checkout = Path(folder) / "base", Path(folder) / "checkout"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(checkout), commit], check=True)
        try:
            make(base, "before", checkout)
            make(base, "after", ROOT)
        finally:
            subprocess.run([*git, "remove", "--force", str(checkout)], check=True)
        return list(differences(base / "before", base / "after"))


def make(base: Path, side: str, checkout: Path) -> None:
    """Run all commands with the code of a checkout; what each prints is kept in ``printed``."""
    inputs, out = base.resolve() / "inputs", base.resolve() / side
    if not inputs.is_dir():
        make_inputs(inputs)
    shutil.rmtree(out, ignore_errors=True)
    (out / "printed").mkdir(parents=True)
    environment = {**os.environ, "PYTHONPATH": str(checkout.resolve())}
    for number, words in enumerate(command_lines(inputs)):
        print(f"{side}: snip {' '.join(words)}", file=sys.stderr, flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "snipdedup", *words],
            cwd=out, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"exit status {done.returncode}\n{done.stderr[-2000:]}")
        (out / "printed" / f"{number:02d}_{words[0]}.txt").write_text(done.stdout, "utf-8")


def command_lines(inputs: Path) -> Iterator[list[str]]:
    """Yield the words of each command."""
    cases = CASES.strip() + (REAL_CASES if (inputs / "real").exists() else "")
    for line in re.sub(r"\n +", " ", cases).splitlines():
        yield line.replace("LEARN", LEARN).replace("@", f"{inputs}/").split()


def make_inputs(inputs: Path) -> None:
    """Write made sets of features and metadata, and a link to real ones where there are some."""
    rng = np.random.default_rng(11)
    part = inputs.with_name("inputs.part")
    shutil.rmtree(part, ignore_errors=True)
    rows = planted(rng, 9000, 96).astype(np.float16)
    texts = planted(rng, 9000, 32).astype(np.float32)
    texts[rng.random(9000) < 0.5] = texts[0]
    write_set(part / "small", rows, 3, rng)
    save_shards(part / "small" / "text_emb", "text_emb", np.array_split(texts, 3))
    more = np.concatenate([rows[::20], planted(rng, 1000, 96).astype(np.float16)])
    write_set(part / "more", more, 1, rng)
    crowd = planted(rng, 80_000, 64).astype(np.float32)
    crowd[:4000] = crowd[0] + rng.normal(0, 0.02, (4000, 64))
    save_shards(part / "many" / "img_emb", "img_emb", np.array_split(rng.permutation(crowd), 4))
    tables = [pq.read_table(path) for path in sorted((part / "small/metadata").iterdir())]
    whole = pa.concat_tables(tables)
    (part / "shuffled").mkdir()
    order = rng.permutation(len(whole))[:7000]
    pq.write_table(whole.take(order), part / "shuffled" / "found.parquet")
    if REAL.is_dir():
        (part / "real").symlink_to(REAL.resolve())
    part.rename(inputs)


def planted(rng: np.random.Generator, rows: int, dim: int) -> np.ndarray:
    """Return random rows of which a third are near or exact copies of others, (rows, dim)."""
    base = rng.normal(size=(rows, dim)) * (1 + np.arange(dim)) ** -0.4
    copies = rng.choice(rows, rows // 3, replace=False)
    noise = rng.choice([0, 0.05, 0.2, 0.3], len(copies))[:, None]
    sources = base[rng.integers(0, rows, len(copies))]
    spread = np.linalg.norm(sources, axis=1, keepdims=True) / dim**0.5
    base[copies] = sources + noise * spread * rng.normal(size=sources.shape)
    return base


def write_set(folder: Path, rows: np.ndarray, shards: int, rng: np.random.Generator) -> None:
    """Write features, and metadata with a few repeated captions and hashes."""
    cuts = np.array_split(np.arange(len(rows)), shards)
    save_shards(folder / "img_emb", "img_emb", [rows[cut] for cut in cuts])
    (folder / "metadata").mkdir(parents=True)
    for number, cut in enumerate(cuts):
        table = pa.table({
            "key": [f"{folder.name}{row:06d}" for row in cut],
            "url": [f"https://example.org/{folder.name}/{row}.jpg" for row in cut],
            "caption": [f"picture {row % 400}" for row in cut],
            "width": rng.integers(64, 2048, len(cut)),
            "hash": [f"{row // 2:x}" for row in cut],
        })  # fmt: skip
        pq.write_table(table, folder / "metadata" / f"metadata_{number:04d}.parquet")


def save_shards(folder: Path, name: str, shards: list[np.ndarray]) -> None:
    """Write features as numbered ``.npy``."""
    folder.mkdir(parents=True)
    for number, rows in enumerate(shards):
        np.save(folder / f"{name}_{number:04d}.npy", rows)


def differences(one: Path, other: Path) -> Iterator[str]:
    """Yield a line for each file that is in one folder only, or differs."""
    names = sorted({str(path.relative_to(side)) for side in (one, other) for path in files(side)})
    for name in names:
        a, b = one / name, other / name
        missing = next((side for side in (a, b) if not side.is_file()), None)
        if missing is not None:
            yield f"{name}: not in {missing.relative_to(one.parent).parts[0]}"
        elif a.suffix == ".json":
            yield from json_differences(name, load(a, one), load(b, other))
        elif a.suffix in (".txt", ".md", ".html"):
            if plain(a, one) != plain(b, other):
                yield f"{name}: differs"
        elif a.read_bytes() != b.read_bytes():
            yield f"{name}: differs ({a.stat().st_size:,} and {b.stat().st_size:,} bytes)"


def files(folder: Path) -> Iterator[Path]:
    """Yield all files below a folder, but locks, which hold process numbers."""
    return (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")


def plain(path: Path, side: Path) -> str:
    """Return a text without times and without the path of its side."""
    return TIMES.sub("", path.read_text("utf-8").replace(str(side), ""))


def load(path: Path, side: Path) -> Any:
    """Read a JSON file without the path of its side."""
    return json.loads(path.read_text("utf-8").replace(str(side), ""))


def json_differences(place: str, a: Any, b: Any) -> Iterator[str]:
    """Yield the places at which two values differ, but those that tell of the run only."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            if key not in VOLATILE and not is_digest(place, key):
                yield from json_differences(f"{place} {key}", a.get(key), b.get(key))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from json_differences(f"{place} [{number}]", x, y)
    elif a != b:
        yield f"{place}: {str(a)[:100]} and {str(b)[:100]}"


def is_digest(place: str, key: str) -> bool:
    """Tell whether a value is the checksum of a file with times, which is compared itself."""
    if place.endswith("request"):
        return key in ("index", "encoder", "is_dup")
    return place.endswith("outputs") and key.endswith((".json", ".md"))


if __name__ == "__main__":
    main()
