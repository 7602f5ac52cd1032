"""Frozen Lake: how near IFT, SFT, DPO and ORPO bring a policy to the optimal one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from examples.experiments.page import Page, band, error_of, main, shown
from ift import plotting
from ift.losses import dpo_loss, ift_loss, orpo_loss, sft_loss

HIDDEN, STEPS, LR, LAM, SEEDS = 64, 100, 1e-3, 0.2, 20
LEFT, DOWN, RIGHT, UP = range(4)
OPTIMAL = [DOWN, DOWN, RIGHT, DOWN, RIGHT, RIGHT]
LONGER = [RIGHT, RIGHT, DOWN, DOWN, LEFT, DOWN, RIGHT, RIGHT]  # reaches the goal, two steps later
METHODS = ("IFT", "SFT", "ORPO", "DPO")


class Lake:
    """Gymnasium's 4×4 map without slipping: where each action leads, and what is optimal."""

    def __init__(self) -> None:
        import gymnasium

        env = gymnasium.make("FrozenLake-v1", map_name="4x4", is_slippery=False).unwrapped
        self.next = torch.tensor([[env.P[s][a][0][1] for a in range(4)] for s in range(16)])
        reward = torch.tensor([[env.P[s][a][0][2] for a in range(4)] for s in range(16)]).double()
        final = torch.tensor([[env.P[s][a][0][3] for a in range(4)] for s in range(16)])
        # Holes and goal lead to themselves; of them nothing is asked.
        self.asked = (self.next != torch.arange(16)[:, None]).any(1)
        value = torch.zeros(16, dtype=torch.float64)
        for _ in range(200):
            q = reward + 0.9 * torch.where(final, 0.0, value[self.next])
            value = q.amax(1)
        best = (q >= value[:, None] - 1e-9).double()
        self.optimal = self.transitions(best / best.sum(1, keepdim=True))

    def transitions(self, policy: Tensor) -> Tensor:
        """(16, 16) from (16, 4): the probability to go from each state to each other."""
        made = torch.zeros(16, 16, dtype=policy.dtype)
        return made.scatter_add(1, self.next, policy)

    def states(self, actions: list[int]) -> list[int]:
        """Where each action of a trajectory is taken."""
        found = [0]
        for action in actions:
            found.append(int(self.next[found[-1], action]))
        if found[-1] != 15:
            raise RuntimeError(f"trajectory: expected to end in the goal, 15, got {found[-1]}")
        return found[:-1]

    def distance(self, net: nn.Module, states: Tensor) -> float:
        """Mean squared difference of the rows `states` from the optimal transition matrix."""
        with torch.no_grad():
            made = self.transitions(net(torch.eye(16).double()).softmax(1))
        return (made - self.optimal)[states].square().mean().item()


def rows(lake: Lake) -> tuple[Tensor, Tensor, Tensor]:
    """States, actions and mask of both trajectories, (2, T)."""
    both = [OPTIMAL, LONGER]
    each = zip(*((lake.states(moves), moves, [True] * len(moves)) for moves in both), strict=True)
    states, actions, mask = (
        pad_sequence([torch.tensor(row) for row in rows], batch_first=True) for rows in each
    )
    return states, actions, mask


def losses(net: nn.Module, lake: Lake) -> dict[str, Callable[[], Tensor]]:
    """Each method's loss of the network as it is when called."""
    states, actions, mask = rows(lake)
    seen = torch.eye(16).double()[states]
    reference = copy.deepcopy(net)

    def logprob(model: nn.Module, inputs: Tensor, count: int) -> Tensor:
        logp = model(inputs[:count]).log_softmax(-1)
        return logp.gather(-1, actions[:count, :, None])[..., 0]

    with torch.no_grad():
        frozen = logprob(reference, seen, 2)

    def of_ift() -> Tensor:
        with torch.no_grad():
            guess = net(seen[:1]).argmax(-1)
            mixed_in = torch.eye(16).double()[lake.next[states[:1], guess]]
        mixed = seen[:1].clone()
        mixed[:, 1:] = (1 - LAM) * seen[:1, 1:] + LAM * mixed_in[:, :-1]
        return ift_loss(logprob(net, mixed, 1), mask[:1])

    return {
        "IFT": of_ift,
        "SFT": lambda: sft_loss(logprob(net, seen, 1), mask[:1]),
        "ORPO": lambda: orpo_loss(logprob(net, seen, 2), mask, beta=0.1),
        "DPO": lambda: dpo_loss(logprob(net, seen, 2), mask, frozen, beta=0.1),
    }


