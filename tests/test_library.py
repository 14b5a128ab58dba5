"""The library: the functions of the command table, with its settings, defaults and examples."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import truth
from conftest import ROOT
from odd_files import write_photos

import snipdedup
from snipdedup.commands import LATE
from snipdedup.config import BY_FUNCTION
from snipdedup.errors import UsageError
from snipdedup.storage import atomic

PAGE = (ROOT / "docs" / "python.md").read_text("utf-8")
QUICK = "steps=20, threads=1)"  # training by default takes what a shared machine leaves
SHORTER = {
    "hf://datasets/OWNER/NAME": "memory://team/library",  # no hub is at hand
    'out="encoder"))': f'out="encoder", {QUICK})',
    "dim=64)": f'dim=64, code_bytes="4", nprobe="1", picture=False, {QUICK}',
}


def test_each_function_is_listed_and_found():
    names = {*BY_FUNCTION, *LATE, "SnipError", "UsageError", "__version__"}
    assert set(snipdedup.__all__) == names
    assert names <= set(dir(snipdedup))
    with pytest.raises(AttributeError, match="has no attribute 'dedupe'"):
        _ = snipdedup.dedupe


@pytest.mark.parametrize("name", BY_FUNCTION)
def test_a_function_shows_each_setting_with_its_default_and_meaning(name):
    function, options = getattr(snipdedup, name), BY_FUNCTION[name].options
    assert function is getattr(snipdedup, name)
    assert pickle.loads(pickle.dumps(function)) is function
    shown = inspect.signature(function).parameters
    fields = {f.name: f for f in dataclasses.fields(options) if not f.metadata.get("command_only")}
    assert set(shown) == set(fields)
    text = " ".join(inspect.getdoc(function).split())
    for field in fields.values():
        empty = field.default is dataclasses.MISSING
        assert shown[field.name].default == (inspect.Parameter.empty if empty else field.default)
        assert f" {field.name} {field.metadata['help']}" in text


def test_mistakes_name_the_nearest_setting():
    with pytest.raises(TypeError, match=r"^dedup\(\) got an unexpected keyword 'treshold', did y"):
        snipdedup.dedup("x", treshold=0.9)
    with pytest.raises(TypeError, match=r"^dedup\(\) got an unexpected keyword 'zzzz'$"):
        snipdedup.dedup("x", zzzz=0.9)
    with pytest.raises(TypeError, match="unexpected keyword 'json'"):
        snipdedup.top("x", json=True)
    with pytest.raises(TypeError, match=r"^train\(\) missing a required argument: 'out'"):
        snipdedup.train("x")
    with pytest.raises(TypeError, match=r"^top\(\) too many positional arguments"):
        snipdedup.top("x", 3)
    with pytest.raises(UsageError, match="--threshold must lie between"):
        snipdedup.dedup("x", threshold=9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which the examples run."""
    place = tmp_path_factory.mktemp("library")
    rows, start = truth.clustered(400, 160, 7, copies=0.1, dtype=np.float16), 0
    for part, size in enumerate((160, 140, 100)):
        block = rows[start : start + size]
        atomic.save_npy(place / f"img_emb/img_emb_{part:04d}.npy", block)
        table = pa.table({"key": [f"{row:09d}" for row in range(start, start + size)]})
        atomic.save_parquet(place / f"metadata/metadata_{part:04d}.parquet", table)
        start += size
    write_photos(place / "photos")
    return place


def test_the_examples_of_the_page_run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert re.findall(r"^## (\w+)$", PAGE, re.M) == list(BY_FUNCTION)
    names: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S):
        code = block
        for long, short in SHORTER.items():
            code = code.replace(long, short)
        exec(compile(code, "docs/python.md", "exec"), names)
        assert ("print(" in code) == bool(capsys.readouterr().out.strip()), code
    assert np.load("clean/is_dup.npy").sum() > 0


def test_paths_may_be_path_objects(folder, monkeypatch):
    monkeypatch.chdir(folder)
    first = snipdedup.dedup(Path("img_emb"), out=Path("paths"), metadata=Path("metadata"))
    again = snipdedup.dedup("img_emb")
    np.testing.assert_array_equal(first.is_dup, again.is_dup)
