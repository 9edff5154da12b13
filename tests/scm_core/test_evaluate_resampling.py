# SPDX-License-Identifier: Apache-2.0
"""The jackknife by groups: exact for means; for precision and recall against the spread over independent sets."""

import pytest
import torch
from torch import Tensor

from scm_core.evaluate.manifold import precision_recall
from scm_core.evaluate.resampling import grouped_jackknife


def test_one_sample_a_group_gives_the_textbook_error_of_a_mean() -> None:
    x = torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = grouped_jackknife(lambda part: part.mean(dim=0).tolist(), x, groups=40)
    assert errors == pytest.approx((x.std(dim=0) / 40**0.5).tolist(), rel=1e-12)


def test_groups_are_consecutive_and_each_is_left_out_once() -> None:
    seen: list[Tensor] = []

    def statistic(part: Tensor) -> list[float]:
        seen.append(part)
        return [0.0]

    grouped_jackknife(statistic, torch.arange(10), groups=3)
    missing = [sorted(set(range(10)) - set(part.tolist())) for part in seen]
    assert missing == [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9]]


def test_classes_that_take_turns_are_no_spread() -> None:
    """A mean over samples that alternate between 0 and 1 does not vary from set to set, and its error is 0."""
    alternating = torch.arange(100) % 2
    assert grouped_jackknife(lambda part: [float(part.double().mean())], alternating, groups=10) == (0.0,)


@pytest.mark.parametrize("shift", [0.0, 0.7])
def test_errors_of_precision_are_true_and_those_of_recall_no_smaller(shift: float) -> None:
    """The spread of 60 sets is known to 9 %, the root mean square of 20 errors to about 6 %."""
    generator = torch.Generator().manual_seed(1)
    real = torch.randn(400, 6, generator=generator)
    sets = [0.9 * torch.randn(400, 6, generator=generator) + shift for _ in range(60)]
    spread = torch.tensor([precision_recall(real, fake) for fake in sets]).std(dim=0)
    errors = torch.tensor([grouped_jackknife(lambda part: precision_recall(real, part), fake) for fake in sets[:20]])
    precision, recall = (errors.square().mean(dim=0).sqrt() / spread).tolist()
    assert 0.8 < precision < 1.25
    assert 0.9 < recall < 2.0


@pytest.mark.parametrize("groups", [1, 11])
def test_impossible_groups(groups: int) -> None:
    with pytest.raises(ValueError, match=f"groups: expected 2 to 10, .* got {groups}"):
        grouped_jackknife(lambda part: [0.0], torch.arange(10), groups=groups)
