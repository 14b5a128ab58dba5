"""``snip search``: against brute force on real features, and every way to ask and to refuse."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import truth

from snipdedup import config
from snipdedup.index.folder import Index
from snipdedup.inspection.search import run

HOSTILE = "<script>alert(1)</script>\x1b[31m\u202etxt" + "x" * 10_000
ROWS = 900


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    return truth.clustered(ROWS, 24, 4, dtype=np.float16)


@pytest.fixture(scope="module")
def folder(rows, tmp_path_factory) -> Path:
    """Features and metadata side by side, and an index of them."""
    home = tmp_path_factory.mktemp("lookup")
    truth.save_shards(home / "set" / "img_emb", rows, [400])
    (home / "set" / "metadata").mkdir()
    for number, span in enumerate([range(400), range(400, ROWS)]):
        columns = {
            "KEY": [f"k{row}" for row in span],
            "url": [f"https://example.org/{row}" for row in span],
            "TEXT": [f"caption {row}" for row in span],
        }
        if number == 0:
            columns["url"][7], columns["TEXT"][7] = "javascript:alert(2)", HOSTILE
            columns["KEY"][9] = None
        path = home / "set" / "metadata" / f"metadata_{number}.parquet"
        pq.write_table(pa.table(columns), path)
    given = ["--out", home / "index", "--nlist", 8, "--m", 8, "--model", "RN/tag"]
    assert truth.snip("index", home / "set", *given)[0] == 0
    return home


def ask(*words: object) -> dict:
    status, said, line = truth.snip("search", *words, "--json")
    assert status == 0, line
    return json.loads(said)


def nearest(rows: np.ndarray, x: np.ndarray, k: int, without: int | None = None) -> list[int]:
    """Brute force, in float64; the data has no ties."""
    y = rows.astype(np.float64)
    cosine = (y @ x.astype(np.float64)) / np.linalg.norm(y, axis=1)
    if without is not None:
        cosine[without] = -2
    return np.argsort(-cosine, kind="stable")[:k].tolist()


def found(answer: dict) -> list[int]:
    return [neighbour["row"] for neighbour in answer["neighbours"]]


def test_by_key_is_by_the_row_that_has_it(folder, rows):
    for query in ("k401", "key:k401", "row:401"):
        (answer,) = ask(query, "--index", folder / "index", "-k", 6)["queries"]
        assert answer["row"]["row"] == 401
        assert found(answer) == nearest(rows, rows[401], 6, without=401)
    status, _, said = truth.snip("search", "key:k9999", "--index", folder / "index")
    assert (status, said.count("\n")) == (1, 1)
    assert "has the key 'k9999'; the nearest keys: 'k" in said
    twice = pa.table({"key": [f"k{row // 2}" for row in range(ROWS)]})
    pq.write_table(twice, folder / "twice.parquet")
    words = ("--index", folder / "index", "--metadata", folder / "twice.parquet")
    status, _, said = truth.snip("search", "k40", *words)
    assert (status, "2 rows have the key 'k40': give one of 80, 81" in said) == (1, True)


def test_by_row_with_raw_features_is_brute_force(folder, rows):
    said = ask(401, "--index", folder / "index", "-k", 6)
    assert (said["measure"], said["of"], said["note"]) == ("cosine", "features", "")
    (answer,) = said["queries"]
    assert found(answer) == nearest(rows, rows[401], 6, without=401)
    assert answer["row"]["key"] == "k401"
    first = answer["neighbours"][0]
    assert (first["key"], first["caption"]) == (f"k{first['row']}", f"caption {first['row']}")
    assert first["url"] == f"https://example.org/{first['row']}"
    x, y = (rows[row].astype(np.float64) for row in (401, first["row"]))
    assert np.float32(first["cosine"]) == np.float32(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    offset = 400 * (first["row"] >= 400)
    assert (first["shard"], first["shard_row"]) == (
        f"img_emb_{offset // 400}.npy", first["row"] - offset,
    )  # fmt: skip


@pytest.mark.slow
def test_recall_on_key_frames(data, tmp_path):
    out = tmp_path / "index"
    shards = str(data / "keyframes" / "img_emb" / "img_emb_{part:04d}.npy")
    status, _, line = truth.snip("index", shards, "--parts", "0:6", "--out", out)
    assert status == 0, line
    index = Index(out)
    names = [data / "keyframes" / "img_emb" / s["name"] for s in index.manifest["shards"]]
    x = np.concatenate([np.load(name) for name in names]).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    queries = np.random.default_rng(0).choice(len(x), 100, replace=False)
    hits = 0
    for row in queries.tolist():
        (answer,) = run(config.Search(query=str(row), index=str(out))).answers
        cosine = x @ x[row]
        cosine[row] = -1
        tenth = np.sort(cosine)[-10]  # copies tie: any of them will do
        hits += sum(cosine[n.row] >= tenth - 1e-6 for n in answer.neighbours)
    assert hits >= 0.99 * 10 * len(queries)


def test_by_vectors(folder, rows, tmp_path):
    x = rows[[5, 600]].astype(np.float32) + np.float32(0.01)
    np.save(tmp_path / "two.npy", x)
    np.save(tmp_path / "one.npy", x[0])
    np.savez(tmp_path / "named.npz", other=x[:, :3], x=x)
    given = ("--index", folder / "index", "--nprobe", 8)
    two = ask(tmp_path / "two.npy", *given)["queries"]
    assert [found(answer) for answer in two] == [nearest(rows, v, 10) for v in x]
    (one,) = ask(tmp_path / "one.npy", *given)["queries"]
    assert found(one) == found(two[0])
    for number, other in enumerate((x.astype(">f4"), np.asfortranarray(x), x.astype(">f8"))):
        np.save(tmp_path / f"other_{number}.npy", other)
        again = ask(tmp_path / f"other_{number}.npy", *given)["queries"]
        assert [found(answer) for answer in again] == [found(answer) for answer in two]
    assert one["row"] is None
    named = ask(tmp_path / "named.npz", *given, "--array", "x")["queries"]
    assert [found(a) for a in named] == [found(a) for a in two]
    status, _, line = truth.snip("search", tmp_path / "named.npz", *given)
    assert status == 1
    assert "holds other, x; choose one with --array" in line


def test_without_features_codes_are_compared_and_it_says_so(folder, tmp_path):
    said = ask(3, "--index", folder / "index", "--rerank", 0)
    assert (said["measure"], said["of"], said["note"]) == ("adc_distance", "codes", "--rerank 0")
    distances = [n["adc_distance"] for n in said["queries"][0]["neighbours"]]
    assert distances == sorted(distances)
    shutil.copytree(folder / "set", tmp_path / "set")
    assert truth.snip("index", tmp_path / "set", "--out", tmp_path / "i", "--nlist", 8)[0] == 0
    path = tmp_path / "set" / "img_emb" / "img_emb_1.npy"
    os.utime(path, ns=(0, 1))
    for words, note in (
        ([], "changed since; if the rows are the same, give --features"),
        (["--features", tmp_path / "set"], ""),
    ):
        said = ask(3, "--index", tmp_path / "i", *words)
        assert note in said["note"]
        assert said["measure"] == ("adc_distance" if note else "cosine")
    shutil.rmtree(tmp_path / "set")
    said = ask(3, "--index", tmp_path / "i")
    assert "the features are not where they were" in said["note"]
    assert said["queries"][0]["row"]["key"] is None


def test_an_index_with_an_encoder_takes_features_and_descriptors(folder, rows, tmp_path):
    from snipdedup.encoder.network import Encoder, Network

    Encoder(Network(24, 8, 16)).save(tmp_path / "encoder", {})
    words = ["--out", tmp_path / "i", "--nlist", 4, "--encoder", tmp_path / "encoder"]
    assert truth.snip("index", folder / "set", *words)[0] == 0
    given = ("--index", tmp_path / "i", "--nprobe", 4)
    (by_row,) = ask(8, *given)["queries"]
    assert found(by_row) == nearest(rows, rows[8], 10, without=8)
    np.save(tmp_path / "x.npy", rows[8])
    np.save(tmp_path / "y.npy", Encoder.load(tmp_path / "encoder").encode(rows[8:9]))
    wide, short = (ask(tmp_path / name, *given, "-k", 30) for name in ("x.npy", "y.npy"))
    assert found(wide["queries"][0])[:11] == [8, *found(by_row)]
    assert (short["measure"], short["note"]) == (
        "adc_distance", "the query is not as wide as the features",
    )  # fmt: skip
    codes = ask(tmp_path / "x.npy", *given, "-k", 30, "--rerank", 0)
    assert found(short["queries"][0]) == found(codes["queries"][0])


def test_the_table_cannot_steer_a_terminal(folder):
    status, said, _ = truth.snip("search", 7, "--index", folder / "index")
    assert status == 0
    assert "\x1b" not in said
    assert "\u202e" not in said
    assert "key k7" in said
    assert max(map(len, said.splitlines())) < 200
    assert said.rstrip().endswith("cosine of the features")
    assert truth.snip("search", 9, "--index", folder / "index")[0] == 0  # no key


def test_the_page_holds_texts_as_texts(folder, tmp_path):
    pytest.importorskip("jinja2")
    page = tmp_path / "page.html"
    status, said, line = truth.snip("search", 7, "--index", folder / "index", "--html", page)
    assert status == 0, line
    assert f"written to {page}" in said
    text = page.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert 'href="javascript' not in text
    assert 'href="https://example.org/' in text
    assert "default-src 'none'; style-src 'sha256-" in html.unescape(text)
    assert " src=" not in text
    assert "@import" not in text
    assert "url(" not in text
    assert "x" * 1000 not in text
    json.loads(truth.snip("search", 7, "--index", folder / "index", "--json", "--html", page)[1])


def test_torch_is_not_loaded_for_a_row(folder):
    code = (
        "import sys; from snipdedup import cli;"
        f"assert cli.run(['search', '3', '--index', {str(folder / 'index')!r}]) == 0;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.fixture
def open_clip(monkeypatch, rows):
    """A stand-in with the names of open_clip's that are used."""
    import torch

    module = types.ModuleType("open_clip")
    module.calls = []
    known = {("RN", "tag"): {"url": "https://example.org/weights-RN.pt", "quick_gelu": True}}
    module.pretrained = types.SimpleNamespace(
        get_pretrained_cfg=lambda name, tag: known.get((name, tag), {}),
        download_pretrained=lambda cfg: module.calls.append(cfg) or "fetched.pt",
    )

    class Network(torch.nn.Module):
        def encode_text(self, tokens: list[str]) -> torch.Tensor:
            at = int(tokens[0].split()[-1])
            return torch.from_numpy(rows[at : at + 1].astype(np.float32))

    def create_model(name: str, pretrained: str, force_quick_gelu: bool) -> Network:
        if name != "RN":
            raise RuntimeError(f"no {name}\nand more")
        module.calls.append((pretrained, force_quick_gelu))
        return Network()

    module.create_model = create_model
    module.get_tokenizer = lambda _: lambda texts: texts
    module.list_pretrained_tags_by_model = lambda name: ["tag"] if name == "RN" else []
    monkeypatch.setitem(sys.modules, "open_clip", module)
    return module


