# SPDX-License-Identifier: Apache-2.0
"""The profile cluster/slurm-native: stages inside jobs of Snakemake's own SLURM executor, an extra (skipped where it is not installed)."""

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

PLUGIN = importlib.util.find_spec("snakemake_executor_plugin_slurm")
STAGE = "runs/smoke/latent_guided/dataset"


@pytest.mark.skipif(PLUGIN is None, reason='needs pip install -e ".[slurm-native]"')
def test_a_stage_in_a_job_of_snakemakes_own(slurm: Any, repo_copy: Path, user_env: Any, tmp_path: Path) -> None:
    assert PLUGIN is not None
    assert PLUGIN.origin is not None
    env = user_env(repo_copy)
    # The plugin takes SLURM_CONF from the job's environment, which a cluster without /etc/slurm/slurm.conf needs.
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "srun").write_text(f'#!/bin/sh\nSLURM_CONF={slurm.conf} exec {shutil.which("srun")} "$@"\n')
    (programs / "srun").chmod(0o755)
    env |= {
        "PATH": os.pathsep.join([str(programs), env["PATH"]]),
        "PYTHONPATH": os.pathsep.join([env["PYTHONPATH"], str(Path(PLUGIN.origin).parents[1])]),
        "SLURM_CONF": str(slurm.conf),
        "SCM_TRACKING": "off",
    }
    command = ["snakemake", "--profile", "cluster/slurm-native", "--slurm-init-seconds-before-status-checks", "2"]
    command += ["--default-resources", "slurm_partition=main", "nodes=1", "--config", "scale=smoke", "--", STAGE]
    done = subprocess.run(command, cwd=repo_copy, env=env, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert (repo_copy / STAGE / "manifest.json").is_file()
    assert [state for _, state in slurm.jobs().values()][-1:] == ["COMPLETED"]
