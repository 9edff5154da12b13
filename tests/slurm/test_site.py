# SPDX-License-Identifier: Apache-2.0
"""A site's settings: what they make of a job's request, what is refused before anything is submitted, and in which words."""

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import preflight, registry, site
from pipeline.errors import PipelineError
from pipeline.params import Params, load

ROOT = Path(__file__).resolve().parents[2]
STAGE = "runs/smoke/latent_guided/dataset"
COMMANDS = {
    "snakemake": ["snakemake", "--profile", "cluster/slurm", STAGE, "--config", "scale=smoke"],
    "run": ["python", "-m", "pipeline", "run", "dataset", "scale=smoke", "slot=latent_guided", "--launcher", "slurm"],
}


@pytest.fixture(scope="module")
def paper() -> Params:
    """Scale paper, whose jobs are of every kind."""
    return load(ROOT / "params.yaml", "paper")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], site.Site]:
    """Loads a text as a site's settings."""
    for key in site.FROM_ENVIRONMENT:
        monkeypatch.delenv(f"SCM_SLURM_{key.upper()}", raising=False)
    monkeypatch.setenv("SCM_ROOT", str(tmp_path))
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    file = tmp_path / site.SITE
    file.parent.mkdir(parents=True)

    def loaded(text: str) -> site.Site:
        file.write_text(text)
        return site.load()

    return loaded


def teacher(params: Params) -> registry.Job:
    return registry.find(params, "teacher", {"slot": "latent_guided", "size": "S"})


def table(params: Params) -> registry.Job:
    return registry.find(params, "table2", {})


# --- without a cluster ---------------------------------------------------------------------------------------------------------------


def test_the_example_is_valid_and_has_every_key(settings: Any, paper: Params) -> None:
    text = (ROOT / f"{site.SITE}.example").read_text()
    found = settings(text)
    assert found.model_fields_set == set(site.Site.model_fields)
    assert found.kinds.model_fields_set == set(site.Kinds.model_fields)
    asked = found.request(teacher(paper))
    assert (asked["partition"], asked["qos"], asked["constraint"], asked["gpus_per_node"]) == (
        "gpu",
        "long",
        "h100",
        "h100:8",
    )
    assert asked["additional_parameters"] == {"requeue": True, "reservation": "paper", "exclusive": True}
    assert found.request(teacher(paper))["python"] == "apptainer exec --nv /shared/scm.sif /opt/scm/bin/python"
    asked = found.request(table(paper))
    assert (asked["partition"], asked["qos"]) == ("cpu", "normal")
    assert "constraint" not in asked
    assert "gpus_per_node" not in asked
    assert asked["additional_parameters"] == {"requeue": True, "reservation": "paper"}
    assert found.request(table(paper))["python"] == "apptainer exec /shared/scm.sif /opt/scm/bin/python"


def test_without_a_file_a_job_asks_for_what_it_needs(settings: Any, paper: Params) -> None:
    (Path(os.environ["SCM_ROOT"]) / site.SITE).unlink(missing_ok=True)
    job = teacher(paper)
    asked, needs = site.load().request(job), job.resources
    tasks = needs.nodes * needs.tasks_per_node
    assert (asked["time"], asked["mem"]) == (needs.minutes, f"{needs.memory_mb}MB")
    assert (asked["nodes"], asked["ntasks_per_node"]) == (needs.nodes, needs.tasks_per_node)
    assert asked["cpus_per_task"] * tasks == needs.threads
    assert asked["gpus_per_node"] == needs.gpus
    assert not {"partition", "account", "qos", "constraint", "setup"} & set(asked)