def test_by_text(folder, rows, open_clip, tmp_path, monkeypatch):
    weights = tmp_path / "weights.pt"
    weights.touch()
    given = ("--index", folder / "index", "--nprobe", 8)
    (answer,) = ask("like row 12", *given, "--model", f"RN/{weights}")["queries"]
    assert found(answer) == nearest(rows, rows[12], 10)
    assert (answer["query"], answer["row"]) == ("like row 12", None)
    (digits,) = ask("12", *given, "--model", f"RN/{weights}", "--text")["queries"]
    assert found(digits) == found(answer)
    monkeypatch.setenv("HOME", str(tmp_path))
    status, _, line = truth.snip("search", "row 12", *given)  # the index names the model
    assert status == 1
    assert "its weights are not on this machine; fetch them with --download" in line
    assert found(ask("row 12", *given, "--download")["queries"][0]) == found(answer)
    (tmp_path / ".cache" / "clip").mkdir(parents=True)
    cached = tmp_path / ".cache" / "clip" / "weights-RN.pt"
    cached.touch()
    assert found(ask("row 12", *given)["queries"][0]) == found(answer)
    assert open_clip.calls[-1] == (str(cached), True)


@pytest.mark.parametrize(
    ("model", "status", "says"),
    [
        ("RN", 2, "--model must be ARCHITECTURE/WEIGHTS"),
        ("RN/other", 1, "neither a file nor weights that open_clip has; of RN it knows tag"),
        ("XX/other", 1, "it knows no model XX"),
        ("XX/{file}", 1, "open_clip cannot load it: no XX"),
    ],
)
def test_models_that_are_refused(folder, open_clip, tmp_path, model, status, says):
    (tmp_path / "file.pt").touch()
    model = model.format(file=tmp_path / "file.pt")
    words = ("a red car", "--index", folder / "index", "--model", model)
    got, said, line = truth.snip("search", *words)
    assert (got, said) == (status, "")
    assert says in line
    assert line.count("\n") == 1


