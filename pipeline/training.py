# SPDX-License-Identifier: Apache-2.0
"""Training as params.yaml describes it: settings, the run itself, sample grids on the way, the model file at its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.context import Context
from pipeline.errors import StoppedError
from pipeline.grids import save_grid
from pipeline.modelling import MODEL, Data, Decoder
from pipeline.params import BasicTraining, Decay, Engine, Training
from pipeline.ranks import RankDone, together
from pipeline.sight import Sight
from scm_core.data.loader import Prefetcher
from scm_core.nn.build import build_network, save_model
from scm_core.objectives import Companion, Objective
from scm_core.seeds import derive_seed, sample_noise
from scm_core.train.checkpoint import CheckpointStore
from scm_core.train.distributed import own_device
from scm_core.train.loop import Continuation, train
from scm_core.train.precision import Scaling
from scm_core.train.schedule import Schedule
from scm_core.train.signals import Stopped, StopRequest
from scm_core.train.state import TrainSettings, TrainState

GRID_ROWS, GRID_COLUMNS = 4, 10  # the columns are classes, the first ones of many
ALONE = Engine()  # one process, nothing special
ENGINE = ("implementation", "accumulation", "shard_optimizer")  # settings that a run may go on with others of


def schedule(training: BasicTraining | Training) -> Schedule:
    """The learning-rate schedule that params.yaml describes; an auxiliary network's rate falls linearly to 0."""
    if isinstance(training, BasicTraining):
        return Schedule("linear", start=0.0, final=0.0)
    decay: Decay = training.decay
    return Schedule(ramp_up=training.ramp_up, ramp_up_images=training.ramp_up_images, **decay.model_dump())


def train_settings(
    training: BasicTraining | Training, seed: int, engine: Engine = ALONE, precision: str = "fp32"
) -> TrainSettings:
    """The library's settings from sections of params.yaml; a trunk in fp16 needs a loss scale."""
    extra: dict[str, Any] = {}
    if isinstance(training, Training):
        kept = training.snapshots
        extra = {
            "optimizer": training.optimizer,
            "betas": training.betas,
            "eps": training.eps,
            "head_lr": training.logvar_lr,
            "ema_sigma_rel": training.ema_sigma_rel,
            "ema_half_life": training.ema_half_life,
            "snapshots": kept.sigma_rel if kept else (),
            "snapshot_every": kept.every if kept else 0,
            "sample_every": training.sample_every,
        }
    return TrainSettings(
        iterations=training.iterations,
        batch=training.batch,
        lr=training.lr,
        seed=seed,
        schedule=schedule(training),
        implementation=engine.optimizer,
        accumulation=engine.accumulation,
        shard_optimizer=engine.shard_optimizer,
        loss_scaling=Scaling() if precision == "fp16" else None,
        log_every=training.log_every,
        checkpoint_every=training.checkpoint_every,
        **extra,
    )


def run_training(
    ctx: Context,
    settings: TrainSettings,
    net: nn.Module,
    objective: Objective,
    data: Data,
    *,
    heads: Mapping[str, nn.Module] | None = None,
    companions: Mapping[str, Companion] | None = None,
    sample: Callable[[TrainState], None] = lambda state: None,
    engine: Engine = ALONE,
) -> TrainState:
    """Train as `engine` says, with checkpoints in the job's working folder, metrics to the tracker by images seen, and a progress display.

    Companions train with `settings_beside`. On processes other than the first this does not return.
    """
    heads, companions = heads or {}, companions or {}
    with together(ctx.job, engine.processes) as ranks, StopRequest(budget(engine)) as stop:
        beside = {}
        for name, other in companions.items():
            for module in (other.net, *other.heads.values()):
                module.to(ranks.device)
            beside[name] = TrainState(other.net, settings_beside(settings, name, other), other.heads, ranks=ranks)
        for module in (net, *heads.values()):
            module.to(ranks.device)
        if engine.compile:
            for module in (net, *(other.net for other in companions.values())):
                module.compile()
        state = TrainState(net, settings, heads, beside, ranks)
        objectives = {name: other.objective for name, other in companions.items()}
        sight = Sight(ctx, state, objective, objectives)
        known = {key: value for key, value in asdict(settings).items() if key not in ENGINE}
        continuation = Continuation({"settings": known, "code": ctx.code}, ctx.params.resume.allow_changes)
        store = CheckpointStore(ctx.work / "checkpoints")
        with Prefetcher(data.batches(settings, ranks), ranks.device, engine.prefetch) as batches:
            sight.count(batches)
            try:
                train(
                    state,
                    objective,
                    batches,
                    store,
                    sight.hooks(sample),
                    objectives,
                    stop,
                    ctx.work / "snapshots",
                    continuation,
                )
            except Stopped as stopped:
                raise StoppedError(f"{ctx.job.name}: {stopped}", tuple(stop.received)) from None
        sight.close()
        if not ranks.first:
            raise RankDone
    return state


def settings_beside(settings: TrainSettings, name: str, other: Companion) -> TrainSettings:
    """A companion's: those of the student but for the noise, the learning rate, if it has one, and averages, which nobody asks it for."""
    return replace(
        settings,
        seed=derive_seed(settings.seed, name),
        lr=settings.lr if other.lr is None else other.lr,
        ema_sigma_rel=None,
        ema_half_life=None,
        snapshots=(),
        snapshot_every=0,
    )


def budget(engine: Engine) -> float | None:
    """The seconds that a training may take before it asks to be started again."""
    return None if engine.budget_minutes is None else 60 * engine.budget_minutes


def grid_sampler(
    ctx: Context, config: Mapping[str, Any], data: Data, generate: Callable[[nn.Module, Tensor, Tensor], Tensor]
) -> Callable[[TrainState], None]:
    """A hook that draws the averaged network's samples of every class, or the first ones, into samples.png and the tracker."""
    decode = Decoder(ctx.slot, ctx.inputs, own_device())
    columns = min(config["labels"] or GRID_COLUMNS, GRID_COLUMNS)
    labels = torch.arange(columns).repeat(GRID_ROWS)
    noise = sample_noise(range(len(labels)), data.shape, "grid")

    def sample(state: TrainState) -> None:
        device = state.ranks.device
        net = build_network(config).eval().to(device)
        net.load_state_dict(state.averaged(), strict=False)
        path = ctx.out / "samples.png"
        save_grid(decode(generate(net, noise.to(device), labels.to(device))).cpu(), path, columns)
        named = ctx.work / f"samples-{state.nimg:09d}.png"
        named.write_bytes(path.read_bytes())
        ctx.tracker.log_artifact(named, "samples")

    return sample


def save_average(ctx: Context, state: TrainState, config: Mapping[str, Any], **info: Any) -> None:
    """Write the averaged network, the result of a training stage, and the snapshots that other averages can be made of."""
    facts = {
        "run": ctx.run_id,
        "iterations": state.iteration,
        "nimg": state.nimg,
        "skipped_steps": state.skipped,
        **info,
    }
    save_model(ctx.out / MODEL, state.averaged(), config, facts)
    snapshots = ctx.work / "snapshots"
    if snapshots.exists():
        snapshots.rename(ctx.out / "snapshots")
