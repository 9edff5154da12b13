# SPDX-License-Identifier: Apache-2.0
"""Classifier-free guidance: the teacher's guided output and the scales that a guided student is trained on (paper §5, App. D)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from scm_core.seeds import uniform
from scm_core.validate import check_like, check_positive

VelocityFn = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


def guided(net: Callable[..., Tensor], x: Tensor, t: Tensor, labels: Tensor, guidance: Tensor | float) -> Tensor:
    """F_uncond + s (F_cond − F_uncond) in one forward of twice the batch; x is x_t/σ_d (B, …), t, labels (B,), s a number or of shape (B,).

    Raises ValueError for labels or scales of another shape or device than t.
    """
    check_like("labels", labels, t, "t")
    both = net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([torch.full_like(labels, -1), labels]))
    uncond, cond = both.chunk(2)
    if isinstance(guidance, Tensor):
        check_like("guidance", guidance, t, "t")
        guidance = guidance.reshape(-1, *[1] * (x.ndim - 1))
    return uncond + guidance * (cond - uncond)


def sample_guidance(
    batch: int, low: float, high: float, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Tensor:
    """s ~ U[low, high], one per sample, shape (batch,), on the generator's device."""
    return low + (high - low) * uniform(generator, batch, dtype=dtype)


@contextmanager
def evaluating(net: Callable[..., Tensor]) -> Iterator[Callable[..., Tensor]]:
    """The network in evaluation mode (no dropout), without gradients; the mode of each of its modules is put back.

    A callable that is no module has no mode.
    """
    training = [module for module in net.modules() if module.training] if isinstance(net, nn.Module) else []
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield net
    finally:
        for module in training:
            module.training = True


def data_velocity(x_t: Tensor, t: Tensor, v_t: Tensor, labels: Tensor | None, guidance: Tensor | None) -> Tensor:
    """dx_t/dt of consistency training (sCT): the sample's own velocity v_t."""
    return v_t


def teacher_velocity(teacher: Callable[..., Tensor], sigma_data: float) -> VelocityFn:
    """dx_t/dt of consistency distillation (sCD): σ_d F_teacher(x_t/σ_d, t), guided where a scale is given (Algorithm 1).

    The result is a `VelocityFn` of (x_t, t, v_t, labels, guidance): x_t, v_t of shape (B, …), t, labels and guidance of shape (B,), labels
    and guidance or None, t in radians. It asks the teacher in evaluation mode, whatever its mode is, and without gradients.

    Raises ValueError for sigma_data ≤ 0, and when called for guidance without labels.
    """
    check_positive("sigma_data", sigma_data)

    def dxdt(x_t: Tensor, t: Tensor, v_t: Tensor, labels: Tensor | None, guidance: Tensor | None) -> Tensor:
        with evaluating(teacher):
            if guidance is None:
                return sigma_data * teacher(x_t / sigma_data, t, labels)
            if labels is None:
                raise ValueError("guidance: classifier-free guidance needs labels, got labels=None")
            return sigma_data * guided(teacher, x_t / sigma_data, t, labels, guidance)

    return dxdt
