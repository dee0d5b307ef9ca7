"""The baseline that ours is compared with computes the published numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from msmil.config_io import load_config
from msmil.engine.bench.images import packed_for
from msmil.engine.bench.plain import PlainStep, pipeline_of, pixels_per_image, published_way
from msmil.engine.pipeline import open_pipeline
from msmil.engine.runtime import Runtime
from msmil.models.published.convert import convert
from shards.stream import blank_batch
from tests.parity.published import golden, published_state, tiny_bags
from tests.parity.test_published_models import BOUND
from tests.runs import reset

pytestmark = pytest.mark.slow

RECIPE = Path(__file__).parents[4] / "configs" / "experiment" / "vindr_mass_fpn_abmil.yaml"


@pytest.fixture
def baseline(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlainStep]:
    """As `msmil bench train` builds it for the recipe of FPN-AbMIL."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    reset()
    config = load_config(RECIPE, ["train.batch_size=2"])
    with packed_for(config, (64, 48), 4) as filled:
        pipeline = open_pipeline(filled, Runtime(filled.train, quiet=True))
        yield PlainStep(pipeline_of(pipeline, published_way(filled)))
    reset()


def test_its_logits_are_the_published_ones(baseline: PlainStep) -> None:
    network, expected = baseline.network, golden("fpn_abmil")
    network.load_state_dict(convert(published_state("fpn_abmil")).state)
    with torch.inference_mode():
        output = network.eval()(tiny_bags())
    np.testing.assert_allclose(output.logit_BK[:, 0], expected["tiny/logits"].reshape(-1), atol=BOUND, rtol=BOUND)


def test_it_is_fp32_of_three_channels_in_contiguous_tiles(baseline: PlainStep) -> None:
    pipeline, network = baseline.pipeline, baseline.network
    bag = pipeline.bag(blank_batch(pipeline.manifest, 1, labels=1, features=None), epoch=None)
    assert tuple(bag.tiles_BNCPP.shape) == (1, 1, 3, 512, 512)
    assert bag.tiles_BNCPP.dtype == torch.float32
    assert all(p.is_contiguous() and p.dtype == torch.float32 for p in network.parameters())
    trained = sum(p.requires_grad for p in network.backbone.parameters())
    assert 0 < trained < len(list(network.backbone.parameters())), "the last 8 blocks, as the configuration says"
    stored = replace(pipeline, manifest=pipeline.manifest)
    assert pixels_per_image(stored, blank_batch(pipeline.manifest, 1, labels=1, features=None)) == 512 * 512
