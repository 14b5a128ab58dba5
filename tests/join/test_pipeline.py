"""The join against brute force: the same pairs, however it is cut, stopped and taken up again."""

from __future__ import annotations

import math
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import truth
from hypothesis import given, settings
from hypothesis import strategies as st

from snipdedup.deduplication import methods
from snipdedup.deduplication.run import dedup
from snipdedup.errors import SnipError
from snipdedup.features.shards import open_features
from snipdedup.join import encoding, model, pipeline
from snipdedup.join.pipeline import needed_memory
from snipdedup.join.tasks import cut_lists
from snipdedup.storage import atomic, out_folder


@pytest.fixture(scope="module")
def rows():
    """20,000 rows: small groups, some large ones, copies."""
    x = truth.clustered(20_000, 24, 7, clusters=6000, noise=0.35, copies=0.05)
    rng = np.random.default_rng(8)
    for size, at in [(900, 0), (300, 5000), (150, 19_000)]:
        x[at : at + size] = x[at] + 0.02 * rng.standard_normal((size, 24)).astype(np.float32)
    return x[rng.permutation(len(x))].astype(np.float16)


@pytest.fixture(scope="module")
def brute(rows):
    return dedup(rows, method="exact")


@pytest.fixture
def many_lists():
    """Lists, and several encode tasks, at sizes that a test can afford."""
    with (
        mock.patch.object(model, "SINGLE_LIST_ROWS", 0),
        mock.patch.object(encoding, "task_rows", return_value=8192),
        mock.patch.object(pipeline, "PARTITION_BYTES", 1 << 14),
        mock.patch.object(methods, "needed_memory", return_value=0),
    ):
        yield


def listed(result):
    return [column.to_pylist() for column in result.forest.columns]


def edges(result):
    """Rows beyond one a component."""
    return len(result.search.whole_forest.a)


def assert_agree(found, brute):
    """The same groups and decisions, and a forest that is as heavy.

    Of two pairs in a crowd whose cosines differ by some 1e-5 the join may take either.
    """
    for name in ("row", "group", "representative", "similarity", "is_dup"):
        one, other = getattr(found.members, name), getattr(brute.members, name)
        assert np.array_equal(one, other), name
    one, other = (np.sort(result.search.whole_forest.similarity) for result in (found, brute))
    assert one.shape == other.shape
    assert np.abs(one - other).max(initial=0) < 2e-4
    assert np.abs(one - other).sum() < 1e-5 * len(one) + 1e-5
    assert (one >= np.float32(found.threshold)).all()


def test_one_list_finds_every_pair(rows, brute):
    found = dedup(rows)
    assert found.search.notes["nlist"] == 1
    assert_agree(found, brute)
    assert brute.removed > 3000


@pytest.mark.parametrize("threshold", [0.9, 0.98])
@pytest.mark.usefixtures("many_lists")
def test_with_full_recall_lists_lose_nothing(rows, threshold):
    found, brute = (
        dedup(rows, threshold=threshold, **how) for how in ({"recall": 1}, {"method": "exact"})
    )
    assert found.search.notes["nlist"] > 60
    assert_agree(found, brute)


@pytest.mark.usefixtures("many_lists")
def test_lists_find_the_share_asked_for_and_invent_nothing(rows, brute):
    found = dedup(rows, seed=3)
    assert found.search.notes["nlist"] > 60
    assert found.search.notes["visits"] < 100 * len(rows)
    assert edges(found) >= 0.999 * edges(brute)
    forest = found.search.forest
    unit = rows.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosine = (unit[forest.a] * unit[forest.b]).sum(1)
    assert np.allclose(cosine, forest.similarity, atol=1e-7)
    assert (cosine >= 0.95 - 1e-7).all()


@pytest.mark.parametrize("new", [12_000, 3000])
@pytest.mark.usefixtures("many_lists")
def test_new_rows_find_the_reference_rows_that_stay_at_home(rows, new):
    """Whether all rows visit, or the few new ones alone."""
    old, rest = rows[new:], rows[:new]
    brute = dedup(rest, reference=old, method="exact")
    found = dedup(rest, reference=old, recall=1)
    for name in ("row", "representative", "similarity", "is_dup"):
        assert np.array_equal(getattr(found.members, name), getattr(brute.members, name)), name
    assert (brute.members.representative < 0).sum() > new // 20
    likely = dedup(rest, reference=old)
    assert abs(likely.removed - brute.removed) <= 0.002 * brute.removed
    if new == 3000:
        assert likely.search.notes["visits"] < dedup(rows).search.notes["visits"]


