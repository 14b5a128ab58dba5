"""The walk through a run: its commands run, and print what the page says they print."""

from __future__ import annotations

import importlib.util
import re

import PIL
import pytest
from conftest import ROOT

SCRIPT = ROOT / "scripts" / "make_tutorial.py"


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_tutorial", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Another Pillow writes files of other sizes, which the page shows.
pinned = re.search(r"^pillow==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
usual = pytest.mark.skipif(PIL.__version__ != pinned, reason=f"the page is of Pillow {pinned}")


@usual
def test_the_page_is_what_its_commands_print(maker, tmp_path):
    page = maker.PAGE.read_text("utf-8")
    assert maker.masked(maker.rewritten(page, tmp_path)) == maker.masked(page), (
        "run: python scripts/make_tutorial.py"
    )
    assert (tmp_path / "clean" / "report.html").is_file()


def test_what_is_written_by_hand_is_true(maker):
    page = maker.PAGE.read_text("utf-8")
    assert "300 pictures were drawn, and 480 copies were made of them. The mirrored" in page
    assert "embedded: 780 of 780 pictures" in page
    assert "      60 copies, mirrored         0.0 %" in page
    blocks = [text for kind, text in maker.BLOCK.findall(page) if kind in ("console", "text")]
    assert len(blocks) >= 7
    assert all(len(text.splitlines()) > 1 for text in blocks)


def test_output_is_written_below_its_command(maker, tmp_path):
    page = (
        "a\n```console\n$ echo one; echo two\nold\n$ pwd | wc -l\n```\nb\n"
        "```python\nprint(1 + 1)\n```\n\n```text\nold\n```\n\n```sh\nexit 3\n```\n"
    )
    assert maker.rewritten(page, tmp_path) == (
        "a\n```console\n$ echo one; echo two\none\ntwo\n$ pwd | wc -l\n1\n```\nb\n"
        "```python\nprint(1 + 1)\n```\n\n```text\n2\n```\n\n```sh\nexit 3\n```\n"
    )


def test_a_command_that_fails_stops_it_by_name(maker, tmp_path):
    with pytest.raises(SystemExit, match="snip nothing\nsnip: no command 'nothing'"):
        maker.rewritten("```console\n$ snip nothing\n```\n", tmp_path)


def test_a_stale_page_is_noticed(maker, monkeypatch, tmp_path, capsys):
    page = tmp_path / "tutorial.md"
    monkeypatch.setattr(maker, "PAGE", page)
    page.write_text("```console\n$ echo 'seconds: 2'\nseconds: 1\n```\n")
    assert maker.main(["--check"]) == 0
    page.write_text("```console\n$ echo 2\n1\n```\n")
    assert maker.main(["--check"]) == 1
    assert "out of date" in capsys.readouterr().err
    assert maker.main([]) == 0
    assert page.read_text() == "```console\n$ echo 2\n2\n```\n"
