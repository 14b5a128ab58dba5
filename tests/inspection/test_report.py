"""The page in a real browser: figures, pictures, hostile texts; then what the command refuses."""

from __future__ import annotations

import functools
import http.server
import json
import re
import shlex
import subprocess
import sys
import threading
from html import unescape

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import truth
from browser import wait_until
from samples import png

import snipdedup
from snipdedup.errors import SnipError
from snipdedup.inspection import display, report
from snipdedup.inspection.report import GENERATOR, PICTURED
from snipdedup.storage import atomic
from snipdedup.storage.out_folder import read_manifest, write_manifest

ROWS, THRESHOLD = 400, 0.9
CHAIN = 12  # of the rows
RIGHT_TO_LEFT = "\u202egnp.exe\u2067 \u05e9\u05dc\u05d5\u05dd \u202e\u2066"
HOSTILE = [
    '<script>document.title = "owned"</script>',
    '"><img src=x onerror="document.title = \'owned\'">',
    "</style></script><b>bold</b><svg onload=alert(1)>",
    "{{ 7 * 7 }}{% raw %}",
    RIGHT_TO_LEFT,
    "long " + "x" * 9_995,
    "two\nlines\x00and\x1b[31m controls",
]
URLS = [
    "javascript:document.title='owned'",
    "JaVaScRiPt:alert(1)",
    "data:text/html,<script>alert(1)</script>",
    'https://evil.example/" onmouseover="alert(1)',
    "https://evil.example/ok.png?<b>",
    "https:///nowhere",
    "file:///etc/passwd",
]
KEYS = ["../../../etc/passwd", "<b>key</b>", "a/b", "..", "k\u202ey", "", "plain"]


@pytest.fixture(scope="module")
def picture_server(tmp_path_factory):
    """Serves a picture, as a stranger's host would; holds the headers that it was asked with."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "a.png").write_bytes(png(np.full((40, 40, 3), 0.5, np.float32)))
    headers = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            headers.append(dict(self.headers))
            super().do_GET()

        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", headers
        server.shutdown()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, picture_server):
    """A set whose every text is hostile, de-duplicated; its folder and result."""
    folder = tmp_path_factory.mktemp("hostile")
    rows = truth.clustered(ROWS, 24, 3, noise=0.25, copies=0.1)
    turns = np.radians(20 * np.arange(CHAIN))  # each like the next, and none like the one after
    rows[-CHAIN:] = 0
    rows[-CHAIN:, 0], rows[-CHAIN:, 1] = np.cos(turns), np.sin(turns)
    truth.save_shards(folder / "set" / "img_emb", rows, [150, 151])
    urls = [*URLS, f"{picture_server[0]}/a.png"]
    table = pa.table(
        {
            "key": [f"{KEYS[row % len(KEYS)]}{row // len(KEYS) or ''}" for row in range(ROWS)],
            "caption": [HOSTILE[row % len(HOSTILE)] for row in range(ROWS)],
            "URL": [urls[row % len(urls)] for row in range(ROWS)],
        }
    )
    (folder / "set" / "metadata").mkdir()
    pq.write_table(table, folder / "set" / "metadata" / "<script>alert(1)<.parquet")
    result = snipdedup.dedup(
        str(folder / "set"), threshold=THRESHOLD, out=str(folder / "out<b>"), seed=5
    )
    return folder, result


@pytest.fixture(scope="module")
def page_path(hostile):
    """The report of the hostile set."""
    assert truth.snip("report", hostile[0] / "out<b>")[0] == 0
    return hostile[0] / "out<b>" / "report.html"


@pytest.fixture(scope="module")
def keyframes(data, tmp_path_factory):
    """The report of real features without pictures, and the result that it is about."""
    out = tmp_path_factory.mktemp("keyframes") / "clean"
    result = snipdedup.dedup(str(data / "keyframes"), threshold=0.95, out=str(out))
    assert truth.snip("report", out)[0] == 0
    return out / "report.html", result


PANEL = """["threshold", "removed", "kept", "groups", "share"].map(
    name => document.getElementById("at-" + name).textContent)"""


def figures(page):
    """What the slider's panel says: threshold, rows that go and stay, groups, share."""
    return as_numbers(page.evaluate(PANEL))


