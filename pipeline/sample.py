# SPDX-License-Identifier: Apache-2.0
"""`python -m pipeline sample RUN -o grid.png`: look at samples of a trained model."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline import manifest, paths, registry
from pipeline.cli import Parser
from pipeline.errors import PipelineError, suggestion
from pipeline.job import Job
from pipeline.params import PARAMS_FILE, Params, load

TRAINED = ("teacher", "student")
RUN_ID = re.compile(r"(.+)-[0-9a-f]{8}")  # as `manifest.run_id` makes it


def main(argv: list[str]) -> int:
    """Write a grid with one column for each label and fresh noise in each row; the same command gives the same picture."""
    parser = Parser(prog="python -m pipeline sample", description="Draw samples of a trained teacher or student.")
    parser.add_argument(
        "run", metavar="RUN", help="a job such as student-latent_guided-M-scd, its run id, or its folder"
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", default="samples.png", help="a PNG file (default: %(default)s)"
    )
    parser.add_argument("--scale", help="of params.yaml (default: the active one)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: none)")
    parser.add_argument(
        "--steps", type=int, choices=(1, 2), help="of consistency sampling (default: the most the student is made for)"
    )
    parser.add_argument("--rows", type=int, default=4, help="samples of each label (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="index of the first sample's noise (default: %(default)s)")
    options = parser.parse_args(argv)
    params = load(paths.root() / PARAMS_FILE, options.scale)
    job = find_trained(options.run, params)
    require_result(options.run, job)
    folder = paths.root() / job.outputs[0]
    if options.rows < 1 or options.seed < 0:
        raise PipelineError("--rows must be at least 1 and --seed at least 0")
    draw(job, params, folder, Path(options.output), options.guidance, options.steps, options.rows, options.seed)
    print(options.output)
    return 0


def find_trained(name: str, params: Params) -> Job:
    """The teacher or student that is meant by a job's name, a run id of it, or a folder; `PipelineError` if there is none."""
    trained = {job.name: job for job in registry.jobs(params) if job.stage in TRAINED}
    for job in trained.values():
        of_run = RUN_ID.fullmatch(name)
        if job.name in (name, of_run and of_run[1]) or Path(name) in (job.outputs[0], paths.root() / job.outputs[0]):
            return job
    raise PipelineError(f"{name}: no teacher or student of scale {params.scale}; {suggestion(name, trained, 'models')}")


def require_result(name: str, job: Job) -> None:
    """PipelineError unless the job that `find_trained` found is done, by the run that was meant, and its files are as they were made."""
    made = manifest.read(paths.root() / job.outputs[0] / paths.MANIFEST)
    if made is None:
        raise PipelineError(f"{name}: not trained yet; run it with: {job.command}")
    meant = RUN_ID.fullmatch(name)
    if meant and meant[1] == job.name and name != made.get("run"):
        raise PipelineError(f"{name}: this run's result is not here any more; {job.outputs[0]} holds {made.get('run')}")
    if wrong := manifest.fault(job, made):
        raise PipelineError(f"{wrong}; make it again with: {job.command}, then `make sync`")


def draw(
    job: Job,
    params: Params,
    folder: Path,
    output: Path,
    guidance: float | None,
    steps: int | None,
    rows: int,
    seed: int,
) -> None:
    """Sample, decode and write the grid."""
    slot = params.active.slots[job.axes["slot"]]
    student = slot.student_for(job.axes["size"], job.axes["method"]) if job.stage == "student" else None
    if steps is not None and student is None:
        raise PipelineError("--steps: a teacher samples in evaluation.teacher.steps of params.yaml; leave it out")
    if steps is not None and student is not None and steps not in student.steps:
        raise PipelineError(
            f"--steps: {job.name} samples in {' or '.join(map(str, student.steps))} steps; leave it out"
        )
    import torch

    from pipeline.generation import noise_of, samples
    from pipeline.grids import save_grid
    from pipeline.modelling import MODEL, Decoder
    from scm_core.nn.build import load_model

    model = load_model(folder / MODEL)
    if guidance is not None and student is not None and not model.config["guidance_input"]:
        raise PipelineError(f"--guidance: {job.name} was trained without guidance; leave it out")
    if guidance is not None and not slot.dataset.labels:
        raise PipelineError("--guidance: this slot has no labels to guide by; leave it out")
    if guidance is None and student is not None and model.config["guidance_input"]:
        guidance = 1.0
    columns = slot.dataset.labels or 10
    labels = torch.arange(columns).repeat(rows)
    indices = range(seed, seed + len(labels))
    shape = tuple(model.config[key] for key in ("channels", "resolution", "resolution"))
    noise = noise_of(student, indices, shape, steps or (max(student.steps) if student else 1))
    # those of its evaluation: an imported teacher needs no latents to be made, and some to be looked at
    axes = {"method": "teacher", **job.axes}
    inputs = registry.find(params, "evaluate", axes).inputs
    decode = Decoder(slot, {name: paths.root() / path for name, path in inputs.items()})
    save_grid(decode(samples(slot, student, model.net, noise, labels, guidance)), output, columns)
