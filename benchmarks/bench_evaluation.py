# SPDX-License-Identifier: Apache-2.0
"""What the metrics cost beside torch-fidelity's and prdc's: `python benchmarks/bench_evaluation.py [SECTION …]`.

Features of 2048 dimensions, made up: rectified, correlated, with a decaying spectrum. Everything runs on one thread of one core, and what
is compared takes turns in one run. fid: the trace term, and the whole of it for one set. pairs: precision, recall, density, coverage and
KID of whole sets (what torch-fidelity calls PRC and KID, with one subset of everything; prdc has no KID). memory: the peak of a fresh
process. gpu: 50,000 × 50,000 pairs, where there is a GPU. The page adds up a sweep of 20 sets against one reference.

At 50,000 samples: times of pairs by bN + cN² through what was measured, those of FID by a line, memory by a line or a parabola. Without the
package prdc its column stays empty. Sections that are not named keep their results. Writes benchmarks/results/evaluation.json and .md.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from page_evaluation import DIM, FULL, NAMES, NEIGHBOURS, markdown  # noqa: E402
from report import RESULTS, arguments_of, processor, write  # noqa: E402
from torch import Tensor  # noqa: E402

from scm_core.compat import prepare_torchvision  # noqa: E402
from scm_core.evaluate import FeatureSet, Moments, frechet_with_error, manifold_metrics  # noqa: E402
from scm_core.evaluate.frechet import trace_term, triangular_root  # noqa: E402
from scm_core.evaluate.products import fast_bfloat16  # noqa: E402

prepare_torchvision()

from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric  # noqa: E402
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric  # noqa: E402
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric  # noqa: E402

SIZES = (2000, 5000, 10_000)
FID_SIZES = (3000, 10_000)  # more than the dimensions, and far apart: most of it does not depend on N
ROUNDS = {2000: 3, 5000: 2, 10_000: 1}
MEMORY_SIZES = (2500, 3750, 5000)


def features(count: int, seed: int) -> Tensor:
    """Float32 features (count, DIM) in the manner of pooled activations: not negative, correlated, of decaying spectrum."""
    decay = torch.arange(1, DIM // 4 + 1) ** -0.7
    mixing = torch.randn(DIM // 4, DIM, generator=torch.Generator().manual_seed(0)) * decay[:, None]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, DIM // 4, generator=generator) @ mixing
    return (x + 0.2 * torch.randn(count, DIM, generator=generator) + 0.1 + 0.02 * (seed % 2)).relu()


# ---- the ways ----------------------------------------------------------------------------------------------------------------


def ours(real: Tensor, fake: Tensor) -> dict[str, float]:
    """All in one, with what a reference needs once."""
    return manifold_metrics(real, fake, NEIGHBOURS)._asdict()


def fidelity(real: Tensor, fake: Tensor) -> dict[str, float]:
    """torch-fidelity's PRC and KID."""
    prc = prc_features_to_metric(fake, real, prc_neighborhood=NEIGHBOURS, verbose=False)
    kid = kid_features_to_metric(fake, real, kid_subsets=1, kid_subset_size=len(real), verbose=False)
    return {
        "precision": prc[KEY_METRIC_PRECISION],
        "recall": prc[KEY_METRIC_RECALL],
        "kid": kid[KEY_METRIC_KID_MEAN],
    }


def prdc(real: Tensor, fake: Tensor) -> dict[str, float]:
    """The package of Naeem et al."""
    from prdc import compute_prdc

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compute_prdc(real.numpy(), fake.numpy(), NEIGHBOURS)


def in_float64(real: Tensor, fake: Tensor) -> dict[str, float]:
    """What all decisions should be: from products in float64, whose errors are far below those of the others."""
    real, fake = real.double(), fake.double()

    def squared(a: Tensor, b: Tensor) -> Tensor:
        return torch.addmm(a.square().sum(dim=1)[:, None] + b.square().sum(dim=1), a, b.T, alpha=-2)

    radii = [squared(x, x).fill_diagonal_(0).kthvalue(NEIGHBOURS + 1).values for x in (real, fake)]
    between = squared(fake, real)
    in_real, in_fake = between <= radii[0], between <= radii[1][:, None]
    return {
        "precision": int(in_real.any(dim=1).sum()) / len(fake),
        "recall": int(in_fake.any(dim=0).sum()) / len(real),
        "density": int(in_real.sum()) / (NEIGHBOURS * len(fake)),
        "coverage": int(in_real.any(dim=0).sum()) / len(real),
    }


WAYS: dict[str, Callable[[Tensor, Tensor], dict[str, float]]] = {
    "ours": ours,
    "torch-fidelity": fidelity,
    **({"prdc": prdc} if find_spec("prdc") else {}),
}


