# SPDX-License-Identifier: Apache-2.0
"""reports/report.html: complete, sound, escaped, the same for the same inputs; what is missing is said to be."""

import base64
import hashlib
import json
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import manifest, page, paths, registry
from pipeline.done import DONE, states
from pipeline.errors import PipelineError
from pipeline.files import host
from pipeline.params import load, read_yaml, validate
from pipeline.webpage import charts, curves, graph, pictures, runs, tables
from pipeline.webpage import render as rendering
from tests.pipeline.pages import (
    COMMIT,
    HOSTILE,
    ROOT,
    Made,
    Page,
    claims,
    made_repository,
    sweep_rows,
    table,
    write_csv,
    write_png,
)

CSS = (ROOT / "pipeline/webpage/page.css").read_text()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    with made_repository(tmp_path_factory) as made:
        yield made


@pytest.fixture(scope="module")
def html(made: Made, tmp_path_factory: pytest.TempPathFactory) -> str:
    """With claims, whether or not the registry has a stage for them."""
    file = write_csv(tmp_path_factory.mktemp("claims") / "claims.csv", claims(made.evaluations))
    return made.render(claims_csv=file)


@pytest.fixture(scope="module")
def parsed(html: str) -> Page:
    return Page(html)


def test_the_page_is_sound(parsed: Page) -> None:
    assert parsed.errors == []
    ids = [attributes["id"] for _, attributes, _ in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 50
    for name in ("html", "head", "main", "h1", "header", "nav", "footer"):
        count = len(parsed.all(name))
        assert count == 1, f"{count} elements <{name}>"
    assert parsed.all("html")[0]["lang"] == "en"


def test_every_reference_within_the_page_leads_somewhere(parsed: Page) -> None:
    ids = {attributes["id"] for _, attributes, _ in parsed.elements if "id" in attributes}
    links = [attributes["href"] for attributes in parsed.all("a")]
    assert len(links) > 100
    assert {link for link in links if not link.startswith("#")} == set()
    assert {link for link in links if link[1:] not in ids} == set()
    for key in ("for", "aria-controls", "aria-labelledby", "data-unfold"):
        for _, attributes, _ in parsed.elements:
            assert set(attributes.get(key, "").split()) <= ids, attributes


def test_nothing_is_loaded_from_outside(html: str, parsed: Page) -> None:
    loading = ("src", "srcset", "poster", "data", "action", "background")
    for name, attributes, _ in parsed.elements:
        assert name not in ("link", "iframe", "object", "embed", "base", "video", "audio"), name
        assert all(attributes[key].startswith("data:image/") for key in loading if key in attributes), attributes
    style = html.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(a["content"] for a in parsed.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; img-src data:;")
    for script in re.findall(r"<script>(.*?)</script>", html, re.DOTALL):
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy
        assert not re.search(r"https?:|fetch|XMLHttpRequest|import\(|WebSocket", script)


def test_pictures_have_words_and_room(parsed: Page) -> None:
    images = parsed.all("img")
    assert len(images) >= 5
    for image in images:
        assert len(image["alt"]) > 15
        assert int(image["width"]) > 0
        assert int(image["height"]) > 0
    for drawing in parsed.all("svg"):
        assert drawing.get("aria-label") or drawing.get("aria-hidden") == "true", drawing


def test_headings_form_an_outline(parsed: Page) -> None:
    levels = [int(name[1]) for name, _, _ in parsed.elements if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1
    assert [(a, b) for a, b in pairwise(levels) if b > a + 1] == []


def test_every_control_has_a_name_and_what_scrolls_can_be_reached(parsed: Page) -> None:
    labelled = {attributes["for"] for attributes in parsed.all("label")}
    assert all(attributes["id"] in labelled for attributes in parsed.all("input"))
    scrolling = [a for _, a, _ in parsed.elements if "scroll" in a.get("class", "").split()]
    assert scrolling
    assert all(a.get("tabindex") == "0" and a.get("aria-label") and a.get("role") == "region" for a in scrolling)


def test_each_cell_of_ours_leads_to_its_run(made: Made, parsed: Page) -> None:
    """By the table's own rows: links of the cells in the order of the file, method, NFE, FID and run."""
    cells = [a["href"] for name, a, above in parsed.elements if name == "a" and "table2-rows" in above]
    assert cells == [f"#run-{run}" for run in made.evaluations for _ in range(4)]
    ids = {attributes["id"] for attributes in parsed.all("article") if "id" in attributes}
    assert {link[1:] for link in cells} <= ids


def test_the_lineage_of_a_number_is_on_the_page(made: Made, html: str) -> None:
    """From an evaluation to the data: run, commit, digest, parents."""
    evaluation = next(run for run in made.evaluations if "-M-scd-" in run)
    seen, wanted = [], [evaluation]
    while wanted:
        run = wanted.pop()
        entry = html.partition(f'<article class="entry" id="run-{run}"')[2].partition("</article>")[0]
        assert run in entry
        assert COMMIT in entry
        assert len(re.findall(r"<code>[0-9a-f]{64}</code>", entry)) >= 2
        parents = re.findall(r'href="#run-([^"]+)"', entry)
        wanted += [parent for parent in parents if parent not in seen]
        seen.append(run)
    stages = {run.partition("-")[0] for run in seen}
    assert stages >= {"evaluate", "student", "teacher", "latents", "vae", "features", "reference", "dataset"}


def test_parameters_that_differ_are_named(html: str) -> None:
    students = re.findall(r'<article class="entry" id="run-(student-[^"]+)".*?</article>', html, re.DOTALL)
    sct = next(run for run in students if "-S-sct-" in run)
    entry = html.partition(f'id="run-{sct}"')[2].partition("</article>")[0]
    assert re.search(r"<code>student\.method</code> sct <span class=\"usual\">\(most: scd\)", entry) or re.search(
        r"<code>student\.guidance</code> null", entry
    )
    assert "<code>seed</code>" not in entry.partition("<details>")[0]


def test_published_rows_are_there_unchanged(parsed: Page) -> None:
    text = parsed.text()
    for row in table([])[:15]:
        assert f"{row['method']} {row['nfe']} {row['fid']}" in text


def test_the_verdicts_stand_on_top_and_beside_the_claims(parsed: Page) -> None:
    text = parsed.text()
    assert "✓ holds: 1 ✗ does not hold: 1 ? not testable at this scale: 1" in text
    kinds = [a["class"] for a in parsed.all("article") if a.get("class", "").startswith("claim")]
    assert kinds == ["claim holds", "claim fails", "claim open"]
    assert text.count("On mnist5k, in toy (8-d)") == 3
    assert "± 0.02" in text


def test_the_scales_note_stands_before_the_verdicts(made: Made, parsed: Page) -> None:
    """What smoke finds means nothing, and its page says so before anything else; another scale's has no such words."""
    note = made.params.note_of("smoke")
    assert note.endswith("its results mean nothing")
    text = parsed.text()
    assert text.index(f"{note}.") < text.index("holds: 1")
    assert text.count(f"{note}.") >= 2
    data = read_yaml(ROOT / "params.yaml")
    del data["scales"]["smoke"]["note"]
    silent = rendering.render(made.page, validate(data).with_scale("smoke"), made.inputs(), made.runs())
    assert '<p class="warning">' not in silent


def test_what_comes_from_files_is_escaped(made: Made, tmp_path: Path) -> None:
    row = {**table(made.evaluations)[-2], "section": f"Ours {HOSTILE}", "method": HOSTILE, "fid": HOSTILE}
    nasty = dict.fromkeys(claims([])[0], HOSTILE) | {"verdict": "holds"}
    notes = tmp_path / "table2.md"
    notes.write_text(f"# Table 2 {HOSTILE}\n\n{HOSTILE}\n")
    index = tmp_path / "grids.json"
    write_png(tmp_path / "a.png")
    entry = {
        "slot": HOSTILE,
        "size": HOSTILE,
        "method": HOSTILE,
        "steps": 1,
        "guidance": 1.0,
        "seed": 0,
        "file": "a.png",
    }
    index.write_text(json.dumps({"format": 1, "grids": [{**entry, "arrangement": HOSTILE, "run": HOSTILE}]}))
    found = Page(
        made.render(
            table2_csv=write_csv(tmp_path / "t.csv", [row]),
            table2_md=notes,
            claims_csv=write_csv(tmp_path / "c.csv", [nasty]),
            grids_json=index,
            a_png=tmp_path / "a.png",
        )
    )
    assert found.errors == []
    assert len(found.all("script")) == 2
    assert all(not key.startswith("on") for _, attributes, _ in found.elements for key in attributes)
    assert all(attributes["src"].startswith("data:") for attributes in found.all("img"))
    assert found.text().count('<script>alert("1")</script>') >= 8
    assert "stressed" in [text for name, text in found.texts if name == "em"]


def test_what_is_missing_is_said_to_be(made: Made) -> None:
    inputs = {
        name: path for name, path in made.inputs().items() if not name.startswith("gallery-") and name != "table2.csv"
    }
    page_text = Page(rendering.render(made.page, made.params, inputs, {})).text()
    assert "Missing: no samples were made" in page_text
    assert re.search(r"Not made at this scale: .*Table 2", page_text)
    assert re.search(r"Not drawn at this scale: .*Figure 13", page_text) or "Figure 13:" in page_text
    if not any("claims" in name for name in made.inputs()):
        assert "Missing: the claims have not been judged" in page_text
    assert "not recorded here" in page_text  # of files whose run nobody names


def test_a_run_that_is_gone_is_no_link(made: Made) -> None:
    dataset = made.root / "runs/smoke/latent_guided/dataset/manifest.json"
    before = dataset.read_text()
    try:
        dataset.write_text(before.replace('"format": 1', '"format": 0'))
        found = Page(made.render())
    finally:
        dataset.write_text(before)
    assert "Missing: dataset-latent_guided ." in found.text() or "Missing: dataset-latent_guided" in found.text()
    assert "(not here any more)" in found.text()
    ids = {attributes["id"] for _, attributes, _ in found.elements if "id" in attributes}
    assert {a["href"][1:] for a in found.all("a")} <= ids


def test_the_same_inputs_give_the_same_bytes_but_for_what_is_recorded(made: Made, html: str) -> None:
    again = made.render()
    assert made.render() == again
    student = next(job for job in made.jobs if job.stage == "student")
    run = manifest.read(manifest.path_of(student))
    assert run is not None
    try:
        made.record(student, run["run"], "decaf" * 8, seconds=12345.0)
        other = made.render()
    finally:
        made.record(student, run["run"], COMMIT)
    assert other != again
    assert rendering.without_records(other) == rendering.without_records(again)
    assert "decaf" * 8 in "".join(rendering.recorded_parts(other))
    assert COMMIT not in rendering.without_records(html)
    assert '<td class="n">2 s</td>' in html
    assert '<td class="n">2 s</td>' not in rendering.without_records(html)


def test_cost_and_environment_are_sums_of_the_records(made: Made, parsed: Page) -> None:
    text = parsed.text()
    assert "3.11.7" in text
    assert "A processor" in text
    students = sum(job.stage == "student" for job in made.jobs)
    assert f"student {students} {2 * students} s" in text


def test_a_report_of_another_scale_is_refused(made: Made) -> None:
    """All scales write to reports/: what lies there now need not be what this scale has made."""
    file = made.root / "reports/table2.csv"
    before = file.read_bytes()
    try:
        file.write_bytes(before + b"another,scale\n")
        with pytest.raises(PipelineError) as caught:
            manifest.read_inputs(made.page)
        found = states(made.jobs, made.params)
    finally:
        file.write_bytes(before)
    assert "report: input reports/table2.csv is not what scale smoke made" in str(caught.value)
    assert "python -m pipeline run table2 scale=smoke" in str(caught.value)
    assert found["table2"] == "changed"
    assert found["report"] != DONE
    assert manifest.read_inputs(made.page)["table2.csv"].run is not None


def test_the_stage_writes_it_as_a_user_runs_it(made: Made, tmp_path: Path) -> None:
    env = {"SCM_ROOT": str(made.root), "SCM_TRACKING": "off", "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pipeline", "run", "report", "scale=smoke"]
    done = subprocess.run(command, cwd=made.root, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    file = made.root / "reports/report.html"
    assert Page(file.read_text()).errors == []
    assert file.stat().st_size < 15_000_000
    assert states(made.jobs, made.params)["report"] == DONE
    environment = json.loads(paths.record_file(made.page).read_text())["environment"]
    assert environment["python"] == platform.python_version()
    assert "numpy" in environment["packages"]
    assert host() not in str(environment)


def test_a_page_that_would_be_too_large_is_refused(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "MOST_BYTES", 1000)
    with pytest.raises(PipelineError, match=r"report.html: would have .* MB, more than"):
        made.render()


def test_large_pictures_are_reduced_and_small_ones_are_not_touched(tmp_path: Path) -> None:
    small = write_png(tmp_path / "small.png")
    kept = pictures.picture(small, 100_000)
    assert base64.b64decode(kept.source.partition(",")[2]) == small.read_bytes()
    assert not kept.reduced
    noise = np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    reduced = pictures.picture(tmp_path / "large.png", 60_000)
    content = base64.b64decode(reduced.source.partition(",")[2])
    assert reduced.reduced
    assert reduced.source.startswith("data:image/webp;base64,")
    assert len(content) <= 60_000
    assert (reduced.width, reduced.height) == (800, 600)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "is no index of samples"),
        ("{", "is no index of samples"),
        ('{"format": 1, "grids": [{"slot": "a"}]}', "grids[0].size: is missing"),
    ],
)
def test_a_broken_index_is_named(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "grids.json").write_text(content)
    with pytest.raises(PipelineError) as caught:
        pictures.read_galleries(tmp_path / "grids.json", {}, {})
    assert words in str(caught.value)


def test_an_index_cannot_name_files_of_others(tmp_path: Path) -> None:
    write_png(tmp_path / "secret.png")
    index = tmp_path / "gallery" / "grids.json"
    index.parent.mkdir()
    entry = {
        "slot": "a",
        "size": "S",
        "method": "scd",
        "steps": 1,
        "guidance": None,
        "seed": 0,
        "file": "../secret.png",
    }
    index.write_text(json.dumps({"format": 1, "grids": [entry]}))
    with pytest.raises(PipelineError, match="is no input of the page"):
        pictures.read_galleries(index, {"gallery": index.parent}, {})


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "figure1.png").write_bytes(b"no picture")
    with pytest.raises(PipelineError, match=r"figure1.png: cannot be read as a picture"):
        pictures.picture(tmp_path / "figure1.png", 1000)


