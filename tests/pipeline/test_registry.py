# SPDX-License-Identifier: Apache-2.0
"""The registry: jobs, their order, what they depend on, and the sentences about what does not exist."""

from pathlib import Path
from typing import Any

import pytest

from pipeline import costs, dvcfile, registry
from pipeline.errors import RegistryError
from pipeline.job import Job
from pipeline.params import Evaluation, Params, load, read_yaml, validate
from pipeline.sweep import Plan, Point, sweep
from scm_core.sampling import diffusion_nfe
from tests.pipeline.plain import plain

ROOT = Path(__file__).resolve().parents[2]
SLOT = "latent_guided"
STUDENTS = ("scd", "sct")
TRAINED = [
    *(f"teacher-{size}" for size in "SM"),
    *(f"student-{size}-{method}" for size in "SM" for method in STUDENTS),
]
EVALUATED = [f"evaluate-{size}-{method}" for size in "SM" for method in ("teacher", *STUDENTS)]


# The reports that say what they were measured with, and those that say what was trained.
MEASURED = ["table2", "table5", "table6", "figure1", "figure5", "figure6", "figure7", "claims"]
SETTINGS = ["table4", "claims"]


@pytest.fixture
def params() -> Params:
    """Those of one slot: two sizes, two students."""
    return validate(plain())


@pytest.fixture(scope="module")
def whole() -> Params:
    return load(ROOT / "params.yaml", scale="demo")


def changed(path: str, value: Any) -> Params:
    """The demo's parameters with one value below its slot replaced."""
    data = plain()
    *above, last = path.split(".")
    section = data["scales"]["demo"] if above == ["scale"] else data["scales"]["demo"]["slots"][SLOT]
    for key in above if above != ["scale"] else ():
        section = section[key]
    section[last] = value
    return validate(data)


def names(jobs: list[Job]) -> list[str]:
    return [job.name for job in jobs]


def test_every_job_of_the_demo(params: Params) -> None:
    models = [f"{SLOT}-{size}-{method}" for size in "SM" for method in STUDENTS]
    evaluated = [name.replace("evaluate-", f"evaluate-{SLOT}-") for name in EVALUATED]
    shared = [f"{stage}-{SLOT}" for stage in ("dataset", "vae", "latents", "features", "reference", "reconstruction")]
    teachers = [f"teacher-{SLOT}-{size}" for size in "SM"]
    tables = ["table2", "table4", "table5", "table6"]
    figures = ["figure1", "figure2", "figure3", "figure5", "figure6", "figure7"]
    reports = [*tables, *figures, "claims", "evaluations"]
    expected = [
        *shared,
        *teachers,
        *(f"student-{model}" for model in models),
        *evaluated,
        *reports,
        f"gallery-{SLOT}",
        "report",
    ]
    assert names(registry.jobs(params)) == expected


def test_smoke_reaches_every_report_of_the_demo_and_every_method(whole: Params) -> None:
    found = {}
    for scale in ("smoke", "demo"):
        jobs = registry.jobs(whole, scale)
        slots = whole.scales[scale].slots
        students = [
            slots[j.axes["slot"]].student_for(j.axes["size"], j.axes["method"]) for j in jobs if j.stage == "student"
        ]
        found[scale] = {j.stage for j in jobs}, {student.method for student in students}
    assert found["smoke"] == found["demo"]
    stages, methods = found["demo"]
    assert stages == set(registry.STAGES)
    assert methods == {"scd", "sct", "multistep", "vsd", "scd_vsd", "dscd", "ect"}


def test_every_item_of_the_paper_is_an_output_of_the_demo(whole: Params) -> None:
    outputs = {path.as_posix() for job in registry.jobs(whole) for path in job.outputs}
    tables = [f"table{name}" for name in (*range(1, 8), "E3")]
    assert {f"reports/{name}.{kind}" for name in (*tables, "claims") for kind in ("csv", "md", "tex")} <= outputs
    assert {f"reports/figure{number}.{kind}" for number in range(1, 14) for kind in ("png", "pdf")} <= outputs


