# SPDX-License-Identifier: Apache-2.0
"""The command line: `python -m pipeline COMMAND …`, the one entry point of both engines and of people.

Modules of a command are imported when it runs: a waiting `run` process has to stay small (no torch, no MLflow).
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from pipeline.cli import Parser, axis_values
from pipeline.errors import PipelineError, suggestion

# Commands that take their arguments themselves: `pipeline.<name>.main(argv) -> int`; FILES has the modules of those that can name none.
MODULES = {
    "plan": "jobs that are left to do, with estimated time and disk",
    "status": "what is done, running, waiting",
    "submit": "submit all jobs of a stage that are ready to SLURM, as an array",
    "logs": "where a job's log is, and its end: STAGE axis=value …",
    "trace": "the chain of runs, commits and digests behind a row of a table",
    "sample": "draw samples of a trained teacher or student",
    "import": "a published network as a teacher: what it is, whether it fits, the lines for params.yaml",
    "evaluate": "measure trained models, or folders of PNG files",
    "compare": "two trained models or folders of PNG files, with each other and against the data",
    "export": "a trained model for others: safetensors or a pipeline of diffusers, with a model card",
    "results": "collect the results that are committed, or compare a run with them",
    "doctor": "check the installation and say what is missing",
    "watch": "a live table of the runs; or run a command and show the progress of the jobs that it starts",
    "sync": "make what one engine has made known to the other (DVC, Snakemake)",
}
FILES = {"import": "importing", "export": "exporting", "results": "committed"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code (2 and one sentence on stderr for what the user can mend)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ValueError as error:
        if not _said_by_the_library(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output has gone (`… | head`): nothing is left to say, not even at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        from pipeline.publish import explain

        print(f"error: {explain(error, f'{arguments[0]}:')}", file=sys.stderr)
        return 2


def _said_by_the_library(error: ValueError) -> bool:
    """Whether scm_core raised it: it looks at what users bring, and says in a sentence what is wrong with it."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__", "")).startswith("scm_core.")


def _dispatch(arguments: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], int]] = {"run": _run, "schema": _schema, "dvc": _dvc}
    parser = Parser(prog="python -m pipeline", description="The sCM reproduction as a pipeline.")
    rows = {
        "run": "run one job: STAGE axis=value …",
        **MODULES,
        "schema": "print the JSON schema of params.yaml",
        "dvc": "print dvc.yaml as generated from the registry",
    }
    parser.add_argument("command", metavar="COMMAND", nargs="?", help=argparse.SUPPRESS)
    parser.epilog = "commands:\n" + "\n".join(f"  {name:8} {text}" for name, text in rows.items())
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = "%(prog)s COMMAND …"
    command = parser.parse_args(arguments[:1]).command
    if command is None:
        parser.print_help()
        return 2
    if command in MODULES:
        result: int = importlib.import_module(f"pipeline.{FILES.get(command, command)}").main(arguments[1:])
        return result
    if command not in commands:
        raise PipelineError(f"{command}: unknown command; {suggestion(command, rows, 'commands')}")
    return commands[command](arguments[1:])


def _run(argv: list[str]) -> int:
    parser = Parser(prog="python -m pipeline run", description="Run one job and publish its output.")
    parser.add_argument("stage", metavar="STAGE")
    parser.add_argument("axes", metavar="axis=value", nargs="*", help="scale (default: that of params.yaml) and axes")
    parser.add_argument("--launcher", help="inline, local or slurm (default: $SCM_LAUNCHER, else inline)")
    options = parser.parse_intermixed_args(argv)
    from pipeline import launch, paths, registry
    from pipeline.params import PARAMS_FILE, load

    registry.stage_named(options.stage)
    axes = axis_values(options.axes)
    params = load(paths.root() / PARAMS_FILE, axes.pop("scale", None))
    job = registry.find(params, options.stage, axes)
    launcher = options.launcher or os.environ.get("SCM_LAUNCHER") or "inline"
    if launcher not in launch.LAUNCHERS:
        raise PipelineError(f"{launcher}: unknown launcher; {suggestion(launcher, launch.LAUNCHERS, 'launchers')}")
    if int(os.environ.get("RANK", "0")) > 0:  # not the first process of a training that several share
        from pipeline.ranks import run_rank

        return run_rank(job, params)
    return launch.run(job, params, launcher)


def _schema(argv: list[str]) -> int:
    Parser(prog="python -m pipeline schema", description="Print the JSON schema of params.yaml.").parse_args(argv)
    import json

    from pipeline.params import schema

    print(json.dumps(schema(), indent=2, ensure_ascii=False))
    return 0


def _dvc(argv: list[str]) -> int:
    Parser(prog="python -m pipeline dvc", description="Print dvc.yaml as generated from the registry.").parse_args(argv)
    from pipeline import paths
    from pipeline.dvcfile import generate
    from pipeline.params import PARAMS_FILE, load

    print(generate(load(paths.root() / PARAMS_FILE)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
