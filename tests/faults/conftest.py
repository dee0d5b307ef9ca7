"""One launcher of forked ranks for all of these tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.faults.launcher import Launcher


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Starts worlds of ranks without importing torch each time."""
    with Launcher(tmp_path_factory.mktemp("worlds")) as launcher:
        yield launcher
