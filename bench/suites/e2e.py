"""Whole training steps of small real architectures.

Forward, backward and AdamW of a model with random weights, on rows whose first half is prompt: SFT,
DPO with its reference in the step, and IFT, each as people write it and through `ift.patch`. The
IFT written out is the released algorithm (`bench.peers.naive_ift`). Everything but the vocabulary
is far smaller than in the real models, so the head weighs more here than there.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

import ift
from bench.harness.data import Wrong
from bench.harness.measure import (
    Cell,
    Records,
    Settings,
    Subject,
    Suite,
    by_name,
    measure,
    peak_bytes,
    record,
)
from bench.harness.worker import Failed
from bench.peers import naive_ift
from bench.suites.grid import DTYPES, RATE
from ift import losses
from ift.one_pass import target_logprobs

IMPLEMENTATIONS = ("ours", "two-passes", "naive")
PROMPT = 0.5  # share of a row
# Largest relative deviation in float32 of loss and gradient from the step as people write it.
APART = 2e-3
GIB = 2**30

# Name → class of configuration, what makes the architecture itself, and the real vocabulary.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], int]] = {
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}, 151936),
    "llama": ("LlamaConfig", {}, 128256),
    "mistral": ("MistralConfig", {}, 32000),
    "gemma2": (  # logits are capped
        "Gemma2Config", {"head_dim": 64, "query_pre_attn_scalar": 64}, 256000,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A loss, and what it costs."""

    name: str
    title: str
    products: int  # of tokens · V · D multiply-adds, naive
    reference: bool = False


