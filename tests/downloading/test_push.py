"""Finished folders in a store, and their cards; the store is fsspec's in memory, or a false hub."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from odd_files import write_photos

import snipdedup
from snipdedup import cli
from snipdedup.errors import SnipError, UsageError
from snipdedup.storage import atomic, remote, upload
from snipdedup.storage.out_folder import MANIFEST

ROWS = np.random.default_rng(0).standard_normal((300, 16)).astype(np.float32)
ROWS[210:] = ROWS[:90]
PLACE = "memory://team/kept"
HUB = "hf://datasets/team/kept"


@pytest.fixture
def store(tmp_path, monkeypatch):
    """A finished folder `clean`, and an empty store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(remote, "BACKOFF_S", 0.0)
    (tmp_path / "img_emb").mkdir()
    (tmp_path / "metadata").mkdir()
    np.save("img_emb/img_emb_0.npy", ROWS)
    table = pa.table({"uid": [f"u{n}" for n in range(len(ROWS))], "width": range(len(ROWS))})
    pq.write_table(table, "metadata/metadata_0.parquet")
    words = "dedup img_emb --metadata metadata --out clean --threshold .96 --keep max:width"
    assert cli.run([*words.split(), "--threads", "1", "--max_memory", "1GB"]) == 0
    system = fsspec.filesystem("memory")
    yield system
    system.store.clear()
    system.pseudo_dirs[:] = [""]


@pytest.fixture
def hub(store, monkeypatch):
    """A hub that puts each commit into the store in memory; what it was asked for."""
    import huggingface_hub

    asked = []

    class Client:
        def create_repo(self, name, **about):
            asked.append((name, about))

        def create_commit(self, name, changes, *, commit_message, repo_type):
            assert (name, repo_type) == ("team/kept", "dataset")
            assert commit_message
            for change in changes:
                path = f"/{HUB.removeprefix('hf://')}/{change.path_in_repo}"
                if isinstance(change, huggingface_hub.CommitOperationDelete):
                    store.rm_file(path)
                else:
                    store.put_file(change.path_or_fileobj, path)
            asked.append(len(changes))

    monkeypatch.setattr(huggingface_hub, "HfApi", Client)
    for module in (remote, upload):
        there = lambda url: (store, "/" + url.removeprefix("hf://"))  # noqa: E731
        monkeypatch.setattr(module, "filesystem", there)
    return asked


def card_at(store, url):
    return store.cat_file(f"{url}/README.md").decode()


def test_a_card_says_what_was_done(store, capsys):
    assert cli.run(["push", "clean", f"{PLACE}/"]) == 0
    assert f"files uploaded to {PLACE}" in capsys.readouterr().out
    card = card_at(store, PLACE)
    assert card.startswith("---\ntags:\n- snipdedup\n- deduplication\nconfigs:\n")
    assert "  data_files: metadata/*.parquet\n---\n\n# kept\n" in card
    assert (
        "A set of 300 images without near-duplicates: 90 rows (30.00 %) are removed, 210 are kept. "
        f"Made by snipdedup {snipdedup.__version__}.\n"
    ) in card
    for line in ("| threshold | 0.96 |", "| keep | max:width |", "| kept | 210 |",
                 "| removed | 90 |", "| checked | each removed row, on the raw features |",
                 "| seed | 0 |"):  # fmt: skip
        assert line in card.splitlines()
    size = (Path("clean") / "is_dup.npy").stat().st_size
    assert f"| one boolean a row of the whole set: True was removed | {size:,} |" in card
    here = {str(p.relative_to("clean")) for p in Path("clean").rglob("*") if p.is_file()}
    root = "/team/kept/"
    assert {name.removeprefix(root) for name in store.find(root)} == {*here, "README.md"}
    assert str(Path.cwd()) not in card
    assert not list(Path.cwd().glob("snip-*"))


def test_the_command_of_a_card_makes_the_same_again(store):
    pushed = snipdedup.push("clean", PLACE)
    (line,) = [line for line in pushed.card.splitlines() if line.startswith("snip ")]
    assert cli.run(shlex.split(line.replace("OUT", "again"))[1:]) == 0
    two = [atomic.load_json(Path(name) / MANIFEST) for name in ("clean", "again")]
    assert two[0]["outputs"] == two[1]["outputs"]


def test_cards_of_other_folders(store):
    write_photos(Path("photos"))
    assert cli.run(["embed", "photos", "--out", "embedded", "--threads", "1"]) == 0
    assert cli.run(["dedup", "embedded", "--out", "clean_photos", "--threads", "1"]) == 0
    count = atomic.load_json(Path("embedded") / MANIFEST)["counts"]["embedded"]
    card = snipdedup.push("embedded", "memory://team/features").card
    assert f"Features of {count:,} images by phash." in card
    assert "\nsnip embed photos --out OUT\n" in card
    assert "| model | phash |" in snipdedup.push("clean_photos", PLACE).card


def test_again_and_another_result(store, capsys):
    assert cli.run(["push", "clean", PLACE]) == cli.run(["push", "clean", PLACE]) == 0
    assert f"{PLACE} has it already" in capsys.readouterr().out
    store.pipe_file(f"{PLACE}/README.md", b"by a person")
    assert cli.run(["dedup", "clean", "--threshold", ".99", "--out", "stricter", "--pairs"]) == 0
    assert cli.run(["push", "stricter", PLACE]) == 1
    assert f"{PLACE} holds another finished result; choose" in capsys.readouterr().err
    assert cli.run(["push", "stricter", PLACE, "--overwrite"]) == 0
    assert "| threshold | 0.99 |" in card_at(store, PLACE)
    store.pipe_file("memory://team/own/README.md", b"by a person")
    assert cli.run(["push", "clean", "memory://team/own"]) == 0
    assert "its README.md is left as it was" in capsys.readouterr().out
    assert card_at(store, "memory://team/own") == "by a person"


def test_what_is_refused(store):
    for url in ("team/kept", "https://host/kept", "FILE:///kept", "s3:/team/kept"):
        with pytest.raises(UsageError, match="push needs the URL of a store"):
            snipdedup.push("clean", url)
    with pytest.raises(SnipError, match="expected a finished dedup folder"):
        snipdedup.push("metadata", PLACE)
    for url in ("hf://kept", "hf://datasets/kept", "hf://datasets/team/kept@main"):
        with pytest.raises(UsageError, match="expected hf://datasets/OWNER/NAME"):
            snipdedup.push("clean", url)
    np.save("clean/is_dup.npy", np.ones(300, bool))
    with pytest.raises(SnipError, match=r"clean/is_dup\.npy: not as snip wrote it"):
        snipdedup.push("clean", PLACE)
    assert store.find("/team") == []


def test_the_hub_gets_one_commit(store, hub):
    files = sum(path.is_file() for path in Path("clean").rglob("*"))
    snipdedup.push("clean", HUB)
    about = {"repo_type": "dataset", "private": True, "exist_ok": True}
    assert hub == [("team/kept", about), files + 1]
    at = f"/{HUB.removeprefix('hf://')}"
    assert json.loads(store.cat_file(f"{at}/{MANIFEST}"))["kind"] == "dedup"
    snipdedup.dedup("img_emb", threads=1, out=HUB, overwrite=True)  # without metadata
    assert not store.exists(f"{at}/metadata/metadata_0.parquet")
    assert store.cat_file(f"{at}/is_dup.npy")