def test_ablations_of_the_demo_are_trained_from_three_seeds(whole: Params) -> None:
    """A repetition is a student with the same section, of its own name and so from another seed; its key in the file is its student's."""
    slot = whole.active.slots[SLOT]
    ablated = [name for name in slot.sizes["S"].students if name.startswith(("scd_norm", "scd_raw", "dscd_64"))]
    assert ablated == [f"{base}{end}" for base in ("scd_norm", "scd_raw", "dscd_64") for end in ("",)] + [
        f"{base}_seed{number}" for base in ("scd_norm", "scd_raw", "dscd_64") for number in (2, 3)
    ]
    first, second = (
        registry.find(whole, "student", {"slot": SLOT, "size": "S", "method": name})
        for name in ("scd_raw", "scd_raw_seed2")
    )
    assert (first.params, first.inputs) == (second.params, second.inputs)
    assert registry.settings(first, whole) == registry.settings(second, whole)
    assert first.outputs != second.outputs
    assert "evaluate-latent_guided-S-scd_raw_seed2" in registry.find(whole, "figure5", {}).inputs
    more = read_yaml(ROOT / "params.yaml")
    more["scales"]["demo"]["slots"][SLOT]["sizes"]["S"]["repeats"]["scd_raw"] = 4
    after = validate(more)
    assert registry.settings(registry.find(after, "student", dict(first.axes)), after) == registry.settings(
        first, whole
    )


def test_jobs_come_after_what_they_read_and_every_input_is_made(params: Params) -> None:
    jobs = registry.jobs(params)
    made: set[Path] = set()
    for job in jobs:
        assert set(job.inputs.values()) <= made, job.name
        assert not made & set(job.outputs), job.name
        made.update(job.outputs)


def test_a_student_that_starts_as_another_one_waits_for_it(whole: Params) -> None:
    jobs = registry.jobs(whole)
    for size in "SM":
        axes = {"slot": SLOT, "size": size}
        student = registry.find(whole, "student", {**axes, "method": "scd_vsd"})
        first = registry.find(whole, "student", {**axes, "method": "scd"})
        assert student.inputs["start"] == first.outputs[0]
        assert {"student-latent_guided-" + size + "-scd", "teacher-latent_guided-" + size} <= set(
            names(registry.parents(student, jobs))
        )
    assert "start" not in registry.find(whole, "student", {"slot": SLOT, "size": "M", "method": "vsd"}).inputs
    data = read_yaml(ROOT / "params.yaml")
    data["scales"]["demo"]["slots"][SLOT]["sizes"]["M"]["students"] = {"scd_vsd": {}, "vsd": {}, "scd": {}, "sct": {}}
    ordered = [job for job in registry.jobs(validate(data)) if job.stage == "student" and job.axes["slot"] == SLOT]
    assert [job.axes["method"] for job in ordered if job.axes["size"] == "M"] == ["scd", "scd_vsd", "vsd", "sct"]


def test_outputs_do_not_lie_in_one_another(params: Params) -> None:
    outputs = [output for job in registry.jobs(params) for output in job.outputs]
    assert [(a, b) for a in outputs for b in outputs if a != b and b.is_relative_to(a)] == []


def test_parents_and_primary_input(params: Params) -> None:
    jobs = registry.jobs(params)
    student = registry.find(params, "student", {"slot": SLOT, "size": "M", "method": "scd"})
    assert names(registry.parents(student, jobs)) == [
        f"teacher-{SLOT}-M",
        f"latents-{SLOT}",
        f"vae-{SLOT}",
    ]
    assert student.command == "python -m pipeline run student scale=demo slot=latent_guided size=M method=scd"
    evaluate = registry.find(params, "evaluate", {"slot": SLOT, "size": "S", "method": "teacher"})
    assert list(evaluate.inputs) == ["teacher", "latents", "vae", "features", "reference"]


