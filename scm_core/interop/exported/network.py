# SPDX-License-Identifier: Apache-2.0
"""The network F(x_t/σ_d, t, labels, guidance) of a consistency model (sCM, arXiv 2410.11081) as a model of diffusers."""

from typing import Any

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from scm_core.nn.small import SmallNet as Network


class SCMNetwork(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' own way
    """F for x of shape (B, channels, resolution, resolution), t (B,) in radians, labels (B,) int64 (−1: none), guidance scale (B,).

    `arguments` are those of the network. What sampling needs beside it: σ_d, the `times` (radians) of its steps, or the number of
    `segments` between which it steps without noise; for latents the channels' mean and standard deviation.
    """

    @register_to_config
    def __init__(
        self,
        arguments: dict[str, Any],
        sigma_data: float,
        times: list[float],
        segments: int = 0,
        latent_mean: list[float] | None = None,
        latent_std: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.network = Network(**arguments)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        result: Tensor = self.network(x, t, labels, guidance)
        return result