def as_numbers(texts):
    plain = [text.replace(",", "").removeprefix("~") for text in texts]
    return [texts[0], *map(int, plain[1:4]), *texts[4:]]


def slide(page, stops):
    """Move the slider to each stop; return what the panel says there."""
    program = f"""stops => stops.map(stop => {{
        const slider = document.getElementById("slider");
        slider.value = stop;
        slider.dispatchEvent(new Event("input"));
        return {PANEL};
    }})"""
    return [as_numbers(texts) for texts in page.evaluate(program, list(stops))]


def expected_figures(result, threshold):
    other = result.at(float(threshold))
    groups = len(np.unique(other.members.group))
    share = f"{100 * other.removed / other.rows:.2f} %"
    return [threshold, other.removed, other.kept, groups, share]


def as_pictures(page):
    """Show tiles instead of tables; a page without pictures begins with tables."""
    page.select_option("#view", "pictures")


# ---- in a browser


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_loads_nothing_and_fits_its_screen(browser, page_path, keyframes, width, scheme):
    for path in (page_path, keyframes[0]):
        with browser.open(path.as_uri(), width=width, scheme=scheme) as page:
            assert page.title() == f"{path.parent.name} · snip report"
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            back = page.evaluate("getComputedStyle(document.body).backgroundColor")
            light = sum(map(int, re.findall(r"\d+", back)[:3])) > 3 * 128
            assert light == (scheme == "light")
            page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
            page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
            page.wait_for_timeout(100)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.asked == []


FIVE = ("0.95", "0.96", "0.97", "0.98", "0.99")


@pytest.mark.slow
def test_summary_report_and_rerun_give_one_count_on_key_frames(browser, keyframes, tmp_path):
    path, result = keyframes
    summary = str(result)
    with browser.open(path.as_uri()) as page:
        stops = json.loads(page.text_content("#levels"))["thresholds"]
        shown = slide(page, [stops.index(t) for t in FIVE])
    for threshold, line in zip(FIVE, shown, strict=True):
        again = tmp_path / threshold
        assert truth.snip("dedup", path.parent, "--threshold", threshold, "--out", again)[0] == 0
        counts = json.loads((again / "snip.json").read_text("utf-8"))["counts"]
        removed = np.load(again / "is_dup.npy").sum()
        assert counts["removed"] == removed
        share = f"{100 * removed / 58_977:.2f} %"
        assert line == [threshold, removed, 58_977 - removed, counts["groups"], share]
        said = re.search(rf"^ +{threshold}0 +([\d,]+) +([\d,]+)", summary, re.M).groups()
        assert [int(n.replace(",", "")) for n in said] == [removed, counts["groups"]]


def test_every_stop_and_the_table_and_the_keyboard(browser, hostile, page_path):
    with browser.open(page_path.as_uri()) as page:
        lines = page.eval_on_selector_all(
            "#threshold tbody tr", "rows => rows.map(r => [...r.cells].map(c => c.textContent))"
        )
        assert len(lines) > 50
        counted = [line[0] for line in lines if not line[1].startswith("~")]
        steps = [round(THRESHOLD + step, 6) for step in (0, 0.01, 0.02, 0.03, 0.04)]
        assert [float(text) for text in counted] == [step for step in steps if step <= 1]
        for line, shown in zip(lines, slide(page, range(len(lines))), strict=True):
            expected = expected_figures(hostile[1], line[0])
            assert as_numbers(line[:4]) == shown[:4]
            assert shown[3] == expected[3]
            if line[0] in counted:
                assert shown == expected
            by_components = hostile[1].at(float(line[0]), grouping="components").removed
            assert int(line[4].replace(",", "")) == by_components
            assert 0.8 * expected[1] <= shown[1] <= by_components
        page.focus("#slider")
        for key, stop in (("Home", 0), ("ArrowRight", 1), ("ArrowUp", 2), ("End", -1)):
            page.keyboard.press(key)
            assert figures(page)[:4] == as_numbers(lines[stop][:4])


