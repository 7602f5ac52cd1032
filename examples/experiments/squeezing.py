"""Softmax regression: what one negative gradient does, and how exact the first-order forms are."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from examples.experiments.page import Page, main
from ift import plotting
from ift_kernels import influence

V, D = 50, 5  # of the comparison with `influence`


@dataclass(frozen=True)
class Case:
    """One gradient step on the loss of a softmax regression, and its published figures.

    W ← W − η·sign·outer(x, p − e_y), p = softmax(xᵀW): towards y where sign is 1, away where −1.
    """

    name: str
    x: Tensor  # (features,)
    weight: Tensor  # (features, classes)
    y: int
    sign: int
    eta: float
    # "before → after" in the digits of the publication; None where it has no figure.
    argmax: str | None = None
    p_y: str | None = None
    rise: str | None = None

    @property
    def probabilities(self) -> tuple[Tensor, Tensor]:
        """p before the step and after it, (classes,) fp64."""
        y = one_hot(self.weight.shape[1], self.y)
        after = descend(self.weight, self.x, y, self.eta * self.sign)
        return (self.x @ self.weight).softmax(0), (self.x @ after).softmax(0)

    def measured(self) -> dict[str, str]:
        """The figures of the publication, in as many digits (by default four).

        The other classes are those but y and the most likely one before the step.
        """
        p, q = self.probabilities
        top = int(p.argmax())
        others = torch.ones(len(p), dtype=torch.bool)
        others[[self.y, top]] = False
        digits = 4 if self.argmax is None else len(self.argmax.split(" ")[0]) - 2
        return {
            "argmax": f"{p[top]:.{digits}f} → {q[top]:.{digits}f}",
            "p_y": f"{p[self.y]:.2e} → {q[self.y]:.2e}",
            "rise": f"{int((q > p)[others].sum())} of {int(others.sum())}",
        }

    def published(self) -> dict[str, str | None]:
        """The same from the publication."""
        return {"argmax": self.argmax, "p_y": self.p_y, "rise": self.rise}

    def agrees(self) -> bool:
        """Whether every published figure is the measured one, to the digits given."""
        measured = self.measured()
        return all(v is None or v == measured[k] for k, v in self.published().items())


def one_hot(classes: int, *on: int) -> Tensor:
    """(classes,) fp64, 1 at each of `on`."""
    y = torch.zeros(classes, dtype=torch.float64)
    y[list(on)] = 1
    return y


def descend(weight: Tensor, x: Tensor, y: Tensor, eta: float) -> Tensor:
    """W − η·outer(x, softmax(xᵀW) − y)."""
    return weight - eta * torch.outer(x, (x @ weight).softmax(0) - y)


def cases() -> list[Case]:
    """The setting of arXiv 2407.10490's squeezing notebook, drawn in its order."""
    draw = np.random.RandomState(10086)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(draw.standard_normal(shape))

    x = normal(4)
    random, flat, peaked = normal(4, 50), 1 + 0.05 * normal(4, 50), normal(4, 50)
    # One step towards eight classes at once makes the third of them peaked.
    peaked = descend(peaked, x, one_hot(50, *range(5, 13)), 1.0)
    large_x, large = normal(50), 0.5 * normal(50, 1000)
    return [
        Case("A: random, towards 21", x, random, 21, 1, 0.5),
        Case("B: flat, away from 42", x, flat, 42, -1, 0.3,
             "0.0278 → 0.0291", rise="48 of 48"),
        Case("C: peaked, away from 11 (likely)", x, peaked, 11, -1, 0.5,
             "0.7627 → 0.9871", rise="0 of 48"),
        Case("D: peaked, away from 42 (valley)", x, peaked, 42, -1, 0.5,
             "0.7627 → 0.9863", "4.03e-10 → 5.47e-14", "0 of 48"),
        Case("E: 1000 classes, away from 100", large_x, large, 100, -1, 1.0,
             "0.512 → 1.000", rise="0 of 998"),
    ]  # fmt: skip


def lemma(draws: int) -> dict[str, int]:
    """Counts of violations over random logits, tokens and steps."""
    g = torch.Generator().manual_seed(1)
    wrong = {"p_y rose": 0, "argmax fell": 0, "sign of another token": 0}
    for _ in range(draws):
        size = int(torch.randint(3, 200, (1,), generator=g))
        spread = 6 * torch.rand(1, generator=g).double()
        z = spread * torch.randn(size, generator=g, dtype=torch.float64)
        p = z.softmax(0)
        y = int(torch.randint(size, (1,), generator=g))
        step = torch.exp(-6 * torch.rand(1, generator=g).double())
        after = (z - step * (torch.eye(size, dtype=torch.float64)[y] - p)).log_softmax(0)
        change = after - z.log_softmax(0)
        top = int(p.argmax())
        wrong["p_y rose"] += int(change[y] > 0)
        wrong["argmax fell"] += int(top != y and change[top] < -1e-15)
        # To first order, so for a small step, and where the margin is beyond its second order.
        small = 1e-6
        after = (z - small * (torch.eye(size, dtype=torch.float64)[y] - p)).log_softmax(0)
        change, margin = after - z.log_softmax(0), p - p.square().sum() + p[y]
        clear = (margin.abs() > 1e-4) & (torch.arange(size) != y)
        wrong["sign of another token"] += int(((change > 0) != (margin > 0))[clear].any())
    return wrong


