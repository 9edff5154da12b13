# SPDX-License-Identifier: Apache-2.0
"""Networks of diffusers as F: they predict ε, v or x0 at discrete steps, and `conversions.TrigFlowNet` makes F of that.

Beyond the schedule's ends, where they were never trained, the prediction that stays well-conditioned is held: above the last step the x0
that the network sees there, below the first its ε. Derivatives come from torch.func.jvp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scm_core.compat import prepare_torchvision
from scm_core.conversions import Prediction, TrigFlowNet
from scm_core.discrete_steps import DiscreteSchedule, betas
from scm_core.validate import check_positive

PREDICTIONS: Mapping[str, Prediction] = {"epsilon": "epsilon", "v_prediction": "velocity", "sample": "x0"}
CLASSES = ("UNet2DModel", "DiTTransformer2DModel", "Transformer2DModel")
Class = Literal["UNet2DModel", "DiTTransformer2DModel", "Transformer2DModel"]


class GroupNorm(nn.GroupNorm):
    """torch's, whose forward-mode derivative needs its input in one piece."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous())


class ForeignNet(nn.Module):
    """F(x_t/σ_d, t, labels) of a network of diffusers: `network` is its class, `arguments` its own, `schedule` those of
    `discrete_steps.betas`.

    `null_label` is the index of "no label", for −1; None where the network has none. Its data are scaled to σ_d as ours.
    """

    guidance_input = False

    def __init__(
        self,
        channels: int,
        resolution: int,
        labels: int,
        network: Class,
        arguments: Mapping[str, Any],
        prediction: str,
        schedule: Mapping[str, Any],
        sigma_data: float = 0.5,
        null_label: int | None = None,
        guidance_input: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_positive("sigma_data", sigma_data)
        if guidance_input:
            raise ValueError(
                "guidance_input: a network of diffusers has no input for a guidance scale: train without guidance"
            )
        if dropout:
            raise ValueError(f"dropout: a network of diffusers has its own alone: expected 0, got {dropout}")
        if network not in CLASSES:
            raise ValueError(f"network: expected one of {', '.join(CLASSES)}, got {network!r}")
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction: expected one of {', '.join(PREDICTIONS)}, got {prediction!r}")
        prepare_torchvision()
        import diffusers  # here, as it takes seconds and few need it
        from diffusers.models.attention_processor import Attention, AttnProcessor

        self.shape, self.labels, self.null_label = (channels, resolution, resolution), labels, null_label
        made: Any = getattr(diffusers, network)(**arguments)
        self.inner: nn.Module = made
        for module in made.modules():
            if isinstance(module, nn.GroupNorm):
                module.__class__ = GroupNorm
            if isinstance(module, Attention):
                module.set_processor(AttnProcessor())  # the fused kernels have no forward-mode derivative
        times = DiscreteSchedule(betas(**schedule))
        self.first, self.last = times.ends(sigma_data)
        self.trigflow = TrigFlowNet(self._predict, times, PREDICTIONS[prediction], sigma_data)

    def _predict(self, x_s: Tensor, s: Tensor, labels: Tensor | None = None) -> Tensor:
        given: dict[str, Tensor] = {}
        if self.labels:
            if self.null_label is not None:
                null = torch.full((len(x_s),), self.null_label, device=x_s.device)
                labels = null if labels is None else torch.where(labels < 0, null, labels)
            if labels is None:
                raise ValueError("labels: the network was trained with a label for every sample, got None")
            given["class_labels"] = labels
        result: Tensor = self.inner(x_s.contiguous(), s, **given).sample
        return result[:, : self.shape[0]]  # a learned variance comes behind

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        if guidance is not None:
            raise ValueError("guidance: a network of diffusers has no input for it")
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x: expected shape (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        held = t.clamp(self.first, self.last)
        F = self.trigflow(x, held, labels)
        cos, sin, high_cos, high_sin, low_cos, low_sin = (
            function(time)[:, None, None, None]
            for time in (held, t.clamp(min=self.last), t.clamp(max=self.first))
            for function in (torch.cos, torch.sin)
        )
        x0, noise = cos * x - sin * F, sin * x + cos * F  # over σ_d
        F = torch.where((t > self.last)[:, None, None, None], (high_cos * x - x0) / high_sin, F)
        return torch.where((t < self.first)[:, None, None, None], (noise - low_sin * x) / low_cos, F)
