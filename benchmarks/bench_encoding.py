# SPDX-License-Identifier: Apache-2.0
"""What encoding a data set costs beyond the autoencoder itself: `python benchmarks/bench_encoding.py [CASE …]`.

Images in a store on disk are encoded into a store of latents (`encode_set`, `finish_latents`: reading, conversion, copies, checks,
digests, flushing to the disk), in turn with nothing but the network's forward on the same batches, which lie in memory as it takes them.
The overhead is the time of one beyond that of the other; the target is at most 5 %. One thread; on a GPU, if there is one, the network is
there.

Beside it, what the whole costs with a network that does nothing, in milliseconds for an image, and what of that is the conversion of pixels
to floating point, which a GPU does itself. The overhead is small against the noise of the network's own time, and this is not. It needs no
network, so it is also taken for images of 512×512, those of the paper's latents.

Cases: an AutoencoderKL of diffusers with the factor and the latents of sd-vae-ft-mse at a quarter of its width, on 128×128 images, and at
an eighth on 256×256; random weights. Writes benchmarks/results/encoding.json and .md; cases that are not named keep their results.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from report import RESULTS, arguments_of, measure, processor  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from scm_core.autoencoder_kl import KNOWN  # noqa: E402
from scm_core.data import ImageSet, finish_latents, from_uint8, load_images, save_images  # noqa: E402
from scm_core.data.encoding import encode_set  # noqa: E402
from scm_core.nn.build import build_network, count_parameters  # noqa: E402
from scm_core.vae import Autoencoder  # noqa: E402

TARGET = 0.05  # beyond the network's own time


class Case(NamedTuple):
    """Images, and a network of so much of sd-vae-ft-mse's width; a network that does nothing if that is 0."""

    side: int
    images: int
    batch: int
    width: float
    rounds: int

    @property
    def title(self) -> str:
        """What it is."""
        network = "no network" if not self.width else f"1/{round(1 / self.width)} of sd-vae's width"
        return f"{self.side}×{self.side}, {network}"


CASES = {
    "128": Case(128, 64, 16, 1 / 4, 15),
    "256": Case(256, 32, 8, 1 / 8, 15),
    "512-none": Case(512, 256, 8, 0, 9),
}


class Nothing(nn.Module):
    """Latents of zeros at no cost."""

    channels, latent_channels, downsampling = 3, 4, 8

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Zeros."""
        zeros = x.new_zeros(len(x), 4, x.shape[2] // 8, x.shape[3] // 8)
        return zeros, zeros

    def decode(self, z: Tensor) -> Tensor:
        """Not used."""
        raise NotImplementedError


def network(width: float) -> Any:
    """An autoencoder of that width, with random weights."""
    if not width:
        return Nothing()
    config = dict(KNOWN["sd-vae-ft-mse"].config)
    config["block_out_channels"] = [round(channels * width) for channels in config["block_out_channels"]]
    config["norm_num_groups"] = round(config["norm_num_groups"] * width)
    torch.manual_seed(0)
    return build_network({"architecture": "autoencoder_kl", **config}).eval().requires_grad_(False)


@torch.no_grad()
def forward(vae: Autoencoder, batches: list[Tensor]) -> None:
    """The network's own work."""
    for x in batches:
        vae.encode(x)


def encoding(vae: Autoencoder, images: ImageSet, batch: int, device: torch.device) -> None:
    """The whole: from a store to a store."""
    with tempfile.TemporaryDirectory() as folder:
        writer = encode_set(vae, images, folder, batch, device=device)
        finish_latents(writer, images.labels, 0.5, images.name)


def converted(images: ImageSet, batch: int, device: torch.device) -> None:
    """All images in floating point, batch by batch; their reading not counted, as they are in the kernel's cache."""
    part = images.images[:batch].to(device)
    for _ in range(0, len(images), batch):
        from_uint8(part)