def test_quantities_get_a_column_for_each_size(tmp_path: Path) -> None:
    base = {"section": "Ours", "sampler": "sCD", "quantity": "fid", "value_se": "0.1"}
    rows = [
        {**base, "size": "S", "value": "3.0", "run": "a-1"},
        {**base, "size": "M", "value": "2.0", "run": "b-2 c-3"},
    ]
    found = tables.as_table("table5", rows, {run: f"run-{run}" for run in ("a-1", "b-2")}, "Table 5", [])
    assert found.columns == ["sampler", "quantity", "S", "M"]
    ((_, _, small, medium),) = found.sections[0].rows
    assert (small.text, small.error, small.anchor) == ("3.0", "0.1", "run-a-1")
    assert (medium.text, medium.anchor) == ("2.0", "run-b-2")


def test_errors_stand_behind_their_values_and_ours_before_what_was_published() -> None:
    found = tables.as_table("table1", table(["x-1"]), {"x-1": "run-x-1"}, "Table 1", [])
    assert found.columns == ["method", "NFE", "FID", "run"]
    assert [section.ours for section in found.sections] == [True, False]
    assert found.folded
    assert found.published == 15
    (ours, missing) = found.sections[0].rows
    assert (ours[2].text, ours[2].error) == ("0.123", "0.456")
    assert missing[2].missing
    assert found.numeric == [False, True, True, False]
    alone = tables.as_table("table3", table([])[:15], {}, "Table 3", [])
    assert not alone.folded


