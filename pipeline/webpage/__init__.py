# SPDX-License-Identifier: Apache-2.0
"""reports/report.html: what each module reads from the job's inputs, and what it makes of it.

`runs` (manifests, records), `tables` (CSV with Markdown beside it), `claims`, `pictures` (figures, and samples by an index), `curves`
(logs, earlier checkpoints) and `costs` read; `graph` and `charts` draw SVG; `render` fills page.html, whose template engine escapes
all that is not marked as markup. The page loads nothing: style, script and pictures are in it. Its bytes depend on the inputs alone,
except for what is recorded of a run's execution (commit, times, machine): that stands between RECORDED and RECORDED_END.
"""

RECORDED, RECORDED_END = "<!--recorded-->", "<!--/recorded-->"
