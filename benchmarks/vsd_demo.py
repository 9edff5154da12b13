# SPDX-License-Identifier: Apache-2.0
"""For bench_vsd.py: the demo's networks of one size, its data, its measure, and how students are trained here."""

import os
import sys
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from pipeline import params, registry  # noqa: E402
from pipeline.evaluation import load_references, numbers  # noqa: E402
from pipeline.generation import noise_of, samples  # noqa: E402
from pipeline.modelling import MODEL, Data, Decoder  # noqa: E402
from pipeline.spaces import load_extractor  # noqa: E402
from scm_core.data import load_latents  # noqa: E402
from scm_core.nn.build import load_model, student_of  # noqa: E402
from scm_core.train.schedule import Schedule  # noqa: E402
from scm_core.train.state import TrainSettings  # noqa: E402

SLOT, SPACE = "latent_guided", "classifier"
SCALES = (1.0, 2.0)  # that students are trained on
TANGENT = {"P_mean": -1.0, "P_std": 1.4}  # params.yaml, scale demo
RAMP_UP, FINAL, DECAY = 50, 0.03, 0.3
FAKE: dict[str, Any] = {"fake_lr": 6e-3, "vsd_delay": 400}
CHUNK = 500  # samples at once


class Demo:
    """The demo's networks of one size, its data and its measure."""

    def __init__(self, size: str) -> None:
        found = params.load(ROOT / "params.yaml", "demo")
        self.slot = found.active.slots[SLOT]
        job = registry.find(found, "evaluate", {"slot": SLOT, "size": size, "method": "scd"})
        inputs = {name: ROOT / path for name, path in job.inputs.items()}
        teacher = registry.find(found, "teacher", {"slot": SLOT, "size": size}).outputs[0]
        self.teacher, self.student = load_model(ROOT / teacher / MODEL), load_model(inputs["student"] / MODEL)
        self.store = load_latents(inputs["latents"])
        self.data = Data(self.store.sample, self.store.labels, len(self.store), self.store.shape)
        self.decode, self.extract = Decoder(self.slot, inputs), load_extractor(SPACE, inputs)
        self.reference = load_references([SPACE], inputs["reference"])[SPACE]
        self.scd, self.sigma_data = self.slot.student_for(size, "scd"), self.slot.sigma_data

    @torch.no_grad()
    def measure(self, net: nn.Module, scale: float, first: int, steps: int = 1) -> dict[str, float]:
        """FID, precision and recall, with their errors, of samples `first` and following."""
        features = []
        for start in range(first, first + self.slot.evaluation.samples, CHUNK):
            indices = range(start, start + CHUNK)
            labels = torch.tensor([i % self.slot.dataset.labels for i in indices])
            noise = noise_of(self.scd, indices, self.data.shape, steps)
            x0 = samples(self.slot, self.scd, net, noise, labels, scale)
            features.append(self.extract(self.decode(x0)))
        found = numbers(torch.cat(features), self.reference, self.slot.evaluation)
        keys = ("fid", "precision", "recall")
        return {key: round(float(found[key] or 0.0), 5) for key in (*keys, *(f"{name}_se" for name in keys))}

    def copy_of_scd(self) -> nn.Module:
        """The sCD student, to be trained."""
        net, _ = student_of(self.teacher, guidance_input=True, dropout=0.0)
        net.load_state_dict(self.student.net.state_dict())
        return net


def settings(iterations: int, lr: float, seed: int, ema: float | None = None) -> TrainSettings:
    """Those of all cases."""
    schedule = Schedule("linear", start=DECAY, final=FINAL, ramp_up=RAMP_UP)
    return TrainSettings(iterations, 64, lr, seed, schedule=schedule, head_lr=1e-2, ema_sigma_rel=ema)
