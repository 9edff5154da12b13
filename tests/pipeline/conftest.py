# SPDX-License-Identifier: Apache-2.0
"""A small repository of its own for each test: the real pipeline package with a registry of tiny fake stages."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parents[2]

PARAMS = """
scale: tiny
scales:
  tiny: {seed: 0, value: 1}
  other: {seed: 0, value: 2}
"""

FAKE_PARAMS = """
import json, types, yaml
from pathlib import Path
PARAMS_FILE = "params.yaml"
Params = PretrainedVae = Scale = Slot = object

class Section(dict):
    __getattr__ = dict.__getitem__

def load(path=PARAMS_FILE, scale=None):
    data = yaml.safe_load(Path(path).read_text())
    scales = {name: Section(value, slots={}, hardware=None) for name, value in data["scales"].items()}
    resume = types.SimpleNamespace(**{"allow_changes": False, **data.get("resume", {})})
    scale = scale or data["scale"]
    note_of = lambda name: f"Scale {name}: of fakes"
    return types.SimpleNamespace(scale=scale, scales=scales, active=scales[scale], resume=resume, note_of=note_of)
"""

FAKE_REGISTRY = """
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from pipeline.errors import RegistryError

@dataclass(frozen=True)
class Resources:
    threads: int = 1
    threads_each: int = 1
    nodes: int = 1
    tasks_per_node: int = 1
    memory_mb: int = 200
    gpus: int = 0
    minutes: int = 1
    seconds: float = 5.0
    bytes: int = 1000

@dataclass(frozen=True)
class Job:
    scale: str
    stage: str
    axes: object
    inputs: object
    outputs: tuple
    params: tuple
    resources: Resources = Resources()
    sources: tuple = ()
    @property
    def name(self): return "-".join((self.stage, *self.axes.values()))
    @property
    def arguments(self): return (self.stage, f"scale={self.scale}", *(f"{k}={v}" for k, v in self.axes.items()))
    @property
    def command(self): return " ".join(("python", "-m", "pipeline", "run", *self.arguments))
    @property
    def is_report(self): return self.outputs[0].parent == Path("reports")

def jobs(params):
    s = params.scale
    def job(stage, inputs=(), outputs=None, **axes):
        folder = Path("runs", s, stage, *axes.values())
        return Job(s, stage, MappingProxyType(axes), {i: Path("runs", s, i) for i in inputs}, outputs or (folder,),
                   (f"scales.{s}.seed", f"scales.{s}.value"))
    return [
        job("first"),
        job("second", ["first"]),
        job("steps", ["first"]),
        job("sleeper"),
        job("broken"),
        job("refusing"),
        job("dying"),
        job("silent"),
        job("report", ["second"], (Path("reports/table.csv"), Path("reports/table.md"))),
    ]

def find(params, stage, axes):
    for job in jobs(params):
        if job.stage == stage and dict(job.axes) == dict(axes):
            return job
    raise RegistryError(f"{stage}: unknown stage; known stages are first, second")

def parents(job, among):
    makers = {o: j for j in among for o in j.outputs}
    return [makers[p] for p in job.inputs.values() if p in makers]

def settings(job, params):
    scale = params.scales[job.scale]
    return {key.split(".")[-1]: scale[key.split(".")[-1]] for key in job.params}
