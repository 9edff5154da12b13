# SPDX-License-Identifier: Apache-2.0
"""params.yaml: what is read, what is refused, and in which words."""

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from pipeline.params import ParamsError, load, read_yaml, schema, validate
from pipeline.registry import jobs
from scm_core.evaluate.classifier import Classifier
from scm_core.trigflow import t_max
from tests.pipeline.plain import plain, plain_text

ROOT = Path(__file__).resolve().parents[2]
TEXT = plain_text()
# The teacher's rate in scale demo, whatever it is tuned to.
TEACHER_LR = r"(?<=\n {10})lr: \S+"
SLOT = "scales.demo.slots.latent_guided"
HARDWARE = (
    "hardware: {gpu: X, memory_gb: 80, peak_tflops: 989, utilisation: 0.3, gpus_per_node: 8, cpus_per_gpu: 8, "
    "host_memory_per_gpu_gb: 64, time_limit_hours: 24}"
)

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(text: str) -> Path:
        path = tmp_path / "params.yaml"
        path.write_text(text)
        return path

    return to_file


def edit(pattern: str, replacement: str, text: str = TEXT) -> str:
    """`text` with the first match replaced (the demo scale comes first in the file)."""
    changed, count = re.subn(pattern, replacement, text, count=1, flags=re.MULTILINE | re.DOTALL)
    assert count == 1, f"{pattern} is not in params.yaml"
    assert changed != text
    return changed


def sentence(path: Path) -> str:
    with pytest.raises(ParamsError) as caught:
        load(path)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_both_scales_load_and_scale_selects() -> None:
    params = load(ROOT / "params.yaml")
    assert params.scale == "demo"
    assert params.active is params.scales["demo"]
    smoke = load(ROOT / "params.yaml", scale="smoke")
    assert smoke.active is smoke.scales["smoke"]


def test_a_size_overrides_single_numbers(write: Write) -> None:
    text = edit(
        r"S: (\{network: .*?\}), teacher: \{\}, students: \{scd: \{\}",
        r"S: \1, teacher: {lr: 0.5}, students: {scd: {batch: 7}",
    )
    slot = load(write(text)).active.slots["latent_guided"]
    assert slot.teacher_for("S").lr == 0.5
    assert slot.teacher_for("M") == slot.teacher
    assert slot.teacher_for("S").model_copy(update={"lr": slot.teacher.lr}) == slot.teacher
    assert slot.student_for("S", "scd").batch == 7
    assert slot.student_for("S", "sct") == slot.students["sct"]


def test_a_size_trains_the_students_that_it_names(write: Write) -> None:
    text = edit(r"students: \{scd: \{\}, sct: \{\}\}", "students: {scd: {}}")  # of size S
    params = load(write(text))
    slot = params.active.slots["latent_guided"]
    assert [list(size.students) for size in slot.sizes.values()] == [["scd"], ["scd", "sct"]]
    methods = {job.axes["method"] for job in jobs(params) if job.axes.get("size") == "S" and "method" in job.axes}
    assert methods == {"teacher", "scd"}
    alone = edit(r"students: \{scd: \{\}, sct: \{\}\}", "students: {scd: {}}", text)
    assert sentence(write(alone)).startswith(f"params.yaml: {SLOT}.students.sct: is a student of no size: name it")


def test_a_section_may_lie_below_another(write: Write) -> None:
    text = edit(r"^        teacher: &demo_teacher$", "        teacher: &below")
    text = edit(r"M: (\{network: [^}]*\},) teacher: \{\}", r"M: \1 teacher: {<<: *below, lr: 0.5}", text)
    slot = load(write(text)).active.slots["latent_guided"]
    assert slot.teacher_for("M").lr == 0.5
    assert slot.teacher_for("M").model_copy(update={"lr": slot.teacher.lr}) == slot.teacher
    data = YAML(typ="safe").load(text)  # the reader that DVC has
    assert data == read_yaml(write(text))


