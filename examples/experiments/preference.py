"""SFT, then off-policy DPO after 1 and 10 epochs, on-policy negatives, and "extend", all probed."""

from __future__ import annotations

import copy
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from examples.experiments.page import Page, band, error_of, main, shown
from examples.experiments.tiny_lm import LENGTH, Lab, callback
from ift import plotting
from ift.dynamics import build_probe_set, sampler
from ift.dynamics.callback import read_records
from ift.dynamics.report import STYLES, ordered_types

LR, BETA = 1e-4, 0.1
EPOCHS, SEEDS = 10, 4
ONE, TEN, EXTEND, OWN, GUARD = (
    "off-policy, SFT 1 epoch", f"off-policy, SFT {EPOCHS} epochs", "extend (SFT on both)",
    "on-policy negatives", "valley guard (ours)",
)  # fmt: skip
# What is followed over a run: title, type of answer, statistic.
FOLLOWED = {
    "chosen": ("chosen", "mean_logprob"),
    "rejected": ("rejected", "mean_logprob"),
    "greedy": ("chosen", "greedy_logprob"),
    "sample": ("sample", "mean_logprob"),
    "other train": ("other_train", "mean_logprob"),
}
Records = list[dict[str, Any]]


class Seed(NamedTuple):
    """What one seed measured."""

    pairs: int
    own: int  # pairs with a sample of the model in place of the rejected answer
    probes: int
    sft: Records
    dpo: dict[str, Records]
    valley: dict[str, float]  # share of the negative tokens that lie in the valley


def one_seed(lab: Lab, seed: int, quick: bool, work: Path) -> Seed:
    """All runs; the seed draws initial weights, pairs, order of the rows, probes and samples."""
    lab.seed = seed
    base = lab.base(epochs=3 if not quick else 1)
    draw = random.Random(seed)
    rows = [r for r in lab.rows if lab.fits(r, "completion")]
    answers = [r["completion"] for r in rows]
    pairs = [
        {"prompt": r["prompt"], "chosen": r["completion"], "completion": r["completion"],
         "rejected": next(a for a in draw.sample(answers, 4) if a != r["completion"])}
        for r in rows
    ]  # fmt: skip
    ask = sampler(base, lab.tokenizer, max_new_tokens=12, seed=seed)
    some = pairs[: 120 if not quick else 10]  # of DPO; own answers are drawn one at a time
    probes = build_probe_set(some, size=16 if not quick else 2, test=lab.test_rows, sample=ask,
                             seed=seed)  # fmt: skip
    steps, every, epochs = (90, 15, EPOCHS) if not quick else (2, 1, 1)

    # --- supervised, kept after one epoch and after all ---
    sft_one = lab.sft(copy.deepcopy(base), pairs, 1, name="sft, 1 epoch")
    sft_ten = copy.deepcopy(base)
    probe = callback(probes, work / "sft", 20 if not quick else 1)
    lab.sft(sft_ten, pairs, epochs, callback=probe, name=f"sft, {epochs} epochs")
    both = [{**p, "completion": p[key]} for p in pairs for key in ("chosen", "rejected")]
    extended = lab.sft(copy.deepcopy(base), both, epochs, name="sft on both")
    asked = [p["prompt"] for p in some]
    drawn = sampler(sft_ten, lab.tokenizer, max_new_tokens=24, seed=seed + 1)(asked)
    own = [{**p, "rejected": a} for p, a in zip(some, drawn, strict=True) if a.strip()]

    # --- DPO ---
    settings: dict[str, tuple[Any, Any, bool]] = {
        ONE: (sft_one, some, False),
        TEN: (sft_ten, some, False),
        EXTEND: (extended, some, False),
        OWN: (sft_ten, own, False),
        GUARD: (sft_ten, some, True),
    }
    runs, valley = {}, {}
    for number, (name, (model, data, guard)) in enumerate(settings.items()):
        place = work / f"dpo{number}"
        count = lab.dpo(model, data, steps, lr=LR, beta=BETA, guard=guard, name=name,
                        callback=callback(probes, place, every))  # fmt: skip
        runs[name] = read_records(place)
        valley[name] = count.valley_tokens / max(1, count.negative_tokens)
    sft = read_records(work / "sft")
    return Seed(len(pairs), len(own), len(probes), sft, runs, valley)


def values(runs: Sequence[Records], kind: str, key: str) -> Tensor:
    """(seeds, evaluations), fp64."""
    each = [[record["types"][kind][key] for record in records] for records in runs]
    return torch.tensor(each, dtype=torch.float64)


def change(runs: Sequence[Records], kind: str, key: str) -> Tensor:
    """(seeds,): last evaluation less the first."""
    found = values(runs, kind, key)
    return found[:, -1] - found[:, 0]


