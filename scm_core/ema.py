# SPDX-License-Identifier: Apache-2.0
"""Averages of weights: EDM2's power-function EMA with post-hoc reconstruction (paper App. G; Karras et al. 2024, §3, App. C) and EDM's
half-life EMA.

The power-function average after n images weighs the weights at t images with p(t) = (γ+1) t^γ / n^{γ+1}, 0 ≤ t ≤ n, of standard deviation
σ_rel n. A linear combination of stored averages is an average with the combined profile, so that one of any width can be had afterwards.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from scm_core.described import load_described, save_described
from scm_core.validate import check_like, check_positive

SNAPSHOT_FORMAT = "scm-snapshot-1"
CUTOFF = 1e-13  # relative singular value below which a direction of the profiles' Gram matrix is rounding


class Average(Protocol):
    """What a training loop needs of an average."""

    def update(self, nimg: int, batch: int, keep: Tensor | None = None) -> None:
        """Images seen so far, and since the last update. `keep`, of shape (), is True where the average is to stay as it is."""

    def state(self) -> dict[str, Tensor]:
        """The averaged weights by parameter name."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the averaged weights from `state`."""


class _Ema:
    """θ̂ ← β θ̂ + (1 − β) θ over the parameters of a network; `beta` says how much of the old average stays."""

    def __init__(self, net: nn.Module) -> None:
        self.source = dict(net.named_parameters())
        self.average = {name: p.detach().clone() for name, p in self.source.items()}

    def beta(self, nimg: int, batch: int) -> float:
        raise NotImplementedError

    @torch.no_grad()
    def update(self, nimg: int, batch: int, keep: Tensor | None = None) -> None:
        """Images seen so far, and since the last update. `keep`, of shape (), is True where the average is to stay as it is."""
        weight = 1 - self.beta(nimg, batch)
        averages, weights = list(self.average.values()), tuple(self.source.values())
        if keep is None:
            torch._foreach_lerp_(averages, weights, weight)
        else:  # not known to the host: one kernel for each parameter, whose share is a tensor
            share = torch.where(keep, 0.0, weight)
            for average, p in zip(averages, weights, strict=True):
                average.lerp_(p, share.to(average.dtype))

    def state(self) -> dict[str, Tensor]:
        """The averaged weights by parameter name."""
        return self.average

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the averaged weights from `state`."""
        for name, average in self.average.items():
            average.copy_(state[name])


# --- power-function averages ---------------------------------------------------------------------------------------------------------


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """The exponent γ of the average whose relative width is σ_rel = √((γ+1) / ((γ+2)² (γ+3))) (EDM2, Eq. 123).

    γ is the largest real root of γ³ + 7 γ² + (16 − σ⁻²) γ + (12 − σ⁻²) = 0. σ_rel = 0.01, 0.05, 0.10 give 96.99, 16.97, 6.94.
    Raises ValueError for a width outside (0, 0.28).
    """
    if not 0 < sigma_rel < 0.28:
        raise ValueError(f"sigma_rel: expected a relative width in (0, 0.28), got {sigma_rel}")
    s = sigma_rel**-2
    return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())


def power_beta(n: int, dn: int, gamma: float) -> float:
    """The factor β(n) = (1 − Δn/n)^{γ+1} that the old average keeps when n images have been seen, Δn of them since the last update."""
    return (1 - dn / n) ** (gamma + 1)


class PowerEma(_Ema):
    """The power-function average of a network's parameters: β = (1 − Δn/n)^{γ+1}. Raises ValueError for sigma_rel outside (0, 0.28)."""

    def __init__(self, net: nn.Module, sigma_rel: float) -> None:
        self.sigma_rel = sigma_rel
        self.gamma = sigma_rel_to_gamma(sigma_rel)
        super().__init__(net)

    def beta(self, nimg: int, batch: int) -> float:
        """β(nimg), see `power_beta`."""
        return power_beta(nimg, batch, self.gamma)


# --- half-life averages --------------------------------------------------------------------------------------------------------------


