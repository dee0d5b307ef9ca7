"""Extraction and training from features, in this process: equal to the frozen encoder online, or refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from msmil.config import Config
from msmil.config_io import load_config
from msmil.engine import extract as extract_module
from msmil.engine.checkpoint import load_checkpoint
from msmil.engine.checkpoint_state import newest
from msmil.engine.evaluate import evaluate
from msmil.engine.extract import Storage, extract
from msmil.engine.pipeline import open_pipeline, with_encoder_of
from msmil.engine.predict import forward_batches
from msmil.engine.preflight import check_experiment
from msmil.engine.run import make_network
from msmil.engine.run_folder import RunFolder
from msmil.engine.runtime import Runtime
from msmil.engine.train import train
from shards.errors import UserError
from shards.feature_reader import FeatureReader
from shards.features import read_features
from tests.archives import contents, make_grouped_archive, pack_grouped
from tests.experiments import write_tiny
from tests.msmil.engine.test_train import reset

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("alone_on_a_cpu")]

FROZEN = {"train": {"encoder": "frozen"}, "bags": {"augment": {"horizontal_flip": 0, "vertical_flip": 0}}}
FP32 = Storage(dtype="fp32", zstd=False, images_per_shard=16)


def frozen(folder: Path, shards: Path, **sections: Any) -> Config:
    """The small experiment with a frozen encoder, changed section by section."""
    merged = {key: {**FROZEN.get(key, {}), **value} for key, value in sections.items() if isinstance(value, dict)}
    rest = {key: value for key, value in sections.items() if not isinstance(value, dict)}
    return load_config(write_tiny(folder, shards, **{**FROZEN, **merged, **rest}))


def encode(config: Config, out: Path, storage: Storage = FP32) -> Path:
    reset()
    extract(config, out, Runtime(config.train), storage)
    return out


def with_features(config: Config, folder: Path, **changes: Any) -> Config:
    return replace(config, data=replace(config.data, features=str(folder)), **changes)


def logits(config: Config) -> list[torch.Tensor]:
    """Logits of all images, and of the scales where there are any, by the untrained network."""
    reset()
    pipeline = open_pipeline(config, Runtime(config.train))
    network = make_network(pipeline, pretrained=True)
    pipeline = with_encoder_of(pipeline, network)
    rows = np.arange(len(pipeline.manifest))
    outputs = [
        output for _, _, output in forward_batches(pipeline, network, rows, instance_logits=False, what="testing")
    ]
    scales = [output.scale_logit_SBK for output in outputs if output.scale_logit_SBK is not None]
    return [torch.cat([output.logit_BK for output in outputs]), *([torch.cat(scales, dim=1)] if scales else [])]


TILES = {"instances": "tiles", "tile_size_px": 32, "tile_overlap": 0.5, **FROZEN["bags"]}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Path:
    """The features of the small experiment."""
    folder = tmp_path_factory.mktemp("stored")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        torch.set_num_threads(1)
        return encode(frozen(folder, packed), folder / "features")


# A stored number is off by at most this share of itself; what the heads make of it is no more sensitive than that here.
@pytest.mark.parametrize(
    ("bags", "storage", "bound"),
    [
        ({}, FP32, 1e-6),
        (TILES, replace(FP32, zstd=True), 1e-6),
        ({}, replace(FP32, dtype="fp16"), 2**-11),
        (TILES, replace(FP32, dtype="bf16", zstd=True), 2**-8),
    ],
    ids=["image-fp32", "tiles-fp32-zstd", "image-fp16", "tiles-bf16-zstd"],
)
def test_logits_are_those_of_the_frozen_encoder(
    tmp_path: Path, packed: Path, bags: dict[str, Any], storage: Storage, bound: float
) -> None:
    config = frozen(tmp_path, packed, bags=bags)
    features = encode(config, tmp_path / "features", storage)
    for online, offline in zip(logits(config), logits(with_features(config, features)), strict=True):
        assert online.std() > 1e-4
        assert (online - offline).abs().max() <= bound * online.abs().max()


@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        ({"instance_encoder": "single", "scales": [24]}, {24: (9, 16)}),
        ({"instance_encoder": "msp", "scales": [16, 24]}, {16: (16, 16), 24: (9, 16)}),
        ({"nested": True}, {8: (4, 8, 4, 4), 16: (4, 16, 2, 2)}),
    ],
    ids=["single", "msp", "nested"],
)
def test_every_kind_of_instance_is_stored(
    tmp_path: Path, packed: Path, model: dict[str, Any], shapes: dict[int, tuple[int, ...]]
) -> None:
    """Where tiles are the instances, one vector per tile is all that is kept of it."""
    config = frozen(tmp_path, packed, bags={**TILES, "tile_overlap": 0.0}, model=model)
    features = encode(config, tmp_path / "features")
    assert read_features(features).levels == shapes
    for online, offline in zip(logits(config), logits(with_features(config, features)), strict=True):
        assert online.std() > 1e-5
        assert (online - offline).abs().max() <= 1e-6 * online.abs().max()


def test_features_serve_every_fold(tmp_path: Path, packed: Path, stored: Path) -> None:
    """Another choice of rows is no other data."""
    whole = with_features(frozen(tmp_path, packed), stored)
    for fold in (0, 1):
        check_experiment(replace(whole, data=replace(whole.data, folds=2, fold=fold)), 1)


@pytest.mark.usefixtures("blank_figures")
def test_training_from_features_is_training_the_frozen_encoder_online(
    tmp_path: Path, packed: Path, stored: Path
) -> None:
    weights, metrics = [], []
    for name, features in (("online", ""), ("offline", str(stored))):
        config = frozen(tmp_path, packed, name=name, data={"features": features}, evaluate={"batch_size": 4})
        reset()
        train(config, Runtime(config.train))
        checkpoint = newest(tmp_path / "runs" / name / "checkpoints")
        assert checkpoint is not None
        weights.append(load_checkpoint(checkpoint).model)
        reset()
        folder = RunFolder(tmp_path / "runs" / name)
        metrics.append(evaluate(config, folder, Runtime(config.train), split="test", checkpoint="latest"))
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-5, atol=1e-6)
    assert metrics[0]["localisation"] == metrics[1]["localisation"]
    for label in ("Mass", "Suspicious_Calcification"):
        assert metrics[0]["labels"][label]["auroc"] == pytest.approx(metrics[1]["labels"][label]["auroc"], abs=1e-6)


def test_the_backbone_does_not_run_where_features_are_read(
    tmp_path: Path, packed: Path, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_features(frozen(tmp_path, packed, train={"epochs": 1}), stored)

    def forbidden(*_: object) -> None:
        raise AssertionError("the backbone ran")

    monkeypatch.setattr("msmil.models.backbone.Backbone.forward", forbidden)
    monkeypatch.setattr("shards.reader.ShardReader.read", forbidden)
    train(config, Runtime(config.train))


def test_extracting_again_changes_nothing(tmp_path: Path, packed: Path, stored: Path) -> None:
    before = contents(stored)
    encode(frozen(tmp_path, packed), stored)
    assert contents(stored) == before
    assert not (stored / ".extracting").exists()


def test_an_extraction_that_died_goes_on_to_the_same_bytes(
    tmp_path: Path, packed: Path, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = frozen(tmp_path, packed), tmp_path / "out"
    write, written = extract_module.write_shard, []

    def dies(job: Any, shard: int, *rest: Any) -> None:
        written.append(shard)
        if len(written) == 3:
            raise KeyboardInterrupt
        write(job, shard, *rest)

    monkeypatch.setattr(extract_module, "write_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        encode(config, out)
    with pytest.raises(UserError, match="not finished"):
        read_features(out)
    encode(config, out)
    assert written == [0, 1, 2, 2, 3, 4, 5], "what was whole is not encoded again"
    assert contents(out) == contents(stored)


def test_what_the_features_are_of_can_be_read_in_their_manifest(stored: Path) -> None:
    content = json.loads((stored / "manifest.json").read_text())
    assert content["encoder"]["backbone"] == "resnet10t"
    assert len(content["encoder"]["sha256"]) == 64
    assert content["bags"]["pad_multiple_px"] == 32
    assert "tile_size_px" not in content["bags"], "has no say in image mode"
    assert content["levels"] == {"8": [1, 8, 8, 8], "16": [1, 16, 4, 4]}
    assert sum(shard["num_samples"] for shard in content["shards"]) == 96


CHANGES: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"bags": {"pad_multiple_px": 64}}, ("bags.pad_multiple_px 32", "64 now")),
    ({"bags": {"mean": 0.5}}, ("bags.mean 0.3089279", "0.5 now")),
    ({"bags": {"local_contrast": 1.0}}, ("bags.local_contrast 0.0", "1.0 now")),
    ({"bags": {"instances": "tiles", "tile_size_px": 32}}, ("bags.instances 'image'", "'tiles' now")),
    ({"model": {"backbone": "resnet14t"}}, ("model.backbone 'resnet10t'", "'resnet14t' now")),
    ({"model": {"backbone_options": {"channels": [8, 8, 16, 32], "stem_width": 8}}}, ("model.backbone_options", "32]")),
    ({"model": {"in_channels": 3}}, ("model.in_channels 1", "3 now")),
    ({"model": {"scales": [4, 8, 16]}}, ("levels [8, 16]", "needs [4] too")),
]


@pytest.mark.parametrize(("sections", "named"), CHANGES, ids=lambda value: str(next(iter(value))))
def test_features_of_something_else_are_refused_before_anything_starts(
    tmp_path: Path, packed: Path, stored: Path, sections: dict[str, Any], named: tuple[str, ...]
) -> None:
    config = with_features(frozen(tmp_path, packed, **sections), stored)
    with pytest.raises(UserError) as caught:
        check_experiment(config, 1)
    for text in named:
        assert text in caught.value.thing
    assert caught.value.file == str(stored / "manifest.json")


def test_an_encoder_with_other_weights_is_refused_with_both_digests(tmp_path: Path, packed: Path, stored: Path) -> None:
    config = with_features(frozen(tmp_path, packed, seed=11), stored)
    check_experiment(config, 1)  # weights are not drawn yet
    with pytest.raises(UserError, match=r"encoder with digest [0-9a-f]{12}, this one's weights have [0-9a-f]{12}"):
        train(config, Runtime(config.train))


def test_features_of_other_data_are_refused_with_both_fingerprints(tmp_path: Path, packed: Path, stored: Path) -> None:
    archive = make_grouped_archive(tmp_path / "archive", exams=24, seed=4)
    pack_grouped(archive, tmp_path / "shards")
    config = with_features(frozen(tmp_path, tmp_path / "shards"), stored)
    with pytest.raises(UserError, match=r"fingerprint [0-9a-f]{12}, data.shards has [0-9a-f]{12}"):
        check_experiment(config, 1)


def test_fewer_levels_than_stored_are_read_alone_and_more_are_refused(
    tmp_path: Path, packed: Path, stored: Path
) -> None:
    config = frozen(tmp_path, packed, model={"scales": [16, 32]}, train={"epochs": 1})
    with pytest.raises(UserError, match=r"needs \[32\] too"):
        check_experiment(with_features(config, stored), 1)
    one = frozen(tmp_path, packed, model={"scales": [16]}, train={"epochs": 1})
    train(with_features(one, stored), Runtime(one.train))


@pytest.mark.parametrize(
    ("sections", "named"),
    [
        ({"train": {"encoder": "finetune"}}, ("train.encoder (with data.features)", "finetune")),
        ({"bags": {"augment": {}}}, ("bags.augment.horizontal_flip", "0.5")),
        ({"bags": {"augment": {**FROZEN["bags"]["augment"], "gain": 0.1}}}, ("bags.augment.gain", "0.1")),
        ({"train": {"encoder": "frozen", "gradient_checkpointing": True}}, ("gradient_checkpointing",)),
    ],
)
def test_what_stored_features_cannot_do_is_refused(
    tmp_path: Path, packed: Path, sections: dict[str, Any], named: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as caught:
        frozen(tmp_path, packed, data={"features": "somewhere"}, **sections)
    assert all(text in caught.value.thing for text in named)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda config: (replace(config, seed=11), FP32), "the encoder has other weights"),
        (lambda config: (config, replace(FP32, dtype="fp16")), "dtype was fp32, now fp16"),
        (lambda config: (config, replace(FP32, images_per_shard=24)), "settings was"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_two_extractions_do_not_mix_in_a_folder(
    tmp_path: Path, packed: Path, stored: Path, change: Callable[[Config], Any], said: str, finished: bool
) -> None:
    config, out = frozen(tmp_path, packed), tmp_path / "out"
    if finished:
        shutil.copytree(stored, out)
    else:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(extract_module, "write_shard", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                encode(config, out)
    other, storage = change(config)
    with pytest.raises(UserError, match=said) as caught:
        encode(other, out, storage)
    assert caught.value.file == str(out)


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, packed: Path) -> None:
    before = contents(packed)
    with pytest.raises(UserError, match="not a manifest of features"):
        encode(frozen(tmp_path, packed), packed)
    assert contents(packed) == before


def test_a_disk_that_is_too_small_is_known_before_the_first_shard(
    tmp_path: Path, packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extract_module, "free_bytes", lambda _: 100_000)
    with pytest.raises(UserError, match=r"the disk is too small: about \d+\.\d kB are needed, 100.0 kB are free"):
        encode(frozen(tmp_path, packed), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))


def test_sizes_are_told_first_for_every_way_to_store_and_are_true(
    tmp_path: Path, packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = frozen(tmp_path, packed)
    extract(config, tmp_path / "none", Runtime(config.train), FP32, only_sizes=True)
    assert not (tmp_path / "none").exists()
    out = capsys.readouterr().out
    rows = [line for line in out.splitlines() if line.startswith(("fp", "bf"))]
    assert [row.split("  ")[0] for row in rows] == ["fp32", "fp32, zstd", "bf16", "bf16, zstd", "fp16", "fp16, zstd"]
    assert rows[0].endswith("<- chosen")
    told = float(rows[0].split("kB")[1].strip())
    tars = encode(config, tmp_path / "out").glob("*.tar")
    assert "encoding: 96/96 images (100 %)" in capsys.readouterr().err
    assert told == pytest.approx(sum(tar.stat().st_size for tar in tars) / 1000, rel=0.1)  # a tar ends in up to 10 kB


def test_features_are_computed_in_fp32_whatever_the_run_trains_in(tmp_path: Path, packed: Path, stored: Path) -> None:
    config = frozen(tmp_path, packed, train={"precision": "bf16"})
    with FeatureReader(read_features(encode(config, tmp_path / "out"))) as a, FeatureReader(read_features(stored)) as b:
        assert all(torch.equal(a.read(7)[level], x) for level, x in b.read(7).items())
