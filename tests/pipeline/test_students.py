# SPDX-License-Identifier: Apache-2.0
"""The students' sections and the library's methods: the same names, the same options."""

from typing import Any, get_args

import pytest
from pydantic_core import PydanticCustomError
from torch import nn

from pipeline.students import METHODS, UNGUIDED, Student, StudentTraining, in_order
from pipeline.training import schedule, settings_beside, train_settings
from scm_core.nn.small import SmallNet
from scm_core.objectives import methods

BASE: dict[str, Any] = {
    "iterations": 10, "batch": 4, "lr": 1e-3, "betas": [0.9, 0.99], "eps": 1e-8, "ramp_up": 0, "ema_sigma_rel": 0.05,
    "dropout": 0.0, "dropout_resolution": None,
    "decay": {"rule": "inverse_sqrt", "t_ref": 100}, "logvar_lr": 1e-2, "log_every": 1, "checkpoint_every": 1, "sample_every": 1,
}  # fmt: skip
PROPOSAL = {"P_mean": -1.0, "P_std": 1.4}
TANGENT = {**PROPOSAL, "tangent_warmup": 5, "tangent_normalize": "norm", "tangent_c": 0.1, "adaptive_weighting": True}
CONTINUOUS = {**TANGENT, "tangent_engine": "auto"}
VSD = {"vsd_P_mean": 0.4, "vsd_P_std": 2.0, "fake_P_mean": -0.8, "fake_P_std": 1.6, "fake_guidance": True}
OWN: dict[str, dict[str, Any]] = {
    "sct": CONTINUOUS,
    "scd": CONTINUOUS,
    "dsct": {**TANGENT, "intervals": 16},
    "dscd": {**TANGENT, "intervals": 16},
    "multistep": {**CONTINUOUS, "segments": 4},
    "vsd": {**VSD, "adaptive_weighting": True},
    "scd_vsd": {**CONTINUOUS, **VSD, "vsd_weight": 1.0},
    "ect": {**PROPOSAL, "stage_iterations": 5, "q": 2.0, "k": 8.0, "b": 1.0, "c": 0.06},
}


def section(method: str, **changes: Any) -> StudentTraining:
    kind = next(
        kind for kind in get_args(get_args(Student)[0]) if method in get_args(kind.model_fields["method"].annotation)
    )
    return kind.model_validate({**BASE, "guidance": None, "method": method, **OWN[method], **changes})


def net(guidance_input: bool) -> nn.Module:
    return SmallNet(1, 4, labels=3, width=8, blocks=1, guidance_input=guidance_input)


def test_every_method_of_the_library_has_a_section() -> None:
    assert set(METHODS) == set(methods.METHODS) == set(OWN)


@pytest.mark.parametrize("method", METHODS)
def test_the_library_takes_the_options_of_a_section(method: str) -> None:
    guided = method not in UNGUIDED
    options = section(method, guidance=[1.0, 2.0] if guided else None).options()
    made = methods.METHODS[method](net(guided), net(False), 0.5, (1, 4, 4), **options)
    assert callable(made.objective)
    assert set(made.companions) == ({"fake"} if "vsd" in method else set())


def test_options_drop_the_prefix_and_leave_the_training_out() -> None:
    assert section("scd").options() == {
        "guidance": None,
        "P_mean": -1.0,
        "P_std": 1.4,
        "warmup": 5,
        "normalize": "norm",
        "c": 0.1,
        "engine": "auto",
        "adaptive_weighting": True,
    }


def test_a_student_starts_as_the_teacher_or_as_another_one_which_comes_first() -> None:
    guided = [1.0, 2.0]
    students = {
        "both": section("scd_vsd", guidance=guided, start="vsd"),
        "scd": section("scd", guidance=guided),
        "vsd": section("vsd", guidance=guided, start="scd"),
    }
    assert in_order(students) == ["scd", "vsd", "both"]
    for sort in students.values():
        assert "start" not in sort.options()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start": "sct2"}, r"must be the teacher or another student of the size \(teacher, scd\), got sct2"),
        ({"start": "scd"}, "a student with the same inputs as vsd, and scd has a guidance input"),
        ({"start": "vsd", "guidance": [1.0, 2.0]}, "leads back to itself"),
    ],
)
def test_what_a_student_cannot_start_as(changes: dict[str, Any], message: str) -> None:
    students = {"scd": section("scd", guidance=[1.0, 2.0]), "vsd": section("vsd", **changes)}
    with pytest.raises(PydanticCustomError, match=message) as error:
        in_order(students)
    assert error.value.context is not None
    assert error.value.context["at"] == "students.vsd.start"


def test_keys_that_say_nothing_leave_a_result_its_name() -> None:
    """A run is known by its section: one of before there were these keys is still found."""
    assert not {"start", "fake_lr", "vsd_delay"} & section("vsd").model_dump(mode="json").keys()
    said = {"start": "scd", "fake_lr": 6e-3, "vsd_delay": 5}
    assert section("vsd", **said).model_dump(mode="json").items() >= said.items()


def test_the_fake_network_has_a_rate_of_its_own() -> None:
    for rate in (None, 6e-3):
        options = section("vsd", fake_lr=rate).options()
        made = methods.METHODS["vsd"](net(False), net(False), 0.5, (1, 4, 4), **options)
        settings = train_settings(section("vsd", fake_lr=rate), seed=3)
        beside = settings_beside(settings, "fake", made.companions["fake"])
        assert beside.lr == (1e-3 if rate is None else rate)
        assert (beside.seed != settings.seed, beside.ema_sigma_rel, beside.batch) == (True, None, 4)


def test_sampling_steps() -> None:
    assert section("multistep").steps == (4,)
    assert section("vsd").steps == (1,)
    assert section("scd").steps == (1, 2)


def test_the_ramp_is_in_iterations_or_in_images() -> None:
    in_images = schedule(section("sct", ramp_up_images=64))  # of 4 images each: 16 iterations
    in_iterations = schedule(section("sct", ramp_up=16))
    factors = [in_images(i, 10, batch=4) for i in range(20)]
    assert factors == [in_iterations(i, 10, batch=4) for i in range(20)]
    assert factors[0] == 1 / 16
    with pytest.raises(ValueError, match="must be 0 where ramp_up is not"):
        section("sct", ramp_up=16, ramp_up_images=64)
