# SPDX-License-Identifier: Apache-2.0
"""Snakemake and DVC see the DAG of the registry, and Snakemake says what is wrong in one sentence."""

import fcntl
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline import registry
from pipeline.params import load
from pipeline.stale import clear_stale_locks

ROOT = Path(__file__).resolve().parents[2]
Edges = set[tuple[str, str]]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, copy_repository: Callable[[Path], Path]) -> Path:
    """One copy for all tests here: none of them makes anything."""
    return copy_repository(tmp_path_factory.mktemp("engines") / "repository")


@pytest.fixture
def run(
    repository: Path, user_env: Callable[[Path], dict[str, str]]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    def command(*words: str, root: Path = repository) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, cwd=root, env=user_env(root), capture_output=True, text=True, timeout=120)

    return command


Run = Callable[..., subprocess.CompletedProcess[str]]


def registry_edges(repository: Path, scale: str | None = None) -> tuple[set[str], Edges]:
    jobs = registry.jobs(load(repository / "params.yaml", scale))
    return {job.name for job in jobs}, {(up.name, job.name) for job in jobs for up in registry.parents(job, jobs)}


def snakemake_edges(text: str, repository: Path, scale: str | None = None) -> tuple[set[str], Edges]:
    """Edges from the files that a dry run says each rule reads and writes."""
    jobs = registry.jobs(load(repository / "params.yaml", scale))
    job_of = {str(path): job.name for job in jobs for path in job.outputs}
    edges: Edges = set()
    names: set[str] = set()
    for block in re.split(r"^(?:local)?rule ", text, flags=re.MULTILINE)[1:]:
        files = {
            kind: found[1].split(", ") if (found := re.search(rf"^    {kind}: (.*)$", block, re.MULTILINE)) else []
            for kind in ("input", "output")
        }
        here = {job_of[name] for name in files["output"]}
        names |= here
        edges |= {(job_of[name], below) for name in files["input"] if name in job_of for below in here}
    return names, edges


@pytest.mark.slow
def test_registry_snakemake_and_dvc_have_the_same_edges(repository: Path, run: Run) -> None:
    names, edges = registry_edges(repository)
    assert len(edges) > 50
    dry = run("snakemake", "-n", "-F", "--profile", "cluster/local")
    assert dry.returncode == 0, dry.stderr
    assert snakemake_edges(dry.stdout + dry.stderr, repository) == (names, edges)
    dag = run("dvc", "dag", "--dot")
    assert dag.returncode == 0, dag.stderr
    assert set(re.findall(r'"([^"]+)" -> "([^"]+)"', dag.stdout)) == edges
    assert set(re.findall(r'"([^"]+)"', dag.stdout)) == names


@pytest.mark.slow
def test_the_profile_of_slurm_plans_the_papers_jobs(repository: Path, run: Run) -> None:
    """All of them, with the GPUs that they ask for."""
    dry = run("snakemake", "-n", "--profile", "cluster/slurm")
    assert dry.returncode == 0, dry.stderr
    text = dry.stdout + dry.stderr
    names, edges = registry_edges(repository, "paper")
    assert len(names) > 150
    assert snakemake_edges(text, repository, "paper") == (names, edges)
    teacher = text[text.index("rule teacher:") :]
    assert re.search(r"threads: 64\n    resources: .*gpu=8, runtime=1440", teacher)


@pytest.mark.slow
def test_dvc_has_the_papers_jobs_too(repository: Path, tmp_path: Path, run: Run) -> None:
    """dvc.yaml is generated for the active scale. With another one active DVC reads its sections through aliases and merges."""
    own = tmp_path / "repository"
    shutil.copytree(repository, own, symlinks=True, ignore=shutil.ignore_patterns("runs", ".snakemake"))
    params = own / "params.yaml"
    params.write_text(params.read_text().replace("\nscale: demo\n", "\nscale: paper\n"))
    names, edges = registry_edges(own)
    generated = run("python", "-m", "pipeline", "dvc", root=own)
    (own / "dvc.yaml").write_text(generated.stdout)
    dag = run("dvc", "dag", "--dot", root=own)
    assert dag.returncode == 0, dag.stderr
    assert set(re.findall(r'"([^"]+)" -> "([^"]+)"', dag.stdout)) == edges
    assert set(re.findall(r'"([^"]+)"', dag.stdout)) == names
    read = run("dvc", "params", "diff", "--all", "--json", "--targets", "params.yaml", root=own)
    assert read.returncode == 0, read.stderr
    assert '"scales.paper.slots.latent_guided.students.dscd_512.tangent_c"' in read.stdout


