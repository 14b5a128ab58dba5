"""The report as a tool, driven in a browser: filter, page, enlarge, step, mark, save, apply."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import truth
from samples import png

import snipdedup

ROWS, THRESHOLD = 400, 0.9
FIRST = "document.activeElement.closest('.item').querySelector('[data-row]').dataset.row"


@pytest.fixture(scope="module")
def page_of(tmp_path_factory):
    """An OUT whose rows have pictures and captions, and its page; and the table of groups."""
    folder = tmp_path_factory.mktemp("browse")
    rows = truth.clustered(ROWS, 16, 2, clusters=90, noise=0.3, copies=0.05)
    truth.save_shards(folder / "set" / "img_emb", rows, [150])
    (folder / "set" / "metadata").mkdir()
    keys = [f"=k{row:03d}" for row in range(ROWS)]
    words = [("red", "green", "blue")[row % 3] + f" box {row}" for row in range(ROWS)]
    table = pa.table({"key": keys, "caption": words})
    pq.write_table(table, folder / "set" / "metadata" / "m.parquet")
    (folder / "images").mkdir()
    for row in range(ROWS):
        shade = np.full((30, 40, 3), row / ROWS, np.float32)
        (folder / "images" / f"{keys[row]}.png").write_bytes(png(shade))
    out = folder / "out"
    assert truth.snip("dedup", folder / "set", "--threshold", THRESHOLD, "--out", out)[0] == 0
    assert truth.snip("report", out, "--images", folder / "images")[0] == 0
    return out, (out / "report.html").as_uri(), pq.read_table(out / "groups.parquet").to_pylist()


def labels_of(page):
    """The groups that the page shows, on all its pages."""
    found = []
    while True:
        shown = page.locator("#groups-list .group")
        found += [int(one.get_attribute("aria-label").split()[1]) for one in shown.all()]
        if page.locator("#next").is_disabled():
            return found
        page.click("#next")


def fitting(groups, fits):
    return {one["group"] for one in groups if fits(one)}


def test_groups_are_filtered_ordered_and_shown_by_pages(browser, page_of):
    _, url, groups = page_of
    sizes = {label: sum(one["group"] == label for one in groups) for label in
             {one["group"] for one in groups}}  # fmt: skip
    assert len(sizes) > 20
    most = max(sizes.values())
    with browser.open(url) as page:
        assert f"1 to 10 of {len(sizes)} groups" in page.inner_text("#found")
        assert labels_of(page) == sorted(sizes, key=lambda label: (-sizes[label], label))
        page.select_option("#order", "row")
        assert labels_of(page) == sorted(sizes)
        assert most <= 12  # so that pages show all rows, and filters see them
        for actions, fits in (
            ({"find": "=K12"}, lambda one: one["key"].startswith("=k12")),
            ({"find": "RED box"}, lambda one: one["row"] % 3 == 0),
            ({"low": "0.95", "high": ".97"}, lambda one: one["is_dup"]
             and 0.95 <= round(one["similarity"], 6) <= 0.97),
            ({"find": "blue", "low": "0.95"}, lambda one: one["is_dup"] and one["row"] % 3 == 2
             and round(one["similarity"], 6) >= 0.95),
        ):  # fmt: skip
            for name, text in actions.items():
                page.fill(f"#{name}", text)
            assert set(labels_of(page)) == fitting(groups, fits), actions
            for name in actions:
                page.fill(f"#{name}", "")
        page.select_option("#shard", label="img_emb_1.npy")
        assert set(labels_of(page)) == fitting(groups, lambda one: one["row"] >= 150)
        page.fill("#find", "no such text")
        assert page.inner_text("#found") == "No group fits."
        assert labels_of(page) == []


def test_the_slider_moves_the_pairs(browser, page_of):
    _, url, groups = page_of
    known = {one["row"]: one for one in groups if one["is_dup"]}
    with browser.open(url) as page:
        last = int(page.get_attribute("#slider", "max"))
        seen = []
        for stop in (0, last // 2, last):
            move = "s => { slider.value = s; slider.dispatchEvent(new Event('input')); }"
            page.evaluate(move, stop)
            threshold = np.float32(page.inner_text("#at-threshold"))
            rows = [int(one.get_attribute("data-row")) for one in
                    page.locator("#pairs-list .pair > .tile:nth-of-type(1)").all()]  # fmt: skip
            cosines = sorted(np.float32(one["similarity"]) for one in known.values())
            above = [cosine for cosine in cosines if cosine >= threshold]
            below = [cosine for cosine in cosines[::-1] if cosine < threshold]
            expected = above[: 6 if below else 12] + below[:6]
            shown = [known[row]["similarity"] for row in rows]
            assert shown == pytest.approx(expected, abs=1e-6)
            seen.append(rows)
        assert seen[0] != seen[1] != seen[2]
        page.select_option("#band", index=1)
        assert page.locator("#pairs-list .pair").count() > 0


def saved(page, button, path):
    with page.expect_download() as download:
        page.focus(button)
        page.keyboard.press("Enter")
    download.value.save_as(path)
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def test_rows_are_marked_by_keyboard_and_what_is_saved_is_read_by_snip(browser, page_of, tmp_path):
    out, url, groups = page_of
    by_row = {one["row"]: one for one in groups}
    with browser.open(url) as page:
        page.focus("#groups-list .open")
        first = int(page.evaluate(FIRST))
        page.keyboard.press("Enter")
        assert page.evaluate("viewer.open && viewer.contains(document.activeElement)")
        mates = [one["row"] for one in groups if one["group"] == by_row[first]["group"]]
        seen, judged, told = [], {}, {}
        for place in range(len(mates)):
            assert f": {place + 1} of {len(mates)}" in page.inner_text("#viewer-title")
            row = int(page.get_attribute("#viewed .tile", "data-row"))
            assert page.locator(f"#viewed img[alt='row {row}']").bounding_box()["width"] > 200
            seen.append(row)
            page.keyboard.press("r" if place % 2 else "w")  # a kept row has no pair to judge
            if by_row[row]["is_dup"]:
                judged[row] = "yes" if place % 2 else "no"
                other = page.locator("#viewed .tile").nth(1).get_attribute("data-row")
                assert int(other) == by_row[row]["representative"]
            if place == 1:
                page.keyboard.press("k")
                told[row] = "keep"
            page.keyboard.press("ArrowRight")
        assert sorted(seen) == mates
        page.keyboard.press("ArrowDown")  # the next group
        drops = int(page.get_attribute("#viewed .tile", "data-row"))
        assert by_row[drops]["group"] != by_row[first]["group"]
        page.keyboard.press("d")
        told[drops] = "drop"
        page.keyboard.press("ArrowRight")
        for pressed in ("true", "false"):  # marked, and taken back
            page.keyboard.press("k")
            assert page.get_attribute("#viewed [data-decision=keep]", "aria-pressed") == pressed
        page.keyboard.press("Escape")
        assert not page.locator("#viewer").is_visible()
        assert int(page.evaluate(FIRST)) == first  # the focus is where it was
        assert page.locator(f"#groups-list [data-row='{drops}'] .mark").inner_text() == "drop"

        verdicts = saved(page, "#save-judged", tmp_path / "judged.csv")
        assert {int(one["row"]): one["verdict"] for one in verdicts} == judged
        assert all(one["key"] == f"'=k{int(one['row']):03d}" for one in verdicts)
        decisions = saved(page, "#save-decided", tmp_path / "decisions.csv")
        assert {int(one["row"]): one["decision"] for one in decisions} == told
        commands = page.locator("#marks code").all_inner_texts()
    assert [text.split()[:2] for text in commands] == [["snip", "audit"], ["snip", "dedup"]]
    right = sum(word == "yes" for word in judged.values())
    said = truth.snip("audit", out, "--judged", tmp_path / "judged.csv")[1]
    assert f"({right} of {len(judged)} judged pairs are duplicates" in said
    result = snipdedup.dedup(out, decisions=tmp_path / "decisions.csv", out=str(tmp_path / "then"))
    for row, word in told.items():
        assert result.is_dup[row] == (word == "drop")


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("how", ["pictures", "table"])
def test_what_it_shows_has_names_contrast_and_room(browser, page_of, width, scheme, how):
    with browser.open(page_of[1], width=width, scheme=scheme) as page:
        page.select_option("#view", how)
        page.focus("#groups-list .open")
        page.keyboard.press("k")
        page.keyboard.press("Enter")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        box = page.locator("#viewer").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        unnamed = page.evaluate(
            """[...document.querySelectorAll("button, input, select, a, [role=region]")].filter(e =>
                !e.hidden && !(e.textContent.trim() || e.getAttribute("aria-label") ||
                e.labels?.[0]?.textContent.trim() || e.querySelector("img[alt]"))).length"""
        )
        assert unnamed == 0
        assert page.evaluate("new Set([...document.querySelectorAll('[id]')].map(e => e.id)).size"
                             " === document.querySelectorAll('[id]').length")  # fmt: skip
        low = page.evaluate(CONTRAST)
        assert low == []
        targets = page.evaluate("""[...document.querySelectorAll("#viewer button")].filter(e =>
            e.checkVisibility()).map(e => e.getBoundingClientRect().height)""")
        assert min(targets) >= 24


# Texts whose contrast with what is behind them is below 4.5 (WCAG 2.1 AA), but disabled ones.
CONTRAST = """(() => {
  const light = (c) => {
    const [r, g, b] = c.match(/[\\d.]+/g).map((v) => v / 255)
      .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (e) => {
    for (let one = e; one; one = one.parentElement) {
      const back = getComputedStyle(one).backgroundColor;
      if (!/, 0\\)$/.test(back)) return back;
    }
    return "rgb(255, 255, 255)";
  };
  return [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility() &&
    !e.closest("svg, :disabled, script") &&
    [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()))
    .map((e) => [light(getComputedStyle(e).color), light(behind(e)), e.outerHTML.slice(0, 80)])
    .filter(([a, b]) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05) < 4.5);
})()"""


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("how", ["pictures", "table"])
def test_axe_finds_no_serious_fault(browser, page_of, scheme, how):
    axe = pytest.importorskip("axe_core_python", reason="pip install axe-core-python")
    source = (Path(axe.__file__).parent / "axe.min.js").read_text("utf-8")
    with browser.open(page_of[1], scheme=scheme) as page:
        page.select_option("#view", how)
        page.evaluate(source)
        for action in (lambda: None, lambda: page.click("#groups-list .open >> nth=0")):
            action()
            found = page.evaluate("axe.run().then(r => r.violations)")
            grave = [one for one in found if one["impact"] in ("serious", "critical")]
            assert not grave, [(one["id"], one["nodes"][0]["html"]) for one in grave]


def test_ten_thousand_groups_are_shown_within_two_seconds(browser, tmp_path):
    rng = np.random.default_rng(0)
    of = np.repeat(np.arange(10_000), 3)
    rows = np.repeat(rng.standard_normal((10_000, 48)), 3, 0) + 0.02 * rng.standard_normal(
        (len(of), 48)
    )
    truth.save_shards(tmp_path / "set" / "img_emb", rows.astype(np.float32), [])
    (tmp_path / "set" / "metadata").mkdir()
    keys = [f"{row:09d}" for row in range(len(of))]
    captions = [f"a caption of some length, of group {one}" for one in of]
    table = pa.table({"key": keys, "caption": captions})
    pq.write_table(table, tmp_path / "set" / "metadata" / "m.parquet")
    out = tmp_path / "out"
    assert truth.snip("dedup", tmp_path / "set", "--threshold", 0.95, "--out", out)[0] == 0
    assert truth.snip("report", out, "--groups", 10_000)[0] == 0
    begin = time.perf_counter()
    with browser.open((out / "report.html").as_uri()) as page:
        spent = page.evaluate(
            "performance.timing.loadEventEnd - performance.timing.navigationStart"
        )
        assert "1 to 50 of 10,000 groups" in page.inner_text("#found")
        assert spent < 2000, time.perf_counter() - begin
        begin = time.perf_counter()
        page.fill("#find", "of group 9999")
        assert page.inner_text("#found") == "1 to 1 of 1 groups"
        assert time.perf_counter() - begin < 2
