"""What a process that decodes does: read pictures, prepare them for a model, answer one by one.

It imports little, so that it starts fast; `workers` starts it.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import queue
import signal
import struct
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from snipdedup.errors import SnipError
from snipdedup.pictures.items import FILE_BYTES, Item, Text, read_texts

LENGTH = struct.Struct("<Q")


class ReadSettings(NamedTuple):
    """What a worker does with each picture."""

    prepare: Callable[[Any], np.ndarray]  # of a model
    least: int  # pixels of the shorter side that it needs
    most_pixels: int
    every: float | None  # seconds between frames of videos


class Row(NamedTuple):
    """A picture that was read: the values of its columns, and what the model takes."""

    values: dict[str, Any]
    prepared: np.ndarray


class Failure(NamedTuple):
    """A picture that was not."""

    source: str
    key: str
    reason: str


Result = Row | Failure


def main() -> None:
    """Answer what comes on stdin until it ends."""
    from PIL import Image

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process above ends this one
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    Image.MAX_IMAGE_PIXELS = None  # `decode` has its own bound
    try:
        settings = receive(sys.stdin.buffer)
    except Exception as error:
        send(answers, f"{type(error).__name__}: {error}")
        return
    questions: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=receive_all, args=(sys.stdin.buffer, questions), daemon=True).start()
    with suppress(BrokenPipeError):
        send(answers, None)  # it has begun
        while (items := questions.get()) is not None:
            for item, given in items:
                for result in islice(read_item(item, settings), given, None):
                    send(answers, result)
                send(answers, None)


def receive_all(file: IO[bytes], values: queue.SimpleQueue[Any]) -> None:
    """Put all that comes into a queue at once, so that its sender never waits; at the end None."""
    try:
        while True:
            values.put(receive(file))
    finally:
        values.put(None)


def read_item(item: Item, settings: ReadSettings) -> Iterator[Result]:
    """Yield the row of a picture, or those of the frames of a video; or why there is none."""
    from snipdedup.pictures.decode import Unreadable

    try:
        if item.refused:
            raise Unreadable(item.refused)
        if settings.every is not None and "video" in item.place:
            yield from read_video(item, settings.every, settings)
        else:
            yield read_picture(item, settings)
    except Unreadable as error:
        yield Failure(item.source, item.key, str(error))
    except Exception as error:
        yield Failure(item.source, item.key, f"fault: {type(error).__name__}: {error}")


def read_picture(item: Item, settings: ReadSettings) -> Row:
    """Read, decode and prepare one picture."""
    from snipdedup.pictures.decode import decode

    data = read_bytes(item)
    found = decode(data, settings.least, settings.most_pixels)
    text = text_of(item)
    values = {
        "key": item.key, **item.place, "width": found.width, "height": found.height,
        "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(),
        "exif_time": found.exif_time, "camera": found.camera, "caption": text.caption,
        "url": text.url,
    }  # fmt: skip
    return Row(values, settings.prepare(found.picture))


def read_video(item: Item, every: float, settings: ReadSettings) -> Iterator[Result]:
    """Yield the rows of frames; the sha256 is that of a frame's pixels."""
    from snipdedup.pictures.video import frames

    text = text_of(item)
    for second, picture in frames(Path() if item.path is None else item.path, every):
        values = {
            "key": f"{item.key}@{second:.3f}", **item.place, "second": second,
            "width": picture.width, "height": picture.height,
            "sha256": hashlib.sha256(picture.tobytes()).hexdigest(), "caption": text.caption,
            "url": text.url,
        }  # fmt: skip
        yield Row(values, settings.prepare(picture))


def read_bytes(item: Item) -> bytes:
    """Return the bytes of a picture file."""
    from snipdedup.pictures.decode import Unreadable

    if item.data is not None:
        return item.data
    path = Path() if item.path is None else item.path
    try:
        if not path.is_file():
            raise Unreadable("missing: it was there when the files were listed")
        size = path.stat().st_size if item.size is None else item.size
        if size > FILE_BYTES:
            raise Unreadable(f"too large: {size:,} bytes, at most {FILE_BYTES:,}")
        with path.open("rb") as file:
            file.seek(item.begin)
            data = file.read(size)
    except (OSError, ValueError, SnipError) as error:
        why = getattr(error, "strerror", None) or error
        raise Unreadable(f"cannot be read: {why}") from None
    return data


def text_of(item: Item) -> Text:
    """Return caption and url of a picture, from the files beside it where there are any."""
    if not item.beside:
        return item.text
    found: dict[str, bytes] = {}
    for path in item.beside:
        with suppress(OSError, SnipError), path.open("rb") as file:
            found[path.suffix] = file.read(FILE_BYTES)
    return read_texts(found.get(".txt"), found.get(".json"))


def send(file: IO[bytes], value: Any) -> None:
    """Write a value that `receive` returns."""
    data = pickle.dumps(value, protocol=5)
    file.write(LENGTH.pack(len(data)))
    file.write(data)
    file.flush()


def receive(file: IO[bytes]) -> Any:
    """Return the next value; raise `EOFError` where the other side has ended."""
    head = file.read(LENGTH.size)
    if len(head) < LENGTH.size:
        raise EOFError
    data = file.read(LENGTH.unpack(head)[0])
    return pickle.loads(data)
