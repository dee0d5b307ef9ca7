"""Bytes of a folder elsewhere: by range or by file, with timeouts, tried again after a pause when the network fails."""

from __future__ import annotations

import os
import random
import re
import threading
from collections.abc import Callable
from typing import Any, BinaryIO, Final, TypeVar

from shards.errors import UserError

T = TypeVar("T")

# A request may take `timeout_s` and, beside that, what its bytes take at this rate.
_SLOWEST_BYTES_PER_S: Final = 1e6
_PIECE_BYTES: Final = 16 << 20
_FIRST_PAUSE_S: Final = 0.25
_LONGEST_PAUSE_S: Final = 10.0
# What libraries raise for a network that fails, where it is no OSError; other exceptions are mistakes and end here.
_OF_THE_NETWORK: Final = frozenset({"aiohttp", "aiobotocore", "botocore", "gcsfs", "google", "requests", "urllib3"})
# Of HTTP's errors of the client, those that pass: timeout, too early, too many requests.
_PASSING: Final = (408, 425, 429)
_UNREACHED: Final = "see that the address is right and can be reached from here, then start the same command again"
_EXTRA: Final = "pip install 'msmil[remote]' (s3fs for s3://, gcsfs for gs://, aiohttp for http)"


class ShortError(OSError):
    """Fewer bytes came than were asked for."""


