"""Decoding in processes of their own: a picture that ends its process costs that picture only.

A worker gets some pictures at a time, and answers one by one. `Workers.results` returns the answers
in the order of the pictures, whichever process is faster, and holds a bounded number of them: a
worker that is far ahead waits until somebody reads what it has written.
"""

from __future__ import annotations

import pickle
import select
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

from snipdedup.errors import SnipError
from snipdedup.pictures.items import Item
from snipdedup.pictures.reading import LENGTH, Failure, ReadSettings, Result, Row

ITEMS = 8  # sent to a worker at a time
TRIES = 2  # processes that a picture may end
PATIENCE_S = 900  # for one picture
START_S = 300  # for a process to begin, on a busy machine
HELD_BYTES = 1 << 28  # of results that are ahead of their turn
PACKAGE = str(Path(__file__).parents[2])  # the folder that this package lies in
START = "import sys; sys.path[:] = {path!r}; from snipdedup.pictures.reading import main; main()"


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
        self.questions = cast(IO[bytes], self.process.stdin)
        self.answers = cast(Any, self.process.stdout)  # unbuffered, which its type does not say
        self.poll = None
        if hasattr(select, "poll"):  # not on Windows
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
        timer = threading.Timer(patience, self.process.kill)  # the read then ends
        if self.poll is None:
            timer.start()
        try:
            while got < size:
                if self.poll is not None and not self.poll.poll(patience * 1000):
                    self.kill()
                    raise Died(f"nothing came for {patience:,} s")
                count = self.answers.readinto(view[got:])
                if not count:
                    raise Died(self.end())
                got += count
        finally:
            timer.cancel()
        return data

    def end(self) -> str:
        """Say how the process ended."""
        code = self.process.wait()
        self.kill()
        if code >= 0:
            return f"exit status {code}"
        name = signal.Signals(-code).name
        return f"{name}, perhaps for want of memory" if name == "SIGKILL" else name

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

    def __init__(self, settings: ReadSettings, count: int) -> None:
        self.settings = pickle.dumps(settings, protocol=5)
        self.processes: list[Worker | None] = [None] * count

    def results(self, items: Iterable[Item]) -> Generator[Result, None, None]:
        """Yield the rows and failures of items, in their order.

        Who stops early ends all processes: they would answer what nobody asks any more.
        """
        board = Board(items)
        board.threads = len(self.processes)
        threads = [
            threading.Thread(target=self.work, args=(place, board), daemon=True)
            for place in range(len(self.processes))
        ]
        for thread in threads:
            thread.start()
        is_whole = False
        try:
            while (result := board.take()) is not None:
                yield result
            is_whole = True
        finally:
            with board.changed:
                board.stopped = True
                board.changed.notify_all()
            for worker in () if is_whole else filter(None, self.processes):
                worker.process.kill()  # a thread may wait for its answer
            for thread in threads:
                thread.join()
            if not is_whole:
                self.close()

    def work(self, place: int, board: Board) -> None:
        """Let one process do items until there are none; in a thread."""
        error: BaseException | None = None
        try:
            self.do(place, board)
        except BaseException as raised:
            error = raised
        board.leave(error)

    def do(self, place: int, board: Board) -> None:
        """Let one process do items; one that ends `TRIES` processes is a failure.

        It has the next items already when it comes to the end of some.
        """
        todo: deque[tuple[int, Item]] = deque()  # without a last answer
        given = tries = 0  # of the first of them: results that are there, processes that it ended
        while not board.stopped:
            some = board.some() if len(todo) <= ITEMS else []
            todo += some
            if not todo:
                return
            try:
                worker = self.processes[place]
                if worker is None:
                    worker = self.processes[place] = Worker(self.settings)
                    some = list(todo)
                if some:
                    skipped = given if len(some) == len(todo) else 0
                    worker.ask([(item, 0 if n else skipped) for n, (_, item) in enumerate(some)])
                result = worker.answer(PATIENCE_S)
            except Died as died:
                self.processes[place] = None
                tries += 1
                if tries < TRIES:
                    continue
                number, item = todo.popleft()
                board.put(number, Failure(item.source, item.key, f"ended the decoder: {died}"))
                board.end(number)
                given = tries = 0
                continue
            if result is None:
                board.end(todo.popleft()[0])
                given = tries = 0
            else:
                board.put(todo[0][0], result)
                given += 1

    def close(self) -> None:
        """End all processes."""
        for worker in filter(None, self.processes):
            worker.kill()
        self.processes = [None] * len(self.processes)