def train(method: str, seed: int, steps: int, lake: Lake) -> list[tuple[float, float]]:
    """Distance after each step: over all states, and over those of the optimal trajectory."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(16, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 4)).double()
    loss = losses(net, lake)[method]
    optimizer = torch.optim.RMSprop(net.parameters(), lr=LR)
    every, path = lake.asked, torch.tensor(lake.states(OPTIMAL))
    found = [(lake.distance(net, every), lake.distance(net, path))]
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        found.append((lake.distance(net, every), lake.distance(net, path)))
    return found


def run(output: Path, quick: bool) -> None:
    """Write the page."""
    page = Page("frozen_lake", "Frozen Lake: IFT, SFT, ORPO and DPO", output)
    lake, seeds, steps = Lake(), 2 if quick else SEEDS, 5 if quick else STEPS
    curves = {
        method: torch.tensor([train(method, seed, steps, lake) for seed in range(seeds)])
        for method in METHODS
    }  # (seeds, steps + 1, 2)
    page.text(
        "Setting",
        f"Gymnasium's FrozenLake 4×4 without slipping; one-hot state → {HIDDEN} (ReLU) → 4 "
        f"actions, RMSprop {LR:g}, {steps} steps, {seeds} seeds of the initial weights. One "
        f"optimal trajectory ({len(OPTIMAL)} steps; the chosen one) and one that takes "
        f"{len(LONGER)} (rejected). β = 0.1 for DPO and ORPO; IFT: λ = {LAM}, γ = 0.95, the "
        "predicted state in place of the predicted token. Measured: mean squared difference "
        "between the policy's 16×16 transition matrix and that of the optimal policy (uniform over "
        "optimal actions), over rows that are neither hole nor goal.",
    )
    page.text(
        "Expected",
        "The paper reports DPO nearest, then IFT, then ORPO and SFT. It gives neither the width, "
        "initialisation nor steps, nor which states count.",
    )
    page.text("Measured", "Mean ± standard error over the seeds; ×10⁻³.")
    means = {method: curve[:, -1].mean(0).tolist() for method, curve in curves.items()}
    table = [
        [method, *(f"{1e3 * c[:, 0, i].mean():.2f} → {shown(c[:, -1, i], '.2f', 1e3)}"
                   for i in (0, 1))]
        for method, c in curves.items()
    ]  # fmt: skip
    page.table(["method", "all states", "states of the optimal trajectory"], table)
    about = "distance from the optimal transitions over the steps"
    with page.picture("curves.png", about, 1, 2, width=9, height=3.4) as (_, axes):
        colors = (plotting.BLUE, plotting.ORANGE, plotting.GREEN, plotting.PURPLE)
        dashes = {"IFT": "-", "SFT": "--", "ORPO": ":", "DPO": "-"}  # some lie on one another
        for i, name in enumerate(("all states", "states of the optimal trajectory")):
            for (method, curve), color in zip(curves.items(), colors, strict=True):
                line = dashes[method]
                band(axes[i], range(steps + 1), curve[..., i], line, color=color, label=method)
            axes[i].set(title=name, xlabel="step", ylabel="MSE of transitions", ylim=(0, None))
        axes[0].legend()
    orders = [" < ".join(sorted(METHODS, key=lambda m, i=i: means[m][i])) for i in (0, 1)]
    agrees = all(sorted(METHODS, key=lambda m, i=i: means[m][i])[0] == "DPO" for i in (0, 1))
    # The same seeds for all, so the difference is taken seed by seed.
    paired = curves["IFT"][:, -1] - curves["SFT"][:, -1]
    page.text(
        "Verdict",
        f"All states: {orders[0]}. On the trajectory: {orders[1]}. The published order "
        f"{'begins the same way' if agrees else 'does not appear in this setting'}. IFT less SFT, "
        f"paired by seed, ×10⁻³: {shown(paired[:, 0], '+.3f', 1e3)} and "
        f"{shown(paired[:, 1], '+.3f', 1e3)} (negative: IFT nearer). Neither trajectory "
        "visits every state, so the distance over all states can grow while the policy learns.",
    )
    page.numbers |= {"means": means, "orders": orders, "ift_less_sft": paired.mean(0).tolist(),
                     "standard_error": error_of(paired).tolist()}  # fmt: skip
    page.close()


if __name__ == "__main__":
    main(run, __doc__)