@pytest.mark.slow
def test_snakemake_runs_exactly_the_commands_of_the_registry(repository: Path, run: Run) -> None:
    dry = run("snakemake", "-n", "-F", "-p", "--profile", "cluster/local", "--config", "scale=smoke")
    commands = re.findall(
        r"^ *(?:Shell command: *)?(python -m pipeline run .*?) *$", dry.stdout + dry.stderr, re.MULTILINE
    )
    assert sorted(commands) == sorted(job.command for job in registry.jobs(load(repository / "params.yaml", "smoke")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (("scale=smok",), "error: scale=smok: unknown scale; did you mean 'smoke'?"),
        (("scal=smoke",), "error: --config scal=smoke: unknown key; did you mean 'scale'?"),
        (("launcher=slrm",), "error: --config launcher=slrm: unknown launcher; did you mean 'slurm'?"),
    ],
)
def test_snakemake_refuses_wrong_config_in_one_sentence(run: Run, config: tuple[str, ...], sentence: str) -> None:
    done = run("snakemake", "-n", "--cores", "1", "--config", *config)
    assert done.returncode != 0
    assert done.stderr.strip() == sentence


@pytest.mark.slow
def test_the_launcher_of_the_environment_wins_over_the_profile(run: Run) -> None:
    """The profile always names one; that SCM_LAUNCHER is refused shows that it is the one that counts."""
    words = ("env", "SCM_LAUNCHER=slrm", "snakemake", "-n", "--profile", "cluster/local")
    said = run(*words).stderr.strip().splitlines()
    assert said[-1] == "error: SCM_LAUNCHER=slrm: unknown launcher; did you mean 'slurm'?"
    assert run("env", "SCM_LAUNCHER=inline", *words[2:], "--config", "launcher=slrm").returncode == 0


@pytest.mark.slow
def test_snakemake_names_a_fault_in_params(repository: Path, run: Run) -> None:
    file = repository / "params.yaml"
    text = file.read_text()
    try:
        file.write_text(text.replace("label_dropout: 0.1", "label_dropout: -1", 1))
        done = run("snakemake", "-n", "--cores", "1")
    finally:
        file.write_text(text)
    assert done.returncode != 0
    key = "scales.demo.slots.latent_guided.teacher.label_dropout"
    assert done.stderr.strip() == f"error: params.yaml: {key}: must be at least 0, got -1"


@pytest.fixture
def measured(repository: Path) -> Iterator[list[Path]]:
    """The folders of all trainings and evaluations of the scale that params.yaml names, with a few made-up numbers in them."""
    made = []
    for number, job in enumerate(registry.jobs(load(repository / "params.yaml"))):
        folder = repository / job.outputs[0]
        if job.stage not in ("teacher", "student", "evaluate", "reconstruction"):
            continue
        folder.mkdir(parents=True)
        made.append(folder)
        (folder / "metrics.json").write_text(json.dumps({"1-step": {"fid": number}}))
        (folder / "training.csv").write_text(f"nimg,loss\n64,{number}\n128,{number + 1}\n")
        (folder / "summary.csv").write_text(f"nimg,steps,guidance,fid,fid_se\n128,1,1.0,{number},0.5\n")
        (folder / "sweep.csv").write_text(
            f"phase,steps,guidance,ema,nimg,fid,fid_se\nselect,1,1.0,,,{number},0.5\nselect,1,1.5,,,{number},0.5\n"
        )
    yield made
    shutil.rmtree(repository / "runs")


def parts(repository: Path, made: list[Path], stage: str) -> dict[str, str]:
    """The folders of a stage, relative to the repository and to the others of their slot and size."""
    folders = [folder.relative_to(repository) for folder in made if stage in folder.parts]
    return {folder.as_posix(): folder.name for folder in folders}


