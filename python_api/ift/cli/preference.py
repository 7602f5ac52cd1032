"""Preference losses in ``ift train``: which there are, the frozen reference, and the trainer."""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object  # type: ignore[import-untyped]  # no annotations
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ift import losses
from ift.cli import processes
from ift.cli.errors import CliError
from ift.cli.models import load_model
from ift.cli.trainer import RunTrainer
from ift.data import Collator
from ift.head_pass import evaluating
from ift.integrations.transformers import count_flags
from ift.losses import Loss
from ift.losses.dpo import SORTED
from ift.patching import base_model, patch
from ift.preference_data import EncodedPairs


class Kind(NamedTuple):
    """A preference loss of the command line."""

    build: Callable[..., Loss]
    options: dict[str, str]  # option of the command line → of the loss
    reference: bool = False


KINDS = {
    "dpo": Kind(
        losses.DPOLoss,
        {"beta": "beta", "label_smoothing": "label_smoothing", "dpo_kind": "kind"},
        reference=True,
    ),
    "kto": Kind(losses.KTOLoss, {"beta": "beta"}, reference=True),
    "orpo": Kind(losses.ORPOLoss, {"beta": "beta", "nll_weight": "nll_weight"}),
    "simpo": Kind(
        losses.SimPOLoss,
        {"beta": "beta", "margin": "gamma", "label_smoothing": "label_smoothing"},
    ),
    "cpo": Kind(
        # Means over rows: the trainer counts pairs of a step, not chosen tokens.
        functools.partial(losses.CPOLoss, nll="row"),
        {"beta": "beta", "nll_weight": "nll_weight", "label_smoothing": "label_smoothing"},
    ),
    "slic": Kind(losses.SLiCLoss, {"beta": "beta", "margin": "delta", "nll_weight": "nll_weight"}),
}
METRICS = ("reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy",
           "logprob_chosen", "logprob_rejected", "kl")  # fmt: skip


