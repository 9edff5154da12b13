# SPDX-License-Identifier: Apache-2.0
"""Networks from descriptions, model files, and students that start equal to their teacher."""

from pathlib import Path
from typing import Any

import pytest
import torch

from scm_core.nn.build import Model, build_network, count_parameters, load_model, save_model, student_of

CONFIG: dict[str, Any] = {"architecture": "small", "channels": 2, "resolution": 4, "labels": 3, "width": 8, "blocks": 2}


@pytest.fixture
def teacher() -> Model:
    torch.manual_seed(0)
    net = build_network(CONFIG)
    for parameter in net.parameters():
        if parameter.ndim == 0:
            parameter.data.fill_(0.7)  # gains: at 0 every network is the zero function
    return Model(net.eval(), CONFIG, {})


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(5, 2, 4, 4, generator=generator),
        torch.rand(5, generator=generator),
        torch.tensor([0, 1, 2, -1, 0]),
    )


def test_a_model_file_gives_the_network_back(teacher: Model, tmp_path: Path) -> None:
    save_model(tmp_path / "m.safetensors", dict(teacher.net.named_parameters()), CONFIG, {"run": "r"})
    loaded = load_model(tmp_path / "m.safetensors")
    assert loaded.config == CONFIG
    assert loaded.info == {"run": "r"}
    assert not any(p.requires_grad for p in loaded.net.parameters())
    assert torch.equal(loaded.net(*inputs()), teacher.net(*inputs()))


def test_a_guided_student_starts_equal_to_its_teacher_at_every_scale(teacher: Model) -> None:
    net, config = student_of(teacher, guidance_input=True, dropout=0.1)
    assert (config["guidance_input"], config["dropout"]) == (True, 0.1)
    assert count_parameters(net) > count_parameters(teacher.net)
    x, t, labels = inputs()
    for scale in (1.0, 1.7):
        out = net.eval()(x, t, labels, torch.full((5,), scale))
        assert torch.equal(out, teacher.net(x, t, labels))


def test_a_student_of_another_architecture_is_refused(teacher: Model) -> None:
    with pytest.raises(ValueError, match="is not in both networks"):
        student_of(teacher._replace(config={**CONFIG, "blocks": 3}), guidance_input=False, dropout=0.0)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "architecture: expected one of small, vae, got None"),
        ({**CONFIG, "depth": 1}, "architecture small: .*depth"),
    ],
)
def test_a_wrong_description_is_named(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_network(config)


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


def test_the_same_model_gives_the_same_bytes_in_every_process(teacher: Model, tmp_path: Path) -> None:
    # safetensors orders several metadata entries by a hash that changes with each map: twenty writes show it.
    info = {"run": "r", "iterations": 1, "nimg": 64}
    for i in range(20):
        save_model(tmp_path / f"{i}.safetensors", dict(teacher.net.named_parameters()), CONFIG, info)
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