CASES: dict[str, Case] = by_name(
    Case("sft", "SFT", 3),
    Case("dpo", "DPO, reference in the step", 4, reference=True),
    Case("ift", "IFT, both passes", 4),
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """A model and a batch."""

    architecture: str
    rows: int
    length: int
    hidden: int
    layers: int
    vocabulary: int | None
    dtype: str
    device: str
    packed: bool = False  # ours gets all rows in one, as documents

    @property
    def vocabulary_size(self) -> int:
        """Size of the vocabulary: that of the real models where none is asked for."""
        return self.vocabulary or ARCHITECTURES[self.architecture][2]

    @property
    def name(self) -> str:
        size = f"{self.layers}x{self.hidden} V={self.vocabulary_size}"
        tokens = f"{self.rows}x{self.length} {'packed ' * self.packed}tokens"
        return f"{self.architecture} {size}, {tokens}, {self.dtype}"


# --- in the workers -------------------------------------------------------------------------------


def make_model(setting: Setting) -> Any:
    """A new model with random weights, in training mode; heads of 64, an MLP of 8/3 the width."""
    config_class, special, _ = ARCHITECTURES[setting.architecture]
    heads = max(setting.hidden // 64, 1)
    config = getattr(transformers, config_class)(
        vocab_size=setting.vocabulary_size, hidden_size=setting.hidden,
        intermediate_size=setting.hidden * 8 // 3 // 32 * 32, num_hidden_layers=setting.layers,
        num_attention_heads=heads, num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
        max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        attn_implementation=attention(setting), use_cache=False, **special,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return model.to(setting.device, DTYPES[setting.dtype]).train()


def attention(setting: Setting) -> str:
    """Packed rows in 16 bits take flash-attn on a GPU: a mask of all pairs would be too large."""
    if setting.packed and setting.device != "cpu" and setting.dtype != "fp32":
        return "flash_attention_2"
    return "eager" if setting.architecture == "gemma2" else "sdpa"


Batch = dict[str, Tensor]
Step = Callable[[Any, Any, Any, Batch], Tensor]  # model, reference, frozen embedding, batch → loss


def batch(setting: Setting, rows: int) -> Batch:
    """Random tokens; the prompt has no labels."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, setting.vocabulary_size, (rows, setting.length), generator=generator)
    labels = ids.clone()
    labels[:, : int(PROMPT * setting.length)] = -100
    found = {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}
    return {name: value.to(setting.device) for name, value in found.items()}


def pack(given: Batch) -> Batch:
    """The rows of a batch as documents of one."""
    ids = given["input_ids"]
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    rows = {"input_ids": ids, "labels": given["labels"], "position_ids": positions}
    return {name: value.reshape(1, -1) for name, value in rows.items()}


def _naive_dpo(model: Any, reference: Any, given: Batch) -> Tensor:
    def summed(one: Any) -> Tensor:
        logits = one(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits
        logprob, _ = naive_ift.naive_logprob(logits, given["labels"])
        return logprob.sum(-1)

    with torch.no_grad():
        theirs = summed(reference)
    chosen, rejected = (summed(model) - theirs).chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def _our_dpo(model: Any, reference: Any, given: Batch) -> Tensor:
    with torch.no_grad():
        logprob, mask = target_logprobs(reference, **given)
    sums = (logprob * mask).sum(-1)
    return model(**given, loss=functools.partial(losses.dpo_loss, reference=sums)).loss


STEPS: dict[tuple[str, str], Step] = {
    ("sft", "naive"): lambda model, _, frozen, given: naive_ift.naive_sft_loss(model, **given),
    ("sft", "ours"): lambda model, _, frozen, given: model(**given, loss=losses.sft_loss).loss,
    ("dpo", "naive"): lambda model, reference, _, given: _naive_dpo(model, reference, given),
    ("dpo", "ours"): lambda model, reference, _, given: _our_dpo(model, reference, given),
    ("ift", "naive"): lambda model, _, frozen, given: naive_ift.naive_ift_loss(
        model, **given, embedding=frozen
    ),
    ("ift", "ours"): lambda model, _, frozen, given: model(**given, ift=ift.IFTConfig()).loss,
    ("ift", "two-passes"): lambda model, _, frozen, given: (
        model(**given, ift=ift.IFTConfig(share_prompt=False)).loss
    ),
}


class Trainer:
    """A model, what its loss needs beside it, and the optimizer."""

    def __init__(self, setting: Setting, case: Case, implementation: str) -> None:
        self.model = make_model(setting)
        self.reference = copy.deepcopy(self.model).requires_grad_(False) if case.reference else None
        self.frozen = None
        if implementation != "naive":
            for model in (self.model, self.reference):
                if model is not None:
                    ift.patch(model)
        elif case.name == "ift":
            self.frozen = naive_ift.frozen_embedding(self.model)
        step = STEPS[case.name, implementation]
        packed = setting.packed and implementation != "naive"
        self.loss = (lambda *one: step(*one[:-1], pack(one[-1]))) if packed else step
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def step(self, given: Batch) -> Tensor:
        """One training step; the loss before it."""
        loss = self.loss(self.model, self.reference, self.frozen, given)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.frozen is not None:
            naive_ift.refresh(self.frozen, self.model)
        return loss.detach()


def prepare(setting: Setting, name: str, implementation: str) -> Subject:
    """A training step, ready to be measured; ours is checked against the one people write."""
    case = CASES[name]
    trainer = Trainer(setting, case, implementation)
    given = batch(setting, setting.rows)
    # The optimizer's state is there before a step is looked at.
    few = {name: value[:, -8:] for name, value in batch(setting, 2).items()}

    def check(loss: Tensor) -> dict[str, float]:
        if not bool(loss.isfinite()):
            raise Wrong("loss: not finite")
        return {} if implementation == "naive" else deviation(setting, case, implementation)

    return Subject(
        functools.partial(trainer.step, given), functools.partial(trainer.step, few), check,
        torch.device(setting.device),
    )  # fmt: skip


def deviation(setting: Setting, case: Case, ours: str = "ours") -> dict[str, float]:
    """Loss and gradients of ours against the step people write, in float32, on a few tokens.

    Raises:
        Wrong: they differ by more than rounding.
    """
    small = replace(setting, dtype="fp32", length=min(setting.length, 32))
    given = batch(small, 2)
    found = []
    for implementation in (ours, "naive"):
        trainer = Trainer(small, case, implementation)
        if trainer.reference is not None:  # else both log-ratios are 0
            with torch.no_grad():
                for parameter in trainer.reference.parameters():
                    parameter.mul_(1.01)
        loss = trainer.loss(trainer.model, trainer.reference, trainer.frozen, given)
        loss.backward()
        found.append((loss.detach(), [
            torch.zeros_like(p) if p.grad is None else p.grad for p in trainer.model.parameters()
        ]))  # fmt: skip
    (mine, my_grads), (theirs, their_grads) = found
    off = sum(float((a - b).square().sum()) for a, b in zip(my_grads, their_grads, strict=True))
    size = sum(float(b.square().sum()) for b in their_grads)
    errors = {"loss": float((mine - theirs).abs() / theirs.abs()), "gradient": (off / size) ** 0.5}
    for what, error in errors.items():
        if not error <= APART:
            raise Wrong(f"{what}: {error:.2g} from the step as people write it")
    return errors


# --- in the command -------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this suite."""
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES,
                        default=["qwen2"])  # fmt: skip
    parser.add_argument("--rows", type=int, default=4, help="rows of a batch, even (4)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row (256)")
    parser.add_argument("--hidden", type=int, default=256, help="width, a multiple of 64 (256)")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, help="default: that of the real models")
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32"])
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: all")
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS,
                        default=list(IMPLEMENTATIONS))  # fmt: skip
    parser.add_argument("--memory", type=float, metavar="GIB",
                        help="also find the most rows whose step fits this")  # fmt: skip
    parser.add_argument("--most", type=int, default=64, help="rows that are tried for it, at most")


