# SPDX-License-Identifier: Apache-2.0
"""Sampling of a consistency model (sCM, arXiv 2410.11081) in one or two steps, with diffusers' SCMScheduler."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor


class SCMPipeline(DiffusionPipeline):
    """pipe(labels=[3, 7], num_inference_steps=2, guidance_scale=1.5).images"""

    _optional_components = ["vae"]  # noqa: RUF012  # diffusers' own name
    model_cpu_offload_seq = "net->vae"  # type: ignore[assignment]
    net: Any
    scheduler: Any
    vae: Any

    def __init__(self, net: Any, scheduler: Any, vae: Any = None, unit_images: bool = False) -> None:
        super().__init__()
        self.register_modules(net=net, scheduler=scheduler, vae=vae)
        self.register_to_config(unit_images=unit_images)

    @torch.no_grad()
    def __call__(
        self,
        labels: Sequence[int] | Tensor | None = None,
        num_images: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """One image for each label (or `num_images` without labels).

        `latents` is the noise to start from, of unit variance, else drawn with `generator`, as that of the second step is. `guidance_scale`
        is for models with a guidance input (default: 1, no guidance). `output_type`: pil, np, pt (in [0, 1]) or latent (what the network
        makes).
        """
        config = self.net.config
        device, sigma_data, most = self._execution_device, config.sigma_data, config.segments or len(config.times)
        steps = most if num_inference_steps is None else num_inference_steps
        if not 1 <= steps <= most or (config.segments and steps != most):
            raise ValueError(
                f"num_inference_steps: expected {most if config.segments else f'1 to {most}'}, got {steps}"
            )
        batch = len(labels) if labels is not None else num_images if latents is None else len(latents)
        side, channels = config.arguments["resolution"], config.arguments["channels"]
        if latents is None:
            latents = randn_tensor(
                (batch, channels, side, side), generator=generator, device=device, dtype=torch.float32
            )
        given = None if labels is None else torch.as_tensor(labels, dtype=torch.int64, device=device)
        if guidance_scale is None and config.arguments.get("guidance_input"):
            guidance_scale = 1.0
        scale = None if guidance_scale is None else torch.full((batch,), guidance_scale, device=device)
        x = math.sin(config.times[0]) * (sigma_data * latents.to(device, torch.float32))
        if config.segments:
            x = self._through_segments(x, given, scale)
        else:
            x = self._with_noise(x, steps, given, scale, generator)
        images: Any = x if output_type == "latent" else self._images(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _F(self, x: Tensor, t: Tensor, labels: Tensor | None, scale: Tensor | None) -> Tensor:
        result: Tensor = self.net(x / self.net.config.sigma_data, t.expand(len(x)), labels, scale)
        return result.float()

    def _with_noise(self, x: Tensor, steps: int, labels: Tensor | None, scale: Tensor | None, generator: Any) -> Tensor:
        """A step at each time, with fresh noise between them (paper §5.2)."""
        times, sigma_data = [*self.net.config.times[:steps], 0.0], self.net.config.sigma_data
        self.scheduler.set_timesteps(
            steps, timesteps=times, max_timesteps=None, intermediate_timesteps=None, device=x.device
        )
        for t in self.scheduler.timesteps[:-1]:
            output = sigma_data * self._F(x, t, labels, scale)
            x = self.scheduler.step(output, t, x, generator=generator, return_dict=False)[0]
        return x

    def _through_segments(self, x: Tensor, labels: Tensor | None, scale: Tensor | None) -> Tensor:
        """A multistep model's steps from boundary to boundary, which SCMScheduler does not have: no noise between them."""
        config = self.net.config
        boundaries = [config.times[0] * (1 - i / config.segments) for i in range(config.segments + 1)]
        for t, s in pairwise(boundaries):
            now, way = x.new_tensor(t), x.new_tensor(t) - x.new_tensor(s)
            x = torch.cos(way) * x - torch.sin(way) * config.sigma_data * self._F(x, now, labels, scale)
        return x

    def _images(self, x: Tensor, output_type: str) -> Any:
        """x0 decoded, in [0, 1]."""
        config = self.net.config
        if self.vae is not None:
            mean = x.new_tensor(config.latent_mean)[:, None, None]
            std = x.new_tensor(config.latent_std)[:, None, None]
            x = self.vae.decode(x * (std / config.sigma_data) + mean).sample.float()
            x = 2 * x - 1 if self.config["unit_images"] else x
        images = (x / 2 + 0.5).clamp(0, 1).cpu()
        if output_type == "pt":
            return images
        pixels = VaeImageProcessor.pt_to_numpy(images)
        return pixels if output_type == "np" else VaeImageProcessor.numpy_to_pil(pixels)