@pytest.mark.parametrize("text", ["1.5", "63x2", "1.5B", "0.49M", "10%", "-1.2", "1.0e-4", "250"])
def test_numbers_are_told_from_words(text: str) -> None:
    assert tables.is_number(text)
    assert not tables.is_number(f"{text} of it")


def test_checkpoints_end_with_what_was_published() -> None:
    """FID of the first checkpoint, the second, and the mean of the two reported sets with its error."""
    rows = [{key: str(value) for key, value in row.items()} for row in sweep_rows(20.0)]
    assert curves.checkpoints(rows, 2560.0) == {
        1: [(640.0, 21.0, 0.5), (1280.0, 20.5, 0.5), (2560.0, 20.0, pytest.approx(0.5 / 2**0.5))]
    }
    assert curves.checkpoints([row for row in rows if not row["nimg"]], 2560.0) == {}


def test_the_curves_published_with_a_model_come_before_its_log(made: Made) -> None:
    stages = runs.stages(made.jobs)
    run = next(run for stage in stages if stage.name == "teacher" for run in stage.runs)
    assert [row["nimg"] for row in curves.scalars(run)][:2] == [64, 128]
    folder = made.root / run.job.outputs[0]
    write_csv(folder / "training.csv", [{"nimg": 5, "loss": 0.25}])
    try:
        published = runs.Run(run.job, {**run.made, "files": {"training.csv": {}}}, run.digest, run.record)
        assert [row["loss"] for row in curves.scalars(published)] == ["0.25"]
    finally:
        (folder / "training.csv").unlink()