def test_the_critical_path_is_the_longest_chain(params: Params) -> None:
    """Against every chain written out: no job starts a longer one than `critical_path` says, and one is as long."""
    jobs = registry.jobs(params)
    children = {job.name: [child for child in jobs if job in registry.parents(child, jobs)] for job in jobs}

    def chains(job: Job) -> list[float]:
        return [job.resources.seconds + rest for child in children[job.name] for rest in chains(child)] or [
            job.resources.seconds
        ]

    after = registry.critical_path(jobs)
    assert after == pytest.approx({job.name: max(chains(job)) for job in jobs})
    assert after["student-latent_guided-M-scd"] > after["student-latent_guided-M-sct"]


@pytest.mark.parametrize("scale", load(ROOT / "params.yaml").scales)
def test_the_cost_of_an_evaluation_counts_what_the_sweep_asks_for(params: Params, scale: str) -> None:
    """Every sample of every point, by the sweep itself when scale 1 is not the best and no two spaces have the same best one; the library
    counts the passes."""
    for job in registry.jobs(params, scale):
        if job.stage != "evaluate":
            continue
        slot, method = params.scales[scale].slots[job.axes["slot"]], job.axes["method"]
        how = slot.evaluation
        student = None if method == "teacher" else slot.student_for(job.axes["size"], method)
        guidable = slot.dataset.labels > 0 if student is None else student.guidance is not None
        asked: list[Point] = []

        def measure(point: Point, asked: list[Point] = asked, how: Evaluation = how) -> dict[str, dict[str, float]]:
            asked.append(point)
            guidance = point.guidance or 0.0
            return {space: {"fid": -guidance if i == 0 else abs(guidance - 1.8)} for i, space in enumerate(how.spaces)}

        training = student or slot.teacher_for(job.axes["size"])
        kept = training.snapshots is not None and training.snapshots.measured
        earlier = [(0.1, n) for n in how.checkpoints if kept and n < training.iterations]
        plan = Plan.of(how, student.steps if student else (how.teacher.steps,), guidable, checkpoints=earlier)
        sweep(plan, how.spaces, measure)
        images = sum(point.samples for point in asked)
        passes = sum(
            point.samples
            * (
                point.steps
                if student
                else diffusion_nfe(how.teacher.solver, point.steps, point.guidance not in (None, 1.0))
            )
            for point in asked
        )
        flops = slot.sizes[job.axes["size"]].network.flops(slot.items) * passes
        expected = costs.START + flops / costs.CPU_FLOPS + costs.IMAGE * images
        if hardware := params.scales[scale].hardware:
            per_image = {"inception": 11.4e9, "dinov2": 162e9}
            flops += images * sum(per_image[space] for space in how.spaces)
            flops += images * 2.515e12 * (slot.vae is not None)  # to decode 512 × 512 pixels
            expected = costs.GPU_START + flops / (how.processes * hardware.flops)
        assert job.resources.seconds == pytest.approx(expected, abs=0.06), job.name


def test_sources_exist(params: Params) -> None:
    missing = {str(path) for job in registry.jobs(params) for path in job.sources if not (ROOT / path).is_file()}
    assert missing == set()


def test_declared_keys_exist_in_the_file_of_every_scale(params: Params) -> None:
    """DVC looks them up in the file as it is, before any merging."""
    data = read_yaml(ROOT / "params.yaml")
    for scale in params.scales:
        for job in registry.jobs(params, scale):
            for key in job.params:
                node = data
                for part in key.split("."):
                    assert part in node, f"{job.name}: {key}"
                    node = node[part]


