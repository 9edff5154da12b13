# SPDX-License-Identifier: Apache-2.0
"""The jackknife by groups: exact for means; for precision and recall against the spread over independent sets."""

import pytest
import torch

from scm_core.evaluate import manifold_metrics
from scm_core.evaluate.resampling import consecutive_groups, jackknife_errors


def error_of_mean(x: torch.Tensor, groups: int) -> tuple[float, ...]:
    rests = [torch.cat([x[: group.start], x[group.stop :]]) for group in consecutive_groups(len(x), groups)]
    return jackknife_errors(torch.stack([rest.double().mean(dim=0) for rest in rests]))


def test_one_sample_a_group_gives_the_textbook_error_of_a_mean() -> None:
    x = torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert error_of_mean(x, groups=40) == pytest.approx((x.std(dim=0) / 40**0.5).tolist(), rel=1e-12)


def test_groups_are_consecutive_and_hold_each_sample_once() -> None:
    assert [list(range(10))[group] for group in consecutive_groups(10, 3)] == [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9]]


def test_classes_that_take_turns_are_no_spread() -> None:
    """A mean over samples that alternate between 0 and 1 does not vary from set to set, and its error is 0."""
    assert error_of_mean(torch.arange(100)[:, None] % 2, groups=10) == (0.0,)


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_errors_of_precision_are_true_and_those_of_recall_no_smaller(shift: float) -> None:
    """The spread of 60 sets is known to 9 %, the root mean square of 60 errors to about 4 %."""
    generator = torch.Generator().manual_seed(1)
    real = torch.randn(400, 6, generator=generator)
    sets = [0.9 * torch.randn(400, 6, generator=generator) + shift for _ in range(60)]
    found = torch.tensor([manifold_metrics(real, fake, groups=10) for fake in sets])
    precision, recall = (found[:, 5:].square().mean(dim=0).sqrt() / found[:, :2].std(dim=0)).tolist()
    assert 0.8 < precision < 1.25
    assert 0.9 < recall < 2.0


@pytest.mark.parametrize("groups", [1, 11])
def test_impossible_groups(groups: int) -> None:
    with pytest.raises(ValueError, match=f"groups: expected 2 to 10, .* got {groups}"):
        consecutive_groups(10, groups)