def test_charts_draw_points_where_they_belong() -> None:
    """Pixels against the axes' own ticks: what is a tenth on a logarithmic axis is as far from one as one is from ten."""
    line = charts.Series("a", [0, 1, 2, 3], [10.0, 1.0, float("nan"), 0.1])
    drawn = str(charts.line_chart([line], charts.Axis("x"), charts.Axis("y", log=True), "what it is"))
    path = re.search(r'<path d="(M[^"]+)" class="line"', drawn.partition('<ul class="key">')[0])
    assert path
    words = re.findall(r"([ML])([\d.]+) ([\d.]+)", path[1])
    assert [word[0] for word in words] == ["M", "L", "M"]  # not finite: the line is broken
    (x0, y0), (x1, y1), (x3, y3) = ((float(x), float(y)) for _, x, y in words)
    assert y3 - y1 == pytest.approx(y1 - y0, abs=0.15)
    assert x3 - x0 == pytest.approx(3 * (x1 - x0), abs=0.3)
    labels = dict(re.findall(r'y="([\d.]+)" text-anchor="end">([^<]+)<', drawn))
    assert {value: float(y) - 4 for y, value in labels.items()}["1"] == pytest.approx(y1, abs=0.1)
    assert charts.line_chart([charts.Series("a", [1], [float("inf")])], charts.Axis("x"), charts.Axis("y"), "") == ""


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (-3.2, 7.9), (1e-7, 2e-7), (5.0, 5e6)])
def test_ticks_are_round_and_within(low: float, high: float) -> None:
    found = charts.ticks(low, high)
    assert 3 <= len(found) <= 11
    assert all(low - 1e-9 * abs(high) <= value <= high * (1 + 1e-9) for value in found)
    steps = {round((b - a) / (high - low), 6) for a, b in pairwise(found)}
    assert len(steps) == 1


