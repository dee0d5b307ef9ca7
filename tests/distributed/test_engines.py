"""The same global batches give the same training: on any number of ranks, under every engine, in every order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from msmil.reporting.curves import read_curves
from shards.manifest import read_manifest
from tests.archives import LABELS
from tests.distributed.order import BATCH, ORDERS, PREDICTED, TOO_FEW, order_legs, pack_unusual
from tests.distributed.runs import CLIP, Runs, zero

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # worlds have deadlines of their own

STEPS = 20
ENGINES = {
    "ddp": {},
    "accumulation": {"accumulation": 3},
    "zero0": zero(0),
    "zero1": zero(1),
    "zero2": zero(2),
    "zero3": zero(3),
    "offload": zero(3, offload_optimizer=True),
}
ON_THREE = {"ddp_3": {}, "zero2_3": zero(2), "zero3_3": zero(3)}
FEWER = {"zero3_3": 6}  # of the 20 steps: divided weights take three ranks longest
WARM_UP = {"warm_up_zero2": zero(2), "warm_up_zero3": zero(3)}
WARM, THAWED = 5, 3  # steps of the epoch in which heads alone train, and behind it
VALIDATED = [1, STEPS]
WORLDS = [(2, name) for name in ENGINES] + [(3, name) for name in (*ON_THREE, "double")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, packed: Path) -> Runs:
    """One rank; two ranks under every engine, three under some. One rank and ZeRO-3 validate now and then."""
    runs = Runs(tmp_path_factory.mktemp("engines"), packed)
    bf16 = {"precision": "bf16"}
    pack_unusual(runs.folder)
    legs = [runs.leg("one", STEPS, validates=VALIDATED), runs.leg("one_double", STEPS, dtype="float64")]
    legs += [runs.leg("unclipped", STEPS, optim={"clip_grad_norm": 0.0}), warm_up(runs, "warm_up", {})]
    runs.train(1, [*legs, *order_legs(runs, 1)])
    seen = {"zero3": {"validates": VALIDATED, "tracking": {"images": 1}}}
    legs = [runs.leg(name, STEPS, train=words, threshold=0, **seen.get(name, {})) for name, words in ENGINES.items()]
    legs += [runs.leg("bf16", STEPS, train=bf16), runs.leg("zero2_bf16", STEPS, train=zero(2, **bf16))]
    legs.append(runs.leg("zero3_bf16", 1, train=zero(3, **bf16), threshold=0))
    legs += [warm_up(runs, name, words) for name, words in WARM_UP.items()]
    runs.train(2, [*legs, *order_legs(runs, 2)])
    legs = [runs.leg(name, FEWER.get(name, STEPS), train=words, threshold=0) for name, words in ON_THREE.items()]
    runs.train(3, [*legs, runs.leg("double", STEPS, dtype="float64"), *order_legs(runs, 3)])
    return runs


def warm_up(runs: Runs, name: str, words: dict[str, Any]) -> dict[str, Any]:
    return runs.leg(name, WARM + THAWED, train={"batch_size": 12, "head_warmup_epochs": 1, **words}, threshold=0)


@pytest.mark.parametrize(("ranks", "name"), WORLDS)
def test_gradients_losses_and_samples_are_those_of_one_rank(runs: Runs, ranks: int, name: str) -> None:
    told, one = runs.told(name), runs.told("one_double" if name == "double" else "one")
    assert (told.world, len(told.losses)) == (ranks, FEWER.get(name, STEPS))
    told.agrees_with(one, bound=1e-10 if name == "double" else 1e-5)


def test_parameters_do_not_divide_evenly_among_three_ranks(runs: Runs) -> None:
    """Neither each of them, as ZeRO-3 divides them, nor all in a row: else what is done with the rest goes unseen."""
    sizes = [gradient.numel() for gradient in runs.told("zero3_3").gradients.values()]
    assert sum(size % 3 > 0 for size in sizes) > len(sizes) / 2
    assert sum(sizes) % 3


def test_an_engine_that_did_not_clip_would_be_seen(runs: Runs) -> None:
    """Most gradients are longer than the bound; losses without it differ a hundred times more than engines may."""
    one, unclipped = runs.told("one"), runs.told("unclipped")
    assert STEPS / 2 < sum(norm > CLIP for norm in one.norms) < STEPS
    differences = np.abs(np.array(one.losses) / np.array(unclipped.losses) - 1)
    assert max(differences[: min(FEWER.values())]) > 1e-3


@pytest.mark.parametrize("name", WARM_UP)
def test_what_trains_may_change_within_a_run(runs: Runs, name: str) -> None:
    """The backbone is frozen for an epoch; then a new engine goes on with Adam's moments of the heads."""
    told = runs.told(name)
    told.agrees_with(runs.told("warm_up"), bound=1e-5)
    assert not any(key.startswith("backbone.") for key in told.gradients)
    saved = runs.saved(name, WARM + THAWED)
    updates = {("/backbone." in key, float(x)) for key, x in saved.items() if key.endswith("/step")}
    assert updates == {(True, THAWED), (False, WARM + THAWED)}


