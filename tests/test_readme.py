"""The documents say what is so: each command of the README runs, each name they use exists."""

from __future__ import annotations

import ast
import functools
import graphlib
import http.server
import importlib.util
import os
import re
import shlex
import threading
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from odd_files import write_photos

from snipdedup import cli
from snipdedup.config import COMMANDS
from snipdedup.storage import atomic
from snipdedup.storage.out_folder import read_manifest

README = ROOT / "README.md"
DOCS = ROOT / "docs"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
# Pages whose commands run, in this order, in one folder: later ones use what earlier ones wrote.
HOWTO = [
    DOCS / "howto" / "pictures.md",
    *(DOCS / "howto" / f"{name}.md" for name in ("deduplicate", "check", "references")),
    DOCS / "threshold.md",
    *(DOCS / "howto" / f"{name}.md" for name in ("codes", "filter")),
]
SIZES = (160, 140, 100)  # rows a shard
WIDTH = 160  # wider than a descriptor
THRESHOLD = np.float32(0.95)
SETUP = ("bash scripts/", "pip install")  # need a network: checked by what they name
SHORTER = "--steps 40 --threads 1"  # training by default takes what a shared machine leaves
FOREIGN = {"extra-index-url", "all", "lowest", "help", "requeue"}  # of pip, test.sh, Slurm
HUB, STORE = "hf://datasets/OWNER/NAME", "memory://team/clean"  # the second instead of the first
DISTANT = "https://example.org"  # served from the sample's metadata/


def blocks(kind: str) -> list[str]:
    """Return the fenced blocks of a language, of the README and the pages that show commands."""
    pages = "\n".join(page.read_text("utf-8") for page in (README, *HOWTO))
    return re.findall(rf"^```{kind}\n(.*?)^```", pages, re.M | re.S)


def commands(*, setup: bool) -> list[str]:
    """Return their command lines in order, each once."""
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]
    return list(dict.fromkeys(line for line in lines if line.startswith(SETUP) == setup))


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_sample(folder: Path) -> np.ndarray:
    """Write a small set, a third of it near or exact copies; return its rows."""
    rng = np.random.default_rng(7)
    rows = rng.standard_normal((sum(SIZES), WIDTH))
    picture = np.arange(len(rows))
    copies = rng.permutation(len(rows))[: len(rows) // 3]
    picture[copies] = rng.choice(np.setdiff1d(picture, copies), len(copies))
    rows[copies] = rows[picture[copies]] + 0.2 * rng.standard_normal((len(copies), WIDTH))
    rows[copies[:20]] = rows[picture[copies[:20]]]
    rows = rows.astype(np.float16)
    start = 0
    for number, size in enumerate(SIZES):
        part = slice(start, start + size)
        atomic.save_npy(folder / f"img_emb/img_emb_{number:04d}.npy", rows[part])
        keys = [f"{row:09d}" for row in range(*part.indices(len(rows)))]
        urls = [f"https://example.org/{key}.jpg" for key in keys]
        widths = 100 + picture[part]
        table = pa.table({"key": keys, "url": urls, "picture": picture[part], "width": widths})
        atomic.save_parquet(folder / f"metadata/metadata_{number:04d}.parquet", table)
        start += size
    for number, name in enumerate(("new_emb", "test_emb", "made_emb")):
        near = rows[10 * number : 10 * number + 30] + np.float16(0.01)
        atomic.save_npy(folder / f"{name}/img_emb_{number:04d}.npy", near)
    atomic.save_npy(folder / "text_emb/text_emb_0000.npy", rows[:, :64])
    decided = "row,key,decision\n64,,keep\n,000000065,drop\n"
    (folder / "decisions.csv").write_text(decided, "utf-8")
    write_photos(folder / "photos")
    return rows


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """The folder in which a reader types the commands, and its rows."""
    folder = tmp_path_factory.mktemp("readme")
    return folder, make_sample(folder)


@pytest.fixture(scope="module")
def ran(sample):
    """Run the README's commands in their order; return what each one did, by its line."""
    folder, _ = sample
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder / "metadata")
    handler.func.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        before = Path.cwd()
        os.chdir(folder)
        try:
            place = f"http://127.0.0.1:{server.server_port}"
            return {
                line: run(line.replace(DISTANT, place).replace(HUB, STORE))
                for line in commands(setup=False)
            }
        finally:
            os.chdir(before)
            server.shutdown()


def run(line: str) -> int | None:
    """Run one command line in this process; return its exit status, None if there is no such."""
    first, *words = shlex.split(line, comments=True)
    if first == "snip":
        return cli.run([*words, *(SHORTER.split() if words[0] in ("train", "eval") else [])])
    if first == "python" and words[0].startswith("scripts/"):
        load_script(Path(words[0]).stem).main(words[1:])
        return 0
    return None


@pytest.mark.parametrize("line", commands(setup=False))
def test_command_runs(ran, line):
    assert ran[line] == 0


