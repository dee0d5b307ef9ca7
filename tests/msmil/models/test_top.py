from __future__ import annotations

import pytest
import torch

from msmil.models.top import composite_instances, top_mean


class TestTopMean:
    @pytest.mark.parametrize(("fraction", "expected"), [(0.3, 8.0), (0.01, 9.0), (1.0, 4.5), (0.1, 9.0)])
    def test_share_of_ten(self, fraction: float, expected: float) -> None:
        assert float(top_mean(torch.arange(10.0)[None, None], fraction)) == expected

    def test_padding_does_not_count(self) -> None:
        """Ten real instances of twenty: 30 % are three of them, not six."""
        logit = torch.full((2, 1, 20), float("-inf"))
        logit[0, 0, 5:15] = torch.arange(10.0)
        logit[1, 0] = torch.arange(20.0)
        assert top_mean(logit, 0.3).flatten().tolist() == [8.0, 16.5]

    def test_padding_gets_no_gradient(self) -> None:
        logit = torch.full((1, 1, 4), float("-inf"))
        logit[0, 0, 1] = 2.0
        logit.requires_grad_()
        top_mean(logit, 1.0).sum().backward()
        assert logit.grad.tolist() == [[[0.0, 1.0, 0.0, 0.0]]]


class TestCompositeInstances:
    def test_every_channel_takes_its_own_top(self) -> None:
        z_BID = torch.stack([torch.arange(10.0), torch.arange(10.0).flip(0) * 2], dim=1)[None]
        composite_BTD = composite_instances(z_BID, None, (0.1, 0.5, 1.0))
        assert composite_BTD.tolist() == [[[9.0, 18.0], [7.0, 14.0], [4.5, 9.0]]]

    def test_of_a_bag_of_one_instance_it_is_that_instance(self) -> None:
        z_BID = torch.randn(3, 1, 4)
        assert torch.equal(composite_instances(z_BID, None, (0.02,)), z_BID)

    def test_padding_is_left_out(self) -> None:
        z_BID = torch.randn(2, 20, 3)
        mask_BI = torch.zeros(2, 20, dtype=torch.bool)
        mask_BI[0, 5:15], mask_BI[1] = True, True
        padded = composite_instances(z_BID, mask_BI, (0.3, 1.0))
        torch.testing.assert_close(padded[:1], composite_instances(z_BID[:1, 5:15], None, (0.3, 1.0)))
        torch.testing.assert_close(padded[1:], composite_instances(z_BID[1:], None, (0.3, 1.0)))
