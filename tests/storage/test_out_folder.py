"""Who may write OUT, and how a new result takes the place of an earlier one."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from snipdedup.errors import SnipError, UsageError
from snipdedup.storage import atomic, locks, out_folder
from snipdedup.storage.out_folder import FORMAT, read_manifest, write_manifest


def everything_below(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


REQUEST = {"threshold": 0.95, "seed": 0}


def finish(out):
    (out / "is_dup.npy").write_bytes(b"mask")
    write_manifest(out, "dedup", {"request": REQUEST}, [out / "is_dup.npy"])


def test_a_new_folder_then_a_stopped_run_then_a_finished_one(tmp_path):
    out = tmp_path / "out"
    assert out_folder.claim(out, "dedup", REQUEST, overwrite=False) == "new"
    assert (
        out_folder.claim(out, "dedup", dict(reversed(REQUEST.items())), overwrite=False) == "resume"
    )
    finish(out)
    assert out_folder.claim(out, "dedup", REQUEST, overwrite=False) == "done"


def test_an_empty_folder_is_free(tmp_path):
    assert out_folder.claim(tmp_path, "dedup", REQUEST, overwrite=False) == "new"


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_of_another_request_is_refused_and_left_alone(tmp_path, finished):
    out = tmp_path / "out"
    out_folder.claim(out, "dedup", REQUEST, overwrite=False)
    if finished:
        finish(out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    found = r"other threshold \(0.95, now 0.9\). .*--overwrite"
    with pytest.raises(SnipError, match=found):
        out_folder.claim(out, "dedup", REQUEST | {"threshold": 0.9}, overwrite=False)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("finished", [True, False])
def test_overwrite_empties_the_work_and_leaves_the_rest(tmp_path, finished):
    out, other = tmp_path / "out", REQUEST | {"threshold": 0.9}
    out_folder.claim(out, "dedup", REQUEST, overwrite=False)
    if finished:
        finish(out)
    (out / "notes.txt").write_text("mine")
    (out / "work" / "tile.npz").write_bytes(b"old work")
    assert out_folder.claim(out, "dedup", other, overwrite=True) == "new"
    earlier = ["is_dup.npy", "notes.txt", "snip.json"] if finished else ["notes.txt"]
    assert everything_below(out) == [*earlier, "work", "work/request.json", "work/run.lock"]
    assert out_folder.claim(out, "dedup", other, overwrite=True) == "resume"


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_that_snip_did_not_write_is_refused(tmp_path, overwrite):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(SnipError, match="exists and is not a folder that snip wrote"):
        out_folder.claim(tmp_path, "dedup", REQUEST, overwrite=overwrite)
    with pytest.raises(SnipError, match="exists and is not a folder that snip wrote"):
        out_folder.claim(tmp_path / "thesis.tex", "dedup", REQUEST, overwrite=overwrite)
    assert everything_below(tmp_path) == ["thesis.tex"]


def test_a_finished_folder_of_another_kind_is_refused(tmp_path):
    write_manifest(tmp_path, "encoder", {"request": REQUEST}, [])
    for overwrite in (True, False):
        with pytest.raises(SnipError, match="expected a manifest of kind 'dedup'"):
            out_folder.claim(tmp_path, "dedup", REQUEST, overwrite=overwrite)


def test_overwrite_removes_nothing_outside_the_folder(tmp_path):
    out = tmp_path / "out"
    (tmp_path / "precious.npy").write_bytes(b"x")
    atomic.save_json(
        out / "snip.json",
        {"kind": "dedup", "outputs": {"../precious.npy": {}, str(tmp_path / "precious.npy"): {}}},
    )
    with pytest.raises(SnipError, match=r"names .*precious.npy, which is not in the folder"):
        write_result(out, REQUEST, ["a.npy"], overwrite=True)
    assert (tmp_path / "precious.npy").exists()


@pytest.mark.parametrize("finished", [True, False])
def test_an_overwrite_that_is_stopped_can_be_overwritten(tmp_path, monkeypatch, finished):
    out, other = tmp_path / "out", REQUEST | {"threshold": 0.9}
    out_folder.claim(out, "dedup", REQUEST, overwrite=False)
    if finished:
        finish(out)
    for name in ("empty_work", "save_json"):

        def stop(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr({"empty_work": locks}.get(name, atomic), name, stop)
            with pytest.raises(KeyboardInterrupt):
                out_folder.claim(out, "dedup", other, overwrite=True)
    assert out_folder.claim(out, "dedup", other, overwrite=True) in ("new", "resume")
    assert atomic.load_json(out / "work" / "request.json") == other


class Stops:
    """Raises KeyboardInterrupt before the n-th time that a name is changed or goes."""

    def __init__(self, patch, after):
        self.left = after
        for name in ("replace", "unlink", "rmdir"):
            patch.setattr(Path, name, self.stopping(getattr(Path, name)))

    def stopping(self, original):
        def stop(*given, **named):
            self.left -= 1
            if self.left == -1:
                raise KeyboardInterrupt
            return original(*given, **named)

        return stop


def write_result(out, request, names, overwrite=False):
    """Write a folder of files that hold the request, as a command does."""
    if out_folder.claim(out, "dedup", request, overwrite=overwrite) == "done":
        return "done"
    made = [out / "work" / "files" / name for name in names]
    for path in made:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(request))
    out_folder.publish(out, "dedup", {"request": request}, made)
    return "new"


def held(out):
    """Return what a reader finds: the request of the manifest, which all its files hold."""
    manifest = read_manifest(out, "dedup")
    for name, said in manifest["outputs"].items():
        assert atomic.sha256(out / name) == said["sha256"], name
        assert json.loads((out / name).read_text()) == manifest["request"]
    found = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    found = {name for name in found if not name.startswith("work/")}
    assert found == {*manifest["outputs"], "snip.json", "notes.txt"}
    return manifest["request"]


@pytest.mark.parametrize("next_one", ["reader", "same", "other"])
def test_an_overwrite_stopped_at_any_instant(tmp_path, monkeypatch, next_one):
    """A reader, or any run, finds the earlier result whole, or the new one; never a mixture."""
    earlier, later = REQUEST, REQUEST | {"threshold": 0.9}
    names = {"earlier": ["a.npy", "metadata/x.parquet", "metadata/y.parquet"],
             "later": ["a.npy", "b.npy", "metadata/x.parquet"]}  # fmt: skip
    seen = []
    for after in range(100):
        out = tmp_path / str(after)
        write_result(out, earlier, names["earlier"])
        (out / "notes.txt").write_text("mine")
        with monkeypatch.context() as patch, locks.released():
            stops = Stops(patch, after)
            try:
                write_result(out, later, names["later"], overwrite=True)
            except KeyboardInterrupt:
                seen.append(after)
        if next_one == "same":
            moving = (out / "work" / "new" / "snip.json").is_file()
            with locks.released():
                if moving:  # the search is finished, and is not made again
                    assert out_folder.claim(out, "dedup", later, overwrite=True) == "done"
                else:
                    write_result(out, later, names["later"], overwrite=True)
            assert held(out) == later
        elif next_one == "other":
            with locks.released():
                write_result(out, {"threshold": 0.8}, ["c.npy"], overwrite=True)
            assert held(out) == {"threshold": 0.8}
        else:
            seen[-1:] = [held(out)] if stops.left < 0 else seen[-1:]
        if next_one != "reader":
            assert not (out / "work").exists()
        if stops.left >= 0:
            break
    assert 10 < len(seen) < 99
    if next_one == "reader":
        first = seen.index(later)
        assert first > 2
        assert seen[:first] == [earlier] * first
        assert seen[first:] == [later] * (len(seen) - first)


def test_a_swap_that_is_under_way_is_waited_for_or_refused(tmp_path, monkeypatch):
    for after in range(20):  # until it is stopped where neither manifest stands
        out = tmp_path / str(after)
        write_result(out, REQUEST, ["a.npy"])
        (out / "notes.txt").write_text("mine")
        with monkeypatch.context() as patch, locks.released():
            Stops(patch, after)
            with pytest.raises(KeyboardInterrupt):
                write_result(out, REQUEST | {"threshold": 0.9}, ["a.npy", "b.npy"], overwrite=True)
        if not (out / "snip.json").is_file():
            break
    assert (out / "work" / "new" / "snip.json").is_file()
    monkeypatch.setattr(locks, "CLAIM_S", 0.05)
    with (out / "work" / "claim.lock").open("w") as other:
        assert locks.lock(other)
        with pytest.raises(SnipError, match="is being written by another run"):
            read_manifest(out, "dedup")
    assert held(out) == REQUEST | {"threshold": 0.9}


@pytest.mark.parametrize("name", ["../precious", "/etc/hostname", "a/../../precious"])
@pytest.mark.parametrize("which", ["snip.json", "work/new/snip.json"])
def test_a_new_result_moves_nothing_outside_the_folder(tmp_path, name, which):
    (tmp_path / "precious").write_text("x")
    atomic.save_json(tmp_path / "out" / "work" / "new" / "snip.json", {"outputs": {}})
    atomic.save_json(tmp_path / "out" / which, {"outputs": {name: {}}})
    with pytest.raises(SnipError, match=f"names {name}, which is not in the folder"):
        read_manifest(tmp_path / "out", "dedup")
    assert (tmp_path / "precious").read_text() == "x"


def test_who_was_taken_for_dead_replaces_nothing(tmp_path):
    """Another process went on, and ended the run; the first one wakes before it writes the end."""
    out = tmp_path / "out"

    def wakes():
        with locks.released():
            out_folder.claim(out, "dedup", REQUEST, overwrite=False, shared=True)
            other = threading.Thread(target=ends)
            other.start()
            other.join()
            part = out / "work" / "mine" / "a.npy"
            part.parent.mkdir(parents=True)
            part.write_text("other times")
            with pytest.raises(SnipError, match="another process finished this run"):
                out_folder.publish(out, "dedup", {"request": REQUEST}, [part])

    def ends():
        out_folder.claim(out, "dedup", REQUEST, overwrite=False, shared=True)
        made = out / "work" / "files" / "a.npy"
        made.parent.mkdir(parents=True)
        made.write_text(json.dumps(REQUEST))
        out_folder.publish(out, "dedup", {"request": REQUEST}, [made])

    thread = threading.Thread(target=wakes)
    thread.start()
    thread.join()
    (out / "notes.txt").write_text("mine")
    assert held(out) == REQUEST


DECIDED = REQUEST | {"key": None}


def test_a_stopped_run_goes_on_with_other_decisions(tmp_path):
    out, how = tmp_path / "out", {"overwrite": False, "decisions": {"key"}}
    assert out_folder.claim(out, "dedup", DECIDED, **how) == "new"
    other = DECIDED | {"key": "url"}
    assert out_folder.claim(out, "dedup", other, **how) == "resume"
    assert atomic.load_json(out / "work" / "request.json") == other
    with pytest.raises(SnipError, match="stopped run with other threshold"):
        out_folder.claim(out, "dedup", other | {"threshold": 0.9}, **how)
    assert out_folder.claim(out, "dedup", DECIDED, **{**how, "overwrite": True}) == "resume"
    part = out / "work" / "files" / "a.npy"
    part.parent.mkdir()
    part.write_text("x")
    out_folder.publish(out, "dedup", {"request": DECIDED}, [part])
    with pytest.raises(SnipError, match="finished run with other key"):
        out_folder.claim(out, "dedup", other, **how)


def test_those_who_share_a_run_agree_on_what_is_decided(tmp_path):
    out = tmp_path / "out"
    how = {"overwrite": False, "decisions": {"key"}, "shared": True}
    said = []

    def join(request):
        with locks.released():
            try:
                said.append(out_folder.claim(out, "dedup", request, **how))
            except SnipError as error:
                said.append(str(error))

    with locks.released():
        assert out_folder.claim(out, "dedup", DECIDED, **how) == "new"
        for request in (DECIDED, DECIDED | {"key": "url"}):
            thread = threading.Thread(target=join, args=(request,))
            thread.start()
            thread.join()
    assert said[0] == "resume"
    assert "stopped run with other key" in said[1]
    join(DECIDED | {"key": "url"})  # nobody is there now
    assert said[2] == "resume"


def test_a_claim_stopped_at_once_leaves_a_free_folder(tmp_path):
    out = tmp_path / "out"
    (out / "work").mkdir(parents=True)
    (out / "work" / ".request.json.x.part").write_bytes(b"{")
    assert out_folder.claim(out, "dedup", REQUEST, overwrite=False) == "new"


def test_someone_else_s_work_is_not_taken(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("x")
    with pytest.raises(SnipError, match="not a folder that snip wrote"):
        out_folder.claim(tmp_path, "dedup", REQUEST, overwrite=True)
    assert everything_below(tmp_path) == ["work", "work/thesis.tex"]


# ---- manifests


def test_manifest_round_trip(tmp_path):
    (tmp_path / "metadata").mkdir()
    (tmp_path / "metadata" / "a.parquet").write_bytes(b"rows")
    (tmp_path / "is_dup.npy").write_bytes(b"mask" * 1000)
    outputs = [tmp_path / "metadata" / "a.parquet", tmp_path / "is_dup.npy"]
    write_manifest(tmp_path, "dedup", {"counts": {"rows": 2**40}}, outputs)
    manifest = read_manifest(tmp_path, "dedup")
    assert manifest["counts"] == {"rows": 2**40}
    assert manifest["outputs"]["is_dup.npy"] == {
        "size": 4000,
        "sha256": hashlib.sha256(b"mask" * 1000).hexdigest(),
    }
    assert sorted(manifest["outputs"]) == ["is_dup.npy", "metadata/a.parquet"]
    assert manifest["versions"]["numpy"] == np.__version__
    assert {"snipdedup", "python", "torch", "faiss-cpu", "pyarrow"} <= set(manifest["versions"])


def test_manifests_that_do_not_vouch(tmp_path):
    with pytest.raises(SnipError, match=r"expected a finished index folder with snip.json, found"):
        read_manifest(tmp_path, "index")
    write_manifest(tmp_path, "encoder", {}, [])
    with pytest.raises(SnipError, match="expected a manifest of kind 'index', found 'encoder'"):
        read_manifest(tmp_path, "index")
    for other in ([], {"kind": "index"}, {"name": "x"}):
        atomic.save_json(tmp_path / "snip.json", other)
        if other == {"kind": "index"}:
            assert read_manifest(tmp_path, "index") == other
            continue
        with pytest.raises(SnipError, match="expected a manifest of kind 'index', found None"):
            read_manifest(tmp_path, "index")
    atomic.save_json(tmp_path / "snip.json", {"kind": "index", "format": FORMAT + 1})
    with pytest.raises(SnipError, match="written by a newer snipdedup"):
        read_manifest(tmp_path, "index")


def test_the_manifest_is_plain_json(tmp_path):
    write_manifest(tmp_path, "filter", {"a": 1}, [])
    assert json.loads((tmp_path / "snip.json").read_text(encoding="utf-8"))["kind"] == "filter"


# ---- input folders


def test_refuse_output_file(tmp_path):
    out = tmp_path / "out"
    (out / "metadata").mkdir(parents=True)
    for name in ("is_dup.npy", "metadata/m.parquet", "report.html"):
        (out / name).touch()
    write_manifest(out, "dedup", {}, [out / "is_dup.npy", out / "metadata" / "m.parquet"])
    (tmp_path / "link").symlink_to(out)
    (tmp_path / "to_mask.html").symlink_to(out / "is_dup.npy")
    for name in (
        "out/is_dup.npy", "out/snip.json", "out/metadata/m.parquet", "link/is_dup.npy",
        "out/metadata/../snip.json", "link/metadata/m.parquet", "to_mask.html", "new/snip.json",
    ):  # fmt: skip
        with pytest.raises(SnipError, match=r"is a file of .*would not be whole without it"):
            out_folder.refuse_output_file(tmp_path / name)
    stopped = tmp_path / "stopped"
    atomic.save_json(stopped / locks.WORK / locks.REQUEST, {})
    with pytest.raises(SnipError, match="is a file of"):
        out_folder.refuse_output_file(stopped / locks.WORK / "codes.npy")
    with pytest.raises(UsageError, match="is a folder; name a file to write"):
        out_folder.refuse_output_file(out)
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "/dev/null"):  # a file would be put in its place
        with pytest.raises(UsageError, match="is a device or a pipe"):
            out_folder.refuse_output_file(tmp_path / name)
    (tmp_path / "in.npy").touch()
    with pytest.raises(SnipError, match="is an input"):
        out_folder.refuse_output_file(tmp_path / "in.npy", [tmp_path / "in.npy"])
    for name in ("out/report.html", "out/new.html", "new/page.html", "work/page.html"):
        out_folder.refuse_output_file(tmp_path / name, [tmp_path / "in.npy"])


def test_refuse_output_inside(tmp_path):
    features = tmp_path / "set" / "img_emb"
    features.mkdir(parents=True)
    shard = features / "a.npy"
    shard.write_bytes(b"x")
    for out in (features, features / "out", features / "x" / "y", features / ".." / "img_emb"):
        with pytest.raises(SnipError, match="lies in the input folder"):
            out_folder.refuse_output_inside(out, [features])
    with pytest.raises(SnipError, match="lies in the input folder"):
        out_folder.refuse_output_inside(features, [shard])
    with pytest.raises(SnipError, match=r"a\.npy is an input"):
        out_folder.refuse_output_inside(features / ".." / "img_emb" / "a.npy", [shard])
    out_folder.refuse_output_inside(features / "out", [shard])  # a new folder beside a named file
    out_folder.refuse_output_inside(tmp_path / "set" / "out", [features, shard])
    out_folder.refuse_output_inside(tmp_path / "set" / "img_emb2", [features])
    (tmp_path / "link").symlink_to(features)
    with pytest.raises(SnipError, match="lies in the input folder"):
        out_folder.refuse_output_inside(tmp_path / "link" / "out", [features])
    with pytest.raises(SnipError, match="lies in the input folder"):
        out_folder.refuse_output_inside(features / "out", [tmp_path / "link"])


def test_long_values_are_cut_in_messages():
    said = out_folder.differences({"shards": list(range(1000))}, {"shards": None, "seed": 1})
    assert said[0] == "seed (null, now 1)"
    assert said[1].startswith("shards ([0, 1, 2")
    assert len(said[1]) < 200