def test_the_environment_wins_over_the_file_and_over_its_kinds(
    settings: Any, paper: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCM_SLURM_PARTITION", "mine")
    found = settings("partition: gpu\naccount: a\nkinds: {cpu: {partition: cpu, qos: q}}\n")
    assert found.request(teacher(paper))["partition"] == "mine"
    asked = found.request(table(paper))
    assert (asked["partition"], asked["account"], asked["qos"]) == ("mine", "a", "q")


def test_every_job_has_a_kind_and_stages_that_train_exist(paper: Params) -> None:
    kinds = {job.stage: site.kind(job) for job in registry.jobs(paper)}
    assert (kinds["student"], kinds["evaluate"], kinds["latents"], kinds["table2"]) == (
        "training",
        "evaluation",
        "evaluation",
        "cpu",
    )
    assert set(registry.STAGES) >= site.TRAINING


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("partitoin: gpu\n", "partitoin: unknown key; did you mean 'partition'?"),
        ("kinds: {train: {}}\n", "kinds.train: unknown key; did you mean 'training'?"),
        ("kinds: {cpu: {partition: a b}}\n", "kinds.cpu.partition: must be one word, got 'a b'"),
        ("account: 12\n", "account: must be a word, got 12"),
        ("gpus_per_node: 0\n", "gpus_per_node: must be at least 1, got 0"),
        ("setup: module load cuda\n", "setup: must be a list such as [1, 2], got 'module load cuda'"),
        ("extra: {mem: 3}\n", "extra.mem: is set by the pipeline; remove it"),
        ("extra: {parsable: true}\n", "extra.parsable: is set by the pipeline; remove it"),
        ("extra: {partition: gpu}\n", "extra.partition: use the key partition"),
        (
            "extra: {--reservation: x}\n",
            "extra.--reservation: is no long option of sbatch, such as reservation, without its dashes",
        ),
        ("extra: {mail-type: [END]}\n", "extra.mail-type: must be a word, a number, true or false, got ['END']"),
        ("[1, 2]\n", "must hold keys with values ('partition: gpu'), got [1, 2]"),
        ("qos: a\nqos: b\n", "not valid YAML in line 2: key 'qos' is given twice; correct the line"),
    ],
)
def test_a_wrong_file_is_one_sentence(settings: Any, text: str, words: str) -> None:
    with pytest.raises(PipelineError) as raised:
        settings(text)
    assert str(raised.value) == f"cluster/slurm/site.yaml: {words}"


def test_a_file_of_comments_says_nothing(settings: Any) -> None:
    assert settings("# partition: gpu\n") == site.Site()


def test_a_job_that_the_site_cannot_hold(settings: Any, paper: Params) -> None:
    with pytest.raises(
        PipelineError, match=r"needs 8 GPUs on a node, but \S+ says gpus_per_node: 4; lower scales\.paper\.hardware"
    ):
        settings("gpus_per_node: 4\n").request(teacher(paper))
    with pytest.raises(
        PipelineError, match=r"asks for 24 hours at a time, but \S+ says time_limit_hours: 12; lower scales\.paper"
    ):
        settings("time_limit_hours: 12\n").request(teacher(paper))
    short = settings("kinds: {cpu: {time_limit_hours: 0.25}}\n")
    short.request(teacher(paper))
    with pytest.raises(PipelineError, match=r"table2: asks for 0\.5 hours at a time, .* give kinds\.cpu"):
        short.request(table(paper))


@pytest.mark.parametrize(
    ("limit", "minutes"),
    [("30:00", 30), ("1:00:00", 60), ("2-12:00:00", 3600), ("infinite", float("inf")), ("0:30", 0.5)],
)
def test_time_limits_as_sinfo_writes_them(limit: str, minutes: float) -> None:
    assert preflight.minutes(limit) == minutes


def test_requests_are_tried_once_each_at_their_longest(settings: Any, paper: Params) -> None:
    jobs = registry.jobs(paper)
    found = preflight.distinct(settings("partition: gpu\n"), jobs)
    assert len({tuple(preflight.options({**request, "time": 0})) for _, request in found}) == len(found) < 8 < len(jobs)
    longest = {(job.resources.gpus, site.kind(job)): 0 for job in jobs}
    for job in jobs:
        key = (job.resources.gpus, site.kind(job))
        longest[key] = max(longest[key], job.resources.minutes)
    assert set(longest.values()) <= {request["time"] for _, request in found}


# --- on a real one -------------------------------------------------------------------------------------------------------------------


