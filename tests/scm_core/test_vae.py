# SPDX-License-Identifier: Apache-2.0
"""The VAE: shapes, its loss against torch's own distributions, its sampling, and that it learns."""

import pytest
import torch

from scm_core.data import from_uint8, load_source
from scm_core.vae import VAE, vae_loss


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("channels", "latent_channels", "side"), [(1, 4, 32), (3, 2, 16)])
def test_shapes(channels: int, latent_channels: int, side: int) -> None:
    vae = VAE(channels, latent_channels, width=8)
    x = normal(2, channels, side, side, seed=0)
    mean, logvar = vae.encode(x)
    assert mean.shape == logvar.shape == (2, latent_channels, side // 4, side // 4)
    assert vae.decode(mean).shape == x.shape


def test_loss_is_mse_plus_weighted_kl() -> None:
    x, y = normal(3, 1, 8, 8, seed=0), normal(3, 1, 8, 8, seed=1)
    mean, logvar = normal(3, 4, 2, 2, seed=2), normal(3, 4, 2, 2, seed=3)
    terms = vae_loss(x, y, mean, logvar, kl_weight=0.01)
    posterior = torch.distributions.Normal(mean, (logvar / 2).exp())
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(terms.kl, kl)
    torch.testing.assert_close(terms.mse, ((x - y) ** 2).mean())
    torch.testing.assert_close(terms.loss, terms.mse + 0.01 * kl)


def test_loss_vanishes_only_at_a_perfect_standard_normal() -> None:
    x, zero = normal(2, 1, 8, 8, seed=0), torch.zeros(2, 4, 2, 2)
    assert vae_loss(x, x, zero, zero, 1.0).loss == 0
    assert vae_loss(x, x, zero + 0.1, zero, 1.0).loss > 0
    assert vae_loss(x, x, zero, zero - 0.1, 1.0).loss > 0


def test_forward_decodes_a_posterior_sample_of_the_generator() -> None:
    torch.manual_seed(0)
    vae, x = VAE(width=8), normal(2, 1, 32, 32, seed=0)
    reconstruction, mean, logvar = vae(x, torch.Generator().manual_seed(5))
    eps = torch.randn(mean.shape, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(reconstruction, vae.decode(mean + (logvar / 2).exp() * eps))
    other, *_ = vae(x, torch.Generator().manual_seed(6))
    assert not torch.equal(other, reconstruction)


def test_a_cell_of_the_latent_is_local() -> None:
    """A changed pixel changes the latents of its own 4×4 cell's neighbourhood only, so shifted digits have shifted
    latents.
    """
    torch.manual_seed(0)
    vae, x = VAE(width=8), normal(1, 1, 32, 32, seed=0)
    moved = x.clone()
    moved[0, 0, 0, 0] += 1
    changed = (vae.encode(moved)[0] - vae.encode(x)[0]).abs().amax(dim=(0, 1)) > 0
    assert changed[:2, :2].any()
    assert not changed[2:].any()
    assert not changed[:, 2:].any()


def test_it_learns_digits() -> None:
    torch.manual_seed(0)
    vae, images = VAE(width=16), load_source("mnist5k").images[::50]
    x = from_uint8(images)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
    for _ in range(150):
        index = torch.randint(len(x), (32,), generator=generator)
        terms = vae_loss(x[index], *vae(x[index], generator), kl_weight=1e-3)
        optimizer.zero_grad()
        terms.loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in vae.parameters())
        optimizer.step()
    with torch.no_grad():
        error = (vae.decode(vae.encode(x)[0]) - x).square().mean()
    assert error < 0.35 * (x - x.mean(0)).square().mean()  # what the best constant image reaches


def test_bad_input_is_refused() -> None:
    vae = VAE(width=8)
    with pytest.raises(ValueError, match=r"images must be \(B, 1, H, W\)"):
        vae.encode(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="multiples of 4"):
        vae.encode(torch.zeros(1, 1, 30, 32))
    with pytest.raises(ValueError, match="latents must be"):
        vae.decode(torch.zeros(1, 5, 8, 8))
    with pytest.raises(ValueError, match="width must be ≥ 1"):
        VAE(width=0)
    with pytest.raises(ValueError, match="kl_weight"):
        vae_loss(*[torch.zeros(1, 1, 4, 4)] * 4, kl_weight=-1)
