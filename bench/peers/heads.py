"""The implementations that are compared: how to call each in its best mode, and why one cannot run.

Each offers some of the kinds below, as functions of hidden (N, D), weight (V, D) and target (N,),
with −100 where a target is ignored:

* ``loss``: mean cross-entropy, a scalar;
* ``logprob``: (N,) log-probability of each target, 0 where ignored;
* ``statistics``: that, the entropy (N,) and the most likely id (N,);
* ``ids``: the most likely id (N,).

What the peers print or warn stays in the process of the worker that runs them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.peers.ours import Active, Deterministic, Dropped, Fp32Copies, Fp32Logits, Lora, Ours
from bench.peers.peer import LOGPROB_ONLY, LOSS_ONLY, Peer, Statistics, optional


class Naive(Peer):
    """What people write, in the dtype of the model."""

    name, title, slowness = "naive", "naive", 1.6

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.linear(hidden, weight)

    def loss(self, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(hidden, weight), target)

    def logprob(self, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        logp = self.logits(hidden, weight).log_softmax(-1)
        return _pick(logp, target)

    def statistics(self, hidden: Tensor, weight: Tensor, target: Tensor) -> Statistics:
        logp = self.logits(hidden, weight).log_softmax(-1)
        return _pick(logp, target), -(logp.exp() * logp).sum(-1), logp.argmax(-1)

    def ids(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.linear(hidden, weight).argmax(-1)


class NaiveFloat(Naive):
    """The same with the logits cast to float32, as transformers does."""

    name, title, slowness = "naive-float", "naive, fp32 logits", 1.8
    lacks = {"ids": "the same as naive"}  # noqa: RUF012

    def unsupported_reason(self, kind: str, device: torch.device, dtype: torch.dtype) -> str:
        same = "the same as naive" if dtype == torch.float32 else ""
        return same or super().unsupported_reason(kind, device, dtype)

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.linear(hidden, weight).float()


class Compiled(Peer):
    """`NaiveFloat` through inductor, once per shape."""

    name, title, compiled = "compile", "torch.compile of naive", True
    package = "torch._inductor.compile_fx"

    def function(self, kind: str) -> Callable[..., Any]:
        return compiled(getattr(NaiveFloat(), kind))


class Reduced(Peer):
    """A cross-entropy with a reduction, "mean" or "none"."""

    lacks = LOGPROB_ONLY

    def loss(self, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return self.cross_entropy(hidden, weight, target, "mean")

    def logprob(self, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return -self.cross_entropy(hidden, weight, target, "none")

    def cross_entropy(
        self, hidden: Tensor, weight: Tensor, target: Tensor, reduction: str
    ) -> Tensor:
        raise NotImplementedError


class TorchChunked(Reduced):
    """torch's own fused head, chunked; without options it is the naive one."""

    name, title, slowness = "torch-chunked", "F.linear_cross_entropy, chunked", 10.0

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str:
        has = hasattr(torch.nn, "LinearCrossEntropyOptions")
        return "" if has else f"needs torch 2.13, this is {torch.__version__}"

    def cross_entropy(
        self, hidden: Tensor, weight: Tensor, target: Tensor, reduction: str
    ) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions()
        call: Any = F.linear_cross_entropy
        return call(hidden, weight, target, reduction=reduction, options=options)


