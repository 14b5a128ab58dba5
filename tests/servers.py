"""Servers for tests: files with ranges, ETags, redirects and faults; a stand-in for the hub."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path
from urllib.parse import unquote, urlsplit

PAGE = 3  # entries of a listing that come at a time


class Server(http.server.ThreadingHTTPServer):
    """Serves ``files`` (name: bytes).

    ``faults`` (by name) is one fault or a list, one for each request: a status, a dict of headers
    with it, or the name of a method of `Handler` that begins with ``fault_``. ``ranges`` and
    ``etags`` switch those off; ``pause`` is a wait after each piece; ``asked`` holds every request.
    """

    daemon_threads = True

    def __init__(self, handler=None):
        super().__init__(("127.0.0.1", 0), handler or Handler)
        self.files, self.faults, self.asked = {}, {}, []
        self.ranges, self.etags, self.pause = True, True, 0.0
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}).start()

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.shutdown()
        self.server_close()

    def spans(self, name):
        """The Range headers of the requests for a file."""
        return [headers.get("Range") for path, headers in self.asked if path == name]

    def names(self):
        return [name for name, _ in self.asked]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError):  # the client was killed
            super().handle()

    def do_GET(self):
        name = unquote(urlsplit(self.path).path.lstrip("/"))
        self.server.asked.append((name, {k.title(): v for k, v in self.headers.items()}))
        fault = self.server.faults.get(name)
        if isinstance(fault, list):
            fault = fault.pop(0) if fault else None
        self.close_connection = True
        if isinstance(fault, str):
            getattr(self, "fault_" + fault)(name)
        elif fault is not None:
            status, headers = fault if isinstance(fault, tuple) else (fault, {})
            self.answer(status, b"", **headers)
        else:
            self.serve(name)

    def serve(self, name):
        body = self.server.files.get(name.removeprefix("real/"))
        if body is None:
            self.answer(404, b"")
        else:
            self.send_file(body)

    def answer(self, status, body, **headers):
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header.replace("_", "-"), value)
        if "Content_Length" not in headers and "No_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        for begin in range(0, len(body), 1 << 14):
            self.wfile.write(body[begin : begin + (1 << 14)])
            self.wfile.flush()
            time.sleep(self.server.pause)

    def etag(self, body):
        return f'"{hashlib.md5(body).hexdigest()}"'

    def send_file(self, body, sent=None, **headers):
        """Send a file, or the range that is asked for; of the body only ``sent`` bytes."""
        span, condition = self.headers.get("Range"), self.headers.get("If-Range")
        if self.server.etags:
            headers["ETag"] = self.etag(body)
        status, total = 200, len(body)
        if span and self.server.ranges and condition in (None, self.etag(body)):
            first, last = re.fullmatch(r"bytes=(\d*)-(\d*)", span).groups()
            begin = int(first) if first else max(total - int(last), 0)
            if begin >= total:
                self.answer(416, b"", Content_Range=f"bytes */{total}")
                return
            end = min(int(last) + 1, total) if first and last else total
            body = body[begin:end]
            status, headers["Content_Range"] = 206, f"bytes {begin}-{end - 1}/{total}"
        headers.setdefault("Content_Length", str(len(body)))
        self.answer(status, body if sent is None else body[: int(sent * len(body))], **headers)

    def body(self, name):
        return self.server.files[name.removeprefix("real/")]

    def fault_moved(self, name):
        self.answer(302, b"", Location=f"/real/{name}")

    def fault_loop(self, name):
        self.answer(302, b"", Location=f"/{name}")

    def fault_nowhere(self, name):
        self.answer(301, b"")

    def fault_to_a_file(self, name):
        self.answer(302, b"", Location="file:///etc/hostname")

    def fault_cut(self, name):
        self.send_file(self.body(name), sent=0.5)

    def fault_no_length(self, name):
        body = self.body(name)
        self.answer(200, body[: len(body) // 2], No_Length="1")

    def fault_short(self, name):
        """Announce, and send, half of the file as if it were all."""
        body = self.body(name)
        self.answer(200, body[: len(body) // 2])

    def fault_damage(self, name):
        body = bytearray(self.body(name))
        body[len(body) // 3] ^= 1
        self.send_file(bytes(body))

    def fault_deaf(self, name):
        """Send the range of another version, whatever If-Range says."""
        begin = int(self.headers["Range"][6:-1])
        body = self.body(name)
        part = body[begin:]
        total = f"bytes {begin}-{len(body) - 1}/{len(body)}"
        self.answer(206, part, Content_Range=total, ETag='"another"')


class Hub(Server):
    """A stand-in for the hub's API: one dataset, its files on a server of their own.

    ``tree`` holds the files by path; ``small`` names those that git holds itself; ``revisions``
    the commit of each revision; ``state`` is None, ``gated``, ``gated files``, ``disabled``,
    ``missing`` or ``moved``.
    """

    repo = "someone/pictures"

    def __init__(self, store):
        super().__init__(HubHandler)
        self.store, self.tree, self.small, self.state = store, {}, set(), None
        self.revisions, self.token, self.history = {"main": "a" * 40}, None, {}

    def push(self, commit, tree):
        """Make a commit the newest one; earlier ones keep their files."""
        self.history[self.revisions["main"]] = dict(self.tree)
        self.tree = dict(tree)
        self.revisions["main"] = commit

    def files_at(self, commit):
        return self.tree if commit == self.revisions["main"] else self.history.get(commit)


class HubHandler(Handler):
    def serve(self, name):
        hub = self.server
        api, resolve = f"api/datasets/{hub.repo}", f"datasets/{hub.repo}/resolve/"
        if not name.startswith((api, resolve)):
            self.answer(404, b"", X_Error_Code="RepoNotFound")
        elif hub.state == "gated files" and name.startswith(resolve):
            self.refuse("gated")
        elif hub.state not in (None, "gated files") and not (
            hub.state == "gated" and self.is_let_in()
        ):
            self.refuse(hub.state)
        elif name.startswith(resolve):
            self.resolve(*name.removeprefix(resolve).split("/", 1))
        elif name.startswith(api + "/tree/"):
            self.list_tree(name.removeprefix(api + "/tree/"))
        else:
            self.info(name.removeprefix(api).removeprefix("/revision/"))

    def is_let_in(self):
        return self.headers.get("Authorization") == f"Bearer {self.server.token}"

    def refuse(self, state):
        status, headers = {
            "gated": (403, {"X_Error_Code": "GatedRepo", "X_Error_Message": "restricted"}),
            "disabled": (403, {"X_Error_Message": "Access to this resource is disabled."}),
            "missing": (401, {"X_Error_Code": "RepoNotFound"}),
            "moved": (200, {}),
        }[state]
        body = json.dumps({"id": "someone/else", "sha": "b" * 40}).encode()
        self.answer(status, body if status == 200 else b"", **headers)

    def info(self, revision):
        commits = {**self.server.revisions, **{c: c for c in self.server.history}}
        commits[self.server.revisions["main"]] = self.server.revisions["main"]
        commit = commits.get(unquote(revision) or "main")
        if commit is None:
            self.answer(404, b"", X_Error_Code="RevisionNotFound")
        else:
            self.send_json({"id": self.server.repo, "sha": commit})

    def list_tree(self, rest):
        commit, _, folder = rest.partition("/")
        tree = self.server.files_at(commit)
        prefix = folder + "/" if folder else ""
        inside = {
            p.removeprefix(prefix): b for p, b in (tree or {}).items() if p.startswith(prefix)
        }
        if not inside:
            self.answer(404, b"", X_Error_Code="EntryNotFound")
            return
        names = sorted({path.split("/")[0] for path in inside})
        begin = int((re.search(r"cursor=(\d+)", self.path) or [0, 0])[1])
        entries = [self.entry(prefix + n, inside.get(n)) for n in names[begin : begin + PAGE]]
        link = {}
        if begin + PAGE < len(names):
            place = f"{self.server.url}{urlsplit(self.path).path}?cursor={begin + PAGE}"
            link["Link"] = f'<{place}>; rel="next"'
        self.send_json(entries, **link)

    def entry(self, path, body):
        if body is None:
            return {"type": "directory", "path": path, "oid": "0" * 40}
        blob = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        entry = {"type": "file", "path": path, "size": len(body), "oid": blob}
        if path not in self.server.small:
            sha = hashlib.sha256(body).hexdigest()
            entry["lfs"] = {"oid": sha, "size": len(body), "pointerSize": 130}
        return entry

    def resolve(self, commit, path):
        tree = self.server.files_at(commit)
        if tree is None or path not in tree:
            self.answer(404, b"", X_Error_Code="EntryNotFound")
            return
        self.server.store.files[f"{commit}/{path}"] = tree[path]
        place = f"{self.server.store.url}/{commit}/{path}?signature=hush"
        self.answer(302, b"", Location=place)

    def send_json(self, value, **headers):
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json", **headers)


def kill_once_more_came(words, folder, more):
    """Start a command; kill it once ``more`` bytes than now have come."""

    def came():
        total = 0
        for parent, _, names in os.walk(folder):  # rglob minds a folder that goes meanwhile
            for name in names:
                if name.endswith((".part", ".parquet")):
                    with contextlib.suppress(FileNotFoundError):
                        total += Path(parent, name).stat().st_size
        return total

    before, limit = came(), time.monotonic() + 60
    with subprocess.Popen(words, stderr=subprocess.DEVNULL) as running:
        while came() <= before + more:
            assert running.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.002)
        running.send_signal(signal.SIGKILL)
