"""Compare the fused loss of a model, under `ift.patch`, with the same loss from its full logits."""

from __future__ import annotations

import contextlib
import inspect
import math
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import ift_kernels
from ift.checking.as_found import (
    Cost,
    Gradients,
    as_found,
    causal_lm,
    for_capture,
    logged_warnings,
    metered,
    take_gradients,
)
from ift.checking.naive import (
    IGNORE_INDEX,
    NaivePass,
    float32_product,
    naive_ift,
    naive_loss,
    naive_sft,
)
from ift.config import IFTConfig
from ift.head_options import HeadOptions
from ift.head_pass import plain_head
from ift.patching import head_options, patch, unpatch

Verdict = Literal["equal", "different", "refused", "failed", "undecided"]
REFUSALS = (TypeError, ValueError, RuntimeError, NotImplementedError)


@dataclass(frozen=True)
class Comparison:
    """Result of `compare`. ``str()`` is a report in one line.

    Attributes:
        model: class name of the causal LM.
        objective: "SFT", "IFT" or "loss", another one.
        dtype: of its parameters, as "float32".
        verdict: "equal"; "different"; "refused", with a message that names the model at patch, or
            the model or an argument at its forward; "failed", with any other exception;
            "undecided", where figures cannot be compared (see `reason`).
        reason: the message, or what differs; empty for "equal".
        refused_at: "patch" or "forward", where `verdict` is "refused".
        tolerance: the largest error that is still "equal".
        loss, expected_loss: fused and naive.
        errors: each relative to the naive figure: "loss"; "logprob", the worst target; "entropy",
            summed over targets; "gradient", the worst parameter.
        worst_parameter: the name of that parameter.
        tokens: targets in the batch.
        wrong_argmax: targets with another argmax than the naive logits have, ties excepted.
        notes: warnings of the package, such as that prompts are not shared.
        costs: of the fused forward and backward, and of the naive ones.
    """

    model: str
    objective: str
    dtype: str
    verdict: Verdict
    reason: str = ""
    refused_at: str = ""
    tolerance: float = 0.0
    loss: float = math.nan
    expected_loss: float = math.nan
    errors: dict[str, float] = field(default_factory=dict)
    worst_parameter: str = ""
    tokens: int = 0
    wrong_argmax: int = 0
    notes: tuple[str, ...] = ()
    costs: tuple[Cost, ...] = ()

    def __str__(self) -> str:
        text = f"{self.model} {self.objective} ({self.dtype}): {self.verdict}"
        if self.refused_at:
            text += f" at {self.refused_at}"
        if self.errors:
            worst = ", ".join(f"{name} {error:.1e}" for name, error in self.errors.items())
            text += (
                f", loss {self.loss:.6g} against {self.expected_loss:.6g} over {self.tokens} "
                f"tokens; relative errors: {worst}"
            )
            text += f" in {self.worst_parameter}" if self.worst_parameter else ""
            text += f" (limit {self.tolerance:.0e})"
        return text + (f": {self.reason}" if self.reason else "")