@pytest.mark.parametrize(
    ("section", "key", "words"),
    [
        ("engine: {processes: 16}", None, ""),
        ("engine: {processes: 12, processes_per_node: 4}", None, ""),
        (
            "engine: {processes: 12}",
            "engine.processes",
            "must be at most hardware.gpus_per_node (8) or a multiple of it, as each node of a job has as many, got 12",
        ),
        (
            "engine: {processes: 6, processes_per_node: 4}",
            "engine.processes",
            "must be at most processes_per_node (4) or a multiple of it, as each node of a job has as many, got 6",
        ),
        (
            "engine: {processes: 16, processes_per_node: 16}",
            "engine.processes_per_node",
            "must be at most hardware.gpus_per_node (8), as each process has a GPU, got 16",
        ),
    ],
)
def test_processes_are_laid_out_on_nodes(write: Write, section: str, key: str | None, words: str) -> None:
    text = edit(r"^    slots:", f"    {HARDWARE}\n    slots:").replace("blocks: 5},", f"blocks: 5}}, {section},", 1)
    if key is None:
        assert load(write(text)).active.hardware is not None
    else:
        assert sentence(write(text)) == f"params.yaml: {SLOT}.sizes.M.{key}: {words}"


def test_an_evaluation_runs_on_one_node(write: Write) -> None:
    text = edit(r"^    slots:", f"    {HARDWARE}\n    slots:")
    text = edit(r"(evaluation:[^\n]*\n)", r"\1          processes: 16\n", text)
    words = "must be at most hardware.gpus_per_node (8), as this job runs on one node, got 16"
    assert sentence(write(text)) == f"params.yaml: {SLOT}.evaluation.processes: {words}"


def test_a_batch_has_an_image_for_each_part(write: Write) -> None:
    many = edit(r"blocks: 5\},", "blocks: 5}, engine: {processes: 8, accumulation: 16},")
    words = (
        "must be at least 128, the parts that the engine of size M takes a batch in (processes · accumulation), got 64"
    )
    assert sentence(write(many)) == f"params.yaml: {SLOT}.sizes.M.teacher.batch: {words}"


def test_models_are_frozen() -> None:
    params = load(ROOT / "params.yaml")
    with pytest.raises(ValueError, match="frozen"):
        params.active.slots["latent_guided"].teacher.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize("number", ["1e-3", "1E-3", "1.0e-3", ".001", "0.001"])
def test_floats_are_read_as_yaml_1_2_has_them(write: Write, number: str) -> None:
    assert load(write(edit(TEACHER_LR, f"lr: {number}"))).active.slots["latent_guided"].teacher.lr == 0.001


def test_an_integer_stands_for_a_float(write: Write) -> None:
    lr = load(write(edit(TEACHER_LR, "lr: 1"))).active.slots["latent_guided"].teacher.lr
    assert isinstance(lr, float)