def first_order() -> list[list[float]]:
    """η and the largest error of `influence` against a real step of the head."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    w, x, o = normal(V, D), normal(16, D), normal(20, D)
    y, y_o = (torch.randint(V, (n,), generator=g) for n in (16, 20))
    gradient = ((x @ w.T).softmax(1) - torch.eye(V, dtype=torch.float64)[y]).T @ x
    found = []
    for lr in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
        predicted = influence(o, y_o, x, y, w, lr=lr).sum(1)
        logp = [(o @ weight.T).log_softmax(1).gather(1, y_o[:, None])[:, 0]
                for weight in (w, w - lr * gradient)]  # fmt: skip
        found.append([lr, (predicted - (logp[1] - logp[0])).abs().max().item()])
    return found


def run(output: Path, quick: bool) -> None:
    """Write the page."""
    page = Page("squeezing", "Squeezing in softmax regression", output)
    every = cases()
    page.text(
        "Expected",
        "A negative gradient on a valley token of a peaked distribution takes mass from all tokens "
        "and gives it to the argmax; on a flat distribution the mass spreads.",
        "The published run (arXiv 2407.10490) is complete and is repeated here in fp64: numpy's "
        "generator seeded 10086; standard normal draws x (4), W_random (4×50), W_flat = 1 + .05 × "
        "a draw, W_peaked = a draw and one step W − outer(x, p − y) with y = 1 at classes 5 to 12; "
        "last, for E, x (50) and W = .5 × a draw (50×1000). Each case is one step with "
        + ", ".join(f"η = {case.eta} ({case.name[0]})" for case in every)
        + ".",
    )
    rows = []
    for case in every:
        measured, published = case.measured(), case.published()
        rows.append([case.name] + [f"{each[key] or '–'}" for key in measured
                                   for each in (published, measured)])  # fmt: skip
    page.text("Measured", "Others are all classes but y and the argmax before the step; – where "
              "the publication has no figure.")  # fmt: skip
    page.table(["case", "argmax, published", "measured", "p_y, published", "measured",
                "others that rise, published", "measured"], rows)  # fmt: skip
    about = "probabilities before and after, by case"
    with page.picture("curves.png", about, 2, 3, width=12, height=6) as (_, axes):
        for axis, case in zip(axes.flat, every, strict=False):
            p, q = case.probabilities
            order = p.argsort(descending=True)
            axis.semilogy(p[order], color=plotting.BLUE, label="before")
            axis.semilogy(q[order], color=plotting.ORANGE, label="after")
            axis.axvline(int((order == case.y).nonzero()), color="#555555", linestyle=":",
                         label="y")  # fmt: skip
            axis.set(title=case.name, xlabel="tokens, most likely first", ylabel="p")
        axes[1, 2].set_axis_off()
        axes[0, 0].legend()
    draws = 200 if quick else 5000
    wrong, errors = lemma(draws), first_order()
    page.text(
        "The lemma",
        f"{draws} random draws (3 to 200 tokens, spread 0 to 6, step e⁻⁶ to 1): "
        + ", ".join(f"{name}: {count}" for name, count in wrong.items())
        + ". The last is the rule that j ≠ y rises iff p_j > ‖p‖² − p_y, to first order in the "
        "step.",
    )
    ratios = [a[1] / b[1] for a, b in itertools.pairwise(errors)]
    page.text(
        "First order",
        "`ift_kernels.influence` against a real SGD step of the head alone (16 tokens trained, 20 "
        "watched): the error must fall about 100× for each 10× smaller η.",
    )
    page.table(
        ["η", "largest error (nats)", "fell by"],
        [[lr, e, "" if i == 0 else f"{ratios[i - 1]:.0f}×"] for i, (lr, e) in enumerate(errors)],
    )
    held = not any(wrong.values()) and all(50 <= r <= 200 for r in ratios[1:])
    differ = [case.name[0] for case in every if not case.agrees()]
    page.text(
        "Verdict",
        ("Every published figure is reproduced to its digits" if not differ
         else f"The figures of {', '.join(differ)} differ from the published ones")
        + f"; lemma and first order {'hold' if held else 'do not hold everywhere'}.",
    )  # fmt: skip
    page.numbers |= {
        "cases": {
            case.name[0]: {
                "p_y": [p[case.y].item() for p in case.probabilities],
                "argmax": [p[case.probabilities[0].argmax()].item() for p in case.probabilities],
                "others that rise": case.measured()["rise"],
                "published": case.published(),
            }
            for case in every
        },
        "lemma": {"draws": draws, **wrong},
        "first_order": errors,
    }
    page.close()


if __name__ == "__main__":
    main(run, __doc__)