def half_life_beta(n: int, dn: int, half_life: float, rampup: float | None) -> float:
    """The factor β(n) = 2^{−Δn/H(n)} that the old average keeps, in units of images; H(n) = min(H, rampup · (n − Δn)) (EDM, App. F).

    The ramp-up keeps the half-life a fraction of the n − Δn images seen before the step, so that the initial weights are forgotten; the
    first step has none and replaces them. None: H(n) = H.
    """
    if rampup is not None:
        half_life = min(half_life, rampup * (n - dn))
    return 0.5 ** (dn / half_life) if half_life > 0 else 0.0


class HalfLifeEma(_Ema):
    """The exponential average in which a weight's influence halves every `half_life` images (CIFAR-10: 0.5 million), see `half_life_beta`.

    Raises ValueError for a half-life or a ramp-up ratio ≤ 0.
    """

    def __init__(self, net: nn.Module, half_life: float, rampup: float | None = 0.05) -> None:
        check_positive("half_life", half_life)
        if rampup is not None:
            check_positive("rampup", rampup)
        self.half_life, self.rampup = half_life, rampup
        super().__init__(net)

    def beta(self, nimg: int, batch: int) -> float:
        """β(nimg), see `half_life_beta`."""
        return half_life_beta(nimg, batch, self.half_life, self.rampup)


# --- post-hoc reconstruction ---------------------------------------------------------------------------------------------------------


class Snapshot(NamedTuple):
    """A power-function average as it was after `nimg` images; `weights` by parameter name."""

    nimg: int
    sigma_rel: float
    weights: Mapping[str, Tensor]


@dataclass(frozen=True)
class StoredSnapshot:
    """A snapshot in a file of `save_snapshot`, whose weights are read each time they are asked for."""

    nimg: int
    sigma_rel: float
    path: Path

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights by parameter name; FileNotFoundError or ValueError with the file's name if it is missing or damaged."""
        return load_described(self.path, SNAPSHOT_FORMAT).tensors


def save_snapshot(path: Path, nimg: int, sigma_rel: float, weights: Mapping[str, Tensor]) -> None:
    """Write a power-function average after `nimg` images to a safetensors file; `PowerEma.state()` gives the weights."""
    save_described(path, weights, SNAPSHOT_FORMAT, {"nimg": nimg, "sigma_rel": sigma_rel})


def load_snapshots(folder: Path) -> list[StoredSnapshot]:
    """The snapshots in the *.safetensors files of a folder by nimg and σ_rel, their weights still on disk.

    Raises ValueError with its name for a folder without such files, or a file that is damaged or something else.
    """
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(str(path), framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("scm", "{}"))
        except SafetensorError as error:
            raise ValueError(f"{path}: truncated or not a safetensors file ({error}); make it again") from error
        if header.get("format") != SNAPSHOT_FORMAT:
            raise ValueError(f"{path}: expected a file of format {SNAPSHOT_FORMAT}, got {header.get('format')!r}")
        found.append(StoredSnapshot(header["config"]["nimg"], header["config"]["sigma_rel"], path))
    if not found:
        raise ValueError(f"{folder}: expected snapshots (*.safetensors), got none")
    return sorted(found, key=lambda s: (s.nimg, s.sigma_rel))


class Combination(NamedTuple):
    """Coefficients of the stored averages, and how far the combined profile is from the wanted one, ‖Σ c_i p_i − p‖/‖p‖."""

    coefficients: list[float]
    error: float