@pytest.mark.parametrize(
    ("path", "value", "first_rerun"),
    [
        ("scale.seed", 1, ["vae", "latents", "features", *TRAINED, "figure3"]),
        ("dataset.labels", 10, []),
        ("vae.kl_weight", 0.5, ["vae"]),
        ("vae.engine", {"batch": 8, "processes": 2}, []),
        ("features.dim", 32, ["features"]),
        ("sigma_data", 1.0, ["latents", *TRAINED, *EVALUATED, "figure2", "gallery"]),
        ("teacher.lr", 0.5, ["teacher-S", "teacher-M", *SETTINGS]),
        ("students.scd.lr", 0.5, ["student-S-scd", "student-M-scd", *SETTINGS]),
        ("students.sct.tangent_c", 0.5, ["student-S-sct", "student-M-sct", *SETTINGS]),
        ("sizes.S.network.width", 40, ["teacher-S", "student-S-scd", "student-S-sct", *SETTINGS]),
        ("sizes.S.teacher", {"lr": 0.5}, ["teacher-S", *SETTINGS]),
        ("sizes.M.students.scd", {"batch": 8}, ["student-M-scd", *SETTINGS]),
        ("sizes.M.engine", {"accumulation": 2}, []),
        ("evaluation.neighbours", 4, ["reconstruction", *EVALUATED, "figure2", *MEASURED]),
        ("evaluation.t_mid", 1.0, [*EVALUATED, "figure2", "gallery", *MEASURED]),
        ("figure2.seed", 5, ["figure2"]),
    ],
)  # fmt: skip
def test_a_number_changes_the_settings_of_what_depends_on_it_alone(
    params: Params, path: str, value: Any, first_rerun: list[str]
) -> None:
    after = changed(path, value)
    differ = [
        a.name.replace(f"-{SLOT}", "")
        for a, b in zip(registry.jobs(params), registry.jobs(after), strict=True)
        if registry.settings(a, params) != registry.settings(b, after)
    ]
    assert sorted(differ) == sorted(first_rerun)


def test_a_scales_note_is_a_key_of_what_shows_it_alone(whole: Params) -> None:
    """Another note draws tables, figures and the page again; no network, no evaluation and no table of points depends on it."""
    data = read_yaml(ROOT / "params.yaml")
    data["scales"]["smoke"]["note"] += ", still"
    before, after = whole.with_scale("smoke"), validate(data).with_scale("smoke")
    pairs = zip(registry.jobs(before), registry.jobs(after), strict=True)
    differ = {a.name for a, b in pairs if registry.settings(a, before) != registry.settings(b, after)}
    reports = {job.name for job in registry.jobs(before) if job.is_report}
    assert differ == reports - {"evaluations"}
    assert "claims" in differ
    del data["scales"]["smoke"]["note"]
    assert not any("note" in registry.settings(job, whole) for job in registry.jobs(validate(data), "smoke"))


PUBLISHED = {
    "pretrained": "a/folder",
    "sha256": "0" * 64,
    "latent_channels": 4,
    "downsampling": 4,
    "statistics": "measured",
}


@pytest.mark.parametrize(
    ("change", "rerun"),
    [
        ({"sha256": "1" * 64}, ["vae"]),
        ({"pretrained": "another/folder"}, ["vae"]),
        ({"statistics": {"mean": [0.0] * 4, "std": [1.0] * 4}}, ["latents"]),
        ({"engine": {"batch": 8, "processes": 8}}, []),
    ],
)
def test_what_depends_on_a_published_autoencoder(change: dict[str, Any], rerun: list[str]) -> None:
    before, after = changed("vae", PUBLISHED), changed("vae", {**PUBLISHED, **change})
    differ = [
        a.stage
        for a, b in zip(registry.jobs(before), registry.jobs(after), strict=True)
        if registry.settings(a, before) != registry.settings(b, after)
    ]
    assert differ == rerun


def test_a_published_autoencoder_is_verified_before_any_image_is_read() -> None:
    job = registry.find(changed("vae", PUBLISHED), "vae", {"slot": SLOT})
    assert dict(job.inputs) == {}


def test_a_number_that_a_size_replaces_does_not_matter_to_it(params: Params) -> None:
    before, after = changed("sizes.S.teacher", {"lr": 0.5}), changed("sizes.S.teacher", {"lr": 0.5})
    data = after.model_dump(mode="json")
    slot = data["scales"]["demo"]["slots"][SLOT]
    slot["teacher"]["lr"] = 0.25
    for size in slot["sizes"].values():
        size["teacher"] = {"lr": 0.5} if size["teacher"]["lr"] == 0.5 else {}
    after = validate(data)
    for size, same in (("S", True), ("M", False)):
        job = registry.find(before, "teacher", {"slot": SLOT, "size": size})
        assert (registry.settings(job, before) == registry.settings(job, after)) is same


