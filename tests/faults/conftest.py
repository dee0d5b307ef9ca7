"""One launcher of forked ranks for all of these tests."""

from __future__ import annotations

import pytest

from tests.faults.launcher import Launcher


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    """Starts worlds of ranks without importing torch each time."""
    return Launcher(tmp_path_factory.mktemp("worlds"))