def seconds(call: Callable[[], None], device: torch.device) -> float:
    begin = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def run(case: Case, folder: Path) -> dict[str, Any]:
    """Everything about one case; the forward before and after each encoding, so that a slow change of the load hits both."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (case.images, 3, case.side, case.side), generator=generator, dtype=torch.uint8)
    save_images(ImageSet(pixels, torch.zeros(case.images, dtype=torch.int64), "noise"), folder)
    images = load_images(folder)
    vae, none = network(case.width).to(device), Nothing()
    batches = [from_uint8(part).to(device) for part in pixels.split(case.batch)]
    for warm in (lambda: forward(vae, batches[:1]), lambda: encoding(none, images, case.batch, device)):
        warm()
    rounds: list[dict[str, float]] = []
    before = seconds(lambda: forward(vae, batches), device)
    for _ in range(case.rounds):
        whole = seconds(lambda: encoding(vae, images, case.batch, device), device)
        after = seconds(lambda: forward(vae, batches), device)
        bare = seconds(lambda: encoding(none, images, case.batch, device), device)
        converting = seconds(lambda: converted(images, case.batch, device), device)
        rounds.append({"forward": (before + after) / 2, "encoding": whole, "nothing": bare, "converting": converting})
        before = after
        print(f"{case.title}: {rounds[-1]}", flush=True)
    return {
        "title": case.title, "side": case.side, "images": case.images, "batch": case.batch, "width": case.width,
        "parameters": count_parameters(vae), "rounds": [{key: round(value, 4) for key, value in one.items()} for one in rounds],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "cores": os.cpu_count(), "torch": torch.__version__, "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


def overhead(result: dict[str, Any]) -> list[float]:
    """Of each round, ascending: the part of the network's own time that the whole takes beyond it."""
    return sorted(one["encoding"] / one["forward"] - 1 for one in result["rounds"])


def markdown(report: dict[str, Any]) -> str:
    """The report as a page."""
    lines = [
        "# What encoding a data set costs beyond the autoencoder",
        "",
        "From a store of images on disk to a finished store of latents, against the network's forward on the same batches in memory. "
        "*Overhead*: median over rounds (quartiles); what lies below 0 is noise of the network's time. *Without a network*: what the "
        "whole takes with one that does nothing, and its share of the forward; *of that, conversion*: of pixels to floating point, which a "
        "GPU does.",
        "",
        "| images | forward | encoding | overhead | target | without a network | of that, conversion |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in report.values():
        middle = {
            key: 1e3 * statistics.median(one[key] for one in result["rounds"]) / result["images"]
            for key in result["rounds"][0]
        }
        found = overhead(result) if result["width"] else []
        word = "" if not found else "met" if statistics.median(found) <= TARGET else "missed"
        times = [f"{middle['forward']:.1f} ms", f"{middle['encoding']:.1f} ms"] if found else ["–", "–"]
        low, _, high = statistics.quantiles(found, n=4) if found else (0.0, 0.0, 0.0)
        share = f"{statistics.median(found):.1%} ({low:.1%} to {high:.1%})" if found else "–"
        bare = f"{middle['nothing']:.2f} ms" + (f" ({middle['nothing'] / middle['forward']:.1%})" if found else "")
        lines.append(
            f"| {result['title']} | {' | '.join(times)} | {share} | {f'5 %: {word}' if word else '–'} "
            f"| {bare} | {middle['converting']:.2f} ms |"
        )
    lines += ["", "Milliseconds for an image.", ""]
    lines += [
        f"- {result['title']}: {result['images']} images, {result['batch']} at once, {result['parameters'] / 1e6:.1f} M parameters; "
        f"{result['device']}, {result['cores']} cores, load average {result['load']} after; torch {result['torch']}; "
        f"{len(result['rounds'])} rounds."
        for result in report.values()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="What encoding a data set costs beyond the autoencoder.")
    arguments = arguments_of(parser, "case", CASES)
    torch.set_num_threads(1)

    def in_a_folder(name: str) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            return run(CASES[name], Path(folder) / "images")

    measure(CASES, arguments.cases, in_a_folder, RESULTS / "encoding.json", markdown)


if __name__ == "__main__":
    main()
