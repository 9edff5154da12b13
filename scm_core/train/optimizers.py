# SPDX-License-Identifier: Apache-2.0
"""The optimizers of the paper's runs: Adam (ImageNet) and RAdam (CIFAR-10), whole or with its state shared out among the processes."""

from typing import Any, Literal, get_args

import torch

from scm_core.train.distributed import Ranks

Name = Literal["adam", "radam"]
Implementation = Literal["auto", "fused", "foreach", "single"]
Groups = list[dict[str, Any]]

CLASSES: dict[str, type[torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "radam": torch.optim.RAdam}
FUSED = {"adam"}  # has a kernel that updates all weights at once, and that can be told on the device not to


def build_optimizer(
    groups: Groups,
    name: Name,
    implementation: Implementation,
    betas: tuple[float, float],
    eps: float,
    ranks: Ranks,
    sharded: bool,
) -> torch.optim.Optimizer:
    """The optimizer of `groups`, with moments of zero from the start, so that a checkpoint has them even if every step was skipped.

    `implementation`: one kernel for all weights (`fused`, Adam only), one for each operation (`foreach`), or one for each weight
    (`single`); `auto` is the first of these that there is. `sharded`: each process keeps the moments of its share of the weights, updates
    them and sends them to the others (ZeRO stage 1, Rajbhandari et al. 2020). Raises ValueError for what does not exist.
    """
    if name not in CLASSES:
        raise ValueError(f"optimizer: expected one of {', '.join(CLASSES)}, got {name!r}")
    if implementation not in get_args(Implementation):
        raise ValueError(
            f"optimizer implementation: expected one of {', '.join(get_args(Implementation))}, got {implementation!r}"
        )
    if implementation == "fused" and name not in FUSED:
        raise ValueError(f"optimizer implementation: {name} has no fused one; use foreach or auto")
    if implementation == "auto":
        implementation = "fused" if name in FUSED else "foreach"
    options: dict[str, Any] = {"betas": betas, "eps": eps}
    if name in FUSED:
        options["fused"] = implementation == "fused"
    if implementation != "fused":
        options["foreach"] = implementation == "foreach"
    if sharded and ranks.count > 1:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        optimizer: torch.optim.Optimizer = ZeroRedundancyOptimizer(groups, optimizer_class=CLASSES[name], **options)
    else:
        optimizer = CLASSES[name](groups, **options)
    own = local(optimizer)
    for group in own.param_groups:
        for parameter in group["params"]:
            zeros = torch.zeros_like(parameter, memory_format=torch.preserve_format, requires_grad=False)
            step = torch.zeros((), device=parameter.device if options.get("fused") else "cpu")
            own.state[parameter] = {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    return optimizer


def local(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer of this process's share: itself where nothing is shared."""
    return getattr(optimizer, "optim", optimizer)


def is_fused(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer's kernel can be told on the device to leave the weights as they are."""
    return bool(local(optimizer).defaults.get("fused"))
