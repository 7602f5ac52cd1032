"""Every loss from hidden states, beside its form that holds the logits.

Forward and backward to hidden states and head. The naive form takes the log-softmax of the logits
in float32, gathers, and calls the same loss; the reference model's logits and the teacher's it
holds likewise. Both see the same random data: exact gradients take as long on any.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness.data import Wrong
from bench.harness.measure import Cell, Records, Settings, Subject, Suite, by_name, measure, record
from bench.suites.grid import DTYPES, RATE, sizes, words
from ift import losses

SHAPE = (8, 64, 896, 151936)  # responses, tokens of each, D, V
IMPLEMENTATIONS = ("ours", "naive")
# Largest relative deviation from the naive form in the same dtype; both round.
APART = {torch.float32: 1e-3, torch.bfloat16: 4e-2}
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A loss, and what it compares the policy with."""

    name: str
    title: str
    loss: Callable[..., Tensor]  # (logprob, mask, *rows, reference=…)
    rows: tuple[str, ...] = ()  # tensors after the mask
    reference: bool = False
    products: int = 3  # of N·V·D multiply-adds that cannot be avoided


CASES: dict[str, Case] = by_name(
    Case("sft", "SFT", losses.sft_loss),
    Case("ift", "IFT, second pass", losses.ift_loss),
    Case("dpo", "DPO, reference in the call", losses.dpo_loss, (), True, 4),
    Case("simpo", "SimPO", losses.simpo_loss),
    Case("orpo", "ORPO", losses.orpo_loss),
    Case("kto", "KTO, reference in the call", losses.kto_loss, ("desirable",), True, 4),
    Case("ppo", "PPO", losses.ppo_loss, ("advantages", "old")),
    Case(
        "grpo", "GRPO with KL, reference in the call",
        functools.partial(losses.grpo_loss, kl_coef=0.04), ("advantages", "old"), True, 4,
    ),
    Case("forward-kl", "distillation, forward KL", losses.distillation_loss, products=4),
    Case("reverse-kl", "distillation, reverse KL",
         functools.partial(losses.distillation_loss, kind="reverse"), products=4),
    Case("jsd", "distillation, Jensen-Shannon",
         functools.partial(losses.distillation_loss, kind="jsd"), products=4),
)  # fmt: skip
DISTILLED = ("forward-kl", "reverse-kl", "jsd")


# --- in the workers -------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _data(shape: tuple[int, int, int, int], dtype: str, device: str) -> Tensors:
    rows, length, d, v = shape
    g = torch.Generator(device).manual_seed(0)
    kind = DTYPES[dtype]

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, device=device, dtype=torch.float32).to(kind)

    weight = normal(v, d).div_(d**0.5)
    tensors = {
        "hidden": normal(rows, length, d),
        "weight": weight,
        "other_hidden": normal(rows, length, d),
        # A copy: a reference model has a head of its own.
        "other_weight": weight.clone().mul_(0.9),
        "target": torch.randint(v, (rows, length), generator=g, device=device),
        "advantages": torch.randn(rows, generator=g, device=device),
        "old": torch.full((rows, length), -12.0, device=device),
        "desirable": torch.arange(rows, device=device) < rows // 2,
    }
    for name in ("hidden", "weight"):
        tensors[name].requires_grad_()
    return tensors


def _gradients(loss: Tensor, t: Tensors) -> tuple[Tensor, ...]:
    return loss.detach(), *torch.autograd.grad(loss, (t["hidden"], t["weight"]))


def _ours(case: Case, t: Tensors) -> tuple[Tensor, ...]:
    other = losses.Head(t["other_hidden"], t["other_weight"])
    student = (t["hidden"], t["weight"], t["target"])
    if case.name in DISTILLED:
        return _gradients(case.loss(*student, other), t)
    rows = [t[name] for name in case.rows]
    reference = {"reference": other} if case.reference else {}
    return _gradients(losses.from_hidden(case.loss, *student, *rows, **reference), t)


