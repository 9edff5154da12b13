# SPDX-License-Identifier: Apache-2.0
"""Claims about ablations: Figure 5 in numbers, and ECT against sCT (Table E3)."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline import measured
from pipeline.claims import FIGURE, Absent, Claim, Evidence, Found, claim, difference, needed, trainings
from pipeline.overrides import base_of
from pipeline.scaling import ratio
from pipeline.shown import LATENT, UNCOND, discrete, figure5_baseline, figure5_students
from pipeline.tables import published

WORSE = 0.10  # what normalised tangents may be worse than clipped ones and still be said not to be: ours


def ablations(seen: Evidence) -> Iterator[Claim]:
    """Figure 5 in numbers: FID at the end of training with 1 step, the variant against the baseline."""
    slot = seen.slot()
    sizes = [size for size in slot.sizes if figure5_students(slot, size)] if slot else []
    size = sizes[0] if sizes else ""
    base = figure5_baseline(slot, size) if slot and size else "scd"
    yield claim(
        "normalised_against_clipped",
        "normalised tangents are not worse than clipped ones",
        FIGURE,
        f"FID of normalised / FID of clipped < {1 + WORSE:g} (ours)",
        lambda: not_worse(seen, size, base, "scd_clip"),
    )
    for id_, method, words in (
        ("normalised_against_raw", "scd_raw", "normalised tangents are better than raw ones"),
        ("adaptive_weighting", "scd_unweighted", "adaptive weighting makes training better"),
    ):
        rule = "FID of the variant − FID of the baseline > 0"
        yield claim(id_, words, FIGURE, rule, lambda method=method: _against(seen, size, method, base))  # type: ignore[misc]
    numbers = discrete(slot, size) if slot and size else []
    first, last = (numbers[0], numbers[-1]) if len(numbers) > 1 else ("dscd of several N", "dscd of several N")
    yield claim(
        "discrete_improves",
        f"discrete-time sCD improves with the number of intervals N: {first} against {last}",
        FIGURE,
        "FID of the smallest N − FID of the largest N > 0",
        lambda: _against(seen, size, first, last),
    )
    yield claim(
        "continuous_against_discrete",
        f"continuous time is better than discrete time: {base} against {last}",
        FIGURE,
        "FID of discrete time − FID of continuous time > 0",
        lambda: _against(seen, size, last, base),
    )
    yield claim(
        "sct_against_ect",
        "sCT is better than ECT after the same, longest training with 1 step",
        e3_paper(seen),
        "FID of sCT − FID of ECT < 0",
        lambda: sct_against_ect(seen),
    )


def not_worse(seen: Evidence, size: str, base: str, variant: str) -> Found:
    """A difference of nothing can be shown only against something that counts as none: `WORSE`."""
    a, b = (seen.rows(LATENT, size, method, 1) for method in (base, variant))
    own, other = needed(a, base), needed(b, variant)
    found = ratio(own, other)
    why = f"size {size}: {own.value:.3f} against {other.value:.3f}, {trainings(a, b)}"
    return Found(found.value, 1 + WORSE - found.value, found.error, why, measured.runs(a, b))


def _against(seen: Evidence, size: str, variant: str, base: str) -> Found:
    a, b = (seen.rows(LATENT, size, method, 1) for method in (variant, base))
    worse, better = needed(a, variant), needed(b, base)
    value, error = difference(worse, better)
    why = f"size {size}: {worse.value:.3f} against {better.value:.3f}, {trainings(a, b)}"
    return Found(value, value, error, why, measured.runs(a, b))


def e3_paper(seen: Evidence) -> str:
    """The difference after the longest training."""
    rows = published(seen.root, "tableE3")
    ect, sct = (rows[rows.method == method].fid.iloc[-1] for method in ("ECT", "sCT"))
    return f"{float(sct) - float(ect):.2f} ({sct} − {ect})"


def sct_against_ect(seen: Evidence) -> Found:
    slot = seen.slot(UNCOND)
    pairs = []
    for size in slot.sizes if slot else ():
        assert slot is not None
        names = [name for name in slot.sizes[size].students if base_of(name) == name]
        length = {name: slot.student_for(size, name).iterations for name in names}
        ect, sct = ([name for name in names if name.startswith(prefix)] for prefix in ("ect_", "sct_"))
        pairs += [(length[a], size, a, b) for a in sct for b in ect if length[a] == length[b]]
    if not pairs:
        raise Absent("ECT and sCT of one length are not trained at this scale")
    iterations, size, a, b = max(pairs)
    ours, theirs = seen.rows(UNCOND, size, a, 1), seen.rows(UNCOND, size, b, 1)
    x, y = needed(ours, a), needed(theirs, b)
    value, error = difference(x, y)
    why = f"{iterations} iterations: {x.value:.3f} against {y.value:.3f}, {trainings(ours, theirs)}"
    return Found(value, -value, error, why, measured.runs(ours, theirs))
