# SPDX-License-Identifier: Apache-2.0
"""Table 2 at scale smoke, from nothing, in three copies side by side: on this machine, through SLURM by Snakemake, through SLURM by DVC."""

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytestmark = pytest.mark.slow

TABLES = ("reports/table2.csv", "reports/table2.md")
SNAKEMAKE = ("snakemake", "reports/table2.csv", "--profile")
COMMANDS = {
    "local": (*SNAKEMAKE, "cluster/local", "--config", "scale=smoke"),
    "snakemake": (*SNAKEMAKE, "cluster/slurm", "--config", "scale=smoke"),
    "dvc": ("dvc", "repro", "table2"),
}
LIMIT_S = 2400  # on two cores shared with other tests; five minutes alone


class Copies(NamedTuple):
    """The copies by what ran in them, and their environments."""

    paths: dict[str, Path]
    envs: dict[str, dict[str, str]]

    def records(self, name: str) -> list[dict[str, Any]]:
        """What the jobs of a copy have left about where they ran."""
        files = self.paths[name].glob("runs/smoke/.records/*.json")
        return [json.loads(file.read_text()) for file in sorted(files) if not file.name.endswith(".manifest.json")]


@pytest.fixture(scope="module")
def copies(
    plain_slurm: Any,
    tmp_path_factory: pytest.TempPathFactory,
    copy_repository: Callable[[Path], Path],
    user_env: Callable[[Path], dict[str, str]],
) -> Iterator[Copies]:
    plain_slurm.idle()
    folder = tmp_path_factory.mktemp("pipeline")
    paths = {name: copy_repository(folder / name) for name in COMMANDS}
    envs = {name: {**user_env(path), "SLURM_CONF": str(plain_slurm.conf)} for name, path in paths.items()}
    for env in envs.values():
        env["SCM_TRACKING"] = "off"  # it costs time; tests/workflow has it
    envs["dvc"]["SCM_LAUNCHER"] = "slurm"
    params = paths["dvc"] / "params.yaml"
    params.write_text(re.sub(r"^scale: \w+", "scale: smoke", params.read_text(), flags=re.MULTILINE))
    made = subprocess.run(
        ["python", "-m", "pipeline", "dvc"],
        cwd=paths["dvc"],
        env=envs["dvc"],
        capture_output=True,
        text=True,
        check=True,
    )
    (paths["dvc"] / "dvc.yaml").write_text(made.stdout)
    started = {}
    for name, command in COMMANDS.items():
        with (folder / f"{name}.log").open("wb") as log:
            started[name] = subprocess.Popen(
                command, cwd=paths[name], env=envs[name], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
    try:
        for name, process in started.items():
            code = process.wait(LIMIT_S)
            assert code == 0, f"{name} ended with {code}:\n{(folder / f'{name}.log').read_text()[-3000:]}"
        yield Copies(paths, envs)
    finally:
        for process in started.values():
            process.terminate()  # which cancels its jobs
            process.wait(60)


def test_the_same_bytes_through_slurm_by_both_engines_as_on_this_machine(copies: Copies) -> None:
    for table in TABLES:
        expected = (copies.paths["local"] / table).read_bytes()
        for name in ("snakemake", "dvc"):
            assert (copies.paths[name] / table).read_bytes() == expected, (name, table)


def test_every_job_was_a_job_of_slurm_and_none_was_submitted_twice(copies: Copies) -> None:
    jobs = {record["name"] for record in copies.records("local")}
    assert {record["launcher"] for record in copies.records("local")} == {"local"}
    for name in ("snakemake", "dvc"):
        records = {record["name"]: record for record in copies.records(name)}
        assert records.keys() == jobs
        assert {record["launcher"] for record in records.values()} == {"slurm"}
        log = copies.paths[name].with_suffix(".log").read_text()
        submitted = re.findall(r"^(\S+): submitted \(SLURM job (\d+)", log, flags=re.MULTILINE)
        assert sorted(submitted) == sorted((job, record["job_id"]) for job, record in records.items())


def test_a_second_run_has_nothing_to_do(copies: Copies) -> None:
    for name, words in (("snakemake", "Nothing to be done"), ("dvc", "Data and pipelines are up to date")):
        done = subprocess.run(
            COMMANDS[name], cwd=copies.paths[name], env=copies.envs[name], capture_output=True, text=True, check=True
        )
        assert words in done.stdout + done.stderr, name