@pytest.mark.parametrize(
    ("pattern", "replacement", "key", "words"),
    [
        (TEACHER_LR, "lr: -1", f"{SLOT}.teacher.lr", "must be greater than 0, got -1"),
        (r"^    slots:", "    note: ''\n    slots:", "scales.demo.note", "at least 1 character"),
        (r"^    slots:", "    note: ' '\n    slots:", "scales.demo.note", "must be one line of words, got ' '"),
        (r"^    slots:", '    note: "a\\\\nb"\n    slots:', "scales.demo.note", "must be one line of words"),
        (r"^    slots:", "    note: " + 81 * "x" + "\n    slots:", "scales.demo.note", "at most 80 characters"),
        (TEACHER_LR, "lr: '0.1'", f"{SLOT}.teacher.lr", "must be a number, got '0.1'"),
        (TEACHER_LR, "lr: .nan", f"{SLOT}.teacher.lr", "must be a finite number, got nan"),
        (TEACHER_LR, "lr:", f"{SLOT}.teacher.lr", "must be a number, got nothing (null)"),
        (TEACHER_LR, "lrr: 1.0e-2", f"{SLOT}.teacher.lrr", "unknown key; did you mean 'lr'?"),
        (r"^          lr:.*?\n", "", f"{SLOT}.teacher.lr", "is missing: add it"),
        (r"batch: \d+  ", "batch: 0  ", f"{SLOT}.teacher.batch", "must be at least 1, got 0"),
        (r"batch: \d+  ", "batch: 64.0  ", f"{SLOT}.teacher.batch", "must be an integer, got 64.0"),
        (r"batch: \d+  ", "batch: true  ", f"{SLOT}.teacher.batch", "must be an integer, got true"),
        (r"betas: \[0.9, 0.99\]", "betas: [0.9]", f"{SLOT}.teacher.betas[1]", "is missing: add it"),
        (r"betas: \[0.9, 0.99\]", "betas: 0.9", f"{SLOT}.teacher.betas", "must be a list such as [1, 2], got 0.9"),
        (r"rule: linear", "rule: linaer", f"{SLOT}.teacher.decay", "'rule' must be one of 'linear', 'inverse_sqrt', got 'linaer'"),
        (r"start: 0.3", "start: 1.3", f"{SLOT}.teacher.decay.start", "must be at most 1, got 1.3"),
        (r"start: 0.3, ", "", f"{SLOT}.teacher.decay.start", "is missing: add it"),
        (r"ramp_up: (\d+)", r"ramp_up: \1\n          ramp_up_images: 9", f"{SLOT}.teacher.ramp_up_images", "must be 0 where ramp_up"),
        (r"ema_sigma_rel: \S+", "ema_sigma_rel: 0.3", f"{SLOT}.teacher.ema_sigma_rel", "must be less than 0.28"),
        (r"label_dropout: 0.1", "label_dropout: 0.0", f"{SLOT}.evaluation.guidance", "label_dropout > 0"),
        (r"guidance: \[1.0, 2.0\]", "guidance: [2.0, 1.0]", f"{SLOT}.students.scd.guidance", "low ≤ high"),
        (r"guidance: \[1.0, 2.0\]", "guidance: [1.0, 1.5]", f"{SLOT}.evaluation.guidance", "must stay within"),
        (r"guidance: null", "guidance: [1.0, 2.0]", f"{SLOT}.students.sct.guidance", "must be null"),
        (r"tangent_normalize: norm", "tangent_normalize: nrom", f"{SLOT}.students.scd.tangent_normalize", "'norm'"),
        (r"method: scd", "method: sdc", f"{SLOT}.students.scd", "'method' must be one of 'sct', 'scd'"),
        (r"^ *method: scd\n", "", f"{SLOT}.students.scd", "needs the key 'method'"),
        (r"method: scd", "method: dscd", f"{SLOT}.students.scd.tangent_engine", "unknown key"),
        (r"method: scd", "method: multistep", f"{SLOT}.students.scd.segments", "is missing: add it"),
        (r"^          sct:", "          sctt:", f"{SLOT}.sizes.S.students.sct", "unknown key; known keys here are scd, sctt"),
        (r"^          sct:", "          teacher:", f"{SLOT}.sizes.S.students.sct", "unknown key"),
        (r"teacher: \{\}", "teacher: {learning_rate: 1}", f"{SLOT}.sizes.S.teacher.learning_rate", "unknown key"),
        (r"teacher: \{\}", "teacher: {batch: 0}", f"{SLOT}.sizes.S.teacher.batch", "must be at least 1, got 0"),
        (r"S: \{network.*?\n", "S:\n", f"{SLOT}.sizes.S", "must be a section of keys with values, got nothing (null)"),
        (r"S: \{network.*?\n", "S: {teacher: {}, students: {}}\n", f"{SLOT}.sizes.S.network", "is missing: add it"),
        (r"S: \{network", "'S/1': {network", f"{SLOT}.sizes.S/1", "not a name"),
        (r"architecture: small", "architecture: smal", f"{SLOT}.sizes.S.network", "'architecture' must be one of 'small', 'edm2'"),
        (r"width: 48", "width: 47", f"{SLOT}.sizes.S.network.width", "multiple of 2"),
        (r"width: 48", "width: 2", f"{SLOT}.sizes.S.network.width", "must be at least 4, got 2"),
        (r"architecture: small", "architecture: edm2", f"{SLOT}.sizes.S.network.multipliers", "is missing: add it"),
        (r"dropout_resolution: null", "dropout_resolution: 16", f"{SLOT}.teacher.dropout_resolution", "must be null"),
        (r"select_samples: \d+", "select_samples: 6000", f"{SLOT}.evaluation.select_samples", "must be at most samples"),
        (r"report_seed: \d+", "report_seed: 100999", f"{SLOT}.evaluation.report_seed", "overlap"),
        (r"guidance: \[1\.0, (?=1)", "guidance: [", f"{SLOT}.evaluation.guidance", "must contain 1.0"),
        (r"solver: heun", "solver: hun", f"{SLOT}.evaluation.teacher.solver", "must be 'heun', 'ddim', 'dpm2m' or"),
        (r"t_mid: \S+", "t_mid: 1.6", f"{SLOT}.evaluation.t_mid", "must be less than 1.5708"),
        (r"t_mid: \S+", "t_mid: 1.5646", f"{SLOT}.evaluation.t_mid", "must come before the first step at arctan(80/sigma_data) = 1.56455"),
        (r"sigma_data: 0.5 ", "sigma_data: 200.0 ", f"{SLOT}.evaluation.t_mid", "= 0.380506, got "),
        (r"labels: \[0, 1,", "labels: [10, 1,", f"{SLOT}.figure2.labels", "must be below dataset.labels (10), got 10"),
        (r"resolution: 32", "resolution: 4", f"{SLOT}.dataset.resolution", "must divide by 8"),
        (r"resolution: 32", "resolution: 33", f"{SLOT}.dataset.resolution", "must divide 32"),
        (r"groups: 10 ", "groups: 10\n          averages: [0.1, 0.1]", f"{SLOT}.evaluation.averages", "must name each width once"),
        (r"groups: 10 ", "groups: 10\n          averages: [0.3]", f"{SLOT}.evaluation.averages[0]", "must be less than 0.28"),
        (r"groups: 10 ", "groups: 10\n          averages: [0.1]", f"{SLOT}.evaluation.averages", "needs a training that keeps snapshots"),
        (r"groups: 10 ", "groups: 10\n          checkpoints: [9, 9]", f"{SLOT}.evaluation.checkpoints", "must ascend without repetition"),
        (r"groups: 10 ", "groups: 10\n          checkpoints: [9]", f"{SLOT}.evaluation.checkpoints", "needs a training that keeps"),
        (r"groups: 10 ", "groups: 10\n          manifold_images: 3", f"{SLOT}.evaluation.manifold_images", "must be above neighbours"),
        (r"source: mnist5k", "source: mnist", f"{SLOT}.dataset.source", "'imagenet' or 'images', got 'mnist'"),
        (r"latent_guided:", "latent_gided:", "scales.demo.slots.latent_gided", "unknown name"),
        (r"        vae:.*?(?=        features:)", "", f"{SLOT}.vae", "is missing"),
        (r"^scale: demo", "scale: dmo", "scale", "unknown scale 'dmo'; did you mean 'demo'?"),
        (r"^scale: demo", "scale: demo\nscael: demo", "scael", "unknown key; did you mean 'scale'?"),
        (r"seed: 0 ", "seed: -1 ", "scales.demo.seed", "must be at least 0, got -1"),
        (r"seed: 0 ", f"seed: {'9' * 40} ", "scales.demo.seed", "got a huge integer"),
    ],
)  # fmt: skip
def test_the_first_fault_is_named(write: Write, pattern: str, replacement: str, key: str, words: str) -> None:
    text = sentence(write(edit(pattern, replacement)))
    assert text.startswith(f"params.yaml: {key}: "), text
    assert words in text, text