def run(arguments: argparse.Namespace, settings: Settings, progress: Any) -> Records:
    """Measure; one record per architecture and dtype."""
    if arguments.rows < 2 or arguments.rows % 2:
        raise SystemExit(f"python -m bench e2e: --rows: expected an even number of at least 2, got "
                         f"{arguments.rows}")  # fmt: skip
    if arguments.hidden < 64 or arguments.hidden % 64 or arguments.length < 8:
        raise SystemExit(
            "python -m bench e2e: expected --hidden a multiple of 64 and --length of at least 8, "
            f"got {arguments.hidden} and {arguments.length}"
        )
    pairs = [(a, dtype) for a in arguments.architectures for dtype in arguments.dtype]
    cases = [CASES[name] for name in arguments.cases or CASES]
    for done, (architecture, dtype) in enumerate(pairs):
        setting = Setting(
            architecture, arguments.rows, arguments.length, arguments.hidden, arguments.layers,
            arguments.vocabulary, dtype, arguments.device,
        )  # fmt: skip
        cells = plan(setting, cases, arguments.implementations)
        left = len(pairs) - done
        measure(cells, settings, progress, (0.6 if arguments.memory else 1) / left, 1 / len(pairs))
        found = record_of(setting, cells) | {"memory": arguments.memory}
        for cell, kept in zip(cells, found["cells"], strict=True):
            if kept["seconds"]:
                kept["tokens_per_second"] = found["tokens"] / kept["seconds"]
            if arguments.memory and not cell.reason:
                progress.at(f"most rows of {cell.case}, {cell.implementation}")
                kept["largest"] = largest(
                    functools.partial(_with_rows, *cell.arguments),
                    int(arguments.memory * GIB), settings, most=arguments.most,
                )  # fmt: skip
        yield found


def largest(
    arguments: Callable[[int], tuple[Any, ...]], memory: int, settings: Settings, *,
    most: int, least: int = 2,
) -> dict[str, Any]:  # fmt: skip
    """The most rows, even, whose call takes at most `memory` bytes over its inputs.

    Rows double until a call no longer fits; then the gap is halved. Every count is a call that was
    made, none is extrapolated.

    Args:
        arguments: of `prepare`, for a number of rows.
        most: rows at which to stop though more would fit.

    Returns:
        ``rows`` (0: not even `least`), ``capped`` (more than `most` might fit), ``tried`` (rows →
        bytes, or the reason why there are none) and ``bytes``, the limit.
    """
    tried: dict[int, int | str] = {}

    def fits(rows: int) -> bool:
        try:
            found = peak_bytes(prepare, arguments(rows), settings)
        except Failed as failure:
            tried[rows] = str(failure)
            return False
        tried[rows] = found
        return found <= memory

    good, bad = 0, least
    while bad <= most and fits(bad):
        good, bad = bad, min(2 * bad, most) if bad < most else most + 2
    while bad <= most and bad - good > 2:
        middle = (good + bad) // 4 * 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return {"rows": good, "capped": good == most, "bytes": memory,
            "tried": {str(rows): value for rows, value in sorted(tried.items())}}  # fmt: skip


def _with_rows(setting: Setting, case: str, implementation: str, rows: int) -> tuple[Any, ...]:
    return replace(setting, rows=rows), case, implementation


def plan(setting: Setting, cases: Iterable[Case], implementations: Iterable[str]) -> list[Cell]:
    """What is to be measured."""
    tokens = setting.rows * setting.length
    rate = RATE[torch.device(setting.device).type, DTYPES[setting.dtype].itemsize]
    work = tokens * setting.vocabulary_size * setting.hidden / rate
    return [
        Cell(
            setting.name, case.name, name, prepare, (setting, case.name, name),
            estimate=0.2 + 2 * case.products * work,
        )
        for case in cases
        for name in implementations if (case.name, name) in STEPS
    ]  # fmt: skip


def record_of(setting: Setting, cells: list[Cell]) -> dict[str, Any]:
    """What a report keeps of a group."""
    return record(
        setting.name, [setting.rows, setting.length, setting.hidden], setting.dtype, cells,
        {cell.case: CASES[cell.case].title for cell in cells},
        tokens=setting.rows * setting.length,
    )  # fmt: skip


SUITE = Suite(__doc__.splitlines()[0], CASES, add_arguments, run)
