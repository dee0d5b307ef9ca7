"""Bytes from a web server that drops connections, stalls, and refuses."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from shards.errors import UserError
from shards.remote.store import Store, _without_secrets
from tests.servers import FileServer, serving

NAME = "shard-000000.tar"


@pytest.fixture
def server(packed: Path) -> Iterator[FileServer]:
    with serving(packed) as server:
        yield server


@pytest.fixture
def store(server: FileServer) -> Store:
    return Store(server.url, timeout_s=0.3, retries=3)


@pytest.fixture
def whole(packed: Path) -> bytes:
    return (packed / NAME).read_bytes()


def test_a_part_of_a_file_is_all_that_is_sent(store: Store, server: FileServer, whole: bytes) -> None:
    assert store.read(NAME, 1000, 1500) == whole[1000:1500]
    assert server.num_bytes() == 500
    assert store.read(NAME) == whole


@pytest.mark.parametrize("fault", ["drop", "stall", "busy", "short"])
def test_what_fails_is_tried_again(store: Store, server: FileServer, whole: bytes, fault) -> None:
    server.faults.extend([fault, fault])
    assert store.read(NAME, 1000, 1500) == whole[1000:1500]
    assert [sent.fault for sent in server.gets()] == [fault, fault, None]
    for ranges in (True, False):
        server.faults.append(fault)
        file = io.BytesIO()
        store.download(NAME, file, len(whole), ranges=ranges)
        assert file.getvalue() == whole


def test_pauses_grow(store: Store, server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(store._stop, "wait", pauses.append)
    server.always = "busy"
    with pytest.raises(UserError):
        store.read(NAME, 0, 10)
    assert [round(pause / 2**i / 0.25, 3) for i, pause in enumerate(pauses)] == [
        pytest.approx(1.0, abs=0.5) for _ in range(3)
    ]


@pytest.mark.parametrize(("fault", "words"), [("stall", "no answer in time"), ("busy", "503")])
def test_what_fails_every_time_is_told(store: Store, server: FileServer, fault, words: str) -> None:
    store._retries, server.always = 1, fault
    with pytest.raises(UserError, match=rf"{words}.*\(2 attempts\)") as caught:
        store.read(NAME, 0, 10)
    assert caught.value.file == f"{server.url}/{NAME}"
    assert "can be reached" in caught.value.fix
    assert len(server.gets()) == 2


def test_what_is_forbidden_is_asked_for_once(store: Store, server: FileServer) -> None:
    server.always = "forbidden"
    with pytest.raises(UserError, match="403"):
        store.read(NAME, 0, 10)
    assert len(server.gets()) == 1


def test_what_a_server_sends_us_on_to_may_hold_a_signature() -> None:
    said = "403, message='Forbidden', url='https://me:secret@host/a.tar?X-Amz-Signature=secret'"
    assert _without_secrets(said) == "403, message='Forbidden', url='https://host/a.tar'"


def test_what_is_not_there_is_asked_for_once(store: Store) -> None:
    with pytest.raises(UserError, match="missing"):
        store.read("shard-000099.tar", 0, 10)
    with pytest.raises(UserError, match="missing"):
        store.info("shard-000099.tar")


def test_nobody_there(packed: Path) -> None:
    with serving(packed) as server:
        url = server.url
    with pytest.raises(UserError, match=r"cannot be read: .*2 attempts"):
        Store(url, timeout_s=1, retries=1).read(NAME)


@pytest.mark.parametrize(("mode", "serves"), [("ranges", True), ("ignores", False), ("refuses", False)])
def test_a_server_is_asked_whether_it_serves_ranges(
    store: Store, server: FileServer, packed: Path, mode: str, serves: bool
) -> None:
    server.mode = mode
    content = (packed / "manifest.json").read_bytes()
    assert store.serves_ranges("manifest.json", content) is serves
    assert not server.gets(".tar")


def test_a_driver_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gcsfs", None)
    with pytest.raises(UserError, match="gs://") as caught:
        Store("gs://bucket/data", timeout_s=1, retries=0).read("manifest.json")
    assert "msmil[remote]" in caught.value.fix


def test_an_address_of_no_known_kind() -> None:
    with pytest.raises(UserError, match="nonsense"):
        Store("nonsense://bucket/data", timeout_s=1, retries=0).read("manifest.json")