def test_deepspeed_knows_the_types_that_modules_take_and_give(runs: Runs) -> None:
    """ZeRO-3 hooks a backward at the tensors that it finds in them, and warns of a type where it finds none."""
    assert runs.told("zero3").warned == []


def test_the_log_tells_how_many_parameters_train(runs: Runs) -> None:
    """Where weights are divided, a rank no longer has them."""
    lines = [(runs.folder / "runs" / name / "log.txt").read_text().splitlines() for name in ("ddp", "zero3")]
    ddp, zero3 = ([line for line in log if "blocks train" in line] for log in lines)
    assert ddp[0].endswith("M parameters in all")
    assert "0.000 M" not in ddp[0]
    assert [line.partition("epoch")[2] for line in ddp] == [line.partition("epoch")[2] for line in zero3]


def test_in_bf16_engines_differ_by_its_rounding(runs: Runs) -> None:
    """bf16 has eight bits of mantissa: losses of 20 steps agree to 1 %."""
    one = runs.told("one").losses
    for name in ("bf16", "zero2_bf16"):
        assert runs.told(name).losses == pytest.approx(one, rel=1e-2)
        assert runs.told(name).losses != pytest.approx(one, rel=1e-5), f"{name} did not compute in bf16"


def test_weights_that_are_gathered_in_bf16_training_are_not_rounded(runs: Runs) -> None:
    """Those of attention are used in fp32. Rounded, they move the first loss by 2e-5."""
    assert runs.told("zero3_bf16").losses == pytest.approx(runs.told("bf16").losses[:1], rel=1e-6)


def test_divided_weights_are_validated_and_drawn(runs: Runs) -> None:
    """That training then goes on as without, the losses of all steps say above."""
    folders = [runs.folder / "runs" / name / "tensorboard" for name in ("one", "zero3")]
    one, zero3 = (read_curves(folder).scalars for folder in folders)
    names = {name for name in one if name.startswith("val/")}
    assert {"val/auroc/mean", "val/loss/total", "val/loss/instance", "val/loss/scale/16"} <= names
    for name in names:
        steps, values = zero3[name]
        assert steps.tolist() == one[name][0].tolist() == VALIDATED
        np.testing.assert_allclose(values, one[name][1], rtol=1e-4)
    events = EventAccumulator(str(folders[1])).Reload()
    [drawn] = events.PluginTagToContent("images")
    assert [event.step for event in events.Tensors(drawn)] == VALIDATED


def test_the_comparison_can_fail(runs: Runs) -> None:
    """Losses move from step to step by far more than the bounds."""
    losses = runs.told("one").losses
    assert max(losses) / min(losses) > 1.1


