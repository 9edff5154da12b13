# SPDX-License-Identifier: Apache-2.0
"""Stage gallery: uncurated samples of each model with each number of steps, over the guidance scales, from the same noise."""

import json

import torch

from pipeline.context import Context
from pipeline.generation import noise_of, samples, student_of_job
from pipeline.grids import save_grid
from pipeline.modelling import MODEL, Decoder
from pipeline.page import grid_shape, shown_models
from pipeline.students import TEACHER
from pipeline.webpage.pictures import INDEX
from scm_core.nn.build import load_model
from scm_core.train.distributed import own_device


def run(ctx: Context) -> None:
    """Write a PNG file for each model, number of steps and scale, and grids.json, which lists them (`pipeline.webpage.pictures`)."""
    slot, name, device = ctx.slot, ctx.job.axes["slot"], own_device()
    decode, how = Decoder(slot, ctx.inputs, device), slot.evaluation
    rows, columns = grid_shape(slot)
    indices = range(rows * columns)
    labels = torch.arange(columns).repeat(rows).to(device)
    classes = f"columns are the classes 0 to {columns - 1}" if slot.dataset.labels else "unlabelled"
    entries = []
    models = list(shown_models(slot))
    progress = ctx.progress(len(models), "models")
    for done, (size, method) in enumerate(models, 1):
        given = f"teacher-{size}" if method == TEACHER else f"student-{size}-{method}"
        model, student = load_model(ctx.inputs[given] / MODEL), student_of_job(slot, size, method)
        model.net.to(device)
        shape = tuple(model.config[key] for key in ("channels", "resolution", "resolution"))
        guided = bool(model.config["guidance_input"]) if student else slot.dataset.labels > 0
        for steps in student.steps if student else (how.teacher.steps,):
            noise = [z.to(device) for z in noise_of(student, indices, shape, steps)]
            for scale in how.guidance if guided else (None,):
                file = f"{method}-{size}-{steps}-{'unguided' if scale is None else f'{scale:g}'}.png"
                save_grid(
                    decode(samples(slot, student, model.net, noise, labels, scale)).cpu(),
                    ctx.out / file,
                    columns,
                    zoom=1,
                )
                entry = {
                    "slot": name,
                    "size": size,
                    "method": method,
                    "steps": steps,
                    "guidance": scale,
                    "seed": indices[0],
                }
                entries.append({**entry, "file": file, "arrangement": classes, "run": ctx.input_runs[given]})
        progress.update(done)
    progress.close()
    index = {"format": 1, "grids": entries}
    (ctx.out / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    ctx.tracker.log_artifact(ctx.out / INDEX)
