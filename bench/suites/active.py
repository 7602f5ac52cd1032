"""dh from the active set, beside exact gradients: its cost, its error, and what it trains.

``active``: the cases of a head that is trained or frozen are those of ``python -m bench head`` with
one more implementation. The sweeps change one option of the active set at a time, with the head
frozen; beside the error of each threshold is that of dropping the tail instead of making up for it.

``training``: a small Llama with an untied head learns the docstrings of the standard library, by
SFT and by IFT, with its head trained and frozen, from several seeds; every run once with each
gradient, on the same batches. Held-out loss is taken over all target tokens and over the rarest
tenth of them. Then the head and the hidden states of a trained model show what the tail costs on
data that no generator made.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import ift
import ift_kernels
from bench.harness.machine import provenance
from bench.harness.measure import Suite, by_name
from bench.peers.heads import PEERS
from bench.report import pictures
from bench.suites import head
from bench.suites.grid import FLOORS, Case, Point
from examples.corpus import Corpus
from ift import tiny
from ift_kernels import ActiveSet

MAIN = ("scalar", "per-token", "scalar-frozen", "per-token-frozen")
IMPLEMENTATIONS = (*FLOORS, "ours", "active", "naive", "naive-float", "compile", "cce", "trl")


def _sweep(name: str, title: str, options: ActiveSet) -> Case:
    return replace(head.CASES["per-token-frozen"], name=name, title=title, active=options)


def _sweeps() -> Iterator[Case]:
    for power in (6, 8, 10, 12, 14, 16):
        title = f"threshold 2⁻{pictures.raised(power)}"
        yield _sweep(f"threshold-{power}", title, ActiveSet(threshold=2.0**-power))
    for block in (64, 256, 512):
        yield _sweep(f"block-{block}", f"blocks of {block} tokens", ActiveSet(block=block))
    for bucket in (256, 512, 1024, 4096):
        title = f"buckets of {bucket} ids"
        yield _sweep(f"tail-{bucket}", title, ActiveSet(tail_bucket=bucket))


SWEEPS: dict[str, Case] = by_name(*_sweeps())
CASES = {name: head.CASES[name] for name in MAIN} | SWEEPS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``active``."""
    head.shape_arguments(parser, list(CASES), [*IMPLEMENTATIONS, "dropped"])


def points(sizes: tuple[int, int, int], arguments: argparse.Namespace) -> list[Point]:
    """The main cases and the sweeps at one shape."""
    found = []
    for name in arguments.cases or CASES:
        names: Sequence[str] = IMPLEMENTATIONS
        if name in SWEEPS:
            names = ("active", "dropped") if name.startswith("threshold") else ("active",)
        asked = arguments.implementations or names
        found.append(Point(sizes, CASES[name], [n for n in names if n in asked]))
    return found


SUITE = Suite("dh from the active set, against exact gradients, peers and dropping the tail.",
              CASES, add_arguments, functools.partial(head.run, points_at=points))  # fmt: skip


# --- training -------------------------------------------------------------------------------------

GRADIENTS = ("exact", "active")
LOSSES = ("sft", "ift")


SETTING = {"vocab_size": 8192, "hidden": 128, "layers": 2, "batch_size": 8, "max_length": 96}
LEARNING_RATE = 1e-3