def _naive(case: Case, t: Tensors) -> tuple[Tensor, ...]:
    def log_probs(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.linear(hidden, weight).float().log_softmax(-1)

    def picked(hidden: Tensor, weight: Tensor) -> Tensor:
        return log_probs(hidden, weight).gather(-1, t["target"][..., None])[..., 0]

    other = t["other_hidden"], t["other_weight"]
    if case.name in DISTILLED:
        s = log_probs(t["hidden"], t["weight"])
        with torch.no_grad():
            teacher = log_probs(*other)
        return _gradients(_naive_divergence(case.name, s, teacher).mean(), t)
    logprob = picked(t["hidden"], t["weight"])
    reference = {}
    if case.reference:
        with torch.no_grad():
            reference["reference"] = picked(*other)
    mask = torch.ones_like(t["target"])
    return _gradients(case.loss(logprob, mask, *(t[n] for n in case.rows), **reference), t)


def _naive_divergence(kind: str, s: Tensor, t: Tensor) -> Tensor:
    divergence = functools.partial(F.kl_div, reduction="none", log_target=True)
    if kind == "forward-kl":
        return divergence(s, t).sum(-1)
    if kind == "reverse-kl":
        return divergence(t, s).sum(-1)
    m = torch.logaddexp(s, t) - torch.log(torch.tensor(2.0))
    return (divergence(m, s) + divergence(m, t)).sum(-1) / 2


def prepare(
    case: str, name: str, dtype: str, shape: tuple[int, int, int, int], device: str
) -> Subject:
    """A cell, ready to be measured; ours is checked against the naive form."""
    chosen, t = CASES[case], _data(shape, dtype, device)
    call = functools.partial(_ours if name == "ours" else _naive, chosen, t)
    few = {k: v[:, :2] if v.dim() > 1 and not k.endswith("weight") else v for k, v in t.items()}
    few["hidden"] = few["hidden"].detach().requires_grad_()
    warm = functools.partial(_ours if name == "ours" else _naive, chosen, few)

    def check(result: tuple[Tensor, ...]) -> dict[str, float]:
        if name != "ours":
            return {}
        errors = {}
        pairs = zip(("loss", "d hidden", "d weight"), result, _naive(chosen, t), strict=True)
        for what, mine, theirs in pairs:
            errors[what] = float((mine.float() - theirs.float()).norm() / theirs.float().norm())
            if not errors[what] <= APART[DTYPES[dtype]]:
                raise Wrong(f"{what}: {errors[what]:.2g} from the naive form")
        return errors

    return Subject(call, warm, check, torch.device(device))


# --- in the command -------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this suite."""
    parser.add_argument("--shape", type=_shape, default=SHAPE, metavar="RxTxDxV",
                        help="responses (even), tokens of each, D, V")  # fmt: skip
    parser.add_argument("--dtype", nargs="+", choices=("bf16", "fp32"), default=["bf16"])
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: all")


def run(arguments: argparse.Namespace, settings: Settings, progress: Any) -> Records:
    """Measure; one record per dtype."""
    left = len(arguments.dtype)
    for at, dtype in enumerate(arguments.dtype):
        cells = plan(arguments.shape, dtype, arguments.cases or CASES, arguments.device)
        measure(cells, settings, progress, 1 / (left - at), 1 / left)
        yield record_of(arguments.shape, dtype, cells)


def plan(shape: tuple[int, ...], dtype: str, cases: Iterable[str], device: str) -> list[Cell]:
    """What is to be measured."""
    rate = RATE[device, DTYPES[dtype].itemsize]
    return [
        Cell(
            f"losses {words(shape)} {dtype}", name, implementation, prepare,
            (name, implementation, dtype, shape, device),
            estimate=0.05 + 1.5 * CASES[name].products * math.prod(shape) / rate,
        )
        for name in cases
        for implementation in IMPLEMENTATIONS
    ]  # fmt: skip


def record_of(shape: tuple[int, ...], dtype: str, cells: list[Cell]) -> dict[str, Any]:
    """What a report keeps of a group."""
    return record(cells[0].group, shape, dtype, cells, {c.case: CASES[c.case].title for c in cells})


def _shape(text: str) -> tuple[int, ...]:
    """Responses, tokens, width and vocabulary: ``8x64x896x151936`` as numbers."""
    found = sizes(text, "RxTxDxV", "8x64x896x151936")
    if found[0] % 2:
        raise argparse.ArgumentTypeError(f"expected an even number of responses, got {text!r}")
    return found


SUITE = Suite(__doc__.splitlines()[0], CASES, add_arguments, run)
