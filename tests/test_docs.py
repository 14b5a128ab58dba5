"""The generated page is the one that the code would write today, and every setting is explained."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import subprocess
import sys
import types

import pytest
from conftest import ROOT

from snipdedup.config import COMMANDS

SCRIPT = ROOT / "scripts" / "make_cli_docs.py"


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("make_cli_docs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cli_page_is_up_to_date(maker):
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == maker.page(), "run: python scripts/make_cli_docs.py"


def test_check_notices_a_stale_page(maker, tmp_path, monkeypatch, capsys):
    page = tmp_path / "cli.md"
    monkeypatch.setattr(maker, "PAGE", page)
    monkeypatch.setattr(maker, "STUB", tmp_path / "stub.pyi")
    monkeypatch.setattr(sys, "argv", ["make_cli_docs.py", "--check"])
    assert maker.main() == 1
    assert "out of date" in capsys.readouterr().err
    page.write_text(maker.page().replace("exit status", "status"), encoding="utf-8")
    assert maker.main() == 1
    monkeypatch.setattr(sys, "argv", ["make_cli_docs.py"])
    assert maker.main() == 0
    monkeypatch.setattr(sys, "argv", ["make_cli_docs.py", "--check"])
    assert maker.main() == 0


def test_the_stub_is_up_to_date(maker):
    written = (ROOT / "snipdedup" / "__init__.pyi").read_text(encoding="utf-8")
    assert written == maker.stub(), "run: python scripts/make_cli_docs.py"


def test_check_runs_as_a_script():
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", COMMANDS.values(), ids=lambda c: c.name)
def test_each_setting_is_explained(command):
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    section = page.partition(f"## snip {command.name}\n")[2].partition("\n## ")[0]
    for field in dataclasses.fields(command.options):
        name = field.name.upper() if field.metadata.get("positional") else f"--{field.name}"
        lines = [line for line in section.splitlines() if line.startswith(f"| `{name}` |")]
        assert len(lines) == 1, name
        assert len(lines[0].rpartition(" | ")[2]) > len("x |"), f"{name} has no meaning"


def test_links_of_the_readme_hold_on_a_package_index(monkeypatch):
    interface = types.SimpleNamespace(BuildHookInterface=object, MetadataHookInterface=object)
    for kind in ("builders.hooks", "metadata"):
        monkeypatch.setitem(sys.modules, f"hatchling.{kind}.plugin.interface", interface)
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (ROOT / "README.md").read_text("utf-8")
    links = re.findall(r"\]\(([^)]+)\)", text)
    plain = module.anywhere(text, None)
    there = module.anywhere(text, "https://host/us/snip")
    absolute = [link for link in links if link.startswith("https://")]
    assert re.findall(r"\]\(([^)]+)\)", plain) == absolute
    assert "[" not in plain.replace("[img2dataset]", "").split("## Install")[0]
    found = re.findall(r"\]\(([^)]+)\)", there)
    ours = [link for link in found if link not in absolute]
    assert [link.split("/main/")[1] for link in ours] == [x for x in links if x not in absolute]
    assert "![A report" in there
    assert "https://host/us/snip/raw/main/docs/images/report.png" in ours
