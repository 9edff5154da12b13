# SPDX-License-Identifier: Apache-2.0
"""`python -m pipeline export RUN -o DIR`: a trained model for others, with a model card."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import manifest, paths
from pipeline.cli import Parser
from pipeline.errors import PipelineError
from pipeline.job import Job
from pipeline.params import PARAMS_FILE, Params, load
from pipeline.sample import find_trained
from pipeline.students import MultistepTraining

if TYPE_CHECKING:
    from scm_core.interop.export import Latents, Sampling


def main(argv: list[str]) -> int:
    """Write a folder with the weights, in one file or as a pipeline of diffusers, and README.md."""
    parser = Parser(prog="python -m pipeline export", description="Export a trained model, with a model card.")
    parser.add_argument(
        "run", metavar="RUN", help="a job such as student-latent_guided-M-scd, its run id, or its folder"
    )
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="a new folder")
    parser.add_argument(
        "--format", choices=("safetensors", "diffusers"), default="safetensors", help="default: %(default)s"
    )
    parser.add_argument("--scale", help="of params.yaml (default: the active one)")
    options = parser.parse_args(argv)
    params = load(paths.root() / PARAMS_FILE, options.scale)
    job, output = find_trained(options.run, params), Path(options.output)
    if output.exists():
        raise PipelineError(f"{output}: is there already; name a new folder, or remove it")
    if job.stage == "teacher" and options.format == "diffusers":
        raise PipelineError(f"{job.name}: a diffusers pipeline is made of a student; use --format safetensors")
    export(job, params, output, options.format)
    print(output)
    return 0


def export(job: Job, params: Params, output: Path, form: str) -> None:
    """The folder, whole or not at all."""
    folder = paths.root() / job.outputs[0]
    made = manifest.read(folder / paths.MANIFEST)
    if made is None:
        raise PipelineError(f"{job.name}: not trained yet; run it with: {job.command}")
    from pipeline.cards import Subject, card
    from pipeline.modelling import MODEL
    from scm_core.interop.export import export_diffusers, export_safetensors
    from scm_core.nn.build import count_parameters, load_model

    model = load_model(folder / MODEL)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as place:
        draft = Path(place) / output.name
        draft.mkdir()
        if form == "diffusers":
            try:
                export_diffusers(model, *_sampling(job, params), draft)
            except ValueError as error:
                raise PipelineError(f"{job.name}: {error}") from error
        else:
            export_safetensors(folder / MODEL, model, draft)
        subject = Subject(job, params, made, model.info, count_parameters(model.net), form)
        (draft / "README.md").write_text(card(subject), encoding="utf-8")
        draft.rename(output)


def _sampling(job: Job, params: Params) -> tuple[Sampling, Latents | None]:
    """How params.yaml samples a student, and its latents."""
    from pipeline.generation import consistency_times
    from pipeline.modelling import VAE_FILE
    from scm_core.data import load_latents
    from scm_core.interop.export import Latents, Sampling
    from scm_core.nn.build import load_model

    slot = params.active.slots[job.axes["slot"]]
    student = slot.student_for(job.axes["size"], job.axes["method"])
    if isinstance(student, MultistepTraining):
        sampling = Sampling(slot.sigma_data, consistency_times(slot, 1), student.segments)
    else:
        sampling = Sampling(slot.sigma_data, consistency_times(slot, max(student.steps)))
    if not slot.vae:
        return sampling, None
    inputs = {name: paths.root() / path for name, path in job.inputs.items()}
    store = load_latents(inputs["latents"])
    vae = load_model(inputs["vae"] / VAE_FILE)
    return sampling, Latents(vae, store.channel_mean.tolist(), store.channel_std.tolist())