def test_a_classifier_without_labels_is_refused() -> None:
    """Before anything is trained; a data set that comes with labels only hides them from the networks."""
    data = pixel_slot("images", 8)
    slot = data["scales"]["demo"]["slots"]["pixel_cond"]
    slot["dataset"] |= {"labels": 0, "path": "data/mine"}
    slot["teacher"] = {**slot["teacher"], "label_dropout": 0.0}
    slot["evaluation"] = {**slot["evaluation"], "guidance": [1.0]}
    slot["students"] = {name: {**student, "guidance": None} for name, student in slot["students"].items()}
    with pytest.raises(ParamsError, match=r"pixel_cond\.features: needs labels to learn from"):
        validate(data)


@pytest.mark.parametrize(
    ("source", "side"), [("digits", 4), ("digits", 8), ("mnist5k", 4), ("mnist5k", 8), ("mnist5k", 16)]
)
def test_a_resolution_is_refused_where_the_classifier_refuses_it(source: str, side: int) -> None:
    """Before anything is trained: the library's own rule is the oracle."""
    data = pixel_slot(source, side)
    try:
        Classifier(resolution=side)
    except ValueError:
        with pytest.raises(
            ParamsError, match=r"pixel_cond\.dataset\.resolution: must be a power of two of at least 8 "
        ):
            validate(data)
    else:
        assert validate(data).active.slots["pixel_cond"].dataset.resolution == side


