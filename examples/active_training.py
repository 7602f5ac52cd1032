"""Does the active-set backward train as well as the exact one?  And what of a real model's head?

``python -m examples.active_training --json FILE --plot FILE``: a small Llama with an untied head
learns the docstrings of the standard library, by SFT and by IFT, with its head trained and frozen,
from three seeds; every run once with each head gradient, on the same batches. Held-out loss is
taken over all target tokens and over the rarest tenth of them. Then the head and the hidden states
of a trained model show what the tail costs on data that no generator made.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import ift
import ift_kernels
from bench.active import Dropped
from examples.demo import Demo, Setting
from ift import tiny
from ift_kernels import ActiveSet

GRADIENTS: dict[str, str | ActiveSet] = {
    "exact": "exact", "active": ActiveSet(), "active dW": ActiveSet(dW="active"),
}  # fmt: skip
LOSSES = ("sft", "ift")
COLOURS = {"exact": "#D55E00", "active": "#0072B2", "active dW": "#CC79A7"}


class Study(Demo):
    """The demo's data, with an untied head and a loss on rare tokens."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        counts = Counter(int(i) for example in self.examples for i in example["labels"] if i >= 0)
        targets = torch.cat([b["labels"][:, 1:][b["labels"][:, 1:] >= 0] for b in self.held_out])
        seen = torch.tensor([counts[int(i)] for i in targets])
        self.counts = counts
        self.rare = float(seen.double().quantile(0.1))  # times a token of the rarest tenth occurs

    def untied(self, seed: int, frozen: bool) -> Any:
        """A model whose head is its own, and perhaps not trained."""
        model = tiny.tiny_llama(
            self.tokenizer, hidden=self.setting.hidden, layers=self.setting.layers,
            max_length=self.setting.max_length, seed=seed, tied=False,
        )  # fmt: skip
        model.lm_head.requires_grad_(not frozen)
        return model

    def run(
        self, seed: int, loss: str, frozen: bool, gradient: str, steps: int
    ) -> tuple[dict[str, Any], Any]:
        """One training; its record, and the model."""
        model = ift.patch(self.untied(seed, frozen), gradient=GRADIENTS[gradient])
        config = ift.IFTConfig(embedding_grad=True) if loss == "ift" else None
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=self.setting.lr)
        losses, shares = [], []
        for step in range(steps):
            batch = self.batch(seed * steps + step)
            with ift_kernels.record_active_sets() as report:
                value = model(**batch, ift=config).loss if config else model(**batch).loss
                value.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(value.item())
            shares += [r.share for r in report if r.share == r.share]
        ift.unpatch(model)
        every, rare = self.held_out_loss(model)
        record = {
            "seed": seed, "loss": loss, "frozen": frozen, "gradient": gradient,
            "held_out": every, "held_out_rare": rare, "losses": losses,
            "share_last": sum(shares[-20:]) / len(shares[-20:]) if shares else None,
        }  # fmt: skip
        return record, model

    @torch.no_grad()
    def held_out_loss(self, model: Any) -> tuple[float, float]:
        """Cross-entropy per held-out target: of all, and of the rarest tenth."""
        costs, rare = [], []
        for batch in self.held_out:
            logits = model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
            target = batch["labels"][:, 1:]
            keep = target >= 0
            costs.append(F.cross_entropy(logits[keep], target[keep], reduction="none"))
            rare.append(torch.tensor([self.counts[int(i)] <= self.rare for i in target[keep]]))
        cost, is_rare = torch.cat(costs), torch.cat(rare)
        return cost.mean().item(), cost[is_rare].mean().item()

    def real_head(self, model: Any) -> dict[str, Any]:
        """Errors of the head gradients at the default options, on held-out text."""
        hidden, target = [], []
        with torch.no_grad():
            for batch in self.held_out[:16]:
                states = model.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
                keep = batch["labels"][:, 1:] >= 0
                hidden.append(states[:, :-1][keep])
                target.append(batch["labels"][:, 1:][keep])
        h, t = torch.cat(hidden)[:2048], torch.cat(target)[:2048]
        w = model.lm_head.weight.detach()
        upstream = torch.full((h.shape[0],), -1.0 / h.shape[0])

        def both(logprob: Any) -> list[Tensor]:
            leaves = [h.clone().requires_grad_(), w.clone().requires_grad_()]
            return list(torch.autograd.grad(logprob(*leaves), leaves, upstream))

        exact = [g.float() for g in _dense_gradients(h.double(), w.double(), t, upstream.double())]
        options = ActiveSet(dW="active")
        with ift_kernels.record_active_sets() as report:
            active = both(
                lambda a, b: ift_kernels.linear_logprobs(a, b, t, gradient=options).logprob
            )
        dropped = both(lambda a, b: Dropped(options).logprob(a, b, t))
        uniform = _uniform_tail(h.double(), w.double(), t, upstream.double(), options)
        errors = {
            f"{name} {what}": float((g - e).norm() / e.norm())
            for name, found in (("active", active), ("uniform", uniform), ("dropped", dropped))
            for what, g, e in zip(("d hidden", "d weight"), found, exact, strict=True)
        }
        rows = [float((g.abs().amax(1) == 0).double().mean()) for g in (active[1], dropped[1])]
        return {
            "tokens": h.shape[0], "width": h.shape[1], "vocabulary": w.shape[0],
            "share": report[0].share, "tail_mean": report[0].tail_mean, "errors": errors,
            "head rows without gradient": dict(zip(("active", "dropped"), rows, strict=True)),
        }  # fmt: skip