def compare(
    model: nn.Module,
    batch: dict[str, Any],
    *,
    ift: IFTConfig | None = None,
    loss: Callable[..., Tensor] | None = None,
    tolerance: float | None = None,
    tested: nn.Module | None = None,
    trial: bool = True,
) -> Comparison:
    """Compute a loss and its gradients twice, fused and from full logits, and compare them.

    SFT is compared with the loss that the model computes itself; IFT with two full forwards on
    token ids, whose input embeddings a hook replaces, and another loss with itself on the
    log-probabilities of the logits (`ift.checking.naive`). Both run in evaluation mode with
    gradients enabled, so that dropout, router noise and gradient checkpointing are off; what random
    numbers are still drawn start from one seed. The model is returned as it was found: modes,
    gradients, attributes, buffers, patch and random state. Needs memory for the logits; they are
    products in float32 where the `logits_dtype` of the patch or of `ift` is.

    The error of a gradient is ``max|fused - naive| / (max|naive| + floor)`` for each parameter. The
    floor is 10 fp32 roundings of the largest gradient of the model, divided by the tolerance:
    gradients that are 0 but for rounding (biases of keys) are no fault. Backward starts from 0.5.

    Args:
        model: a causal LM, or a PEFT model around one, or DDP around either; patched or not; any
            device and dtype.
        batch: its keyword arguments, with labels (B, T). IFT needs input_ids (B, T), one document
            in each row.
        ift: options of IFT; None compares SFT.
        loss: another loss, as that argument of a patched forward; not beside `ift`.
        tolerance: largest relative error; None: 1e-5, or 4 epsilon of a shorter dtype than fp32.
        tested: a patched copy of `model` whose fused loss is meant, as one that FSDP2 shards; None:
            `model` itself.
        trial: False patches without the trial of `ift.patch` on four tokens.

    Raises:
        ValueError: labels are missing; IFT with rule "sample" or packed rows; `ift` and `loss`.
        Any exception of the model's own forward on this batch.

    >>> # print(compare(AutoModelForCausalLM.from_pretrained(...), batch, ift=ift.IFTConfig()))
    """
    if batch.get("labels") is None:
        raise ValueError("batch: expected labels, got none")
    if ift is not None and loss is not None:
        raise ValueError("loss: expected None with ift, got both")
    base = causal_lm(model)
    tolerance = default_tolerance(base) if tolerance is None else tolerance
    about: dict[str, Any] = {
        "model": type(base).__name__,
        "objective": "IFT" if ift is not None else "SFT" if loss is None else "loss",
        "dtype": str(dtype_of(base)).removeprefix("torch."),
        "tolerance": tolerance,
    }
    failure = ""
    tested = model if tested is None else tested
    costs: list[Cost] = []
    with as_found(tested), logged_warnings() as notes:
        stage = "patch"
        try:
            ensure_patched(tested, trial=trial)
            stage = "forward"
            fused = _fused(tested, batch, ift, loss, costs)
        except Exception as error:
            named = type(base).__name__ in str(error) if stage == "patch" else _is_refusal(error)
            if named and isinstance(error, REFUSALS):
                return Comparison(**about, verdict="refused", reason=str(error), refused_at=stage)
            failure = f"{type(error).__name__} at {stage}: {error}"
    # A batch that the model itself does not take raises here.
    with as_found(model), full_logits(model, None if ift is None else ift.logits_dtype):
        torch.manual_seed(0)
        with metered(costs):
            if ift is not None:
                expected = naive_ift(model, batch, ift)
            elif loss is not None:
                expected = naive_loss(model, batch, loss)
            else:
                expected = naive_sft(model, batch)
            expected_grads = take_gradients(model, expected.loss)
    about["expected_loss"] = expected.loss.item()
    if failure:
        return Comparison(**about, verdict="failed", reason=failure)
    about |= {
        "loss": fused.loss,
        "tokens": fused.tokens,
        "notes": tuple(r.getMessage() for r in notes),
        "costs": tuple(costs),
    }
    return _judged(about, batch["labels"], expected, expected_grads, fused)


def dtype_of(base: nn.Module) -> torch.dtype:
    """That of the first floating-point parameter."""
    return next((p.dtype for p in base.parameters() if p.is_floating_point()), torch.float32)


def default_tolerance(base: nn.Module) -> float:
    """The largest relative error that rounding explains."""
    dtype = dtype_of(base)
    return max(1e-5, 4 * torch.finfo(dtype).eps if dtype.itemsize < 4 else 0.0)


def ensure_patched(model: nn.Module, *, trial: bool = True) -> None:
    """Patch a model that is not: one that is may have been wrapped since, on purpose."""
    if "ift" in inspect.signature(causal_lm(model).forward).parameters:
        return
    with contextlib.nullcontext() if trial else _without_trial():
        patch(model.module if isinstance(model, DistributedDataParallel) else model)


@contextlib.contextmanager
def _without_trial() -> Iterator[None]:
    """Within it a model is measured at its first loss, as one whose weights are in shards."""
    module: Any = sys.modules[patch.__module__]
    before = module.try_few_tokens
    module.try_few_tokens = lambda *_: None
    try:
        yield
    finally:
        module.try_few_tokens = before


@contextlib.contextmanager
def full_logits(model: nn.Module, logits_dtype: torch.dtype | str | None = None) -> Iterator[None]:
    """Within `as_found`: the model itself, without its patch but for the dtype of the logits."""
    base = causal_lm(model)
    options = head_options(base) if has_plain_head(base) else HeadOptions()
    unpatch(base)
    if options.changed(logits_dtype=logits_dtype).logits_dtype is not None:
        plain_head(base).register_forward_hook(float32_product)
    yield


def has_plain_head(base: nn.Module) -> bool:
    """Whether its head is a plain linear layer; others are for `ift.patch` to refuse."""
    try:
        plain_head(base)
    except TypeError:
        return False
    return True


@dataclass
class _Fused:
    loss: float
    gradients: Gradients
    tokens: int
    entropy: float
    logprob: Tensor | None = None  # (B, T) of the next tokens, 0 where there is none; SFT only
    argmax: Tensor | None = None


class _Capture:
    """A loss that stores the statistics it gets."""

    takes_stats = True  # `ift.patch` then passes them, instead of the log-probability alone

    def __call__(self, stats: Any, mask: Tensor) -> Tensor:
        self.logprob, self.argmax = stats.logprob, stats.argmax
        total: Tensor = stats.logprob.sum()
        return total


