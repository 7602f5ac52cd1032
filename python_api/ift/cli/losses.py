"""The losses of ``ift train``: one table, read by the parser, the validation and the trainers.

To add a loss, add a row to `LOSSES`, and to `PAIR_OPTIONS` each option that no other loss has.
"""

from __future__ import annotations

import argparse
import importlib
from collections import ChainMap
from collections.abc import Mapping
from typing import Any, NamedTuple

from ift.cli import processes
from ift.cli.arguments import (
    Option,
    flag_of,
    natural,
    not_negative,
    number,
    positive,
    positive_int,
    unit,
)
from ift.cli.errors import CliError

# Options that are None where they are not given: the loss has its own default.
SFT_OPTIONS = {
    "sft_mean": Option("mean over all target tokens, or over rows of the means of their tokens, as "
                       "IFT's (token)", choices=("token", "row")),
    "sft_scaling": Option("how much each token counts: by its probability (dft), by that to the "
                          "power of Σp² (deft), by the entropy (eaft), as in ift.losses.sft_loss "
                          "(none)", choices=("none", "dft", "deft", "eaft")),
    "kl_coef": Option("weight of the KL from the frozen model of --reference (0.1)", positive, "X"),
    "clip": Option("no gradient of a token that is 1 + ε times as likely as under the old policy "
                   "(0.28)", positive, "ε"),
    "old_steps": Option("optimizer steps between two old policies (8)", positive_int, "N"),
}  # fmt: skip
IFT_OPTIONS = {
    "lam": Option("weight of the predicted token in the residual (0.2)", unit("λ"), "λ"),
    "gamma": Option("decay of the propagation (0.95)", unit("γ"), "γ"),
    "objective": Option("formula of the loss (released)",
                        choices=("released", "paper", "algorithm1")),
    "propagation": Option("what is propagated (loss)", choices=("loss", "logps", "mask")),
    "side": Option("suffix or prefix sums (left)", choices=("left", "right")),
    "norm": Option("of the weights (L1)", choices=("L1", "L2", "softmax", "log")),
    "detach_weights": Option("no gradient through the weights (off)"),
    "rule": Option("of the predicted token (greedy)", choices=("greedy", "kth", "sample", "soft")),
    "k": Option("take the k-th best token (--rule kth; 2)", positive_int, "N"),
    "sample_temperature": Option("of --rule sample (0.7)", positive, "T"),
    "embedding_grad": Option("let the gradient reach the input embedding (off)"),
    "lambda_schedule": Option("of λ (constant)", choices=("constant", "linear")),
    "min_lam": Option("where the linear schedule starts (0)", unit("λ"), "λ"),
    "warmup_steps": Option("steps in which it reaches --lam (0)", natural, "N"),
    "lam_noise": Option("standard deviation σ: λ times 1 + σn, n ~ N(0, 1), at each step (0)",
                        not_negative, "σ"),
}  # fmt: skip
PAIR_OPTIONS = {
    "beta": Option("strength (0.1; simpo 2; slic 1)", positive, "β"),
    "dpo_kind": Option("formula (sigmoid), as in ift.losses.dpo_loss", str, "NAME"),
    "label_smoothing": Option("share of wrong labels (0)",
                              number("ε in [0, 0.5]", lambda x: 0 <= x <= 0.5), "ε"),
    "margin": Option("γ of simpo (1), δ of slic (1)", not_negative, "X"),
    "nll_weight": Option("of the likelihood of the chosen (1; dpo, slic 0)", not_negative, "X"),
    "length_normalized": Option("log-probabilities per token in place of sums (off)"),
    "desirable_weight": Option("of the good responses (1)", not_negative, "X"),
    "undesirable_weight": Option("of the bad responses (1)", not_negative, "X"),
    "reference": Option("reference model (--model before training); of pairs its log-probabilities "
                        "are kept in DIR/reference", str, "MODEL"),
}  # fmt: skip
OPTIONS = ChainMap(PAIR_OPTIONS, IFT_OPTIONS, SFT_OPTIONS)


class CliLoss(NamedTuple):
    """A loss of the command line.

    Args:
        builds: "module:name", imported when it trains: a module of `ift.losses` for preference
            losses, `ift.IFTConfig`, or a function here.
        options: option of the command line → parameter of `builds`.
        pairs: whether its rows hold a chosen and a rejected response.
        reference: whether it compares with a frozen model (``--reference``).
        single: whether its rows may also hold a single response and a label.
        fixed: further arguments of `builds`.
        trainer: "module:name" of the Trainer that takes it as `loss`; default `PairTrainer` or
            `RunTrainer`.
    """

    builds: str
    options: Mapping[str, str] = {}
    pairs: bool = False
    reference: bool = False
    single: bool = False
    fixed: Mapping[str, Any] = {}
    trainer: str | None = None

    @property
    def trainer_class(self) -> Any:
        """The Trainer that takes what it builds."""
        default = "ift.cli.preference:PairTrainer" if self.pairs else "ift.cli.trainer:RunTrainer"
        return imported(self.trainer or default)

    def takes(self, option: str) -> bool:
        """Whether the loss has this option of the command line."""
        return self.reference if option == "reference" else option in self.options

    @property
    def flags(self) -> dict[str, str]:
        """Parameter of `builds` → option of the command line."""
        return {parameter: name for name, parameter in self.options.items()}


