"""The loss of one label is the published one."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from msmil.config import LossConfig
from msmil.engine.losses import BagLoss
from msmil.types import BagOutput
from tests.parity.published import DATA

GOLDEN: dict[str, Any] = json.loads((DATA / "data.json").read_text())["loss"]


def output(*, deep_supervision: bool) -> BagOutput:
    side_SBK = torch.tensor(GOLDEN["side_logits"])[:, :, None]  # one row per scale
    attention = {scale: torch.ones(3, 1, 1) for scale in (16, 32, 128)}
    return BagOutput(
        logit_BK=torch.tensor(GOLDEN["logits"])[:, None],
        scale_logit_SBK=side_SBK if deep_supervision else None,
        attention=attention,
        score=None,
        instance_logit=None,
        scale_weight_BKS=None,
        scales=tuple(attention),
    )


@pytest.mark.parametrize("result", GOLDEN["results"], ids=lambda r: f"pos_weight {r['pos_weight']:.2f}")
@pytest.mark.parametrize(
    ("deep_supervision", "fused_head", "total"),
    [(True, True, "deep_supervision_total"), (False, True, "aggregated"), (True, False, "mean_p_or_max_p_total")],
)
def test_loss_is_the_published_one(
    result: dict[str, float], deep_supervision: bool, fused_head: bool, total: str
) -> None:
    label_BK = torch.tensor(GOLDEN["labels"])[:, None].to(torch.int8)
    loss = BagLoss(LossConfig(), [result["pos_weight"]], fused_head=fused_head)
    parts = loss(output(deep_supervision=deep_supervision), label_BK, torch.ones(3), global_count=3)
    assert float(parts.aggregated) == pytest.approx(result["aggregated"], rel=1e-6)
    assert float(sum(parts.per_scale.values())) == pytest.approx(result["side_sum"] * deep_supervision, rel=1e-6)
    assert float(parts.total) == pytest.approx(result[total], rel=1e-6)
