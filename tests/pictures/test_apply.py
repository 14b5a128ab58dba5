"""Files of removed rows move and come back: whatever stops it, nothing is lost or overwritten."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import snipdedup
from snipdedup import cli
from snipdedup.errors import SnipError, UsageError
from snipdedup.pictures import apply, moves

GROUP = 3  # pictures of one kind: the first stays
ODD = ["a b.jpg", "ü ñ 図.jpg", "two.tar.gz.jpg", "new\nline.jpg", "'\"$x;.jpg", "-flag.jpg"]


class PictureSet:
    """Files, and metadata of them as snip embed writes it: rows of one kind are copies."""

    def __init__(self, folder: Path, rows: list[tuple[str, int]], columns: dict | None = None):
        self.folder, self.photos = folder, folder / "photos"
        self.out, self.moved = folder / "clean", folder / "moved"
        for number, (name, _) in enumerate(rows):
            path = self.photos / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(path):
                path.write_bytes(f"{number} {name}".encode(errors="backslashreplace") * 20)
        self.paths = [str(self.photos / name) for name, _ in rows]
        digests = [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in self.paths]
        columns = {"key": [f"k{n}" for n in range(len(rows))], "path": self.paths,
                   "sha256": digests, **(columns or {})}  # fmt: skip
        x = [np.random.default_rng(kind).standard_normal(32) for _, kind in rows]
        for part in ("img_emb", "metadata"):
            (folder / "set" / part).mkdir(parents=True)
        np.save(folder / "set/img_emb/img_emb_0.npy", np.array(x, np.float16))
        pq.write_table(pa.table(columns), folder / "set/metadata/metadata_0.parquet")

    def dedup(self, *flags: object) -> None:
        words = ["dedup", self.folder / "set", "--out", self.out, *flags]
        assert cli.run([str(word) for word in words]) == 0

    def apply(self, **flags: object) -> apply.Applied:
        return snipdedup.apply(self.out, move=self.moved, **flags)

    def undo(self) -> apply.Applied:
        return snipdedup.apply(undo=self.moved)

    def is_removed(self) -> np.ndarray:
        return np.load(self.out / "is_dup.npy")

    def removed(self) -> set[str]:
        return {path for path, gone in zip(self.paths, self.is_removed(), strict=True) if gone}


def tree(folder: Path) -> dict[str, tuple[str, int]]:
    """Return the sha256 and the time of each file, but those that snip apply needs itself."""
    found = {}
    for above, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != moves.FOLDER]
        for name in names:
            path = Path(above, name)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(path.relative_to(folder))] = digest, path.stat().st_mtime_ns
    return found


def many(count: int) -> list[tuple[str, int]]:
    return [(f"{n % 7}/{n % 3}/picture {n}.jpg", n // GROUP) for n in range(count)]


def make(folder, rows, *flags, columns=None):
    made = PictureSet(folder, rows, columns)
    made.dedup(*flags)
    return made


@pytest.fixture
def few(tmp_path):
    """Two groups of three: of each the second and the third row go."""
    return make(tmp_path, [(f"{n // 3}/{n}.jpg", n // 3) for n in range(6)])


def refuse_wrong(made: PictureSet, before: dict) -> None:
    """Fail if a file is lost, changed or at a wrong place; a moved one may lie at both places."""
    here, there = tree(made.photos), tree(made.moved) if made.moved.exists() else {}
    there = {name: found for name, found in there.items() if not name.endswith(".part")}
    removed = {os.path.relpath(path, made.photos) for path in made.removed()}
    assert set(there) <= removed
    for name, found in before.items():
        assert here.get(name, found)[0] == there.get(name, found)[0] == found[0], name
        assert name in here or name in there, name
    assert {name for name in here if not name.endswith(".part")} <= set(before)


# ---- the way there and back


def test_removed_files_move_and_come_back(tmp_path):
    made = make(tmp_path, many(300))
    before = tree(made.photos)
    assert len(made.removed()) == 200
    done = made.apply()
    assert (done.moved, done.done, done.left) == (200, 0, [])
    here, there = tree(made.photos), tree(made.moved)
    assert {**here, **there} == before
    assert {str(made.photos / name) for name in there} == made.removed()
    assert "200 files moved" in str(done)
    again = made.apply()
    assert (again.moved, again.done, again.left) == (0, 200, [])
    back = made.undo()
    assert (back.moved, back.left) == (200, [])
    assert tree(made.photos) == before
    assert [path.name for path in made.moved.iterdir()] == [moves.FOLDER]
    assert made.undo().moved == 0
    assert made.apply().moved == 200
    assert tree(made.moved) == there


def test_a_dry_run_says_what_would_move_and_writes_nothing(few):
    before = tree(few.folder)
    done = few.apply(dry_run=True)
    assert "4 files of removed rows; 4 would be moved" in str(done)
    assert f"{few.photos}/0/1.jpg -> {few.moved}/0/1.jpg" in str(done)
    assert not few.moved.exists()
    assert tree(few.folder) == before
    few.apply()
    moved = tree(few.folder)
    assert "4 files would be put back" in str(snipdedup.apply(undo=few.moved, dry_run=True))
    assert tree(few.folder) == moved


def test_a_dry_run_shows_no_file_that_moved_already(few):
    few.apply()
    few.undo()
    moved = few.moved / "0/1.jpg"
    moved.parent.mkdir()
    Path(few.paths[1]).rename(moved)
    said = str(few.apply(dry_run=True))
    assert "3 would be moved" in said
    assert "1 were moved already" in said
    assert said.count(" -> ") == 3
    assert f"{few.paths[1]} -> " not in said


def test_reasons_are_counted_whatever_their_paths(few):
    few.moved = few.folder / "mo\nved"
    few.apply()
    few.undo()
    for name in ("0/1.jpg", "1/4.jpg"):
        (few.moved / name).parent.mkdir()
        (few.moved / name).write_bytes(b"mine")
    said = str(few.apply())
    assert "  2: something else is at its place\n" in said
    assert "mo\nved" not in said
    assert json.dumps(str(few.moved)) in said


def test_names_of_any_letters(tmp_path, capsys):
    made = make(tmp_path, [(f"{kind}/{name}", kind) for kind, name in enumerate(ODD * 2)]
                + [(f"x/{kind}{name}", kind) for kind, name in enumerate(ODD * 2)])  # fmt: skip
    before = tree(made.photos)
    assert made.apply().moved == len(ODD) * 2
    refuse_wrong(made, before)
    assert made.undo().moved == len(ODD) * 2
    assert tree(made.photos) == before
    assert "\nline" not in str(made.apply(dry_run=True))


def test_a_name_that_is_no_utf8_is_left(tmp_path):
    name = b"caf\xe9.jpg".decode(errors="surrogateescape")
    made = PictureSet(tmp_path, [("a.jpg", 0)])
    (made.photos / name).write_bytes(b"x")
    written = str(made.photos / name).encode(errors="backslashreplace").decode()  # as snip embed
    table = pa.table({
        "path": [made.paths[0], written],
        "sha256": [hashlib.sha256(Path(p).read_bytes()).hexdigest()
                   for p in (made.paths[0], made.photos / name)],
    })  # fmt: skip
    pq.write_table(table, tmp_path / "set/metadata/metadata_0.parquet")
    np.save(tmp_path / "set/img_emb/img_emb_0.npy", np.ones((2, 8), np.float16))
    made.dedup()
    assert made.apply().left == [(written, moves.MISSING)]
    assert (made.photos / name).read_bytes() == b"x"


# ---- files that stay


def test_a_file_that_changed_since_it_was_embedded_stays(few):
    changed, gone = few.photos / "0/1.jpg", few.photos / "0/2.jpg"
    changed.write_bytes(b"edited")
    gone.unlink()
    done = few.apply()
    assert done.moved == 2
    assert done.left == [(str(changed), "its bytes changed"), (str(gone), moves.MISSING)]
    assert changed.read_bytes() == b"edited"
    left = pq.read_table(few.moved / moves.FOLDER / moves.LEFT).to_pylist()
    assert [(row["path"], row["reason"]) for row in left] == done.left
    assert "2 files are left where they are" in str(done)


@pytest.mark.parametrize("what", ["missing", "changed", "folder"])
def test_the_last_copy_never_moves(few, what):
    stays = few.photos / "0/0.jpg"
    stays.unlink()
    if what == "changed":
        stays.write_bytes(b"another picture")
    elif what == "folder":
        stays.mkdir()
    done = few.apply()
    assert done.moved == 2
    assert [name for name, _ in done.left] == [str(few.photos / f"0/{n}.jpg") for n in (1, 2)]
    assert all("the picture that stays for it" in reason for _, reason in done.left)
    assert not (few.moved / "0").exists()


def test_a_file_goes_only_if_all_its_rows_do(tmp_path):
    rows = [("a.jpg", 0), ("b.jpg", 0), ("b.jpg", 1), ("c.jpg", 0), ("c.jpg", 0), ("d.jpg", 2)]
    made = make(tmp_path, rows)  # b.jpg is removed for a.jpg, and stays as the only one of kind 1
    assert made.is_removed().tolist() == [False, True, False, True, True, False]
    done = made.apply()
    assert (done.moved, done.left) == (1, [])
    assert list(tree(made.moved)) == ["c.jpg"]


def test_rows_that_disagree_about_a_file(tmp_path):
    made = PictureSet(tmp_path, [("a.jpg", 0), ("b.jpg", 0), ("b.jpg", 0), ("c.jpg", 0)])
    path = tmp_path / "set/metadata/metadata_0.parquet"
    table = pq.read_table(path).to_pydict()
    table["sha256"][2] = "0" * 64
    table["sha256"][3] = None
    pq.write_table(pa.table(table), path)
    made.dedup()
    assert made.apply().left == [(made.paths[1], apply.NO_HASH), (made.paths[3], apply.NO_HASH)]


def test_links_of_both_kinds(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for name in ("kept.jpg", "gone.jpg", "target.jpg"):
        (photos / name).write_bytes(name.encode())
    os.link(photos / "kept.jpg", photos / "hard.jpg")  # of a file that stays
    os.link(photos / "gone.jpg", photos / "gone too.jpg")  # of one that goes
    (photos / "soft.jpg").symlink_to("kept.jpg")
    (photos / "points.jpg").symlink_to("target.jpg")  # a link stays, the file that it needs goes
    made = make(tmp_path, [("kept.jpg", 0), ("gone.jpg", 0), ("gone too.jpg", 0), ("hard.jpg", 0),
                           ("soft.jpg", 0), ("points.jpg", 1), ("target.jpg", 1)])  # fmt: skip
    done = made.apply()
    assert done.moved == 2
    assert dict(done.left) == {made.paths[n]: apply.IS_KEPT for n in (3, 4, 6)}
    assert (photos / "points.jpg").read_bytes() == b"target.jpg"
    assert set(tree(made.moved)) == {"gone.jpg", "gone too.jpg"}
    assert made.undo().moved == 2
    assert (photos / "gone.jpg").samefile(photos / "gone too.jpg")


def test_a_link_to_a_file_elsewhere_stays(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "elsewhere.jpg").write_bytes(b"elsewhere")
    (tmp_path / "photos/b.jpg").symlink_to(tmp_path / "elsewhere.jpg")
    made = make(tmp_path, [("a.jpg", 0), ("b.jpg", 0)])
    assert made.apply().left == [(made.paths[1], "it is no plain file (a link?)")]
    assert (tmp_path / "photos/b.jpg").is_symlink()


@pytest.mark.parametrize(
    "path", ["{0}/photos/../photos/b.jpg", "photos/b.jpg", "s3://x/b.jpg", "{0}/\0", "{0}/\0/b.jpg"]
)
def test_a_path_that_is_not_plain_stays(tmp_path, path):
    """The others move and come back."""
    made = PictureSet(tmp_path, [("a.jpg", 0), ("b.jpg", 0), ("c.jpg", 0)])
    before = tree(made.photos)
    table = pq.read_table(tmp_path / "set/metadata/metadata_0.parquet").to_pydict()
    table["path"][1] = path.format(tmp_path)
    pq.write_table(pa.table(table), tmp_path / "set/metadata/metadata_0.parquet")
    made.dedup()
    left = [(table["path"][1], apply.NO_PATH)]
    done, again = made.apply(), made.apply()
    assert (done.moved, done.left, again.moved, again.left) == (1, left, 0, left)
    assert list(tree(made.moved)) == ["c.jpg"]
    back = made.undo()
    assert (back.moved, back.left) == (1, [])
    assert tree(made.photos) == before
    table["path"] = [path.format(tmp_path), *made.paths[1:]]  # of the row that stays
    pq.write_table(pa.table(table), tmp_path / "set/metadata/metadata_0.parquet")
    shutil.rmtree(made.out)
    made.dedup()
    assert [name for name, _ in made.apply().left] == made.paths[1:]
    assert tree(made.photos) == before


def test_representatives_that_are_removed_too_are_followed():
    is_dup = np.array([False, True, True, True, True, True, True])
    path = Path("unused")

    class Found:
        row = np.array([0, 1, 2, 3, 4, 5])
        representative = np.array([0, 0, 1, 2, 5, 4])  # 4 and 5: a ring; 6 is in no group
        is_dup = np.array([False, True, True, True, True, True])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apply, "whole_groups", lambda _: [Found])
        assert apply.final_representatives(path, is_dup).tolist() == [0, 0, 0, 0, -1, -1, -1]
        Found.representative = np.array([0, ~0, 1, 2, 3, 0])
        assert apply.final_representatives(path, is_dup).tolist()[1:] == [-2, -2, -2, -2, 0, -1]


@pytest.mark.parametrize(
    "flags",
    [("--method", "semdedup", "--clusters", 1, "--epsilon", ".05"), ("--grouping", "components")],
)
def test_other_methods(tmp_path, flags):
    made = make(tmp_path, many(60), *flags)
    before = tree(made.photos)
    done = made.apply()
    assert done.left == []
    assert done.moved == len(made.removed()) == 40
    refuse_wrong(made, before)


def test_rows_removed_for_a_reference_stay(tmp_path):
    made = PictureSet(tmp_path, many(9))
    np.save(tmp_path / "other.npy", np.load(tmp_path / "set/img_emb/img_emb_0.npy")[:1])
    made.dedup("--reference", tmp_path / "other.npy")
    done = made.apply()
    assert done.moved == 4
    assert [reason for _, reason in done.left] == [apply.NO_FILE] * 3


# ---- nothing is overwritten


def test_what_came_to_a_place_stays(few):
    few.apply()
    before, taken, edited = few.photos / "0/1.jpg", few.moved / "0/1.jpg", few.moved / "1/4.jpg"
    before.write_bytes(b"a new picture")
    edited.write_bytes(b"edited")
    (few.moved / "1/mine.txt").write_bytes(b"mine")
    done = few.undo()
    assert done.moved == 2
    assert dict(done.left) == {
        str(taken): f"something else is at its place: {before}", str(edited): "its bytes changed"
    }  # fmt: skip
    assert before.read_bytes() == b"a new picture"
    assert (few.moved / "1/mine.txt").read_bytes() == b"mine"
    again = few.apply()  # 0/1.jpg is another picture now, the old one stays where it is
    assert again.moved == 2
    assert dict(again.left) == {str(before): "its bytes changed"}
    assert taken.is_file()


def test_a_place_that_is_taken_in_the_folder(few):
    few.apply()
    few.undo()
    (few.moved / "0").mkdir()
    (few.moved / "0/1.jpg").write_bytes(b"mine")
    done = few.apply()
    taken = few.moved / "0/1.jpg"
    assert done.left == [(str(few.photos / "0/1.jpg"), f"something else is at its place: {taken}")]
    assert (few.moved / "0/1.jpg").read_bytes() == b"mine"


@pytest.mark.parametrize("number", [errno.EPERM, errno.EXDEV])
def test_a_file_that_comes_at_the_last_moment_is_not_overwritten(few, monkeypatch, number):
    """Also where there are no hard links, and between file systems."""
    real = os.link

    def late(source, target, **flags):
        if str(target).endswith("0/1.jpg") and not os.path.lexists(target):
            Path(target).write_bytes(b"mine")
        if number == errno.EXDEV and not str(source).endswith(".part"):
            raise OSError(number, "other file system")
        if number == errno.EPERM:
            raise OSError(number, "no links here")
        real(source, target, **flags)

    monkeypatch.setattr(os, "link", late)
    before = tree(few.photos)
    done = few.apply(threads=1)
    taken = few.moved / "0/1.jpg"
    assert done.moved == 3
    assert done.left == [(str(few.photos / "0/1.jpg"), f"something came to its place: {taken}")]
    assert taken.read_bytes() == b"mine"
    assert tree(few.photos)["0/1.jpg"] == before["0/1.jpg"]
    assert len(tree(few.moved)) == 4
    taken.unlink()
    few.undo()
    assert tree(few.photos) == before


def test_old_and_new_place_are_one(few):
    """The folder of photos was put at the place of the moved ones by hand: a link leads there."""
    few.apply()
    shutil.rmtree(few.photos / "0")
    (few.photos / "0").symlink_to(few.moved / "0")
    held = tree(few.moved)
    done = few.undo()
    assert done.moved == 2
    assert {reason for _, reason in done.left} == {
        "its old and new place are one, by a link or a mount"
    }
    assert set(held) - set(tree(few.moved)) == {"1/4.jpg", "1/5.jpg"}
    assert (few.moved / "0/1.jpg").is_file()


# ---- refusals


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({}, "give one of --move, --link and --undo"),
        ({"move": "a", "link": "b", "out": "c"}, "give one of --move, --link and --undo"),
        ({"move": "a"}, "--move needs OUT"),
        ({"undo": "a", "out": "b"}, "--undo needs the folder alone"),
        ({"move": "s3://a/b", "out": "b"}, "expected a local path"),
    ],
)
def test_wrong_usage(flags, said):
    with pytest.raises(UsageError, match=said):
        snipdedup.apply(**flags)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"tar": ["/x/0.tar"] * 6, "member": ["a"] * 6}, "lie in tars; .*--export keys"),
        ({"parquet": ["/x/0.parquet"] * 6}, "lie in parquet files; .*snip filter FILES"),
        ({"url": ["x"] * 6}, "expected the columns path and sha256"),
        (
            {"path": ["/x/0.jpg"] * 6, "sha256": ["0"] * 6, "tar": [None, "/x/0.tar"] * 3},
            "lie in tars",
        ),
        (
            {"path": pa.nulls(6, pa.string()), "video": ["/x/0.mp4"] * 6, "sha256": ["0"] * 6},
            "no row names a file of its own in the column path; frames of videos cannot be moved",
        ),
    ],
)
def test_pictures_that_are_no_files(tmp_path, columns, said):
    made = PictureSet(tmp_path, many(6))
    pq.write_table(
        pa.table({"key": list("abcdef"), **columns}), tmp_path / "set/metadata/metadata_0.parquet"
    )
    made.dedup()
    with pytest.raises(SnipError, match=said):
        made.apply()
    assert not made.moved.exists()


def test_paths_that_a_table_of_pictures_names_itself(tmp_path, snip):
    """They are columns of a stranger, and are kept as such: these files were never read."""
    from odd_files import photo

    data, originals = [], []
    for n in range(3):
        originals.append(tmp_path / f"{n}.png")
        photo(n // 2, (160, 120)).save(originals[-1])
        data.append(originals[-1].read_bytes())
    names = list(map(str, originals))
    own = {"path": names, "Tar": ["x"] * 3, "second": [0] * 3, "source_path": ["y"] * 3}
    pq.write_table(pa.table({"image": data, **own}), tmp_path / "set.parquet")
    snip("embed", tmp_path / "set.parquet", "--out", "set", cwd=tmp_path)
    table = pq.read_table(tmp_path / "set/metadata/metadata_0000.parquet").to_pydict()
    assert not {"path", "Tar", "second"} & set(table)
    assert table["source_source_path"] == names
    assert table["source_path"] == ["y"] * 3
    snip("dedup", "set", "--out", "clean", cwd=tmp_path)
    assert np.load(tmp_path / "clean/is_dup.npy").sum() == 1
    with pytest.raises(SnipError, match="lie in parquet files"):
        snipdedup.apply(tmp_path / "clean", move=tmp_path / "moved")
    assert all(path.exists() for path in originals)
    done = snip("report", "clean", cwd=tmp_path)
    assert "pictures of 2 of the 2 rows shown" in done.stdout


def test_folders_that_are_refused(few):
    (few.folder / "full").mkdir()
    (few.folder / "full/thesis.tex").write_text("x")
    for place, said in {
        few.folder / "full": "exists and is not a folder of snip apply",
        few.photos / "moved": "the folder of the pictures",
        few.out / "moved": "lies in the input folder",
        few.folder / "set/metadata/moved": "lies in the input folder",
    }.items():
        for flags in ({"move": place}, {"link": place}):
            with pytest.raises(SnipError, match=said):
                snipdedup.apply(few.out, **flags)
    with pytest.raises(SnipError, match=r"found no snip_apply/moves.jsonl"):
        snipdedup.apply(undo=few.folder / "full")
    assert len(tree(few.photos)) == 6


def test_a_result_that_was_changed_is_refused(few):
    mask = few.is_removed()
    np.save(few.out / "is_dup.npy", ~mask)
    with pytest.raises(SnipError, match=r"is_dup.npy: changed since snip dedup wrote it"):
        few.apply()


def test_metadata_that_is_gone_can_be_named(few):
    shutil.move(few.folder / "set/metadata", few.folder / "other")
    with pytest.raises(SnipError, match="name it with --metadata"):
        few.apply()
    assert few.apply(metadata=few.folder / "other").moved == 4


def rewrite(made, change, place="set/metadata/metadata_0.parquet"):
    """Write metadata anew, changed, into another file or the same."""
    table = pq.read_table(made.folder / "set/metadata/metadata_0.parquet").to_pydict()
    change(table)
    pq.write_table(pa.table(table), made.folder / place)


def swap(table, name, one, other):
    table[name][one], table[name][other] = table[name][other], table[name][one]


def test_metadata_that_was_made_anew_is_refused(tmp_path, snip):
    """Copies a and b, and c: b and c change their names, so b is the only one of its kind."""
    from odd_files import photo

    photos = tmp_path / "photos"
    photos.mkdir()
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        photo(seed, (160, 120)).save(photos / f"{name}.png")
    snip("embed", photos, "--out", "set", cwd=tmp_path)
    snip("dedup", "set", "--out", "clean", cwd=tmp_path)
    (photos / "b.png").rename(photos / "x.png")
    (photos / "c.png").rename(photos / "b.png")
    (photos / "x.png").rename(photos / "c.png")
    size = (tmp_path / "set/metadata/metadata_0000.parquet").stat().st_size
    snip("embed", photos, "--out", "set", "--overwrite", cwd=tmp_path)
    assert (tmp_path / "set/metadata/metadata_0000.parquet").stat().st_size == size
    before = tree(photos)
    with pytest.raises(SnipError, match=r"metadata_0000.parquet: written anew since the run of"):
        snipdedup.apply(tmp_path / "clean", move=tmp_path / "moved")
    with pytest.raises(SnipError, match="its keys, paths or sha256s are not those of the table"):
        snipdedup.apply(
            tmp_path / "clean", move=tmp_path / "moved", metadata=tmp_path / "set/metadata"
        )
    assert tree(photos) == before
    assert not (tmp_path / "moved").exists()


def test_a_copy_of_the_metadata_may_be_named(few):
    rewrite(few, lambda table: table.update(caption=["x"] * 6), "copy.parquet")
    os.utime(few.folder / "set/metadata/metadata_0.parquet", (10**9, 10**9))
    with pytest.raises(SnipError, match="written anew since the run"):
        few.apply()
    assert few.apply(metadata=few.folder / "copy.parquet").moved == 4


@pytest.mark.parametrize(
    "change",
    [
        lambda table: swap(table, "key", 1, 4),
        lambda table: table.pop("key"),
        lambda table: swap(table, "path", 0, 3),
        lambda table: swap(table, "sha256", 0, 3),
    ],
)
def test_other_metadata_of_as_many_rows_is_refused(few, change):
    rewrite(few, change, "other.parquet")
    before = tree(few.photos)
    with pytest.raises(SnipError, match="its keys, paths or sha256s are not those of the table"):
        few.apply(metadata=few.folder / "other.parquet")
    assert tree(few.photos) == before


def test_a_folder_of_another_result_is_refused_until_it_is_undone(few):
    few.apply()
    shutil.rmtree(few.out)
    few.dedup("--keep", "last")
    with pytest.raises(SnipError, match="holds the files of another result"):
        few.apply()
    few.undo()
    assert few.apply().moved == 4
    assert set(tree(few.moved)) == {"0/0.jpg", "0/1.jpg", "1/3.jpg", "1/4.jpg"}


def test_one_run_at_a_time(few, processes, tmp_path):
    few.apply()
    with locked(few.moved):
        run = processes("apply", "--undo", few.moved, cwd=tmp_path)
        assert run.wait() == 1
        assert "files are being moved by another run" in run.said()
    assert len(tree(few.moved)) == 4


def locked(folder):
    from contextlib import contextmanager

    from snipdedup.storage import locks

    @contextmanager
    def held():
        with locks.released():
            moves.lock(folder)
            yield

    return held()


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda lines: lines[:-1], "damaged: it does not hold the moves"),
        (lambda lines: [*lines[:-1], lines[-1][:40]], "cannot be read as a log"),
        (lambda lines: [*lines[:-1], lines[-1].replace('"1/5.jpg"', '"../5.jpg"')], "damaged"),
        (lambda lines: [lines[0].replace('"format": 1', '"format": 2'), *lines[1:]], "newer"),
        (lambda lines: ["{}"], "cannot be read as a log"),
    ],
)
def test_a_damaged_log_is_refused(few, spoil, said):
    few.apply()
    log = few.moved / moves.FOLDER / moves.LOG
    log.write_text("\n".join(spoil(log.read_text().splitlines())))
    held = tree(few.folder)
    for call in (few.undo, few.apply):
        with pytest.raises(SnipError, match=said):
            call()
    assert (
        tree(few.photos).items()
        <= {name.removeprefix("photos/"): found for name, found in held.items()}.items()
    )
    assert len(tree(few.moved)) == 4


# ---- links to what stays


def test_a_folder_of_links_to_what_stays(few, monkeypatch):
    before, place = tree(few.photos), few.folder / "kept"
    (few.photos / "1/3.jpg").unlink()
    done = snipdedup.apply(few.out, link=place, dry_run=True)
    assert (done.moved, place.exists()) == (1, False)
    done = snipdedup.apply(few.out, link=place)
    assert (done.moved, done.left) == (1, [(few.paths[3], moves.MISSING)])
    assert (place / "0/0.jpg").readlink() == few.photos / "0/0.jpg"
    (few.photos / "1/3.jpg").write_bytes(b"it is back")
    monkeypatch.setattr(Path, "symlink_to", refuses)
    done = snipdedup.apply(few.out, link=place)
    assert (done.moved, done.done, done.left) == (1, 1, [])
    assert not (place / "1/3.jpg").is_symlink()
    assert (place / "1/3.jpg").samefile(few.photos / "1/3.jpg")
    assert set(tree(few.photos)) == set(before)
    with pytest.raises(SnipError, match="found no"):
        snipdedup.apply(undo=place)
    with pytest.raises(SnipError, match="is not a folder of snip apply --move"):
        snipdedup.apply(few.out, move=place)
    shutil.rmtree(few.out)
    few.dedup("--keep", "last")
    with pytest.raises(SnipError, match="holds links of another result"):
        snipdedup.apply(few.out, link=place)


def refuses(*_, **__):
    raise OSError(errno.EPERM, "no links here")


def test_what_is_at_the_place_of_a_link_stays(few):
    place = few.folder / "kept"
    snipdedup.apply(few.out, link=place)
    (place / "0/0.jpg").unlink()
    (place / "0/0.jpg").write_bytes(b"mine")
    done = snipdedup.apply(few.out, link=place)
    assert (done.moved, done.done) == (0, 1)
    assert done.left == [(few.paths[0], f"something else is at its place: {place}/0/0.jpg")]


# ---- stopped at any step


class Stopped(BaseException):
    """As a kill: nothing catches it."""


STEPS = [
    (os, "link"), (os, "fsync"), (Path, "unlink"), (Path, "rename"), (Path, "replace"),
    (Path, "mkdir"), (Path, "rmdir"), (shutil, "copystat"), (shutil, "copyfileobj"),
]  # fmt: skip


def stop_at(patch, number):
    """Let step ``number`` of those that write stop all; return a list of the steps done."""
    done = []

    def wrapped(name, real):
        def step(*args, **flags):
            done.append(name)
            if len(done) > number:
                if name == "copyfileobj" and len(done) == number + 1:  # half of it
                    args[1].write(args[0].read(7))
                raise Stopped
            return real(*args, **flags)

        return step

    for place, name in STEPS:
        patch.setattr(place, name, wrapped(name, getattr(place, name)))
    return done


def no_links(source, target, **_):
    raise OSError(errno.EPERM, "no hard links here")


def other_system(real):
    """As `os.link` between file systems: a copy is made first."""

    def link(source, target, **flags):
        if not str(source).endswith(".part"):
            raise OSError(errno.EXDEV, "another file system")
        real(source, target, **flags)

    return link


@pytest.mark.parametrize("system", ["one", "two", "without hard links"])
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("then", ["apply", "undo"])
def test_stopped_at_each_step_then_done_or_undone(tmp_path, system, back, then):
    made = make(tmp_path, [("a/0.jpg", 0), ("a/1.jpg", 0), ("2.jpg", 0)])
    before, real = tree(made.photos), os.link
    number, steps = 0, {"one": 8, "two": 14, "without hard links": 8}[system]
    with pytest.MonkeyPatch.context() as outer:
        if system != "one":
            outer.setattr(os, "link", no_links if system != "two" else other_system(real))
        while True:
            shutil.rmtree(made.moved, ignore_errors=True)
            if back:
                made.apply(threads=1)
            with pytest.MonkeyPatch.context() as patch:
                stop_at(patch, number)
                try:
                    snipdedup.apply(undo=made.moved) if back else made.apply(threads=1)
                    break
                except Stopped:
                    number += 1
            refuse_wrong(made, before)
            log = made.moved / moves.FOLDER / moves.LOG
            if then == "apply":
                made.apply(threads=1)
                assert set(tree(made.moved)) == {"a/1.jpg", "2.jpg"}
                assert tree(made.photos).keys() == {"a/0.jpg"}
                assert {**tree(made.photos), **tree(made.moved)} == before
                assert list(tmp_path.rglob("*.part")) == []
            if log.exists():  # else nothing moved yet
                made.undo()
                assert list(tmp_path.rglob("*.part")) == []
            assert tree(made.photos) == before
    assert number > steps


def other_folder(folder):
    """Return a new folder on another file system; skip where there is none."""
    place = Path("/dev/shm")
    if not os.access(place, os.W_OK) or place.stat().st_dev == folder.stat().st_dev:
        pytest.skip("no second file system at /dev/shm")
    return place / f"snip-test-{os.getpid()}-{time.monotonic_ns()}"


def test_another_file_system(tmp_path):
    made = make(tmp_path, many(60))
    made.moved = other_folder(tmp_path)
    os.utime(made.paths[1], (10**9, 10**9))
    Path(made.paths[1]).chmod(0o640)
    before = tree(made.photos)
    try:
        assert made.apply().moved == 40
        assert {**tree(made.photos), **tree(made.moved)} == before
        assert (
            made.moved / os.path.relpath(made.paths[1], made.photos)
        ).stat().st_mode & 0o777 == 0o640
        assert made.undo().moved == 40
        assert tree(made.photos) == before
        assert Path(made.paths[1]).stat().st_mode & 0o777 == 0o640
    finally:
        shutil.rmtree(made.moved)


def test_a_copy_that_differs_is_not_taken(few, monkeypatch):
    monkeypatch.setattr(os, "link", other_system(os.link))
    monkeypatch.setattr(shutil, "copyfileobj", lambda source, target, size: target.write(b"wrong"))
    before = tree(few.photos)
    done = few.apply()
    assert done.moved == 0
    assert {reason for _, reason in done.left} == {
        "it was changed just now, or its copy is damaged"
    }
    assert tree(few.photos) == before
    assert tree(few.moved) == {}


def test_a_file_that_changes_between_its_check_and_its_move(few, monkeypatch):
    real = moves.transfer

    def late(way, sha256, found):
        if way.begin.name == "1.jpg":
            way.begin.write_bytes(b"just edited")
        return real(way, sha256, found)

    monkeypatch.setattr(moves, "transfer", late)
    done = few.apply()
    assert done.left == [(few.paths[1], "it was changed just now")]
    assert Path(few.paths[1]).read_bytes() == b"just edited"


@pytest.mark.parametrize("what", ["gone", "edited"])
def test_a_picture_that_goes_after_the_check_of_its_copy(few, monkeypatch, what):
    """As if another run had moved the file that stays, after it was read and before the move."""
    stays, real = Path(few.paths[0]), moves.obstacle

    def late(way, move, others, seen):
        found = real(way, move, others, seen)
        if way.begin == Path(few.paths[2]):
            stays.unlink()
            if what == "edited":
                stays.write_bytes(b"edited")
        return found

    monkeypatch.setattr(moves, "obstacle", late)
    done = few.apply(threads=1)
    assert (few.paths[2], f"{moves.CHANGED}: {stays}") in done.left
    assert Path(few.paths[2]).exists()
    assert not (few.moved / "0/2.jpg").exists()


def test_what_stays_is_another_file_and_is_read_again_once_it_changes(few):
    one, other = Path(few.paths[0]), Path(few.paths[1])
    move = moves.Move(str(other), "b", moves.digest(other), ((str(one), moves.digest(one)),))
    way, seen = moves.Way(other, few.moved / "b", few.moved / "part"), {}
    assert moves.obstacle(way, move, move.stays, seen) == moves.FREE
    one.write_bytes(b"edited")
    assert moves.obstacle(way, move, move.stays, seen) == f"{moves.CHANGED}: {one}"
    one.unlink()
    os.link(other, one)
    same = ((str(one), move.sha256),)
    assert "is the same file, by another name" in moves.obstacle(way, move, same, {})


def test_a_folder_that_cannot_be_written_stops_it_in_one_line(few, monkeypatch):
    real = os.link

    def full(source, target, **flags):
        if str(target).endswith("1/4.jpg"):
            raise OSError(errno.EXDEV, "")
        real(source, target, **flags)

    def no_space(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", full)
        patch.setattr(shutil, "copyfileobj", no_space)
        with pytest.raises(SnipError, match=r"cannot move .*4.jpg: No space left .*run it again"):
            few.apply(threads=1)
    assert few.apply().moved == 2
    assert len(tree(few.moved)) == 4


# ---- killed


def killed_and_done(made, processes, kills, rng, second=None):
    """Kill runs at random instants, in both directions; then let both end."""
    before = tree(made.photos)
    words = {
        "apply": ("apply", made.out, "--move", made.moved),
        "undo": ("apply", "--undo", made.moved),
    }
    usual, stopped = {}, 0

    def whole(name):
        start = time.monotonic()
        run = processes(*words[name], cwd=made.folder)
        assert run.wait() == 0, run.said()
        usual[name] = time.monotonic() - start

    whole("apply")
    whole("undo")
    assert tree(made.photos) == before
    turns = 0
    while stopped < kills:
        turns += 1
        assert turns < 20 * kills
        name = ("apply", "undo")[int(rng.random() < 0.5)]
        run = processes(*words[name], cwd=made.folder)
        time.sleep(rng.uniform(0, usual[name]))
        stopped += run.kill() == -9
        refuse_wrong(made, before)
    whole("apply")
    assert {**tree(made.photos), **tree(made.moved)} == before
    assert {str(made.photos / name) for name in tree(made.moved)} == made.removed()
    assert list(made.folder.rglob("*.part")) == []
    whole("undo")
    assert tree(made.photos) == before
    assert tree(made.moved) == {}


def test_killed_at_random(tmp_path, processes):
    made = make(tmp_path, many(300))
    killed_and_done(made, processes, 3, np.random.default_rng(6))


@pytest.mark.slow
@pytest.mark.parametrize("system", ["one", "two"])
def test_ten_thousand_files_and_twenty_kills(tmp_path, processes, system):
    made = make(tmp_path, many(15_000))
    assert len(made.removed()) == 10_000
    if system == "two":
        made.moved = other_folder(tmp_path)
    try:
        killed_and_done(made, processes, 20, np.random.default_rng(20))
    finally:
        shutil.rmtree(made.moved, ignore_errors=True)


# ---- with the commands before it


def test_pictures_that_snip_embed_read(tmp_path, snip):
    from PIL import Image

    photos, rng = tmp_path / "photos", np.random.default_rng(3)
    for n in range(12):
        pixels = rng.integers(0, 255, (12, 16, 3)).astype(np.uint8)
        picture = Image.fromarray(pixels).resize((160, 120), Image.Resampling.BICUBIC)
        (photos / f"album {n % 3}").mkdir(parents=True, exist_ok=True)
        picture.save(photos / f"album {n % 3}/bild ü {n}.png")
        if n % 2:
            picture.save(photos / f"again {n}.v2.jpg", quality=60)
    before = tree(photos)
    snip("embed", photos, "--out", "set", cwd=tmp_path)
    snip("dedup", "set", "--threshold", ".8", "--keep", "max:bytes", "--out", "clean", cwd=tmp_path)
    done = snip("apply", "clean", "--move", "moved", cwd=tmp_path)
    assert "6 files moved" in done.stdout
    assert len(tree(tmp_path / "moved")) == 6
    assert {**tree(photos), **tree(tmp_path / "moved")} == before
    assert "6 files put back" in snip("apply", "--undo", "moved", cwd=tmp_path).stdout
    assert tree(photos) == before
    assert json.loads((tmp_path / "set/snip.json").read_text())["counts"]["embedded"] == 18