def test_every_epoch_is_exact(runs: Runs) -> None:
    """Each training image once per epoch, and in another order the next time."""
    told = runs.told("ddp")
    rows = [[row for row, _ in step] for step in told.samples]
    per_epoch = len({row for step in rows for row in step}) / 6
    count = -(-int(per_epoch * 6) // 6)
    first = sorted(row for step in rows[:count] for row in step)
    assert first == sorted(set(first))
    assert rows[:3] != rows[count : count + 3]


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", ORDERS)
def test_in_every_order_steps_receive_what_they_do_on_one_rank(runs: Runs, ranks: int, name: str) -> None:
    told, one = runs.told(f"{name}_{ranks}"), runs.told(f"{name}_1")
    assert told.samples == one.samples
    assert told.losses == pytest.approx(one.losses, rel=1e-5)
    assert told.seen == one.seen == sum(map(len, told.samples))


def test_decoding_processes_change_nothing(runs: Runs) -> None:
    assert runs.told("workers").samples == runs.told("pad_1").samples


def test_the_options_of_the_order_hold_for_what_steps_received(runs: Runs, packed: Path) -> None:
    manifest = read_manifest(packed)
    train = manifest.rows("train").tolist()
    exam_of = dict(zip(train, manifest.text("exam_id", manifest.rows("train")), strict=True))
    steps = -(-len(train) // BATCH)

    def epoch(name: str, count: int = steps) -> list[list[int]]:
        return [[row for row, _ in step] for step in runs.told(f"{name}_3").samples[:count]]

    for name in ("pad", "exams", "one_shard", "unequal"):
        assert sorted(row for step in epoch(name) for row in step) == train
    for step in epoch("exams"):
        assert all({row for row in train if exam_of[row] == exam_of[own]} <= set(step) for own in step)
    *dropping, following = epoch("drop")
    dropped = sorted(row for step in dropping for row in step)
    assert dropped == sorted(set(dropped))
    assert len(dropped) == len(train) // BATCH * BATCH < len(train)
    assert not set(train) - set(dropped) <= set(following), "not the rest, but the next epoch"
    wrapped = [row for step in epoch("wrap") for row in step]
    assert len(wrapped) == steps * BATCH
    assert set(wrapped) == set(train)
    label_NK = manifest.label_NK(LABELS)
    for step in epoch("balanced"):
        label_BK = label_NK[step]
        rest = int((label_BK == 0).all(axis=1).sum())
        assert abs(rest - len(step) / 3) < 1, "a third of each batch has none of the two labels"
    share = {exam_of[row] for step in epoch("share", 5) for row in step}
    assert sorted({row for step in epoch("share", 5) for row in step}) == [r for r in train if exam_of[r] in share]
    assert 0.3 * len(train) < 4 * len(share) < 0.7 * len(train)


@pytest.mark.parametrize("name", ["predict_2", "predict_3", *(f"predict_zero{n}_{m}" for n in (2, 3) for m in (2, 3))])
def test_every_image_is_predicted_once_and_alike_on_any_number_of_ranks(runs: Runs, name: str) -> None:
    """Two images and one image are fewer than three ranks."""
    told, one = runs.told(name), runs.told("predict_1")
    assert set(told.predictions) == {"val", "test", "nine", "two", "one"}
    for split, found in told.predictions.items():
        expected = one.predictions[split]
        assert found["rows"] == expected["rows"]
        assert [row for rank in found["forwarded"] for row, _ in rank] == found["rows"]
        assert [each for rank in found["forwarded"] for each in rank] == expected["forwarded"][0]
        assert [image for image, _ in found["predictions"]] == [image for image, _ in expected["predictions"]]
        numbers = [np.array([values for _, values in part["predictions"]]) for part in (found, expected)]
        np.testing.assert_allclose(*numbers, rtol=0, atol=1e-6)
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)


@pytest.mark.parametrize("ranks", [2, 3])
def test_where_weights_are_divided_ranks_fill_up_with_blank_batches(runs: Runs, ranks: int) -> None:
    """A forward waits for all ranks there. Elsewhere each has its own batches, and no more."""
    for engine, together in (("_zero3", True), ("_zero2", False), ("", False)):
        told = runs.told(f"predict{engine}_{ranks}")
        for found in told.predictions.values():
            most = max(len(rank) for rank in found["forwards"])
            for forwards, own in zip(found["forwards"], found["forwarded"], strict=True):
                sizes = [len(own[start : start + PREDICTED]) for start in range(0, len(own), PREDICTED)]
                blank = (most - len(sizes)) * together
                assert forwards == [[size, False] for size in sizes] + [[1, True]] * blank
    of_nine, of_one = ([*map(len, told.predictions[name]["forwards"])] for name in ("nine", "one"))
    assert (of_nine, of_one) == (([1, 2], [0, 1]) if ranks == 2 else ([1, 1, 1], [0, 0, 1])), "else nothing is uneven"


def test_ranks_without_images_predict_nothing(runs: Runs) -> None:
    found = runs.told("predict_3").predictions
    assert [len(rank) for rank in found["one"]["forwarded"]] == [0, 0, 1]
    assert [len(rank) for rank in found["two"]["forwarded"]] == [0, 1, 1]


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("name", ["one_shard", "unequal"])
def test_shards_of_any_size_are_evaluated_exactly_once(runs: Runs, name: str, ranks: int) -> None:
    for found in runs.told(f"{name}_{ranks}").predictions.values():
        assert [row for rank in found["forwarded"] for row, _ in rank] == found["rows"]


def test_more_places_than_samples_are_refused_on_all_ranks_alike(runs: Runs) -> None:
    told = runs.refusals(TOO_FEW)
    assert len(told) == 3
    assert len(set(told)) == 1
    assert "samples for a global batch of 96. Fix: lower the batch size to at most" in told[0]
