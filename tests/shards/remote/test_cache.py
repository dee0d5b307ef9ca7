"""The cache of a machine: nothing is fetched twice, and it never holds more than its bound."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import threading
from pathlib import Path

import pytest

from shards.cache import PART, Cache, Claim

SIZE = 1000


def content(i: int) -> bytes:
    return bytes([i]) * SIZE


def digest(i: int) -> bytes:
    return hashlib.sha256(content(i)).digest()


def claimed(cache: Cache, i: int) -> Claim:
    claim = cache.claim(digest(i), SIZE, wait=False)
    assert claim is not None
    return claim


def put(cache: Cache, i: int) -> None:
    with claimed(cache, i) as claim:
        assert cache.reserve([claim])
        claim.put(content(i))


def there(cache: Cache, count: int) -> list[int]:
    return [i for i in range(count) if cache.has(digest(i))]


def bytes_on_disk(cache: Cache) -> int:
    return sum(path.stat().st_size for path in cache.folder.rglob("objects/*/*"))


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache", 10 * SIZE)


class TestObjects:
    def test_come_back_whole_and_in_part(self, cache: Cache) -> None:
        put(cache, 1)
        assert cache.get(digest(1)) == content(1)
        assert cache.get(digest(1), 10, 20) == content(1)[:20]
        assert cache.get(digest(2)) is None

    def test_appear_only_when_they_are_whole(self, cache: Cache) -> None:
        with claimed(cache, 1) as claim:
            assert cache.reserve([claim])
            os.pwrite(claim.descriptor, b"half", 0)
            assert cache.get(digest(1)) is None
        assert cache.get(digest(1)) is None
        assert bytes_on_disk(cache) == cache.held_bytes() == 0

    def test_are_private_to_the_user(self, cache: Cache) -> None:
        put(cache, 1)
        assert cache.path(digest(1)).stat().st_mode & 0o077 == 0


class TestClaims:
    def test_one_holds_an_object_at_a_time(self, cache: Cache) -> None:
        with claimed(cache, 1):
            assert cache.claim(digest(1), SIZE, wait=False) is None
        with claimed(cache, 1):
            pass

    def test_what_is_there_cannot_be_claimed(self, cache: Cache) -> None:
        put(cache, 1)
        assert cache.claim(digest(1), SIZE, wait=True) is None

    def test_who_waits_finds_what_the_other_has_fetched(self, cache: Cache) -> None:
        claim, found = claimed(cache, 1), []
        waiting = threading.Thread(target=lambda: found.append(cache.claim(digest(1), SIZE, wait=True)))
        waiting.start()
        assert cache.reserve([claim])
        claim.put(content(1))
        waiting.join(20)
        assert found == [None]
        assert cache.get(digest(1)) == content(1)

    def test_who_waits_takes_over_from_one_who_gave_up(self, cache: Cache) -> None:
        claim, found = claimed(cache, 1), []
        waiting = threading.Thread(target=lambda: found.append(cache.claim(digest(1), SIZE, wait=True)))
        waiting.start()
        claim.close()
        waiting.join(20)
        assert isinstance(found[0], Claim)

    def test_many_at_once_fetch_each_object_once(self, cache: Cache) -> None:
        fetched: list[int] = []

        def work() -> None:
            for i in range(8):
                claim = cache.claim(digest(i), SIZE, wait=True)
                if claim is not None:
                    with claim:
                        assert cache.reserve([claim])
                        fetched.append(i)
                        claim.put(content(i))

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert sorted(fetched) == list(range(8))

    def test_a_process_that_dies_holds_nothing(self, cache: Cache) -> None:
        def die() -> None:
            assert cache.reserve([claimed(cache, 1)])
            os._exit(9)

        process = multiprocessing.get_context("fork").Process(target=die)
        process.start()
        process.join(20)
        assert process.exitcode == 9
        put(cache, 1)
        assert cache.get(digest(1)) == content(1)

    def test_what_one_that_died_had_reserved_is_room_again_for_the_next(self, cache: Cache) -> None:
        """Those that go on hold the lock of its unfinished files, which then are not removed as left behind."""
        for i in range(10):
            part = cache.path(digest(i)).with_name(cache.path(digest(i)).name + PART)
            part.parent.mkdir(exist_ok=True)
            part.write_bytes(bytes(SIZE))
        assert cache.held_bytes() == 10 * SIZE
        claims = [claimed(cache, i) for i in range(10)]
        for claim in claims:
            assert cache.reserve([claim])


class TestBound:
    def test_is_never_passed(self, cache: Cache) -> None:
        for i in range(40):
            put(cache, i)
            assert bytes_on_disk(cache) == cache.held_bytes() <= 10 * SIZE
        assert len(there(cache, 40)) >= 9

    def test_the_longest_unused_go_first(self, cache: Cache) -> None:
        for i in range(10):
            put(cache, i)
            os.utime(cache.path(digest(i)), (i, i))
        cache.get(digest(0))
        put(cache, 10)
        assert there(cache, 11) == [0, *range(3, 11)]

    def test_what_is_on_its_way_counts(self, cache: Cache) -> None:
        claims = [claimed(cache, i) for i in range(10)]
        assert cache.reserve(claims)
        with claimed(cache, 10) as eleventh:
            assert not cache.reserve([eleventh])
        for claim in claims:
            claim.close()
        put(cache, 10)

    def test_what_is_larger_than_all_of_it_evicts_nothing(self, cache: Cache) -> None:
        put(cache, 1)
        with cache.claim(b"x" * 32, 11 * SIZE, wait=False) as claim:  # type: ignore[union-attr]
            assert not cache.reserve([claim])
        assert there(cache, 2) == [1]

    def test_what_dead_processes_left_is_removed(self, cache: Cache) -> None:
        put(cache, 0)
        left = cache.path(digest(1)).with_name("left" + PART)
        left.parent.mkdir(exist_ok=True)
        left.write_bytes(bytes(9 * SIZE))
        for i in range(1, 11):
            put(cache, i)
        assert not left.exists()
        assert bytes_on_disk(cache) == cache.held_bytes() <= 10 * SIZE

    def test_a_ledger_that_is_lost_is_counted_again(self, cache: Cache) -> None:
        for i in range(4):
            put(cache, i)
        (cache.folder / "ledger").unlink()
        assert cache.held_bytes() == 4 * SIZE

    def test_a_smaller_bound_holds_from_the_next_object_on(self, cache: Cache) -> None:
        for i in range(10):
            put(cache, i)
        smaller = Cache(cache.folder, 3 * SIZE)
        put(smaller, 11)
        assert bytes_on_disk(smaller) == smaller.held_bytes() <= 3 * SIZE
