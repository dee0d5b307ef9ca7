"""What all tests share: a small archive, the same packed, and real mammograms where they are."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from launch.ranks import collect_seldom
from shards.pack import pack
from shards.recipes import AsIs
from shards.sources.grouped_table import read_grouped_table
from tests.archives import LABELS, GroupedArchive, make_grouped_archive
from tests.experiments import save_blank

collect_seldom()  # as the commands do
# Coverage starts later in these processes, and would follow every line that is run in importing them.
if "PYTEST_XDIST_WORKER" in os.environ:
    for library in ("torch", "timm", "accelerate", "pandas", "scipy.stats", "matplotlib.pyplot"):
        importlib.import_module(library)

# how long an example takes says how busy the machine is
settings.register_profile("msmil", deadline=None)
settings.load_profile("msmil")

# tests that a script has started in the background ignore Ctrl-C, and so would the commands that they end by it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that waits longest comes first: beside it others compute, in its own folder others would wait too."""
    items.sort(key=lambda item: item.path.name != "test_hung_rank.py")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real mammograms; tests that use it are skipped where it is absent."""
    folder = Path(os.environ.get("MSMIL_TEST_DATA", _ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real mammograms in {folder}; set MSMIL_TEST_DATA to their folder")
    return folder


@pytest.fixture
def tiny_archive(tmp_path: Path) -> GroupedArchive:
    """Six exams of 64 x 48 pixels, for a test to change as it likes."""
    return make_grouped_archive(tmp_path / "archive", exams=6)


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed folder for reading only: 96 images of 64 x 48 in 8 shards, two labels, all three splits."""
    folder = tmp_path_factory.mktemp("packed")
    archive = make_grouped_archive(folder / "archive", exams=24)
    rows = read_grouped_table(archive.table, archive.images)
    pack(rows, folder / "shards", recipe=AsIs(), labels=LABELS, samples_per_shard=12, processes=1, quiet=True)
    return folder / "shards"


@pytest.fixture
def blank_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are composed, and saved as one grey pixel: where nobody looks at them, drawing them takes longest."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", save_blank)


@pytest.fixture
def alone_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This process is the only rank, on one thread of a CPU; accelerate knows nothing of tests before and behind."""
    import torch

    from tests.runs import reset

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    reset()
    yield
    torch.set_num_threads(threads)
    reset()