def test_the_cursor_follows_the_slider(browser, page_path):
    with browser.open(page_path.as_uri()) as page:
        place = "document.getElementById('dot').getBoundingClientRect()"
        begin = page.evaluate(place)
        page.focus("#slider")
        page.keyboard.press("End")
        end = page.evaluate(place)
        assert end["x"] > begin["x"] + 300
        assert end["y"] < begin["y"]


def test_hostile_texts_stay_text(browser, page_path):
    with browser.open(page_path.as_uri()) as page:
        as_pictures(page)
        assert "owned" not in page.title()
        body = page.inner_text("body")
        for text in HOSTILE[:4]:
            assert text in body
        assert page.query_selector("main b b, .caption *, .key b, main script[src]") is None
        assert len(page.query_selector_all("script")) == 3
        links = {a.get_attribute("href") for a in page.query_selector_all("a[target]")}
        assert all(re.match(r"http://127\.0\.0\.1:\d+/a\.png$", link) for link in links), links
        assert page.query_selector("[onerror], [onload], [onmouseover], [style]") is None
        assert "javascript:document.title" in body


def test_right_to_left_marks_end_with_their_caption(browser, page_path):
    with browser.open(page_path.as_uri()) as page:
        as_pictures(page)
        captions = [c for c in page.query_selector_all(".caption") if "gnp" in c.text_content()]
        assert captions
        for caption in captions:
            assert caption.get_attribute("dir") == "auto"
            how = "e => [getComputedStyle(e).unicodeBidi, getComputedStyle(e).display]"
            bidi, display = caption.evaluate(how)
            assert bidi == "isolate"
            assert display in ("block", "flow-root", "-webkit-box")  # a paragraph of its own


def test_long_captions_are_cut_on_screen(browser, page_path):
    with browser.open(page_path.as_uri(), width=390) as page:
        as_pictures(page)
        longest = [c for c in page.query_selector_all(".caption") if "long x" in c.text_content()]
        assert longest
        for caption in longest:
            assert len(caption.text_content()) < 300
            assert caption.text_content().endswith("…")
        heights = [c.bounding_box()["height"] for c in longest if c.bounding_box()]
        assert heights
        assert max(heights) < 120
        assert "10,000 characters" in page.inner_text("main")


