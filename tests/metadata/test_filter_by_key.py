"""`snip filter --on`: the right rows of a copy shuffled and cut; joins in doubt are refused."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from snipdedup.config import Filter
from snipdedup.deduplication.run import dedup
from snipdedup.errors import SnipError, UsageError
from snipdedup.metadata import filter
from snipdedup.storage.out_folder import read_manifest

ROWS = 40  # rows 20 .. 39 are copies of rows 0 .. 19


@pytest.fixture
def out(tmp_path):
    """A finished OUT over two files of metadata; rows 20 to 39 go."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((ROWS // 2, 16)).astype(np.float32)
    (tmp_path / "set" / "metadata").mkdir(parents=True)
    (tmp_path / "set" / "img_emb").mkdir()
    np.save(tmp_path / "set" / "img_emb" / "img_emb_0.npy", np.concatenate([rows, rows]))
    table = pa.table(
        {
            "key": [f"{n:05d}" for n in range(ROWS)],
            "url": [f"http://x/{n}" for n in range(ROWS)],
            "width": [n % 4 for n in range(ROWS)],
        }
    )
    for number in range(2):
        path = tmp_path / "set" / "metadata" / f"metadata_{number}.parquet"
        pq.write_table(table.slice(25 * number, 25), path)
    folder = tmp_path / "out"
    dedup(tmp_path / "set", out=str(folder))
    assert np.flatnonzero(np.load(folder / "is_dup.npy")).tolist() == list(range(20, 40))
    return folder


def copy_of(out, rows, **changed):
    """Write chosen rows of the set, in that order, with columns changed; return the path."""
    files = sorted((out.parent / "set" / "metadata").glob("*.parquet"))
    table = pa.concat_tables(map(pq.read_table, files)).take(pa.array(rows))
    for name, values in changed.items():
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values))
    pq.write_table(table, out.parent / "copy.parquet")
    return out.parent / "copy.parquet"


def filtered(meta, out, on="url", **more):
    to = out.parent / "kept"
    result = filter.run(
        Filter(
            metadata=str(meta), is_dup=str(out), out=str(to), on=on, **{"overwrite": True, **more}
        )
    )
    (path,) = to.glob("*.parquet")
    return pq.read_table(path), str(result), read_manifest(to, "filter")["join"]


def test_a_shuffled_copy_of_which_a_tenth_is_gone(out):
    rows = np.random.default_rng(1).permutation(ROWS)[:36]
    found, said, join = filtered(copy_of(out, rows), out)
    assert found["key"].to_pylist() == [f"{n:05d}" for n in rows if n < 20]
    assert join == {
        "on": ["url"], "stays": found.num_rows, "goes": 36 - found.num_rows,
        "ambiguous": 0, "unmatched": 0, "contradicted": 0, "repeated": 0,
    }  # fmt: skip
    assert f"{found.num_rows} of 36 rows kept" in said
    assert "matched by url" in said


def test_rows_that_the_set_does_not_hold_stay_or_go_as_told(out):
    rows = np.arange(ROWS)
    urls = [f"http://new/{n}" if n % 10 == 3 else f"http://x/{n}" for n in rows]
    copy = copy_of(out, rows, url=urls)
    new = {3, 13, 23, 33}
    found, said, join = filtered(copy, out)
    assert found["key"].to_pylist() == [f"{n:05d}" for n in rows if n < 20 or n in new]
    assert join["unmatched"] == 4
    assert "not in the mask's set; they are kept: " in said
    assert "copy.parquet row 3, " in said
    found, said, _ = filtered(copy, out, unmatched="remove")
    assert found["key"].to_pylist() == [f"{n:05d}" for n in rows if n < 20 and n not in new]
    assert "they are removed: " in said


def test_a_url_that_both_stays_and_goes_is_reported(out):
    files = sorted((out.parent / "set" / "metadata").glob("*.parquet"))
    meta0 = pa.concat_tables(map(pq.read_table, files))
    urls = ["http://x/5" if n == 30 else f"http://x/{n}" for n in range(ROWS)]
    pq.write_table(meta0.set_column(1, "url", pa.array(urls)), out.parent / "meta0.parquet")
    more = {"keys": str(out.parent / "meta0.parquet")}
    copy = copy_of(
        out, [30, 5, 2, 25], url=["http://x/5", "http://x/5", "http://x/2", "http://x/25"]
    )
    found, said, join = filtered(copy, out, **more)
    assert found["key"].to_pylist() == ["00030", "00005", "00002"]
    assert (join["ambiguous"], join["repeated"], join["stays"], join["goes"]) == (2, 2, 1, 1)
    assert "their key is both kept and removed there; they are kept: " in said
    assert "copy.parquet row 0, " in said
    assert "2  share their key with another row" in said
    found, _, _ = filtered(copy, out, ambiguous="remove", **more)
    assert found["key"].to_pylist() == ["00002"]
    found, _, join = filtered(copy, out, on="url,key", **more)
    assert found["key"].to_pylist() == ["00005", "00002"]
    assert join["ambiguous"] == 0


