"""`check`: is the fused loss right on this model, adapter, sharding and batch?"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ift.checking.as_found import (
    Gradients,
    as_found,
    causal_lm,
    changed_weights,
    whole,
)
from ift.checking.cause import (
    Cause,
    error_of,
    forward_cause,
    gradient_cause,
    hidden_error,
    same_mask,
)
from ift.checking.compare import (
    Comparison,
    compare,
    default_tolerance,
    ensure_patched,
    full_logits,
    has_plain_head,
    relative,
    worst_gradient,
)
from ift.checking.naive import IGNORE_INDEX
from ift.checking.parts import Parts, group, micro_batches
from ift.checking.passes import Pass, fused_pass, naive_pass
from ift.checking.report import CheckReport, CheckRow, refused, worst_of
from ift.checking.trace import trunk_inputs
from ift.config import IFTConfig

TRIAL = "cannot be patched"  # in refusals of `ift.patch` that rest on figures
# Times the tolerance, of gradients of a sum with terms of either sign.
WEIGHTED, WEIGHTED_16_BITS = 5, 2


def check(
    model: nn.Module,
    batch: dict[str, Any],
    *,
    ift: IFTConfig | None = None,
    loss: Callable[..., Tensor] | None = None,
    tolerance: float | None = None,
    shard: Callable[[nn.Module], nn.Module] | None = None,
) -> CheckReport:
    """Compare the fused loss of a model with the loss from its full logits, in every part.

    For your own model, adapter, sharding, attention and collated batch, in evaluation mode::

        naive = cross_entropy(model(**batch).logits[:, :-1], labels[:, 1:])  # or ift, or loss(...)
        fused = ift.patch(model)(**batch).loss

    Compared are the loss and every gradient; each token's log-probability, entropy and best token;
    a sum of log-probabilities with random weights and its gradients, which sees an upstream
    gradient that is dropped; the same after a change of the weights, which sees a copy that is
    kept too long; the loss and gradients of the batch in two parts, as a Trainer accumulates them
    (``num_items_in_batch``, `IFTConfig.num_rows`); the logits of the patched model without labels;
    what the trunk gets and gives. On a difference, the first one along the way from the inputs to
    the parameters' gradients is the `cause`. All of it is restored, as in
    `ift.checking.compare`, whose errors these are; weights that change get their signs back, bit
    by bit.

    In several processes every one calls it, each with its own batch under DDP or FSDP2; gradients
    are gathered, and the report is that of the worst process. With `shard` one process that is not
    sharded is what they are compared with.

    Args:
        model: a causal LM of transformers, or a PEFT model around one, or DDP around either;
            patched or not; sharded or not; any device and dtype.
        batch: its keyword arguments, as your collator makes them, with labels (B, T).
        ift: options of IFT, or
        loss: a function of (logprob, mask), (B, T), as that argument of a patched forward; a module
            of `ift.losses`. None of both: supervised fine-tuning.
        tolerance: the largest relative error; default 1e-5, or 4 epsilon of a dtype of 16 bits.
        shard: puts a patched copy of `model` into its wrapper, as ``fully_shard``; every process
            then has the same `model` and `batch`, and the copy takes the parts of the batch.

    Returns:
        The report; ``print`` shows it. A refusal by `ift.patch` is a report that is not `ok`.

    Raises:
        ValueError: labels are missing; IFT with rule "sample" or packed rows; `ift` and `loss`.
        Any exception of the model's own forward on this batch.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
    ...     num_attention_heads=4))
    >>> ids = torch.randint(61, (2, 9))
    >>> report = check(model, {"input_ids": ids, "labels": ids})
    >>> report.ok, report.cause
    (True, '')
    """
    batch = {"use_cache": False, **batch}  # with a cache transformers does not see packed rows
    tested = model if shard is None else _sharded_copy(model, shard)
    limit = default_tolerance(causal_lm(model)) if tolerance is None else tolerance
    options: dict[str, Any] = {"ift": ift, "loss": loss, "tolerance": limit, "tested": tested}
    compared = compare(model, batch, **options)
    refusal = compared.reason if compared.verdict == "refused" else ""
    trial = not refusal and shard is None
    if TRIAL in refusal:  # what is it that differs?
        without = compare(model, batch, **options, trial=False)
        if without.verdict in ("equal", "different"):
            compared = without
    about: dict[str, Any] = {
        "model": compared.model,
        "objective": compared.objective,
        "dtype": compared.dtype,
        "notes": (*([refusal] if refusal else ()), *compared.notes, *_notes(batch)),
    }
    if compared.verdict in ("refused", "failed"):
        stage: Any = "refused" if compared.verdict == "refused" else "exception"
        return _agreed(refused({**about, "notes": about["notes"][bool(refusal) :]},
                               Cause(stage, compared.reason)))  # fmt: skip
    if compared.verdict == "undecided":
        rows = tuple(_compared_rows(compared))
        return _agreed(refused(about, Cause("reference", compared.reason), rows))
    parts = Parts(batch, ift, loss, alone=shard is None)
    with as_found(model), full_logits(model, None if ift is None else ift.logits_dtype):
        naive = naive_pass(model, batch)
        plain = _logits(model, batch)
        in_parts = parts.naive(model)
        with changed_weights(model):
            later = naive_pass(model, batch)
            later.log_p = None
    try:
        with as_found(tested):
            ensure_patched(tested, trial=trial)
            if not trial:  # measure it, so that the pass is one forward
                fused_pass(tested, batch, backward=False)
            fused = fused_pass(tested, batch)
            our_logits = _logits(tested, batch)
            ours_in_parts = None if in_parts is None else parts.fused(tested)
            with changed_weights(tested):
                fused_later = fused_pass(tested, batch)
    except Exception as error:  # whatever another loss than the first one raises
        cause = Cause("exception", f"{type(error).__name__} with another loss: {error}")
        return _agreed(refused(about, cause, tuple(_compared_rows(compared))))
    found = _Found(compared, limit, fused, naive, fused_later, later, in_parts, ours_in_parts)
    rows = (*found.rows(), CheckRow("logits without labels", None, None,
                                    error_of(our_logits, plain), limit))  # fmt: skip
    if all(row.ok for row in rows):
        if refusal:  # of these tokens it is right
            return _agreed(refused(about, Cause("refused", refusal), rows))
        return _agreed(CheckReport(True, rows, "", **about))

    def products() -> Pass:
        with as_found(model), full_logits(model, None if ift is None else ift.logits_dtype):
            return naive_pass(model, batch, backward=False, keep_product=True)

    with as_found(tested):
        ensure_patched(tested, trial=trial)
        first = found.cause(tested, batch, products)
    if first is None:
        wrong = next(row for row in rows if not row.ok)
        first = Cause("full logits", f"{wrong.what} differ by {wrong.error:.1e}")
    return _agreed(CheckReport(False, rows, str(first), first.stage, **about))


def _sharded_copy(model: nn.Module, shard: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A patched copy in its wrapper; `model` itself where its kind of head is refused."""
    if not has_plain_head(causal_lm(model)):
        return model
    tested = copy.deepcopy(model)
    ensure_patched(tested, trial=False)
    return shard(tested)