def _fused(
    model: Any,
    batch: dict[str, Any],
    config: IFTConfig | None,
    loss: Callable[..., Tensor] | None,
    costs: list[Cost],
) -> _Fused:
    torch.manual_seed(0)
    given: dict[str, Any] = {} if config is None else {"ift": config}
    given |= {} if loss is None else {"loss": loss}
    with metered(costs):
        value: Tensor = model(**batch, **given).loss
        metrics: Any = causal_lm(model).ift_metrics
        gradients = take_gradients(model, value)
    fused = _Fused(value.item(), gradients, int(metrics["tokens"]), metrics["entropy"].item())
    if config is None:
        torch.manual_seed(0)
        capture = _Capture()
        with torch.no_grad():
            model(**for_capture(batch), loss=capture)
        fused.logprob, fused.argmax = capture.logprob, capture.argmax
    return fused


def _judged(
    about: dict[str, Any],
    labels: Tensor,
    expected: NaivePass,
    expected_grads: Gradients,
    fused: _Fused,
) -> Comparison:
    errors: dict[str, float] = {"loss": relative(fused.loss, about["expected_loss"])}
    wrong_argmax = 0
    if expected.logits is not None:
        target = labels[:, 1:].to(expected.logits.device)
        mask = target != IGNORE_INDEX
        log_p = expected.logits[:, :-1][mask].float().log_softmax(-1)  # (targets, V)
        entropy = -(log_p.exp() * log_p.clamp(min=-1e30)).sum().item()
        errors["entropy"] = relative(fused.entropy, entropy)
        if fused.logprob is not None and fused.logprob.shape == labels.shape:
            chosen = log_p.gather(-1, target[mask][:, None])[:, 0]
            ours = fused.logprob[:, :-1].to(chosen.device)[mask]
            scale = chosen.abs().max().clamp(min=1.0) if len(chosen) else chosen.sum() + 1
            errors["logprob"] = float(((ours - chosen).abs() / scale).max()) if len(ours) else 0.0
        if fused.argmax is not None and fused.argmax.shape == labels.shape:
            ids = fused.argmax[:, :-1].to(log_p.device)[mask]
            best, got = log_p.max(-1).values, log_p.gather(-1, ids[:, None])[:, 0]
            wrong_argmax = int((best - got > about["tolerance"] * best.abs().clamp(min=1)).sum())
    errors["gradient"], worst = worst_gradient(fused.gradients, expected_grads, about["tolerance"])
    about |= {"errors": errors, "worst_parameter": worst, "wrong_argmax": wrong_argmax}
    wrong = [n for n, error in errors.items() if not error <= about["tolerance"]]  # also NaN
    finite = (bool(gradient.isfinite().all()) for gradient in expected_grads.values())
    if not (math.isfinite(about["expected_loss"]) and all(finite)):
        reason = "the loss of the model itself, or a gradient of it, is not finite"
        return Comparison(**about, verdict="undecided", reason=reason)
    if not wrong and not wrong_argmax:
        return Comparison(**about, verdict="equal")
    if expected.near_tie:
        reason = "a prediction of the first pass is a tie within rounding; try another batch"
        return Comparison(**about, verdict="undecided", reason=reason)
    wrong += ["argmax"] * bool(wrong_argmax)
    return Comparison(**about, verdict="different", reason=f"differs in {', '.join(wrong)}")


def relative(got: float, expected: float) -> float:
    """The error of a figure."""
    if math.isnan(got) or math.isnan(expected):
        return math.nan
    return abs(got - expected) / max(abs(expected), 1e-3)


def worst_gradient(got: Gradients, expected: Gradients, tolerance: float) -> tuple[float, str]:
    """The largest error of a parameter's gradient, a missing one being 0, and its name."""
    largest = max((float(g.abs().max()) for g in expected.values()), default=0.0)
    floor = 10 * torch.finfo(torch.float32).eps * largest / tolerance
    worst, name = 0.0, ""
    for each in dict.fromkeys((*expected, *got)):
        ours, theirs = (grads.get(each) for grads in (got, expected))
        zero = torch.zeros(())
        size = 0.0 if theirs is None else float(theirs.abs().max())
        ours, theirs = (zero if g is None else g.detach() for g in (ours, theirs))
        difference = float((ours.to(theirs.device) - theirs).abs().max())
        error = difference / (size + floor) if difference else 0.0
        if math.isnan(error) or error > worst:
            worst, name = error, each
        if math.isnan(error):
            break
    return worst, name


def _is_refusal(error: Exception) -> bool:
    """Whether this package raised it on purpose: its message begins with a name."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = (str(Path(ift_kernels.__file__).parent), str(Path(__file__).parent.parent))
    named = re.match(r"[\w.]+: ", str(error)) is not None
    return named and bool(frames) and frames[-1].filename.startswith(ours)