@pytest.mark.slow
def test_dvc_shows_the_metrics_of_every_evaluation(repository: Path, run: Run, measured: list[Path]) -> None:
    """Of the scale that params.yaml names, from files in the evaluations' folders."""
    shown = json.loads(run("dvc", "metrics", "show", "--json").stdout)[""]["data"]
    expected = {**parts(repository, measured, "evaluate"), **parts(repository, measured, "reconstruction")}
    assert set(shown) == {f"{folder}/metrics.json" for folder in expected}
    for name, file in shown.items():
        assert file["data"] == json.loads((repository / name).read_text())


@pytest.mark.slow
def test_dvc_plots_every_training_and_evaluation(repository: Path, run: Run, measured: list[Path]) -> None:
    """By the project's own templates, with each point of each file in the picture that it belongs to, and errors where there are some."""
    done = run("dvc", "plots", "show", "--json")
    assert done.returncode == 0, done.stderr
    plots = json.loads(done.stdout)
    assert not plots.get("errors"), plots["errors"]
    found: dict[str, list[float]] = {}
    for title, (plot, *_) in plots["data"].items():
        content = json.dumps(plot["content"])
        assert "<DVC_METRIC_" not in content, title
        rows = plot["content"]["data"]["values"]
        assert rows, title
        if title.startswith("FID"):
            assert {"low", "high"} <= set(re.findall(r'"field": "(\w+)"', content)), title
            assert {row["fid_se"] for row in rows} == {"0.5"}
        kind = title.partition(",")[0]
        found.setdefault(kind, []).extend(float(row["loss" if "Loss" in kind else "fid"]) for row in rows)
    numbers = {
        stage: [
            json.loads((repository / folder / "metrics.json").read_text())["1-step"]["fid"]
            for folder in parts(repository, measured, stage)
        ]
        for stage in ("teacher", "student", "evaluate")
    }
    # the evaluations of teachers lie in folders of the same name, two below `evaluate`
    teachers = [
        n
        for n, folder in zip(numbers["teacher"], parts(repository, measured, "teacher"), strict=True)
        if "evaluate" not in folder
    ]
    assert sorted(found["Loss of teachers"]) == sorted([*teachers, *(n + 1 for n in teachers)])
    assert sorted(found["Loss of students"]) == sorted([*numbers["student"], *(n + 1 for n in numbers["student"])])
    assert sorted(found["FID along training"]) == sorted(numbers["evaluate"])
    assert sorted(found["FID by guidance"]) == sorted(2 * numbers["evaluate"])


@pytest.mark.slow
def test_dvc_takes_the_scale_from_params(repository: Path, run: Run) -> None:
    file = repository / "params.yaml"
    text = file.read_text()
    try:
        file.write_text(text.replace("scale: demo", "scale: smoke", 1))
        done = run("dvc", "repro", "--dry", "dataset-latent_guided")
    finally:
        file.write_text(text)
    assert "> python -m pipeline run dataset scale=smoke slot=latent_guided" in done.stdout, done.stderr


def test_locks_of_a_killed_snakemake_are_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = tmp_path / ".snakemake/locks/0.input.lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    clear_stale_locks(tmp_path)
    assert not lock.exists()
    assert "0.input.lock: left by a Snakemake that was killed; removed" in capsys.readouterr().err


def test_locks_of_a_live_snakemake_stay(tmp_path: Path) -> None:
    lock = tmp_path / ".snakemake/locks/0.input.lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    with (tmp_path / ".snakemake/users.lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        clear_stale_locks(tmp_path)
        assert lock.exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_waiting_process_is_small(repo_copy: Path, user_env: Callable[[Path], dict[str, str]]) -> None:
    """What an engine starts for each job and keeps until the job ends: at most 40 MB, also with 200 of them at once."""
    (repo_copy / "pipeline/stages/dataset.py").write_text(
        "import time\ndef run(ctx):\n    time.sleep(4)\n    (ctx.out / 'x').write_text('x')\n"
    )
    job = registry.find(load(repo_copy / "params.yaml", "smoke"), "dataset", {"slot": "latent_guided"})
    command = [*job.command.split(), "--launcher", "local"]
    resident: list[int] = []
    with subprocess.Popen(command, cwd=repo_copy, env=user_env(repo_copy), stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
            resident += [int(found[1])] if found else []
            time.sleep(0.1)
    assert process.returncode == 0
    assert len(resident) > 30
    assert max(resident) <= 40 * 1024, f"{max(resident)} kB"
