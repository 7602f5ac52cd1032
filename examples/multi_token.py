"""A small Llama that also predicts the tokens after the next one, as DeepSeek-V3 does.

``python -m examples.multi_token --output ahead`` trains it on docstrings of the standard library
twice from the same weights, with the logits of every depth and without, and draws losses, memory
and how often a further token is predicted as the model itself predicts it later:
``ahead/curves.png``. Rows are packed; no depth looks or predicts across the end of a document.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import create_causal_mask
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm

from examples import docstrings
from examples.head_memory import head_peak_bytes
from ift import plotting, tiny
from ift.losses import MultiTokenLoss, multi_token_targets

LENGTH, BATCH, HELD_OUT = 128, 8, 32
WORKSPACE = 4 << 20  # bytes
WAYS = ("naive", "fused")
Batch = tuple[Tensor, Tensor]  # input ids and position ids, (B, T)


class NextDepth(nn.Module):
    """One MTP module: states that predict a token further than the states that it gets.

    DeepSeek-V3, arXiv 2412.19437, eq. 21 to 23; the halves of the projection's input are in the
    order of the released weights, and of `transformers.modeling_layers.MtpLayer`.
    """

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.embedding_norm = LlamaRMSNorm(width, eps)
        self.hidden_norm = LlamaRMSNorm(width, eps)
        self.projection = nn.Linear(2 * width, width, bias=False)
        self.layer = LlamaDecoderLayer(config, layer_idx=0)
        self.norm = LlamaRMSNorm(width, eps)

    def forward(self, hidden: Tensor, embedded: Tensor, **attention: Any) -> Tensor:
        """(B, T, D) of the depth before, and of the embeddings of the token that it predicts."""
        both = torch.cat([self.embedding_norm(embedded), self.hidden_norm(hidden)], -1)
        result: Tensor = self.norm(self.layer(self.projection(both), **attention))
        return result


class States(nn.Module):
    """Hidden states of every depth, (K, B, T, D): the model's own, then those of its modules."""

    def __init__(self, model: Any, depths: int) -> None:
        super().__init__()
        self.model = model  # a LlamaModel, without head
        self.further = nn.ModuleList(NextDepth(model.config) for _ in range(depths - 1))

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        model = self.model
        trunk = model(input_ids=input_ids, position_ids=position_ids, use_cache=False)
        states = [trunk.last_hidden_state]
        embedded = model.embed_tokens(input_ids)
        attention = {
            "attention_mask": create_causal_mask(
                config=model.config, inputs_embeds=embedded, attention_mask=None,
                past_key_values=None, position_ids=position_ids,
            ),
            "position_embeddings": model.rotary_emb(embedded, position_ids),
        }  # fmt: skip
        for module in self.further:
            # What is behind a document's end has no target, and causal attention hides it.
            embedded = F.pad(embedded[:, 1:], (0, 0, 0, 1))
            states.append(module(states[-1], embedded, **attention))
        return torch.stack(states)


class MultiTokenLlama(nn.Module):
    """A causal LM with MTP modules that share its embedding and its head.

    The loss is computed inside of forward: there FSDP2 has gathered the weight of the head.
    """

    def __init__(self, causal_lm: Any, depths: int, loss: MultiTokenLoss) -> None:
        super().__init__()
        self.states = States(causal_lm.model, depths)
        self.head = causal_lm.lm_head
        self.depths, self.loss = depths, loss

    def forward(self, input_ids: Tensor, position_ids: Tensor, way: str = "fused") -> Tensor:
        """The loss of a packed batch."""
        target = multi_token_targets(input_ids, self.depths, position_ids=position_ids)
        hidden = self.states(input_ids, position_ids)
        if way == "fused":
            # The default workspace would hold all logits of a model as small as this one.
            weight = self.head.weight
            return self.loss.from_hidden(hidden, weight, target, workspace=WORKSPACE)
        each = [
            F.cross_entropy(self.head(states).flatten(0, 1), ids.flatten(), reduction="none")
            for states, ids in zip(hidden, target, strict=True)
        ]
        return self.loss(-torch.stack(each).view(target.shape), target != -100)


def packed_rows(documents: list[list[int]]) -> Batch:
    """Rows of LENGTH tokens, documents one behind the other, positions from 0 in each."""
    ids = torch.tensor([token for document in documents for token in document])
    position = torch.cat([torch.arange(len(document)) for document in documents])
    whole = len(ids) // LENGTH * LENGTH
    return ids[:whole].view(-1, LENGTH), position[:whole].view(-1, LENGTH)


