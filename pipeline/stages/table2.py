# SPDX-License-Identifier: Apache-2.0
"""Stage table2: Table 2 of the paper, every published row beside ours."""

from pipeline import paths
from pipeline.context import Context
from pipeline.job import REPORT_SLOT
from pipeline.tables import METHOD_NAMES, floor_note, measured_note, our_rows, table2, to_markdown


def run(ctx: Context) -> None:
    """Write table2.csv and table2.md."""
    slot = ctx.scale.slots[REPORT_SLOT]
    ours = []
    for method in METHOD_NAMES:
        for size in slot.sizes:
            if f"evaluate-{size}-{method}" in ctx.inputs:
                ours += our_rows(ctx.inputs[f"evaluate-{size}-{method}"], size, method, ctx.job.scale)
    table = table2(paths.root() / "reports" / "paper" / "table2.csv", ours)
    table.to_csv(ctx.out / "table2.csv", index=False)
    how = slot.evaluation
    grid = ", ".join(f"{scale:g}" for scale in how.guidance)
    sets = f", the mean of {how.report_sets} sets" if how.report_sets > 1 else ""
    notes = [
        measured_note(slot),
        "",
        f"FID ± standard error of {how.samples} samples against the training images{sets}; guidance chosen on "
        f"{how.select_samples} other samples from {grid}. The error is that of independent samples, an upper estimate "
        f"for ours, which have equally many of each class. Teacher: {how.teacher.solver}, {how.teacher.steps} steps. "
        "NFE n x2: two passes for each guided evaluation.",
        "",
        floor_note(ctx.inputs["reconstruction"]),
    ]
    (ctx.out / "table2.md").write_text(to_markdown(table, "Table 2", notes))
    for name in ("table2.csv", "table2.md"):
        ctx.tracker.log_artifact(ctx.out / name)
