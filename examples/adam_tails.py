"""What an approximate dW does to Adam: tails for the head gradient, by token frequency.

``python -m examples.adam_tails --json FILE --plot FILE``. On LM-like data, AdamW's first update and
its update after 100 batches are compared with those of the exact dW, over the whole head and in
tenths of the vocabulary, most frequent first. The columns of the active set are exact in all; they
differ in what stands for the rest, the tail:

* ``dropped``: nothing (the rule of filters that skip small probabilities).
* ``uniform``: the mass of the tail spread evenly over each tail tile.
* ``profile``: what `ift_kernels` does: spread as what the mean hidden state gives each id.
* ``marginal``: spread over a tile as the batch's own mean tail probability of each id.
* ``sampled``: one id of each (token, tail tile) drawn in proportion, with all its mass: unbiased.
* ``half``: the exact tail of every second token, doubled: unbiased, half of the products.
* ``int8``: the exact tail with dz and h rounded to 8 bits per row: all products, at a lower price.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench import lmlike
from ift_kernels.tail_profile import window

TAILS = ("dropped", "uniform", "profile", "marginal", "sampled", "half", "int8")
BETAS, EPS, BLOCK, TILE, THRESHOLD = (0.9, 0.999), 1e-8, 128, 2048, 2.0**-12
# Products with the head in units of N·V·D beyond those on active columns.
COST = {
    "dropped": "0", "uniform": "1/tile", "profile": "1/tile + 1/N",
    "marginal": "1/tile, and a sum per id",
    "sampled": "1/tile, scattered", "half": "1/2", "int8": "1, in 8 bits",
}  # fmt: skip


def approximations(
    z: Tensor, h: Tensor, target: Tensor, upstream: Tensor, generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor], float]:
    """The exact dW (V, D), the approximate ones by name, and the active share."""
    (n, v), log_sum_exp = z.shape, z.logsumexp(1)
    p = (z - log_sum_exp[:, None]).exp()
    active = (p > THRESHOLD).view(-1, BLOCK, v).any(1).repeat_interleave(BLOCK, 0)
    rows = torch.arange(n)
    active[rows, target] = True
    dz = -p * upstream[:, None]
    dz[rows, target] += upstream
    tail = torch.where(active, 0.0, dz)
    core = (dz - tail).T @ h
    tiles = tail.view(n, -1, TILE)
    sums = tiles.sum(2)  # (N, tiles)
    free = (~active).view(n, -1, TILE)

    def spread(weights: Tensor) -> Tensor:
        """The sums of the tails, in proportion to `weights` (V,) of ids."""
        share = weights.view(1, -1, TILE) * free
        return sums[..., None] * share / share.sum(2, keepdim=True).clamp(min=1e-30)

    # Logits are linear in the hidden state: their mean is what its mean gives.
    cap, below = window(THRESHOLD)
    profile = (z.mean(0) - (log_sum_exp.mean() + cap)).clamp(-below, 0)
    drawn = torch.multinomial(tiles.abs().reshape(-1, TILE) + 1e-30, 1, generator=generator).view(
        n, -1, 1
    )
    sampled = torch.zeros_like(tiles).scatter_(2, drawn, sums[..., None])
    found = {
        "dropped": core,
        "uniform": core + spread(torch.ones(v)).reshape(n, v).T @ h,
        "profile": core + spread(profile.exp()).reshape(n, v).T @ h,
        "marginal": core + spread(torch.where(active, 0.0, p).sum(0)).reshape(n, v).T @ h,
        "sampled": core + sampled.reshape(n, v).T @ h,
        "half": core + 2 * tail[::2].T @ h[::2],
        "int8": core + _int8(tail).T @ _int8(h),
    }
    return core + tail.T @ h, found, active.double().mean().item()


def _int8(x: Tensor) -> Tensor:
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return (x / scale).round() * scale


class Moments:
    """AdamW's two moments of one gradient stream; weight decay is the same for all."""

    def __init__(self, like: Tensor) -> None:
        self.first, self.second, self.steps = torch.zeros_like(like), torch.zeros_like(like), 0

    def update(self, gradient: Tensor) -> Tensor:
        """The update, without the learning rate, after one more gradient."""
        self.steps += 1
        self.first.lerp_(gradient, 1 - BETAS[0])
        self.second.lerp_(gradient.square(), 1 - BETAS[1])
        first = self.first / (1 - BETAS[0] ** self.steps)
        second = self.second / (1 - BETAS[1] ** self.steps)
        return first / (second.sqrt() + EPS)


