# SPDX-License-Identifier: Apache-2.0
"""What the networks F(x_t/σ_d, t, labels, guidance) share: the checks of a call, conditioning, precision, gradient checkpointing."""

from typing import Literal

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scm_core.nn import dual
from scm_core.nn.dual import Dual, Maybe, check_pair, value_of
from scm_core.nn.embedding import PositionalEmbedding
from scm_core.nn.layers import MPLinear, mp_silu
from scm_core.validate import check_channels, check_device, check_labels, check_time_dtype

Precision = Literal["fp32", "fp16", "bf16"]
TRUNK = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}  # None: the format of the parameters

LABEL_BALANCE = 0.5  # weight of the label embedding (EDM2, config G)


class Network(nn.Module):
    """Base of the networks: F(x_t/σ_d, t, labels, guidance) for x of shape (B, channels, resolution, resolution), t (B,) in radians.

    Called with `Dual`s for x and t a network returns the pair (F, dF) of value and directional derivative. Labels are int64 of shape (B,)
    with −1 for "no label" (a dropped one); `labels=None` means −1 for all. The guidance scale (B,) enters through a zero-initialised
    layer, so that a student starts equal to its teacher; `guidance=None` leaves it out.

    `precision` is the trunk's format: "fp32" stands for that of the parameters (float64 after `.double()`), "fp16" and "bf16" convert
    activations, tangents and, where they are used, weights. The time's and the scale's waves are computed in the format of t; what is
    made of them, and F, have the parameters' format, whatever that of x and t.

    `checkpointing` computes each block's activations a second time in the backward instead of keeping them. Of a pair it computes the
    tangent again too, which nobody needs: by count a consistency step with checkpointing is (forward 2, again 2, backward 2) six passes
    to a diffusion model's four. Value and tangent take one way through a block, whose plain form rounds otherwise in places, so that the
    value alone would not be the same to the bit (benchmarks/results/step_cost.md has the cost).
    """

    supports_dual = True

    def __init__(
        self,
        channels: int,
        resolution: int,
        labels: int,
        guidance_input: bool = False,
        precision: Precision = "fp32",
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_channels("channels", channels, 1)
        if labels < 0:
            raise ValueError(f"labels: expected their number, 0 for none, got {labels}")
        if precision not in TRUNK:
            raise ValueError(f"precision: expected one of {', '.join(TRUNK)}, got {precision!r}")
        self.shape = (channels, resolution, resolution)
        self.labels, self.guidance_input, self.checkpointing = labels, guidance_input, checkpointing
        self.trunk = TRUNK[precision]

    def check_call(self, x: Maybe, t: Maybe, labels: Tensor | None, guidance: Tensor | None) -> None:
        """ValueError for shapes, formats or devices that do not fit, and for inputs that the network was built without."""
        check_pair("x", x)
        check_pair("t", t)
        x, t = value_of(x), value_of(t)
        if tuple(x.shape[1:]) != self.shape:
            raise ValueError(f"x: expected shape (B, {', '.join(map(str, self.shape))}), got {tuple(x.shape)}")
        if labels is not None and not self.labels:
            raise ValueError("labels: the network was built without a label input (labels=0)")
        if guidance is not None and not self.guidance_input:
            raise ValueError("guidance: the network was built without a guidance input (guidance_input=False)")
        if labels is not None and labels.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"labels: expected int64, got {labels.dtype}")
        check_time_dtype(t)
        if guidance is not None:
            check_time_dtype(guidance, "guidance")  # it is embedded as a time
        for name, vector in (("t", t), ("labels", labels), ("guidance", guidance)):
            if vector is not None:
                if vector.shape != x.shape[:1]:
                    raise ValueError(
                        f"{name}: expected shape ({x.shape[0]},), one for each sample, got {tuple(vector.shape)}"
                    )
                check_device(name, vector, x, "x")

    def one_hot(self, labels: Tensor | None, like: Tensor) -> Tensor:
        """(B, number of labels): √labels at the label, so that the mean square is 1; zeros for −1. In the format of `like` (B, …).

        A label that the network does not have is a ValueError on a CPU and a failed assertion of the kernel on a GPU, which both find
        that there is no such place to write to: nothing here looks at the values.
        """
        onehot = like.new_zeros(like.shape[0], self.labels)
        if labels is None:
            return onehot
        known = labels != -1
        at = torch.where(known, labels, 0).long()
        try:
            return onehot.scatter_(1, at[:, None], known.to(like.dtype)[:, None] * self.labels**0.5)
        except RuntimeError:
            check_labels(labels, self.labels)  # says which one
            raise

    def run(self, block: nn.Module, *inputs: Maybe) -> Maybe:
        """block(*inputs), under gradient checkpointing if the network has it.

        The backward's recomputation uses the same random numbers (dropout) and needs no tangents: zeros without memory stand in for
        them, so that none is kept alive until then. ValueError within torch.func.jvp: the recomputation would be outside of it.
        """
        if not (self.checkpointing and torch.is_grad_enabled()):
            return block(*inputs)
        if any(forward_ad.unpack_dual(value_of(x)).tangent is not None for x in inputs):
            raise ValueError(
                "checkpointing: a network with checkpointing=True cannot be trained through torch.func.jvp (engine 'func'); "
                "use engine 'dual' or 'auto', or checkpointing=False"
            )
        tangents = [x.tangent if isinstance(x, Dual) else None for x in inputs]

        def forward(*values: Tensor) -> Maybe:
            return block(*(v if d is None else Dual(v, d) for v, d in zip(values, tangents, strict=True)))

        result = checkpoint(forward, *map(value_of, inputs), use_reentrant=False)
        tangents[:] = [None if d is None else d.new_zeros(()).expand_as(d) for d in tangents]
        return result


class MPNetwork(Network):
    """A network with EDM2's conditioning: emb = silu(mp_sum(W_t time(t), W_y y, 0.5) + gain · W_s positional(s)), of shape (B, width).

    `time` embeds t in `noise_channels` numbers. Other arguments as in `Network`.
    """

    def __init__(
        self,
        channels: int,
        resolution: int,
        labels: int,
        time: nn.Module,
        noise_channels: int,
        width: int,
        guidance_input: bool = False,
        precision: Precision = "fp32",
        checkpointing: bool = False,
    ) -> None:
        super().__init__(channels, resolution, labels, guidance_input, precision, checkpointing)
        self.time = time
        self.embed_time = MPLinear(noise_channels, width)
        self.embed_label = MPLinear(labels, width) if labels else None
        self.embed_guidance = MPLinear(noise_channels, width) if guidance_input else None
        if guidance_input:
            self.scale = PositionalEmbedding(noise_channels)
            self.guidance_gain = nn.Parameter(torch.zeros(()))

    def embedding(self, t: Maybe, labels: Tensor | None, guidance: Tensor | None) -> Maybe:
        """The conditioning vector (B, width); only its time part has a tangent."""
        dtype = self.embed_time.weight.dtype
        emb = self.embed_time(dual.cast(self.time(t), dtype))
        if self.embed_label is not None:
            emb = dual.weighted_sum(emb, self.embed_label(self.one_hot(labels, value_of(emb))), LABEL_BALANCE)
        if self.embed_guidance is not None and guidance is not None:
            waves = dual.cast(self.scale(guidance), dtype)
            emb = dual.add(emb, self.embed_guidance(waves, gain=self.guidance_gain))
        return mp_silu(emb)
