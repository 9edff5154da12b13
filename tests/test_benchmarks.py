# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks' pages conclude from their numbers, with made-up ones; nothing is timed."""

import importlib
import json
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # which importing it sets
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module(name)


@pytest.mark.parametrize(
    ("time", "memory", "words"),
    [
        (1.32, 1.0, "below the floor: noise or the optimizer's share"),
        (1.34, 1.0, "met"),
        (1.40, 1.3, "met"),
        (1.41, 1.0, "missed"),
        (1.34, 1.31, "missed"),
    ],
)
def test_a_step_below_its_floor_is_not_called_met(
    time: float, memory: float, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    step_cost = benchmark("bench_step_cost", monkeypatch)
    assert step_cost.judged(time, memory, target=1.40, floor=4 / 3) == words


def test_the_page_of_step_costs_judges_every_target(monkeypatch: pytest.MonkeyPatch) -> None:
    step_cost = benchmark("bench_step_cost", monkeypatch)
    quartiles = {
        "quartiles": [1.0, 2.0],
        "passes_quartiles": [1.0, 2.0],
        "passes_share": 0.9,
        "rounds": 11,
        "peak_mb": 105.0,
    }
    found = {"sCT": 1.20, "sCD": 1.70, "sCD, guided": 2.50}
    rows = [
        {"method": m, "engine": "dual", "teacher_steps": r, "passes": r + 0.2, **quartiles} for m, r in found.items()
    ]
    result = {
        "title": "Net", "batch": 1, "parameters": 10, "rows": rows, "teacher_ms": 5.0, "teacher_mb": 100.0,
        "cpu": "C", "cores": 2, "torch": "2", "load": 0.1,
    }  # fmt: skip
    page = step_cost.markdown({"net": result})
    assert "| sCT | Net | 1.33 | 1.40 | 1.40 | 1.20 | 1.05 | below the floor: noise or the optimizer's share |" in page
    assert "| sCD | Net | 1.67 | 1.75 | 1.90 | 1.70 | 1.05 | met |" in page
    assert "| sCD, guided | Net | 2.00 | 2.05 | 2.70 | 2.50 | 1.05 | missed |" in page


def test_only_networks_that_have_checkpointing_are_timed_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    step_cost = benchmark("bench_step_cost", monkeypatch)
    row = ("sCD, guided, checkpointing", "dual")
    assert row in step_cost.NETWORKS["xs-16"]().rows()
    assert row not in step_cost.NETWORKS["demo-S"]().rows()
    assert step_cost.NETWORKS["demo-S"]().rounds >= 11


@pytest.mark.parametrize(
    ("factors", "lost", "words"),
    [
        ((0.9, 1.2), 5, r"error is 0\.90 to 1\.20 times the rearranged one's: .* range, not about digits\."),
        ((0.9, 3.0), 5, r"error is 0\.90 to 3\.00 times the rearranged one's\.$"),
        ((0.4, 1.0), 5, r"error is 0\.40 to 1\.00 times the rearranged one's\.$"),
        ((0.9, 1.2), 0, r"error is 0\.90 to 1\.20 times the rearranged one's\.$"),
    ],
)
def test_the_rearrangements_conclusion_follows_its_numbers(
    factors: tuple[float, float], lost: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    precision = benchmark("bench_tangent_precision", monkeypatch)
    rows = []
    for factor, missing in ((factors[0], 0), (factors[1], 0), (99.0, 1)):  # the last is not compared
        ways = {
            "rearranged": {"error": 1e-3, "not_finite": 0},
            "plain": {"error": 1e-3 * factor, "not_finite": missing},
        }
        rows.append({f"{name} {way}": cell for name in precision.PRECISIONS for way, cell in ways.items()})
    text = precision.verdict({"inputs": {"one": rows}}, {"plain": lost, "rearranged": 0})
    assert re.search(words, text), text


def test_rows_of_an_earlier_run_keep_what_they_were_measured_on(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = benchmark("bench_attention", monkeypatch)
    errors = {"case": "c", "dtype": "float32", "value": 1e-7, "tangent": 1e-7}
    now = SimpleNamespace(returncode=0, stdout=json.dumps([{**errors, "kernel": "chunked"}]))
    monkeypatch.setattr(attention.subprocess, "run", lambda *_, **__: now)
    elsewhere = {**attention.provenance(), "device": "Another"}
    earlier = [
        {**errors, "kernel": f"{attention.PACKAGE} 0.1", "on": elsewhere},
        {**errors, "kernel": "chunked", "on": elsewhere},
    ]
    rows: list[dict[str, Any]] = attention.accuracy(earlier)
    assert [(row["kernel"], row["on"]["device"]) for row in rows] == [
        ("chunked", attention.processor()),
        (f"{attention.PACKAGE} 0.1", "Another"),
    ]
    on = attention.provenance()
    report = {"times": {"on": on, "rows": []}, "memory": {"on": on, "peaks": {}}, "accuracy": rows}
    assert f"- {attention.PACKAGE} 0.1: measured on Another, torch" in attention.markdown(report)


def test_the_evaluation_page_extrapolates_and_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = benchmark("page_evaluation", monkeypatch)
    full = evaluation.FULL
    assert evaluation.by_line([(10, 5 + 20), (20, 5 + 40)]) == pytest.approx(5 + 2 * full)
    assert evaluation.by_square([(10, 20 + 300), (20, 40 + 1200)]) == pytest.approx(2 * full + 3 * full**2)
    assert evaluation.by_parabola([(n, 1 + 2 * n + 3 * n**2) for n in (10, 15, 20)]) == pytest.approx(
        1 + 2 * full + 3 * full**2
    )
    on = {
        "device": "C",
        "cores": 2,
        "load": 0.1,
        "torch": "2",
        "packages": {"torch-fidelity": "0.4.0"},
        "bfloat16": False,
    }

    def page(theirs: float, exact: float, slope: float) -> str:
        seconds = {"ours": 1.0, "prepared": 0.5, "torch-fidelity": theirs}
        rows = [
            {
                "count": count,
                "seconds": {way: value * count**2 / 1e6 for way, value in seconds.items()},
                "values": {},
                "differences": {"torch-fidelity": {"precision": 2e-4}, "float64": {"precision": exact}},
            }
            for count in (2000, 5000)
        ]
        fid = [{"count": count, "once": 1.0, "ours": 1.0, "torch-fidelity": 1.0} for count in (3000, 10_000)]
        peaks = [[count, slope * count / 1000] for count in (2500, 3750, 5000)]
        return evaluation.markdown(
            {
                "fid": {"on": on, "rows": fid, "root_s": 2.0, "difference": 1e-12, "trace_s": {"ours": 1.0, "torch-fidelity": theirs}},
                "pairs": {"on": on, "rows": rows},
                "memory": {"on": on, "peaks": {"ours": peaks, "FID": peaks}},
                "gpu": None,
            }
        )  # fmt: skip

    good = page(theirs=4.0, exact=0.0, slope=30.0)
    assert "**4.0 times faster** (target 3: met)" in good
    assert "**4.0** at 2,000, **4.0** at 5,000, 4.0 at 50,000 (target 4: met at 2,000, met at 5,000);" in good
    assert "prdc was not installed" in good
    assert "to the last sample" in good
    # 50,000: once 1 + 2500 − 1250, each 1 + 1250, theirs 1 + 10,000
    assert "| 50,000 | 1251 | 1251 | 26271 | 10001 | 200020 | **7.6** |" in good
    assert "Target 3 times faster: met at 5,000, met at 50,000." in good
    assert "Target 1.5 GB: met." in good
    assert "Not measured: there was no GPU." in good
    bad = page(theirs=2.0, exact=1e-3, slope=31.0)
    assert "(target 3: missed)" in bad
    assert "(target 4: missed at 2,000, missed at 5,000);" in bad
    assert "float64 at 2,000, 5,000: **NOT**." in bad
    assert "Target 1.5 GB: missed." in bad
    assert "(target 2 s: missed)" in evaluation.gpu_page({"on": on, "once_s": 1.0, "seconds": 2.1, "peak_gb": 3.0})[2]


def test_the_published_pages_are_those_of_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    results = ROOT / "benchmarks" / "results"
    for page in results.glob("*.md"):
        name = page.stem
        report = json.loads((results / f"{name}.json").read_text())
        assert benchmark(f"bench_{name}", monkeypatch).markdown(report) == page.read_text()


@pytest.mark.parametrize(("whole", "word"), [(1.04, "met"), (1.06, "missed")])
def test_the_page_of_encoding_judges_the_median_round(whole: float, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    encoding = benchmark("bench_encoding", monkeypatch)
    one = {"forward": 1.0, "nothing": 0.002, "converting": 0.001}
    rounds = [{**one, "encoding": value} for value in (0.9, whole, 9.0)]
    facts = {"side": 8, "batch": 1, "parameters": 10, "device": "C", "cores": 2, "torch": "2", "load": 0.1}
    result = {"title": "Net", "images": 10, "width": 0.5, "rounds": rounds, **facts}
    page = encoding.markdown({"net": result, "none": {**result, "title": "None", "width": 0}})
    assert f"| Net | 100.0 ms | {100 * whole:.1f} ms | {whole - 1:.1%} (" in page
    assert f"| 5 %: {word} | 0.20 ms (0.2%) | 0.10 ms |" in page
    assert "| None | – | – | – | – | 0.20 ms | 0.10 ms |" in page


def test_the_page_of_data_judges_every_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    data = benchmark("bench_data", monkeypatch)

    def rate(per_second: float) -> dict[str, Any]:
        return {"per_second": per_second, "range": [per_second, per_second], "megabytes_from_disk": 1.0}

    section = {
        "count": 10,
        "batch": 5,
        "megabytes": {"store": 1.0, "zip": 1.0, "webdataset": 1.0},
        "warm": {"store": rate(1000.0), "zip": rate(200.0), "webdataset": rate(501.0)},
        "cold": {"store": rate(1000.0), "zip": rate(201.0), "webdataset": rate(500.0)},
        "disk_per_second": 1200.0,
    }
    known = dict.fromkeys(("processor", "python", "torch", "numpy", "pillow", "webdataset"), "x")
    page = data.markdown({"machine": known, "sections": {"images": section, "latents": section}})
    assert page.count("| files in a ZIP | 5× | 5.0× met | 5.0× **missed** |") == 2
    assert page.count("| webdataset | 2× | 2.0× **missed** | 2.0× met |") == 2
    assert page.count("| the disk, in order | | | 1,200 | |") == 2