def test_first_command_keeps_its_promise(ran, sample):
    folder, rows = sample
    unit = rows.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    pair = (unit @ unit.T).astype(np.float32) >= THRESHOLD
    stays: list[int] = []
    for row in range(len(rows)):
        if not pair[row, stays].any():
            stays.append(row)
    is_dup = np.load(folder / "clean" / "is_dup.npy")
    np.testing.assert_array_equal(np.flatnonzero(~is_dup), stays)
    kept = pa.concat_tables(map(pq.read_table, sorted(folder.glob("clean/metadata/*.parquet"))))
    assert kept["key"].to_pylist() == [f"{row:09d}" for row in stays]
    assert kept.schema.names == ["key", "url", "picture", "width", "dup_count"]
    part = [row for row in stays if row >= SIZES[0]]
    kept = pa.concat_tables(map(pq.read_table, sorted(folder.glob("part/*.parquet"))))
    assert kept["key"].to_pylist() == [f"{row:09d}" for row in part]
    assert read_manifest(folder / "clean_adc", "dedup")["verified"] is True
    assert read_manifest(folder / "clean_codes", "dedup")["verified"] is False


@pytest.mark.parametrize("block", blocks("python"))
def test_library_example_runs(sample, monkeypatch, capsys, block):
    monkeypatch.chdir(sample[0])
    exec(compile(block, str(README), "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("line", commands(setup=True))
def test_set_up_names_what_exists(line):
    words = shlex.split(line, comments=True)
    named = [word for word in words if "/" in word or word.endswith(".txt")]
    assert named
    for name in named:
        assert (ROOT / name).is_file(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_scripts_exist(page):
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        goal = page.parent / name if name else page
        assert goal.is_file(), target
        assert not anchor or anchor in anchors(goal), target
    for name in re.findall(r"\b((?:scripts|tests|docs|snipdedup)/(?:\w+/)?\w+\.\w+)", text):
        assert (ROOT / name).is_file(), name


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_exist(page):
    flags = {f.name for command in COMMANDS.values() for f in fields(command.options)}
    known = FOREIGN | flags | {f"no{name}" for name in flags}  # a switch turned off
    for script in ROOT.glob("scripts/*.py"):
        known |= set(re.findall(r"\"--(\w+)\"", script.read_text("utf-8")))
    foreign = r"^(?:img2dataset|#SBATCH|pip install|export) .*$"
    text = re.sub(foreign, "", page.read_text("utf-8"), flags=re.M)
    named = set(re.findall(r"(?<![\w-])--([a-zA-Z][\w-]*)", text))
    named -= {"with_underscores", "with-dashes", "flag", "noSWITCH"}
    assert named <= known, named - known


def test_help_and_readme_show_the_same_commands():
    shown = set(re.findall(r"^snip (\w+)", "\n".join(blocks("sh")), re.M))
    assert shown | {"demo"} == set(COMMANDS)
    examples = [line.split("  #")[0].strip() for line in commands(setup=False)]
    assert COMMANDS["dedup"].example in examples


PACKAGE = ROOT / "snipdedup"


def rooms() -> list[str]:
    """Return folders and single modules in the order of CONTRIBUTING's map, top first."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    house = text.partition("```text\n")[2].partition("```")[0]
    return [line.split()[0].rstrip("/") for line in house.splitlines()]


def test_the_map_has_every_room_once():
    there = [p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()]
    assert sorted(rooms()) == sorted(set(there) - {"__init__", "__main__"})


def imports_of(module: Path) -> set[str]:
    """Return the modules of the package that a file imports, as ``room/module`` or ``module``."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("snipdedup") for alias in node.names), node.lineno
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "snipdedup":
            inside = "/".join((node.module or "").split(".")[1:])
            names = {f"{inside}/{alias.name}".lstrip("/") for alias in node.names}
            found |= {name for name in {inside, *names} if (PACKAGE / f"{name}.py").is_file()}
    return found


@pytest.mark.parametrize("room", rooms())
def test_imports_run_downwards(room):
    below = {*rooms()[rooms().index(room) :]}
    files = [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").exists() else []
    inside = {}
    for path in [*files, *(PACKAGE / room).glob("*.py")]:
        imported = imports_of(path)
        assert {name.split("/")[0] for name in imported} <= below, path.name
        inside[f"{room}/{path.stem}"] = {name for name in imported if name.startswith(f"{room}/")}
    graphlib.TopologicalSorter(inside).prepare()  # a cycle raises CycleError and names it


@pytest.mark.slow
def test_readme_output_is_what_the_command_prints(data, snip, tmp_path):
    clean, frames = tmp_path / "clean", data / "keyframes"
    said = snip("dedup", frames / "img_emb", "--metadata", frames / "metadata", "--out", clean)
    shown = blocks("text")[0].partition("seconds:")[0]
    assert said.stdout.partition("seconds:")[0] == shown
    import snipdedup

    result = snipdedup.dedup(frames, threshold=0.95, grouping="components")
    text = " ".join((DOCS / "howto" / "deduplicate.md").read_text("utf-8").split())
    assert f"{result.removed:,} rows instead of 13,066. For {result.chained:,} of these" in text


@pytest.mark.slow
def test_the_page_on_thresholds_shows_what_the_command_prints(data, snip):
    copies = data / "copies"
    known = ("--metadata", copies / "labels.parquet", "--same", "group", "--sample", "10000")
    said = snip("threshold", copies / "features.npy", *known).stdout
    frames = snip("threshold", data / "keyframes").stdout
    page = (DOCS / "threshold.md").read_text("utf-8")
    shown = re.findall(r"^```text\n(.*?)^```", page, re.M | re.S)
    assert [frames, said] == shown