class _Found:
    """What the passes gave, to compare part by part."""

    def __init__(
        self,
        compared: Comparison,
        limit: float,
        fused: Pass,
        naive: Pass,
        fused_later: Pass,
        naive_later: Pass,
        naive_in_parts: tuple[float, Gradients] | None,
        fused_in_parts: tuple[float, Gradients] | None,
    ) -> None:
        self.compared, self.limit = compared, limit
        short = compared.dtype in ("bfloat16", "float16")
        self.weighted = (WEIGHTED_16_BITS if short else WEIGHTED) * limit
        self.fused, self.naive = fused, naive
        self.later, self.naive_later = fused_later, naive_later
        self.fused_in_parts, self.naive_in_parts = fused_in_parts, naive_in_parts
        self.inputs = trunk_inputs(fused.trace, naive.trace, limit)

    def rows(self) -> list[CheckRow]:
        """The table."""
        fused, naive, limit = self.fused, self.naive, self.limit
        rows = _compared_rows(self.compared)
        rows.append(CheckRow("inputs of the trunk", error=math.inf if self.inputs else 0.0,
                             limit=limit, where=self.inputs))  # fmt: skip
        rows.append(CheckRow("hidden states at the head", error=hidden_error(fused, naive),
                             limit=limit))  # fmt: skip
        tokens = float(naive.mask.sum())  # type: ignore[union-attr]
        rows.append(CheckRow("tokens with a target", fused.metrics["tokens"], tokens,
                             0.0 if same_mask(fused, naive) else math.inf))  # fmt: skip
        ours = fused.argmax is not None and fused.mask is not None and naive.target is not None
        if ours and fused.argmax.shape == naive.target.shape:  # type: ignore[union-attr]
            right = (fused.argmax.to(naive.target.device) == naive.target) & naive.mask  # type: ignore[operator,union-attr]
            count = float(right.sum())
            rows.append(CheckRow("tokens predicted right", fused.metrics["correct"], count,
                                 abs(fused.metrics["correct"] - count)))  # fmt: skip
        rows += self._weighted("weighted tokens", fused, naive)
        rows += self._weighted("weights changed", self.later, self.naive_later)
        if self.fused_in_parts is not None and self.naive_in_parts is not None:
            (got, grads), (expected, theirs) = self.fused_in_parts, self.naive_in_parts
            error, name = worst_gradient(grads, theirs, limit)
            rows.append(CheckRow("in parts: loss", got, expected, relative(got, expected), limit))
            rows.append(CheckRow("in parts: gradient", error=error, limit=limit, where=name))
        for what, index, scale in (("seconds", 0, 1.0), ("peak memory in MiB", 1, 2.0**20)):
            both = [x / scale for cost in self.compared.costs if (x := cost[index]) is not None]
            if len(both) == 2:
                rows.append(CheckRow(what, both[0], both[1]))
        return rows

    def _weighted(self, what: str, got: Pass, expected: Pass) -> list[CheckRow]:
        limit = self.limit
        mask = expected.mask
        assert mask is not None and expected.logprob is not None
        same = got.logprob is not None and got.logprob.shape == expected.logprob.shape
        ours = got.logprob[mask.to(got.logprob.device)] if same else got.logprob  # type: ignore[index,union-attr]
        by_token = error_of(ours, expected.logprob[mask], 1.0)
        entropy = best = 0.0
        if same and by_token <= limit:
            of_mask = mask.to(got.logprob.device)  # type: ignore[union-attr]
            entropy = error_of(got.entropy[of_mask], expected.entropy[mask], 1.0)  # type: ignore[index]
            best = error_of(got.best[of_mask], expected.best[mask], 1.0)  # type: ignore[index]
        error, name = worst_gradient(got.gradients, expected.gradients, limit)
        return [
            CheckRow(f"{what}: log-probabilities", got.loss, expected.loss, by_token, limit),
            CheckRow(f"{what}: entropy, best", error=max(entropy, best), limit=10 * limit),
            CheckRow(f"{what}: hidden gradient", error=hidden_error(got, expected, "hidden_grad"),
                     limit=self.weighted),
            CheckRow(f"{what}: gradient", error=error, limit=self.weighted, where=name),
        ]  # fmt: skip

    def cause(
        self, model: nn.Module, batch: dict[str, Any], products: Callable[[], Pass]
    ) -> Cause | None:
        """What differs first; None if it is nothing of these."""
        limit, compared = self.limit, self.compared
        found = forward_cause(model, batch, self.fused, self.naive, limit, products)
        if found is not None:
            return found
        if not relative(self.fused.loss, self.naive.loss) <= 100 * limit:
            return Cause("auxiliary loss", f"a weighted sum is {self.fused.loss:.6g} in place of "
                         f"{self.naive.loss:.6g}, of the same log-probabilities")  # fmt: skip
        of_ift = compared.objective == "IFT"
        if not compared.errors["loss"] <= limit:
            ratio = compared.loss / compared.expected_loss if compared.expected_loss else math.inf
            text = f"the loss is {compared.loss:.6g}, {ratio:.4g} times the naive one"
            return Cause("two passes" if of_ift else "reduction", text)
        worst = worst_gradient(self.fused.gradients, self.naive.gradients, self.weighted)
        found = gradient_cause(model, self.fused, self.naive, self.weighted, worst)
        if found is not None:
            return found
        if not compared.errors["gradient"] <= limit:
            error, name = compared.errors["gradient"], compared.worst_parameter
            text = f"the gradient of {name} is off by {error:.1e} for the mean of the tokens alone"
            return Cause("two passes" if of_ift else "reduction", text)
        if compared.verdict != "equal":
            return Cause("two passes" if of_ift else "statistics", compared.reason)
        later = self._weighted("", self.later, self.naive_later)
        if not all(row.ok for row in later):
            what = "the hidden states" if not hidden_error(self.later, self.naive_later) <= limit \
                else "the log-probabilities" if not later[0].ok else "the gradients"  # fmt: skip
            return Cause("stale weight", f"with other weights {what} differ")
        if self.fused_in_parts is not None and self.naive_in_parts is not None:
            (got, grads), (expected, theirs) = self.fused_in_parts, self.naive_in_parts
            error, name = worst_gradient(grads, theirs, limit)
            if not relative(got, expected) <= limit or not error <= limit:
                ratio = got / expected if expected else math.inf
                return Cause("accumulation", f"the losses of the parts add up to {got:.6g}, "
                             f"{ratio:.4g} times the naive sum; gradients differ by {error:.1e}"
                             + (f" in {name}" if name else ""))  # fmt: skip
        wrong = [row for row in self.rows() if not row.ok]
        return Cause("statistics", f"{wrong[0].what}: {wrong[0].error:.1e}") if wrong else None