def draw_band(axes: Any, runs: Sequence[Records], kind: str, key: str, **style: Any) -> None:
    """A line of means and a band of standard errors over the steps."""
    band(axes, [record["step"] for record in runs[0]], values(runs, kind, key), **style)


def draw_sft(page: Page, seeds: Sequence[Seed]) -> None:
    """Every type of answer under supervised fine-tuning."""
    runs = [seed.sft for seed in seeds]
    titles = {"mean_logprob": "log-probability of a token", "off_argmax": "mass off the argmax"}
    about = "curves of supervised fine-tuning; bands: standard error over seeds"
    with page.picture("sft.png", about, 1, 2, width=10, height=4.2) as (figure, axes):
        for axis, (key, title) in zip(axes, titles.items(), strict=True):
            for kind in ordered_types(runs[0]):
                draw_band(axis, runs, kind, key, label=kind, **STYLES.get(kind, {}))
            axis.set(title=title, xlabel="step")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))


def draw_dpo(page: Page, seeds: Sequence[Seed]) -> None:
    """A panel for what is followed, a line for each run, as changes since the first evaluation."""
    about = "curves of the DPO runs; bands: standard error over seeds"
    with page.picture("dpo.png", about, 2, 3, width=12, height=6.4) as (figure, axes):
        panels = list(axes.flat)
        for panel, (title, (kind, key)) in zip(panels, FOLLOWED.items(), strict=False):
            for style, name in zip(plotting.styles(5), (ONE, TEN, EXTEND, OWN, GUARD), strict=True):
                runs = [_since_first(seed.dpo[name]) for seed in seeds]
                draw_band(panel, runs, kind, key, label=name, **style)
            panel.axhline(0, color="#888888", linewidth=0.7)
            about = "greedy token in place of chosen" if title == "greedy" else title
            panel.set(title=about, xlabel="step")
        handles, labels = panels[0].get_legend_handles_labels()
        panels[-1].axis("off")
        panels[-1].legend(handles, labels, loc="center")
        figure.supylabel("change since step 0 (nats per token)")


def _since_first(records: Records) -> Records:
    first = records[0]["types"]
    return [
        {"step": r["step"], "types": {kind: {key: value - first[kind][key]
         for key, value in stats.items()} for kind, stats in r["types"].items()}}
        for r in records
    ]  # fmt: skip


def trends_of(seeds: Sequence[Seed]) -> dict[str, Tensor]:
    """(seeds,) each, above 0 where the trend appears."""

    def sft(kind: str) -> Tensor:
        return change([seed.sft for seed in seeds], kind, "mean_logprob")

    def dpo(name: str, what: str) -> Tensor:
        return change([seed.dpo[name] for seed in seeds], *FOLLOWED[what])

    ten = dpo(TEN, "chosen")
    return {
        "SFT raises chosen": sft("chosen"),
        "SFT raises another question's answer": sft("other_train"),
        "SFT lowers random words": -sft("random_words"),
        "off-policy DPO lowers chosen": -ten,
        "off-policy DPO lowers rejected": -dpo(TEN, "rejected"),
        "the argmax rises under it": dpo(TEN, "greedy"),
        "more SFT epochs: chosen falls more": dpo(ONE, "chosen") - ten,
        '"extend": chosen falls less': dpo(EXTEND, "chosen") - ten,
        "on-policy negatives: chosen falls less": dpo(OWN, "chosen") - ten,
        "valley guard: chosen falls less (no published trend)": dpo(GUARD, "chosen") - ten,
    }


def judged(each: Tensor) -> str:
    """Does the trend appear: by more than two standard errors, and in every seed?"""
    one_sign = bool((each > 0).all() or (each < 0).all())
    if not one_sign or each.mean().abs() <= 2 * error_of(each):
        return "not clear"
    return "yes" if each.mean() > 0 else "no, the opposite"