class Store:
    """Files below an address. Threads may share it; in a forked process it connects anew.

    Args:
        url: the folder, without credentials.
        timeout_s: how long a request may stall.
        retries: how often it is made again.
    """

    def __init__(self, url: str, *, timeout_s: float, retries: int) -> None:
        self.url = url.rstrip("/")
        self.is_http = url.startswith(("http://", "https://"))
        self._timeout_s = timeout_s
        self._retries = retries
        self._stop = threading.Event()
        self._random = random.Random()
        self._connected: tuple[int, Any] | None = None

    def stop(self) -> None:
        """Let no request be made again from now on, and none wait for that."""
        self._stop.set()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """The bytes [start, stop) of a file, all of it without `stop`.

        Raises:
            UserError: it is not there, may not be read, or did not come in spite of all attempts.
        """

        def ask() -> bytes:
            if stop is None:
                return self._cat(name)
            data = self._cat(name, start, stop)
            if len(data) >= stop and start > 0:
                return data[start:stop]  # the whole file came
            if len(data) < stop - start:
                raise ShortError(f"{len(data)} of {stop - start} bytes came")
            return data[: stop - start]

        return self._tried(name, ask)

    def serves_ranges(self, name: str, content: bytes) -> bool:
        """Whether the server answers a request for a part of a small file, of known content, with that part.

        Raises:
            UserError: it cannot be reached.
        """
        if not self.is_http:
            return True

        def ask() -> bool:
            try:
                return self._cat(name, 1, 2) == content[1:2]
            except Exception as error:
                if _status(error) in (None, *_PASSING) or (_status(error) >= 500 and _status(error) != 501):
                    raise
                return False

        return self._tried(name, ask)

    def download(self, name: str, file: BinaryIO, num_bytes: int, *, ranges: bool) -> None:
        """Write a whole file of `num_bytes` into an open one, from its start: in pieces, where `ranges` are served.

        Raises:
            UserError: as `read`.
        """

        def ask() -> None:
            assert self.is_http, "all other stores serve ranges"
            file.seek(0)
            self._system().get_file(self._path(name), file, **self._timeout(num_bytes))
            if file.tell() != num_bytes:
                raise ShortError(f"{file.tell()} of {num_bytes} bytes came")

        if not ranges:
            self._tried(name, ask)
            return
        file.seek(0)
        for start in range(0, num_bytes, _PIECE_BYTES):
            file.write(self.read(name, start, min(start + _PIECE_BYTES, num_bytes)))

    def info(self, name: str) -> dict[str, Any]:
        """Size of a file ("size", None where unknown) and what else tells its versions apart.

        Raises:
            UserError: as `read`.
        """

        def ask() -> dict[str, Any]:
            try:
                found: dict[str, Any] = self._system().info(self._path(name), **self._timeout(0))
            except FileNotFoundError as error:
                # of a web server, fsspec calls every failure so
                if self.is_http and error.__cause__ is not None and _status(error.__cause__) != 404:
                    raise ShortError(f"{error.__cause__}") from error
                raise
            return found

        return self._tried(name, ask)

    def sizes(self) -> dict[str, int] | None:
        """Names and sizes of the files of the folder; None from a web server, which cannot list them.

        Raises:
            UserError: as `read`.
        """
        if self.is_http:
            return None
        found = self._tried("", lambda: self._system().ls(self._path(""), detail=True, refresh=True))
        return {entry["name"].rpartition("/")[2]: int(entry["size"]) for entry in found if entry["type"] == "file"}

    def _cat(self, name: str, start: int | None = None, stop: int | None = None) -> bytes:
        timeout = self._timeout(0 if stop is None or start is None else stop - start)
        data: bytes = self._system().cat_file(self._path(name), start=start, end=stop, **timeout)
        return data

    def _timeout(self, num_bytes: int) -> dict[str, float]:
        from fsspec.asyn import AsyncFileSystem

        if not isinstance(self._system(), AsyncFileSystem):
            return {}  # it blocks in its own client, which has its own timeout
        return {"timeout": self._timeout_s + num_bytes / _SLOWEST_BYTES_PER_S}

    def _path(self, name: str) -> str:
        return f"{self.url}/{name}" if name else self.url

    def _system(self) -> Any:
        """The fsspec file system, of this process: after a fork its thread is gone."""
        if self._connected is None or self._connected[0] != os.getpid():
            self._connected = (os.getpid(), self._connect())
        return self._connected[1]

    def _connect(self) -> Any:
        import fsspec

        options: dict[str, Any] = {"use_listings_cache": False}
        if self.is_http:
            # trust_env: proxies and ~/.netrc; nothing is compressed on the way, ranges count stored bytes
            options["client_kwargs"] = {"trust_env": True, "headers": {"Accept-Encoding": "identity"}}
        try:
            system, _ = fsspec.url_to_fs(self.url, **options)
        except ImportError as error:
            raise UserError(f"cannot be read: {error}", fix=_EXTRA, file=self.url) from error
        except ValueError as error:
            fix = "give a folder, or an address of a kind that fsspec knows (http, https, s3, gs, ...)"
            raise UserError(f"cannot be read: {error}", fix=fix, file=self.url) from error
        return system

    def _tried(self, name: str, ask: Callable[[], T]) -> T:
        """What `ask` returns, which is called again after growing, random pauses while the network fails."""
        attempt = 0
        while True:
            attempt += 1
            try:
                return ask()
            except FileNotFoundError as error:
                raise UserError("missing", fix="see that the address is right", file=self._path(name)) from error
            except PermissionError as error:
                thing = f"may not be read ({_without_secrets(str(error))})"
                fix = "see to the credentials in the environment, and to the rights that they give"
                raise UserError(thing, fix=fix, file=self._path(name)) from error
            except Exception as error:
                if not _is_of_the_network(error):
                    raise
                if not _passes(error) or attempt > self._retries or self._stop.is_set():
                    thing = f"cannot be read: {_words(error)} ({attempt} attempts)"
                    raise UserError(thing, fix=_UNREACHED, file=self._path(name)) from error
            pause_s = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** (attempt - 1)) * self._random.uniform(0.5, 1.5)
            self._stop.wait(pause_s)


def _is_of_the_network(error: BaseException) -> bool:
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _OF_THE_NETWORK


def _status(error: BaseException) -> Any:
    """The status code of an HTTP error, None of another."""
    return getattr(error, "status", None)


def _passes(error: BaseException) -> bool:
    status = _status(error)
    return not (isinstance(status, int) and 400 <= status < 500 and status not in _PASSING)


def _words(error: BaseException) -> str:
    kind = type(error).__name__
    if "Timeout" in kind:
        return "no answer in time"
    return _without_secrets(str(error)) or kind


def _without_secrets(text: str) -> str:
    """A server may have sent us on to an address that holds a signature; it is of no use in a log."""
    return re.sub(r"(\w+://)(?:[^/\s@]*@)?([^\s?'\"]*)(?:\?[^\s'\"]*)?", r"\1\2", text)
