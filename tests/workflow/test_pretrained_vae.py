# SPDX-License-Identifier: Apache-2.0
"""A published autoencoder in a repository as a user has it: processes that share the encoding, and a kill in the middle of it."""

import hashlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from scm_core.compat import prepare_torchvision

pytestmark = pytest.mark.slow
SLOT = Path("runs/smoke/latent_guided")


@pytest.fixture
def repository(repo_copy: Path) -> Path:
    """Scale smoke with an autoencoder that diffusers saved in a folder of the repository."""
    prepare_torchvision()
    diffusers = pytest.importorskip("diffusers")
    network = diffusers.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        latent_channels=4,
        norm_num_groups=4,
    )
    network.save_pretrained(repo_copy / "own/vae")
    digest = hashlib.sha256((repo_copy / "own/vae/diffusion_pytorch_model.safetensors").read_bytes()).hexdigest()
    section = {"pretrained": "own/vae", "sha256": digest, "latent_channels": 4, "downsampling": 4}
    change(repo_copy, vae={**section, "statistics": "measured", "engine": {"batch": 50}})
    return repo_copy


def change(repository: Path, **sections: Any) -> None:
    """Lay sections over those of the slot."""
    params = yaml.safe_load((repository / "params.yaml").read_text())
    slot = params["scales"]["smoke"]["slots"]["latent_guided"]
    for name, value in sections.items():
        slot[name] = value if name == "vae" else {**slot[name], **value}
    (repository / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def command(stage: str) -> list[str]:
    return [sys.executable, "-m", "pipeline", "run", stage, "scale=smoke", "slot=latent_guided"]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_processes_share_the_encoding_and_a_kill_costs_nothing(
    repository: Path, user_env: Callable[[Path], dict[str, str]]
) -> None:
    env = {**user_env(repository), "SCM_TRACKING": "off"}

    def run(stage: str) -> None:
        done = subprocess.run(
            command(stage), cwd=repository, env=env, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    for stage in ("vae", "dataset", "features", "reference", "latents", "reconstruction"):
        run(stage)
    alone = files(repository / SLOT / "latents")
    floor = json.loads((repository / SLOT / "reconstruction/reconstruction.json").read_text())

    # two processes, whose number is no part of what a result is known by; all are killed while they encode
    params = yaml.safe_load((repository / "params.yaml").read_text())
    section = params["scales"]["smoke"]["slots"]["latent_guided"]["vae"]
    change(repository, vae={**section, "engine": {"batch": 50, "processes": 2}}, evaluation={"processes": 2})
    for name in ("latents", "reconstruction"):
        (repository / SLOT / name).rename(repository / f"{name}-alone")
    started = subprocess.Popen(command("latents"), cwd=repository, env=env, start_new_session=True)
    progress = repository / "runs/smoke/.work/latents-latent_guided/progress.json"
    deadline = time.monotonic() + 120
    while not progress.exists() or not json.loads(progress.read_text())["done"]:
        assert started.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    subprocess.run(["kill", f"-{int(signal.SIGKILL)}", "--", f"-{started.pid}"], check=True)
    started.wait(30)
    assert not (repository / SLOT / "latents").exists()
    run("latents")
    assert files(repository / SLOT / "latents") == alone
    run("reconstruction")
    assert json.loads((repository / SLOT / "reconstruction/reconstruction.json").read_text()) == floor
