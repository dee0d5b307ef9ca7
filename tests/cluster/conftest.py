"""One cluster for all of these tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.slurm import Cluster, missing


@pytest.fixture(scope="session")
def started() -> Iterator[Cluster]:
    """A SLURM of two nodes; skips where there can be none."""
    if reason := missing():
        pytest.skip(reason)
    cluster = Cluster()
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(started: Cluster) -> Iterator[Cluster]:
    """The same; jobs that a test leaves behind end with it."""
    yield started
    started.end_jobs()