def test_long_lines_are_thinned_with_both_ends() -> None:
    line = charts.thinned(charts.Series("a", list(range(10_001)), [float(i) for i in range(10_001)]))
    assert len(line.x) <= charts.POINTS + 1
    assert (line.x[0], line.x[-1]) == (0, 10_000)


@pytest.mark.parametrize("scale", ["smoke", "paper"])
def test_the_rule_graph_shows_every_stage_once_and_no_boxes_overlap(scale: str) -> None:
    params = load(ROOT / "params.yaml", scale)
    jobs = [job for job in registry.jobs(params) if job.stage != "report"]
    drawn = str(graph.rule_graph(jobs))
    assert str(graph.rule_graph(jobs)) == drawn
    assert sorted(re.findall(r'href="#stage-(\w+)"', drawn)) == sorted({job.stage for job in jobs})
    boxes = [
        tuple(map(float, box))
        for box in re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', drawn)
    ]
    assert len(boxes) == len(graph.nodes(jobs))
    for i, (x, y, w, h) in enumerate(boxes):
        assert x >= 0
        assert y >= 0
        assert not [1 for a, b, c, d in boxes[:i] if x < a + c and a < x + w and y < b + d and b < y + h]


def test_the_rule_graph_says_what_the_registry_says() -> None:
    """What can be reached along drawn edges is what jobs of other stages depend on."""
    jobs = [job for job in registry.jobs(load(ROOT / "params.yaml", "smoke")) if job.stage != "report"]
    nodes = graph.nodes(jobs)
    of_stage = {stage: node for node in nodes for stage in node.stages}
    drawn: dict[str, set[str]] = {}
    for parent, child in graph.edges(nodes):
        drawn.setdefault(child, set()).add(parent)

    def reached(key: str) -> set[str]:
        return drawn.get(key, set()).union(*(reached(parent) for parent in drawn.get(key, ())))

    real: dict[str, set[str]] = {}
    for job in jobs:
        above = {parent.stage for parent in registry.parents(job, jobs)} - {job.stage}
        real.setdefault(job.stage, set()).update(above, *(real[other] for other in above))
    for stage, above in real.items():
        assert {of_stage[other].key for other in above} == reached(of_stage[stage].key), stage