LOSSES = {
    "sft": CliLoss("ift.cli.losses:sft_config", {"sft_mean": "mean", "sft_scaling": "scaling"}),
    "asft": CliLoss(
        "ift.cli.losses:asft_loss", {"sft_mean": "mean", "kl_coef": "kl_coef"}, reference=True
    ),
    "psft": CliLoss(
        "ift.cli.proximal:Proximal",
        {"clip": "clip", "old_steps": "old_steps"},
        trainer="ift.cli.proximal:ProximalTrainer",
    ),
    "ift": CliLoss("ift:IFTConfig", {name: name for name in (*IFT_OPTIONS, "seed")}),
    "dpo": CliLoss(
        "ift.losses:DPOLoss",
        {
            "beta": "beta",
            "label_smoothing": "label_smoothing",
            "dpo_kind": "kind",
            "length_normalized": "length_normalized",
            "nll_weight": "nll_weight",
        },
        pairs=True,
        reference=True,
    ),
    "kto": CliLoss(
        "ift.losses:KTOLoss",
        {
            name: name
            for name in ("beta", "desirable_weight", "undesirable_weight", "length_normalized")
        },
        pairs=True,
        reference=True,
        single=True,
    ),
    "orpo": CliLoss(
        "ift.losses:ORPOLoss", {"beta": "beta", "nll_weight": "nll_weight"}, pairs=True
    ),
    "simpo": CliLoss(
        "ift.losses:SimPOLoss",
        {"beta": "beta", "margin": "gamma", "label_smoothing": "label_smoothing"},
        pairs=True,
    ),
    "cpo": CliLoss(
        "ift.losses:CPOLoss",
        {name: name for name in ("beta", "nll_weight", "label_smoothing", "length_normalized")},
        pairs=True,
        fixed={"nll": "row"},  # the trainer counts pairs of a step, not chosen tokens
    ),
    "slic": CliLoss(
        "ift.losses:SLiCLoss",
        {
            "beta": "beta",
            "margin": "delta",
            "nll_weight": "nll_weight",
            "length_normalized": "length_normalized",
        },
        pairs=True,
    ),
}


def sft_config(mean: str = "token", scaling: Any = "none") -> Any:
    """None, which is cross-entropy, or what is left of IFT without its two parts: means over rows.

    With a `scaling` the loss that has it.

    >>> sft_config() is None, sft_config("row").lam, sft_config("row", "dft").reduction
    (True, 0.0, 'row_mean')
    """
    from ift.config import IFTConfig
    from ift.losses import SFTLoss

    if scaling != "none":
        return SFTLoss(reduction="mean" if mean == "token" else "row_mean", scaling=scaling)
    return None if mean == "token" else IFTConfig(lam=0.0, gamma=0.0, embedding_grad=True)


def asft_loss(mean: str = "token", kl_coef: float = 0.1) -> Any:
    """Anchored SFT: tokens count by their probability, near a frozen model.

    >>> asft_loss(kl_coef=0.2).kl_coef, asft_loss("row").reduction
    (0.2, 'row_mean')
    """
    from ift.losses import SFTLoss

    reduction: Any = "mean" if mean == "token" else "row_mean"
    return SFTLoss(reduction=reduction, scaling="dft", kl_coef=kl_coef)


def trainer_options(loss: Any) -> dict[str, Any]:
    """The argument of the trainers that takes what `build_loss` gives."""
    from ift.config import IFTConfig

    of_ift = loss is None or isinstance(loss, IFTConfig)
    return {"ift_config" if of_ift else "loss": loss}


def imported(path: str) -> Any:
    """What "module:name" names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def losses_with(option: str) -> tuple[str, ...]:
    """The losses that have an option of the command line."""
    return tuple(name for name, loss in LOSSES.items() if loss.takes(option))


def build_loss(arguments: argparse.Namespace) -> Any:
    """The `ift.IFTConfig` or loss module of the arguments; None for plain cross-entropy.

    Raises:
        CliError: an option outside its range, or one that another rules out.
    """
    loss = LOSSES[arguments.loss]
    _check_dpo_kind(arguments)
    build = imported(loss.builds)
    if arguments.preset is not None:
        build = getattr(build, arguments.preset)
    given = {parameter: getattr(arguments, option) for option, parameter in loss.options.items()}
    given = {parameter: value for parameter, value in given.items() if value is not None}
    try:
        return build(**given, **loss.fixed)
    except (TypeError, ValueError) as error:
        name, separator, problem = str(error).partition(": ")
        if not separator or name not in loss.flags:
            raise CliError("--loss", error) from None
        raise CliError(flag_of(loss.flags[name]), problem) from None


def _check_dpo_kind(arguments: argparse.Namespace) -> None:
    """Refuse the kinds of DPO that the trainer of pairs cannot serve."""
    from ift.losses.dpo import SORTED

    kind = arguments.dpo_kind
    if kind == "rejected_free":
        problem = "got rejected_free, whose rows are all chosen ones; expected a kind of pairs"
        raise CliError("--dpo-kind", problem)
    parts = arguments.accumulate * processes.count()
    if parts > 1 and kind in SORTED:
        problem = (
            f"got {kind}, which sorts all pairs of a step; expected --accumulate 1 "
            f"and one process, got {parts} parts of a step"
        )
        raise CliError("--dpo-kind", problem)