def text(files: int, vocabulary: int) -> tuple[Batch, Batch, int]:
    """Rows to train on and held-out rows of the docstrings of so many files, and the ids."""
    found = docstrings.stdlib_files()[:files]
    pairs = {}
    for path in found:
        try:
            source = path.read_text(encoding="utf-8")
            pairs |= dict(docstrings.pairs_of(source, docstrings.module_name(path)))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue
    texts = [prompt + answer for prompt, answer in pairs.items()]
    random.Random(0).shuffle(texts)
    tokenizer = tiny.train_tokenizer(texts, vocabulary)
    documents = [[*ids, tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
    ids, position = packed_rows(documents)
    held = min(HELD_OUT, len(ids) // 4)
    return (ids[held:], position[held:]), (ids[:held], position[:held]), len(tokenizer)


def model(vocabulary: int, depths: int) -> MultiTokenLlama:
    """The same random weights at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=1024,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return MultiTokenLlama(LlamaForCausalLM(config), depths, MultiTokenLoss(depth_weights=0.3))


def compare(network: MultiTokenLlama, batch: Batch) -> dict[str, float]:
    """How much the ways differ: of the loss, and at most of a gradient, both relative."""
    values, gradients = [], []
    for way in WAYS:
        value = network(*batch, way)
        gradients.append(torch.autograd.grad(value, [*network.parameters()]))
        values.append(value.item())
    worst = max(
        ((a - b).abs().max() / a.abs().max()).item() for a, b in zip(*gradients, strict=True)
    )
    return {"loss": abs(values[0] - values[1]) / values[0], "gradient": worst}


def train(
    way: str, network: MultiTokenLlama, rows: Batch, held_out: Batch, steps: int
) -> dict[str, Any]:
    """Losses of the steps by depth, held-out metrics of the fused way, and the peak of the head."""
    order = torch.randperm(len(rows[0]), generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    curves: dict[str, Any] = {"loss": [], "depths": [], "held_out": []}

    def batch(step: int) -> Batch:
        some = order[torch.arange(step * BATCH, (step + 1) * BATCH) % len(order)]
        return rows[0][some], rows[1][some]

    for step in tqdm(range(steps), desc=way, disable=None):
        loss = network(*batch(step), way)
        metrics = network.loss.metrics
        curves["loss"].append(loss.item())
        curves["depths"].append(
            [metrics[f"cross_entropy_{k}"].item() for k in range(network.depths)]
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if way == "fused" and (step + 1) % max(1, steps // 8) == 0:
            with torch.no_grad():
                network(*held_out)
            found = {name: value.item() for name, value in network.loss.metrics.items()}
            curves["held_out"].append({"step": step + 1, **found})
    peak = head_peak_bytes(network.states, lambda: network(*batch(0), way))
    return curves | {"head_mib": peak / 2**20}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train both ways, draw, and return the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--depths", type=int, default=3, help="the next token included")
    parser.add_argument("--files", type=int, default=300, help="of the standard library")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--output", type=Path, default=Path("ahead"))
    given = parser.parse_args(arguments)
    rows, held_out, vocabulary = text(given.files, given.vocabulary)
    few = rows[0][:BATCH], rows[1][:BATCH]
    report: dict[str, Any] = {"difference": compare(model(vocabulary, given.depths), few)}
    for way in WAYS:
        network = model(vocabulary, given.depths)
        report[way] = train(way, network, rows, held_out, given.steps)
    report["difference_after"] = compare(network, few)
    for name in ("difference", "difference_after"):
        print(f"fused against naive: {report[name]}")
    last = report["fused"]["held_out"][-1]
    for way in WAYS:
        print(f"{way}: {report[way]['head_mib']:.1f} MiB at most in the head")
    for depth in range(given.depths):
        agrees = f", agrees with depth 0 {last[f'agreement_{depth}']:.1%}" if depth else ""
        print(
            f"depth {depth}: held-out cross-entropy {last[f'cross_entropy_{depth}']:.3f}, "
            f"right {last[f'token_accuracy_{depth}']:.1%}{agrees}"
        )
    if plotting.available():
        given.output.mkdir(parents=True, exist_ok=True)
        draw(report, given.output / "curves.png")
    return report


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the PNG."""
    depths = len(report["fused"]["depths"][0])
    with plotting.picture(path, 1, 3, width=11.0, height=3.3) as (figure, panels):
        losses, agreement, memory = panels
        figure.suptitle(f"{depths} tokens ahead on the standard library's docstrings")
        for depth, style in enumerate(plotting.styles(depths)):
            for way in WAYS:  # they coincide: a broad pale line with a thin one on it shows both
                pale = {"linewidth": 5, "alpha": 0.3} if way == "naive" else {"linewidth": 1.2}
                label = f"depth {depth}" if way == "fused" else None
                curve = [values[depth] for values in report[way]["depths"]]
                losses.plot(range(1, len(curve) + 1), curve, label=label, **style, **pale)
            held = report["fused"]["held_out"]
            if depth:
                plotting.draw(
                    agreement, held, f"agreement_{depth}", label=f"depth {depth}", **style
                )
        losses.set(title="cross-entropy (broad: naive, thin: fused)", xlabel="step")
        losses.legend()
        agreement.set(title="held out: predicts what depth 0 will", xlabel="step", ylim=(0, None))
        if depths > 1:
            agreement.legend()
        colors = ["#9CCBE5", plotting.BLUE]
        plotting.bars(memory, WAYS, [report[w]["head_mib"] for w in WAYS], "{:.1f}", colors)
        memory.set(title="peak memory of the head, MiB")


if __name__ == "__main__":
    main()