def test_the_page_reads_whatever_the_scale_makes() -> None:
    for scale in ("smoke", "demo", "paper"):
        params = load(ROOT / "params.yaml", scale)
        jobs = registry.jobs(params)
        last = next(job for job in jobs if job.stage == "report")
        assert [job.name for job in registry.ends(jobs)] == [job.name for job in jobs if job.is_report], scale
        assert {job.name for job in runs.ancestors(last, params)} == {job.name for job in jobs} - {"report"}


def test_samples_of_models_and_not_of_variants() -> None:
    data = read_yaml(ROOT / "params.yaml")
    students = data["scales"]["smoke"]["slots"]["latent_guided"]["students"]
    students["scd_other"] = {**students["scd"]}
    sizes = data["scales"]["smoke"]["slots"]["latent_guided"]["sizes"]
    sizes["S"]["students"] = {**sizes["S"]["students"], "scd_other": {}}
    slot = validate(data).scales["smoke"].slots["latent_guided"]
    shown = list(page.shown_models(slot))
    assert ("S", "teacher") in shown
    assert ("S", "scd") in shown
    assert ("S", "scd_other") not in shown


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


COLOURS: dict[str, tuple[str, str]] = {
    name: (light, dark) for name, light, dark in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", CSS)
}


@pytest.mark.parametrize("theme", [0, 1], ids=["light", "dark"])
def test_text_stands_out_from_its_ground(theme: int) -> None:
    """WCAG 2 AA: 4.5 for text, 3 for what is drawn."""
    assert luminance("#ffffff") == pytest.approx(1.0)
    assert contrast("#ffffff", "#000000") == pytest.approx(21.0)
    colour = {name: pair[theme] for name, pair in COLOURS.items()}
    for ground in ("paper", "raised", "ours", "sunken"):
        for name in ("ink", "soft", "link"):
            assert contrast(colour[name], colour[ground]) >= 4.5, (name, ground)
    for name in ("good", "bad", "open", *(f"s{i}" for i in range(charts.STYLES))):
        assert contrast(colour[name], colour["paper"]) >= 4.5, name
    for name in ("focus", "strong-line"):
        assert contrast(colour[name], colour["paper"]) >= 3, name


def test_every_style_of_lines_has_a_colour_and_none_looks_like_another() -> None:
    """The same marker and dashes never come with colours that could be confused: all three differ, or two of them do."""
    dashes = {
        name: rule
        for names, rule in re.findall(r"((?:\.s\d \.line,? ?)+)\{ stroke-dasharray: ([\d ]+);", CSS)
        for name in re.findall(r"s\d", names)
    }
    looks = [(dashes.get(f"s{i}", ""), i % 4) for i in range(charts.STYLES)]
    assert len(set(looks)) == charts.STYLES
    assert {f"s{i}" for i in range(charts.STYLES)} <= set(COLOURS)
