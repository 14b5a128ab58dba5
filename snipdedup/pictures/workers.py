"""Decoding in processes of their own: a picture that ends its process costs that picture only.

A worker gets some pictures at a time, and answers one by one. `Workers.results` returns the answers
in the order of the pictures, whichever process is faster, and holds a bounded number of them: a
worker that is far ahead waits until somebody reads what it has written.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import select
import signal
import struct
import subprocess
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from snipdedup.errors import SnipError
from snipdedup.pictures.items import FILE_BYTES, VIDEOS, Item, Text, read_texts, suffix_of

ITEMS = 8  # sent to a worker at a time
TRIES = 2  # processes that a picture may end
PATIENCE_S = 900  # for one picture
START_S = 300  # for a process to begin, on a busy machine
HELD_BYTES = 1 << 28  # of results that are ahead of their turn
LENGTH = struct.Struct("<Q")
PACKAGE = str(Path(__file__).parents[2])  # the folder that this package lies in
START = "import sys; sys.path[:] = {path!r}; from snipdedup.pictures.workers import main; main()"


class Settings(NamedTuple):
    """What a worker does with each picture."""

    prepare: Callable[[Any], np.ndarray]  # of a model
    least: int  # pixels of the shorter side that it needs
    most_pixels: int
    every: float | None  # seconds between frames of a video


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


# ---- in a worker


def main() -> None:
    """Answer what comes on stdin until it ends."""
    from PIL import Image

    from snipdedup.pictures.decode import register_plugins

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process above ends this one
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    Image.MAX_IMAGE_PIXELS = None  # `decode` has its own bound
    register_plugins()
    try:
        settings = receive(sys.stdin.buffer)
    except Exception as error:
        send(answers, f"{type(error).__name__}: {error}")
        return
    with suppress(BrokenPipeError, EOFError):
        send(answers, None)  # it has begun
        while True:
            for item, given in receive(sys.stdin.buffer):
                for result in islice(read_item(item, settings), given, None):
                    send(answers, result)
                send(answers, None)


def read_item(item: Item, settings: Settings) -> Iterator[Result]:
    """Yield the row of a picture, or those of the frames of a video; or why there is none."""
    from snipdedup.pictures.decode import Unreadable

    try:
        if item.refused:
            raise Unreadable(item.refused)
        if item.path is not None and item.data is None and suffix_of(item.path.name) in VIDEOS:
            yield from read_video(item, settings)
        else:
            yield read_picture(item, settings)
    except Unreadable as error:
        yield Failure(item.source, item.key, str(error))
    except Exception as error:
        yield Failure(item.source, item.key, f"fault: {type(error).__name__}: {error}")


def read_picture(item: Item, settings: Settings) -> Row:
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


def read_video(item: Item, settings: Settings) -> Iterator[Result]:
    """Yield frames of a video."""
    from snipdedup.pictures.decode import Unreadable

    del settings
    raise Unreadable("a video")


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


# ---- in the process above


class Died(Exception):  # noqa: N818
    """A worker has ended by itself; how."""


class Worker:
    """A process that decodes."""

    def __init__(self, settings: bytes) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", START.format(path=[PACKAGE, *sys.path])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # C libraries print what is wrong with pictures
            bufsize=0,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.questions, self.answers = self.process.stdin, self.process.stdout
        self.poll = select.poll()
        self.poll.register(self.answers, select.POLLIN)
        try:
            write_all(self.questions, LENGTH.pack(len(settings)) + settings)
            fault = self.answer(START_S)
        except (OSError, Died) as error:
            fault = str(error)
        if fault is not None:
            self.kill()
            raise SnipError(f"a process that decodes pictures cannot start: {fault}")

    def ask(self, items: list[tuple[Item, int]]) -> None:
        """Send items, and how many results of each are there already."""
        data = pickle.dumps(items, protocol=5)
        try:
            write_all(self.questions, LENGTH.pack(len(data)) + data)
        except OSError:
            raise Died(self.end()) from None

    def answer(self, patience: float) -> Any:
        """Return the next answer; raise `Died` where none comes in so many seconds."""
        size = LENGTH.unpack(self.read(LENGTH.size, patience))[0]
        return pickle.loads(self.read(size, patience))

    def read(self, size: int, patience: float) -> bytearray:
        """Return the next bytes of the answers."""
        data = bytearray(size)
        view, got = memoryview(data), 0
        while got < size:
            if not self.poll.poll(patience * 1000):
                self.kill()
                raise Died(f"nothing came for {patience:,} s")
            count = self.answers.readinto(view[got:])  # type: ignore[attr-defined]
            if not count:
                raise Died(self.end())
            got += count
        return data

    def end(self) -> str:
        """Say how the process ended."""
        code = self.process.wait()
        self.kill()
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"

    def kill(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self.questions.close()
        self.answers.close()


def write_all(file: IO[bytes], data: bytes) -> None:
    """Write bytes to a pipe."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


