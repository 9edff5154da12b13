# SPDX-License-Identifier: Apache-2.0
"""Stage student: train a consistency model by one of the methods of `scm_core.objectives.methods`."""

import torch

from pipeline.context import Context
from pipeline.generation import samples
from pipeline.modelling import MODEL, load_data
from pipeline.training import grid_sampler, run_training, save_average, train_settings
from scm_core.nn.build import load_model, student_of
from scm_core.objectives.methods import METHODS
from scm_core.seeds import derive_seed
from scm_core.train.distributed import own_device


def run(ctx: Context) -> None:
    """Write the averaged student and a grid of its one-step samples (guidance 1)."""
    slot, size, name = ctx.slot, ctx.job.axes["size"], ctx.job.axes["method"]
    wanted = slot.student_for(size, name)
    seed = derive_seed(ctx.scale.seed, ctx.job.name)
    data = load_data(ctx)
    teacher = load_model(ctx.inputs["teacher"] / MODEL)
    torch.manual_seed(derive_seed(seed, "init"))  # of the guidance input; the rest is the teacher's
    dropout = slot.sizes[size].network.dropout(wanted)
    net, config = student_of(teacher, guidance_input=wanted.guidance is not None, **dropout)
    if "start" in ctx.inputs:
        net.load_state_dict(load_model(ctx.inputs["start"] / MODEL).net.state_dict())
    method = METHODS[wanted.method](net, teacher.net, slot.sigma_data, data.shape, **wanted.options())
    engine = slot.sizes[size].engine
    teacher.net.to(own_device())
    if engine.compile:
        teacher.net.compile()
    settings = train_settings(wanted, seed, engine, config.get("precision", "fp32"))
    guidance = 1.0 if wanted.guidance else None
    grids = grid_sampler(
        ctx, config, data, lambda net, noise, labels: samples(slot, wanted, net, [noise], labels, guidance)
    )
    state = run_training(
        ctx,
        settings,
        net,
        method.objective,
        data,
        heads=method.heads,
        companions=method.companions,
        sample=grids,
        engine=engine,
    )
    grids(state)  # not left to the loop: a job killed after its last checkpoint has no iteration to run
    inherited = {key: teacher.info[key] for key in ("licence", "imported") if key in teacher.info}
    facts = {"sigma_data": slot.sigma_data, "method": wanted.method, "teacher": ctx.input_runs["teacher"]}
    if "start" in ctx.inputs:
        facts["start"] = ctx.input_runs["start"]
    save_average(ctx, state, config, **facts, **inherited)
