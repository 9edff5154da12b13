# SPDX-License-Identifier: Apache-2.0
"""Stage dataset: read the source's images, check, crop and store them."""

from pipeline.context import Context
from pipeline.progress import Progress
from scm_core.data import store_images


def run(ctx: Context) -> None:
    """Write the image set (shards of uint8, labels, index with digests). A killed attempt's shards are gone on with."""
    shown: list[Progress] = []

    def progress(done: int, total: int) -> None:
        if not shown:
            shown.append(ctx.progress(total, "img"))
        shown[0].update(done)

    wanted = ctx.slot.dataset
    writer = store_images(wanted.wanted(), ctx.work / "store", wanted.engine.processes, progress)
    for display in shown:
        display.close()
    writer.move(ctx.out)
    ctx.tracker.log_metrics(0, {"images": float(writer.count)})
