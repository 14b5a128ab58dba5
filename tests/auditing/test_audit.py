"""An audit passes what is true, and names the row or the file of whatever is not."""

from __future__ import annotations

import csv
import hashlib
import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import truth
from hypothesis import given, settings
from hypothesis import strategies as st

from snipdedup.auditing import removed_rows
from snipdedup.auditing.audit import AuditResult
from snipdedup.auditing.removed_rows import SHOWN, AuditedRun, raw_cosines
from snipdedup.features.shards import open_features
from snipdedup.statistics import proportion_interval

ROWS, CUTS, THRESHOLD = 700, (200, 200, 450), 0.9


@pytest.fixture(scope="module")
def rows():
    return truth.clustered(ROWS, 12, 3, clusters=130, noise=0.5, copies=0.1, dtype=np.float16)


def table(begin, end):
    number = np.arange(begin, end)
    score = np.where(number % 3 == 0, np.nan, number / 7)
    return pa.table(
        {
            "key": [f"k{i:06d}" for i in number],
            "url": [f"https://example.org/{i}.jpg" for i in number],
            "caption": ["=1+1" if i % 5 == 0 else f"a thing, {i % 11}" for i in number],
            "score": pa.array(score, pa.float32()),
            "tags": pa.array([[float("nan")] * (i % 3) for i in number], pa.list_(pa.float64())),
        }
    )


@pytest.fixture(scope="module")
def laion(rows, tmp_path_factory):
    """A set in the LAION layout; one shard is empty."""
    folder = tmp_path_factory.mktemp("audit") / "set"
    truth.save_shards(folder / "img_emb", rows, list(CUTS))
    (folder / "metadata").mkdir()
    ends = [0, *CUTS, ROWS]
    for part, (low, high) in enumerate(itertools.pairwise(ends)):
        pq.write_table(table(low, high), folder / "metadata" / f"m_{part}.parquet")
    return folder


