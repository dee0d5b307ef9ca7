"""Addresses: told from paths, and refused where they hold a secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from msmil.config_io import load_config
from shards.errors import UserError
from shards.manifest import read_manifest
from shards.remote.url import as_path, check_url, is_url


@pytest.mark.parametrize("place", ["https://host/data", "s3://bucket/data", "gs://bucket/data"])
def test_an_address_is_no_path(place: str) -> None:
    assert is_url(place)
    assert as_path(place) is None
    check_url(place, "data.shards")


@pytest.mark.parametrize("place", ["data/shards", "/data/shards", "a:b", "C:/data"])
def test_a_path_is_no_address(place: str) -> None:
    assert not is_url(place)
    assert as_path(place) == Path(place).absolute()


def test_an_address_of_a_file_is_a_path(packed: Path) -> None:
    manifest = read_manifest(packed.as_uri())
    assert manifest.remote is None
    assert manifest.directory == packed


@pytest.mark.parametrize(
    ("address", "held"),
    [
        ("https://me:secret@host/data", "a user or a password"),
        ("https://secret@host/data", "a user or a password"),
        ("https://host/data?token=secret", "a query"),
        ("https://host/data#secret", "a fragment"),
    ],
)
def test_a_secret_is_refused_and_not_repeated(address: str, held: str, tmp_path: Path) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text(f"data: {{shards: '{address}'}}\n")
    with pytest.raises(UserError, match=f"the address in data.shards holds {held}") as caught:
        load_config(file)
    assert "secret" not in str(caught.value)
    assert "https://host/data" in str(caught.value)
    with pytest.raises(UserError, match=held) as caught:
        read_manifest(address)
    assert "secret" not in str(caught.value)


def test_runs_are_written_to_folders(tmp_path: Path) -> None:
    (tmp_path / "experiment.yaml").write_text("output_dir: s3://bucket/runs\n")
    with pytest.raises(UserError, match="output_dir is 's3://bucket/runs'"):
        load_config(tmp_path / "experiment.yaml")
