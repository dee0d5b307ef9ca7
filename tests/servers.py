"""A web server of a folder on the loopback interface, which counts what it sends and misbehaves when told to."""

from __future__ import annotations

import re
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar, Literal

Fault = Literal["drop", "stall", "flip", "busy", "forbidden", "short"]
MODES = ("ranges", "ignores", "refuses")  # what it does with a request for a part of a file


@dataclass(frozen=True)
class Sent:
    """A request that was answered: method, file, first byte, bytes; when, and what was done wrong."""

    method: str
    name: str
    start: int
    num_bytes: int
    time_s: float
    fault: Fault | None = None


class FileServer:
    """Serves a folder; faults are for its tars, the next ones in turn, and `always` for all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sent: list[Sent] = []
        self.faults: deque[Fault] = deque()
        self.always: Fault | None = None
        self.mode = "ranges"
        self.delay_s = 0.0
        self.released = threading.Event()  # ends stalls
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"files": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/data"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def gets(self, suffix: str = ".tar") -> list[Sent]:
        """Files, or parts of files, that were sent."""
        return [sent for sent in self.sent if sent.method == "GET" and sent.name.endswith(suffix)]

    def num_bytes(self, suffix: str = ".tar") -> int:
        return sum(sent.num_bytes for sent in self.gets(suffix))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: ClassVar[FileServer]

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        files, name = self.files, self.path.removeprefix("/data/")
        path = files.folder / name
        if not path.is_file():
            self._status(404)
            return
        data, start, status = path.read_bytes(), 0, 200
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and files.mode == "refuses":
            self._status(501)
            return
        size = len(data)
        if asked and files.mode == "ranges":
            start, status = int(asked[1]), 206
            data = data[start : int(asked[2]) + 1 if asked[2] else None]
        fault = None
        with files.lock:
            if body and name.endswith(".tar"):
                fault = files.faults.popleft() if files.faults else files.always
            files.sent.append(Sent(self.command, name, start, len(data) if body else 0, time.monotonic(), fault))
        if files.delay_s and body:
            time.sleep(files.delay_s)
        if fault in ("busy", "forbidden"):
            self._status(503 if fault == "busy" else 403)
            return
        if fault == "flip":
            data = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
        if fault == "short":
            data = data[: len(data) // 2]
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Last-Modified", self.date_time_string(int(path.stat().st_mtime)))
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{size}")
        self.end_headers()
        if not body:
            return
        half = len(data) // 2 if fault in ("drop", "stall") else len(data)
        self.wfile.write(data[:half])
        self.wfile.flush()
        if fault == "drop":
            self.close_connection = True
        if fault == "stall":
            files.released.wait(60)
            self.close_connection = True

    def _status(self, code: int) -> None:
        self.send_response(code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def serving(folder: Path) -> Iterator[FileServer]:
    server = FileServer(folder)
    try:
        yield server
    finally:
        server.close()
