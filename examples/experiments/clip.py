"""Min-clip against pure clip: which ratios have a gradient, and what that does to a policy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from examples.experiments.page import Page, main, shown
from ift import plotting
from ift.losses import ppo_loss

ACTIONS, WIDTH, CONTEXTS, INNER, BATCH, EPSILON, LR = 20, 8, 256, 40, 64, 0.2, 2.0
Surrogate = Callable[[Tensor, Tensor, Tensor], Tensor]


def min_clip(logprob: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """PPO: −mean min(r·A, clip(r)·A)."""
    mask = torch.ones_like(logprob, dtype=torch.bool)[:, None]
    return ppo_loss(logprob[:, None], mask, advantage, old[:, None], epsilon=EPSILON)


def pure_clip(logprob: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """−mean clip(r)·A."""
    return -((logprob - old).exp().clamp(1 - EPSILON, 1 + EPSILON) * advantage).mean()


def no_clip(logprob: Tensor, old: Tensor, advantage: Tensor) -> Tensor:
    """−mean r·A."""
    return -((logprob - old).exp() * advantage).mean()


KINDS: dict[str, Surrogate] = {"min-clip": min_clip, "pure clip": pure_clip, "no clip": no_clip}


def quadrants(surrogate: Surrogate) -> list[bool]:
    """Is there a gradient: A > 0 with r below, inside, above the range; the same for A < 0."""
    ratio = torch.tensor([0.5, 1.0, 2.0] * 2, dtype=torch.float64)
    advantage = torch.tensor([1.0] * 3 + [-1.0] * 3, dtype=torch.float64)
    logprob = ratio.log().requires_grad_()
    (gradient,) = torch.autograd.grad(
        surrogate(logprob, torch.zeros_like(ratio), advantage), logprob
    )
    return [bool(g != 0) for g in gradient]


def train(surrogate: Surrogate, seed: int, rounds: int) -> list[dict[str, float]]:
    """A linear softmax policy; each round draws actions and takes INNER steps on them."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    teacher, weight = normal(ACTIONS, WIDTH), 0.1 * normal(ACTIONS, WIDTH)
    test = normal(2000, WIDTH)
    weight.requires_grad_()

    def reward(x: Tensor) -> Tensor:
        """1 for the teacher's best action, less down to 0 for its worst, (n, ACTIONS)."""
        return (x @ teacher.T).argsort(1).argsort(1).double() / (ACTIONS - 1)

    def expected() -> float:
        with torch.no_grad():
            return ((test @ weight.T).softmax(1) * reward(test)).sum(1).mean().item()

    found = [{"step": 0.0, "reward": expected()}]
    for number in range(1, rounds + 1):
        x = normal(CONTEXTS, WIDTH)
        with torch.no_grad():
            before = (x @ weight.T).log_softmax(1)
            action = torch.multinomial(before.exp(), 1, generator=g)
            got = reward(x).gather(1, action)[:, 0]
            old = before.gather(1, action)[:, 0]
            advantage = (got - got.mean()) / got.std()
        for _ in range(INNER):
            some = torch.randperm(CONTEXTS, generator=g)[:BATCH]
            logprob = (x[some] @ weight.T).log_softmax(1).gather(1, action[some])[:, 0]
            loss = surrogate(logprob, old[some], advantage[some])
            (gradient,) = torch.autograd.grad(loss, weight)
            with torch.no_grad():
                weight -= LR * gradient
        with torch.no_grad():
            after = (x @ weight.T).log_softmax(1)
            ratio = (after.gather(1, action)[:, 0] - old).exp()
            lost = ((advantage > 0) & (ratio < 1 - EPSILON)).double().mean()
            kept = ((advantage < 0) & (ratio > 1 + EPSILON)).double().mean()
            kl = (before.exp() * (before - after)).sum(1).mean()
        found.append({"step": float(number), "reward": expected(), "lost": lost.item(),
                      "kept": kept.item(), "kl": kl.item()})  # fmt: skip
    return found


