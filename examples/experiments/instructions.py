"""IFT against SFT on instructions whose answers can be scored: exact match on held-out items."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ift
from examples.experiments.page import Page, error_of, main, shown
from ift import plotting

LETTERS, LENGTH, EOS, EQUALS = 8, 5, 8, 9
INSTRUCTIONS: dict[str, Callable[[list[int]], list[int]]] = {
    "copy": list,
    "reverse": lambda s: s[::-1],
    "rotate": lambda s: s[1:] + s[:1],
    "swap neighbours": lambda s: [s[1], s[0], s[3], s[2], s[4]],
}
VOCABULARY = EQUALS + 1 + len(INSTRUCTIONS)
BATCH, LR, HELD_OUT = 32, 1e-3, 256
METHODS: dict[str, ift.IFTConfig | None] = {"SFT": None, "IFT": ift.IFTConfig()}


def items(names: list[str], count: int, draw: random.Random) -> Tensor:
    """Different sequences: instruction, letters, =, answer, end."""
    made: dict[tuple[int, ...], list[int]] = {}
    order = list(INSTRUCTIONS)
    while len(made) < count:
        name = draw.choice(names)
        letters = [draw.randrange(LETTERS) for _ in range(LENGTH)]
        prompt = [EQUALS + 1 + order.index(name), *letters, EQUALS]
        made[tuple(prompt)] = [*prompt, *INSTRUCTIONS[name](letters), EOS]
    return torch.tensor(list(made.values()))


def model_of(seed: int) -> Any:
    """A Llama of 0.1 M parameters, patched."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=32,
        tie_word_embeddings=True, pad_token_id=EOS, eos_token_id=EOS, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    return ift.patch(LlamaForCausalLM(config))


def fit(
    model: Any,
    data: Tensor,
    steps: int,
    config: ift.IFTConfig | None,
    seed: int,
    each: Callable[[int], None] = lambda step: None,
) -> None:
    """AdamW over random batches; `each` is called after every step."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    g = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        ids = data[torch.randint(len(data), (BATCH,), generator=g)]
        labels = ids.clone()
        labels[:, : LENGTH + 2] = -100
        own = {} if config is None else {"ift": config}
        loss = model(input_ids=ids, labels=labels, **own).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        each(step)


@torch.no_grad()
def exact_match(model: Any, data: Tensor) -> float:
    """Share of items whose whole greedy answer, end token and all, is right."""
    model.eval()
    ids = data[:, : LENGTH + 2]
    for _ in range(LENGTH + 1):
        logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    model.train()
    return (ids == data).all(1).double().mean().item()


def run(output: Path, quick: bool) -> None:
    """Write the page."""
    page = Page("instructions", "IFT and SFT on instructions, exact match", output)
    seeds, base_steps, steps, every, size = (2, 2, 4, 2, 64) if quick else (5, 200, 400, 50, 1024)
    curves: dict[str, list[list[dict[str, float]]]] = {name: [] for name in METHODS}
    for seed in range(seeds):
        draw = random.Random(seed)
        everything = items(list(INSTRUCTIONS), size + HELD_OUT, draw)
        data, test = everything[:size], everything[size:]
        base = model_of(seed)
        fit(base, items(["copy"], size, draw), base_steps, None, seed)
        for name, config in METHODS.items():
            model = copy.deepcopy(base)
            curve = [{"step": 0.0, "match": exact_match(model, test)}]

            def measure(step: int, m: Any = model, c: Any = curve, t: Any = test) -> None:
                if step % every == 0:
                    c.append({"step": float(step), "match": exact_match(m, t)})

            fit(model, data, steps, config, seed, measure)
            curves[name].append(curve)
            print(f"seed {seed}, {name}: {curve[-1]['match']:.3f}", flush=True)
    page.text(
        "Setting",
        f"Four instructions ({', '.join(INSTRUCTIONS)}) on {LENGTH} of {LETTERS} letters; {size} "
        f"training items, {HELD_OUT} others held out. Llama, 2 layers, width 64, first trained "
        f"{base_steps} steps on copying alone; then {steps} steps of {BATCH} items by each method, "
        f"from the same weights and in the same order, AdamW {LR:g}. IFT: λ = 0.2, γ = 0.95. "
        f"Greedy generation, the whole answer must be right; {seeds} seeds.",
    )
    page.text(
        "Expected",
        "The IFT paper reports better generation than SFT at the size of 7B on instruction data; "
        "it has no experiment of this size, so there is no figure to reproduce.",
    )
    last = {n: torch.tensor([c[-1]["match"] for c in each]) for n, each in curves.items()}
    middle = {
        n: torch.tensor([c[len(c) // 2]["match"] for c in each]) for n, each in curves.items()
    }
    page.text("Measured", "Exact match in %, mean ± standard error over the seeds.")
    page.table(["method", f"step {steps // 2}", f"step {steps}", "less SFT, paired by seed"],
               [[n, shown(middle[n], ".1f", 100), shown(v, ".1f", 100),
                 shown(v - last["SFT"], "+.1f", 100) if n != "SFT" else ""]
                for n, v in last.items()])  # fmt: skip
    about = "exact match over the steps, with standard errors"
    with page.picture("curves.png", about, 1, 1, width=6, height=3.8) as (_, axis):
        colors = (plotting.BLUE, plotting.ORANGE)
        for (name, each), color in zip(curves.items(), colors, strict=True):
            steps_ = [r["step"] for r in each[0]]
            value = torch.tensor([[100 * r["match"] for r in c] for c in each])
            axis.errorbar(steps_, value.mean(0), error_of(value), label=name, color=color,
                          capsize=2)  # fmt: skip
        axis.set(title="exact match on held-out items", xlabel="step", ylabel="%")
        axis.legend()
    gap = last["IFT"] - last["SFT"]
    clear = gap.mean().abs() > 2 * error_of(gap)
    way = "above" if gap.mean() > 0 else "below"
    verdict = f"IFT ends {way} SFT, by {'more' if clear else 'less'} than two standard errors."
    page.text("Verdict", verdict + " A task of copying, not of language: it says nothing "
              "about large models.")  # fmt: skip
    page.numbers["curves"] = curves
    page.close()


if __name__ == "__main__":
    main(run, __doc__)