@pytest.fixture(scope="module")
def finished(laion, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "OUT"
    assert truth.snip("dedup", laion, "--out", folder, "--threshold", THRESHOLD)[0] == 0
    return folder


@pytest.fixture
def out(finished, tmp_path):
    """A copy of OUT that a test may spoil."""
    return shutil.copytree(finished, tmp_path / "OUT")


@pytest.fixture(scope="module")
def plain(laion, tmp_path_factory):
    """OUT without metadata."""
    folder = tmp_path_factory.mktemp("plain") / "OUT"
    words = ("dedup", laion / "img_emb", "--out", folder, "--threshold", THRESHOLD)
    assert truth.snip(*words)[0] == 0
    return folder


def audit(out, features, *words):
    status, said, complaint = truth.snip("audit", out, features, *words)
    assert complaint == ""
    assert said.startswith(f"audit of {out}: {'passed' if status == 0 else 'FAILED'}")
    return status, said


def wrong(said):
    """The lines of a verdict that say what is wrong."""
    return [line[4:] for line in said.splitlines() if line.startswith("  ! ")]


def where(row):
    """A row as a verdict names it."""
    starts = {0: 0, 2: 200, 3: 450}
    shard = max(number for number, start in starts.items() if start <= row)
    return f"row {row} (img_emb_{shard}.npy row {row - starts[shard]})"


def forge(out, **counts):
    """Make the manifest agree with files that a test changed, so that no checksum helps."""
    manifest = json.loads((out / "snip.json").read_text())
    for name, entry in manifest["outputs"].items():
        data = (out / name).read_bytes()
        entry |= {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest["counts"] |= counts
    (out / "snip.json").write_text(json.dumps(manifest))


def edit_mask(out, row, value):
    mask = np.load(out / "is_dup.npy")
    assert mask[row] != value
    mask[row] = value
    np.save(out / "is_dup.npy", mask)


def groups_of(out):
    return pq.read_table(out / "groups.parquet")


def edit_groups(out, **columns):
    groups = groups_of(out)
    for name, values in columns.items():
        field = groups.schema.field(name)
        groups = groups.set_column(
            groups.schema.get_field_index(name), field, pa.array(values, field.type)
        )
    pq.write_table(groups, out / "groups.parquet")


def columns_of(out, *names):
    return [groups_of(out)[name].to_numpy(zero_copy_only=False).copy() for name in names]


@pytest.mark.parametrize("method", ["join", "exact", "adc"])
@pytest.mark.parametrize("keep", ["first", "random"])
def test_what_is_true_passes(laion, rows, tmp_path, method, keep):
    words = ("--method", method, "--keep", keep, "--threshold", THRESHOLD, "--out", tmp_path / "o")
    assert truth.snip("dedup", laion, *words)[0] == 0
    before = truth.listing(tmp_path / "o"), truth.listing(laion)
    status, said = audit(tmp_path / "o", laion, "--probe_rows", ROWS)
    assert (truth.listing(tmp_path / "o"), truth.listing(laion)) == before
    assert status == 0
    assert not wrong(said)
    mask = np.load(tmp_path / "o" / "is_dup.npy")
    kept = (~mask).sum()
    assert f"{mask.sum()} of 700 rows are removed" in said
    assert f"{mask.sum()} of {mask.sum()} removed rows reach 0.9 with their representative" in said
    assert "4 of 4 agree with their size and checksum" in said
    assert f"{kept} rows in 4 files, compared with the input" in said
    near = truth.cosine_table(rows)[~mask][:, ~mask] >= np.float32(THRESHOLD)
    missed = (near.sum(1) > 1).sum()
    assert f"{missed} of all {kept} kept rows match another kept row" in said
    assert (missed == 0) or method == "adc"


def test_features_that_the_manifest_names(finished):
    status, said, _ = truth.snip("audit", finished)
    assert status == 0
    assert "passed" in said


def test_components_below_the_threshold_are_reported_not_failed(laion, tmp_path):
    words = ("--grouping", "components", "--threshold", THRESHOLD, "--out", tmp_path / "o")
    assert truth.snip("dedup", laion, *words)[0] == 0
    counts = json.loads((tmp_path / "o" / "snip.json").read_text())["counts"]
    status, said = audit(tmp_path / "o", laion)
    assert status == 0
    reach = counts["removed"] - counts["chained"]
    assert counts["chained"] > 0
    assert f"{reach} of {counts['removed']} removed rows reach 0.9" in said
    assert "by design" in said


def test_bad_rows_that_are_kept_pass(laion, rows, tmp_path):
    x = rows.copy()
    x[[0, 1, 699]] = np.array([[np.nan], [np.nan], [0]])
    truth.save_shards(tmp_path / "set", x, list(CUTS))
    words = ("--bad_rows", "keep", "--threshold", THRESHOLD, "--out", tmp_path / "o")
    assert truth.snip("dedup", tmp_path / "set", *words)[0] == 0
    status, said = audit(tmp_path / "o", tmp_path / "set", "--probe_rows", ROWS)
    assert status == 0
    kept = json.loads((tmp_path / "o" / "snip.json").read_text())["counts"]["kept"]
    assert f"0 of all {kept - 3} kept rows" in said


def test_adc_without_features_says_so_and_fails(laion, tmp_path):
    assert truth.snip("index", laion, "--out", tmp_path / "index")[0] == 0
    words = ("--index", tmp_path / "index", "--out", tmp_path / "o", "--threshold", THRESHOLD)
    assert truth.snip("dedup", *words)[0] == 0
    status, said = audit(tmp_path / "o", laion)
    assert status == 1
    assert wrong(said) == [
        "snip.json has verified false: adc without FEATURES, no pair was verified by the run"
    ]
    assert re.search(r"(\d+) of (\d+) removed rows reach 0.9", said)


@pytest.mark.parametrize("forged", [False, True])
@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("kind", ["removed", "staying member", "in no group"])
def test_a_flipped_value_of_is_dup_names_the_row(out, laion, forged, value, kind):
    member, is_dup = columns_of(out, "row", "is_dup")
    if (kind == "removed") == value:
        return  # nothing to flip
    row = {
        "removed": member[is_dup][7],
        "staying member": member[~is_dup][7],
        "in no group": np.setdiff1d(np.arange(ROWS), member)[7],
    }[kind]
    edit_mask(out, row, value)
    if forged:
        forge(out)
    status, said = audit(out, laion)
    assert status == 1
    what = {
        "removed": "is_dup.npy keeps it, groups.parquet removes it",
        "staying member": "is_dup.npy removes it, groups.parquet keeps it",
        "in no group": "is_dup.npy removes it, groups.parquet does not have it",
    }[kind]
    assert f"{where(row)}: {what}" in wrong(said)
    assert ("is_dup.npy is not the file that was written: other SHA-256" in said) != forged
    shard = where(row).partition("img_emb_")[2][0]
    assert any(line.startswith(f"metadata/m_{shard}.parquet: ") for line in wrong(said))


@pytest.mark.parametrize(("column", "value"), [("shard", "img_emb_2.npy"), ("shard_row", 0)])
def test_a_wrong_place_is_named(out, laion, column, value):
    row, values = columns_of(out, "row", column)
    at = np.flatnonzero(row == row[row < 200].max())[0]
    values[at] = value
    edit_groups(out, **{column: values})
    forge(out)
    status, said = audit(out, laion)
    assert status == 1
    assert wrong(said) == [f"groups.parquet: {where(row[at])} has another place"]


@given(st.integers(0, ROWS - 1))
@settings(max_examples=12)
def test_any_flip_is_found(plain, laion, tmp_path_factory, row):
    out = shutil.copytree(plain, tmp_path_factory.mktemp("flip") / "OUT")
    edit_mask(out, row, not np.load(out / "is_dup.npy")[row])
    forge(out)
    status, said = audit(out, laion, "--probe_rows", 0)
    assert status == 1
    assert any(line.startswith(f"{where(row)}: is_dup.npy") for line in wrong(said))


def two_removed(out, rows, *, same_group):
    """Places of two removed rows with different representatives, in one group or in two."""
    row, group, representative, is_dup = columns_of(out, "row", "group", "representative", "is_dup")
    table_ = truth.cosine_table(rows)
    gone = np.flatnonzero(is_dup)
    for i in gone:
        for j in gone[gone > i]:
            crossed = table_[row[i], representative[j]]
            if (
                representative[i] != representative[j]
                and (group[i] == group[j]) == same_group
                and (same_group == (crossed >= np.float32(THRESHOLD)))
            ):
                return i, j
    raise AssertionError


@pytest.mark.parametrize("same_group", [False, True])
@pytest.mark.parametrize("forged", [False, True])
def test_swapped_representatives_name_the_row(out, rows, laion, same_group, forged):
    i, j = two_removed(out, rows, same_group=same_group)
    row, representative, similarity = columns_of(out, "row", "representative", "similarity")
    representative[[i, j]] = representative[[j, i]]
    edit_groups(out, representative=representative)
    if forged:
        forge(out)
    status, said = audit(out, laion)
    assert status == 1
    lines = [line for line in wrong(said) if line.startswith(where(row[i]))]
    assert lines
    if same_group:  # still a match that stays, but not the one that the cosine is of
        assert lines == [
            f"{where(row[i])}: groups.parquet has cosine {similarity[i]:.6f}, with its "
            f"representative {where(representative[i])} it is "
            f"{truth.cosine_table(rows)[row[i], representative[i]]:.6f}"
        ]
    else:
        assert any("is not a kept row of its group" in line for line in lines)
        assert any("expected 0.9 or more" in line for line in lines)
    assert ("groups.parquet is not the file that was written" in said) != forged


def test_a_representative_that_goes_itself_is_named(out, laion):
    row, group, representative, is_dup = columns_of(out, "row", "group", "representative", "is_dup")
    gone = np.flatnonzero(is_dup)
    i = next(i for i in gone if (is_dup & (group == group[i])).sum() > 1)
    j = next(j for j in gone if group[j] == group[i] and j != i)
    representative[i] = row[j]
    edit_groups(out, representative=representative)
    forge(out)
    status, said = audit(out, laion)
    assert status == 1
    assert (
        f"{where(row[i])}: its representative {where(row[j])} is not a kept row of its group"
    ) in wrong(said)


def test_a_row_that_stays_for_another_is_named(plain, laion, tmp_path):
    out = shutil.copytree(plain, tmp_path / "OUT")
    row, representative, is_dup = columns_of(out, "row", "representative", "is_dup")
    i = np.flatnonzero(~is_dup)[3]
    representative[i] = row[i + 1] if row[i + 1] < ROWS else row[i - 1]
    edit_groups(out, representative=representative)
    forge(out)
    status, said = audit(out, laion)
    assert status == 1
    assert len(wrong(said)) == 1
    assert wrong(said)[0].startswith(where(row[i]))


def test_a_removed_row_below_the_threshold_is_named(plain, rows, laion, tmp_path):
    # A row that stays in a group beside another one is removed for it: all files agree.
    out = shutil.copytree(plain, tmp_path / "OUT")
    row, group, representative, similarity, is_dup = columns_of(
        out, "row", "group", "representative", "similarity", "is_dup"
    )
    named = set(representative[is_dup])
    stays = np.flatnonzero(~is_dup)
    i, j = next(
        (i, j) for i in stays for j in stays
        if i != j and group[i] == group[j] and row[i] not in named
    )  # fmt: skip
    cosine = truth.cosine_table(rows)[row[i], row[j]]
    assert cosine < THRESHOLD
    representative[i], similarity[i], is_dup[i] = row[j], cosine, True
    edit_groups(out, representative=representative, similarity=similarity, is_dup=is_dup)
    edit_mask(out, row[i], True)
    forge(out, removed=int(is_dup.sum()), chained=1)
    status, said = audit(out, laion)
    assert status == 1
    assert wrong(said) == [
        f"{where(row[i])}: its cosine with its representative {where(row[j])} is {cosine:.6f}, "
        "expected 0.9 or more"
    ]
    assert "FAILED, 1 violation\n" in said


def test_a_threshold_that_is_too_high_by_the_last_bit_of_one_pair(plain, laion, tmp_path):
    out = shutil.copytree(plain, tmp_path / "OUT")
    row, similarity, is_dup = columns_of(out, "row", "similarity", "is_dup")
    lowest = similarity[is_dup].min()
    at = np.flatnonzero(is_dup & (similarity == lowest))
    for threshold, failed in ((lowest, 0), (np.nextafter(lowest, np.float32(2)), len(at))):
        manifest = json.loads((out / "snip.json").read_text())
        manifest["settings"]["threshold"] = float(threshold)
        manifest["counts"]["chained"] = failed
        (out / "snip.json").write_text(json.dumps(manifest))
        status, said = audit(out, laion)
        assert status == (failed > 0)
        assert len(wrong(said)) == failed
        assert all(line.startswith(where(row[at[0]])) for line in wrong(said)[:1])


@pytest.mark.parametrize("forged", [False, True])
@pytest.mark.parametrize("place", [0, 57, -1])
def test_a_dropped_metadata_row_is_named_with_its_file(out, laion, forged, place):
    path = out / "metadata" / "m_2.parquet"
    kept = pq.read_table(path)
    place %= kept.num_rows
    row = int(kept["key"][place].as_py()[1:])
    left = pa.concat_tables([kept.slice(0, place), kept.slice(place + 1)])
    pq.write_table(left, path)
    if forged:
        forge(out)
    status, said = audit(out, laion)
    assert status == 1
    assert (
        f"metadata/m_2.parquet: {kept.num_rows - 1} rows, is_dup.npy keeps {kept.num_rows} of this "
        f"file; {where(row)} is missing or comes too late"
    ) in wrong(said)
    assert len(wrong(said)) == 2 - forged


@pytest.mark.parametrize("column", ["key", "score", "tags", "dup_count"])
def test_a_changed_metadata_value_is_named(out, laion, column):
    path = out / "metadata" / "m_3.parquet"
    kept = pq.read_table(path)
    row = int(kept["key"][31].as_py()[1:])
    values = kept[column].to_pylist()
    values[31] = {"key": "k999999", "score": -1.0, "tags": [1.0], "dup_count": 99}[column]
    at = kept.schema.get_field_index(column)
    field = kept.schema.field(column)
    pq.write_table(kept.set_column(at, field, pa.array(values, field.type)), path)
    forge(out)
    status, said = audit(out, laion)
    assert status == 1
    assert wrong(said) == [
        f"metadata/m_3.parquet row 31: expected {where(row)}, found other values"
    ]


def test_swapped_metadata_rows_are_named(out, laion):
    path = out / "metadata" / "m_0.parquet"
    kept = pq.read_table(path)
    order = np.arange(kept.num_rows)
    order[[4, 9]] = [9, 4]
    pq.write_table(kept.take(order), path)
    forge(out)
    status, said = audit(out, laion)
    row = int(kept["key"][4].as_py()[1:])
    assert status == 1
    assert wrong(said) == [f"metadata/m_0.parquet row 4: expected {where(row)}, found other values"]


def test_metadata_without_its_source_is_counted(rows, laion, tmp_path):
    own = shutil.copytree(laion, tmp_path / "set")
    words = ("--threshold", THRESHOLD, "--out", tmp_path / "o")
    assert truth.snip("dedup", own, *words)[0] == 0
    shutil.rmtree(own / "metadata")
    status, said = audit(tmp_path / "o", own)
    assert status == 0
    assert "the input is not where it was" in said
    status, said = audit(tmp_path / "o", own, "--metadata", laion / "metadata")
    assert status == 0
    assert "compared with the input" in said
    (tmp_path / "o" / "metadata" / "m_3.parquet").unlink()
    status, said = audit(tmp_path / "o", own)
    assert status == 1
    assert wrong(said)[0] == "metadata/m_3.parquet is missing"


def test_metadata_as_csv(laion, rows, tmp_path):
    for part in range(4):
        lines = pq.read_table(laion / "metadata" / f"m_{part}.parquet").drop_columns(["tags"])
        (tmp_path / "csv").mkdir(exist_ok=True)
        pa.csv.write_csv(lines, tmp_path / "csv" / f"m_{part}.csv")
    words = ("--metadata", tmp_path / "csv", "--threshold", THRESHOLD, "--out", tmp_path / "o")
    assert truth.snip("dedup", laion / "img_emb", *words)[0] == 0
    status, said = audit(tmp_path / "o", laion)
    assert status == 0
    assert "compared with the input" in said
    path = tmp_path / "o" / "metadata" / "m_2.parquet"
    kept = pq.read_table(path)
    pq.write_table(kept.slice(1), path)
    status, said = audit(tmp_path / "o", laion)
    row = int(kept["key"][0].as_py()[1:])
    assert status == 1
    assert f"{where(row)} is missing or comes too late" in said


def test_metadata_in_other_files_is_refused(finished, laion, tmp_path):
    pq.write_table(table(0, ROWS), tmp_path / "all.parquet")
    words = ("audit", finished, laion, "--metadata", tmp_path / "all.parquet")
    status, _, complaint = truth.snip(*words)
    assert status == 1
    assert "expected m_0.parquet, m_1.parquet" in complaint


def test_a_changed_feature_file_is_named_and_so_is_its_row(finished, rows, laion, tmp_path):
    own = shutil.copytree(laion, tmp_path / "set")
    row = int(np.flatnonzero(np.load(finished / "is_dup.npy")[450:])[3])
    changed = np.load(own / "img_emb" / "img_emb_3.npy")
    changed[row] = -changed[row]
    np.save(own / "img_emb" / "img_emb_3.npy", changed)
    status, said = audit(finished, own)
    assert status == 1
    path = own / "img_emb" / "img_emb_3.npy"
    assert wrong(said)[0].startswith(f"{path} is not what was searched: checksum ")
    assert len(wrong(said)) == 2
    assert wrong(said)[1].startswith(f"{where(450 + row)}: its cosine with its representative")


@pytest.mark.parametrize("change", ["fewer rows", "a shard less", "one bit"])
def test_features_that_are_not_those_searched_are_named(finished, laion, tmp_path, change):
    own = shutil.copytree(laion, tmp_path / "set")
    path = own / "img_emb" / "img_emb_2.npy"
    if change == "fewer rows":
        np.save(path, np.load(path)[:-1])
    elif change == "a shard less":
        path.unlink()
    else:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    status, said = audit(finished, own)
    assert status == 1
    expected = (
        "shards: expected 4 files, found 3"
        if change == "a shard less"
        else f"{path} is not what was searc"
    )
    assert wrong(said)[0].startswith(expected)
    assert ("not proved: the features are others" in said) == (change != "one bit")


@pytest.mark.parametrize("name", ["groups.parquet", "is_dup.npy", "forest.parquet"])
@pytest.mark.parametrize("change", ["gone", "cut"])
def test_files_of_out_that_are_damaged_are_named(out, laion, name, change):
    if change == "gone":
        (out / name).unlink()
    else:
        (out / name).write_bytes((out / name).read_bytes()[:-40])
    status, said = audit(out, laion)
    assert status == 1
    assert wrong(said)[0].startswith(f"{name} is ")


def test_counts_that_are_not_so(out, laion):
    removed = int(np.load(out / "is_dup.npy").sum())
    forge(out, removed=removed + 1)
    status, said = audit(out, laion)
    assert status == 1
    assert wrong(said) == [f"snip.json counts removed {removed + 1}, groups.parquet {removed}"]


def test_groups_out_of_order_or_of_rows_that_are_not(out, laion):
    (representative,) = columns_of(out, "representative")
    turned = np.arange(len(representative))[::-1]
    pq.write_table(groups_of(out).take(turned), out / "groups.parquet")
    status, said = audit(out, laion)
    assert status == 1
    assert any("out of place in groups" in line for line in wrong(said))
    representative[0] = ROWS
    edit_groups(out, representative=representative)
    status, said = audit(out, laion)
    assert status == 1
    assert any(f"is none of the {ROWS} rows" in line for line in wrong(said))


def test_a_sample_proves_less_and_says_what_follows(finished, laion):
    status, said = audit(finished, laion, "--sample", 50)
    assert status == 0
    lines = said.splitlines()
    at = next(i for i, line in enumerate(lines) if "50 of 50 sampled removed rows reach" in line)
    # 1 - .025 ** (1 / 50)
    assert lines[at + 1].strip() == "so at most 7.11 % of all removed rows do not (95 %)"
    every = int(np.load(finished / "is_dup.npy").sum())
    assert f"{every} of {every} sampled" in audit(finished, laion, "--sample", 10**6)[1]


def test_missed_matches_are_counted_and_one_is_named(finished, rows, laion, tmp_path):
    # What was searched at .9 lets rows stay that match at .8.
    out = shutil.copytree(finished, tmp_path / "OUT")
    manifest = json.loads((out / "snip.json").read_text())
    manifest["settings"]["threshold"] = 0.8
    (out / "snip.json").write_text(json.dumps(manifest))
    mask = np.load(out / "is_dup.npy")
    table_ = truth.cosine_table(rows)[~mask][:, ~mask]
    np.fill_diagonal(table_, -2)
    missed = int((table_.max(1) >= np.float32(0.8)).sum())
    kept = np.flatnonzero(~mask)
    status, said = audit(out, laion, "--probe_rows", ROWS)
    assert status == 0  # reported, not failed
    assert missed > 0
    assert f"{missed} of all {len(kept)} kept rows match another kept row" in said
    a, b = (kept[i] for i in np.unravel_index(table_.argmax(), table_.shape))
    assert f"such as {where(a)} and {where(b)}: cosine {table_.max():.6f}" in said
    assert "kept rows match" not in audit(out, laion, "--probe_rows", 0)[1]
    status, said = audit(out, laion, "--probe_rows", 60)
    found, low, high = re.search(
        r"(\d+) of 60 sampled kept rows match .*: (\S+) to (\S+) % of them", said
    ).groups()
    assert (float(low) / 100, float(high) / 100) == pytest.approx(
        proportion_interval(int(found), 60), abs=1e-4
    )
    assert float(low) <= 100 * missed / len(kept) <= float(high)


def test_results_do_not_depend_on_memory_or_threads(finished, laion, monkeypatch):
    expected = audit(finished, laion, "--threads", 1)[1]
    monkeypatch.setattr(removed_rows, "PAIRS", 16)
    assert audit(finished, laion, "--threads", 2, "--max_memory", "1k")[1] == expected


def test_raw_cosines_by_hand(monkeypatch):
    monkeypatch.setattr(removed_rows, "PAIRS", 2)
    x = np.array([[1, 0], [3, 4], [0, 0], [0, 2], [0, 0], [np.nan, 1]], np.float32)
    features = open_features([x[:2], x[2:]])
    a, b = np.array([3, 0, 1, 2, 5, 0]), np.array([1, 1, 1, 4, 5, 3])
    found = raw_cosines(features, a, b, 1, 1)
    np.testing.assert_allclose(found, [0.8, 0.6, 1, np.nan, np.nan, 0], atol=1e-7)


def read_sheet(path):
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def judge(path, verdicts, delimiter=","):
    lines = read_sheet(path)
    for line, verdict in zip(lines, verdicts, strict=True):
        line["verdict"] = verdict
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, lines[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(lines)


def test_a_sheet_has_random_removed_pairs_as_they_are(finished, rows, laion, tmp_path):
    sheet = tmp_path / "new" / "sheet.csv"
    status, said = audit(finished, laion, "--sheet", sheet, "-n", 40)
    assert status == 0
    assert f"40 removed pairs to judge in {sheet}" in said
    lines = read_sheet(sheet)
    groups = {g["row"]: g for g in groups_of(finished).to_pylist()}
    assert len({line["row"] for line in lines}) == 40
    for line in lines:
        row, of = int(line["row"]), int(line["representative"])
        assert groups[row]["is_dup"]
        assert groups[row]["representative"] == of
        assert float(line["cosine"]) == pytest.approx(truth.cosine_table(rows)[row, of], abs=1e-6)
        for name, number in (("", row), ("representative_", of)):
            assert line[f"{name}key"] == f"k{number:06d}"
            assert line[f"{name}url"] == f"https://example.org/{number}.jpg"
            caption = "'=1+1" if number % 5 == 0 else f"a thing, {number % 11}"
            assert line[f"{name}caption"] == caption  # no spreadsheet takes it for a formula
            assert line[f"{name}place"] == where(number).partition("(")[2].rstrip(")")
        assert line["verdict"] == ""
    status, said, complaint = truth.snip("audit", finished, laion, "--sheet", sheet)
    assert status == 1
    assert "may hold verdicts" in complaint
    assert read_sheet(sheet) == lines
    for seed, same in ((0, True), (1, False)):
        other = tmp_path / f"{seed}.csv"
        audit(finished, laion, "--sheet", other, "-n", 40, "--seed", seed)
        assert (read_sheet(other) == lines) == same


def test_no_sheet_of_features_that_are_others(finished, rows, tmp_path):
    truth.save_shards(tmp_path / "few", rows[:600], list(CUTS))
    status, said = audit(finished, tmp_path / "few", "--sheet", tmp_path / "s.csv")
    assert status == 1
    assert "img_emb_3.npy is not what was searched: rows 250, found 150" in said
    assert not (tmp_path / "s.csv").exists()


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_judged_sheet_gives_the_human_precision(finished, laion, tmp_path, delimiter):
    sheet = tmp_path / "sheet.csv"
    audit(finished, laion, "--sheet", sheet, "-n", 12)
    verdicts = ["yes", "Y", " same ", "1", "TRUE", "dup", "duplicate", "true", "no", "0", "", ""]
    judge(sheet, verdicts, delimiter)
    status, said, _ = truth.snip("audit", finished, laion, "--judged", sheet)
    assert status == 0
    assert said.splitlines() == [
        "human precision 80.0 % (8 of 10 judged pairs are duplicates; 95 % interval 44.4 to "
        "97.5 %)",
        "2 pairs of the sheet have no verdict yet",
    ]


def test_sheets_that_cannot_be_read_as_verdicts(finished, laion, tmp_path):
    sheet = tmp_path / "sheet.csv"
    audit(finished, laion, "--sheet", sheet, "-n", 3)

    def refused():
        status, said, complaint = truth.snip("audit", finished, "--judged", sheet)
        assert (status, said) == (1, "")
        return complaint

    assert "no verdict in the sheet" in refused()
    judge(sheet, ["yes", "perhaps", ""])
    assert "line 3: expected yes or no as verdict, found 'perhaps'" in refused()
    lines = read_sheet(sheet)
    judge(sheet, ["yes", "no", ""])
    text = sheet.read_text()
    sheet.write_text(text.replace(f"\n{lines[1]['row']},", f"\n{lines[1]['representative']},"))
    assert "the sheet is of another run" in refused()
    sheet.write_text("row,verdict\n1,yes\n")
    assert "it has no column representative" in refused()
    sheet.write_text("row,representative,verdict\nx,1,yes\n")
    assert "line 2: expected row numbers, found 'x'" in refused()
    sheet.unlink()
    assert "expected a sheet" in refused()


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--sheet", "a.csv", "--judged", "b.csv"], 2, "give one of them"),
        (["--sample", "-1"], 2, "--sample must lie between"),
        (["--metadata", "nowhere"], 1, "nowhere"),
    ],
)
def test_refusals(finished, laion, words, status, message):
    found, _, complaint = truth.snip("audit", finished, laion, *words)
    assert found == status
    assert message in complaint


def test_a_folder_that_is_no_finished_run_is_refused(laion, tmp_path):
    assert "expected a finished dedup folder" in truth.snip("audit", tmp_path, laion)[2]


def test_a_sheet_is_not_written_into_an_input(finished, laion):
    before = truth.listing(laion), truth.listing(finished)
    for place in (laion / "img_emb", finished):
        status, _, complaint = truth.snip("audit", finished, laion, "--sheet", place / "s.csv")
        assert status == 1
        assert "never writes there" in complaint
    assert (truth.listing(laion), truth.listing(finished)) == before


def test_a_verdict_shows_a_few_of_a_kind():
    settings = {"threshold": 1, "method": "join", "grouping": "star"}
    run = AuditedRun(Path("o"), {"shards": [], "settings": settings}, 1, 1)
    run.fail_each("a", np.arange(3), "a{}".format)
    run.fail_each("a", np.arange(3, 2000), "a{}".format)
    run.fail("b", "other")
    lines = str(AuditResult(run.folder, run.checked, run.violations)).splitlines()
    assert lines[0] == "audit of o: FAILED, 2,001 violations"
    shown = [f"  ! a{i}" for i in range(SHOWN)]
    assert lines[1:] == [*shown, "  ! and 1,995 more like that", "  ! other"]


@pytest.fixture
def referred(rows, tmp_path):
    """(OUT, features, reference): some rows go for rows of the reference, others for their own."""
    truth.save_shards(tmp_path / "ref", rows[:250], [100])
    truth.save_shards(tmp_path / "new", rows[250:], [200])
    words = ("--reference", tmp_path / "ref", "--threshold", THRESHOLD, "--out", tmp_path / "o")
    assert truth.snip("dedup", tmp_path / "new", *words)[0] == 0
    return tmp_path / "o", tmp_path / "new", tmp_path / "ref"


def test_rows_that_go_for_a_reference_are_proved_on_it(referred):
    out, features, _ = referred
    status, said = audit(out, features, "--probe_rows", ROWS)
    assert status == 0
    groups = groups_of(out)
    outside = len(groups) - groups["reference"].null_count
    removed = int(np.load(out / "is_dup.npy").sum())
    assert 20 < outside < removed
    assert f"{removed} of {removed} removed rows reach 0.9" in said
    assert f"{outside} rows are removed for rows of 1 reference\n" in said
    assert "0 of them match a row of" in said


def test_rows_that_go_for_references_only_are_proved(referred, tmp_path):
    _, features, reference = referred
    out = tmp_path / "only"
    words = ("--reference", reference, "--references_only", "--grouping", "components")
    words = (*words, "--threshold", THRESHOLD, "--out", out)
    assert truth.snip("dedup", features, *words)[0] == 0
    status, said = audit(out, features, "--probe_rows", ROWS)
    assert status == 0
    removed = np.flatnonzero(np.load(out / "is_dup.npy"))
    assert f"{len(removed)} of {len(removed)} removed rows reach 0.9" in said
    assert f"0 of {ROWS - 250 - len(removed)} kept rows match a row of {reference}" in said
    assert "match another kept row" not in said  # their own duplicates stay
    reference_row, similarity = columns_of(out, "representative", "similarity")
    names = groups_of(out)["reference"].to_pylist()
    forged = {"representative": reference_row.copy(), "reference": names, "similarity": similarity}
    forged["representative"][3], forged["reference"][3] = removed[3], None
    edit_groups(out, **forged)
    forge(out)
    status, said = audit(out, features)
    assert status == 1
    assert any("removed for a row of FEATURES" in line for line in wrong(said))


def test_a_reference_may_have_more_rows_than_the_set(rows, tmp_path):
    truth.save_shards(tmp_path / "ref", rows[: ROWS - 100], [])
    truth.save_shards(tmp_path / "new", rows[ROWS - 100 :], [])
    words = ("--reference", tmp_path / "ref", "--threshold", THRESHOLD, "--out", tmp_path / "o")
    assert truth.snip("dedup", tmp_path / "new", *words)[0] == 0
    status, said = audit(tmp_path / "o", tmp_path / "new")
    assert status == 0, said


def test_a_wrong_reference_row_is_named(referred):
    out, features, reference = referred
    groups = groups_of(out)
    at = np.flatnonzero(groups["reference"].is_valid().to_numpy())[[2, 9]]
    row, representative = columns_of(out, "row", "representative")
    representative[at] = representative[at[0]] ^ 1, 250
    edit_groups(out, representative=representative)
    forge(out)
    status, said = audit(out, features)
    assert status == 1
    rows = [row[i] - 200 * (row[i] >= 200) for i in at]
    shards = [int(row[i] >= 200) for i in at]
    names = [
        f"row {row[i]} (img_emb_{shard}.npy row {place})"
        for i, shard, place in zip(at, shards, rows, strict=True)
    ]
    lines = wrong(said)
    assert len(lines) == 2
    assert any(line.startswith(names[0]) and f"of {reference} (img_emb" in line for line in lines)
    assert (
        f"{names[1]}: its representative, row 250 of {reference}, is not a kept row there" in lines
    )


def test_a_row_that_is_none_goes_for_a_reference(referred):
    """It is named once, and nothing is looked up for it."""
    out, features, _ = referred
    (row,) = columns_of(out, "row")
    at = np.flatnonzero(groups_of(out)["reference"].is_valid().to_numpy())[-1]
    row[at] = 10**6
    edit_groups(out, row=row)
    forge(out)
    status, said = audit(out, features)
    assert status == 1
    lines = wrong(said)
    assert any(line.startswith("groups.parquet: row 1,000,000 or its rep") for line in lines)
    assert not any("not as snip wrote them" in line or "kept row there" in line for line in lines)


@pytest.mark.parametrize("column", ["reference", "similarity", "shard"])
def test_a_missing_column_of_groups_is_named(referred, column):
    out, features, _ = referred
    pq.write_table(groups_of(out).drop_columns([column]), out / "groups.parquet")
    forge(out)
    status, said = audit(out, features)
    assert status == 1
    assert any(f"groups.parquet cannot be checked: it has no column {column}" in line
               for line in wrong(said))  # fmt: skip


def test_a_sample_of_cosines_leaves_out_no_wrong_reference(referred):
    """Names and rows of references cost no features, so all of them are looked at."""
    out, features, _ = referred
    groups = groups_of(out)
    at = np.flatnonzero(groups["reference"].is_valid().to_numpy())
    names, (representative,) = groups["reference"].to_pylist(), columns_of(out, "representative")
    for wrong in ("name", "row"):
        forged = {"reference": list(names), "representative": representative.copy()}
        if wrong == "name":
            forged["reference"][at[4]] = "elsewhere"
        else:
            forged["representative"][at[4]] = 10**6
        edit_groups(out, **forged)
        forge(out)
        status, said = audit(out, features, "--sample", 1)
        assert status == 1
        expected = "rows of elsewhere are not proved" if wrong == "name" else "1,000,000 of"
        assert expected in said


@pytest.mark.parametrize("change", ["gone", "changed"])
def test_a_reference_that_is_not_what_it_was_is_named(referred, change):
    out, features, reference = referred
    path = reference / "img_emb_1.npy"
    if change == "gone":
        path.unlink()
    else:
        np.save(path, -np.load(path))
    status, said = audit(out, features)
    assert status == 1
    assert str(path) in wrong(said)[0]


def test_an_earlier_out_as_reference(rows, tmp_path):
    truth.save_shards(tmp_path / "old", rows[:250], [])
    truth.save_shards(tmp_path / "new", rows[250:], [])
    earlier, out = tmp_path / "earlier", tmp_path / "o"
    words = ("--threshold", THRESHOLD)
    assert truth.snip("dedup", tmp_path / "old", *words, "--out", earlier)[0] == 0
    assert (
        truth.snip("dedup", tmp_path / "new", *words, "--reference", earlier, "--out", out)[0] == 0
    )
    assert audit(out, tmp_path / "new")[0] == 0
    gone = np.flatnonzero(np.load(earlier / "is_dup.npy"))
    at = np.flatnonzero(groups_of(out)["reference"].is_valid().to_numpy())[0]
    row, representative = columns_of(out, "row", "representative")
    representative[at] = gone[0]
    edit_groups(out, representative=representative)
    forge(out)
    status, said = audit(out, tmp_path / "new")
    assert status == 1
    assert wrong(said) == [
        f"row {row[at]} (img_emb_0.npy row {row[at]}): its representative, row {gone[0]} of "
        f"{earlier}, is not a kept row there"
    ]


def test_semdedup_is_reported_not_failed(laion, tmp_path):
    words = ("--method", "semdedup", "--threshold", THRESHOLD, "--clusters", 4)
    assert truth.snip("dedup", laion, *words, "--out", tmp_path / "o")[0] == 0
    member, representative, is_dup = columns_of(tmp_path / "o", "row", "representative", "is_dup")
    assert np.isin(representative[is_dup], member[is_dup]).any()  # some are removed themselves
    status, said = audit(tmp_path / "o", laion, "--probe_rows", ROWS)
    assert status == 0
    assert "semdedup: a representative may be removed itself" in said


def test_captions_must_match_too(laion, rows, tmp_path):
    text = truth.clustered(ROWS, 8, 9, clusters=2, noise=0.3)
    np.save(tmp_path / "text.npy", text)
    words = ("--text_features", tmp_path / "text.npy", "--text_threshold", 0.9)
    words = (*words, "--threshold", THRESHOLD, "--out", tmp_path / "o")
    assert truth.snip("dedup", laion, *words)[0] == 0
    status, said = audit(tmp_path / "o", laion)
    assert status == 0
    manifest = json.loads((tmp_path / "o" / "snip.json").read_text())
    row, representative, is_dup = columns_of(tmp_path / "o", "row", "representative", "is_dup")
    removed = f"{is_dup.sum():,} of {is_dup.sum():,} removed rows reach"
    assert f"{removed} 0.9 in {tmp_path / 'text.npy'}, too" in said
    cosine = truth.cosine_table(text)[row[is_dup], representative[is_dup]]
    lowest = int(cosine.argmin())
    manifest["also"][0]["threshold"] = float(np.sort(cosine)[1])
    (tmp_path / "o" / "snip.json").write_text(json.dumps(manifest))
    status, said = audit(tmp_path / "o", laion)
    assert status == 1
    assert len(wrong(said)) == 1
    assert wrong(said)[0].startswith(
        f"{where(row[is_dup][lowest])}: its cosine in {tmp_path / 'text.npy'} with"
    )
    known = columns_of(tmp_path / "o", "also_similarity_1")[0]
    known[np.flatnonzero(is_dup)[3]] += 0.001
    edit_groups(tmp_path / "o", also_similarity_1=pa.array(known, mask=np.isnan(known)))
    manifest["also"][0]["threshold"] = 0.9
    (tmp_path / "o" / "snip.json").write_text(json.dumps(manifest))
    forge(tmp_path / "o")
    assert wrong(audit(tmp_path / "o", laion)[1])[0].startswith(
        f"{where(row[is_dup][3])}: groups.parquet has cosine {known[is_dup][3]:.6f} in"
    )
    np.save(tmp_path / "text.npy", -text)
    assert (
        "text.npy is not what was searched: checksum" in wrong(audit(tmp_path / "o", laion)[1])[0]
    )


def test_all_rows_with_weights_are_compared(laion, tmp_path):
    words = ("--weights", "--threshold", THRESHOLD, "--out", tmp_path / "o")
    assert truth.snip("dedup", laion, *words)[0] == 0
    status, said = audit(tmp_path / "o", laion)
    assert status == 0
    assert "700 rows in 4 files" in said
