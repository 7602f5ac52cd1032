"""Four trainings of a small model on the docstrings of the standard library, side by side.

``python -m examples.demo`` from the root of the checkout, or ``make demo``.  Naive and fused SFT,
naive and fused IFT start from the same weights and see the same batches; a table and a picture
compare losses, speed and the memory of the output head.  Naive SFT is the model's own loss over
full logits; naive IFT is the plain port of the released algorithm in ``bench/peers/naive_ift.py``.
At a few steps of each fused training, loss and gradients are computed in both ways from its
weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import ift
from bench.peers.naive_ift import frozen_embedding, naive_ift_loss, refresh
from examples import picture
from examples.corpus import Corpus
from examples.head_memory import head_peak_bytes
from ift import tiny

WAYS = ("naive SFT", "fused SFT", "naive IFT", "fused IFT")
Batch = dict[str, Tensor]


@dataclass
class Difference:
    """Naive against fused, from the same weights on the same batch."""

    step: int
    loss: float  # absolute
    gradient: float  # of a parameter, over its largest entry; the worst
    parameter: str  # which one


@dataclass
class Result:
    """What one training gave."""

    way: str
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    eval_loss: float = float("nan")
    head_mib: float = float("nan")
    differences: list[Difference] = field(default_factory=list)  # from naive; of fused ways

    @property
    def train_loss(self) -> float:
        """Mean over the last tenth of the steps."""
        return statistics.fmean(self.losses[-max(1, len(self.losses) // 10) :])

    @property
    def tokens_per_second(self) -> float:
        """Median over the steps but the first, which pays for what is set up once."""
        pairs = zip(self.tokens[1:], self.seconds[1:], strict=True)
        return statistics.median([tokens / seconds for tokens, seconds in pairs] or [float("nan")])


@dataclass(frozen=True)
class Setting:
    """Sizes of the demo.  The head weighs as it does in small real models: V/D = 128."""

    vocab_size: int = 16384
    hidden: int = 128
    layers: int = 2
    batch_size: int = 16
    max_length: int = 128
    lr: float = 1e-3
    seed: int = 0


class Demo(Corpus):
    """Data and initial weights, shared by the four trainings."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting.vocab_size, setting.max_length, setting.batch_size, setting.seed)
        self.setting = setting

    def model(self) -> Any:
        """A model with the common initial weights."""
        return tiny.tiny_llama(
            self.tokenizer,
            hidden=self.setting.hidden,
            layers=self.setting.layers,
            max_length=self.setting.max_length,
            seed=self.setting.seed,
        )

    def train(self, way: str, steps: int) -> Result:
        """Train one way, then evaluate and measure the head."""
        model = self.model()
        loss_of, after_step = make_loss(way, model)
        result = self.fit(way, model, loss_of, after_step, steps)
        batches = [self.batch(step) for step in range(steps)]
        largest = max(batches, key=lambda batch: batch["labels"].numel())
        result.head_mib = head_peak_bytes(model.model, lambda: loss_of(largest, steps)) / 2**20
        result.eval_loss = self.held_out_costs(model)[0].mean().item()
        return result

    def fit(
        self,
        way: str,
        model: Any,
        loss_of: Callable[[Batch, int], Tensor],
        after_step: Callable[[], None],
        steps: int,
    ) -> Result:
        """The training loop, the same for all."""
        result = Result(way)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.setting.lr)
        with tqdm(total=steps, desc=way, unit="step", disable=None) as bar:
            for step in range(steps):
                batch = self.batch(step)
                if way.startswith("fused") and step in compared_steps(steps):
                    result.differences.append(self.difference(way.split()[1], model, step))
                started = time.perf_counter()
                loss = loss_of(batch, step)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                after_step()
                result.seconds.append(time.perf_counter() - started)
                result.losses.append(loss.item())
                result.tokens.append(int(batch["attention_mask"].sum()))
                bar.update()
                bar.set_postfix(loss=f"{result.losses[-1]:.3f}")
        return result

    def difference(self, loss: str, model: Any, step: int) -> Difference:
        """Naive SFT or IFT against fused, from the weights of `model`, on the batch of a step."""
        values, gradients = [], []
        for way in (f"naive {loss}", f"fused {loss}"):
            copy = self.model()
            copy.load_state_dict(model.state_dict())
            value = make_loss(way, copy)[0](self.batch(step), step)
            value.backward()
            values.append(value.item())
            gradients.append({n: p.grad for n, p in copy.named_parameters() if p.grad is not None})
        naive, fused = gradients
        if naive.keys() != fused.keys():
            raise RuntimeError(
                f"{loss}: gradients of {naive.keys() ^ fused.keys()} in one way only"
            )
        worst, name = max(
            (((fused[n] - g).abs().max() / g.abs().max()).item(), n) for n, g in naive.items()
        )
        return Difference(step, abs(values[0] - values[1]), worst, name)