"""

STAGES = {
    "first": """
        def run(ctx):
            (ctx.out / "data.bin").write_bytes(bytes(range(256)) * ctx.scale.value)
            (ctx.out / "sub").mkdir()
            (ctx.out / "sub" / "note.txt").write_text("hello")
    """,
    "second": """
        def run(ctx):
            (ctx.out / "size.txt").write_text(str((ctx.inputs["first"] / "data.bin").stat().st_size))
            ctx.tracker.log_metrics(1, {"loss": 0.5})
            ctx.tracker.log_metrics(2, {"loss": 0.25, "norm": 1.0})
            ctx.tracker.set_tag("kind", "fake")
            ctx.tracker.log_artifact(ctx.out / "size.txt", "tables")
    """,
    # Thirty steps of STEP_SECONDS with a checkpoint after each: its result shows where it resumed. Half way it waits for the
    # file that STEP_HOLD names, where one is named.
    "steps": """
        import os
        import time
        def run(ctx):
            file = ctx.work / "step"
            start = int(file.read_text()) if file.exists() else 0
            with (ctx.work / "starts").open("a") as f:
                f.write(f"{start}\\n")
            progress = ctx.progress(30, "it")
            (ctx.out / "half").write_text("half-written")
            for step in range(start, 30):
                while step == 15 and "STEP_HOLD" in os.environ and not os.path.exists(os.environ["STEP_HOLD"]):
                    time.sleep(0.05)
                time.sleep(float(os.environ.get("STEP_SECONDS", "0.1")))
                draft = file.with_suffix(".tmp")
                draft.write_text(str(step + 1))
                draft.replace(file)
                progress.update(step + 1, loss=1 / (step + 1))
                ctx.tracker.log_metrics((step + 1) * 64, {"loss": 1 / (step + 1)})
            progress.close()
            (ctx.out / "half").unlink()
            (ctx.out / "result").write_text("30")
            (ctx.out.parent.parent.parent / "starts.txt").write_text((ctx.work / "starts").read_text())
    """,
    "sleeper": """
        import time
        def run(ctx):
            progress = ctx.progress(600, "s")
            for second in range(600):
                progress.update(second)
                time.sleep(0.1)
            (ctx.out / "x").write_text("x")
    """,
    "broken": """
        def run(ctx):
            print("about to break")
            (ctx.out / "half").write_text("half")
            raise KeyError("missing thing")
    """,
    "refusing": """
        from pipeline.errors import PipelineError
        def run(ctx):
            raise PipelineError("refusing: the data says no; give it other data")
    """,
    "dying": """
        import os, signal
        def run(ctx):
            print("last words", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """,
    "silent": """
        def run(ctx):
            pass
    """,
    "report": """
        def run(ctx):
            text = (ctx.inputs["second"] / "size.txt").read_text()
            (ctx.out / "table.csv").write_text(f"size,run\\n{text},{ctx.input_runs['second']}\\n")
            (ctx.out / "table.md").write_text(text)
    """,
}

DRIVER = """
import sys
from pipeline import launch, params, paths, registry
from pipeline.errors import PipelineError
loaded = params.load(paths.root() / "params.yaml")
sys.exit(launch.run(registry.find(loaded, sys.argv[1], {}), loaded, sys.argv[2]))
"""


@dataclass
class Repo:
    """A repository in a temporary folder; its stages are those above."""

    root: Path
    env: dict[str, str]
    started: "list[subprocess.Popen[str]]"

    def start(self, stage: str, launcher: str = "inline", **env: str) -> "subprocess.Popen[str]":
        """Starts a stage in a new session, as an engine would."""
        process = subprocess.Popen(
            [sys.executable, "driver.py", stage, launcher],
            cwd=self.root,
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def close(self) -> None:
        """Ends what a test left running."""
        for file in self.root.glob("runs/*/.work/*/process.json"):
            with contextlib.suppress(ProcessLookupError, ValueError):
                os.kill(int(json.loads(file.read_text())["pid"]), signal.SIGKILL)
        for process in self.started:
            process.kill()
            process.communicate(timeout=10)

    def run(self, stage: str, launcher: str = "inline", timeout: float = 60, **env: str) -> Any:
        """Runs a stage to its end: .code, .out, .err."""
        process = self.start(stage, launcher, **env)
        out, err = process.communicate(timeout=timeout)
        return Ended(process.returncode, out, err)

    def python(self, code: str, timeout: float = 60, **env: str) -> Any:
        """Runs a few lines of Python in the repository."""
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            cwd=self.root,
            env={**self.env, **env},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    @property
    def work(self) -> Path:
        """Where the working folders are."""
        return self.root / "runs" / "tiny" / ".work"

    def wait_for(self, condition: Callable[[], Any], seconds: float = 20) -> Any:
        """Waits until `condition()` is true and returns its value."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            value = condition()
            if value:
                return value
            time.sleep(0.05)
        raise AssertionError("the condition never came true")

    def pid(self, stage: str) -> int:
        """The process that computes the stage."""
        file = self.work / stage / "process.json"
        try:
            self.wait_for(file.exists)
        except AssertionError:
            said = [process.communicate(timeout=5) for process in self.started if process.poll() is not None]
            logs = {str(log): log.read_text() for log in self.root.glob("runs/**/*.log*") if log.is_file()}
            logs |= {str(log): log.read_text() for log in self.root.glob("runs/**/*.out")}
            raise AssertionError(f"{stage} never started; waiters that ended: {said}; logs: {logs}") from None
        return int(json.loads(file.read_text())["pid"])


@dataclass
class Ended:
    """How a process ended."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tracking database without runs: MLflow takes seconds to make one."""
    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    code = f"from mlflow.tracking import MlflowClient; MlflowClient('sqlite:///{file}').search_experiments()"
    env = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=env)
    return file


def build(root: Path, stages: Mapping[str, str] = STAGES, registry: str = FAKE_REGISTRY) -> Repo:
    """A repository of fake stages in `root`."""
    package = root / "pipeline"
    shutil.copytree(HERE / "pipeline", package, ignore=shutil.ignore_patterns("__pycache__", "stages"))
    shutil.copytree(HERE / "scm_core", root / "scm_core", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "stages").mkdir()
    (package / "stages" / "__init__.py").write_text("")
    for name, body in stages.items():
        (package / "stages" / f"{name}.py").write_text(textwrap.dedent(body))
    (package / "params.py").write_text(FAKE_PARAMS)
    (package / "registry.py").write_text(registry)
    (root / "params.yaml").write_text(PARAMS)
    (root / "driver.py").write_text(DRIVER)
    env = {key: value for key, value in os.environ.items() if not key.startswith(("SCM_", "MLFLOW_", "SLURM_"))}
    # The tracking store has tests of its own; elsewhere its import would only cost time.
    env |= {"PYTHONPATH": str(root), "SCM_TRACKING": "off", "PYTHONDONTWRITEBYTECODE": ""}
    return Repo(root, env, [])


@pytest.fixture
def repo(tmp_path: Path) -> Iterator[Repo]:
    """A repository with fake stages; what a test leaves running is ended."""
    made = build(tmp_path / "repo")
    yield made
    made.close()