def _inner(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """⟨p_a, p_b⟩ = (γ_a+1)(γ_b+1)/(γ_a+γ_b+1) · (m/M)^γ / M, m ≤ M the two ends n and γ that of M; rows (n, γ) → matrix (EDM2, App. C)."""
    (n, gamma), (m, delta) = a.T[:, :, None], b.T[:, None, :]
    later = np.where(n >= m, gamma, delta)
    # a ratio ≤ 1, where the integral of t^γa t^γb up to m over n_a^{γa+1} n_b^{γb+1} itself would overflow
    ratio = (np.minimum(n, m) / np.maximum(n, m)) ** later
    return (gamma + 1) * (delta + 1) / (gamma + delta + 1) * ratio / np.maximum(n, m)


def combine(stored: Sequence[tuple[int, float]], nimg: int, sigma_rel: float) -> Combination:
    """The least-squares combination of stored profiles (nimg, sigma_rel) for the profile of σ_rel at nimg (EDM2, §3.2 and App. C).

    Minimises ∫ (Σ c_i p_i − p)² dt, by its normal equations with closed-form inner products. Raises ValueError as `reconstruct` does.
    """
    if not stored:
        raise ValueError("snapshots: expected at least one, got none")
    for n, width in stored:
        if n < 1:
            raise ValueError(f"snapshots: expected nimg >= 1, got {n} (sigma_rel {width})")
    if repeated := {entry for entry in stored if list(stored).count(entry) > 1}:
        n, width = min(repeated)
        raise ValueError(
            f"snapshots: expected one for each nimg and sigma_rel, got several at nimg {n}, sigma_rel {width}"
        )
    last = max(n for n, _ in stored)
    if not 0 < nimg <= last:
        raise ValueError(f"nimg: expected 1 to {last}, the last snapshot's, got {nimg}")
    profiles = np.array([(n / last, sigma_rel_to_gamma(width)) for n, width in stored], dtype=np.float64)
    target = np.array([(nimg / last, sigma_rel_to_gamma(sigma_rel))], dtype=np.float64)
    gram, wanted = _inner(profiles, profiles), _inner(profiles, target)[:, 0]
    square = float(_inner(target, target)[0, 0])
    # Profiles of close n and σ_rel are nearly dependent. Scaled to unit length, with the directions dropped that float64 cannot tell from
    # zero, the solution of least norm does not blow up along them: what it would add there to the profile is below √CUTOFF.
    scale = 1 / np.sqrt(np.diag(gram))
    solution = scale * np.linalg.lstsq(scale[:, None] * gram * scale, scale * wanted, rcond=CUTOFF)[0]
    residual = square - 2 * solution @ wanted + solution @ gram @ solution
    return Combination([float(c) for c in solution], float(np.sqrt(max(residual, 0.0) / square)))


def reconstruct(
    snapshots: Sequence[Snapshot | StoredSnapshot], sigma_rel: float, nimg: int | None = None
) -> dict[str, Tensor]:
    """The average of relative width σ_rel after `nimg` images (None: the last snapshot's) from stored ones of any widths (EDM2, §3.2).

    Adds up one snapshot after the other, in float64; of weights in files, one snapshot's are in memory at a time. The result has the
    types of the first snapshot's weights. Raises ValueError for no snapshots, two of the same (nimg, sigma_rel), widths outside (0, 0.28),
    `nimg` after the last snapshot, or snapshots whose parameters differ in name or shape.
    """
    last = max((s.nimg for s in snapshots), default=0)
    stored = [(s.nimg, s.sigma_rel) for s in snapshots]
    solution = combine(stored, last if nimg is None else nimg, sigma_rel)
    total: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    for c, snapshot in zip(solution.coefficients, snapshots, strict=True):
        _add(total, dtypes, snapshot, c)
    return {name: value.to(dtypes[name]) for name, value in total.items()}


def _add(
    total: dict[str, Tensor], dtypes: dict[str, torch.dtype], snapshot: Snapshot | StoredSnapshot, c: float
) -> None:
    """total ← total + c · weights; the first snapshot says which weights there are, and of which types. Its weights die with the call."""
    weights = snapshot.weights
    if not total:
        total.update({name: torch.zeros_like(w, dtype=torch.float64) for name, w in weights.items()})
        dtypes.update({name: w.dtype for name, w in weights.items()})
    where = f"snapshots: nimg {snapshot.nimg}, sigma_rel {snapshot.sigma_rel}"
    for name in sorted(total.keys() ^ weights.keys()):
        raise ValueError(f"{where}: parameter {name!r} is not in all snapshots; expected those of one network")
    for name, w in weights.items():
        check_like(f"{where}: parameter {name!r}", w, total[name], "the first snapshot")
        total[name].add_(w, alpha=c)