def _dense_gradients(h: Tensor, w: Tensor, t: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    dz = -(h @ w.T).softmax(1) * upstream[:, None]
    dz[torch.arange(len(t)), t] += upstream
    return dz @ w, dz.T @ h


def _uniform_tail(
    h: Tensor, w: Tensor, t: Tensor, upstream: Tensor, options: ActiveSet
) -> tuple[Tensor, Tensor]:
    """The same where the tail of a tile is spread evenly over its ids."""
    (n, v), rows = (len(h), len(w)), torch.arange(len(t))
    p = (h @ w.T).softmax(1)
    active = p > options.threshold
    active[rows, t] = True
    active = active.view(-1, options.block, v).any(1).repeat_interleave(options.block, 0)
    dz = -p * upstream[:, None]
    dz[rows, t] += upstream
    tail = torch.where(active, 0.0, dz).view(n, -1, options.tail_tile)
    mean = tail.sum(2) / (~active).view(n, -1, options.tail_tile).sum(2).clamp(min=1)
    dz = torch.where(active, dz, mean.repeat_interleave(options.tail_tile, 1))
    return dz @ w, dz.T @ h


_study: Study | None = None


def _start(setting: Setting) -> None:
    global _study
    torch.set_num_threads(1)
    _study = Study(setting)


def _work(job: tuple[int, str, bool, str, int]) -> dict[str, Any]:
    assert _study is not None
    record, model = _study.run(*job)
    if job[:4] == (0, "sft", False, "exact"):
        record["real_head"] = _study.real_head(model)
    return record


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per loss and head: mean held-out losses, and the spread of the exact runs over seeds."""
    found = []
    for loss, frozen in sorted({(r["loss"], r["frozen"]) for r in runs}):
        for what in ("held_out", "held_out_rare"):
            of = {
                g: [r[what] for r in runs if (r["loss"], r["frozen"], r["gradient"]) ==
                    (loss, frozen, g)] for g in GRADIENTS
            }  # fmt: skip
            spread = max(of["exact"]) - min(of["exact"])
            mean = {g: sum(v) / len(v) for g, v in of.items() if v}
            same = {
                g: max(abs(a - b) for a, b in zip(v, of["exact"], strict=True))
                for g, v in of.items() if v
            }  # fmt: skip
            found.append({"loss": loss, "frozen": frozen, "of": what, "spread": spread,
                          "mean": mean, "largest difference of a seed": same})  # fmt: skip
    return found


def draw(runs: list[dict[str, Any]], path: str) -> None:
    """Held-out loss of every run; lines join what started from the same seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = sorted({(r["loss"], r["frozen"]) for r in runs}, reverse=True)
    figure = Figure(figsize=(2.6 * len(panels), 5.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(panels), squeeze=False)
    for column, (loss, frozen) in enumerate(panels):
        for row, what in enumerate(("held_out", "held_out_rare")):
            some = [r for r in runs if (r["loss"], r["frozen"]) == (loss, frozen)]
            names = [g for g in GRADIENTS if any(r["gradient"] == g for r in some)]
            ax = axes[row, column]
            for seed in sorted({r["seed"] for r in some}):
                y = [next(r[what] for r in some if (r["seed"], r["gradient"]) == (seed, g))
                     for g in names]  # fmt: skip
                ax.plot(range(len(names)), y, color="#BBBBBB", linewidth=1, zorder=1)
                ax.scatter(range(len(names)), y, c=[COLOURS[g] for g in names], s=22, zorder=2)
            ax.set_xticks(range(len(names)), names, fontsize=7.5)
            ax.set_xlim(-0.4, len(names) - 0.6)
            ax.tick_params(axis="y", labelsize=7.5)
            kind = "all tokens" if row == 0 else "rarest tenth of tokens"
            head = "head frozen" if frozen else "head trained"
            ax.set_title(f"{loss.upper()}, {head}\n{kind}", fontsize=8, loc="left")
            ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("held-out loss", fontsize=8)
    axes[1, 0].set_ylabel("held-out loss", fontsize=8)
    figure.savefig(path, format="png")


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(prog="python -m examples.active_training")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE")
    options = parser.parse_args()
    setting = Setting(vocab_size=8192, batch_size=8, max_length=96)
    jobs = [
        (seed, loss, frozen, gradient, options.steps)
        for seed in range(options.seeds) for loss in LOSSES for frozen in (False, True)
        for gradient in GRADIENTS if not (frozen and gradient == "active dW")
    ]  # fmt: skip
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.processes, _start, (setting,)) as pool:
        runs = list(tqdm(pool.imap_unordered(_work, jobs), total=len(jobs), unit="run"))
    runs.sort(key=lambda r: jobs.index((*(r[k] for k in ("seed", "loss", "frozen", "gradient")),
                                        options.steps)))  # fmt: skip
    done = {"setting": vars(setting), "steps": options.steps, "summary": summary(runs),
            "real_head": next(r.pop("real_head") for r in runs if "real_head" in r),
            "runs": runs}  # fmt: skip
    for line in done["summary"]:
        print(json.dumps(line))
    print(json.dumps(done["real_head"]))
    if options.json:
        Path(options.json).write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        draw(runs, options.plot)


if __name__ == "__main__":
    main()
