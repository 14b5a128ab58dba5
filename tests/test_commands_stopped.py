"""Every command that writes, stopped: by a full disk, by Ctrl-C, by damage to what it left.

Nothing is lost, nothing half-written is taken for whole, and one line says what happened; the same
command then ends with the files of a run that nothing disturbed.
"""

from __future__ import annotations

import gc
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from snipdedup import cli
from snipdedup.deduplication import run as dedup_run
from snipdedup.encoder import network
from snipdedup.encoder.network import Encoder, Network
from snipdedup.storage import locks, out_folder
from snipdedup.storage.out_folder import MANIFEST

ROWS = np.random.default_rng(0).standard_normal((3000, 16)).astype(np.float32)
ROWS[2000:] = ROWS[:1000] + 0.01 * ROWS[1000:2000]

# What comes after these words is the place to write to.
COMMANDS = {
    "dedup": ("dedup img --metadata meta --pairs --export keys,mask --threads 2 --out", ""),
    "exact": ("dedup img --method exact --out", ""),
    "adc": ("dedup img --index idx --out", ""),
    "adc, its own index": ("dedup img --method adc --out", ""),
    "semdedup": ("dedup img --method semdedup --clusters 5 --out", ""),
    "re-threshold": ("dedup clean --threshold .97 --out", ""),
    "reference": ("dedup img --reference clean_old --out", ""),
    "train": ("train img --dim 4 --hidden 8 --steps 8 --batch 64 --threads 1 --out", ""),
    "compress": ("compress img --encoder enc --out", ""),
    "index": ("index img --m 4 --nlist 8 --out", ""),
    "filter": ("filter meta --is_dup clean --embeddings img --export keys,mask --out", ""),
    "filter --on": ("filter meta --is_dup clean --on uid --keys meta --out", ""),
    "download": ("download meta", ""),
    "download --is_dup": (
        "download meta --is_dup clean/is_dup.npy --embeddings --embeddings_source img", "",
    ),
    "report": ("report clean --html", "/page.html"),
    "search": ("search 5 --index idx --html", "/page.html"),
    "audit": ("audit clean --sheet", "/sheet.csv"),
}  # fmt: skip
GO_ON = [name for name, (words, _) in COMMANDS.items() if words.split()[0] in cli.RESUMED]


def write_rows(folder: Path) -> None:
    """Write two shards, their metadata, and a small encoder."""
    uids = np.arange(len(ROWS))
    for name, part in (("a", slice(0, 1700)), ("b", slice(1700, 3000))):
        for place in ("img", "meta"):
            (folder / place).mkdir(exist_ok=True)
        np.save(folder / "img" / f"{name}.npy", ROWS[part])
        texts = {"uid": [f"u{uid}" for uid in uids[part]], "caption": [f"{uid % 500} words"
                 for uid in uids[part]]}  # fmt: skip
        pq.write_table(pa.table(texts), folder / "meta" / f"{name}.parquet")
    np.save(folder / "old.npy", 2 * ROWS[::3])  # the same pictures, other rows
    Encoder(Network(16, 8, 4)).save(folder / "enc", {})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """What all commands need, in the current folder."""
    folder, before = tmp_path_factory.mktemp("inputs"), Path.cwd()
    os.chdir(folder)
    write_rows(folder)
    assert run("dedup", "img", "--metadata", "meta", "--out", "clean") == 0
    assert run("dedup", "old.npy", "--out", "clean_old") == 0
    assert run("index", "img", "--m", "4", "--nlist", "8", "--out", "idx") == 0
    yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def undisturbed(inputs):
    """What each command writes when nothing happens."""
    found = {}
    for name in COMMANDS:
        with tempfile.TemporaryDirectory() as place:
            assert run(*words_of(name, Path(place) / "out")) == 0
            found[name] = results(Path(place) / "out")
    return found