def pair_loss(arguments: argparse.Namespace) -> Any:
    """The module of a preference loss, with the options given."""
    kind = KINDS[arguments.loss]
    if arguments.dpo_kind == "rejected_free":
        problem = "got rejected_free, whose rows are all chosen ones; expected a kind of pairs"
        raise CliError("--dpo-kind", problem)
    names = {ours: name for name, ours in kind.options.items()}
    given = {ours: getattr(arguments, name) for ours, name in names.items()}
    parts = arguments.accumulate * processes.count()
    if parts > 1 and arguments.dpo_kind in SORTED:
        problem = (
            f"got {arguments.dpo_kind}, which sorts all pairs of a step; expected --accumulate 1 "
            f"and one process, got {parts} parts of a step"
        )
        raise CliError("--dpo-kind", problem)
    try:
        return kind.build(**{name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        name, _, problem = str(error).partition(": ")
        raise CliError("--" + names.get(name, name).replace("_", "-"), problem) from None


# ---- the reference -------------------------------------------------------------------------------


@torch.no_grad()
def sequence_logprobs(
    model: nn.Module,
    examples: Iterable[dict[str, np.ndarray]],
    collate: Collator,
    batch_size: int,
    device: torch.device,
    *,
    bf16: bool = False,
) -> np.ndarray:
    """Summed log-probability of the targets of each example, float32 (n,); no logits are held.

    With `bf16` under autocast, as the policy is computed.
    """
    waiting, sums = list(examples), []
    order = sorted(range(len(waiting)), key=lambda i: len(waiting[i]["input_ids"]))

    def keep(logprob: Tensor, mask: Tensor) -> Tensor:
        sums.append((logprob * mask).sum(1).float().cpu())
        return logprob.new_zeros(())

    with evaluating(model), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        for first in range(0, len(order), batch_size):
            batch = collate([waiting[i] for i in order[first : first + batch_size]])
            model(**{k: v.to(device) for k, v in batch.items()}, loss=keep)
    found = np.empty(len(order), np.float32)
    found[order] = torch.cat(sums).numpy()
    return found


def fingerprint(model: nn.Module, examples: Iterable[dict[str, np.ndarray]], bf16: bool) -> str:
    """Hash of all that the log-probabilities depend on: weights, structure, data, precision."""
    digest = hashlib.sha256(repr(base_model(model)).encode())
    digest.update(b"bf16" if bf16 else b"")
    config = getattr(base_model(model), "config", None)
    digest.update(b"" if config is None else config.to_json_string().encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    for example in examples:
        for part in (example["input_ids"], example["labels"]):
            digest.update(np.int64(len(part)).tobytes() + part.tobytes())
    return digest.hexdigest()


def add_reference(
    data: EncodedPairs,
    model: nn.Module,
    collate: Collator,
    batch_size: int,
    device: torch.device,
    cache: Path,
    *,
    bf16: bool = False,
) -> bool:
    """Give every pair the reference sums of its sequences; from `cache` where they are known.

    A damaged file there is computed and written again.

    Returns:
        Were they found there?
    """
    file = cache / f"{fingerprint(model, data.sides(), bf16)}.npy"
    sums = _read_sums(file, sum(1 for _ in data.sides()))
    known = sums is not None
    if sums is None:
        patch(model)
        sums = sequence_logprobs(model, data.sides(), collate, 2 * batch_size, device, bf16=bf16)
        cache.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f".{file.stem}.{os.getpid()}.npy")
        np.save(unfinished, sums)
        unfinished.replace(file)
    if data.examples:
        for example, mine in zip(data.examples, sums.reshape(len(data.examples), -1), strict=True):
            example["reference"] = mine
    return known


def _read_sums(file: Path, count: int) -> np.ndarray | None:
    """The reference sums in a file of the cache; None if it is not there or not whole."""
    try:
        with file.open("rb") as stream:
            sums: np.ndarray = np.lib.format.read_array(stream, allow_pickle=False)
    except (OSError, EOFError, ValueError):
        return None
    return sums if sums.dtype == np.float32 and sums.shape == (count,) else None


def refer(
    arguments: argparse.Namespace,
    policy: tuple[Any, Any],
    rows: list[Any],
    sets: tuple[Any, ...],
    collator: Collator,
    device: torch.device,
) -> None:
    """Add the reference's log-probabilities to the pairs: of a model loaded here, or the policy.

    Args:
        policy: the model before training, or None if it is that no more, and the tokenizer.
    """
    model, tokenizer = policy
    if model is None:
        named = argparse.Namespace(**vars(arguments))
        named.model = arguments.reference or arguments.model
        flag = "--model" if arguments.reference is None else "--reference"
        model, own = load_model(named, rows, None, flag)
        check_same_tokens(named.model, own.get_vocab(), tokenizer.get_vocab())
    model.to(device)
    cache = Path(arguments.output) / "reference"
    for data in sets:
        if data.examples and add_reference(
            data, model, collator, arguments.batch_size, device, cache, bf16=arguments.bf16
        ):
            processes.note(
                f"reference log-probabilities of {len(data.examples)} pairs read from {cache}"
            )


def check_same_tokens(reference: str, theirs: dict[str, int], ours: dict[str, int]) -> None:
    """Refuse a reference model for which the ids of the data would be other tokens."""
    for token in sorted(theirs.keys() | ours.keys()):
        there, here = theirs.get(token), ours.get(token)
        if there != here:
            raise CliError(
                "--reference",
                f"{reference}: the token {token!r} is {there} in its tokenizer; expected {here} as "
                "in that of --model",
            )


# ---- the trainer ---------------------------------------------------------------------------------


NAMES = ("input_ids", "attention_mask", "labels")


class EvalPair(NamedTuple):
    """What the loss of an evaluated pair is made of."""

    chosen: Tensor  # log-probability of each target
    rejected: Tensor
    reference: list[float] | None  # sums of both
    kl: Tensor | None  # (3,), as `reference_point` takes them


class PairTrainer(RunTrainer):
    """A `RunTrainer` of a preference loss over batches of `PairCollator`.

    The loss is a mean over the pairs (KTO: rows) of the whole optimizer step. Evaluation calls it
    once, on the log-probabilities of the whole set, with one reference point (KTO) and one order
    (AOT) for all. Rewards and margins join both logs.

    Args:
        loss: a module of `ift.losses`.
        The rest: as `RunTrainer`.
    """

    rows_per_example = 2

    def __init__(self, *args: Any, loss: Loss, **kwargs: Any) -> None:
        self.pair_loss = loss
        self.paired = not isinstance(loss, losses.KTOLoss)
        self._eval_pairs: list[EvalPair] = []
        super().__init__(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """As the parent's, counting rows instead of tokens: what the losses are means over."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        if count is None:
            return batches, None
        flags = [torch.zeros_like(batch["labels"][:, 0]) for batch in batches]
        return batches, count_flags(self, flags, device)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a batch of pairs, and sums for the logs."""
        batch = {k: inputs[k] for k in NAMES}
        call: dict[str, Any] = {}
        if num_items_in_batch is not None and self.pair_loss.options.get("kind") not in SORTED:
            name, share = ("num_pairs", 2) if self.paired else ("num_rows", 1)
            call[name] = torch.as_tensor(num_items_in_batch) / share
        if not self.paired:
            call["kl"] = reference_point(self.accelerator.gather(self._kl_rows(model, inputs)))

        def loss(logprob: Tensor, mask: Tensor) -> Tensor:
            return self._loss(logprob, mask, inputs.get("reference"), **call)

        output = model(**batch, loss=loss)
        found = self.pair_loss.metrics
        tokens: Any = self._patched(model).ift_metrics
        zero = torch.zeros((), device=output.loss.device)
        pairs = batch["labels"].shape[0] / 2
        values = [found.get(name, zero).to(zero) * pairs for name in METRICS]
        values += [zero + pairs, *(tokens[k].to(zero) for k in ("correct", "entropy", "tokens"))]
        sums, seen = torch.stack(values), self._train_sums
        self._train_sums = sums if seen is None else seen.to(sums) + sums
        value = output.loss
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            value = value * self.accelerator.num_processes  # DDP averages
        return (value, output) if return_outputs else value

    def _loss(self, logprob: Tensor, mask: Tensor, reference: Tensor | None, **call: Any) -> Tensor:
        """The loss of rows of which the first half are chosen ones."""
        if reference is not None:
            call["reference"] = reference
        if not self.paired:
            rows = len(mask)
            call["desirable"] = torch.arange(rows, device=mask.device) < rows // 2
        value: Tensor = self.pair_loss(logprob, mask, **call)
        return value

    @torch.no_grad()
    def _kl_rows(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """What `reference_point` takes: prompts with other prompts' responses."""
        found: list[Tensor] = []

        def keep(logprob: Tensor, mask: Tensor) -> Tensor:
            own = ((logprob * mask).sum(1), mask.any(1), inputs["kl_reference"])
            found.append(torch.stack([part.to(logprob) for part in own], 1))
            return logprob.new_zeros(())

        with evaluating(self.accelerator.unwrap_model(model)):
            model(**{k: inputs[f"kl_{k}"] for k in NAMES}, loss=keep)
        return found[0]

    # ---- evaluation ----

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the parent's."""
        self._eval_pairs = []
        return super().evaluation_loop(*args, **kwargs)

    def _score(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Keep the log-probabilities of a batch, whose loss is part of that of the whole set."""
        kept: list[tuple[Tensor, Tensor]] = []

        def keep(logprob: Tensor, mask: Tensor) -> Tensor:
            kept.append((logprob.float().cpu(), mask.cpu()))
            return logprob.new_zeros(())

        model(**{k: inputs[k] for k in NAMES}, loss=keep)
        ((logprob, mask),) = kept
        self._add_eval(logprob.new_zeros((), device=self.args.device), model)
        count = len(mask) // 2
        reference, kl = inputs.get("reference"), None
        if not self.paired:
            kl = self._kl_rows(model, inputs).cpu()
        for i in range(count):
            if not mask[i].any():  # a pair that fills up the last batch
                continue
            chosen, rejected = (logprob[j][mask[j]] for j in (i, i + count))
            sums = None if reference is None else [float(reference[j]) for j in (i, i + count)]
            self._eval_pairs.append(EvalPair(chosen, rejected, sums, None if kl is None else kl[i]))

    def _eval_metrics(
        self, total: float, tokens: float, correct: float, entropy: float
    ) -> dict[str, float]:
        """The loss of all pairs of the set in one call, and what it reports."""
        pairs = gather_object(self._eval_pairs)
        sides = [pair[side] for side in (0, 1) for pair in pairs]
        logprob = pad_sequence(sides, batch_first=True)
        mask = pad_sequence([torch.ones_like(side) for side in sides], batch_first=True).bool()
        reference, call = None, {}
        if pairs[0].reference is not None:
            reference = torch.tensor([pair.reference[side] for side in (0, 1) for pair in pairs])
        if not self.paired:
            call["kl"] = reference_point(torch.stack([pair.kl for pair in pairs]))
        value = self._loss(logprob, mask, reference, **call)
        found = self.pair_loss.metrics
        means = super()._eval_metrics(total, tokens, correct, entropy)
        means |= {name: float(found[name]) for name in METRICS if name in found}
        return {**means, "loss": float(value)}

    def _train_metrics(self) -> dict[str, float]:
        sums, self._train_sums = self._train_sums, None
        if sums is None:
            return {}
        *metrics, pairs, correct, entropy, tokens = self.accelerator.reduce(sums, "sum").tolist()
        kept = {name: value / max(pairs, 1.0) for name, value in
                zip(METRICS, metrics, strict=True) if name in self.pair_loss.metrics}  # fmt: skip
        tokens = max(tokens, 1.0)
        return {**kept, "token_accuracy": correct / tokens, "entropy": entropy / tokens}


def reference_point(rows: Tensor) -> Tensor:
    """KTO's reference point of rows (N, 3): log-probability, 1 if the row has targets, reference.

    The log-probabilities are sums over a row.
    """
    return losses.kto_kl(rows[:, :1], rows[:, 1:2], rows[:, 2])
