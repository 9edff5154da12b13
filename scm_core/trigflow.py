# SPDX-License-Identifier: Apache-2.0
"""TrigFlow: the process, its times, and the four ways to say what a network predicts (paper §3, App. B).

Times t are radians in [0, π/2]; x0 has standard deviation sigma_data per element and so has the noise z ~ N(0, sigma_data² I).
A network F(x_t / sigma_data, t) has unit-variance input and output; every function here takes the *tensor* F. All raise ValueError for
tensors whose shapes or devices do not match, for times and noise levels in half precision, and for Python numbers out of range; none looks
at the values of tensors, so that all are free within a step.
"""

import math

import torch
from torch import Tensor

from scm_core.seeds import normal
from scm_core.validate import check_device, check_like, check_positive, check_time_dtype

SIGMA_MAX = 80.0  # the largest noise level of every sampler (paper §5.2), in units of the EDM process x0 + σ ε
SIGMA_MIN = 0.002  # the smallest one of EDM's grid


def broadcast_time(t: Tensor, x: Tensor, name: str = "t") -> Tensor:
    """Return t of shape (B,) as (B, 1, …, 1), to broadcast once against x of shape (B, …).

    Raises ValueError, with the argument's `name`, for another shape (silent broadcasting would mix samples), another device, or half
    precision.
    """
    check_time_dtype(t, name)
    if t.shape != x.shape[:1]:
        raise ValueError(
            f"{name}: expected shape ({x.shape[0]},) to match x of shape {tuple(x.shape)}, got {tuple(t.shape)}"
        )
    check_device(name, t, x, "x")
    return t.reshape(-1, *[1] * (x.ndim - 1))


def sigma_to_t(sigma: Tensor | float, sigma_data: float) -> Tensor:
    """EDM noise level σ ≥ 0 to TrigFlow time in radians: t = arctan(σ / σ_d) (App. B).

    A tensor gives one of its shape and dtype, a Python number a zero-dimensional float64 one.
    Raises ValueError for sigma_data ≤ 0, a tensor that is neither float32 nor float64, and a number that is not ≥ 0.
    """
    check_positive("sigma_data", sigma_data)
    if isinstance(sigma, Tensor):
        check_time_dtype(sigma, "sigma")
    elif not sigma >= 0:
        raise ValueError(f"sigma: expected a noise level >= 0, got {sigma}")
    else:
        sigma = torch.tensor(sigma, dtype=torch.float64)
    return torch.atan(sigma / sigma_data)


def t_to_sigma(t: Tensor | float, sigma_data: float) -> Tensor:
    """TrigFlow time t in [0, π/2), in radians, to the EDM noise level: σ = σ_d tan t (App. B).

    A tensor gives one of its shape and dtype, a Python number a zero-dimensional float64 one.
    Raises ValueError for sigma_data ≤ 0, a tensor that is neither float32 nor float64, and a number outside [0, π/2).
    """
    check_positive("sigma_data", sigma_data)
    if isinstance(t, Tensor):
        check_time_dtype(t)
    elif not 0 <= t < math.pi / 2:
        raise ValueError(f"t: expected a time in [0, π/2) radians, where σ is finite, got {t}")
    else:
        t = torch.tensor(t, dtype=torch.float64)
    return sigma_data * torch.tan(t)


def t_max(sigma_data: float) -> float:
    """The first time of every sampler, arctan(80 / σ_d), in radians (§5.2)."""
    check_positive("sigma_data", sigma_data)
    return math.atan(SIGMA_MAX / sigma_data)


def diffuse(x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """x_t = cos(t) x0 + sin(t) z (§3); x0, z of shape (B, …), t of shape (B,)."""
    check_like("z", z, x0, "x0")
    t = broadcast_time(t, x0)
    return torch.cos(t) * x0 + torch.sin(t) * z


def velocity(x0: Tensor, z: Tensor, t: Tensor) -> Tensor:
    """v_t = dx_t/dt = cos(t) z − sin(t) x0, the target of the diffusion loss; shapes as in `diffuse`."""
    check_like("z", z, x0, "x0")
    t = broadcast_time(t, x0)
    return torch.cos(t) * z - torch.sin(t) * x0


def consistency_function(F: Tensor, x_t: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    """f(x_t, t) = cos(t) x_t − sin(t) σ_d F; f(x, 0) = x by construction (§4). F is the tensor F(x_t/σ_d, t)."""
    check_like("F", F, x_t, "x_t")
    t = broadcast_time(t, x_t)
    return torch.cos(t) * x_t - torch.sin(t) * sigma_data * F


def denoiser(F: Tensor, x_t: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    """D(x_t, t) ≈ E[x0 | x_t], the same expression as `consistency_function` for a diffusion model's F (§3)."""
    return consistency_function(F, x_t, t, sigma_data)


def noise_prediction(F: Tensor, x_t: Tensor, t: Tensor, sigma_data: float) -> Tensor:
    """ε(x_t, t) = sin(t) x_t + cos(t) σ_d F ≈ E[z | x_t], with the standard deviation of the data (App. B)."""
    check_like("F", F, x_t, "x_t")
    t = broadcast_time(t, x_t)
    return torch.sin(t) * x_t + torch.cos(t) * sigma_data * F


def sample_times(
    batch: int,
    P_mean: float,
    P_std: float,
    sigma_data: float,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw t = arctan(e^τ / σ_d), τ ~ N(P_mean, P_std²), of shape (batch,), on the generator's device (§4.2).

    P_mean and P_std are in units of ln σ, as in EDM; t in radians.
    """
    tau = P_mean + P_std * normal(generator, batch, dtype=dtype)
    return torch.atan(torch.exp(tau) / sigma_data)
