"""A configuration is read from YAML and overrides, and refuses what it does not know."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from msmil.config import Config
from msmil.config_io import config_from_dict, config_to_dict, dump_config, flatten, load_config, reference
from shards.errors import UserError

TILES = {"bags": {"instances": "tiles"}}
MSP = {"instance_encoder": "msp", "scales": [128, 256, 384]}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_a_valid_configuration(tmp_path: Path) -> None:
    assert load_config(write(tmp_path / "c.yaml", "")) == Config()


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "'1e-4'"])
def test_numbers_are_numbers(tmp_path: Path, text: str) -> None:
    assert load_config(write(tmp_path / "c.yaml", f"optim: {{lr: {text}}}")).optim.lr == 1e-4


def test_numbers_inside_a_free_mapping_are_numbers_too(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "model: {backbone_options: {bn_eps: 1e-3, a: [2E+3, x1e3]}}")
    config = load_config(file, ["model.backbone_options.b=5e-1"])
    assert config.model.backbone_options == {"bn_eps": 0.001, "a": [2000.0, "x1e3"], "b": 0.5}


def test_a_mapping_can_be_merged_into_another_and_changed_there(tmp_path: Path) -> None:
    options = "{one: &one {a: 1, b: 2}, two: &two {<<: *one, b: 3}, three: {c: 4, <<: [*two, *one]}}"
    config = load_config(write(tmp_path / "c.yaml", f"model: {{backbone_options: {options}}}"))
    assert config.model.backbone_options == {"one": {"a": 1, "b": 2}, "two": {"a": 1, "b": 3}} | {
        "three": {"a": 1, "b": 3, "c": 4}
    }


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "c.yaml", "optim: {lr: 1e-3}\nmodel: {scales: [16, 32]}")
    config = load_config(file, ["optim.lr=2e-3", "model.scales=[8,16]", "data.labels=[A, B]", "train.compile=true"])
    assert (config.optim.lr, config.model.scales, config.data.labels) == (2e-3, (8, 16), ("A", "B"))
    assert config.train.compile is True


def test_dump_reads_back_equal(tmp_path: Path) -> None:
    config = config_from_dict({"loss": {"pos_weight": [2, 3.5]}, "data": {"labels": ["A", "B"]}})
    assert load_config(write(tmp_path / "c.yaml", dump_config(config))) == config


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ({"optm": {"lr": 1}}, "optim"),
        ({"data": {"folds": 1}}, "at least 2, table or none"),
        ({"data": {"folds": "all"}}, "data.folds is 'all'"),
        ({"data": {"folds": 3, "fold": 3}}, "from 0 to 2"),
        ({"data": {"folds": "table", "fold": -1}}, "not negative"),
        ({"data": {"fold": 1}}, "set data.folds too"),
        ({"data": {"fold_rule": "legacy"}}, "a number of folds"),
        ({"data": {"fold_rule": "legacy", "folds": 5, "labels": ["A", "B"]}}, "name the one label"),
        ({"data": {"fold_rule": "legacy", "folds": 5, "fold_seed": 1}}, "legacy folds have no seed"),
        ({"data": {"fraction": 0}}, "0 < x <= 1"),
        ({"data": {"fraction": 1.5}}, "0 < x <= 1"),
        ({"data": {"fraction_seed": 1}}, "set data.fraction too"),
        ({"data": {"group_by": "exam", "last_batch": "wrap"}}, "last_batch: pad, or data.group_by: none"),
        ({"data": {"group_by": "exam", "sampling": "class_balanced"}}, "sampling: uniform, or data.group_by: none"),
        ({"data": {"sampling": "balanced"}}, "uniform | class_balanced"),
        ({"optim": {"learning_rate": 1}}, "unknown key optim.learning_rate"),
        ({"optim": {"lrr": 1}}, "optim.lr?"),
        ({"lr": 1}, "optim.lr?"),
        ({"train": {"precision": "fp8"}}, "fp32 | bf16 | fp16"),
        ({"train": {"epochs": "ten"}}, "whole number"),
        ({"train": {"epochs": True}}, "whole number"),
        ({"train": {"epochs": 0}}, "at least 1"),
        ({"train": 3}, "it is a section"),
        ({"model": {"scales": [32, 16]}}, "ascending"),
        ({"model": {"scales": 16}}, "list of whole number"),
        ({"bags": {"pad_multiple_px": 96}}, "multiple of the coarsest stride, 128"),
        ({"bags": {"tile_overlap": 1.0}}, "0 <= x < 1"),
        ({"bags": {"std": 0}}, "above 0"),
        ({"data": {"labels": ["A", "A"]}}, "each label once"),
        ({"loss": {"pos_weight": [1, 2]}}, "one positive number for each"),
        ({"loss": {"pos_weight": "automatic"}}, "auto | none or list of number"),
        (
            {"train": {"encoder": "frozen", "batch_norm": "train"}, "data": {"last_batch": "drop"}},
            "batch_norm: frozen",
        ),
        ({"train": {"head_warmup_epochs": 30}}, "before the run does"),
        ({"train": {"gradient_checkpointing": True, "batch_norm": "train"}}, "batch_norm: frozen"),
        ({"optim": {"lr": float("inf")}}, "finite"),
        ({"bags": {"mean": float("nan")}}, "finite"),
        ({"loss": {"pos_weight": [float("inf")]}}, "finite"),
        ({"optim": {"warmup_epochs": 31}}, "must not outlast"),
        ({"train": {"encoder": "frozen", "trainable_blocks": 4}}, "trainable_blocks: all"),
        ({"model": {"mil_encoder": "isab", "encoder_dropout": 0.5}}, "only the mlp encoder"),
        ({"train": {"batch_norm": "train"}}, "last_batch: drop"),
        ({"train": {"batch_norm": "train"}, "data": {"last_batch": "drop", "on_error": "skip"}}, "on_error: stop"),
        ({"data": {"max_skipped_fraction": 1.5}}, "0 <= x <= 1"),
        ({"name": "a/b"}, "plain folder name"),
        ({"seed": -1}, "not negative"),
        ({"loss": {"instance_weight": 1}, "model": {"deep_supervision": False}}, "deep_supervision: true"),
        ({"loss": {"composite_weight": 1}, "model": {"deep_supervision": False}}, "deep_supervision: true"),
        ({"model": {"instance_encoder": "single", "scales": [256]}}, "bags.instances: tiles"),
        ({"model": {"instance_encoder": "msp", "scales": [128, 256]}}, "bags.instances: tiles"),
        ({"model": {"nested": True}}, "bags.instances: tiles"),
        ({"model": {"instance_encoder": "single"}, "bags": {"instances": "tiles"}}, "give one tile size"),
        (
            {
                "model": {"instance_encoder": "single", "scales": [256], "scale_aggregator": "mean_p"},
                "bags": {"instances": "tiles"},
            },
            "leave it at gated_attention",
        ),
        (
            {
                "model": {"instance_encoder": "single", "scales": [256], "deep_supervision": False},
                "bags": {"instances": "tiles"},
            },
            "leave it at true",
        ),
        ({"model": {"instance_encoder": "msp", "scales": [256, 128]}}, "ascending order"),
        ({"model": {"instance_encoder": "backbone_pyramid", "upsample": "bilinear"}}, "upsample: nearest"),
        (TILES | {"model": {**MSP, "pyramid_norm": True}}, "pyramid_norm: false"),
        (TILES | {"model": {**MSP, "nested": True}}, "fpn or backbone_pyramid"),
        ({"model": {"scale_aggregator": "mean_p", "deep_supervision": False}}, "deep_supervision: true"),
        ({"model": {"pooling": "mean", "probability": "sparsemax"}}, "probability: softmax"),
        ({"model": {"pooling": "max"}, "loss": {"uniform_attention_share": 0.5}}, "uniform_attention_share: 0"),
        ({"model": {"region_pooling": "mean"}}, "nested: true"),
        ({"model": {"region_inducing_points": 4}}, "nested: true"),
        (TILES | {"model": {"nested": True, "region_inducing_points": 0}}, "at least 1"),
        (TILES | {"model": {"nested": True}, "loss": {"instance_weight": 0.5}}, "instance_weight: 0"),
        (TILES | {"model": {"nested": True}, "loss": {"composite_weight": 0.5}}, "composite_weight: 0"),
        ({"loss": {"top_fractions": [0.0]}}, "shares in 0 < x <= 1"),
    ],
)
def test_what_is_wrong_is_named_with_its_fix(tree: dict[str, object], named: str) -> None:
    with pytest.raises(UserError) as error:
        config_from_dict(tree)
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("optim: {lr: 1}\ntrain: {}\noptim: {}", "'optim' stands twice"),
        ("optim: {<<: {beta1: 0.5}, lr: 1, lr: 2}", "'lr' stands twice"),
        ("optim: {<<: {lr: 1, lr: 2}}", "'lr' stands twice"),
        ("optim: {<<: 3}", "expected a mapping"),
        ("? [a]\n: 1", "a key is a list or a mapping"),
        ("optim: {? {a: 1} : 1}", "a key is a list or a mapping"),
        ("a: [", "cannot be read as YAML"),
        ("- 1", "no mapping at its top"),
        ("optm: {}", "did you mean optim"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, text: str, named: str) -> None:
    file = write(tmp_path / "broken.yaml", text)
    with pytest.raises(UserError, match=r"broken\.yaml") as error:
        load_config(file)
    assert named in str(error.value)


@pytest.mark.parametrize("override", ["optim.lr", "=3", "optim.lr.x=[", "name.x=1", "optim={[lr]: 1}"])
def test_a_broken_override_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(UserError):
        load_config(write(tmp_path / "c.yaml", "name: a"), [override])


def test_the_reference_names_every_option_with_a_doc() -> None:
    options = {option.key: option for option in reference()}
    assert set(options) == set(flatten(config_to_dict(Config())))
    assert all(option.doc and option.doc[-1] != "." for option in options.values())
    assert yaml.safe_load(options["model.scales"].default) == [16, 32, 128]