class TrlChunked(Peer):
    """The function under TRL's fused heads, with the chunk that its trainers pass."""

    name, title, slowness = "trl", "TRL chunked logprob", 5.0
    lacks = {"ids": "reports whether the target is the most likely id, not which one is"}  # noqa: RUF012
    package = "trl.trainer.utils"

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str:
        if self.module is None:
            return super().unavailable(device, dtype)
        has = hasattr(self.module, "_ChunkedLogProbFunction")
        return "" if has else "needs TRL 1.16 or a later one that still has its chunked logprob"

    def logprob(self, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return self._call(hidden, weight, target, ())[0]

    def statistics(self, hidden: Tensor, weight: Tensor, target: Tensor) -> Statistics:
        return (*self._call(hidden, weight, target, ("entropy", "is_top1"))[:2], None)

    def _call(
        self, hidden: Tensor, weight: Tensor, target: Tensor, outputs: tuple[str, ...]
    ) -> tuple[Tensor, ...]:
        mask = target != -100
        chunk = self.module._CHUNKED_LOGPROB_CHUNK_SIZE
        apply = self.module._ChunkedLogProbFunction.apply
        found = apply(hidden, weight, None, target.clamp(min=0), 1.0, chunk, None, 1.0, outputs)
        return found[0].masked_fill(~mask, 0), *found[1:]


class CutCrossEntropy(Reduced):
    """Its Triton kernels on a GPU; elsewhere what it offers there, a compiled dense loss."""

    name, title = "cce", "Cut Cross-Entropy"
    compiled, package = True, "cut_cross_entropy"

    def cross_entropy(
        self, hidden: Tensor, weight: Tensor, target: Tensor, reduction: str
    ) -> Tensor:
        call = self.module.linear_cross_entropy
        mode = "cce" if hidden.is_cuda else "torch_compile"
        return call(hidden, weight, target, reduction=reduction, impl=mode)


class Liger(Peer):
    """Chunks of tokens, gradients in forward."""

    name, title = "liger", "Liger-Kernel"
    lacks = LOSS_ONLY
    gpu_only, package = True, "liger_kernel.transformers.functional"

    def loss(self, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return self.module.liger_fused_linear_cross_entropy(hidden, weight, target)


class Quack(Peer):
    """Chunks of tokens, kernels for Hopper and Blackwell, gradients in forward."""

    name, title, compiled = "quack", "QuACK", True
    lacks = LOSS_ONLY
    gpu_only, package = True, "quack.linear_cross_entropy"

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str:
        found = super().unavailable(device, dtype)
        return found or ("16-bit data only" if dtype.itemsize > 2 else "")

    def loss(self, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return self.module.chunked_linear_cross_entropy(hidden, weight, target)


class Verl(Peer):
    """Its Triton kernels on a GPU, elsewhere its chunks of 512 tokens in torch."""

    name, title, compiled, slowness = "verl", "verl fused linear", True, 2.0
    lacks = {"ids": "gives no ids"}  # noqa: RUF012
    package = "verl.utils.experimental.torch_functional"
    kernels = "verl.utils.kernel.linear_cross_entropy"

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str:
        return optional(self.package if device.type == "cpu" else self.kernels)[1]

    def logprob(self, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        # It has no ignored targets: its users mask what comes out.
        logprob = self._call(hidden, weight, target.clamp(min=0))[0]
        return logprob.masked_fill(target == -100, 0)

    def statistics(self, hidden: Tensor, weight: Tensor, target: Tensor) -> Statistics:
        logprob, entropy = self._call(hidden, weight, target)
        return logprob, entropy, None

    def _call(self, hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        if hidden.is_cuda:
            kernels = optional(self.kernels)[0]
            return kernels.linear_cross_entropy(hidden, weight, target, 1.0, "none")
        return self.module.FusedLinearForPPO()(hidden, weight, target)


class FlashAttention(Naive):
    """Its kernel of the loss over logits that are held, with the gradient in their place."""

    name, title, slowness = "flash", "naive, flash-attn's cross-entropy", 1.4
    lacks = LOGPROB_ONLY
    gpu_only, package = True, "flash_attn.ops.triton.cross_entropy"
    loss = Peer.loss

    def logprob(self, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        logits = self.logits(hidden, weight)
        return -self.module.cross_entropy_loss(logits, target, inplace_backward=True)[0]


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Ours(), Naive(), NaiveFloat(), Compiled(), CutCrossEntropy(), TrlChunked(), TorchChunked(),
        Liger(), Quack(), Verl(), FlashAttention(), Active(), Dropped(), Deterministic(),
        Fp32Logits(), Fp32Copies(), Lora(),
    )
}  # fmt: skip


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Through inductor, once per shape, and never in silence without it."""
    config: Any = importlib.import_module("torch._dynamo.config")
    config.fail_on_recompile_limit_hit = True
    return torch.compile(function, dynamic=False)


def _pick(logp: Tensor, target: Tensor) -> Tensor:
    found = logp.gather(-1, target.clamp(min=0)[:, None])[:, 0]
    return found.masked_fill(target == -100, 0)