UNET = {
    "architecture": "edm2", "width": 16, "multipliers": [1, 2], "blocks": 1, "attention_resolutions": [4], "head_channels": 16,
    "embedding": "positional", "c_noise": "t", "norm": "double", "checkpointing": False, "precision": "fp32",
}  # fmt: skip
DDPMPP = {
    **{key: value for key, value in UNET.items() if key != "head_channels"},
    "architecture": "ddpmpp",
    "noise_channels": 32,
}


@pytest.mark.parametrize(
    ("network", "student", "words"),
    [
        (UNET, {}, None),
        (DDPMPP, {}, None),
        (
            {**UNET, "attention_resolutions": [16]},
            {},
            r"network\.attention_resolutions: must be some of the network's, \[8, 4\], got 16",
        ),
        (
            {**UNET, "head_channels": 64},
            {},
            r"network\.head_channels: must divide the 32 channels \(width · multiplier\) of the attention at resolution 4, got 64",
        ),
        (
            {**DDPMPP, "width": 132},
            {},
            r"network\.width: makes 132 channels .* for a group norm, which takes a multiple of 32",
        ),
        ({**UNET, "checkpointing": True}, {}, None),
        ({**UNET, "checkpointing": True}, {"tangent_engine": "finite_difference"}, None),
        (UNET, {"tangent_engine": "func"}, None),
        (
            {**UNET, "checkpointing": True},
            {"tangent_engine": "func"},
            r"students\.scd\.tangent_engine: must not be func, as the network of size S has checkpointing, .* use auto",
        ),
    ],
)
def test_a_network_that_cannot_be_built_or_trained_is_refused(network: Any, student: Any, words: str | None) -> None:
    """Before any job: the resolution is that of the latents, 8."""
    data = read_yaml(ROOT / "params.yaml")
    size = data["scales"]["demo"]["slots"]["latent_guided"]["sizes"]["S"]
    size["network"], size["students"]["scd"] = network, {**size["students"]["scd"], **student}
    if words is None:
        validate(data)
    else:
        with pytest.raises(ParamsError, match=words):
            validate(data)


def pixel_slot(source: str, side: int) -> dict[str, Any]:
    """The parameters with a pixel slot of labelled images beside the latent one."""
    data = plain()
    slots = data["scales"]["demo"]["slots"]
    slot = {key: value for key, value in slots["latent_guided"].items() if key not in ("vae", "figure2")}
    slots["pixel_cond"] = {**slot, "dataset": {"source": source, "resolution": side, "channels": 1, "labels": 10}}
    return data


