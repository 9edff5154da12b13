# SPDX-License-Identifier: Apache-2.0
"""torch.compile, a switch of params.yaml: the compiled network is the network."""

import shutil

import pytest
import torch
from torch import nn

from scm_core.nn.build import build_network
from scm_core.nn.dual import Dual


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_networks_are_the_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """F, F with its tangent, and the gradient of a pair pass, to float32's rounding; names of weights do not change."""
    monkeypatch.setattr("torch._inductor.config.compile_threads", 1)
    torch.manual_seed(0)
    net = build_network({"architecture": "small", "channels": 2, "resolution": 4, "labels": 3, "width": 8, "blocks": 1})
    nn.init.ones_(net.get_parameter("out_gain"))
    x, dx = torch.randn(2, 4, 2, 4, 4)
    t, dt, labels = torch.rand(4) + 0.2, torch.rand(4), torch.tensor([0, 1, 2, -1])

    def passes() -> list[torch.Tensor]:
        plain = net(x, t, labels)
        pair = net(Dual(x, dx), Dual(t, dt), labels)
        net.zero_grad()
        pair.value.square().sum().backward()
        return [plain.detach(), pair.value.detach(), pair.tangent, *(p.grad.clone() for p in net.parameters())]

    expected, names = passes(), list(net.state_dict())
    net.compile()
    try:
        for a, b in zip(passes(), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * max(1.0, float(b.abs().max())))
        assert list(net.state_dict()) == names
    finally:
        torch._dynamo.reset()