def test_figure_7_of_the_paper_needs_no_ablations() -> None:
    """Teachers, sCD, VSD and sCD+VSD of every size that trains them, and neither multistep nor discrete students."""
    figure = registry.find(load(ROOT / "params.yaml", "paper"), "figure7", {})
    methods = [name.split("-", 3)[3] for name in figure.inputs]
    assert sorted(set(methods)) == ["scd", "scd_vsd", "teacher", "vsd"]
    assert methods.count("vsd") == 1
    assert methods.count("scd_vsd") == 5


def test_what_no_other_job_reads_wants_all_jobs(params: Params) -> None:
    for scale in params.scales:
        jobs = registry.jobs(params, scale)
        wanted = {job.name for job in registry.ends(jobs)}
        for job in reversed(jobs):
            if job.name in wanted:
                wanted.update(parent.name for parent in registry.parents(job, jobs))
        assert wanted == {job.name for job in jobs}
    assert all(job.is_report for job in registry.ends(registry.jobs(params, "demo")))


def test_a_slot_of_pixel_data_has_no_vae_and_no_latents() -> None:
    data = plain()
    slot = data["scales"]["smoke"]["slots"].pop(SLOT)
    del slot["vae"]
    data["scales"]["smoke"]["slots"]["pixel_cond"] = slot
    jobs = registry.jobs(validate(data), "smoke")
    stages = {"dataset", "features", "reference", "teacher", "student", "evaluate"}
    assert {job.stage for job in jobs} == stages | {
        "table1",
        "table3",
        "table7",
        "figure3",
        "claims",
        "evaluations",
        "gallery",
        "report",
    }
    teacher = next(job for job in jobs if job.stage == "teacher")
    assert dict(teacher.inputs) == {"dataset": Path("runs/smoke/pixel_cond/dataset")}


@pytest.mark.parametrize(
    ("stage", "axes", "words"),
    [
        ("studnet", {}, "studnet: unknown stage; did you mean 'student'?"),
        ("xyz", {}, "known stages are dataset, vae"),
        ("teacher", {"slot": SLOT, "siez": "S"}, "siez=S: stage teacher has no axis siez; did you mean 'size'?"),
        ("teacher", {"slot": SLOT}, "size: stage teacher needs this axis; add size=… (S or M)"),
        ("teacher", {"slot": SLOT, "size": "XL"}, "size=XL: unknown size for teacher at scale demo; known values are S, M"),
        ("student", {"slot": SLOT, "size": "S", "method": "scdd"}, "did you mean 'scd'?"),
        ("student", {"slot": SLOT, "size": "S", "method": "teacher"}, "unknown method"),
        ("dataset", {"slot": "latent"}, "slot=latent: unknown slot"),
        ("table2", {"slot": SLOT}, "it has no axes"),
    ],
)  # fmt: skip
def test_what_does_not_exist_is_named(params: Params, stage: str, axes: dict[str, str], words: str) -> None:
    with pytest.raises(RegistryError) as caught:
        registry.find(params, stage, axes)
    assert words in str(caught.value)


def test_dvc_yaml_is_current() -> None:
    generated = dvcfile.generate(load(ROOT / "params.yaml"))
    assert (ROOT / "dvc.yaml").read_text() == generated, "run `python -m pipeline dvc > dvc.yaml`"


def test_dvc_yaml_leaves_the_scale_to_params() -> None:
    """The same text for scales of the same axes, and no scale's name in it."""
    texts = {dvcfile.generate(validate(plain()).with_scale(scale)) for scale in ("smoke", "demo")}
    assert len(texts) == 1
    for scale in ("smoke", "demo"):
        text = dvcfile.generate(load(ROOT / "params.yaml", scale=scale))
        assert "smoke" not in text
        assert "demo" not in text
