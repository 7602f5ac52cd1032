"""How far a trainer's log-probabilities are from those of the sampler that drew the tokens.

``python -m examples.sampler_match`` lets transformers generate from a small random model in bf16,
greedy, at a temperature, and within top-k and top-p, and scores the tokens with `linear_logprobs`.
Sampler and trainer each round their logits to bf16, or have them in fp32. The trainer has the
sampler's hidden states ("head") or its own forward of the whole sequence ("whole model"), whose
trunk rounds otherwise than that of a sampler with a cache.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ift import plotting
from ift.text import number, table
from ift_kernels import linear_logprobs

VOCABULARY, PROMPT = 4096, 8
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "temperature 0.7": {"do_sample": True, "temperature": 0.7, "top_k": 0},
    "top-k 50": {"do_sample": True, "temperature": 1.0, "top_k": 50},
    "top-p 0.9": {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 0.9},
}
HEADS = {"bf16": None, "fp32": torch.float32}  # logits, and `logits_dtype` of them
QUANTILES = (0.5, 0.99, 1.0)


def model(seed: int = 0) -> Any:
    """A random Llama in bf16 whose logits have the spread of a trained one's."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=None, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    made.lm_head.weight.data *= 3 / (0.02 * config.hidden_size**0.5)
    return made.to(torch.bfloat16)


@contextmanager
def head_of(sampler: Any, logits: str) -> Iterator[list[Tensor]]:
    """The sampler's head with bf16 or fp32 logits; what it reads, a tensor for each step."""
    read: list[Tensor] = []

    def call(head: Any, arguments: tuple[Tensor], output: Tensor) -> Tensor:
        read.append(arguments[0][:, -1])
        if logits == "bf16":
            return output
        return torch.nn.functional.linear(arguments[0].float(), head.weight.float())

    handle = sampler.lm_head.register_forward_hook(call)
    try:
        yield read
    finally:
        handle.remove()


@torch.no_grad()
def differences(sampler: Any, way: str, logits: str, rows: int, tokens: int) -> Iterator[Any]:
    """((trainer's logits, what is compared), differences of all tokens), and their truncation.

    What the sampler reports are the logits that it drew from, before top-k and top-p, at its
    temperature. Its scores are over the truncated support: "truncated" is how much larger they are.
    """
    g = torch.Generator().manual_seed(1)
    prompts = torch.randint(1, VOCABULARY, (rows, PROMPT), generator=g)
    torch.manual_seed(2)
    with head_of(sampler, logits) as read:
        found = sampler.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=tokens,
            min_new_tokens=tokens, return_dict_in_generate=True, output_logits=True,
            output_scores=True, **WAYS[way],
        )  # fmt: skip
    target, temperature = found.sequences[:, PROMPT:], WAYS[way].get("temperature", 1.0)
    reported = _chosen(torch.stack(found.logits, 1).float() / temperature, target)
    scores = _chosen(torch.stack(found.scores, 1).float(), target)
    hidden = sampler.model(found.sequences).last_hidden_state[:, PROMPT - 1 : -1]
    for compared, states in (("head", torch.stack(read, 1)), ("whole model", hidden)):
        for name, dtype in HEADS.items():
            ours = linear_logprobs(
                states, sampler.lm_head.weight, target, temperature=temperature, logits_dtype=dtype
            ).logprob
            yield (name, compared), (ours - reported).flatten()
    yield "truncated", (scores - reported).flatten()


def _chosen(logits: Tensor, target: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, target[..., None])[..., 0]


def measure(rows: int = 32, tokens: int = 64) -> dict[str, Any]:
    """Quantiles and histograms of |difference| for every way, and both logits of both sides."""
    sampler, found = model(), []
    for way in WAYS:
        for logits in HEADS:
            for what, values in differences(sampler, way, logits, rows, tokens):
                if what == "truncated":
                    line = {"compared": "truncated", "trainer": None, "mean": float(values.mean())}
                else:
                    line = {"compared": what[1], "trainer": what[0]}
                sizes = values.abs().double()
                found.append(line | {
                    "way": way, "sampler": logits,
                    "quantiles": [float(f"{sizes.quantile(q):.3g}") for q in QUANTILES],
                    "histogram": _histogram(sizes),
                })  # fmt: skip
    return {"tokens": rows * tokens, "vocabulary": VOCABULARY, "differences": found}


EDGES = [10.0 ** (at / 4) for at in range(-32, 1)]  # from 1e-8 to 1


def _histogram(sizes: Tensor) -> list[int]:
    """Counts between `EDGES`; what is smaller than all is in the first."""
    inside = sizes.clamp(EDGES[0] * 1.01, EDGES[-1] * 0.99)
    return torch.histogram(inside, torch.tensor(EDGES, dtype=torch.float64)).hist.int().tolist()


def rows_of(report: dict[str, Any], compared: str) -> list[list[str]]:
    """A row for each way and each pair of logits: median, 99th percentile, largest."""
    return [
        [f"{line['way']}", line["sampler"], line["trainer"], *map(number, line["quantiles"])]
        for line in report["differences"]
        if line["compared"] == compared
    ]


HEAD = ["tokens drawn", "sampler's logits", "trainer's logits", "median", "99 %", "largest"]


def draw(report: dict[str, Any], path: str | Path) -> None:
    """Distributions of the difference, all ways together."""
    pairs = [(s, t) for s in HEADS for t in HEADS]
    with plotting.picture(path, 1, 2, width=9.0, height=3.2) as (figure, panels):
        figure.suptitle("Difference of a trainer's log-probability to the sampler's")
        for axes, compared in zip(panels, ("head", "whole model"), strict=True):
            for s, t in pairs:
                style = {"color": plotting.ORANGE if t == "bf16" else plotting.BLUE,
                         "linestyle": "-" if s == "bf16" else "--"}  # fmt: skip
                some = [
                    line["histogram"]
                    for line in report["differences"]
                    if (line["compared"], line["sampler"], line["trainer"]) == (compared, s, t)
                ]
                counts = [sum(column) for column in zip(*some, strict=True)]
                share = [count / sum(counts) for count in counts]
                axes.stairs(share, EDGES, label=f"sampler {s}, trainer {t}", **style)
            titles = {"head": "same hidden states", "whole model": "each its own forward"}
            axes.set(title=titles[compared], xscale="log", xlabel="|difference|", ylim=(0, None))
        panels[0].set_ylabel("share of tokens")
        panels[1].legend(loc="upper left", fontsize=7)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text!r}")
    return int(text)


def _file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in a folder that exists, got {text!r}")
    return path


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Print the tables; with --json and --plot write them, too."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=_count, metavar="N", default=32)
    parser.add_argument("--tokens", type=_count, metavar="N", default=64)
    parser.add_argument("--json", type=_file, metavar="FILE")
    parser.add_argument("--plot", type=_file, metavar="FILE")
    options = parser.parse_args(arguments)
    report = measure(options.rows, options.tokens)
    for compared in ("head", "whole model"):
        print(f"\n{compared}")
        print(table([HEAD, *rows_of(report, compared)]))
    if options.json:
        text = json.dumps(report, indent=1, ensure_ascii=False)
        options.json.write_text(text + "\n", encoding="utf-8")
    if options.plot:
        draw(report, options.plot)
    return report


if __name__ == "__main__":
    main()