def in_turns(ways: dict[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds of each way, the ways taking turns, and their results."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            results[name] = way()
            taken[name].append(time.perf_counter() - start)
    return {name: round(statistics.median(seconds), 3) for name, seconds in taken.items()}, results


def fid() -> dict[str, Any]:
    """FID's trace term, and all of FID at two sizes."""
    rows = [fid_row(count) for count in FID_SIZES]
    real, fake = (fid_features_to_statistics(features(FID_SIZES[0], seed).double()) for seed in (0, 1))
    cov1, cov2 = (torch.from_numpy(of["sigma"]) for of in (fake, real))
    root, made = in_turns({"root": lambda: triangular_root(cov2)}, 1)
    seconds, results = in_turns(
        {
            "ours": lambda: trace_term(cov1, made["root"]),
            "torch-fidelity": lambda: fid_statistics_to_metric(fake, real, False)[KEY_METRIC_FID],
        },
        3,
    )
    mean = torch.from_numpy(fake["mu"] - real["mu"])
    distance = float(mean @ mean + cov1.trace() + cov2.trace()) - 2 * results["ours"]
    difference = abs(distance / results["torch-fidelity"] - 1)
    return {"on": provenance(), "rows": rows, "root_s": root["root"], "trace_s": seconds, "difference": difference}


def fid_row(count: int) -> dict[str, Any]:
    """What FID takes once for a reference, and for each set; torch-fidelity is given the reference's statistics, too."""
    real, fake = features(count, 0), features(count, 1)
    theirs = fid_features_to_statistics(real)
    moments = Moments.of(real)
    once, made = in_turns({"moments": lambda: Moments.of(real), "root": lambda: triangular_root(moments.cov)}, 1)
    seconds, _ = in_turns(
        {
            "ours": lambda: frechet_with_error(fake, moments, made["root"]),
            "torch-fidelity": lambda: fid_statistics_to_metric(fid_features_to_statistics(fake), theirs, False),
        },
        2,
    )
    return {"count": count, "once": round(sum(once.values()), 3), **seconds}


def pairs() -> dict[str, Any]:
    """All ways at each size."""
    return {"on": provenance(), "rows": [pairs_row(count) for count in SIZES]}


def pairs_row(count: int) -> dict[str, Any]:
    """All ways, and ours once more with a prepared reference."""
    real, fake = features(count, 0), features(count, 1)
    reference, moments = FeatureSet(real, moments=Moments.of(real)), Moments.of(fake)
    reference.prepare(NEIGHBOURS)
    ways: dict[str, Callable[[], Any]] = {name: partial(way, real, fake) for name, way in WAYS.items()}
    ways["prepared"] = partial(manifold_metrics, reference, fake, NEIGHBOURS, moments=moments)
    seconds, results = in_turns(ways, ROUNDS[count])
    results["float64"] = in_float64(real, fake)
    differences = {
        name: {key: abs(results["ours"][key] - value) for key, value in results[name].items()}
        for name in (*WAYS, "float64")
        if name != "ours"
    }
    return {"count": count, "seconds": seconds, "values": results["ours"], "differences": differences}


# ---- memory ------------------------------------------------------------------------------------------------------------------


def fid_of(real: Tensor, fake: Tensor) -> Any:
    """Our FID with its error and bias."""
    return frechet_with_error(fake, Moments.of(real))


def memory() -> dict[str, Any]:
    """Peak MB of each way at each size, in a process of its own."""
    ways = [way for way in NAMES if way in WAYS or way == "FID"]
    peaks = {way: [(count, peak_of_child(way, count)) for count in MEMORY_SIZES] for way in ways}
    return {"on": provenance(), "peaks": peaks}


def peak_of_child(way: str, count: int) -> float:
    """Peak memory in MB in a process of its own, in which what is freed goes back at once."""
    command = [sys.executable, __file__, "--peak", way, str(count)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(done.stdout.split()[-1])


def print_peak(name: str, count: int) -> None:
    """The measuring process: its peak with both sets of features, less what it had before there were any."""
    way = fid_of if name == "FID" else WAYS[name]
    way(features(100, 0), features(100, 1))  # the libraries' own buffers
    before = resident("VmRSS")
    real, fake = features(count, 0), features(count, 1)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak of making them
    way(real, fake)
    print(round(resident("VmHWM") - before, 1))


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (at its highest) of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def gpu() -> dict[str, Any] | None:
    """Seconds of 50,000 × 50,000 pairs with a prepared reference; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    real, fake = (features(FULL, seed).cuda() for seed in (0, 1))
    reference = FeatureSet(real)
    torch.cuda.reset_peak_memory_stats()

    def measured(run: Callable[[], Any]) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return round(time.perf_counter() - start, 3)

    once = measured(lambda: reference.prepare(NEIGHBOURS))
    seconds = [measured(lambda: manifold_metrics(reference, fake, NEIGHBOURS)) for _ in range(4)]
    peak = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    on = {**provenance(), "device": torch.cuda.get_device_name()}
    return {"on": on, "once_s": once, "seconds": statistics.median(seconds[1:]), "peak_gb": peak}


def provenance() -> dict[str, Any]:
    """What a result was measured on."""
    packages = {name: version(name) for name in ("torch-fidelity", "prdc") if find_spec(name.replace("-", "_"))}
    return {
        "device": processor(),
        "bfloat16": fast_bfloat16(torch.device("cpu")),
        "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1), "torch": torch.__version__, "packages": packages,
    }  # fmt: skip


SECTIONS: dict[str, Callable[[], Any]] = {
    "fid": fid, "pairs": pairs, "memory": memory, "gpu": gpu,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of the metrics beside torch-fidelity's and prdc's.")
    chosen = arguments_of(parser, "section", SECTIONS).sections
    path = RESULTS / "evaluation.json"
    report: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name, section in SECTIONS.items():
        if name in chosen or not chosen or name not in report:
            report[name] = section()
    # JSON has words as keys: as they will be read again.
    report = json.loads(json.dumps({name: report[name] for name in SECTIONS}))
    write(report, path, markdown)
    print(markdown(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core for every library
    if sys.argv[1:2] == ["--peak"]:
        print_peak(sys.argv[2], int(sys.argv[3]))
    else:
        main()