@pytest.mark.usefixtures("many_lists")
def test_threads_chunks_shards_and_a_second_run_change_nothing(rows, tmp_path):
    once = dedup(rows, threads=1)
    cuts = np.sort(np.random.default_rng(0).integers(0, len(rows), 11))
    twelve = truth.save_shards(tmp_path / "f", rows, cuts)
    for source, how in [
        (rows, {"threads": 1}),
        (rows, {"threads": 2, "chunk_rows": 1000}),
        (rows, {"threads": 3, "max_memory": "1MB"}),
        (twelve, {"threads": 2}),
        (list(np.split(rows, [1, 8192])), {"threads": 2, "chunk_rows": 1}),
    ]:
        again = dedup(source, **how)
        assert listed(again) == listed(once), how
        assert np.array_equal(again.is_dup, once.is_dup)
        assert again.members.representative.tolist() == once.members.representative.tolist()


def stopping(name, below, after):
    """Patch a writer of files so that it fails at a task's file, after some of them."""
    whole, count = getattr(atomic, name), [0]

    def write(path, *args, **arrays):
        if below in path.parts:
            count[0] += 1
            if count[0] > after:
                raise KeyboardInterrupt
        return whole(path, *args, **arrays)

    return mock.patch.object(atomic, name, write)


def written(name, below):
    """Count the files that a writer writes below a folder."""
    whole, paths = getattr(atomic, name), []

    def write(path, *args, **arrays):
        if below in path.parts:
            paths.append(path)
        return whole(path, *args, **arrays)

    return mock.patch.object(atomic, name, write), paths


@pytest.mark.parametrize(
    ("name", "below", "after"),
    [
        ("save_json", "encode", 0),
        ("save_json", "encode", 2),
        ("save_npy", "encode", 4),
        ("save_npz", "join", 0),
        ("save_npz", "join", 5),
    ],
)
@pytest.mark.usefixtures("many_lists")
def test_a_stopped_run_goes_on_where_it_was(rows, tmp_path, name, below, after):
    folder, out = truth.save_shards(tmp_path / "f", rows, [3000]), tmp_path / "out"
    expected = dedup(rows)
    with stopping(name, below, after), pytest.raises(KeyboardInterrupt):
        dedup(folder, out=str(out), threads=1)
    assert not (out / "snip.json").exists()
    tasks = (out / "work" / below).rglob("done.json" if below == "encode" else "*.npz")
    finished = {path.relative_to(out) for path in tasks}
    counting, paths = written("save_json" if below == "encode" else "save_npz", below)
    with counting:
        found = dedup(folder, out=str(out), threads=1)
    redone = {path.relative_to(out) for path in paths}
    assert not redone & finished
    assert redone
    assert len(finished) == after or name == "save_npy"
    assert listed(found) == listed(expected)
    assert np.array_equal(np.load(out / "is_dup.npy"), expected.is_dup)
    assert sorted(p.name for p in out.iterdir()) == [
        "forest.parquet", "groups.parquet", "histogram.parquet", "is_dup.npy", "snip.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"threads": 1}, {"threads": 3}),
        ({"threads": 3}, {"threads": 1}),
        ({"max_memory": "200kB"}, {"max_memory": "1GB"}),
        ({"max_memory": "1GB"}, {"max_memory": "200kB"}),
        ({"chunk_rows": 1}, {"chunk_rows": 9999}),
    ],
)
@pytest.mark.usefixtures("many_lists")
def test_a_stopped_run_may_go_on_with_other_threads_and_memory(rows, tmp_path, before, after):
    """What says how, not what: the tasks of the two runs need not be cut alike."""
    folder, out = truth.save_shards(tmp_path / "f", rows, []), tmp_path / "out"
    with stopping("save_npz", "join", 4), pytest.raises(KeyboardInterrupt):
        dedup(folder, out=str(out), **({"threads": 1} | before))
    found = dedup(folder, out=str(out), **({"threads": 1} | after))
    assert listed(found) == listed(dedup(rows))


