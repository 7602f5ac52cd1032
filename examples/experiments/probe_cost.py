"""What measuring a probe set costs: 64 prompts × 7 types against one forward of the same tokens."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from examples.experiments.page import Page, main
from ift import tiny
from ift.dynamics import Probe, ProbeEvaluator
from ift.dynamics.responses import groups_of

V, WIDTH, LAYERS = 32000, 384, 4
TYPES = ("chosen", "rejected", "sample", "other_train", "unrelated", "permuted", "random_words")


def make(prompts: int) -> tuple[Any, ProbeEvaluator]:
    """A random Llama and probes of 24 to 48 tokens, with responses of 12 to 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    draw = random.Random(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=WIDTH, intermediate_size=1024, num_hidden_layers=LAYERS,
        num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=512,
    )  # fmt: skip
    tokenizer = tiny.train_tokenizer(["a b c d e f g h"], 300)

    def words(low: int, high: int) -> str:
        return "".join(draw.choice("abcdefgh") for _ in range(draw.randint(low, high)))

    probes = [Probe(words(24, 48), {t: words(12, 32) for t in TYPES}) for _ in range(prompts)]
    return LlamaForCausalLM(config).eval(), ProbeEvaluator(probes, tokenizer)


def median(call: Callable[[], Any], times: int) -> float:
    """Seconds of a call."""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def run(output: Path, quick: bool) -> None:
    """Write the page."""
    page = Page("probe_cost", "The cost of a probe set", output)
    model, evaluator = make(64 if not quick else 2)
    groups = groups_of(evaluator.responses)
    # The distinct tokens as plain causal rows, one group each: no mask, no padding, all logits.
    rows = [
        torch.tensor([[*group[0].prefix, *(t for r in group for t in r.ids[:-1])]])
        for group in groups
    ]

    @torch.no_grad()
    def forward() -> None:
        for row in rows:
            model(row, use_cache=False)

    evaluator(model)  # tokenises, checks the layout
    forward()
    times = 3 if not quick else 1
    ours, theirs = median(lambda: evaluator(model), times), median(forward, times)
    alone = sum(len(r.prefix) + len(r.ids) for r in evaluator.responses)
    page.text(
        "Setting",
        f"{len(groups)} prompts of 24 to 48 tokens, each with {len(TYPES)} responses of 12 to 32: "
        f"{evaluator.tokens} distinct tokens, prompts shared ({alone} as sequences of their own). "
        f"Llama, {LAYERS} layers, width {WIDTH}, V = {V}, random weights, float32. Compared with "
        "the same tokens as plain causal rows through the model, logits and all. "
        f"Median of {times}.",
    )
    page.text("Measured")
    forward_of = "one no-gradient forward of its distinct tokens"
    page.table(["", "seconds"], [["measuring the probe set", ours], [forward_of, theirs]])
    ratio = ours / theirs
    page.text(
        "Verdict",
        f"{ratio:.2f}× one forward; the aim is at most 1.2×: "
        f"{'met' if ratio <= 1.2 else 'not met'} on this machine.",
    )
    page.numbers |= {"probe_seconds": ours, "forward_seconds": theirs, "ratio": ratio,
                     "distinct_tokens": evaluator.tokens, "tokens_alone": alone}  # fmt: skip
    page.close()


if __name__ == "__main__":
    main(run, __doc__)
