"""One packed folder to be served, for the tests of a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.elsewhere import pack_large


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack_large(tmp_path_factory.mktemp("large"))
