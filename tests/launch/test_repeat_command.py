"""`msmil repeat`: every run a normal run, what is done is kept, and the summary is that of the runs' own metrics."""

from __future__ import annotations

import csv
import json
import signal
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from launch import evaluate, train
from launch.cli import main
from launch.repeat import make_parts
from msmil.config_io import load_config
from msmil.engine.checkpoint import load_checkpoint
from msmil.engine.checkpoint_state import newest
from msmil.engine.data import check_trained_on, open_data
from shards.errors import UserError
from shards.manifest import read_manifest
from tests.experiments import save_blank, write_tiny
from tests.msmil.engine.test_train import reset

FOLDS = ("fold_0", "fold_1")


@pytest.fixture(scope="module")
def repeated(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Path:
    """Two folds; the training of the second one dies at once, and the same command is started again.

    The ranks run in this process; what a rank does that is killed in the middle is tested in test_train_command.
    """
    config = write_tiny(tmp_path_factory.mktemp("repeated"), packed, train={"epochs": 1})
    command = ["repeat", str(config), "--folds", "2", "--ranks", "1"]
    root = config.parent / "runs" / "tiny"
    ranks = {"launch.train": train.rank_main, "launch.evaluate": evaluate.rank_main}
    started: list[str] = []

    def start(module: str, arguments: Sequence[str], **_options: Any) -> int:
        started.append(module)
        if len(started) == 3:
            return 128 + signal.SIGKILL
        reset()
        return ranks[module](arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr("matplotlib.figure.Figure.savefig", save_blank)
        for module in (train, evaluate):
            patch.setattr(module, "start_ranks", start)
        assert main(command) == 128 + signal.SIGKILL
        assert started == ["launch.train", "launch.evaluate", "launch.train"]
        assert not (root / "summary.csv").exists()
        (root / "before.txt").write_text(str((root / "fold_0" / "metrics" / "test.json").stat().st_mtime_ns))
        assert main(command) == 0
        assert started[3:] == ["launch.train", "launch.evaluate"]
    reset()
    return root


def metrics(root: Path, fold: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((root / fold / "metrics" / "test.json").read_text())
    return loaded


@pytest.mark.slow
def test_what_was_done_before_the_kill_is_not_done_again(repeated: Path) -> None:
    for fold in FOLDS:
        assert (repeated / fold / "environment.txt").read_text().count("started:") == 1
        assert (repeated / fold / "log.txt").read_text().count("evaluating ") == 1
    assert (repeated / "before.txt").read_text() == str((repeated / "fold_0/metrics/test.json").stat().st_mtime_ns)


@pytest.mark.slow
def test_every_fold_is_a_normal_run_of_its_own_data(repeated: Path, packed: Path) -> None:
    validated = []
    for number, fold in enumerate(FOLDS):
        tree = yaml.safe_load((repeated / fold / "config.yaml").read_text())
        assert (tree["name"], tree["data"]["folds"], tree["data"]["fold"], tree["seed"]) == (fold, 2, number, 10)
        with (repeated / fold / "predictions" / "val.csv").open() as file:
            validated.append({row["patient_id"] for row in csv.DictReader(file)})
    manifest = read_manifest(packed)
    outside_test = {name for split in ("train", "val") for name in manifest.text("patient_id", manifest.rows(split))}
    assert validated[0].isdisjoint(validated[1])
    assert validated[0] | validated[1] == outside_test
    prints = {metrics(repeated, fold)["data_fingerprint"] for fold in FOLDS}
    assert len(prints | {manifest.fingerprint}) == 3


@pytest.mark.slow
def test_the_summary_is_recomputed_from_the_metrics_of_the_runs(repeated: Path) -> None:
    with (repeated / "summary.csv").open() as file:
        table = {row["run"]: row for row in csv.DictReader(file)}
    assert list(table) == [*FOLDS, "mean", "std", "defined"]
    encoded = json.loads((repeated / "summary.json").read_text())
    seen = 0
    for split in ("test", "val"):
        for label in ("Mass", "Suspicious_Calcification"):
            for branch in ("aggregated", "scale_8", "scale_16"):
                for metric in ("auroc", "average_precision", "f1", "balanced_accuracy", "sensitivity", "specificity"):
                    found = []
                    for fold in FOLDS:
                        results = metrics(repeated, fold)
                        of_label = (results if split == "test" else results["validation"])["labels"][label]
                        part = of_label if branch == "aggregated" else of_label["scales"][branch[6:]]
                        found.append(part[metric])
                    column = f"{split}/{label}/{branch}/{metric}"
                    assert [float(table[fold][column]) for fold in FOLDS] == found
                    assert float(table["mean"][column]) == pytest.approx(sum(found) / 2)
                    assert float(table["std"][column]) == pytest.approx(statistics.stdev(found))
                    assert encoded["mean"][column] == float(table["mean"][column])
                    seen += 1
    assert seen == 72
    assert float(table["mean"]["test/mean_auroc"]) == pytest.approx(
        sum(metrics(repeated, fold)["mean_auroc"] for fold in FOLDS) / 2
    )


@pytest.mark.slow
def test_a_run_does_not_go_on_with_another_fold(repeated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own, tiny = str(repeated / "fold_1" / "config.yaml"), str(repeated.parents[1] / "tiny.yaml")
    for command, said in (
        (["train", own, "data.fold=0"], "data.fold is 1 there and 0 now"),
        (["repeat", tiny, "--folds", "3"], "data.folds is 2 there and 3 now"),
        (["repeat", tiny, "--runs", "2"], "holds a cross-validation"),
    ):
        assert main([*command, "--ranks", "1"]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_checkpoint_knows_its_fold_even_where_config_yaml_was_edited(repeated: Path) -> None:
    config = load_config(repeated / "fold_1" / "config.yaml")
    checkpoint = load_checkpoint(newest(repeated / "fold_1" / "checkpoints") or Path())
    check_trained_on(checkpoint.folder, checkpoint.state, open_data(config))
    other = replace(config, data=replace(config.data, fold=0))
    with pytest.raises(UserError, match="was trained on data with fingerprint"):
        check_trained_on(checkpoint.folder, checkpoint.state, open_data(other))


def test_repeated_runs_have_seeds_of_their_own_and_the_same_data(tmp_path: Path, packed: Path) -> None:
    file = str(write_tiny(tmp_path, packed))
    parts = make_parts(file, ["optim.lr=0.5", "seed=3"], runs=3, folds=None, ranks=1)
    assert [part.name for part in parts] == ["run_0", "run_1", "run_2"]
    assert [part.config.seed for part in parts] == [3, 4, 5]
    assert {part.config.output_dir for part in parts} == {str(tmp_path / "runs" / "tiny")}
    assert {part.config.optim.lr for part in parts} == {0.5}
    assert {part.fingerprint for part in parts} == {read_manifest(packed).fingerprint}


def test_repeated_runs_of_one_fold_share_it(tmp_path: Path, packed: Path) -> None:
    file = str(write_tiny(tmp_path, packed, data={"folds": 3, "fold": 1}))
    parts = make_parts(file, [], runs=2, folds=None, ranks=1)
    assert len({part.fingerprint for part in parts}) == 1


def test_folds_of_the_table_are_runs_too(tmp_path: Path, packed: Path) -> None:
    parts = make_parts(str(write_tiny(tmp_path, packed)), [], runs=None, folds="table", ranks=1)
    assert [part.name for part in parts] == ["fold_0", "fold_1", "fold_2", "fold_3"]
    assert {part.config.seed for part in parts} == {10}
    assert len({part.fingerprint for part in parts}) == 4


def test_more_folds_than_patients_are_refused_before_anything_starts(tmp_path: Path, packed: Path) -> None:
    with pytest.raises(UserError, match="only 18 patients"):
        make_parts(str(write_tiny(tmp_path, packed)), [], runs=None, folds=19, ranks=1)
    assert not (tmp_path / "runs").exists()


def test_other_folds_in_the_experiment_than_on_the_command_line_are_refused(tmp_path: Path, packed: Path) -> None:
    file = str(write_tiny(tmp_path, packed, data={"folds": 3, "fold": 1}))
    with pytest.raises(UserError, match=r"sets data.folds: 3 itself.*--folds 3"):
        make_parts(file, [], runs=None, folds=4, ranks=1)
    assert len(make_parts(file, [], runs=None, folds=3, ranks=1)) == 3


def test_the_folder_of_a_single_run_is_refused(tmp_path: Path, packed: Path) -> None:
    file = str(write_tiny(tmp_path, packed))
    (tmp_path / "runs" / "tiny" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="folder of a single run"):
        make_parts(file, [], runs=2, folds=None, ranks=1)


@pytest.mark.parametrize(
    "arguments",
    [["--runs", "0"], ["--folds", "1"], ["--folds", "many"], ["--runs", "2", "--folds", "2"], []],
)
def test_bad_values_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["repeat", "configs/experiment/demo.yaml", *arguments])
    assert "--runs" in capsys.readouterr().err
