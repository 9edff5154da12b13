# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of throughput train, and the data they do it with."""

from collections.abc import Callable
from pathlib import Path

from bench_step_cost import ROWS, SIGMA_DATA, Network  # before torch: it sets its threads

# isort: split
import torch
from torch import nn

from pipeline.modelling import Data
from scm_core.data.latents import latent_store, load_latents, save_latents
from scm_core.nn.build import Model, build_network, student_of
from scm_core.nn.embedding import LogVarHead
from scm_core.objectives import Batch, Objective
from scm_core.objectives.diffusion import DiffusionObjective
from scm_core.objectives.methods import METHODS
from scm_core.train.state import TrainSettings, TrainState

STEPS = {"teacher": "", "sCD": "sCD, guided"}  # by their rows in bench_step_cost
LOG_EVERY = 20  # params.yaml, scale demo
LR, SIGMA_REL = 1e-4, 0.05


class Set(nn.Module):
    """What is trained: a network, its weighting head, and an objective of both. Equal weights for equal arguments."""

    def __init__(
        self, network: Network, step: str, engine: str = "auto", device: str = "cpu", compiled: bool = False
    ) -> None:
        super().__init__()
        config = network.config
        torch.manual_seed(0)
        net = build_network(config)
        nn.init.ones_(net.get_parameter("out_gain"))  # as in training: it starts at 0
        head: nn.Module = LogVarHead(0.0)
        run = (lambda module: torch.compile(module)) if compiled else (lambda module: module)
        if step == "teacher":
            self.net = net.to(device)
            self.objective: Objective = DiffusionObjective(run(self.net), head.to(device), SIGMA_DATA, -0.4, 1.0, 0.1)
        else:
            row = ROWS[STEPS[step]]
            teacher = net.eval().requires_grad_(False).to(device)
            student, _ = student_of(Model(net, dict(config), {}), "guidance" in row.options, 0.0)
            self.net = student.to(device)
            shape = (config["channels"], config["resolution"], config["resolution"])
            options = {**row.options, "engine": engine}
            method = METHODS[row.name](run(self.net), run(teacher), SIGMA_DATA, shape, **options)
            head, self.objective = method.heads["logvar"].to(device), method.objective
        self.head = head

    def state(self, iterations: int, batch: int) -> TrainState:
        """The engine's state of it."""
        settings = TrainSettings(iterations, batch, LR, 0, ema_sigma_rel=SIGMA_REL, log_every=LOG_EVERY)
        return TrainState(self.net, settings, {"logvar": self.head})


def some_batch(network: Network) -> Batch:
    """A batch of noise with labels."""
    shape = (network.config["channels"], network.config["resolution"], network.config["resolution"])
    generator = torch.Generator().manual_seed(0)
    x0 = SIGMA_DATA * torch.randn(network.batch, *shape, generator=generator)
    labels = torch.randint(network.config["labels"], (network.batch,), generator=generator)
    return Batch(x0, labels, torch.arange(network.batch))


def stored(network: Network, images: int, folder: Path) -> Callable[[int], Batch]:
    """The batches of a set of latents in files, as a pipeline's stage has them."""
    shape = (network.config["channels"], network.config["resolution"], network.config["resolution"])
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(images, *shape, generator=generator)
    labels = torch.randint(network.config["labels"], (images,), generator=generator)
    save_latents(latent_store(mean, torch.full_like(mean, 0.1), labels, SIGMA_DATA, "noise"), folder)
    store = load_latents(folder, verify=False)
    return Data(store.sample, store.labels, len(store), store.shape).batches(TrainSettings(1, network.batch, LR, 0))