def run(output: Path, quick: bool) -> None:
    """Write the page."""
    page = Page("clip", "Min-clip against pure clip", output)
    seeds, rounds = (2, 3) if quick else (10, 25)
    active = {name: quadrants(surrogate) for name, surrogate in KINDS.items()}
    runs = {name: [train(f, seed, rounds) for seed in range(seeds)] for name, f in KINDS.items()}

    def of_rounds(name: str, key: str) -> Tensor:
        """(seeds,): means over the rounds."""
        return torch.tensor([[r[key] for r in one[1:]] for one in runs[name]]).mean(1)

    def last(name: str) -> Tensor:
        return torch.tensor([one[-1]["reward"] for one in runs[name]])

    page.text(
        "Setting",
        f"A linear softmax policy over {ACTIONS} actions, contexts of width {WIDTH}; reward: the "
        f"rank that a hidden linear teacher gives the action, 0 to 1. A round draws {CONTEXTS} "
        f"contexts and actions and takes {INNER} SGD steps of {BATCH} of them, η = {LR:g}, "
        f"ε = {EPSILON}; {rounds} rounds, {seeds} seeds, fp64. Min-clip is `ift.losses.ppo_loss`.",
    )
    page.text(
        "Expected",
        "Min-clip has a gradient for A > 0 iff r < 1 + ε and for A < 0 iff r > 1 − ε; pure clip "
        "only inside the range. So a token that other tokens' updates carried past the range on "
        "the wrong side, a good one fallen or a bad one risen, is pulled back by min-clip and left "
        "there by pure clip. No published figures.",
    )
    page.text("Measured: where there is a gradient")
    head = [f"A {a} 0, r {r}" for a in "><" for r in ("< 1 − ε", "inside", "> 1 + ε")]
    page.table(["", *head], [[n, *("yes" if a else "no" for a in v)] for n, v in active.items()])
    page.text("Measured: training", "Means over rounds and seeds ± standard error over seeds.")
    rows = [
        [name, shown(last(name), ".4f"),
         *(shown(of_rounds(name, key), ".3f", 100, " %") for key in ("lost", "kept")),
         shown(of_rounds(name, "kl"))]
        for name in KINDS
    ]  # fmt: skip
    page.table(["surrogate", "reward at the end", "good actions fallen below 1 − ε",
                "bad actions risen above 1 + ε", "KL of a round"], rows)  # fmt: skip
    about = "reward, and share of tokens carried the wrong way, over the rounds"
    with page.picture("curves.png", about, 1, 2, width=10, height=3.6) as (_, axes):
        titles = {"reward": "expected reward", "wrong": "share past the range, wrong side"}
        for axis, (key, title) in zip(axes, titles.items(), strict=True):
            for name, color in zip(KINDS, (plotting.BLUE, plotting.ORANGE, "#555555"), strict=True):
                points = [
                    {"step": r["step"], "reward": r["reward"],
                     "wrong": r["lost"] + r["kept"] if "lost" in r else None}
                    for r in _averaged(runs[name])
                ]  # fmt: skip
                plotting.draw(axis, points, key, label=name, color=color)
            axis.set(title=title, xlabel="round")
            axis.legend()
    wanted = [True, True, False, False, True, True]
    exact = active["min-clip"] == wanted and active["pure clip"] == [False, True, False] * 2
    wrong = {n: sum(of_rounds(n, key).mean().item() for key in ("lost", "kept")) for n in KINDS}
    fewer = wrong["min-clip"] < wrong["pure clip"]
    page.text(
        "Verdict",
        f"The quadrants are {'as' if exact else 'not as'} expected. Min-clip leaves "
        f"{'fewer' if fewer else 'no fewer'} tokens past the range on the wrong side "
        f"({wrong['min-clip']:.2%} against {wrong['pure clip']:.2%}). Its reward less that of pure "
        f"clip, paired by seed: {shown(last('min-clip') - last('pure clip'), '+.4f')}. "
        "One small problem: directions, not sizes.",
    )
    final = {n: last(n).tolist() for n in runs}
    averages = {n: _averaged(r) for n, r in runs.items()}
    page.numbers |= {"active": active, "averages": averages, "final": final}
    page.close()


def _averaged(runs: list[list[dict[str, float]]]) -> list[dict[str, float]]:
    """One run's shape, means over the seeds."""
    return [
        {k: sum(r[k] for r in records) / len(records) for k in records[0]}
        for records in zip(*runs, strict=True)
    ]


if __name__ == "__main__":
    main(run, __doc__)
