"""Steps of a small model: SFT, IFT with its prompts run once, IFT in two full passes.

``python -m bench.shared_prompt --json FILE``. Forward and backward, without an optimizer; the three
take turns, so that a machine that slows down slows all of them. Gradients are compared, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import ift
from bench import clock
from bench.provenance import provenance

# Rows of (prompt, response) tokens: a response share of 1/3 in each.
BATCHES = {
    "even": [(256, 128)] * 4,
    "uneven, padded": [(256, 128), (200, 100), (240, 120), (176, 88)],
}
WAYS: dict[str, ift.IFTConfig | None] = {
    "sft": None,
    "ift shared": ift.IFTConfig(),
    "ift two passes": ift.IFTConfig(share_prompt=False),
}


def batch(rows: list[tuple[int, int]], vocabulary: int) -> dict[str, torch.Tensor]:
    """Random tokens, padded on the right."""
    width = max(map(sum, rows))
    ids = torch.randint(3, vocabulary, (len(rows), width))
    column, labels = torch.arange(width), ids.clone()
    mask = torch.stack([column < p + r for p, r in rows])
    for row, (prompt, _) in enumerate(rows):
        labels[row, :prompt] = -100
    return {
        "input_ids": ids.masked_fill(~mask, 0),
        "attention_mask": mask.long(),
        "labels": labels.masked_fill(~mask, -100),
    }


def measure(model: Any, inputs: dict[str, torch.Tensor], rounds: int) -> dict[str, Any]:
    """Seconds of a step each way, their ratios, and the difference of the gradients."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    gradients: dict[str, list[torch.Tensor]] = {}
    for number in range(rounds + 1):  # the first warms up
        for way, config in WAYS.items():
            model.zero_grad(set_to_none=True)
            start = clock.now()
            model(**inputs, ift=config).loss.backward()
            if number:
                seconds[way].append(clock.now() - start)
            else:
                gradients[way] = [p.grad for p in model.parameters() if p.grad is not None]
    pairs = zip(gradients["ift shared"], gradients["ift two passes"], strict=True)
    error = max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs)
    median = {way: statistics.median(values) for way, values in seconds.items()}
    return {
        "seconds": seconds,
        "shared_over_two_passes": median["ift shared"] / median["ift two passes"],
        "shared_over_sft": median["ift shared"] / median["sft"],
        "largest_relative_gradient_difference": error,
    }


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocabulary, hidden_size=options.hidden, num_hidden_layers=options.layers,
        intermediate_size=options.hidden * 8 // 3, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=512, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    model = ift.patch(LlamaForCausalLM(config).train())
    done: dict[str, Any] = {
        "provenance": provenance(torch.device("cpu"), torch.get_num_threads()),
        "options": {k: v for k, v in vars(options).items() if k != "json"},
        "batches": {},
    }
    for name, rows in BATCHES.items():
        result = measure(model, batch(rows, options.vocabulary), options.rounds)
        done["batches"][name] = {"rows": rows, **result}
        print(name, {k: round(v, 8) for k, v in result.items() if k != "seconds"})
    if options.json:
        options.json.write_text(json.dumps(done, indent=1) + "\n")
    return done


if __name__ == "__main__":
    main()