class Study(Corpus):
    """Data, its split, and what is rare in it; shared by all runs of a process."""

    def __init__(self) -> None:
        sizes = (SETTING[name] for name in ("vocab_size", "max_length", "batch_size"))
        super().__init__(*sizes)
        self.counts = Counter(
            int(i) for example in self.examples for i in example["labels"] if i >= 0
        )
        labels = [batch["labels"][:, 1:] for batch in self.held_out]
        targets = torch.cat([each[each >= 0] for each in labels])
        seen = torch.tensor([self.counts[int(i)] for i in targets])
        self.rare = float(seen.double().quantile(0.1))  # times a token of the rarest tenth occurs

    def run(
        self, seed: int, loss: str, frozen: bool, gradient: str, steps: int
    ) -> tuple[dict[str, Any], Any]:
        """One training; its record, and the model."""
        model = tiny.tiny_llama(
            self.tokenizer, hidden=SETTING["hidden"], layers=SETTING["layers"],
            max_length=SETTING["max_length"], seed=seed, tied=False,
        )  # fmt: skip
        model.lm_head.requires_grad_(not frozen)
        ift.patch(model, gradient=gradient)
        options = {"ift": ift.IFTConfig(embedding_grad=True)} if loss == "ift" else {}
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
        losses, shares = [], []
        for step in range(seed * steps, (seed + 1) * steps):
            batch = self.batch(step)
            with ift_kernels.record_active_sets() as report:
                value = model(**batch, **options).loss
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

    def held_out_loss(self, model: Any) -> tuple[float, float]:
        """Cross-entropy per held-out target: of all, and of the rarest tenth."""
        cost, ids = self.held_out_costs(model)
        is_rare = torch.tensor([self.counts[int(i)] <= self.rare for i in ids])
        return cost.mean().item(), cost[is_rare].mean().item()

    def real_head(self, model: Any) -> dict[str, Any]:
        """Errors of dh at the default options, on held-out text."""
        some = itertools.islice(self.held_out_states(model), 16)
        h, t = (torch.cat(parts)[:2048] for parts in zip(*some, strict=True))
        w = model.lm_head.weight.detach()
        upstream = torch.full((h.shape[0],), -1.0 / h.shape[0])

        def d_hidden(logprob: Callable[..., Tensor]) -> Tensor:
            leaf = h.clone().requires_grad_()
            return torch.autograd.grad(logprob(leaf, w, t), leaf, upstream)[0]

        exact, uniform = _dense(h.double(), w.double(), t, upstream.double(), ActiveSet())
        with ift_kernels.record_active_sets() as report:
            active = d_hidden(PEERS["active"].function("logprob"))
        dropped = d_hidden(PEERS["dropped"].function("logprob"))
        errors = {
            f"{name} d hidden": float((found - exact).norm() / exact.norm())
            for name, found in (("active", active), ("uniform", uniform), ("dropped", dropped))
        }
        return {
            "tokens": h.shape[0], "width": h.shape[1], "vocabulary": w.shape[0],
            "share": report[0].share, "tail_mean": report[0].tail_mean, "errors": errors,
        }  # fmt: skip


def _dense(
    h: Tensor, w: Tensor, t: Tensor, upstream: Tensor, options: ActiveSet
) -> tuple[Tensor, Tensor]:
    """dh of dense products: exact, and with the tail of a bucket spread evenly over its ids."""
    (n, v), rows = (len(h), len(w)), torch.arange(len(t))
    p = (h @ w.T).softmax(1)
    active = p > options.threshold
    active[rows, t] = True
    active = active.view(-1, options.block, v).any(1).repeat_interleave(options.block, 0)
    dz = -p * upstream[:, None]
    dz[rows, t] += upstream
    tail = torch.where(active, 0.0, dz).view(n, -1, options.tail_bucket)
    mean = tail.sum(2) / (~active).view(n, -1, options.tail_bucket).sum(2).clamp(min=1)
    uniform = torch.where(active, dz, mean.repeat_interleave(options.tail_bucket, 1))
    return dz @ w, uniform @ w


_study: Study | None = None


def _start() -> None:
    global _study
    torch.set_num_threads(1)
    _study = Study()


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
            found.append({
                "loss": loss, "frozen": frozen, "of": what,
                "spread": max(of["exact"]) - min(of["exact"]),
                "mean": {g: sum(v) / len(v) for g, v in of.items()},
            })  # fmt: skip
    return found


def train(arguments: Sequence[str]) -> int:
    """``python -m bench training``."""
    parser = argparse.ArgumentParser(prog="python -m bench training", description=train.__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    jobs = [
        (seed, loss, frozen, gradient, options.steps)
        for seed in range(options.seeds) for loss in LOSSES for frozen in (False, True)
        for gradient in GRADIENTS
    ]  # fmt: skip
    about = provenance(torch.device("cpu"), 1)
    context = multiprocessing.get_context("spawn")
    with context.Pool(options.processes, _start) as pool:
        runs = list(tqdm(pool.imap(_work, jobs), total=len(jobs), unit="run"))
    real = next(r.pop("real_head") for r in runs if "real_head" in r)
    done = {"provenance": about, "setting": SETTING | {"lr": LEARNING_RATE}, "steps": options.steps,
            "summary": summary(runs), "real_head": real, "runs": runs}  # fmt: skip
    for line in (*done["summary"], real):
        print(json.dumps(line))
    if options.json:
        options.json.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        pictures.training(runs, options.plot)
    return 0