def test_the_first_time_of_sampling_is_the_librarys() -> None:
    data = read_yaml(ROOT / "params.yaml")
    slot = data["scales"]["demo"]["slots"]["latent_guided"]
    first = t_max(slot["sigma_data"])
    slot["evaluation"]["t_mid"] = math.nextafter(first, 0)
    validate(data)
    slot["evaluation"]["t_mid"] = first
    with pytest.raises(ParamsError, match=r"evaluation\.t_mid: must come before the first step"):
        validate(data)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must hold keys with values"),
        ("- 1\n", "must hold keys with values"),
        ("scale: demo\nscale: smoke\n", "line 2: key 'scale' is given twice"),
        ("scale: [demo\n", "not valid YAML in line 2"),
        ("scale: *nothing\n", "not valid YAML in line 1"),
        ("? [a]\n: 1\n", "a key must be a plain word"),
        ("scale: !!python/object:os.system {}\n", "not valid YAML in line 1"),
        ("a: " + "[" * 5000, "not valid YAML"),
        ("a: &a {b: *a}\n", "a: unknown key"),
        ("scale: demo\nscales: &a {demo: *a}\n", "scales.demo.demo: unknown key"),
        (f"scale: {'1' * 5000}\n", "not valid YAML"),
        ("scale: \x07\n", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_yaml_mapping(write: Write, text: str, words: str) -> None:
    assert words in sentence(write(text))


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert "no such file" in sentence(tmp_path / "params.yaml")
    assert "cannot be read" in sentence(tmp_path)
    (tmp_path / "params.yaml").write_bytes(b"scale: \xff\xfe")
    assert "not UTF-8" in sentence(tmp_path / "params.yaml")


def test_faults_of_scales_that_are_not_active_are_named_too(write: Write) -> None:
    head, tail = TEXT.split("\n  smoke:\n")
    text = head + "\n  smoke:\n" + edit(TEACHER_LR, "lr: 0", tail)
    assert sentence(write(text)).startswith("params.yaml: scales.smoke.slots.latent_guided.teacher.lr: ")


def test_unknown_scale_on_the_command_line() -> None:
    with pytest.raises(ParamsError, match="scale=smok: unknown scale; did you mean 'smoke'"):
        load(ROOT / "params.yaml", scale="smok")


def test_schema_is_current() -> None:
    committed = json.loads((ROOT / "params.schema.json").read_text())
    assert committed == schema(), "run `python -m pipeline schema > params.schema.json`"


def test_schema_accepts_params_yaml_and_finds_faults() -> None:
    jsonschema = pytest.importorskip("jsonschema")

    validator = jsonschema.Draft202012Validator(schema())
    data = read_yaml(ROOT / "params.yaml")
    assert list(validator.iter_errors(data)) == []
    slot = data["scales"]["demo"]["slots"]["latent_guided"]
    slot["sizes"]["S"]["teacher"] = {"lr": -1}
    slot["techer"] = {}
    assert len(list(validator.iter_errors(data))) == 2


def test_every_number_has_a_source() -> None:
    """A line of params.yaml that holds a number says in a comment where it comes from, or stands in a documented row."""
    bare = [
        line
        for line in (ROOT / "params.yaml").read_text().splitlines()
        if re.search(r"[:\[,] *[-.0-9]", line.partition("#")[0]) and "#" not in line and "network:" not in line
    ]
    assert bare == []


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_importing_and_loading_is_cheap() -> None:
    code = (
        "import re, sys; from pipeline.params import load; load('params.yaml'); import pipeline.registry\n"
        "assert not {'torch', 'numpy', 'mlflow', 'submitit', 'pandas'} & sys.modules.keys()\n"
        "print(re.search(r'VmHWM:\\s+(\\d+) kB', open('/proc/self/status').read())[1])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 40 * 1024, "kB of peak memory"


SNAPSHOTS = "ramp_up: 50\\n          snapshots: {sigma_rel: [0.05, 0.10], every: 700}"


@pytest.mark.parametrize(
    ("keys", "key", "words"),
    [
        ("checkpoints: [700, 1000]", "checkpoints", "must be multiples of teacher.snapshots.every (700 for size S), got 1000"),
        ("averages: [0.1]", "averages", "need a snapshot at the end: teacher.iterations (2500 for size M) must be a multiple"),
    ],
)  # fmt: skip
def test_snapshots_are_where_they_are_measured(write: Write, keys: str, key: str, words: str) -> None:
    """Of a training that keeps them, at the iterations that are asked for; another one does not matter."""
    text = edit(r"groups: 10 ", f"groups: 10\\n          {keys}", edit(r"ramp_up: 50", SNAPSHOTS))
    text = edit(r"S: \{(.*?)teacher: \{\}", r"S: {\1teacher: {iterations: 2100}", text)
    with pytest.raises(ParamsError) as caught:
        load(write(text))
    assert f"{SLOT}.evaluation.{key}: " in str(caught.value)
    assert words in str(caught.value)
    good = edit(re.escape(keys), "checkpoints: [700, 1400]", text)
    assert load(write(good)).active.slots["latent_guided"].evaluation.checkpoints == (700, 1400)


def test_optional_keys_of_an_evaluation_that_are_absent_change_no_name() -> None:
    """Run ids are hashes of the sections: a key that a params.yaml does not have is not in them."""
    dumped = validate(plain()).active.slots["latent_guided"].evaluation.model_dump(mode="json")
    assert not {"averages", "checkpoints", "manifold_images"} & dumped.keys()