class Board:
    """Results by number of their items, which threads put there and one reader takes in order."""

    def __init__(self, items: Iterable[Item]) -> None:
        self.items, self.feeding = enumerate(items), threading.Lock()
        self.changed = threading.Condition()
        self.waiting: dict[int, deque[Result]] = {}
        self.ended: set[int] = set()
        self.head = self.held = 0  # the item that is read now; bytes that wait
        self.threads = 0  # that still add results
        self.error: BaseException | None = None
        self.stopped = False

    def some(self) -> list[tuple[int, Item]]:
        """Return the next items, none at the end."""
        with self.feeding:
            return [] if self.stopped else list(islice(self.items, ITEMS))

    def put(self, number: int, result: Result) -> None:
        """Add a result; wait where too much lies there already, unless it is read next."""
        size = result.prepared.nbytes if isinstance(result, Row) else 0
        with self.changed:
            while number != self.head and self.held > HELD_BYTES and not self.stopped:
                self.changed.wait()
            self.waiting.setdefault(number, deque()).append(result)
            self.held += size
            self.changed.notify_all()

    def end(self, number: int) -> None:
        """Note that all results of an item are there."""
        with self.changed:
            self.ended.add(number)
            self.changed.notify_all()

    def leave(self, error: BaseException | None) -> None:
        """Note that a thread adds no more."""
        with self.changed:
            self.threads -= 1
            self.error = self.error or error
            self.changed.notify_all()

    def take(self) -> Result | None:
        """Return the next result, None after the last."""
        with self.changed:
            while True:
                if self.error is not None:
                    raise self.error
                if self.waiting.get(self.head):
                    result = self.waiting[self.head].popleft()
                    self.held -= result.prepared.nbytes if isinstance(result, Row) else 0
                    self.changed.notify_all()
                    return result
                if self.head in self.ended:
                    self.ended.remove(self.head)
                    self.waiting.pop(self.head, None)
                    self.head += 1
                    self.changed.notify_all()
                elif not self.threads:
                    return None
                else:
                    self.changed.wait()


class Workers:
    """Processes that decode, started when they are needed."""

    def __init__(self, settings: Settings, count: int) -> None:
        self.settings = pickle.dumps(settings, protocol=5)
        self.processes: list[Worker | None] = [None] * count

    def results(self, items: Iterable[Item]) -> Iterator[Result]:
        """Yield the rows and failures of items, in their order."""
        board = Board(items)
        board.threads = len(self.processes)
        threads = [
            threading.Thread(target=self.work, args=(place, board), daemon=True)
            for place in range(len(self.processes))
        ]
        for thread in threads:
            thread.start()
        try:
            while (result := board.take()) is not None:
                yield result
        finally:
            with board.changed:
                board.stopped = True
                board.changed.notify_all()
            if board.threads:  # stopped early: threads may wait for answers
                for worker in filter(None, self.processes):
                    worker.process.kill()
            for thread in threads:
                thread.join()

    def work(self, place: int, board: Board) -> None:
        """Let one process do items until there are none; in a thread."""
        error: BaseException | None = None
        try:
            while some := board.some():
                self.do(place, deque(some), board)
        except BaseException as raised:
            error = raised
        board.leave(error)

    def do(self, place: int, todo: deque[tuple[int, Item]], board: Board) -> None:
        """Do some items; one that ends `TRIES` processes is a failure."""
        given = tries = 0  # of the first item: results that are there, processes that it ended
        while todo and not board.stopped:
            try:
                worker = self.processes[place] = self.processes[place] or Worker(self.settings)
                worker.ask([(item, 0 if n else given) for n, (_, item) in enumerate(todo)])
                while todo:
                    result = worker.answer(PATIENCE_S)
                    if result is None:
                        board.end(todo.popleft()[0])
                        given = tries = 0
                    else:
                        board.put(todo[0][0], result)
                        given += 1
            except Died as died:
                self.processes[place] = None
                tries += 1
                if tries == TRIES:
                    number, item = todo.popleft()
                    board.put(number, Failure(item.source, item.key, f"ended the decoder: {died}"))
                    board.end(number)
                    given = tries = 0

    def close(self) -> None:
        """End all processes."""
        for worker in filter(None, self.processes):
            worker.kill()
        self.processes = [None] * len(self.processes)