def _compared_rows(compared: Comparison) -> list[CheckRow]:
    limit = compared.tolerance
    names = {"loss": "loss", "logprob": "log-probability, worst token", "entropy": "entropy, sum",
             "gradient": "gradient, worst parameter"}  # fmt: skip
    rows = []
    for name, what in names.items():
        if name in compared.errors:
            both = (compared.loss, compared.expected_loss) if name == "loss" else (None, None)
            where = compared.worst_parameter if name == "gradient" else ""
            rows.append(CheckRow(what, both[0], both[1], compared.errors[name], limit, where))
    if "logprob" in compared.errors:
        rows.append(CheckRow("tokens with another best token", float(compared.wrong_argmax), 0.0,
                             float(compared.wrong_argmax)))  # fmt: skip
    return rows


@torch.no_grad()
def _logits(model: Any, batch: dict[str, Any]) -> Tensor:
    """Of the batch without labels, for the first row alone where rows are apart."""
    parts = micro_batches(batch, batch["labels"].shape[0])
    torch.manual_seed(0)
    given = {k: v for k, v in parts[0].items() if k not in ("labels", "shift_labels")}
    logits = whole(model(**given).logits)
    return logits[:, -64:].float()


def _notes(batch: dict[str, Any]) -> list[str]:
    """What is unusual in a batch, though both losses may agree on it."""
    labels, ids = batch["labels"], batch.get("input_ids")
    of_target = labels != IGNORE_INDEX
    notes = []
    if not bool(of_target.any()):
        notes.append("labels: no token has a target")
    if ids is not None and ids.shape == labels.shape:
        other = int((of_target & (labels != ids)).sum())
        if other:
            notes.append(f"labels: {other} of {int(of_target.sum())} targets are not the token of "
                         "input_ids at their place; transformers shifts labels itself")  # fmt: skip
    return notes


def _agreed(report: CheckReport) -> CheckReport:
    """The report of all processes: the worst rows, and the cause of the first that has one."""
    _, world = group()
    if world == 1:
        return report
    every: list[Any] = [None] * world
    torch.distributed.all_gather_object(every, report)
    first = next((r for r in every if not r.ok), report)
    same = len({len(r.rows) for r in every}) == 1
    rows = worst_of([r.rows for r in every]) if same else first.rows
    values = {**vars(first), "rows": rows, "processes": world}
    return CheckReport(**values)
