# SPDX-License-Identifier: Apache-2.0
"""Stage student: consistency training (sCT) or distillation (sCD), Algorithm 1 of the paper."""

import math

import torch

from pipeline.context import Context
from pipeline.modelling import (
    MODEL,
    grid_sampler,
    load_data,
    run_training,
    save_average,
    student_samples,
    train_settings,
)
from scm_core.guidance import data_velocity, teacher_velocity
from scm_core.nn.build import load_model, student_of
from scm_core.nn.small import LogVarHead
from scm_core.objectives.consistency import ConsistencyObjective
from scm_core.seeds import derive_seed
from scm_core.trigflow import t_max


def run(ctx: Context) -> None:
    """Write the averaged student and a grid of its one-step samples (guidance 1)."""
    slot, size, method = ctx.slot, ctx.job.axes["size"], ctx.job.axes["method"]
    wanted = slot.student_for(size, method)
    seed = derive_seed(ctx.scale.seed, ctx.job.name)
    data = load_data(ctx)
    teacher = load_model(ctx.inputs["teacher"] / MODEL)
    torch.manual_seed(derive_seed(seed, "init"))  # of the guidance input; the rest is the teacher's
    net, config = student_of(teacher, guidance_input=wanted.guidance is not None, dropout=wanted.dropout)
    velocity = {"sct": data_velocity, "scd": teacher_velocity(teacher.net, slot.sigma_data)}[method]
    logvar = LogVarHead(bias=math.log(math.prod(data.shape)))  # ‖g‖ ≈ 1 over all elements once normalised
    objective = ConsistencyObjective(
        net,
        logvar,
        velocity,
        slot.sigma_data,
        wanted.P_mean,
        wanted.P_std,
        wanted.tangent_warmup,
        wanted.tangent_normalize,
        wanted.tangent_c,
        wanted.guidance,
    )
    settings = train_settings(wanted, seed)
    guidance = 1.0 if wanted.guidance else None
    times = (t_max(slot.sigma_data),)
    grids = grid_sampler(
        ctx, config, data, lambda net, z, labels: student_samples(slot, net, z, labels, guidance, times, [])
    )
    state = run_training(ctx, settings, net, {"logvar": logvar}, objective, data.batches(settings.batch, seed), grids)
    grids(state)  # not left to the loop: a job killed after its last checkpoint has no iteration to run
    save_average(ctx, state, config, sigma_data=slot.sigma_data, method=method, teacher=ctx.input_runs["teacher"])