def run(*words):
    with pytest.raises(SystemExit) as left:
        cli.main(list(words))
    return left.value.code or 0


def words_of(name, out):
    words, file = COMMANDS[name]
    return [*words.split(), f"{out}{file}"]


def results(folder):
    """Return the files of a folder but manifests, which hold times, and this folder's name."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST]
    return {
        str(p.relative_to(folder)): p.read_bytes().replace(os.fsencode(folder), b"OUT")
        for p in files
    }


def one_line(capsys):
    """Return the last line that runs wrote; the lines before it are progress."""
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("snip: "), last
    return last


# ---- a disk that is full


def refused(name, out, said):
    """Check what a run says that could not write; whether its folder is left unfinished."""
    assert str(out) in said or name == "filter --on", said
    assert any(why in said for why in ("No space left", "disk is full", "no space left",
                                       "File too large", "limit on the size")), said  # fmt: skip
    assert not (out / MANIFEST).exists()


@contextmanager
def small_disk(size):
    """Yield a folder on a disk of so many bytes, and a function that makes it large."""
    place = Path(tempfile.mkdtemp(prefix="disk-"))
    mount = ["mount", "-t", "tmpfs", "-o"]
    done = subprocess.run(
        [*mount, f"size={size}", "tmpfs", place], capture_output=True, check=False
    )
    if done.returncode:
        place.rmdir()
        pytest.skip(f"no small disk can be mounted here: {done.stderr.decode().strip()}")

    def grow():
        subprocess.run([*mount, "remount,size=64m", "tmpfs", place], check=True)

    try:
        yield place, grow
    finally:
        if subprocess.run(["umount", place], capture_output=True, check=False).returncode:
            gc.collect()  # maps of files that a refused run left to Python kept it busy
            subprocess.run(["umount", place], check=True)
        place.rmdir()


def fill_disk(name, size, undisturbed, capsys):
    """Run a command on a small disk, then again on a large one; return its first exit status."""
    capsys.readouterr()
    with small_disk(size) as (disk, grow):
        code = run(*words_of(name, disk / "out"))
        if code:
            assert code == 1
            refused(name, disk / "out", one_line(capsys))
            grow()
            assert run(*words_of(name, disk / "out")) == 0
        assert results(disk / "out") == undisturbed[name]
    return code


@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount")
@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_small_disk(inputs, undisturbed, capsys, name):
    assert fill_disk(name, 4096, undisturbed, capsys) == 1
    fill_disk(name, 40960, undisturbed, capsys)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount")
@pytest.mark.parametrize("name", list(COMMANDS))
def test_small_disks_of_many_sizes(inputs, undisturbed, capsys, name):
    for pages in [*range(1, 20), *range(20, 600, 23)]:
        if not fill_disk(name, 4096 * pages, undisturbed, capsys):
            break
    else:
        pytest.fail("two megabytes were not enough")


@contextmanager
def short_files(size):
    """Let no file become longer than so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [100, 6000])
@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_limit_on_the_size_of_files(inputs, undisturbed, tmp_path, capsys, name, size):
    """Where no small disk can be mounted, this stands for it."""
    out = tmp_path / "out"
    with short_files(size):
        code = run(*words_of(name, out))
    if code:
        assert code == 1
        refused(name, out, one_line(capsys))
        assert run(*words_of(name, out)) == 0
    else:
        assert size > 100
    assert results(out) == undisturbed[name]


# ---- a person that stops it


class Stops:
    """Raises KeyboardInterrupt when a file is about to be put in its place, after so many."""

    def __init__(self, after):
        self.left = after

    def __call__(self, original):
        def stop(*given, **named):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return original(*given, **named)

        return stop