def test_a_remote_picture_comes_on_a_click_only_blurred_and_without_referrer(
    browser, page_path, picture_server
):
    place, headers = picture_server
    folder = functools.partial(http.server.SimpleHTTPRequestHandler, directory=page_path.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with browser.open(f"http://127.0.0.1:{server.server_port}/report.html") as page:
            headers.clear()
            as_pictures(page)
            assert "<img" not in page.inner_html("main")
            button = page.locator("button.fetch:visible").first
            assert "127.0.0.1" in button.inner_text()
            button.focus()
            page.keyboard.press("Enter")
            picture = button.locator("img")
            picture.wait_for()
            wait_until(page, "document.querySelector('.fetch img').naturalWidth === 40")
            assert page.asked == [f"{place}/a.png"]
            assert len(headers) == 1
            assert not {"referer", "origin"} & {name.lower() for name in headers[0]}
            assert "blur" in picture.evaluate("e => getComputedStyle(e).filter")
            button.click()
            assert picture.evaluate("e => getComputedStyle(e).filter") == "none"
            button.click()
            assert "blur" in picture.evaluate("e => getComputedStyle(e).filter")
            assert len(headers) == 1
        server.shutdown()


def test_all_of_it_can_be_read_without_script(browser, page_path):
    with browser.open(page_path.as_uri(), script=False) as page:
        assert not page.locator("button.fetch").first.is_visible()
        page.locator("#threshold summary").click()
        assert page.locator("#threshold tbody tr").first.is_visible()


def test_what_a_screen_reader_meets_has_names(browser, page_path):
    with browser.open(page_path.as_uri()) as page:
        assert page.get_attribute("html", "lang") == "en"
        assert page.query_selector_all("h1")[1:] == []
        for chart in page.query_selector_all("svg[role=img]"):
            assert len(chart.get_attribute("aria-label")) > 30
        assert page.get_by_label("Threshold, grouping star").count() == 1
        assert all(len(i.get_attribute("alt")) > 3 for i in page.query_selector_all("main img"))
        for section in page.query_selector_all("section"):
            assert page.query_selector("#" + section.get_attribute("aria-labelledby"))
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        for link in page.query_selector_all("nav a"):
            assert page.query_selector(link.get_attribute("href"))


# ---- with pictures


@pytest.fixture(scope="module")
def pictured(tmp_path_factory):
    """A set with a picture for every second key, as files; its OUT and the folder."""
    folder = tmp_path_factory.mktemp("pictured")
    rows = truth.clustered(60, 16, 1, noise=0.1)
    truth.save_shards(folder / "set" / "img_emb", rows, [])
    (folder / "set" / "metadata").mkdir()
    keys = [f"{row:05d}" for row in range(60)]
    paths = [f"{key}.png" for key in keys]
    table = pa.table({"key": keys, "local": paths})
    pq.write_table(table, folder / "set" / "metadata" / "m.parquet")
    (folder / "images").mkdir()
    for row in range(0, 60, 2):
        shade = np.full((90, 120, 3), row / 60, np.float32)
        (folder / "images" / paths[row]).write_bytes(png(shade))
    words = ("--threshold", THRESHOLD, "--out", folder / "out")
    assert truth.snip("dedup", folder / "set", *words)[0] == 0
    return folder


@pytest.mark.parametrize("how", [(), ("--image_column", "local")])
def test_pictures_are_in_the_page_and_are_those_of_their_rows(browser, pictured, how, tmp_path):
    html = tmp_path / "page.html"
    words = ("report", pictured / "out", "--html", html, "--images", pictured / "images", *how)
    status, said, _ = truth.snip(*words)
    assert status == 0
    with browser.open(html.as_uri()) as page:
        page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        wait_until(page, "[...document.images].every(i => i.complete && i.naturalWidth)")
        tiles = page.query_selector_all(".tile")
        seen = set()
        for tile in tiles:
            row = int(tile.query_selector(".place").text_content().removeprefix("row "))
            image = tile.query_selector("img")
            assert (image is not None) == (row % 2 == 0)
            if image:
                assert image.bounding_box()["width"] > 50
                shade = image.evaluate(
                    "i => { const c = document.createElement('canvas').getContext('2d');"
                    " c.drawImage(i, 0, 0); return c.getImageData(5, 5, 1, 1).data[0]; }"
                )
                assert abs(shade - 255 * row / 60) <= 2
                seen.add(row)
        shown = {int(t.query_selector(".place").text_content().removeprefix("row ")) for t in tiles}
        assert f"pictures of {len(seen)} of the {len(shown)} rows shown" in said


# ---- the command


def test_the_same_seed_gives_the_same_page_another_one_other_samples(hostile, tmp_path):
    out = hostile[0] / "out<b>"
    pages = []
    for number, seed in enumerate((0, 0, 1)):
        html = tmp_path / f"{number}.html"
        assert truth.snip("report", out, "--html", html, "--seed", seed)[0] == 0
        pages.append(html.read_bytes())
    assert pages[0] == pages[1]
    assert pages[0] != pages[2]
    assert b"\r" not in pages[0]


def test_an_earlier_report_is_replaced_and_nothing_else(hostile, page_path, tmp_path):
    out = hostile[0] / "out<b>"
    assert GENERATOR in page_path.read_text("utf-8")[:2048]
    assert truth.snip("report", out)[0] == 0
    thesis = tmp_path / "thesis.html"
    thesis.write_text("years of work")
    status, _, said = truth.snip("report", out, "--html", thesis)
    assert status == 1
    assert "exists and is not a report" in said
    assert thesis.read_text() == "years of work"
    assert truth.snip("report", out, "--html", thesis, "--overwrite")[0] == 0
    assert truth.snip("report", out, "--html", tmp_path)[0] == 2


def test_a_page_with_pictures_is_not_replaced_by_one_without(hostile, tmp_path):
    """Of the keys one is that of a picture."""
    out, page = hostile[0] / "out<b>", tmp_path / "r.html"
    assert truth.snip("report", out, "--html", page)[0] == 0
    without = page.read_bytes()
    assert PICTURED.encode() not in without
    (tmp_path / "images").mkdir()
    for row in range(ROWS):  # keys such as plain6
        name = f"plain{row // len(KEYS) or ''}.png"
        (tmp_path / "images" / name).write_bytes(png(np.full((9, 9, 3), 0.5, np.float32)))
    images = ("--images", tmp_path / "images")
    assert truth.snip("report", out, "--html", page, *images)[0] == 0
    pictured = page.read_bytes()
    assert PICTURED.encode() in pictured[: report.HEAD]
    status, _, said = truth.snip("report", out, "--html", page)
    assert status == 1
    assert "has pictures, the new page would have none; give --images again" in said
    assert page.read_bytes() == pictured
    assert truth.snip("report", out, "--html", page, *images)[0] == 0
    assert truth.snip("report", out, "--html", page, "--overwrite")[0] == 0
    assert page.read_bytes() == without


@pytest.mark.parametrize("grouping", ["star", "components"])
def test_the_command_has_the_path_as_given_and_keeps_the_grouping(tmp_path, monkeypatch, grouping):
    monkeypatch.chdir(tmp_path)
    truth.save_shards(tmp_path / "x", truth.clustered(200, 12, 3, clusters=40, noise=0.4), [])
    out = "sub folder/it's clean"
    words = ("--threshold", THRESHOLD, "--grouping", grouping)
    assert truth.snip("dedup", "x", "--out", out, *words)[0] == 0
    assert truth.snip("report", out)[0] == 0
    text = (tmp_path / out / "report.html").read_text("utf-8")
    line = unescape(re.search(r"<code>(snip dedup .*?)</code>", text)[1])
    said = shlex.split(re.sub(r"<[^>]*>", "", line))
    assert said == ["snip", "dedup", out, "--threshold", str(THRESHOLD), "--out", "stricter"]
    assert ("grouped by star as this run" in text) == (grouping == "star")
    assert truth.snip(*said[1:])[0] == 0
    assert read_manifest(tmp_path / "stricter", "dedup")["settings"]["grouping"] == grouping


def test_rows_that_are_asked_for_are_shown_beside_what_stays(browser, hostile, tmp_path):
    folder, result = hostile
    members = result.members
    goes = int(members.row[members.is_dup].max())
    other = int(members.representative[members.row == goes][0])
    alone = int(members.row[~members.is_dup & (members.row != other)].max())
    page_at = tmp_path / "r.html"
    words = ("report", folder / "out<b>", "--html", page_at, "--rows")
    assert truth.snip(*words, f"{goes},{alone},{other}")[0] == 0
    with browser.open(page_at.as_uri()) as page:
        as_pictures(page)
        labels = page.eval_on_selector_all(
            "#asked article", "found => found.map(a => a.getAttribute('aria-label'))"
        )
        rows = page.locator("#asked .tile .place:not(.quiet)").all_inner_texts()
    cosine = float(members.similarity[members.row == goes][0])
    said = f"Row {goes} is removed for row {other}, cosine "
    by_row = {int(label.split()[1]): label for label in labels}
    assert sorted(by_row) == sorted([goes, alone, other])
    assert by_row[goes].startswith(said)
    assert float(by_row[goes].removeprefix(said)) == pytest.approx(cosine, abs=1e-4)
    assert by_row[alone] == f"Row {alone} is kept"
    assert by_row[other] == f"Row {other} is kept"
    assert sorted(rows) == sorted(f"row {row}" for row in (goes, alone, other, other))
    before = page_at.read_bytes()
    assert "rows 0 to 399" in truth.snip(*words, ROWS)[2]
    for wrong in ("-1", "x", "1.5", ""):
        assert truth.snip(*words[:-1], f"--rows={wrong}")[0] == (1 if wrong else 2), wrong
    assert page_at.read_bytes() == before


def test_refusals(hostile, tmp_path):
    out = hostile[0] / "out<b>"
    for words, expected in (
        ((tmp_path,), "expected a finished dedup folder"),
        ((out, "--images", tmp_path / "none"), "no such folder of pictures"),
        ((out, "--image_column", "none"), "column 'none' is not there"),
        ((out, "--metadata", tmp_path), "no metadata in"),
        ((out, "--images", tmp_path), "snip never writes there"),
    ):
        status, _, said = truth.snip("report", *words, "--html", tmp_path / "r.html")
        assert status == 1, said
        assert expected in said
        assert said.count("\n") == 1
    assert not (tmp_path / "r.html").exists()


def test_pictures_by_key_need_keys(tmp_path):
    truth.save_shards(tmp_path / "img_emb", truth.clustered(60, 16, 1, noise=0.1), [])
    out = tmp_path / "out"
    assert truth.snip("dedup", tmp_path / "img_emb", "--threshold", 0.9, "--out", out)[0] == 0
    (tmp_path / "images").mkdir()
    status, _, said = truth.snip("report", out, "--images", tmp_path / "images")
    assert status == 1
    assert "pictures are found by key, and groups.parquet has none" in said
    assert not (out / "report.html").exists()


@pytest.mark.parametrize("missing", ["jinja2", "PIL"])
def test_what_is_not_installed_is_named_in_one_line(hostile, tmp_path, missing):
    program = (
        f"import sys; sys.modules['{missing}'] = None; sys.modules['{missing}.Image'] = None\n"
        "from snipdedup.cli import main; main()"
    )
    words = ["report", str(hostile[0] / "out<b>"), "--html", str(tmp_path / "r.html")]
    images = ["--images", str(tmp_path)] if missing == "PIL" else []
    done = subprocess.run(
        [sys.executable, "-c", program, *words, *images],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "pip install 'snipdedup-toolkit[report]'" in done.stderr
    assert done.stderr.count("\n") == 1
    if missing == "PIL":  # a page without pictures needs none of it
        done = subprocess.run([sys.executable, "-c", program, *words], check=False)
        assert done.returncode == 0


@pytest.mark.parametrize("grouping", ["star", "components"])
def test_nothing_to_remove(browser, tmp_path, grouping):
    truth.save_shards(tmp_path / "img_emb", np.eye(5, dtype=np.float32), [])
    words = ("--grouping", grouping, "--out", tmp_path / "out")
    assert truth.snip("dedup", tmp_path / "img_emb", *words)[0] == 0
    assert truth.snip("report", tmp_path / "out", "--rows", "4,0")[0] == 0
    with browser.open((tmp_path / "out" / "report.html").as_uri()) as page:
        as_pictures(page)
        assert page.locator("#asked .kept").count() == 2
        assert "0 of 5 rows removed" in page.inner_text("h1").replace("\n", " ")
        assert figures(page)[:4] == ["0.95", 0, 5, 0]


def test_components_show_what_chaining_cost(browser, hostile, tmp_path):
    words = ("--threshold", THRESHOLD, "--grouping", "components", "--out", tmp_path / "out")
    assert truth.snip("dedup", hostile[0] / "set", *words)[0] == 0
    assert truth.snip("report", tmp_path / "out")[0] == 0
    chained = json.loads((tmp_path / "out" / "snip.json").read_text())["counts"]["chained"]
    assert chained > 0
    with browser.open((tmp_path / "out" / "report.html").as_uri()) as page:
        as_pictures(page)
        text = page.inner_text("#chains")
        assert f"{chained} rows are removed although they are below the threshold" in text
        cosines = [float(c.split()[1]) for c in page.locator("#chains .cosine").all_inner_texts()]
        assert cosines
        assert max(cosines) < THRESHOLD


def test_an_unverified_run_says_so(browser, hostile, tmp_path):
    index = tmp_path / "index"
    assert truth.snip("index", hostile[0] / "set", "--out", index, "--m", 8)[0] == 0
    assert truth.snip("dedup", "--index", index, "--out", tmp_path / "out", "--margin", 0.5)[0] == 0
    assert truth.snip("report", tmp_path / "out")[0] == 0
    with browser.open((tmp_path / "out" / "report.html").as_uri()) as page:
        assert "Unverified" in page.inner_text("header")
        assert page.query_selector("#slider") is None
        assert "nan" not in page.inner_text("body").lower().split()


def test_links_that_may_be_followed():
    for url in ("https://a.b/c.png?x=1&y=%20", "http://host", "HTTP://host/x", "https://[::1]/a"):
        assert display.safe_link(url) == url
    for url in (
        *URLS, "", "//a.b/c", "ftp://a.b/c", "http://", "https://a b/", "http://a\n.b/",
        "http://[bad", "https://a.b/" + "x" * 3000, " https://a.b", "https://a.b\\@c.d/",
    ):  # fmt: skip
        assert display.safe_link(url) == "", url


def test_texts_are_cut_to_one_line():
    assert display.page_text("a\r\n\tb\x7fc", 10) == "a b c"
    assert display.page_text("x" * 300, 240) == "x" * 240 + "…"
    assert display.page_text("  ", 5) == ""


def test_a_finished_out_is_left_as_it_was(hostile, page_path):
    out = hostile[0] / "out<b>"
    for name, output in read_manifest(out, "dedup")["outputs"].items():
        assert atomic.sha256(out / name) == output["sha256"]
    with pytest.raises(SnipError, match="exists and is not a report"):
        report.check_target(out / "snip.json", pictured=False)


def test_rows_of_a_reference_are_named_and_not_counted_as_ours(browser, hostile, tmp_path):
    rows = np.concatenate([np.load(p) for p in sorted((hostile[0] / "set/img_emb").iterdir())])
    truth.save_shards(tmp_path / "first", rows[:100], [])
    truth.save_shards(tmp_path / "then", rows[60:], [])
    words = ("--reference", tmp_path / "first", "--threshold", THRESHOLD, "--out", tmp_path / "out")
    assert truth.snip("dedup", tmp_path / "then", *words)[0] == 0
    assert truth.snip("report", tmp_path / "out")[0] == 0
    counts = json.loads((tmp_path / "out" / "snip.json").read_text())["counts"]
    with browser.open((tmp_path / "out" / "report.html").as_uri()) as page:
        figure = page.locator(".figures div", has_text="removed for a reference").inner_text()
        assert f"{counts['removed_for_reference']}" in figure.split()
        assert "of a reference" in page.inner_text("#pairs")


def test_semdedup_has_no_slider_and_says_which_rows_go(browser, hostile, tmp_path):
    words = ("--method", "semdedup", "--threshold", THRESHOLD, "--out", tmp_path / "out")
    assert truth.snip("dedup", hostile[0] / "set", *words)[0] == 0
    assert truth.snip("report", tmp_path / "out")[0] == 0
    is_dup = np.load(tmp_path / "out" / "is_dup.npy")
    with browser.open((tmp_path / "out" / "report.html").as_uri()) as page:
        as_pictures(page)
        assert page.query_selector("#slider") is None
        tiles = page.eval_on_selector_all(
            "#pairs .tile",
            "ts => ts.map(t => [t.querySelector('.place').textContent, t.className])",
        )
        assert {kind.split()[1] for _, kind in tiles} == {"removed", "kept"}
        for place, kind in tiles:
            row = int(place.removeprefix("row ").replace(",", ""))
            assert kind.split()[1] == ("removed" if is_dup[row] else "kept")


# ---- large


def write_large(out, rows):
    """An OUT of many rows as dedup writes it: a third in groups of two to hundreds."""
    rng = np.random.default_rng(0)
    shards = [{"name": f"img_emb_{n:04d}.npy", "rows": rows // 10} for n in range(10)]
    sizes = np.minimum(rng.zipf(1.9, rows // 8) + 1, 5000)
    sizes = sizes[: np.searchsorted(np.cumsum(sizes), rows // 3)]
    ends = np.cumsum(sizes)
    members = rng.permutation(rows)[: ends[-1]]
    group = np.repeat(np.minimum.reduceat(members, ends - sizes), sizes)
    order = np.lexsort((members, group))
    members, group = members[order], group[order]
    gone = members != group
    similarity = np.where(gone, 0.95 + 0.05 * rng.random(len(members)), 1).astype(np.float32)
    columns = {
        "row": members, "shard": pa.array(np.full(len(members), "img_emb_0000.npy")),
        "shard_row": members, "key": pa.array([f"{row:09d}" for row in members.tolist()]),
        "group": group, "representative": group, "similarity": similarity, "is_dup": gone,
    }  # fmt: skip
    atomic.save_parquet(out / "groups.parquet", pa.table(columns))
    edges = {"a": group[gone], "b": members[gone], "similarity": similarity[gone]}
    atomic.save_parquet(out / "forest.parquet", pa.table(edges))
    is_dup = np.zeros(rows, bool)
    is_dup[members[gone]] = True
    atomic.save_npy(out / "is_dup.npy", is_dup)
    value, count = np.unique(sizes, return_counts=True)
    table = {"of": ["group_size"] * len(value), "value": value, "count": count}
    atomic.save_parquet(out / "histogram.parquet", pa.table(table))
    removed = int(gone.sum())
    body = {
        "verified": True, "shards": shards, "thresholds": [], "request": {"metadata": None},
        "settings": {
            "threshold": 0.95, "keep": "first", "seed": 0, "grouping": "star", "method": "join",
            "metadata": None, "features": None,
        },
        "counts": {
            "rows": rows, "removed": removed, "kept": rows - removed, "groups": len(sizes),
            "largest_group": int(sizes.max()), "exact_copies": 0, "bad_rows": 0, "chained": 0,
        },
    }  # fmt: skip
    write_manifest(out, "dedup", body, [])
    return removed


@pytest.mark.slow
def test_ten_million_rows_are_a_small_page_in_seconds(tmp_path):
    removed = write_large(tmp_path, 10_000_000)
    program = (
        "import sys, time; start = time.perf_counter(); from snipdedup import cli;"
        "status = cli.run(sys.argv[1:]);"  # ru_maxrss would count the parent of the fork too
        "peak = int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]);"
        "print(status, time.perf_counter() - start, peak)"
    )
    words = [sys.executable, "-c", program, "report", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    status, seconds, peak = map(float, done.stdout.splitlines()[-1].split())
    assert status == 0
    assert (tmp_path / "report.html").stat().st_size < 5_000_000
    assert seconds < 30  # some 4 alone; machines are shared
    assert peak < 1_000_000  # kB
    assert f"{removed:,}" in (tmp_path / "report.html").read_text("utf-8")
