"""Which files a source means, and which features belong to them."""

from __future__ import annotations

import sys

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from snipdedup.config import Download
from snipdedup.downloading import run as download
from snipdedup.downloading import sources, transfer
from snipdedup.downloading.sources import find_features, find_source_files
from snipdedup.downloading.transfer import fetch_file
from snipdedup.errors import MissingError, SnipError, UsageError
from snipdedup.storage import atomic, remote
from snipdedup.storage.out_folder import read_manifest

ROWS = [12, 5, 20, 9]


@pytest.fixture
def laion(tmp_path):
    """A set as LAION and clip-retrieval lay it out: two folders side by side."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "laion"
    for number, rows in enumerate(ROWS):
        keys = [f"{number}-{row}" for row in range(rows)]
        atomic.save_parquet(folder / f"metadata/metadata_{number}.parquet", pa.table({"key": keys}))
        images, texts = rng.standard_normal((2, rows, 8)).astype(np.float16)
        atomic.save_npy(folder / f"img_emb/img_emb_{number}.npy", images)
        atomic.save_npy(folder / f"text_emb/text_emb_{number}.npy", texts)
    return folder


@pytest.fixture
def datacomp(tmp_path):
    """A set as DataComp lays it out: hex names, an archive beside each table."""
    rng = np.random.default_rng(1)
    folder = tmp_path / "datacomp"
    for rows in ROWS:
        name = rng.bytes(16).hex()
        uids = [rng.bytes(16).hex() for _ in range(rows)]
        atomic.save_parquet(folder / f"{name}.parquet", pa.table({"uid": uids}))
        arrays = {k: rng.standard_normal((rows, d)) for k, d in (("b32_img", 6), ("l14_img", 8))}
        atomic.save_npz(folder / f"{name}.npz", **arrays)
    return folder


def stored(folder, scheme="memory"):
    """Put a folder into a store; return its URL."""
    system = fsspec.filesystem(scheme)
    if system.exists("/" + folder.name):
        system.rm("/" + folder.name, recursive=True)
    for path in folder.rglob("*"):
        if path.is_file():
            url = f"{scheme}://{folder.name}/{path.relative_to(folder)}"
            with fsspec.open(url, "wb") as file:
                file.write(path.read_bytes())
    return f"{scheme}://{folder.name}"


def names(files):
    return [file.name for file in files]


def fetch(source, out, **more):
    return str(download.run(Download(source=str(source), out=str(out), **more)))


@pytest.mark.parametrize("kind", ["path", "store"])
@pytest.mark.parametrize("form", ["", "/metadata", "/metadata/*.parquet"])
def test_features_beside_the_metadata(laion, tmp_path, kind, form):
    base = str(laion) if kind == "path" else stored(laion)
    if (kind, form) == ("path", ""):
        form = "/metadata"  # a local folder is not searched
    fetch(base + form, tmp_path / "out", start=1, end=3, embeddings=True)
    for number in (1, 2):
        for name in (f"metadata/metadata_{number}.parquet", f"img_emb/img_emb_{number}.npy"):
            assert (tmp_path / "out" / name).read_bytes() == (laion / name).read_bytes()
    assert len(list((tmp_path / "out").rglob("*"))) == 7
    manifest = read_manifest(tmp_path / "out", "download")
    assert [file["features"] for file in manifest["files"]] == ["img_emb_1.npy", "img_emb_2.npy"]


@pytest.mark.parametrize("filtered", [False, True])
def test_a_stop_between_a_table_and_its_features(laion, tmp_path, filtered):
    np.save(tmp_path / "mask.npy", np.arange(sum(ROWS)) % 3 == 0)
    more = {"embeddings": True} | ({"is_dup": str(tmp_path / "mask.npy")} if filtered else {})
    fetch(laion / "metadata", tmp_path / "whole", **more)
    out, asked = tmp_path / "out", []

    def stop(file, *rest):
        asked.append(file.name)
        if file.name == "img_emb_1.npy":
            raise SystemExit
        return fetch_file(file, *rest)

    for _ in range(2):
        asked.clear()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transfer, "fetch_file", stop)
            with pytest.raises(SystemExit):
                fetch(laion / "metadata", out, jobs=1, **more)
    assert "metadata_1.parquet" not in asked  # it is here, whatever became of its features
    fetch(laion / "metadata", out, **more)
    for path in (tmp_path / "whole").rglob("*_emb_*"):
        assert (out / "img_emb" / path.name).read_bytes() == path.read_bytes()


def test_features_elsewhere(laion, tmp_path):
    (laion / "img_emb").rename(tmp_path / "elsewhere")
    with pytest.raises(SnipError, match=r"no features beside .*--embeddings_source"):
        fetch(laion / "metadata", tmp_path / "out", embeddings=True)
    for number, place in enumerate(
        (tmp_path / "elsewhere", f"{tmp_path}/elsewhere/img_emb_{{part}}.npy")
    ):
        more = {"start": 2, "end": 4, "embeddings_source": str(place)}
        fetch(laion / "metadata", tmp_path / f"out{number}", **more)
        found = sorted(p.name for p in (tmp_path / f"out{number}" / "img_emb").iterdir())
        assert found == ["img_emb_2.npy", "img_emb_3.npy"]
    with pytest.raises(UsageError, match="needs --start and --end"):
        fetch(laion / "metadata", tmp_path / "two", embeddings_source="x_{part}.npy")
    (tmp_path / "elsewhere/img_emb_3.npy").unlink()
    more = {"embeddings_source": str(tmp_path / "elsewhere")}
    with pytest.raises(MissingError, match="which of its 3 files of features belong to metadata_0"):
        fetch(laion / "metadata", tmp_path / "four", **more)


@pytest.mark.parametrize("kind", ["path", "store"])
def test_features_of_datacomp(datacomp, tmp_path, kind):
    base = str(datacomp) if kind == "path" else stored(datacomp)
    mask = np.random.default_rng(2).random(sum(ROWS)) < 0.5
    np.save(tmp_path / "mask.npy", mask)
    fetch(base, tmp_path / "out", embeddings=True, is_dup=str(tmp_path / "mask.npy"))
    tables = sorted(datacomp.glob("*.parquet"))
    begin = 0
    for table in tables:
        rows = pq.read_metadata(table).num_rows
        stay = ~mask[begin : begin + rows]
        begin += rows
        kept = pq.read_table(tmp_path / "out" / "metadata" / table.name)
        assert kept.equals(pq.read_table(table).filter(pa.array(stay)))
        archive = table.with_suffix(".npz")
        with np.load(archive) as all_, np.load(tmp_path / "out" / "img_emb" / archive.name) as some:
            for name in ("b32_img", "l14_img"):
                np.testing.assert_array_equal(some[name], all_[name][stay])
    tables[2].with_suffix(".npz").unlink()
    base = str(datacomp) if kind == "path" else stored(datacomp)
    with pytest.raises(MissingError, match=f"{tables[2].name} has no features beside it"):
        fetch(base, tmp_path / "two", embeddings=True)


@pytest.mark.parametrize("kind", ["path", "store"])
def test_damaged_features_are_refused(laion, tmp_path, kind):
    atomic.save_npy(laion / "img_emb/img_emb_1.npy", np.zeros((4, 8), np.float32))
    base = str(laion) if kind == "path" else stored(laion)
    with pytest.raises(SnipError, match=r"img_emb_1\.npy has 4 rows, its metadata .* 5"):
        fetch(base + "/metadata", tmp_path / "out", embeddings=True)
    body = (laion / "img_emb/img_emb_1.npy").read_bytes()
    (laion / "img_emb/img_emb_1.npy").write_bytes(body[:-9])
    base = str(laion) if kind == "path" else stored(laion)
    with pytest.raises(SnipError, match="expected features, found another file"):
        fetch(base + "/metadata", tmp_path / "two", embeddings=True)
    assert not list(tmp_path.glob("two/*.json"))


def test_a_store_is_filtered_by_the_rows_of_its_footers(laion, tmp_path):
    base = stored(laion)
    mask = np.random.default_rng(3).random(sum(ROWS)) < 0.5
    np.save(tmp_path / "mask.npy", mask)
    is_dup = str(tmp_path / "mask.npy")
    fetch(base, tmp_path / "all", is_dup=is_dup)
    for source in (base, base + "/metadata/metadata_{part}.parquet"):
        out = tmp_path / f"out{len(source)}"
        fetch(source, out, start=2, end=4, is_dup=is_dup)
        for number in (2, 3):
            name = f"metadata_{number}.parquet"
            assert pq.read_table(out / name).equals(pq.read_table(tmp_path / "all" / name))
    np.save(tmp_path / "mask.npy", mask[:-1])
    with pytest.raises(SnipError, match=r"46 rows in 4 files, the mask .* has 45"):
        fetch(base, tmp_path / "two", is_dup=is_dup)
    with fsspec.open("memory://masks/is_dup.npy", "wb") as file:
        np.save(file, mask)
    fetch(base, tmp_path / "three", is_dup="memory://masks/is_dup.npy")
    for path in (tmp_path / "all").glob("*.parquet"):
        assert pq.read_table(path).equals(pq.read_table(tmp_path / "three" / path.name))


def test_what_a_store_does_not_have(laion, tmp_path, monkeypatch):
    base = stored(laion)
    with pytest.raises(MissingError, match="no such file"):
        fetch(base + "/nowhere", tmp_path / "out")
    with pytest.raises(MissingError, match=r"has no metadata_9\.parquet"):
        fetch(base + "/metadata/metadata_{part}.parquet", tmp_path / "out", start=9, end=10)
    with pytest.raises(MissingError, match=r"has no file \*\.csv"):
        fetch(base + "/metadata/*.csv", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(SnipError, match=r"gs:// needs one more package: .*gcsfs"):
        fetch("gs://bucket/metadata", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_file_of_a_store_that_changed_is_another_input(laion, tmp_path):
    base = stored(laion)
    fetch(base, tmp_path / "out")
    atomic.save_parquet(laion / "metadata/metadata_1.parquet", pa.table({"key": ["new"]}))
    base = stored(laion)
    with pytest.raises(SnipError, match="run with other files"):
        fetch(base, tmp_path / "out")


def test_faults_of_a_store_are_tried_again(laion, tmp_path, monkeypatch):
    base = stored(laion)
    monkeypatch.setattr(remote, "BACKOFF_S", 0.0)
    system, faults = type(fsspec.filesystem("memory")), {"cat_file": [], "info": []}

    def flaky(name):
        real = getattr(system, name)

        def method(self, *given, **named):
            if faults[name]:
                raise faults[name].pop()
            return real(self, *given, **named)

        return method

    for name in faults:
        monkeypatch.setattr(system, name, flaky(name))
    faults["cat_file"] += [OSError("reset"), TimeoutError("slow"), ValueError("of the store's own")]
    fetch(base, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 4
    assert faults["cat_file"] == []
    for name in faults:
        faults[name] += [PermissionError("denied")]
        with pytest.raises(SnipError, match="not permitted: log in"):
            fetch(base, tmp_path / "two")
    faults["info"] += [KeyError("NoCredentials")]
    with pytest.raises(SnipError, match="cannot be read: KeyError"):
        fetch(base, tmp_path / "two")


@pytest.mark.parametrize(
    ("source", "features"),
    [
        ("https://h/a/metadata/metadata_{part:04d}.parquet", "https://h/a/img_emb/img_emb_{part:04d}.npy"),
        ("https://h/{part}.parquet?k=1", "https://h/{part}.npz?k=1"),
    ],
)  # fmt: skip
def test_where_the_features_of_a_template_should_be(source, features):
    assert sources.guess_features(source) == features
    found = find_source_files(source, 3, 5)
    assert [f.url for f in find_features(source, found, None)] == [
        features.format(part=number) for number in (3, 4)
    ]


def test_features_beside_a_folder_of_another_name(laion, tmp_path):
    (laion / "metadata").rename(laion / "tables")
    folder = sources.open_folder(str(laion / "tables"))
    found = find_source_files(str(laion / "tables"), None, None)
    beside = sources.features_beside(found, folder)
    assert names(beside) == names(found_features := sorted((laion / "img_emb").iterdir()))
    assert found_features


def test_a_repository_named_as_a_file_is_no_file():
    for source in ("hf://datasets/me/pictures.csv", "hf://datasets/me/pictures.csv@main"):
        assert sources.split_source(source) == (source, None)
    assert sources.split_source("hf://datasets/me/set/a.csv")[1] == "a.csv"


def test_natural_order_and_places(tmp_path):
    folder = tmp_path / "many"
    for number in range(12):
        atomic.save_parquet(folder / f"part-{number}.parquet", pa.table({"n": [number]}))
    found = find_source_files(stored(folder), 2, 11)
    assert names(found.files) == [f"part-{number}.parquet" for number in range(2, 11)]
    assert names(found.before) == ["part-0.parquet", "part-1.parquet"]
    (folder / "part-4.parquet").unlink()
    with pytest.raises(SnipError, match="has the number 4 in its name"):
        find_source_files(stored(folder), 2, 11)
    with pytest.raises(SnipError, match="By position and by name it is not the same"):
        find_source_files(stored(folder), 5, 7)


def test_sets_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sources.resolve_name("datacomp_small") == "hf://datasets/mlfoundations/datacomp_small"
    assert sources.resolve_name("RELAION2B-en-research-safe").endswith(
        "laion/relaion2B-en-research-safe"
    )
    for closed in ("laion2B-en", "hf://datasets/laion/laion2b-en-vit-h-14-embeddings"):
        with pytest.raises(SnipError, match="are disabled on the hub"):
            sources.resolve_name(closed)
    (tmp_path / "datacomp_small").mkdir()
    assert sources.resolve_name("datacomp_small") == "datacomp_small"
