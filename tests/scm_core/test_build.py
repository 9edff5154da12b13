# SPDX-License-Identifier: Apache-2.0
"""Networks from descriptions, model files, and students that start equal to their teacher."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from scm_core.nn import build
from scm_core.nn.build import Model, build_network, count_parameters, load_model, save_model, student_of

CONFIG: dict[str, Any] = {"architecture": "small", "channels": 2, "resolution": 4, "labels": 3, "width": 8, "blocks": 2}
UNET = {**CONFIG, "blocks": 1, "multipliers": [1, 2], "attention_resolutions": [2]}
EDM2 = {
    **UNET,
    "architecture": "edm2",
    "head_channels": 4,
    "embedding": "fourier",
    "fourier_scale": 2.0,
    "fourier_seed": 7,
}
ARCHITECTURES = [CONFIG, EDM2, {**UNET, "architecture": "ddpmpp"}]


def trained(config: dict[str, Any]) -> Model:
    torch.manual_seed(0)
    net = build_network(config)
    for parameter in net.parameters():
        if parameter.ndim == 0:
            parameter.data.fill_(0.7)  # gains: at 0 every network is the zero function
        elif parameter.ndim == 1 or parameter.detach().std() < 1e-3:
            parameter.data.normal_(std=0.3)  # and last layers near 0
    return Model(net.eval(), config, {})


@pytest.fixture
def teacher() -> Model:
    return trained(CONFIG)


@pytest.fixture(params=ARCHITECTURES, ids=lambda config: config["architecture"])
def each_teacher(request: pytest.FixtureRequest) -> Model:
    return trained(request.param)


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(5, 2, 4, 4, generator=generator),
        torch.rand(5, generator=generator),
        torch.tensor([0, 1, 2, -1, 0]),
    )


def test_a_model_file_gives_the_network_back(each_teacher: Model, tmp_path: Path) -> None:
    """The file holds parameters and description, which are all that a network is: random frequencies come from their seed."""
    net, config, _ = each_teacher
    save_model(tmp_path / "m.safetensors", dict(net.named_parameters()), config, {"run": "r"})
    torch.manual_seed(99)
    loaded = load_model(tmp_path / "m.safetensors")
    assert loaded.config == config
    assert loaded.info == {"run": "r"}
    assert not any(p.requires_grad for p in loaded.net.parameters())
    assert torch.equal(loaded.net(*inputs()), net(*inputs()))


def test_a_guided_student_starts_equal_to_its_teacher_at_every_scale(each_teacher: Model) -> None:
    net, config = student_of(each_teacher, guidance_input=True, dropout=0.1)
    assert config == {**each_teacher.config, "guidance_input": True, "dropout": 0.1}
    assert count_parameters(net) > count_parameters(each_teacher.net)
    x, t, labels = inputs()
    expected = each_teacher.net(x, t, labels)
    assert expected.std() > 0.05
    for scale in (1.0, 1.7):
        out = net.eval()(x, t, labels, torch.full((5,), scale))
        assert torch.equal(out, expected)
    for name, parameter in net.named_parameters():
        if "guidance" in name:
            parameter.data.add_(0.5)
    assert not torch.allclose(net(x, t, labels, torch.full((5,), 1.7)), expected)


def test_the_guidance_input_can_be_trained_from_zero(each_teacher: Model) -> None:
    """Zero-initialised is not dead: something of it has a gradient."""
    net, _ = student_of(each_teacher, guidance_input=True, dropout=0.0)
    x, t, labels = inputs()
    net(x, t, labels, torch.rand(5)).square().sum().backward()
    assert any(
        p.grad is not None and p.grad.abs().max() > 0 for name, p in net.named_parameters() if "guidance" in name
    )


@pytest.mark.parametrize("config", ARCHITECTURES[1:], ids=lambda config: config["architecture"])
def test_a_student_may_differ_in_what_does_not_change_its_function(config: dict[str, Any]) -> None:
    """Its own dropout resolution, checkpointing and precision."""
    teacher = trained(config)
    options = {"dropout_resolution": 2, "checkpointing": True, "precision": "bf16"}
    net, described = student_of(teacher, guidance_input=False, dropout=0.3, **options)
    assert described == {**config, "guidance_input": False, "dropout": 0.3, **options}
    exact, _ = student_of(teacher, guidance_input=False, dropout=0.3)
    torch.testing.assert_close(net.eval()(*inputs()), teacher.net(*inputs()), rtol=0, atol=0.1)
    assert torch.equal(exact.eval()(*inputs()), teacher.net(*inputs()))


@pytest.mark.parametrize(
    "options",
    [{"norm": "adagn"}, {"c_noise": "edm"}, {"embedding": "fourier"}, {"head_channels": 2}, {"dropout_at": 16}],
)
def test_a_student_may_not_differ_in_what_does(options: dict[str, Any]) -> None:
    """Weights would often fit, and the student would not start equal to its teacher."""
    with pytest.raises(
        ValueError, match=f"{next(iter(options))}: expected one of checkpointing, dropout_resolution, precision"
    ):
        student_of(trained(EDM2), guidance_input=False, dropout=0.0, **options)


def test_a_small_network_has_none_of_them(teacher: Model) -> None:
    with pytest.raises(ValueError, match=r"architecture small: .*checkpointing"):
        student_of(teacher, guidance_input=False, dropout=0.0, checkpointing=True)


def test_a_student_of_another_architecture_is_refused(teacher: Model) -> None:
    with pytest.raises(ValueError, match="is not in both networks"):
        student_of(teacher._replace(config={**CONFIG, "blocks": 3}), guidance_input=False, dropout=0.0)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, r"architecture: expected one of small, .*, got None"),
        ({**CONFIG, "depth": 1}, "architecture small: .*depth"),
    ],
)
def test_a_wrong_description_is_named(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_network(config)


def test_a_fault_within_a_constructor_is_not_blamed_on_the_description(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Any, width: int) -> None:
        raise TypeError("unsupported operand")

    monkeypatch.setitem(build.ARCHITECTURES, "broken", type("Broken", (torch.nn.Module,), {"__init__": broken}))
    with pytest.raises(TypeError, match=r"^unsupported operand$"):
        build_network({"architecture": "broken", "width": 1})
    with pytest.raises(ValueError, match="architecture broken: missing a required argument: 'width'"):
        build_network({"architecture": "broken"})


def test_a_damaged_file_is_named(teacher: Model, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    with pytest.raises(FileNotFoundError, match=r"m\.safetensors is missing"):
        load_model(path)
    weights = dict(teacher.net.named_parameters())
    save_model(path, {**weights, "out_gain": torch.zeros(2)}, CONFIG)
    with pytest.raises(ValueError, match="tensor 'out_gain' has shape"):
        load_model(path)
    save_model(path, {key: value for key, value in weights.items() if key != "out_gain"}, CONFIG)
    with pytest.raises(ValueError, match="tensor 'out_gain' is missing"):
        load_model(path)
    save_model(path, weights, CONFIG)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated or not a safetensors file"):
        load_model(path)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("[]", "not a file of format scm-model-1"),
        ("null", "not a file of format scm-model-1"),
        ("{bad", "its description is no JSON"),
        ('{"format": "scm-model-1"}', "its description has no section 'config'"),
        ('{"format": "scm-model-1", "config": {"architecture": "small"}}', "its description has no section 'info'"),
        ('{"format": "scm-model-1", "config": [], "info": {}}', "its description has no section 'config'"),
        ('{"format": "scm-model-1", "config": {}, "info": {}}', "architecture: expected one of small, .*, got None"),
        (
            '{"format": "scm-model-1", "config": {"architecture": "dit"}, "info": {}}',
            "architecture: expected one of small, .*, got 'dit'",
        ),
        (
            '{"format": "scm-model-1", "config": {"architecture": "small"}, "info": {}}',
            "architecture small: missing a required argument",
        ),
    ],
)
def test_a_damaged_description_is_named(header: str, words: str, tmp_path: Path) -> None:
    """With the file's name and what to do, whatever stands in the header."""
    path = tmp_path / "m.safetensors"
    save_file({"weight": torch.zeros(1)}, path, metadata={"scm": header})
    with pytest.raises(ValueError, match=rf"m\.safetensors: {words}.*; make it again"):
        load_model(path)


def test_the_same_model_gives_the_same_bytes_in_every_process(teacher: Model, tmp_path: Path) -> None:
    # safetensors orders several metadata entries by a hash that changes with each map: twenty writes show it.
    info = {"run": "r", "iterations": 1, "nimg": 64}
    for i in range(20):
        save_model(tmp_path / f"{i}.safetensors", dict(teacher.net.named_parameters()), CONFIG, info)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