def errors(found: Tensor, exact: Tensor, order: Tensor) -> dict[str, Any]:
    """Relative error over all rows, and over tenths of the ids in `order`."""
    tenths = [
        float((found[ids] - exact[ids]).norm() / exact[ids].norm().clamp(min=1e-30))
        for ids in order.tensor_split(10)
    ]
    return {"all": float((found - exact).norm() / exact.norm()), "tenths": tenths}


def study(rows: int, width: int, vocabulary: int, steps: int, scale: float) -> dict[str, Any]:
    """The whole comparison; `scale` multiplies gradients, as a mean loss of that size would."""
    data = lmlike.generate(rows * steps, width, vocabulary)
    generator = torch.Generator().manual_seed(0)
    streams = {name: Moments(data.weight) for name in ("exact", *TAILS)}
    frequency, shares = torch.zeros(vocabulary), []
    result: dict[str, Any] = {}
    updates: dict[str, Tensor] = {}
    gradient_errors: dict[str, float] = {}
    for step in tqdm(range(steps), unit="batch"):
        some = slice(step * rows, (step + 1) * rows)
        h, target = data.hidden[some], data.target[some]
        z = h @ data.weight.T
        frequency += z.softmax(1).sum(0)
        exact, found, share = approximations(
            z, h, target, torch.full((rows,), scale / rows), generator
        )
        shares.append(share)
        updates = {"exact": streams["exact"].update(exact)}
        for name, gradient in found.items():
            updates[name] = streams[name].update(gradient)
            if step == 0:
                gradient_errors[name] = float((gradient - exact).norm() / exact.norm())
        if step in (0, steps - 1):
            order = frequency.argsort(descending=True)
            result["first update" if step == 0 else f"update {steps}"] = {
                name: errors(updates[name], updates["exact"], order) for name in TAILS
            }
    return {
        "rows": rows, "width": width, "vocabulary": vocabulary, "share": sum(shares) / steps,
        "gradient": gradient_errors, "updates": result, "cost": COST,
    }  # fmt: skip


def draw(done: dict[str, Any], path: str) -> None:
    """Error of the update by tenth of the vocabulary."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, found) in zip(
        figure.subplots(1, 2, sharey=True), done["updates"].items(), strict=True
    ):
        for name in TAILS:
            axes.plot(range(1, 11), found[name]["tenths"], "o-", markersize=3, linewidth=1.2,
                      label=f"{name} ({found[name]['all']:.2f} overall)")  # fmt: skip
        axes.axhline(0.05, color="#222222", linewidth=1, linestyle=":")
        axes.set(xlabel="tenth of the vocabulary, most frequent first", yscale="log")
        axes.set_title(title, loc="left", fontsize=9)
        axes.legend(fontsize=7, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("relative error of AdamW's update")
    figure.savefig(path, format="png")


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(prog="python -m examples.adam_tails")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--plot", metavar="FILE")
    options = parser.parse_args()
    done = study(options.rows, options.width, options.vocabulary, options.steps, scale=1.0)
    for title, found in done["updates"].items():
        for name in TAILS:
            print(f"{title}: {name:<9} {found[name]['all']:.3f} overall; by tenth "
                  + " ".join(f"{x:.2f}" for x in found[name]["tenths"]))  # fmt: skip
    print("dW itself: " + ", ".join(f"{k} {v:.4f}" for k, v in done["gradient"].items()))
    if options.json:
        Path(options.json).write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        draw(done, options.plot)


if __name__ == "__main__":
    main()