def make_loss(way: str, model: Any) -> tuple[Callable[[Batch, int], Tensor], Callable[[], None]]:
    """(loss of a batch at a step, what follows an optimizer step); fused ways patch the model."""
    if way == "naive IFT":
        embedding = frozen_embedding(model)  # the released code's second copy of the embedding

        def naive_ift(batch: Batch, step: int) -> Tensor:
            ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
            return naive_ift_loss(model, ids, labels, mask, embedding=embedding)

        return naive_ift, lambda: refresh(embedding, model)
    if way.startswith("fused"):
        ift.patch(model)
    if way == "fused IFT":
        config = ift.IFTConfig()
        return lambda batch, step: model(**batch, ift=config.replace(step=step)).loss, lambda: None
    return lambda batch, step: model(**batch).loss, lambda: None


def compared_steps(steps: int) -> set[int]:
    """The steps of a run at which naive and fused are compared: five, from first to last."""
    return {quarter * (steps - 1) // 4 for quarter in range(5)}


def steps_within(demo: Demo, seconds: float) -> int:
    """As many steps for each way as fit the time, judged by a trial of the slowest way."""
    model = demo.model()
    trial = demo.fit("trial", model, *make_loss("naive IFT", model), 4)
    together = 2.5 * statistics.fmean(trial.seconds[1:])  # naive IFT is not half of the four
    return max(10, min(200, int(seconds / together)))


def table(results: list[Result], steps: int, demo: Demo) -> str:
    """What came out, and how each number was measured."""
    rows = [("", "train loss", "held-out loss", "tokens/s", "head memory")]
    for r in results:
        speed, memory = f"{r.tokens_per_second:,.0f}", f"{r.head_mib:.1f} MiB"
        rows.append((r.way, f"{r.train_loss:.4f}", f"{r.eval_loss:.4f}", speed, memory))
    lines = [f"{row[0]:<10}" + "".join(f"{cell:>15}" for cell in row[1:]) for row in rows]
    lines.insert(1, "─" * len(lines[0]))
    setting = demo.setting
    checked = [r for r in results if r.differences]
    points = ", ".join(str(each.step) for each in checked[0].differences)
    same = "; ".join(
        f"{max(d.loss for d in r.differences):.0e}, {max(d.gradient for d in r.differences):.0e}"
        f" {r.way.split()[1]}"
        for r in checked
    )
    sft, ift = (largest_difference(*results[i : i + 2]) for i in (0, 2))
    return (
        "\n".join(lines)
        + f"""

{steps} steps of {setting.batch_size} rows from the same weights in the same order; \
{len(demo.tokenizer)} tokens, width {setting.hidden},
{setting.layers} layers, fp32, {torch.get_num_threads()} threads.
train loss     mean over the last tenth of the steps; SFT and IFT measure different things
held-out loss  cross-entropy per token of docstrings not trained on; comparable for all four
tokens/s       prompt and completion without padding; median over the steps but the first
head memory    peak of torch's allocator, by its profiler, from the trunk's output to its gradient
               in one more step on the largest batch
naive − fused  from the same weights, at steps {points} of the fused runs, at most, loss and
               gradient over a parameter's largest entry: {same}.
               The runs drift apart, since Adam amplifies rounding where a gradient is nearly 0:
               the loss of a step differs by up to {sft:.1e} (SFT), {ift:.1e} (IFT)"""
    )


def largest_difference(one: Result, other: Result) -> float:
    """Largest difference of the losses of a step, of two runs."""
    return max(abs(a - b) for a, b in zip(one.losses, other.losses, strict=True))


def main(argv: list[str] | None = None) -> int:
    """Run the demo."""
    description = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=description)
    parser.add_argument("--output", type=Path, default=Path("demo_out"))
    parser.add_argument("--steps", type=int, help="for each way (default: what fits --seconds)")
    parser.add_argument("--seconds", type=float, default=120.0, help="for the four trainings")
    for name, value in asdict(Setting()).items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(value), default=value, help=f"(default: {value})")
    arguments = parser.parse_args(argv)
    setting = Setting(**{name: getattr(arguments, name) for name in asdict(Setting())})

    demo = Demo(setting)
    print(f"{len(demo.examples)} docstrings of Python {sys.version.split()[0]}", flush=True)
    steps = arguments.steps or steps_within(demo, arguments.seconds)
    results = [demo.train(way, steps) for way in WAYS]
    text = table(results, steps, demo)
    arguments.output.mkdir(parents=True, exist_ok=True)
    records = {"steps": steps, "setting": asdict(setting), "results": [asdict(r) for r in results]}
    (arguments.output / "results.json").write_text(json.dumps(records) + "\n", encoding="utf-8")
    (arguments.output / "table.txt").write_text(text + "\n", encoding="utf-8")
    picture.draw(results, arguments.output / "demo.png")
    print(f"\n{text}\n\n{arguments.output}/demo.png, table.txt, results.json")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("demo: interrupted")
