"""Frames of videos that are made here: each second has a colour of its own."""

from __future__ import annotations

import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
from odd_files import encoded, photo

import snipdedup
from snipdedup.errors import SnipError
from snipdedup.pictures.video import frames

av = pytest.importorskip("av")
RATE = 10
COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (200, 200, 30)]


def make_video(path, seconds=4, codec="mpeg4"):
    """Write a video, ten noisy frames a second, whose colour changes with each second."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as made:
        stream = made.add_stream(codec, rate=RATE)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(seconds * RATE):
            pixels = np.uint8(COLOURS[number // RATE] + rng.integers(-25, 26, (48, 64, 3)))
            made.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        made.mux(stream.encode())
    return path


def shown(picture):
    """The number of the colour that a picture has."""
    pixel = np.asarray(picture).mean((0, 1))
    return int(np.argmin(np.abs(pixel - COLOURS).sum(1)))


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.mkv"])
def test_a_frame_each_so_many_seconds(tmp_path, name):
    path = make_video(tmp_path / name)
    for every, expected in ((1, [0, 1, 2, 3]), (2, [0, 2]), (0.25, [0, 0.3, 0.5, 0.8]), (99, [0])):
        found = list(frames(path, every))
        assert [second for second, _ in found][:4] == expected
        assert [shown(picture) for _, picture in found][:4] == [int(s) for s in expected]
        assert {picture.size for _, picture in found} == {(64, 48)}
    assert len(list(frames(path, 0.01))) == 40


def test_frames_are_rows_beside_pictures(tmp_path):
    folder = tmp_path / "p"
    folder.mkdir()
    make_video(folder / "b.mp4")
    (folder / "a.jpg").write_bytes(encoded(photo(), "JPEG"))
    (folder / "b.txt").write_text("four colours")
    (folder / "c.mp4").write_bytes(b"no video")
    cut = make_video(folder / "d.avi").read_bytes()
    (folder / "d.avi").write_bytes(cut[: len(cut) // 2])
    for threads in (1, 2):
        out = tmp_path / f"out{threads}"
        result = snipdedup.embed(folder, out=out, every=1, threads=threads)
        rows = pq.read_table(out / "metadata/metadata_0000.parquet").to_pylist()
        assert [row["key"] for row in rows][:5] == [
            "a", "b@0.000", "b@1.000", "b@2.000", "b@3.000"
        ]  # fmt: skip
        assert (rows[0]["path"], rows[0]["video"]) == (str(folder / "a.jpg"), None)
        assert (rows[2]["path"], rows[2]["video"]) == (None, str(folder / "b.mp4"))
        assert (rows[2]["second"], rows[2]["caption"], rows[2]["width"]) == (
            1.0,
            "four colours",
            64,
        )
        assert len({row["sha256"] for row in rows[:5]}) == 5
        assert 1 <= sum(row["key"].startswith("d@") for row in rows) < 4
        failed = pq.read_table(out / "failed.parquet").to_pylist()
        assert failed[0]["source"] == str(folder / "c.mp4")
        assert failed[0]["reason"].startswith("damaged: ")
        assert result.rows == len(rows)
    files = ("metadata/metadata_0000.parquet", "img_emb/img_emb_0000.npy", "failed.parquet")
    for name in files:
        assert (tmp_path / "out1" / name).read_bytes() == (tmp_path / "out2" / name).read_bytes()


def test_videos_are_left_out_unless_asked_for(tmp_path):
    folder = tmp_path / "p"
    folder.mkdir()
    make_video(folder / "b.mp4", 1)
    with pytest.raises(SnipError, match="--every SECONDS reads videos"):
        snipdedup.embed(folder, out=tmp_path / "out")
    (folder / "a.jpg").write_bytes(encoded(photo(), "JPEG"))
    said = str(snipdedup.embed(folder, out=tmp_path / "out"))
    assert "left out, as no pictures by their names: 1 .mp4" in said
    assert "video" not in pq.read_schema(tmp_path / "out/metadata/metadata_0000.parquet").names


def test_sound_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as made:
        stream = made.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        sound.sample_rate = 8000
        made.mux(stream.encode(sound))
        made.mux(stream.encode())
    with pytest.raises(SnipError, match=r"none of 1 pictures .* no video: the file has sound"):
        snipdedup.embed(tmp_path / "a.mkv", out=tmp_path / "out", every=1)


def test_without_pyav_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(SnipError, match=r"pip install 'snipdedup-toolkit\[video\]'"):
        snipdedup.embed(tmp_path, out=tmp_path / "out", every=1)
