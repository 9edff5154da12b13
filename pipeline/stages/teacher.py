# SPDX-License-Identifier: Apache-2.0
"""Stage teacher: train the diffusion model (paper §3, App. D), or import a published one."""

import math

import torch

from pipeline.context import Context
from pipeline.generation import samples
from pipeline.importing import import_teacher, write
from pipeline.modelling import load_data
from pipeline.training import grid_sampler, run_training, save_average, train_settings
from scm_core.nn.build import build_network
from scm_core.nn.embedding import LogVarHead
from scm_core.objectives.diffusion import DiffusionObjective
from scm_core.seeds import derive_seed

KEPT = ("precision", "checkpointing")  # how an imported network is computed, which its file does not say


def run(ctx: Context) -> None:
    """Write the averaged teacher and a grid of its samples (guidance 1); of an imported one the network alone."""
    slot, size = ctx.slot, ctx.job.axes["size"]
    if imported := slot.sizes[size].imported:
        teacher = import_teacher(ctx.job.name, slot, size, imported)
        kept = {key: value for key, value in slot.sizes[size].network.config(slot.sigma_data).items() if key in KEPT}
        write(teacher, ctx.out, kept, {"run": ctx.run_id, "sigma_data": slot.sigma_data})
        return
    wanted = slot.teacher_for(size)
    seed = derive_seed(ctx.scale.seed, ctx.job.name)
    data = load_data(ctx)
    network = slot.sizes[size].network
    config = {
        **network.config(slot.sigma_data),
        **network.dropout(wanted),
        "channels": data.shape[0],
        "resolution": data.shape[1],
        "labels": slot.dataset.labels,
    }
    torch.manual_seed(derive_seed(seed, "init"))
    net = build_network(config)
    logvar = LogVarHead(bias=-2 * math.log(slot.sigma_data))  # F = 0 errs by σ_d² per element
    objective = DiffusionObjective(net, logvar, slot.sigma_data, wanted.P_mean, wanted.P_std, wanted.label_dropout)
    engine = slot.sizes[size].engine
    settings = train_settings(wanted, seed, engine, config.get("precision", "fp32"))
    grids = grid_sampler(ctx, config, data, lambda net, noise, labels: samples(slot, None, net, [noise], labels, None))
    state = run_training(ctx, settings, net, objective, data, heads={"logvar": logvar}, sample=grids, engine=engine)
    grids(state)  # not left to the loop: a job killed after its last checkpoint has no iteration to run
    save_average(ctx, state, config, sigma_data=slot.sigma_data)
