"""One launcher of forked ranks for all of these tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.launcher import Launcher


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    """Starts worlds of ranks without importing torch each time."""
    return Launcher(tmp_path_factory.mktemp("worlds"))


@pytest.fixture
def launcher(worlds: Launcher) -> Iterator[Launcher]:
    """The same; what a test that fails leaves running ends with it."""
    yield worlds
    worlds.end()
