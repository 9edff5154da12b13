# SPDX-License-Identifier: Apache-2.0
"""`python -m pipeline` as a user types it: exit codes, one sentence for each mistake, and a plan."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import plan, registry
from pipeline.__main__ import main
from pipeline.manifest import fingerprint
from pipeline.params import load

ROOT = Path(__file__).resolve().parents[2]
Cli = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    """Runs the command line in an empty repository: just params.yaml."""
    shutil.copy(ROOT / "params.yaml", tmp_path)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pipeline", *arguments],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
            capture_output=True,
            text=True,
            timeout=60,
        )

    return run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("rnu",), "rnu: unknown command; did you mean 'run'?"),
        (("run", "studnet"), "studnet: unknown stage; did you mean 'student'?"),
        (("run", "teacher"), "slot: stage teacher needs this axis"),
        (("run", "teacher", "slot=latent_guided", "size=XL"), "size=XL: unknown size"),
        (("run", "teacher", "slot=latent_guided", "size=S", "size=M"), "size: is given twice"),
        (("run", "teacher", "slot=latent_guided", "size"), "size: not of the form axis=value"),
        (("run", "teacher", "scale=smok"), "scale=smok: unknown scale; did you mean 'smoke'?"),
        (
            ("run", "dataset", "slot=latent_guided", "--launcher", "slurmm"),
            "slurmm: unknown launcher; did you mean 'slurm'?",
        ),
        (("run", "teacher", "--bogus"), "--bogus"),
        (("plan", "reports/table9.csv"), "reports/table9.csv: unknown target"),
        (("plan", "--cores", "0"), "--cores 0: must be at least 1"),
        (("plan", "--gpus", "0", "--scale", "paper"), "--gpus 0: must be at least 1"),
        (("plan", "--gpus", "8"), "--gpus 8: scale demo has no section hardware, so its jobs use no GPUs"),
        (("sample", "student-latent_guided-M-scdd"), "no teacher or student of scale demo; did you mean"),
        (("sample", "teacher-latent_guided-S"), "not trained yet; run it with: python -m pipeline run teacher"),
    ],
)
def test_mistakes_get_one_sentence_and_exit_code_2(cli: Cli, arguments: tuple[str, ...], words: str) -> None:
    done = cli(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert re.fullmatch(r"error: [^\n]+\n", done.stderr), done.stderr
    assert done.stdout == ""


def test_a_fault_in_params_is_named_before_anything_is_made(cli: Cli, tmp_path: Path) -> None:
    text = (tmp_path / "params.yaml").read_text()
    (tmp_path / "params.yaml").write_text(text.replace("batch: 64 ", "batch: 0 ", 1))
    done = cli("run", "dataset", "slot=latent_guided")
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: params.yaml: scales.demo.slots.latent_guided.teacher.batch: must be at least 1"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["params.yaml"]


def test_outside_the_repository(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "params.yaml").unlink()
    done = cli("plan")
    assert done.returncode == 2
    assert "params.yaml" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("watch", "--", "true"), "error: watch: runs/.logs: "),
        (("watch", "--", "./params.yaml"), "error: watch: ./params.yaml: cannot be run: Permission denied"),
        (("trace", "runs/x.csv", "1"), "error: trace: runs/x.csv: a file is where a folder belongs"),
    ],
)
def test_what_the_system_refuses_is_one_sentence(
    cli: Cli, tmp_path: Path, command: tuple[str, ...], words: str
) -> None:
    if "true" in command or "trace" in command:
        (tmp_path / "runs").write_text("a file where a folder belongs")
    done = cli(*command)
    assert done.returncode == 2
    assert done.stderr.startswith(words), done.stderr
    assert done.stderr.count("\n") == 1, done.stderr


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    text = capsys.readouterr().out
    for command in ("run", "plan", "status", "trace", "doctor", "watch", "sync", "schema", "dvc"):
        assert re.search(rf"^  {command} ", text, re.MULTILINE), command


def test_plan_of_a_fresh_clone(cli: Cli) -> None:
    done = cli("plan", "reports/table2.csv", "--cores", "2")
    assert done.returncode == 0
    assert "23 of 23 jobs to do" in done.stdout
    assert "figure2" not in done.stdout
    assert "estimated" in done.stdout
    assert re.search(r"^longest path .*: dataset-latent_guided → .* → table2$", done.stdout, re.MULTILINE)


def test_plan_uses_the_times_of_finished_runs(cli: Cli, tmp_path: Path) -> None:
    """Of the very same job: with other parameters it is another one, and takes another time."""
    params = load(tmp_path / "params.yaml")
    job = registry.find(params, "dataset", {"slot": "latent_guided"})
    record = tmp_path / "runs/demo/.records/dataset-latent_guided.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"seconds": 3725.0, "fingerprint": fingerprint(job, params, {})}))
    text = cli("plan", "vae").stdout
    assert re.search(r"^dataset-latent_guided +to do +1 h 02 min .* measured$", text, re.MULTILINE), text
    assert re.search(r"^vae-latent_guided .* estimated$", text, re.MULTILINE), text
    file = tmp_path / "params.yaml"
    file.write_text(file.read_text().replace("source: mnist5k, resolution: 32", "source: mnist5k, resolution: 16"))
    text = cli("plan", "vae").stdout
    assert re.search(r"^dataset-latent_guided +to do +\d+ s .* estimated$", text, re.MULTILINE), text


def test_finished_jobs_set_the_rate_of_the_others_of_their_stage(cli: Cli, tmp_path: Path) -> None:
    """Half as fast as expected: what is left of the stage takes twice as long, and no other stage does."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    params = load(tmp_path / "params.yaml")
    made = registry.find(params, "dataset", {"slot": "latent_guided"})
    other = dataclasses.replace(made, axes={"slot": "another"}, outputs=(Path("runs/demo/another/dataset"),))
    vae = registry.find(params, "vae", {"slot": "latent_guided"})
    record = tmp_path / "runs/demo/.records/dataset-latent_guided.json"
    record.parent.mkdir(parents=True)
    seconds = 2 * made.resources.seconds
    record.write_text(json.dumps({"seconds": seconds, "fingerprint": fingerprint(made, params, {})}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCM_ROOT", str(tmp_path))
        found = plan.estimates([made, other, vae], params)
    assert found[made.name].source == plan.MEASURED
    assert (found[other.name].source, found[other.name].seconds) == (plan.BY_RATE, seconds)
    assert (found[vae.name].source, found[vae.name].seconds) == (plan.ESTIMATED, vae.resources.seconds)


def test_the_plan_of_the_papers_table(cli: Cli) -> None:
    """Its totals are the sums of its jobs; a teacher's are its FLOPs over what its GPUs are reckoned to do; nothing heavy is loaded."""
    done = cli("plan", "reports/table2.csv", "--scale", "paper", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    jobs = {job["name"]: job for job in found["jobs"]}
    assert len(jobs) == 36
    for key in ("seconds", "gpu_hours", "bytes", "scratch_bytes"):
        assert found["total"][key] == pytest.approx(sum(job[key] for job in jobs.values()), rel=0.001)
    # Table 4: 376k iterations of 2048; 3 passes of 2 · 547 GFLOP (EDM2 counts 552, a multiplication and its addition as one)
    hours = 376_000 * 2048 * 3 * 2 * 547e9 / (0.3 * 989e12) / 3600
    assert jobs["teacher-latent_guided-XXL"]["gpu_hours"] == pytest.approx(hours, rel=0.01)
    assert jobs["dataset-latent_guided"]["bytes"] == 1_281_167 * 3 * 512**2
    assert found["longest_path"]["jobs"][-1] == "table2"
    assert found["elapsed_s"] == found["longest_path"]["seconds"]
    few = json.loads(cli("plan", "reports/table2.csv", "--scale", "paper", "--json", "--gpus", "8").stdout)
    held = sum(job["seconds"] for job in jobs.values() if job["gpus"] == 8)
    assert few["elapsed_s"] >= held
    text = cli("plan", "reports/table2.csv", "--scale", "paper").stdout
    assert re.search(r"^total +36 .* GPU-h +\S+ TB$", text, re.MULTILINE), text
    assert "989 TFLOP/s × 0.3 = 297 TFLOP/s of model FLOPs on each NVIDIA H100 80GB HBM3" in text


def test_makespan_and_longest_path() -> None:
    jobs = registry.jobs(load(ROOT / "params.yaml"))
    seconds = {job.name: 1.0 for job in jobs}
    longest, path = plan.longest_path(jobs, seconds)
    # dataset, vae, latents, teacher, sCD, sCD + VSD which starts as it, evaluate, a figure or table, report
    assert longest == len(path) == 9
    assert plan.makespan(jobs, seconds, cores=1) == len(jobs)
    assert plan.makespan(jobs, seconds, cores=100) == longest
    assert longest <= plan.makespan(jobs, seconds, cores=2) < len(jobs)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3599.6, "1 h 00 min"),
        (12000, "3 h 20 min"),
        (460000, "5.3 days"),
    ],
)
def test_durations(value: float, text: str) -> None:
    assert plan.duration(value) == text