def test_without_open_clip_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    status, said, line = truth.snip("search", "a red car", "--index", folder / "index")
    assert (status, said) == (1, "")
    assert "pip install 'snipdedup-toolkit[clip]'" in line


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        ([ROWS], 1, f"row {ROWS} is not in .*: it has {ROWS} rows, numbered from 0"),
        (["gone.npy"], 1, "no such file: gone.npy"),
        (["{narrow}"], 1, r"narrow\.npy: vectors 5 wide, .* expects 24 wide"),
        (["{bad}"], 1, r"bad\.npy row 1: NaN, infinite or zero"),
        (["{whole}"], 1, r"whole\.npy: expected vectors, \(n, d\) of floats, found \(2, 24\) of"),
        (["{broken}"], 1, r"broken\.npy: cannot be read as vectors"),
        ([3, "--features", "{whole}"], 1, r"900 rows of 2 shards, --features .* has 2 rows of 1"),
        ([3, "--metadata", "{short}"], 1, r"400 rows of metadata, but 900 rows"),
        ([3, "-k", 0], 2, "--k must lie between"),
        ([3, "--index", "{narrow}"], 2, "given more than once"),
    ],
)
def test_refusals(folder, tmp_path, words, status, says):
    np.save(tmp_path / "narrow.npy", np.ones((2, 5), np.float32))
    np.save(tmp_path / "bad.npy", np.array([np.ones(24), np.zeros(24)]))
    np.save(tmp_path / "whole.npy", np.ones((2, 24), int))
    (tmp_path / "broken.npy").write_bytes(b"\x93NUMPY")
    names = {path.stem: path for path in tmp_path.iterdir()}
    names["short"] = folder / "set" / "metadata" / "metadata_0.parquet"
    if "{whole}" in words[1:]:
        np.save(tmp_path / "whole.npy", np.ones((2, 24)))
    words = [str(word).format(**names) for word in words]
    got, said, line = truth.snip("search", *words, "--index", folder / "index")
    assert (got, said) == (status, "")
    assert re.search(says, line), line


def test_the_page_is_not_written_into_the_index(folder):
    pytest.importorskip("jinja2")
    words = {"query": "3", "index": str(folder / "index"), "html": str(folder / "index" / "p.html")}
    with pytest.raises(Exception, match="snip never writes there"):
        run(config.Search(**words))