@pytest.mark.parametrize("name", list(COMMANDS))
def test_ctrl_c_before_each_file_is_in_its_place(
    inputs, undisturbed, tmp_path, monkeypatch, capsys, name
):
    """All stops in one folder: each run goes further than the one before it, or as far."""
    out = tmp_path / "out"
    for after in (0, 2) if name == "train" else (0, 1, 2, 3, 5, 8, 12):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", Stops(after)(Path.replace))
            code = run(*words_of(name, out))
        if not code:
            break
        assert code == 130
        last = one_line(capsys)
        assert ("continues" in last) == (name in GO_ON)
        assert not (out / MANIFEST).exists()
    else:
        assert run(*words_of(name, out)) == 0
    assert results(out) == undisturbed[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(COMMANDS))
def test_a_signal_at_any_time(inputs, undisturbed, tmp_path, name):
    """Ctrl-C as a terminal sends it; later each time, until the command is done before."""
    command = [sys.executable, "-m", "snipdedup"]
    out, wait = tmp_path / "out", 1.2  # Python and torch are there by then
    while True:
        started = subprocess.Popen(
            [*command, *words_of(name, out)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        time.sleep(wait)
        started.send_signal(signal.SIGINT)
        said = started.communicate(timeout=60)[1].decode().strip().splitlines()
        if started.returncode == 0 or (said and "may hold verdicts" in said[-1]):
            break
        # Python may end itself by the signal, which is 130 to a shell too; as it goes, in silence.
        assert started.returncode in (130, -signal.SIGINT), said
        assert not said or said[-1].startswith("snip: interrupted; "), said
        assert not any("Traceback" in line for line in said), said
        wait += 0.15
    found = results(out)  # of a run stopped at its very end, the work may be left
    found = {name: data for name, data in found.items() if not name.startswith("work/")}
    assert found == undisturbed[name]


# ---- what a stopped run left, damaged


@pytest.mark.parametrize("how", ["flipped", "truncated"])
@pytest.mark.parametrize("name", ["filter", "filter --on", "download", "download --is_dup",
                                  "adc, its own index", "semdedup"])  # fmt: skip
def test_files_that_a_stopped_run_left_are_proved_before_they_are_used(
    inputs, undisturbed, tmp_path, monkeypatch, capsys, name, how
):
    """Each file of the work in turn, of a run that was stopped when all was there."""

    def stop(*_, **__):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(out_folder, "publish", stop)
        patch.setattr(dedup_run, "write_files", stop)
        assert run(*words_of(name, out)) == 130
    held = {path: path.read_bytes() for path in (out / "work").rglob("*") if path.is_file()}
    damaged = [path for path in held if path.name not in (locks.REQUEST, locks.LOCK)
               and held[path]]  # fmt: skip
    assert len(damaged) >= 4
    for path in damaged:
        shutil.rmtree(out)
        for other, data in held.items():
            other.parent.mkdir(parents=True, exist_ok=True)
            other.write_bytes(data)
        data = bytearray(held[path])
        if how == "flipped":
            data[-len(data) // 3] ^= 4
        else:
            del data[len(data) // 2 :]
        path.write_bytes(data)
        if run(*words_of(name, out)):
            assert path.name in ("pinned.json", "model.npz"), path
            assert path.name in one_line(capsys)
            if path.name == "pinned.json":
                continue
            assert run(*words_of(name, out)) == 0
        assert results(out) == undisturbed[name], path


@pytest.mark.parametrize("how", ["flipped", "truncated"])
def test_a_damaged_checkpoint_of_training(inputs, undisturbed, tmp_path, monkeypatch, how):
    from snipdedup.encoder import training

    def stop(*_, **__):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    monkeypatch.setattr(training, "CHECKPOINT_S", 0.0)
    with monkeypatch.context() as patch:
        patch.setattr(network, "write_manifest", stop)
        assert run(*words_of("train", out)) == 130
    path = out / "work" / training.CHECKPOINT
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[len(data) // 3] ^= 4
    else:
        del data[len(data) // 2 :]
    path.write_bytes(data)
    assert run(*words_of("train", out)) == 0
    assert results(out) == undisturbed["train"]