def test_a_join_by_a_column_that_is_no_key_is_refused_and_nothing_written(out, snip):
    copy = copy_of(out, np.arange(ROWS))
    words = ("filter", copy, "--is_dup", out, "--out", out.parent / "new", "--on")
    said = snip(*words, "WIDTH", status=1).stderr
    assert "40 of 40 rows (" in said
    assert "have a width that is both kept and removed in" in said
    assert "--ambiguous keep or remove" in said
    copy_of(out, np.arange(ROWS), url=[f"https://x/{n}" for n in range(ROWS)])
    said = snip(*words, "url", status=1).stderr
    assert "40 of 40 rows (" in said
    assert "copy.parquet row 0, " in said
    assert "by their url: another column or set?" in said
    said = snip(*words, "caption", status=1).stderr
    assert "column 'caption' is not there; its columns: key, url, width" in said
    assert not (out.parent / "new").exists()
    snip(*words, "url", "--unmatched", "keep")
    assert len(pq.read_table(out.parent / "new" / "copy.parquet")) == ROWS


def test_running_numbers_of_another_download_are_refused(out):
    rows = np.random.default_rng(3).permutation(ROWS)
    other = copy_of(out, rows, key=[f"{n:05d}" for n in range(ROWS)])  # numbered anew
    with pytest.raises(SnipError, match=r"another url: numbers of another download.*--on url"):
        filtered(other, out, on="key")
    found, _, _ = filtered(other, out, on="url")
    assert sorted(found["url"].to_pylist()) == sorted(f"http://x/{n}" for n in range(20))
    same = copy_of(out, rows)
    assert filtered(same, out, on="key")[2]["contradicted"] == 0


def test_a_refused_join_leaves_an_earlier_result_alone(out):
    found, _, _ = filtered(copy_of(out, np.arange(30)), out)
    with pytest.raises(SnipError, match="both kept and removed"):
        filtered(copy_of(out, np.arange(30)), out, on="width")
    (path,) = (out.parent / "kept").glob("*.parquet")
    assert pq.read_table(path).equals(found)
    assert not (out.parent / "kept" / "work").exists()


def test_a_bare_mask_needs_the_metadata_it_was_made_for(out):
    mask = out.parent / "published" / "is_dup.npy"
    mask.parent.mkdir()
    mask.write_bytes((out / "is_dup.npy").read_bytes())
    copy = copy_of(out, [39, 1, 22])
    with pytest.raises(SnipError, match=r"is a mask alone and names no rows; give .* --keys"):
        filtered(copy, mask)
    keys = str(out.parent / "set" / "metadata")
    assert filtered(copy, mask, keys=keys)[0]["key"].to_pylist() == ["00001"]
    with pytest.raises(SnipError, match="the metadata has 3 rows in 1 files, the mask"):
        filtered(copy, mask, keys=str(copy))


def test_an_out_that_was_moved_away_from_its_metadata_joins_by_its_key(out):
    copy = copy_of(out, [39, 1, 22, 7])
    (out.parent / "set").rename(out.parent / "gone")
    assert filtered(copy, out, on="KEY")[0]["key"].to_pylist() == ["00001", "00007"]
    with pytest.raises(SnipError, match="knows the removed rows by their key only"):
        filtered(copy, out, on="url")


def test_metadata_that_changed_since_is_not_taken_for_the_set(out):
    copy = copy_of(out, [39, 1])
    first, _ = sorted((out.parent / "set" / "metadata").glob("*.parquet"))
    table = pq.read_table(first)
    pq.write_table(table.set_column(1, "url", pa.array(["y"] * len(table))), first)
    with pytest.raises(SnipError, match="knows the removed rows by their key only"):
        filtered(copy, out)


@pytest.mark.parametrize("flags", [{"start": 0}, {"end": 1}, {"cumulative_sizes": "t.npy"}])
def test_places_and_keys_do_not_go_together(flags):
    with pytest.raises(UsageError, match="--on finds rows by key: leave out"):
        Filter(metadata="m", is_dup="d", out="o", on="url", **flags)


@pytest.mark.parametrize("flag", ["keys", "unmatched", "ambiguous"])
def test_flags_of_a_join_need_on(flag):
    with pytest.raises(UsageError, match=f"--{flag} goes with --on"):
        Filter(metadata="m", is_dup="d", out="o", **{flag: "keep"})


def test_real_urls_shuffled_and_cut_hit_exactly_the_right_rows(data, tmp_path, snip):
    source = data / "small" / "url_text_10000.parquet"
    table = pq.read_table(source)
    rng = np.random.default_rng(11)
    is_dup = rng.random(len(table)) < 0.3
    urls = table["URL"].to_pylist()
    twice = [n for n, url in enumerate(urls) if urls.count(url) > 1]
    assert len(twice) == 2  # the set has one url twice: here one of them goes
    is_dup[twice] = [False, True]
    np.save(tmp_path / "is_dup.npy", is_dup)
    rows = np.array([*twice, *rng.permutation(np.delete(np.arange(10_000), twice))[:8_998]])
    rows = rng.permutation(rows)
    parts = np.array_split(rows, 3)
    (tmp_path / "m").mkdir()
    for number, part in enumerate(parts):
        pq.write_table(table.take(pa.array(part)), tmp_path / f"m/m_{number}.parquet")
    said = snip(
        "filter", tmp_path / "m", "--is_dup", tmp_path / "is_dup.npy", "--keys", source,
        "--on", "url", "--out", tmp_path / "out",
    ).stdout  # fmt: skip
    gone = is_dup.copy()
    gone[twice] = False
    for number, part in enumerate(parts):
        found = pq.read_table(tmp_path / f"out/m_{number}.parquet")
        assert found.equals(table.take(pa.array(part[~gone[part]])))
    assert "matched by URL                9,000" in said
    assert "ambiguous                         2  of these: their key is both kept and" in said
    assert "repeated                          2  share their key" in said
