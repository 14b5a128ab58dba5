"""Image and text: a row goes only if both match, as brute force with both conditions says."""

from __future__ import annotations

import json
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import truth
from hypothesis import given, settings
from hypothesis import strategies as st

from snipdedup import dedup
from snipdedup.errors import SnipError, UsageError
from snipdedup.groups import pairs, star


def tables(image, text, text_threshold):
    """Cosines of images, -2 where the captions do not match."""
    table, other = (truth.cosine_table(x) for x in (image, text))
    for x, of in ((image, table), (text, other)):
        of[(x[:, None, :] == x[None, :, :]).all(2)] = 1
    return np.where(other >= np.float32(text_threshold), table, np.float32(-2))


@st.composite
def images_with_captions(draw):
    """Both crowded, with copies of their own and copies of both at once."""
    rows, seed = draw(st.integers(1, 45)), draw(st.integers(0, 2**31))
    of = [
        truth.clustered(rows, 5, seed + side, clusters=draw(st.integers(1, 4)), noise=0.6,
                        copies=draw(st.sampled_from([0, 0.5])))
        for side in (0, 1)
    ]  # fmt: skip
    rng = np.random.default_rng(seed)
    again = np.where(rng.random(rows) < 0.3, rng.integers(0, rows, rows), np.arange(rows))
    return of[0][again], of[1][again]


@pytest.mark.parametrize("method", ["exact", "join"])
@settings(max_examples=40)
@given(
    both=images_with_captions(),
    keep=st.sampled_from(["first", "last"]),
    late=st.sampled_from([0.8, 0.95]),
    tile=st.sampled_from([4, 1024]),
)
def test_a_row_goes_only_if_both_match(method, both, keep, late, tile):
    image, text = both
    how = {"threshold": 0.8, "text_features": text, "text_threshold": 0.9, "method": method}
    small = mock.patch.multiple(pairs, LISTED_GROUP=tile, TILE=tile)
    with small, mock.patch.multiple(star, TABLE_BLOCK=tile, CODED_BLOCK=tile):
        found = dedup(image, keep=keep, **how).at(late)
    table = tables(image, text, 0.9)
    order = np.arange(len(image))[:: 1 if keep == "first" else -1]
    representative, stays = truth.star(table, late, order)
    assert found.is_dup.tolist() == (~stays).tolist()
    members = found.members
    assert members.representative.tolist() == representative[members.row].tolist()
    assert members.similarity.tolist() == table[members.row, members.representative].tolist()
    label = truth.components(len(image), truth.pairs_of(table, late))
    assert members.group.tolist() == label[members.row].tolist()
    one = found.at(late, "components")
    assert one.removed == len(image) - len(set(label))


@pytest.fixture(scope="module")
def chia(data):
    folder = data / "small" / "chia500"
    image = next(p for p in sorted(folder.rglob("*.npy")) if "im" in p.name)
    text = next(p for p in sorted(folder.rglob("*.npy")) if "te" in p.name or "tx" in p.name)
    return image, text


def test_captions_tell_the_photos_of_chia_apart(chia, tmp_path):
    image, text = chia
    x, y = np.load(image), np.load(text)
    assert dedup(x).removed == 400
    for grouping in ("star", "components"):
        out = tmp_path / grouping
        words = ("dedup", image, "--text_features", text, "--text_threshold", 0.9)
        assert truth.snip(*words, "--out", out, "--grouping", grouping, "--pairs")[0] == 0
        table = tables(x, y, 0.9)
        removed = np.load(out / "is_dup.npy")
        if grouping == "star":
            assert removed.tolist() == (~truth.star(table, 0.95, range(500))[1]).tolist()
        else:
            label = truth.components(500, truth.pairs_of(table, 0.95))
            assert removed.sum() == 500 - len(set(label))
        found = pq.read_table(out / "pairs.parquet").to_pydict()
        copies = set(pq.read_table(out / "copies.parquet")["row"].to_pylist())
        expected = [p for p in truth.pairs_of(table, 0.95) if not copies.intersection(p)]
        assert sorted(zip(found["a"], found["b"], strict=True)) == expected
        assert 0 < removed.sum() < 400
    manifest = json.loads((out / "snip.json").read_text())
    assert manifest["also"][0]["shards"][0]["name"] == text.name
    assert len(manifest["also"][0]["shards"][0]["checksum"]) == 16


def test_a_rethreshold_still_asks_for_both(chia, tmp_path):
    image, text = chia
    first, again = tmp_path / "first", tmp_path / "again"
    words = ("dedup", image, "--text_features", text, "--text_threshold", 0.85, "--out", first)
    assert truth.snip(*words, "--threshold", 0.8)[0] == 0
    assert truth.snip("dedup", first, "--threshold", 0.9, "--out", again)[0] == 0
    table = tables(np.load(image), np.load(text), 0.85)
    removed = np.load(again / "is_dup.npy")
    assert removed.tolist() == (~truth.star(table, 0.9, range(500))[1]).tolist()
    assert "finished already" in truth.snip(*words, "--threshold", 0.8)[1]


def test_bad_captions_match_nothing_or_are_refused(tmp_path):
    image = np.ones((4, 3), np.float32)
    text = np.ones((4, 2), np.float32)
    text[1] = np.nan
    with pytest.raises(SnipError, match=r"1 of 4 rows.*row 1 \(NaN\)"):
        dedup(image, text_features=text)
    found = dedup(image, text_features=text, bad_rows="keep")
    assert found.is_dup.tolist() == [False, False, True, True]
    assert found.search.bad.tolist() == [1]


def test_captions_must_be_as_many_as_images(tmp_path):
    with pytest.raises(SnipError, match="5 rows, FEATURES has 4"):
        dedup(np.eye(4), text_features=np.eye(5))


def test_other_captions_are_another_input(tmp_path):
    x, y = (truth.clustered(50, 6, seed) for seed in (1, 2))
    for name, rows in (("x", x), ("y", y), ("z", y[::-1])):
        np.save(tmp_path / f"{name}.npy", rows)
    out = tmp_path / "o"
    words = ("dedup", tmp_path / "x.npy", "--out", out, "--text_features")
    assert truth.snip(*words, tmp_path / "y.npy")[0] == 0
    status, _, line = truth.snip(*words, tmp_path / "z.npy")
    assert (status, "text_features" in line) == (1, True)
    np.save(tmp_path / "y.npy", y[::-1])
    status, _, line = truth.snip("dedup", out, "--threshold", 0.97, "--out", tmp_path / "p")
    assert (status, "y.npy differs" in line) == (1, True)


@pytest.mark.parametrize("how", [{"method": "adc"}, {"index": "i"}])
def test_captions_go_with_join_and_exact(how):
    with pytest.raises(UsageError, match="text_features"):
        dedup(np.eye(3), text_features=np.eye(3), **how)
