# SPDX-License-Identifier: Apache-2.0
"""The networks' sections and the library's architectures: the same names, the same arguments."""

import inspect
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from pipeline.networks import Items, Network
from pipeline.sections import TeacherTraining
from scm_core.nn.build import ARCHITECTURES, build_network, count_parameters
from scm_core.nn.unet_edm2 import WIDTHS
from scm_core.train.flops import count_flops

UNET = {"embedding": "positional", "c_noise": "t", "checkpointing": False, "precision": "fp32"}
EDM2 = {
    **UNET, "architecture": "edm2", "width": 192, "multipliers": [1, 2, 3, 4], "blocks": 3, "attention_resolutions": [16, 8],
    "head_channels": 64, "norm": "double",
}  # fmt: skip
DDPMPP = {
    **UNET, "architecture": "ddpmpp", "width": 128, "multipliers": [2, 2, 2], "blocks": 4, "attention_resolutions": [16],
    "noise_channels": 256, "norm": "double",
}  # fmt: skip
SMALL = {"architecture": "small", "width": 64, "blocks": 5}
FROM_ELSEWHERE = {"channels", "resolution", "labels", "guidance_input", "dropout", "dropout_resolution", "sigma_data"}
DATA = {"small": (4, 8), "edm2": (4, 64), "ddpmpp": (3, 32)}
TRAINING = TeacherTraining.model_construct(dropout=0.1, dropout_resolution=16)


def section(data: dict[str, Any]) -> Any:
    return TypeAdapter(Network).validate_python(data)


@pytest.mark.parametrize("data", [SMALL, EDM2, DDPMPP], ids=["small", "edm2", "ddpmpp"])
def test_the_library_takes_what_a_section_says(data: dict[str, Any]) -> None:
    network = section(data)
    channels, resolution = DATA[network.architecture]
    config = {
        **network.config(0.5),
        **network.dropout(TRAINING),
        "channels": channels,
        "resolution": resolution,
        "labels": 10,
    }
    with torch.device("meta"):
        net = build_network(config)
    assert count_parameters(net) == pytest.approx(network.weights(Items(channels, resolution, 10)), rel=0.005)
    assert not resolution % network.downsampling
    arguments = set(inspect.signature(ARCHITECTURES[network.architecture]).parameters) - FROM_ELSEWHERE
    # Fourier features' seed is no setting, their waves are those of an imported network; the small network's patch is `downsampling`
    assert arguments - {"fourier_seed", "waves", "patch"} == set(type(network).model_fields) - {"architecture"}


def changed(data: dict[str, Any], **change: Any) -> dict[str, Any]:
    """A small network of that architecture."""
    own = {"head_channels": 12} if data is EDM2 else {"noise_channels": 8}
    return {**data, "width": 12, "multipliers": [1, 2], "blocks": 1, "attention_resolutions": [], **own, **change}


CHANGES = [
    (changed(data, **change), 8)
    for data in (EDM2, DDPMPP)
    for change in (
        *({"width": width, "multipliers": m, "blocks": b}
          for width in (4, 10, 36, 132) for m in ([1], [1, 2], [3, 1, 2]) for b in (1, 2)),
        # 68 + 68 channels are too many only where a level's own blocks meet its own skips; 132, where the last block meets the input's
        *({"width": 4, "multipliers": [17, 15], "blocks": b} for b in (1, 2)),
        {"width": 4, "multipliers": [32, 16]},
        *({"attention_resolutions": sides} for sides in ([], [4], [8, 4], [1], [16], [3], [8, 2])),
        *({"head_channels": heads, "attention_resolutions": [8], "multipliers": m}
          for heads in (4, 8, 24, 64) for m in ([2, 1], [1, 2], [2, 4]) if data is EDM2),
    )
]  # fmt: skip


@pytest.mark.parametrize(("data", "resolution"), CHANGES, ids=str)
def test_what_does_not_fit_is_known_before_the_network_is_built(data: dict[str, Any], resolution: int) -> None:
    """The library is the oracle: `misfit` names a key exactly where the network refuses its arguments."""
    network = section(data)
    assert not resolution % network.downsampling
    wrong = network.misfit(resolution)
    config = {**network.config(0.5), "channels": 1, "resolution": resolution, "labels": 0}
    refusal = None
    try:
        with torch.device("meta"):
            build_network(config)
    except ValueError as error:
        refusal = str(error)
    assert (wrong is None) == (refusal is None), (wrong, refusal)
    if wrong is not None:
        assert wrong[0] in type(network).model_fields


def test_both_kinds_of_network_are_among_them() -> None:
    for architecture in ("edm2", "ddpmpp"):
        found = {section(data).misfit(side) is None for data, side in CHANGES if data["architecture"] == architecture}
        assert found == {True, False}
        keys = {
            (section(data).misfit(side) or ("",))[0] for data, side in CHANGES if data["architecture"] == architecture
        }
        assert keys == {"", "attention_resolutions", "head_channels" if architecture == "edm2" else "width"}


@pytest.mark.parametrize(
    "data",
    [
        {**SMALL, "width": 12},
        changed(EDM2, attention_resolutions=[8]),
        changed(EDM2, norm="adagn", multipliers=[2, 1], blocks=2),
        *(changed(DDPMPP, attention_resolutions=[8], norm=norm, blocks=2) for norm in ("double", "shift")),
        pytest.param({**EDM2, "width": 64}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_flops_are_those_that_are_counted(data: dict[str, Any]) -> None:
    """The oracle is torch: every matrix product and convolution of one forward pass of the real network."""
    network, items = section(data), Items(3, 16, 5)
    net = build_network({**network.config(0.5), **items._asdict()}).eval()
    x, t, labels = torch.zeros(1, 3, 16, 16), torch.ones(1), torch.zeros(1, dtype=torch.long)
    with torch.no_grad():
        assert network.flops(items) == count_flops(lambda: net(x, t, labels))


def test_flops_are_those_that_edm2_states() -> None:
    """Table 6 of EDM2: XS to XXL cost 46, 102, 181, 282, 406, 552 gigaflops per evaluation at 64 × 64, a multiplication and its addition
    as one."""
    cost = [
        section({**EDM2, "norm": "adagn", "width": width}).flops(Items(4, 64, 1000)) / 2e9 for width in WIDTHS.values()
    ]
    assert cost == pytest.approx([46, 102, 181, 282, 406, 552], rel=0.03)


@pytest.mark.parametrize("change", [{"embedding": "fourier"}, {"fourier_scale": 16.0}])
def test_the_scale_of_fourier_features_belongs_to_them(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="for embedding"):
        section({**EDM2, **change})
    assert section({**EDM2, "embedding": "fourier", "fourier_scale": 16.0}).config(0.5)["fourier_scale"] == 16.0
