"""What snip embed says of its features, from whatever part of its folder is named."""

from __future__ import annotations

import json

import fsspec
import numpy as np
import pytest

import snipdedup
from snipdedup import planning
from snipdedup.errors import SnipError
from snipdedup.evaluation import evaluate
from snipdedup.features.origin import Origin, origin_of, usual_threshold

MANIFEST = {
    "kind": "embed",
    "model": {"name": "phash", "threshold": 0.75},
    "settings": {"images": ["/photos"], "column": "jpg"},
}


@pytest.fixture
def embedded(tmp_path):
    folder = tmp_path / "set"
    (folder / "img_emb").mkdir(parents=True)
    rows = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)
    np.save(folder / "img_emb" / "img_emb_0000.npy", rows)
    (folder / "snip.json").write_text(json.dumps(MANIFEST))
    return folder


@pytest.mark.parametrize("inside", ["", "/", "/img_emb", "/img_emb/", "/img_emb/img_emb_0000.npy"])
def test_a_folder_of_snip_embed_is_known_by_its_parts(embedded, inside, monkeypatch):
    expected = Origin(str(embedded), "phash", 0.75, ["/photos"], "jpg")
    assert origin_of(f"{embedded}{inside}") == expected
    monkeypatch.chdir(embedded.parent)
    assert origin_of(f"set{inside}") == expected
    monkeypatch.chdir(embedded)
    assert origin_of(f".{inside}") == expected
    assert usual_threshold(f".{inside}") == (0.75, "phash")


def test_links_globs_and_lists_lead_to_the_folder(embedded, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(embedded / "img_emb")
    shard = embedded / "img_emb" / "img_emb_0000.npy"
    for source in (link, f"{tmp_path}/s*/img_emb/*.npy", f"{link}/*.npy", [shard, str(link)]):
        assert origin_of(source) == Origin(str(embedded), "phash", 0.75, ["/photos"], "jpg")
    (tmp_path / "s2" / "img_emb").mkdir(parents=True)
    np.save(tmp_path / "s2" / "img_emb" / "a.npy", np.eye(3))
    assert origin_of(f"{tmp_path}/s*/img_emb/*.npy") is None


@pytest.mark.parametrize("inside", ["/text_emb", "/metadata", "/img_emb/x/y.npy", "/none"])
def test_other_folders_have_no_origin(embedded, inside):
    assert origin_of(f"{embedded}{inside}") is None
    assert usual_threshold(f"{embedded}{inside}") == (0.95, None)


def test_other_sources_and_manifests_have_none(embedded):
    for source in (
        np.eye(3),
        None,
        [np.eye(3)],
        [str(embedded), "elsewhere"],
        "http://host/set/img_emb/img_emb_0.npy",
    ):
        assert origin_of(source) is None
    (embedded / "snip.json").write_text(json.dumps({**MANIFEST, "kind": "descriptors"}))
    assert origin_of(embedded) is None
    for model in (
        {},
        None,
        {"name": "x"},
        {"threshold": 2},
        {"threshold": True},
        {"threshold": "1"},
    ):
        (embedded / "snip.json").write_text(json.dumps({**MANIFEST, "model": model}))
        with pytest.raises(SnipError, match=r"snip\.json: damaged: its model has the threshold"):
            origin_of(embedded)
    (embedded / "snip.json").write_text("{")
    with pytest.raises(SnipError, match="expected a manifest of snip"):
        origin_of(embedded)


def test_a_store_is_asked_too(embedded):
    store = fsspec.filesystem("memory")
    store.put(str(embedded), "/origin/set", recursive=True)
    try:
        for name in ("memory://origin/set", "memory://origin/set/img_emb"):
            assert origin_of(name) == Origin(
                "memory://origin/set", "phash", 0.75, ["/photos"], "jpg"
            )
        assert origin_of("memory://origin") is None
    finally:
        store.rm("/origin", recursive=True)


def test_plan_and_eval_take_the_threshold_of_the_model(embedded, monkeypatch, tmp_path):
    taken = []

    def stop(*given):
        taken.append(given)
        raise SnipError("enough")

    monkeypatch.setattr(planning, "probe", stop)
    monkeypatch.setattr(evaluate, "evaluate", stop)
    for more in ({}, {"threshold": 0.9}):
        with pytest.raises(SnipError, match="enough"):
            snipdedup.plan(features=str(embedded), **more)
        with pytest.raises(SnipError, match="enough"):
            snipdedup.evaluate(str(embedded), out=str(tmp_path / "eval"), picture=False, **more)
    assert [given[3] for given in taken[::2]] == [0.75, 0.9]
    assert [given[2].threshold for given in taken[1::2]] == [0.75, 0.9]