def test_a_run_stopped_while_writing_goes_on(rows, tmp_path):
    folder, out = truth.save_shards(tmp_path / "f", rows[:2000], []), tmp_path / "out"
    with (
        mock.patch.object(out_folder, "write_manifest", side_effect=KeyboardInterrupt),
        pytest.raises(KeyboardInterrupt),
    ):
        dedup(folder, out=str(out))
    assert not (out / "snip.json").exists()
    found = dedup(folder, out=str(out))
    assert np.array_equal(np.load(out / "is_dup.npy"), found.is_dup)
    assert (out / "snip.json").exists()
    assert not (out / "work").exists()


def test_a_crowd_of_near_identical_rows_is_one_component():
    """5,000 rows within .99 of one another, and 100 strangers."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(32) + 0.02 * rng.standard_normal((5000, 32))).astype(np.float32)
    x[2500:2600] = rng.standard_normal((100, 32))
    start = time.monotonic()
    found = dedup(x)
    assert time.monotonic() - start < 60
    assert found.removed == found.at(0.95, "components").removed == 4899
    assert set(found.members.group.tolist()) == {0}
    assert edges(found) == 4899
    some = np.arange(1800, 2700)
    assert_agree(dedup(x[some]), dedup(x[some], method="exact"))


def test_a_crowd_that_is_spread_over_lists_is_still_exact():
    rng = np.random.default_rng(1)
    x = (rng.standard_normal(8) + 0.3 * rng.standard_normal((3000, 8))).astype(np.float32)
    brute = dedup(x, method="exact", threshold=0.98)
    with (
        mock.patch.object(model, "SINGLE_LIST_ROWS", 0),
        mock.patch.object(encoding, "task_rows", return_value=8192),
    ):
        found = dedup(x, recall=1, threshold=0.98)
    assert found.search.notes["nlist"] > 20
    assert_agree(found, brute)


WORST = {
    "all equal": lambda rng: np.ones((20_000, 16), np.float32),
    "all equal but the norm": lambda rng: np.arange(1, 3001)[:, None] * [[1.0, 2]],
    "no duplicates": lambda rng: rng.standard_normal((20_000, 32)).astype(np.float16),
    "one row": lambda rng: np.ones((1, 16)),
    "two rows": lambda rng: np.array([[1.0, 2], [1, 2.0001]]),
    "three rows": lambda rng: np.eye(3),
    "one column": lambda rng: rng.standard_normal((500, 1)),
    "three columns": lambda rng: rng.standard_normal((2000, 3)),
    "1024 columns": lambda rng: truth.clustered(3000, 1024, 1, dtype=np.float16),
    "within .99": lambda rng: rng.standard_normal(64) + 0.05 * rng.standard_normal((1200, 64)),
    "one hot": lambda rng: np.eye(64, dtype=np.float16)[rng.integers(0, 64, 2000)],
    "opposite": lambda rng: np.concatenate([np.eye(40), -np.eye(40)]),
    "huge and tiny": lambda rng: (
        rng.standard_normal((900, 4)) * 10 ** rng.uniform(-200, 200, 900)[:, None]
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", WORST)
def test_worst_cases_finish_and_agree_with_brute_force(kind):
    x = WORST[kind](np.random.default_rng(0))
    start = time.monotonic()
    found = dedup(x)
    assert time.monotonic() - start < 60
    brute = dedup(x, method="exact")
    assert_agree(found, brute)
    expected = {"all equal": 19_999, "no duplicates": 0, "one row": 0, "two rows": 1, "opposite": 0}
    assert found.removed == expected.get(kind, found.removed)


def test_an_empty_shard_and_fewer_rows_than_lists(tmp_path):
    x = truth.clustered(40, 8, 0)
    folder = truth.save_shards(tmp_path / "f", x, [0, 11, 11, 40])
    with (
        mock.patch.object(model, "SINGLE_LIST_ROWS", 0),
        mock.patch.object(model, "list_count", return_value=100),
    ):
        found = dedup(folder, recall=1)
    assert_agree(found, dedup(x, method="exact"))


def test_a_chain_is_one_component_and_star_cuts_it():
    """10,000 rows on a spiral, each at .951 to the next and below .95 to all others."""
    step, turns = math.acos(0.951), 10_000
    x = np.zeros((turns, 128), np.float64)
    rng = np.random.default_rng(0)
    x[0] = rng.standard_normal(128)
    for row in range(1, turns):  # turn each time in a new direction
        unit = x[row - 1] / np.linalg.norm(x[row - 1])
        side = rng.standard_normal(128)
        side -= side @ unit * unit
        x[row] = math.cos(step) * unit + math.sin(step) * side / np.linalg.norm(side)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    near = sum(np.count_nonzero(part @ unit.T >= 0.95) for part in np.array_split(unit, 20))
    assert near == turns + 2 * (turns - 1)  # itself and its neighbours
    components = dedup(x, grouping="components")
    assert components.removed == turns - 1
    assert components.chained == turns - 2
    assert dedup(x).is_dup.tolist() == [bool(row % 2) for row in range(turns)]


@given(
    visits=st.lists(st.integers(0, 9), min_size=1, max_size=40),
    most=st.integers(-1, 30),
)
def test_partitions_cover_all_lists_in_order(visits, most):
    parts = cut_lists(np.array(visits), most)
    assert [low for low, _ in parts] == [0, *(high for _, high in parts[:-1])]
    assert parts[-1][1] == len(visits)
    for low, high in parts:
        assert high > low
        assert high == low + 1 or sum(visits[low:high]) <= most


@settings(max_examples=25)
@given(
    rows=st.integers(1, 300),
    dim=st.integers(1, 40),
    seed=st.integers(0, 2**31),
    threshold=st.sampled_from([-0.5, 0.02, 0.5, 0.9, 0.95, 1.0]),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
)
def test_small_sets_of_any_kind_agree_with_brute_force(rows, dim, seed, threshold, dtype):
    x = truth.clustered(rows, dim, seed, copies=0.2, dtype=dtype)
    if not (np.abs(x).max(1) > 0).all():
        return
    with mock.patch.object(model, "SINGLE_LIST_ROWS", 100):
        found = dedup(open_features(x), threshold=threshold, recall=1, threads=1)
    brute = dedup(x, threshold=threshold, method="exact", threads=1)
    assert_agree(found, brute)


def test_too_little_memory_is_refused_with_what_is_needed(rows, tmp_path):
    with pytest.raises(SnipError, match=r"--max_memory 50MB: this run needs 0\.\d\d GB"):
        dedup(rows, max_memory="50MB", threads=2, out=str(tmp_path / "out"))
    need = needed_memory(open_features(rows), 2)
    assert 200e6 < need < 300e6
    assert dedup(rows, max_memory=str(need), threads=2).removed > 3000


@pytest.mark.usefixtures("many_lists")
def test_the_forest_does_not_depend_on_threads_or_memory():
    """Near-equal rows by the hundred: which edges of a crowd are taken must not hang on blocks."""
    rng = np.random.default_rng(3)
    centres = rng.standard_normal((40, 64))
    x = np.repeat(centres, 150, axis=0) + 0.02 * rng.standard_normal((6000, 64))
    x = np.concatenate([x, rng.standard_normal((6000, 64))]).astype(np.float32)
    one = dedup(x, threads=1, max_memory="8GB")
    two = dedup(x, threads=2, max_memory="1MB")
    assert listed(one) == listed(two)
    assert np.array_equal(one.is_dup, two.is_dup)


@pytest.mark.parametrize(("threshold", "edges"), [(0.95, 15_067), (0.98, 4_569)])
def test_lists_of_key_frames_lose_no_more_than_promised(data, threshold, edges):
    """As a larger set would be: cut into lists whose borders many pairs cross."""
    with mock.patch.object(model, "SINGLE_LIST_ROWS", 0):
        found = dedup(data / "keyframes", threshold=threshold)
    assert found.search.notes["nlist"] == 243
    assert len(found.search.forest.a) >= 0.9985 * edges  # of brute force


def test_many_tasks_with_few_open_files(rows, brute, tmp_path):
    """Of a billion rows there are thousands of encode tasks; a process may have 1024 files open."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(path.name) for path in Path("/dev/fd").iterdir())
    with mock.patch.object(encoding, "task_rows", return_value=50):
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 40, hard))
        try:
            found = dedup(rows, method="join", out=tmp_path / "o", threads=2)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert np.array_equal(found.is_dup, brute.is_dup)
