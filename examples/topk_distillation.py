"""A student that learns from a teacher's 64 best ids per token, as `ift score --topk` stores them,
beside one that learns from the whole distributions of the teacher.

``python -m examples.topk_distillation --output distilled`` scores rows with a small random teacher,
trains both students on the same batches, and draws their losses: ``distilled/curves.png``. They end
within 2 % of each other because the 64 ids carry 96 % of that teacher's mass; of a flatter one,
``--spread 1``, most of the mass is elsewhere, and how it is shared out there is not learned.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from examples import toy
from ift import plotting
from ift.cli import main as ift_command
from ift.losses import Head, TopKDistillationLoss, distillation_loss
from ift.teacher_shards import TeacherCollator, TeacherDataset
from ift_kernels import linear_divergence

K, VOCABULARY, WIDTH, ROWS, HELD_OUT, BATCH = 64, 2048, 64, 96, 32, 16
WAYS = {"whole": "whole distributions", "topk": f"{K} best ids, from disk"}


def model(seed: int, spread: float = 0.0) -> Any:
    """A random Llama; `spread` is that of its logits, as of a trained one."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=None, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    made = LlamaForCausalLM(config).eval()
    if spread:
        made.lm_head.weight.data *= spread / (config.initializer_range * WIDTH**0.5)
    return made


def store(directory: Path, teacher: Any) -> TeacherDataset:
    """The teacher's best ids for rows of random words, by `ift score`."""
    draw = random.Random(0)
    texts = [" ".join(draw.choices(toy.WORDS, k=24)) for _ in range(ROWS)]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "rows.jsonl").write_text(rows, encoding="utf-8")
    teacher.save_pretrained(directory / "teacher")
    toy.tokenizer().save_pretrained(directory / "teacher")
    command = ["score", directory / "rows.jsonl", "--model", directory / "teacher", "--output",
               directory / "scores", "--topk", K, "--cpu"]  # fmt: skip
    assert ift_command([*map(str, command)]) == 0
    return TeacherDataset(directory / "scores", VOCABULARY)


def states(network: Any, batch: dict[str, Tensor]) -> Tensor:
    """Hidden states at the head."""
    hidden: Tensor = network.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    return hidden


@torch.no_grad()
def head(teacher: Any, batch: dict[str, Tensor]) -> Head:
    """What whole distributions take: the teacher beside the student in every step."""
    return Head(states(teacher, batch), teacher.lm_head.weight)


def train(
    way: str,
    teacher: Any,
    batches: list[dict[str, Tensor]],
    held_out: dict[str, Tensor],
    steps: int,
) -> list[float]:
    """A student's divergence from the teacher on the held-out rows, after each step."""
    student, loss, found = model(1), TopKDistillationLoss(), []
    weight = student.lm_head.weight
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    target = head(teacher, held_out)
    for step in range(steps):
        batch = batches[step % len(batches)]
        hidden = states(student, batch)
        if way == "topk":
            value = loss.from_hidden(
                hidden, weight, batch["target"], batch["teacher_ids"], batch["teacher_logprob"],
                teacher_tail_logprob=batch["teacher_tail_logprob"],
            )  # fmt: skip
        else:
            value = distillation_loss(hidden, weight, batch["target"], head(teacher, batch))
        value.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        with torch.no_grad():
            now = states(student, held_out)
            found.append(
                linear_divergence(now, weight, *target[:2], mask=held_out["target"] >= 0).item()
            )
    return found


def stored_mass(batch: dict[str, Tensor]) -> float:
    """The mean probability that the teacher's stored ids have together."""
    tail = batch["teacher_tail_logprob"][batch["target"] >= 0]
    return -tail.expm1().mean().item()


def entropy(teacher: Any, batch: dict[str, Tensor]) -> float:
    """Of the teacher's distributions: what a loss on soft targets has beside the divergence."""
    hidden, weight, *_ = head(teacher, batch)
    logp = (hidden[batch["target"] >= 0] @ weight.T).log_softmax(-1)
    return -(logp.exp() * logp).sum(-1).mean().item()


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train both students, draw, and return the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument(
        "--spread", type=float, default=4.0, help="of the teacher's logits (default: 4)"
    )
    parser.add_argument("--output", type=Path, default=Path("distilled"))
    given = parser.parse_args(arguments)
    teacher = model(0, spread=given.spread)
    data = store(given.output, teacher)
    collate = TeacherCollator(pad_id=0)
    held_out = collate([data[i] for i in range(ROWS - HELD_OUT, ROWS)])
    batches = list(
        DataLoader(torch.utils.data.Subset(data, range(ROWS - HELD_OUT)), BATCH, collate_fn=collate)
    )
    curves = {way: train(way, teacher, batches, held_out, given.steps) for way in WAYS}
    # float32 and int32, as stored, against all log-probabilities in 16 bits
    report: dict[str, Any] = {
        "divergence": curves,
        "entropy": entropy(teacher, held_out),
        "stored_mass": stored_mass(held_out),
        "bytes_per_token": {"whole": 2 * VOCABULARY, "topk": 8 * K + 4},
    }
    report["loss"] = {way: report["entropy"] + curve[-1] for way, curve in curves.items()}
    print(f"the teacher's {K} best ids have {report['stored_mass']:.1%} of its mass")
    for way, name in WAYS.items():
        print(
            f"{name}: loss {report['loss'][way]:.4f}, divergence {curves[way][-1]:.4f}, "
            f"{report['bytes_per_token'][way]} bytes per token"
        )
    if plotting.available():
        draw(report, given.output / "curves.png")
    return report


def draw(report: dict[str, Any], path: Path) -> None:
    """Write the PNG."""
    colors = {"whole": "#9CCBE5", "topk": plotting.ORANGE}
    with plotting.picture(path, 1, 2, width=9.0, height=3.3) as (figure, (losses, sizes)):
        figure.suptitle(
            f"Distillation on random words, {VOCABULARY} tokens; the {K} ids have "
            f"{report['stored_mass']:.1%} of the teacher's mass"
        )
        for way, curve in report["divergence"].items():
            wide = {"linewidth": 5 if way == "whole" else 1.4, "color": colors[way]}
            steps = range(1, len(curve) + 1)
            losses.plot(steps, [report["entropy"] + v for v in curve], label=WAYS[way], **wide)
        losses.axhline(
            report["entropy"], color="#888888", linestyle=":", label="the teacher's entropy"
        )
        losses.set(title="held-out loss on the teacher's distributions", xlabel="step")
        losses.legend()
        names = [WAYS[way] for way in WAYS]
        values = [report["bytes_per_token"][way] for way in WAYS]
        plotting.bars(sizes, names, values, "{:,}", [colors[way] for way in WAYS])
        sizes.set(title="bytes per token of the teacher on disk")


if __name__ == "__main__":
    main()