class Site:
    """A clean copy of the repository, whose commands speak to a real SLURM."""

    def __init__(self, slurm: Any, folder: Path, env: dict[str, str]) -> None:
        self.slurm, self.folder = slurm, folder
        self.env = {**env, "SLURM_CONF": str(slurm.conf), "SCM_TRACKING": "off"}

    def refused(self, command: str, **env: str) -> str:
        """The sentence that a command refuses with; nothing may have been submitted."""
        before = self.slurm.jobs()
        done = subprocess.run(
            COMMANDS[command],
            cwd=self.folder,
            env={**self.env, **env},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        said = done.stderr if command == "run" else done.stderr[done.stderr.index("error: ") :]
        assert done.returncode not in (0, None), done.stdout
        assert re.fullmatch(r"error: [^\n]+\n", said), done.stderr
        assert self.slurm.jobs().keys() <= before.keys()  # SLURM forgets old ones meanwhile
        assert not list(self.folder.glob("runs/smoke/.work/*/ticket.json"))
        return said


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory, copy_repository: Callable[[Path], Path]) -> Path:
    """One for all tests: what is refused leaves nothing behind."""
    return copy_repository(tmp_path_factory.mktemp("site") / "repository")


@pytest.fixture
def here(slurm: Any, copy: Path, user_env: Any) -> Iterator[Site]:
    """The copy on the cluster without accounting."""
    yield Site(slurm, copy, user_env(copy))
    (copy / site.SITE).unlink(missing_ok=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_partition(here: Site, command: str) -> None:
    said = here.refused(command, SCM_SLURM_PARTITION="urgnt")
    assert "SLURM refuses it: Invalid partition name specified" in said
    assert f"{site.SITE}: partition: did you mean 'urgent'?" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_key(here: Site, command: str) -> None:
    (here.folder / site.SITE).write_text("partitoin: main\n")
    assert here.refused(command) == f"error: {site.SITE}: partitoin: unknown key; did you mean 'partition'?\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_no_sbatch(here: Site, tmp_path: Path, command: str) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for folder in ("/usr/bin", "/bin", "/usr/local/bin"):
        for program in Path(folder).glob("*"):
            if program.name not in ("sbatch", "scancel") and not (programs / program.name).exists():
                (programs / program.name).symlink_to(program)
    python = here.env["PATH"].partition(os.pathsep)[0]
    said = here.refused(command, PATH=f"{python}{os.pathsep}{programs}")
    assert "sbatch, scancel are not on the PATH; run this on a login node" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_in_the_place_of_the_shared_folder(here: Site, command: str) -> None:
    file = here.folder / "runs"
    subprocess.run(["rm", "-rf", str(file)], check=True)
    file.touch()
    try:
        said = here.refused(command)
    finally:
        file.unlink()
    assert re.search(r"runs\S*: (cannot be written \(File exists\)|a file is where a folder belongs)", said)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_shared_folder_that_is_read_only(here: Site, small_disk: Path, command: str) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    folder = here.folder / "runs"
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    folder.symlink_to(small_disk)
    try:
        said = here.refused(command)
    finally:
        folder.unlink()
    assert "Read-only file system" in said
    assert "writable for this user" in said


def test_a_constraint_that_no_node_has(here: Site) -> None:
    assert f"{site.SITE}: constraint: h100" in here.refused("run", SCM_SLURM_CONSTRAINT="h100")


def test_an_option_that_sbatch_does_not_know(here: Site) -> None:
    (here.folder / site.SITE).write_text("extra: {resrvation: x}\n")
    assert "unrecognized option '--resrvation=x'" in here.refused("run")


def test_a_job_longer_than_the_partition_lets_it(here: Site) -> None:
    here.slurm("scontrol", "update", "partition=urgent", "MaxTime=20")
    try:
        said = here.refused("run", SCM_SLURM_PARTITION="urgent")
    finally:
        here.slurm("scontrol", "update", "partition=urgent", "MaxTime=INFINITE")
    assert "asks for 0.5 hours, but partition urgent ends jobs after 0.333; name another" in said


def test_a_job_that_no_node_holds(here: Site, paper: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", str(here.slurm.conf))
    monkeypatch.setenv("SCM_ROOT", str(here.folder))
    with pytest.raises(PipelineError) as raised:
        preflight.check(site.load(), [teacher(paper)])
    assert (
        "asks for a node of 64 cores, 800 GB and 8 GPUs, and the cluster has none (its nodes: 4 cores, 31 GB and 0 GPUs)"
        in str(raised.value)
    )


@pytest.mark.parametrize("partition", [None, "main", "main,urgent"])
def test_a_partition_with_too_few_nodes_or_too_small_ones(
    here: Site, monkeypatch: pytest.MonkeyPatch, partition: str | None
) -> None:
    monkeypatch.setenv("SLURM_CONF", str(here.slurm.conf))
    monkeypatch.setenv("SCM_ROOT", str(here.folder))
    job = table(load(ROOT / "params.yaml", "smoke"))
    request = {**site.Site(partition=partition).request(job), "mem": "1024MB"}
    preflight.accepts(job, {**request, "nodes": 2})
    where = f"partition {partition}" if partition else "the cluster"
    kinds = re.escape("(its nodes: 4 cores, 31 GB and 0 GPUs): name another partition")
    with pytest.raises(
        PipelineError, match=rf"asks for 3 nodes of 1 cores, 1 GB and 0 GPUs, and {where} has 2 {kinds}"
    ):
        preflight.accepts(job, {**request, "nodes": 3})
    with pytest.raises(
        PipelineError, match=rf"asks for a node of 1 cores, 40 GB and 0 GPUs, and {where} has none {kinds}"
    ):
        preflight.accepts(job, {**request, "mem": "40960MB"})


def test_nodes_that_are_down_refuse_nothing(here: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", str(here.slurm.conf))
    monkeypatch.setenv("SCM_ROOT", str(here.folder))
    (here.folder / "runs/.preflight.json").unlink(missing_ok=True)
    here.slurm("scontrol", "update", "nodename=n1,n2", "state=down", "reason=test")
    try:
        preflight.check(site.load(), registry.jobs(load(ROOT / "params.yaml", "smoke")))
    finally:
        # It may have come back by itself: then there is nothing to resume.
        here.slurm("scontrol", "update", "nodename=n1,n2", "state=resume", check=False)
    assert (here.folder / "runs/.preflight.json").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_account(slurm_accounting: Any, copy: Path, user_env: Any, command: str) -> None:
    said = Site(slurm_accounting, copy, user_env(copy)).refused(command, SCM_SLURM_ACCOUNT="reserch")
    assert "SLURM refuses it: Invalid account" in said
    assert f"{site.SITE}: account: reserch; did you mean 'research'?" in said


def test_a_dry_run_asks_nothing_of_the_cluster(here: Site) -> None:
    done = subprocess.run(
        [*COMMANDS["snakemake"], "-n"],
        cwd=here.folder,
        env={**here.env, "SCM_SLURM_PARTITION": "urgnt"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "would run" in done.stdout or "dry-run" in done.stdout


def test_a_job_with_settings_of_its_site(here: Site) -> None:
    """Set-up lines and a command around python (`env` stands for a container's) are there when the job runs."""
    (here.folder / site.SITE).write_text(
        "kinds:\n  cpu:\n    partition: urgent\n    setup: ['export FROM_SETUP=yes']\n    container: env IN_CONTAINER=yes\n"
        "    extra: {comment: from-site}\n"
    )
    done = subprocess.run(
        COMMANDS["run"], cwd=here.folder, env=here.env, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    jobs = here.slurm.jobs()
    newest = max(jobs, key=lambda job: int(job.partition("_")[0]))
    name, _ = jobs[newest]
    assert name.startswith("dataset-latent_guided@")
    shown = here.slurm("scontrol", "show", "job", newest)
    assert "Partition=urgent" in shown
    assert "Comment=from-site" in shown
    assert "Requeue=1" in shown


def test_what_nodes_hold() -> None:
    asked = preflight.Node(8, 1000, 2, "h100")
    assert preflight.Node(8, 1000, 4, "h100").holds(asked)
    assert not preflight.Node(8, 1000, 4, "a100").holds(asked)
    assert not preflight.Node(8, 999, 4, "h100").holds(asked)
    assert preflight.Node(8, 1000, 0).holds(preflight.Node(1, 1, 0))
    assert str(preflight.Node(8, 2048, 1, "h100")) == "8 cores, 2 GB and 1 h100 GPU"
