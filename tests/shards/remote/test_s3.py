"""A packed folder in a real S3 server, on the loopback interface."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from shards.errors import UserError
from shards.manifest import check_shards, read_manifest
from shards.remote.folder import RemoteOptions
from shards.verify import verify
from tests.shards.remote.test_elsewhere import hashes, training

pytestmark = pytest.mark.slow

URL = "s3://mammograms/packed"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, packed: Path) -> Iterator[object]:
    """The packed folder, copied; credentials and endpoint are in the environment, as on a cluster."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    client = boto3.client("s3")
    client.create_bucket(Bucket="mammograms")
    for file in packed.iterdir():
        client.upload_file(str(file), "mammograms", f"packed/{file.name}")
    yield client
    for file in client.list_objects_v2(Bucket="mammograms")["Contents"]:
        client.delete_object(Bucket="mammograms", Key=file["Key"])
    client.delete_bucket(Bucket="mammograms")


@pytest.fixture
def options(tmp_path: Path) -> RemoteOptions:
    return RemoteOptions(cache_dir=str(tmp_path / "cache"), cache_gb=0.1, timeout_s=10, retries=1)


def test_batches_are_those_of_the_folder(bucket, packed: Path, options: RemoteOptions) -> None:
    manifest = read_manifest(URL, options)
    check_shards(manifest)
    assert hashes(training(manifest)) == hashes(training(read_manifest(packed)))
    assert read_manifest(URL, options).fingerprint == manifest.fingerprint
    assert "refuses" not in str(manifest.remote)


def test_every_tar_is_looked_for(bucket, options: RemoteOptions) -> None:
    """A store lists its files: one that is missing in the middle is missed."""
    manifest = read_manifest(URL, options)
    bucket.delete_object(Bucket="mammograms", Key=f"packed/{manifest.shards[3].name}")
    with pytest.raises(UserError, match="missing") as caught:
        check_shards(manifest)
    assert caught.value.file == f"{URL}/{manifest.shards[3].name}"


def test_all_of_it_is_verified(bucket, packed: Path) -> None:
    report = verify(URL, processes=1, quiet=True)
    assert report.ok, report
    assert report.summary()["directory"] == URL
    tar = bytearray((packed / "shard-000002.tar").read_bytes())
    tar[len(tar) // 2] ^= 1
    bucket.put_object(Bucket="mammograms", Key="packed/shard-000002.tar", Body=bytes(tar))
    bucket.put_object(Bucket="mammograms", Key="packed/foreign.tar", Body=b"")
    bucket.delete_object(Bucket="mammograms", Key="packed/shard-000005.tar")
    found = {problem.file: problem.thing for problem in verify(URL, processes=1, quiet=True).problems}
    assert found.keys() == {"shard-000002.tar", "shard-000005.tar", "foreign.tar"}
    assert found["shard-000005.tar"] == "missing"


def test_a_bucket_that_is_not_there(bucket, options: RemoteOptions) -> None:
    with pytest.raises(UserError, match=r"manifest\.json") as caught:
        read_manifest("s3://nowhere/packed", options)
    assert caught.value.file == "s3://nowhere/packed"


def test_keys_that_are_refused(bucket, options: RemoteOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told with a word on credentials, and without them."""
    import shards.remote.store as store

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(store.Store, "_cat", refuse)
    with pytest.raises(UserError, match="may not be read") as caught:
        store.Store(URL, timeout_s=1, retries=3).read("manifest.json")
    assert "credentials" in caught.value.fix