def run(output: Path, quick: bool) -> None:
    """Write the page."""
    page = Page("preference", "SFT and DPO of a small model, probed", output)
    lab = Lab(rows=400 if not quick else 40, base_rows=4000 if not quick else 64)
    seeds = []
    for seed in range(SEEDS if not quick else 2):
        with tempfile.TemporaryDirectory() as work:
            seeds.append(one_seed(lab, seed, quick, Path(work)))
    first = seeds[0]
    page.text(
        "Setting",
        f"Docstrings of the standard library (prompt → first words), {first.pairs} pairs, at most "
        f"{LENGTH} tokens, {first.probes} probes; a rejected answer is another row's (off-policy). "
        f"Llama, 2 layers, width 96, V = {len(lab.tokenizer)}, first trained 3 epochs on other "
        f'docstrings. SFT: AdamW 5e-4, batch 16, {EPOCHS} epochs; "extend" as many on chosen and '
        f"rejected answers, which is twice the updates. DPO: {first.dpo[TEN][-1]['step']} steps of "
        f"8 pairs, AdamW {LR:g}, β = {BETA}, on 120 of the pairs. On-policy: in place of the "
        "rejected answers stand samples of the model after SFT "
        f"({min(s.own for s in seeds)} or more are not empty); the probes' rejected answers are "
        f"then not trained on. {len(seeds)} seeds of initial weights, order, rejected answers, "
        "probes and samples; the rows are the same.",
    )
    page.text(
        "Expected",
        "SFT raises chosen steadily; another question's answer keeps rising too; random words "
        "fall. Off-policy DPO lowers chosen and rejected while the argmax rises (squeezing), "
        'harder after more SFT epochs; SFT on rejected answers too ("extend") and on-policy '
        "negatives soften it.",
    )
    page.text("Measured: SFT", "Nats per token, mean ± standard error over the seeds.")
    runs = [seed.sft for seed in seeds]
    steps = [runs[0][i]["step"] for i in (0, -1)]
    rows = []
    for kind in ordered_types(runs[0]):
        logprob, greedy = (values(runs, kind, k) for k in ("mean_logprob", "greedy_logprob"))
        rows.append([kind, *(shown(logprob[:, i]) for i in (0, -1)),
                     shown(change(runs, kind, "mean_logprob"), "+.3f"),
                     *(f"{greedy[:, i].mean():.3f}" for i in (0, -1))])  # fmt: skip
    head = [f"{what}, step {step}" for what in ("logp", "greedy") for step in steps]
    page.table(["type", *head[:2], "change", *head[2:]], rows)
    draw_sft(page, seeds)
    page.text("Measured: DPO", "Changes over the run, nats per token, mean ± standard error over "
              "the seeds; greedy: the argmax in place of the chosen answer.")  # fmt: skip
    rows = []
    for name in (ONE, TEN, EXTEND, OWN, GUARD):
        each = [seed.dpo[name] for seed in seeds]
        flagged = sum(any(r["squeeze"]["flag"] for r in records) for records in each)
        share = torch.tensor([100 * seed.valley[name] for seed in seeds])
        rows.append([name, *(shown(change(each, *what), "+.3f") for what in FOLLOWED.values()),
                     shown(share, ".1f", unit=" %"), f"{flagged} of {len(seeds)}"])  # fmt: skip
    page.table(["run", *FOLLOWED, "negative tokens in the valley", "seeds flagged"], rows)
    draw_dpo(page, seeds)

    trends = trends_of(seeds)
    page.text("Verdict", *_verdict(seeds, trends))
    page.table(
        ["trend", "appears", "by (nats per token)", "seeds that show it"],
        [[k, judged(v), shown(v, "+.3f"), f"{int((v > 0).sum())} of {len(seeds)}"]
         for k, v in trends.items()],
    )  # fmt: skip
    page.numbers |= {
        "seeds": [
            {
                "valley": seed.valley,
                "sft": _columns(seed.sft),
                "dpo": {name: _columns(records) for name, records in seed.dpo.items()},
            }
            for seed in seeds
        ],
        "trends": {k: {"each": v.tolist(), "appears": judged(v)} for k, v in trends.items()},
    }
    page.close()


def _columns(records: Records) -> dict[str, Any]:
    """What the tables and pictures are made of: type → statistic → a text of values by step."""
    keys = ("mean_logprob", "greedy_logprob", "off_argmax")
    types = {
        kind: {key: " ".join(f"{r['types'][kind][key]:.5f}" for r in records) for key in keys}
        for kind in ordered_types(records)
    }
    flags = [r["step"] for r in records if r["squeeze"]["flag"]]
    return {"steps": " ".join(str(r["step"]) for r in records), "flagged": flags, **types}


def _verdict(seeds: Sequence[Seed], trends: dict[str, Tensor]) -> list[str]:
    clear = sum(judged(each) == "yes" for each in trends.values())
    text = [
        f"One small model: directions, not sizes. {clear} of {len(trends)} trends appear, by more "
        "than two standard errors and in every seed."
    ]
    runs = [seed.dpo[TEN] for seed in seeds]
    if judged(trends["off-policy DPO lowers chosen"]) == "yes" and (
        judged(trends["the argmax rises under it"]) != "yes"
    ):
        peak = 1 - values(runs, "chosen", "off_argmax")[:, 0].mean()
        text.append(
            "Chosen answers fall, but the mass does not go to the argmax, so this is not squeezing "
            f"as the lemma has it. Before DPO the argmax has a mean p of {peak:.2f} here, and by "
            "the lemma it is peaked distributions that squeeze; that this is the cause is not "
            "shown."
        )
    return [" ".join(text)]


if __name__ == "__main__":
    main(run, __doc__)
