"""What a result is in Python: its tables against numpy, its page and picture, files and back."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pytest
import truth
from samples import write_laion

import snipdedup
from snipdedup.errors import SnipError, UsageError

ROWS = truth.clustered(900, 16, 3, clusters=250, noise=0.35, copies=0.1)
TABLE = pa.table({
    "row": [f"r{n}" for n in range(900)], "width": np.arange(900)[::-1] % 7, "emb": list(ROWS)
})  # fmt: skip


@pytest.fixture(scope="module")
def found():
    return snipdedup.dedup(TABLE, threshold=0.9)


def test_the_rows_that_are_kept_have_the_columns_of_the_input(found):
    kept = np.flatnonzero(~found.is_dup)
    selected = found.selected
    assert selected.column_names == ["row", "input_row", "width"]
    assert np.array_equal(selected["row"], kept)
    assert selected["input_row"].to_pylist() == [f"r{n}" for n in kept]
    assert np.array_equal(selected["width"], TABLE["width"].to_numpy()[kept])


def test_each_duplicate_names_its_representative_and_their_cosine(found):
    table = found.duplicates
    names = ["row", "group", "representative", "similarity", "input_row", "width"]
    assert table.column_names == names
    row, representative = table["row"].to_numpy(), table["representative"].to_numpy()
    assert np.array_equal(row, np.flatnonzero(found.is_dup))
    assert not found.is_dup[representative].any()
    cosines = truth.cosine_table(ROWS)[row, representative]
    np.testing.assert_allclose(table["similarity"], cosines, atol=1e-6)
    assert table["similarity"].to_numpy().min() >= np.float32(0.9)
    assert table["input_row"].to_pylist() == [f"r{n}" for n in row]


def test_tables_of_folders_with_metadata_and_of_arrays_without(tmp_path):
    write_laion(tmp_path / "set", ROWS, cuts=(200, 450))
    made = snipdedup.dedup(tmp_path / "set", threshold=0.9)
    assert np.array_equal(made.selected["n"], np.flatnonzero(~made.is_dup))
    alone = snipdedup.dedup(ROWS, threshold=0.9)
    assert alone.selected.column_names == ["row"]
    assert snipdedup.dedup(np.eye(3)).duplicates.num_rows == 0


def test_references_are_named_beside_duplicates():
    made = snipdedup.dedup(ROWS[:400], reference=ROWS[400:], threshold=0.9)
    table = made.duplicates.to_pylist()
    outside = [one for one in table if one["reference"] is not None]
    assert len(outside) == made.counts.for_reference > 0
    cosines = truth.cosine_table(ROWS)
    for one in outside:
        assert one["similarity"] == pytest.approx(cosines[one["row"], 400 + one["representative"]])


def test_the_repr_is_one_line(found):
    assert repr(found) == (
        f"<Result: 900 rows, {found.removed:,} removed ({found.removed / 9:.2f} %), "
        f"{found.kept:,} kept; threshold 0.9, grouping star>"
    )


def test_the_page_of_a_notebook_is_well_formed_and_has_the_numbers(found):
    page = ElementTree.fromstring(found._repr_html_())
    texts = ["".join(cell.itertext()) for cell in page.iter("td")]
    assert {f"{found.removed:,}", f"{found.kept:,}", "0.900", "0.940"} <= set(texts)
    points = page.find(".//polyline").get("points").split()
    heights = [float(point.split(",")[1]) for point in points]
    assert len(points) == 64
    assert heights == sorted(heights)  # downwards: fewer rows go at a higher threshold


def test_the_page_holds_no_html_of_a_name(tmp_path):
    out = tmp_path / "<script>alert(1)<"
    page = snipdedup.dedup(ROWS, threshold=0.9, out=out)._repr_html_()
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_the_curve_is_what_components_remove(found):
    thresholds, removed = found.curve()
    for at in (0, 20, 63):
        assert removed[at] == found.at(thresholds[at], grouping="components").removed
    with pytest.raises(SnipError, match="a curve needs verified pairs of one set"):
        snipdedup.dedup(ROWS, method="semdedup", clusters=3).curve()
    assert "<svg" not in snipdedup.dedup(ROWS, method="semdedup", clusters=3)._repr_html_()


def test_the_plot_shows_the_curve(found):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    axes = found.plot()
    line, dot = axes.get_lines()
    np.testing.assert_allclose(line.get_ydata(), 100 * found.curve()[1] / 900)
    assert dot.get_ydata()[0] == pytest.approx(100 * found.removed / 900)
    assert found.plot(axes) is axes


@pytest.mark.parametrize(
    "how", [{}, {"keep": "max:width", "grouping": "components"}, {"method": "semdedup"}]
)
def test_a_saved_result_is_the_folder_of_a_run(tmp_path, how):
    made = snipdedup.dedup(TABLE, threshold=0.9, **how)
    saved = made.at(0.95).save(tmp_path / "saved")
    snipdedup.dedup(TABLE, threshold=0.95, out=tmp_path / "run", **how)
    for path in (tmp_path / "run").rglob("*.[np]*"):
        if path.suffix in (".npy", ".parquet"):
            again = tmp_path / "saved" / path.relative_to(tmp_path / "run")
            assert again.read_bytes() == path.read_bytes(), path
    assert saved.out == tmp_path / "saved"
    assert snipdedup.audit(tmp_path / "saved", TABLE).passed or how.get("method")
    with pytest.raises(SnipError, match="holds a finished run with other threshold"):
        made.save(tmp_path / "saved")
    made.save(tmp_path / "saved", overwrite=True)
    assert np.load(tmp_path / "saved" / "is_dup.npy").sum() == made.removed


def test_a_result_without_a_path_opens_with_its_features_or_without(found, tmp_path):
    found.save(tmp_path / "out")
    opened = snipdedup.open_result(tmp_path / "out")
    assert np.array_equal(opened.is_dup, found.is_dup)
    assert opened.groups.equals(found.groups)
    assert opened.forest.equals(found.forest)
    assert str(opened).startswith(str(found).splitlines()[0])
    looser = opened.at(0.95, "components"), found.at(0.95, "components")
    assert np.array_equal(*(one.is_dup for one in looser))
    with pytest.raises(SnipError, match="star grouping compares raw rows: give the features"):
        opened.at(0.95)
    with pytest.raises(SnipError, match="was read without its features; give them to open_result"):
        opened.save(tmp_path / "again")
    whole = snipdedup.open_result(tmp_path / "out", TABLE)
    assert np.array_equal(whole.at(0.95).is_dup, found.at(0.95).is_dup)
    assert whole.selected.equals(found.selected)
    with pytest.raises(SnipError, match="not those that were searched"):
        snipdedup.open_result(tmp_path / "out", TABLE[:800])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overwrite": "yes"}, "--overwrite must be True or False, found 'yes'"),
        ({"k": 1.5}, "--k must be a whole number, found 1.5"),
        ({"k": True}, "--k must be a whole number, found True"),
        ({"keep": 3}, "--keep must be a text, found 3"),
        ({"threshold": "high"}, "--threshold must be a number, found 'high'"),
    ],
)
def test_values_of_other_types_are_refused(settings, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        snipdedup.dedup(ROWS, **settings)
    assert snipdedup.dedup(np.eye(2), overwrite=np.False_, seed=np.int64(3)).removed == 0
