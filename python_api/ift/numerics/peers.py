"""Log-probabilities per token of others: torch in the same dtype, and what is installed of it.

A peer is a function of hidden (N, D), weight (V, D), bias (V,) or None and target (N,).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ift.numerics import oracle

Peer = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]


class NotServed(Exception):
    """What a peer cannot be called with; the message says why."""


def torch_same_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """Logits and what follows in the dtype of the inputs."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]


def torch_fp32_softmax(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor
) -> Tensor:
    """Logits of a product in the dtype of the inputs, everything after it in fp32."""
    logits = oracle.logits(hidden, weight, bias)
    return logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]


def torch_fp32(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """Everything in fp32, from inputs that are cast."""
    bias = None if bias is None else bias.float()
    return torch_fp32_softmax(hidden.float(), weight.float(), bias, target)


def compiled(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """`torch_fp32_softmax` through inductor."""
    call: Any = torch.compile(torch_fp32_softmax, dynamic=False)
    found: Tensor = call(hidden, weight, bias, target)
    return found


def liger(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """The chunked log-probabilities of its policy losses, which are plain torch."""
    module = _module("liger_kernel.chunked_loss.fused_linear_ppo")
    call = module.LigerFusedLinearPPOBase.chunk_forward
    found: Tensor = call(hidden[None], weight, target[None], bias=bias)[0]
    return found


def trl(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """The function under its fused heads, with the chunk that its trainers pass."""
    module = _module("trl.trainer.utils")
    try:
        apply, chunk = module._ChunkedLogProbFunction.apply, module._CHUNKED_LOGPROB_CHUNK_SIZE
    except AttributeError:
        raise NotServed("needs TRL 1.16 or a later one with its chunked logprob") from None
    found: Tensor = apply(hidden, weight, bias, target, 1.0, chunk, None, 1.0, ())[0]
    return found


def cce(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
    """Its kernels on a GPU; elsewhere what it offers there, a compiled dense loss."""
    module = _module("cut_cross_entropy")
    if bias is not None:
        raise NotServed("takes no bias")
    impl = "cce" if hidden.is_cuda else "torch_compile"
    found: Tensor = -module.linear_cross_entropy(
        hidden, weight, target, reduction="none", impl=impl
    )
    return found


PEERS: dict[str, Peer] = {
    "torch": torch_same_dtype,
    "torch, fp32 softmax": torch_fp32_softmax,
    "torch, all fp32": torch_fp32,
    "torch.compile": compiled,
    "Liger": liger,
    "TRL": trl,
    "CCE": cce,
}
COMPILED = ("torch.compile", "CCE")
DISTRIBUTIONS = {"Liger": "liger-kernel", "TRL": "trl", "CCE": "cut-cross-entropy"}


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise NotServed(f"{error.name} is not installed") from None
    except Exception as error:  # whatever another package's import raises
        raise NotServed(f"does not import: {type(error).__name__}") from None
