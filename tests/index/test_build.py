"""The index: the same bytes however it is built, plain faiss agrees, and refusals."""

from __future__ import annotations

import json
import os
import shutil
from itertools import pairwise
from pathlib import Path
from unittest import mock

import faiss
import numpy as np
import pytest
from samples import clustered

from snipdedup import config
from snipdedup.errors import InputError, SnipError
from snipdedup.features.cosine import unit_rows
from snipdedup.features.formats import open_shard
from snipdedup.features.hashing import checksum_text, shard_checksum
from snipdedup.features.shards import open_features
from snipdedup.index.build import build, run
from snipdedup.index.folder import Index, pack_rows, packed_width, unpack_rows
from snipdedup.index.quantizer import read_quantiser
from snipdedup.storage import atomic, locks, out_folder
from snipdedup.storage.out_folder import MANIFEST

CUTS = (0, 700, 701, 1500, 1500, 2600)  # one of one row, one of none, none at a block's edge


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    x = clustered(2600, 16, seed=5).astype(np.float16)
    x[100:140] = x[99]
    return x


@pytest.fixture(scope="module")
def shards(rows, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    for number, (low, high) in enumerate(pairwise(CUTS)):
        np.save(folder / f"img_emb_{number}.npy", rows[low:high])
    return folder


def options(out: Path, features: object = None, **given: object) -> config.BuildIndex:
    given = {"nlist": 16, "m": 4, "nbits": 4, "threads": 1, **given}
    return config.BuildIndex(features=features, out=str(out), **given)


@pytest.fixture(scope="module")
def index(shards, tmp_path_factory) -> Index:
    out = tmp_path_factory.mktemp("index") / "index"
    run(options(out, shards))
    return Index(out)


def bits(folder: Path) -> dict[str, bytes]:
    """Every file but the manifest, which holds paths."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != MANIFEST}


def stored(index: Index) -> tuple[np.ndarray, ...]:
    lists = index.lists()
    return lists.codes, lists.rows(slice(None)), lists.starts


def same(one: Index, other: Index) -> None:
    for a, b in zip(stored(one), stored(other), strict=True):
        np.testing.assert_array_equal(a, b)


def test_packed_numbers_come_back():
    assert [packed_width(n) for n in (0, 1, 256, 257, 65_536, 65_537, 2**32, 2**32 + 1)] == [
        1, 1, 1, 2, 2, 3, 4, 5,
    ]  # fmt: skip
    numbers = np.array([0, 1, 255, 256, 2**31, 2**32 + 5, 2**39])
    np.testing.assert_array_equal(unpack_rows(pack_rows(numbers, 5)), numbers)


def test_every_row_lies_in_its_nearest_list_with_the_code_that_faiss_gives(index, rows):
    codes, held, starts = stored(index)
    x = unit_rows(rows)
    plain = faiss.read_index(str(index.folder / "quantizer.faiss"))
    np.testing.assert_array_equal(np.sort(held), np.arange(2600))
    lists = np.repeat(np.arange(16), np.diff(starts))
    nearest = np.square(x[:, None] - index.quantiser.centroids[None]).sum(2).argmin(1)
    np.testing.assert_array_equal(lists, nearest[held])
    np.testing.assert_array_equal(codes, plain.sa_encode(x)[held, plain.coarse_code_size() :])
    for low, high in pairwise(starts):
        assert (np.diff(held[low:high]) > 0).all()


def test_the_same_bytes_for_any_threads_and_at_any_time(index, shards, tmp_path):
    for threads in (2, 3):
        run(options(tmp_path / str(threads), shards, threads=threads))
        assert bits(tmp_path / str(threads)) == bits(index.folder)


def test_one_shard_or_many(index, rows, tmp_path):
    one = build(open_features(rows), tmp_path / "one", options(tmp_path / "one"))
    same(one, index)


def test_a_second_run_finds_it_done(index, shards):
    before = {p: p.stat().st_mtime_ns for p in index.folder.iterdir()}
    assert str(run(options(index.folder, shards))).startswith("already indexed")
    assert {p: p.stat().st_mtime_ns for p in index.folder.iterdir()} == before


def test_a_stopped_run_goes_on_to_the_same_bytes(index, shards, tmp_path, monkeypatch):
    from snipdedup.index import build as module

    real, calls = module.encode_shard, []

    def stop(*given):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(module, "encode_shard", stop)
    with pytest.raises(KeyboardInterrupt):
        run(options(tmp_path / "x", shards))
    with pytest.raises(SnipError, match=r"expected a finished index"):
        Index(tmp_path / "x")
    with pytest.raises(SnipError, match="stopped run with other nlist"):
        run(options(tmp_path / "x", shards, nlist=8))
    monkeypatch.setattr(module, "encode_shard", real)
    kept = (tmp_path / "x" / "work" / "files" / "lists_00000.npz").stat().st_mtime_ns
    run(options(tmp_path / "x", shards))
    assert (tmp_path / "x" / "lists_00000.npz").stat().st_mtime_ns == kept
    assert bits(tmp_path / "x") == bits(index.folder)


def test_overwrite_leaves_nothing_of_a_stopped_run(index, shards, tmp_path):
    run(options(tmp_path / "x", shards, seed=9))
    (tmp_path / "x" / MANIFEST).unlink()
    atomic.save_json(tmp_path / "x" / locks.WORK / locks.REQUEST, {"nlist": 3})
    run(options(tmp_path / "x", shards, overwrite=True))
    assert bits(tmp_path / "x") == bits(index.folder)


def test_append_equals_one_go(shards, tmp_path):
    first = [shards / f"img_emb_{n}.npy" for n in range(2)]
    everything = [shards / f"img_emb_{n}.npy" for n in range(5)]
    build(open_features(first), tmp_path / "grown", options(tmp_path / "grown"))
    before = bits(tmp_path / "grown")
    with pytest.raises(SnipError, match=r"first 2 of 5 shards; .*--append"):
        run(options(tmp_path / "grown", shards))
    said = run(config.BuildIndex(features=str(shards), out=str(tmp_path / "grown"), append=True))
    assert str(said).startswith("added to")
    after = bits(tmp_path / "grown")
    assert before.items() <= after.items()
    assert "work" not in {p.name for p in (tmp_path / "grown").iterdir()}
    given = {"nlist": 0, "m": None, "nbits": None, "base": str(tmp_path / "grown")}
    one = build(open_features(everything), tmp_path / "one", options(tmp_path / "one", **given))
    same(Index(tmp_path / "grown"), one)
    assert bits(tmp_path / "one") == after


@pytest.mark.parametrize("first", ["append", "overwrite"])
def test_a_stopped_append_and_a_stopped_build_share_no_codes(shards, tmp_path, monkeypatch, first):
    from snipdedup.index import build as module

    few = [shards / f"img_emb_{n}.npy" for n in range(2)]
    ways = {"append": "overwrite", "overwrite": "append"}
    for folder in ("stopped", "right"):
        build(open_features(few), tmp_path / folder, options(tmp_path / folder))

    def index(folder, way):
        if way == "overwrite":  # with the settings that the index has
            return run(options(tmp_path / folder, shards, overwrite=True))
        return run(config.BuildIndex(features=str(shards), out=str(tmp_path / folder), append=True))

    with monkeypatch.context() as patch:
        patch.setattr(module, "finish_index", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            index("stopped", first)
    for folder in ("stopped", "right"):
        index(folder, ways[first])
    assert bits(tmp_path / "stopped") == bits(tmp_path / "right")


def test_append_refuses_other_settings_and_other_shards(shards, tmp_path):
    out = tmp_path / "x"
    build(open_features([shards / "img_emb_0.npy"]), out, options(out))
    with pytest.raises(SnipError, match=r"other nlist \(16, now 8\).*leave these flags"):
        run(options(out, shards, nlist=8, append=True))
    with pytest.raises(SnipError, match="other features"):
        run(options(out, shards / "img_emb_2.npy", append=True))
    assert Index(out).rows == 700


def test_a_base_can_be_a_plain_faiss_file(index, shards, rows, tmp_path):
    plain = faiss.read_index(str(index.folder / "quantizer.faiss"))
    plain.add(unit_rows(rows[:50]))
    faiss.write_index(plain, str(tmp_path / "plain.faiss"))
    given = {"nlist": 0, "m": None, "nbits": None, "base": str(tmp_path / "plain.faiss")}
    run(options(tmp_path / "x", shards, **given))
    same(Index(tmp_path / "x"), index)


@pytest.mark.parametrize(
    ("flag", "says"),
    [({"m": 8, "nlist": 0, "nbits": None}, "has m 4; leave --m 8"),
     ({"m": None, "nlist": 4, "nbits": None}, "has nlist 16; leave --nlist 4")],
)  # fmt: skip
def test_flags_that_contradict_the_base(index, shards, tmp_path, flag, says):
    with pytest.raises(SnipError, match=says):
        run(options(tmp_path / "x", shards, base=str(index.folder), **flag))


def test_a_base_of_another_width_is_refused(index, tmp_path):
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "a.npy", clustered(300, 12))
    with pytest.raises(SnipError, match="16 wide, these are 12 wide"):
        run(
            options(
                tmp_path / "x", tmp_path / "in", base=str(index.folder), nlist=0, m=None, nbits=None
            )
        )


def test_plain_faiss_reads_the_export(index, shards, rows, tmp_path):
    said = run(options(index.folder, shards, export_faiss=str(tmp_path / "x.faiss")))
    assert "plain faiss" in str(said)
    plain = faiss.read_index(str(tmp_path / "x.faiss"))
    assert plain.ntotal == 2600
    reference = faiss.read_index(str(index.folder / "quantizer.faiss"))
    reference.add(unit_rows(rows))
    for number in range(16):
        for name in ("get_ids", "get_codes"):
            size = plain.invlists.list_size(number)
            assert size == reference.invlists.list_size(number)
            count = size if name == "get_ids" else size * plain.code_size
            ours, theirs = (
                faiss.rev_swig_ptr(getattr(i.invlists, name)(number), count).copy()
                for i in (plain, reference)
            )
            np.testing.assert_array_equal(ours, theirs)


def test_bad_rows_are_refused_by_name_or_left_out(rows, tmp_path):
    x = rows.copy()
    x[1000], x[2000, 3], x[2001, 0] = 0, np.nan, np.inf
    folder = tmp_path / "features"
    folder.mkdir()
    np.save(folder / "a.npy", x[:900])
    np.save(folder / "b.npy", x[900:])
    with pytest.raises(InputError, match=r"b\.npy row 100 \(zeros only\)"):
        run(options(tmp_path / "x", folder))
    assert not (tmp_path / "x").exists()
    said = run(options(tmp_path / "x", folder, bad_rows="keep"))
    assert "3 NaN, infinite or zero rows" in str(said)
    index = Index(tmp_path / "x")
    assert index.rows == 2600
    np.testing.assert_array_equal(index.bad_rows(), [1000, 2000, 2001])
    held = np.sort(stored(index)[1])
    np.testing.assert_array_equal(held, np.setdiff1d(np.arange(2600), [1000, 2000, 2001]))


@pytest.mark.parametrize("where", ["lists_00000.npz", "quantizer.faiss"])
def test_damaged_files_are_refused(shards, tmp_path, where):
    out = tmp_path / "x"
    run(options(out, shards))
    (out / where).write_bytes((out / where).read_bytes()[:300])
    with pytest.raises(SnipError, match=where):
        Index(out).lists()


def test_size_and_defaults_of_a_tiny_set(tmp_path, data):
    nine = data / "small" / "clip_retrieval_out"
    said = run(config.BuildIndex(features=str(nine), out=str(tmp_path / "x")))
    assert "9 rows of 1 shards in 1 lists, codes of 16 x 8 bits" in str(said)
    index = Index(tmp_path / "x")
    lists = index.lists()
    x = unit_rows(open_features(str(nine)).read(0, 9))
    np.testing.assert_allclose(
        index.quantiser.decode(lists.list_at(np.arange(9)), lists.codes),
        x[lists.rows(slice(None))],
        atol=1e-4,
    )


def test_nothing_is_written_into_the_input(shards, tmp_path):
    with pytest.raises(SnipError, match="lies in the input folder"):
        run(options(shards / "index", shards))
    with pytest.raises(SnipError, match="lies in the input folder"):
        run(options(tmp_path / "x", shards, export_faiss=str(shards / "x.faiss")))
    assert not (tmp_path / "x").exists()


def whole(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("given", "says"),
    [({"m": 5}, "--m 5 must divide the width 16 of the vectors: one of 1, 2, 4, 8, 16$"),
     ({"nlist": 2601}, "--nlist 2601: there are only 2,600 rows"),
     ({"base": "base"}, "16 wide, these are 8 wide|has nlist 16"),
     ({"encoder": "narrow"}, "rows are 16 wide, --encoder .*narrow expects 12")],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_is_written(
    index, shards, tmp_path, monkeypatch, given, says
):
    from snipdedup.encoder.network import Encoder, Network

    monkeypatch.chdir(tmp_path)
    Encoder(Network(12, 8, 8)).save(tmp_path / "narrow", {})
    shutil.copytree(index.folder, tmp_path / "base")
    given = {"nlist": 8, **given}
    with pytest.raises(SnipError, match=says):
        run(options(tmp_path / "new", shards, **given))
    assert not (tmp_path / "new").exists()
    shutil.copytree(index.folder, tmp_path / "x")
    before = whole(tmp_path / "x")
    with pytest.raises(SnipError, match=says):
        run(options(tmp_path / "x", shards, overwrite=True, **given))
    assert whole(tmp_path / "x") == before


def copied(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "features"))


def test_bad_rows_leave_an_older_index_alone(shards, tmp_path):
    folder, out = copied(shards, tmp_path), tmp_path / "x"
    run(options(out, folder))
    before = whole(out)
    rows = np.load(folder / "img_emb_4.npy")
    rows[1099] = np.inf
    np.save(folder / "img_emb_4.npy", rows)
    with pytest.raises(InputError, match=r"img_emb_4\.npy row 1099 \(infinity\)"):
        run(options(out, folder, overwrite=True))
    assert whole(out) == before
    np.save(folder / "img_emb_4.npy", np.zeros_like(rows))
    first = build(open_features([folder / f"img_emb_{n}.npy" for n in range(4)]), tmp_path / "y",
                  options(tmp_path / "y")).folder  # fmt: skip
    before = whole(first)
    with pytest.raises(InputError, match=r"img_emb_4\.npy row 0 \(zeros only\)"):
        run(config.BuildIndex(features=str(folder), out=str(first), append=True))
    assert whole(first) == before


def test_rows_that_nothing_can_be_trained_on_leave_nothing(tmp_path):
    with pytest.raises(InputError, match="no row to train on"):
        build(open_features(np.zeros((50, 16), np.float32)), tmp_path / "x", options(tmp_path))
    assert not (tmp_path / "x").exists()


def test_rewritten_shards_are_another_input_but_a_new_date_is_not(shards, tmp_path):
    folder, out = copied(shards, tmp_path), tmp_path / "x"
    run(options(out, folder))
    held = Index(out).manifest["shards"]
    for shard in held:
        read = shard_checksum(open_shard(folder / shard["name"]))
        assert shard["checksum"] == checksum_text(read)
        os.utime(folder / shard["name"], ns=(0, 1))
    assert str(run(options(out, folder))).startswith("already indexed")
    np.save(folder / "img_emb_0.npy", 2 * np.load(folder / "img_emb_0.npy"))
    with pytest.raises(SnipError, match="finished run with other features_changed"):
        run(options(out, folder))


def test_a_stopped_run_does_not_go_on_with_rewritten_shards(shards, tmp_path, monkeypatch):
    folder, out = copied(shards, tmp_path), tmp_path / "x"

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(out_folder, "publish", stop)
        with pytest.raises(KeyboardInterrupt):
            run(options(out, folder))
    np.save(folder / "img_emb_0.npy", 2 * np.load(folder / "img_emb_0.npy"))
    with pytest.raises(SnipError, match="stopped run with other features_changed"):
        run(options(out, folder))


def test_append_compares_the_shards_that_are_held(shards, tmp_path):
    folder, out = copied(shards, tmp_path), tmp_path / "x"
    first = [folder / f"img_emb_{n}.npy" for n in range(2)]
    build(open_features(first), out, options(out))
    os.utime(first[0], ns=(0, 1))
    shutil.copytree(out, tmp_path / "y")
    run(config.BuildIndex(features=str(folder), out=str(out), append=True))
    assert Index(out).rows == 2600
    assert all("checksum" in shard for shard in Index(out).manifest["shards"])
    np.save(first[0], 2 * np.load(first[0]))
    with pytest.raises(SnipError, match=r"other features.*features_changed"):
        run(config.BuildIndex(features=str(folder), out=str(tmp_path / "y"), append=True))
    assert Index(tmp_path / "y").rows == 701


def test_the_export_overwrites_neither_base_nor_encoder(index, shards, tmp_path):
    from snipdedup.encoder.network import Encoder, Network

    Encoder(Network(16, 8, 8)).save(tmp_path / "encoder", {})
    (tmp_path / "base").mkdir()
    base = Path(shutil.copy(index.folder / "quantizer.faiss", tmp_path / "base" / "b.faiss"))
    free = {"nlist": 0, "m": None, "nbits": None}
    for given, target in (
        ({"base": str(base), **free}, base),
        ({"encoder": str(tmp_path / "encoder")}, tmp_path / "encoder" / "weights.pt"),
        ({"base": str(index.folder), **free}, index.folder / "quantizer.faiss"),
    ):
        before = target.read_bytes()
        with pytest.raises(SnipError, match="snip never writes there"):
            run(options(tmp_path / "x", shards, export_faiss=str(target), **given))
        assert target.read_bytes() == before
    assert not (tmp_path / "x").exists()


def test_a_home_folder_in_any_path(index, shards, tmp_path, monkeypatch):
    from snipdedup.encoder.network import Encoder, Network

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    Encoder(Network(16, 8, 8)).save(tmp_path / "encoder", {})
    copied(shards, tmp_path)
    given = {"encoder": "~/encoder", "export_faiss": "~/x.faiss"}
    run(options(Path("~/x"), "~/features", **given))
    given = {"base": "~/x", "nlist": 0, "m": None, "nbits": None}
    run(options(Path("~/y"), "~/features", **given))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "encoder", "features", "x", "x.faiss", "y",
    ]  # fmt: skip


def test_another_folder_is_not_taken(shards, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine.txt").write_text("mine")
    with pytest.raises(SnipError, match="not a folder that snip wrote"):
        run(options(tmp_path / "x", shards))
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["mine.txt"]


def test_an_index_with_an_encoder_holds_all_that_a_search_needs(shards, rows, tmp_path):
    from snipdedup.encoder.network import Encoder, Network

    Encoder(Network(16, 8, 8)).save(tmp_path / "encoder", {})
    run(options(tmp_path / "x", shards, encoder=str(tmp_path / "encoder")))
    index = Index(tmp_path / "x")
    assert (index.encoder.dim_in, index.dim) == (16, 8)
    encoder = Encoder.load(tmp_path / "encoder", device="cpu")
    np.testing.assert_array_equal(index.encoder.encode(rows[:1024]), encoder.encode(rows[:1024]))
    given = {"base": str(tmp_path / "x"), "nlist": 0, "m": None, "nbits": None}
    run(options(tmp_path / "y", shards, **given))
    same(Index(tmp_path / "y"), index)
    Encoder(Network(16, 8, 8)).save(tmp_path / "other", {})
    with pytest.raises(SnipError, match="not the one that the quantisers"):
        run(options(tmp_path / "z", shards, encoder=str(tmp_path / "other"), **given))


def test_descriptors_are_taken_as_they_are(rows, tmp_path):
    folder = tmp_path / "descriptors"
    folder.mkdir()
    np.save(folder / "a.npy", rows * 2)
    (folder / MANIFEST).write_text(json.dumps({"kind": "descriptors"}))
    run(options(tmp_path / "x", folder))
    index = Index(tmp_path / "x")
    np.testing.assert_array_equal(index.encoder.encode(rows), rows.astype(np.float32))
    assert np.linalg.norm(index.quantiser.centroids, axis=1).mean() > 4  # unit rows have < 1


def test_the_command(snip, data, tmp_path):
    source = str(data / "keyframes" / "img_emb" / "img_emb_{part:04d}.npy")
    words = ["index", source, "--parts", "0:2", "--out", tmp_path / "x", "--nlist", 32, "--nbits"]
    said = snip(*words, 4, "--m", 8, "--export_faiss", tmp_path / "x.faiss").stdout
    assert "bytes a row on disk" in said
    index = Index(tmp_path / "x")
    assert faiss.read_index(str(tmp_path / "x.faiss")).ntotal == index.rows
    assert index.code_size == 4
    assert index.manifest["bytes_a_row"] < 4 + 2 + 0.5
    refused = snip("index", source, "--parts", "0:1", "--out", tmp_path / "y", "--m", 7, status=1)
    assert "--m 7 must divide the width 512" in refused.stderr
    assert read_quantiser(tmp_path / "x" / "quantizer.faiss").nbits == 4


def test_the_size_script_says_what_a_row_costs(index, capsys, tmp_path):
    import runpy

    if not Path("/proc/self/status").is_file():
        pytest.skip("RssAnon is what Linux tells")
    script = Path(__file__).parents[2] / "scripts" / "index_size.py"
    words = [str(index.folder), "--json", str(tmp_path / "x.json")]
    runpy.run_path(str(script))["main"](words)
    said, told = capsys.readouterr().out, json.loads((tmp_path / "x.json").read_text())
    files = sum(path.stat().st_size for path in index.folder.glob("lists_*.npz"))
    assert told["disk"]["bytes_a_row"] == pytest.approx(files / index.rows)
    lists = index.lists()
    assert told["memory"]["arrays"] == sum(a.nbytes for a in (lists.codes, lists.ids, lists.starts))
    # 2.17e9 rows of 4 bytes: 4 of code and 4 of row number each, and where 65,536 lists begin
    if index.code_size == 4:
        assert told["reckoned"]["memory"] == 8 * 2_170_000_000 + 8 * 65_537
    assert told["reckoned"]["memory"] <= 17.4e9 or index.code_size > 4
    assert "bytes a row" in said
