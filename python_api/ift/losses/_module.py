"""Losses as modules, and from hidden states: the same functions with their options held."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from typing_extensions import dataclass_transform  # torch depends on it

from ift.documents import IGNORE_INDEX, boundaries, document_starts
from ift.losses._tokens import Metrics, record
from ift.support import Support, check_support, support_ids, support_stats
from ift_kernels import ActiveSet, TokenStats, linear_divergence, linear_logprobs
from ift_kernels.common.packed_rows import Rows

# Statistics of `linear_logprobs` that losses with these options take: any value but 0, or these.
OPTION_OUTPUTS: dict[str, dict[str, tuple[Any, ...]]] = {
    "entropy": {"entropy_coef": (), "scaling": ("eaft",)},
    "lse": {"label_smoothing": (), "z_loss": ()},
    "mean_logit": {"label_smoothing": ()},
    "sum_sq": {"scaling": ("deft",)},
}


class Head(NamedTuple):
    """Hidden states and the linear head over them, of a frozen reference model.

    Args:
        hidden: (..., D), for the same targets as the policy's.
        weight: (V, D).
        bias: (V,) or None.
        logit_scale, softcap: of the reference model, as in `ift_kernels.linear_logprobs`.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None


def from_hidden(
    loss: Callable[..., Tensor],
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (...)
    *args: Any,
    bias: Tensor | None = None,  # (V,)
    ignore_index: int = IGNORE_INDEX,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    gradient: str | ActiveSet = "exact",
    logits_dtype: torch.dtype | None = None,
    deterministic: bool = False,
    workspace: int | None = None,
    reference: Tensor | Head | None = None,
    support: Tensor | Support | None = None,
    metrics: Metrics | None = None,
    **options: Any,
) -> Tensor:
    """Any loss of `ift.losses` from hidden states and a head, without the logits of either model.

    Equals::

        stats = ift_kernels.linear_logprobs(hidden, weight, target, ...)
        loss(stats.logprob, target != ignore_index, *args, **options)

    One pass over the vocabulary forward, one backward. Losses that take an entropy, an lse, a mean
    logit or a Σp² get them from the same pass; a KL to the whole distribution of a reference
    (`kl_coef` of `sft_loss`) is a second one, `ift_kernels.linear_divergence`.

    With `support`, the ids that a truncating sampler has drawn from (top-k, top-p, min-p), the
    policy is that of the sampler: every log-probability, the entropy and the metrics are those of::

        z.masked_fill(~in_support, -inf).log_softmax(-1)      # z: logits / temperature

    So are the ones of a reference `Head`, over the same ids: its KL is between two distributions
    over one support. Log-probabilities that are given (`old_logprob`, a `reference` tensor) have to
    be of that kind, too, as a sampler reports them (vLLM: ``logprobs_mode="processed_logprobs"``).

    Args:
        loss: a function of `ift.losses`, or one of its modules.
        hidden, weight, target, bias, ignore_index, logit_scale, softcap, temperature, gradient,
            logits_dtype, deterministic, workspace: as in `ift_kernels.linear_logprobs`; of the
            reference, too, are `temperature` and the last three; `target` is (B, T) or packed
            (T,), shifted, and masked where it is `ignore_index`.
        args, options: what else the loss takes. A statistic given here, such as `entropy`, takes
            the place of that of the pass.
        reference: log-probabilities of the reference model, or its `Head`, whose are then computed
            here without gradient: one product with its weight. Of `sft_loss` a `Head`.
        support: (..., K) ids of the sampler, padded with -100 (whatever `ignore_index` is), every
            target among its own; K from 1 to 512. Or an `ift.Support`, which rebuilds them from
            `hidden`, one product more; they are constants in backward. A target outside of a
            rebuilt support is added to it. A token that has more ids than ``max_ids`` is left out,
            as if masked.
        metrics: gets the metrics of the loss, and ``token_accuracy`` and ``entropy`` of the pass;
            with `support` ``support_size``, the mean number of its ids, and ``support_outside`` and
            ``support_cut``, the shares of targets that were added and of those left out.

    Returns:
        What the loss returns.

    Raises:
        As `ift_kernels.linear_logprobs` and the loss.
        TypeError: a loss of sets of ids, which has a ``from_hidden`` of its own.
        ValueError: with `support` an active `gradient`, a loss that takes other statistics than the
            entropy, `kl_coef` of `sft_loss`; a target that its ids lack, or an id twice (NaN on a
            GPU without ``IFT_DEBUG=1``); sums per row beside a support that leaves tokens out.

    >>> import ift
    >>> hidden, weight = torch.randn(4, 6, 16), torch.randn(100, 16)
    >>> target, metrics = torch.randint(100, (4, 6)), {}
    >>> value = from_hidden(ift.losses.dpo_loss, hidden, weight, target, beta=0.1,
    ...                     reference=Head(hidden, weight), metrics=metrics)
    >>> round(value.item(), 4), float(metrics["reward_margin"])
    (0.6931, 0.0)
    """
    if "teacher_logprob" in accepted(loss):  # would take the tokens of a row for one set
        raise TypeError(
            "loss: expected one of a log-probability for each token, got that of sets of ids; call "
            "TopKDistillationLoss(...).from_hidden"
        )
    head: dict[str, Any] = {
        "bias": bias, "ignore_index": ignore_index, "logit_scale": logit_scale,
        "softcap": softcap, "temperature": temperature, "logits_dtype": logits_dtype,
        "deterministic": deterministic, "workspace": workspace,
    }  # fmt: skip
    statistics, outputs, detached = taken_statistics(loss, options)
    metrics = {} if metrics is None else metrics
    token_pass: Callable[..., TokenStats] = linear_logprobs
    if support is not None:
        if isinstance(support, Support) and support.may_cut(weight.shape[0]):
            _check_per_token(target, (*args[1:], options.get("old_logprob"), reference))
        check_support(support, target, outputs)
        found = support_ids(support, hidden, weight, target, **head)
        record(metrics, **found.metrics(target != ignore_index))
        target = target.masked_fill(found.cut, ignore_index)
        token_pass = functools.partial(support_stats, ids=found.ids)
    stats = token_pass(
        hidden, weight, target, outputs=outputs, detached=detached, gradient=gradient, **head
    )
    mask = target != ignore_index
    if "reference_kl" in accepted(loss):
        if support is not None and given_options(loss, options).get("kl_coef"):
            raise ValueError("kl_coef: expected 0 with support, a KL of whole distributions")
        options |= _reference_kl(loss, hidden, weight, mask, reference, head, options)
    elif isinstance(reference, Head):
        states, rows, *rest = reference
        frozen = head | dict(zip(Head._fields[2:], rest, strict=True))
        with torch.no_grad():
            options["reference"] = token_pass(states, rows, target, **frozen).logprob
    elif reference is not None:
        options["reference"] = reference
    options |= {name: getattr(stats, name) for name in statistics}
    value = loss(cast(Tensor, stats.logprob), mask, *args, metrics=metrics, **options)
    record_statistics(metrics, stats, target, mask)
    return value


def _check_per_token(target: Tensor, given: tuple[Any, ...]) -> None:
    """Refuse sums over rows: they hold tokens that a support may leave out."""
    for value in given:
        if isinstance(value, Tensor) and value.shape != target.shape:
            raise ValueError(
                f"support: expected one with top_k, or log-probabilities per token "
                f"{tuple(target.shape)} to compare with, got {tuple(value.shape)}: tokens of more "
                "than max_ids ids are left out"
            )


def record_statistics(metrics: Metrics, stats: TokenStats, target: Tensor, mask: Tensor) -> None:
    """``token_accuracy`` and ``entropy``, means over the tokens."""
    assert stats.argmax is not None and stats.entropy is not None
    count = mask.sum().clamp(min=1)
    right = ((stats.argmax == target) & mask).sum()
    record(metrics, token_accuracy=right / count, entropy=stats.entropy.sum() / count)


def _reference_kl(
    loss: Callable[..., Tensor], hidden: Tensor, weight: Tensor, mask: Tensor,
    reference: Tensor | Head | None, head: dict[str, Any], options: dict[str, Any],
) -> dict[str, Tensor]:  # fmt: skip
    """KL from the distributions of a reference's head, for losses that take one."""
    given = given_options(loss, options)
    if given.get("reference_kl") is not None or not given.get("kl_coef"):
        if reference is not None:
            raise ValueError(
                "reference: expected None without kl_coef, or beside reference_kl, got one"
            )
        return {}
    if not isinstance(reference, Head):
        raise ValueError(f"reference: expected a Head with kl_coef, got {type(reference).__name__}")
    if head["deterministic"]:
        raise ValueError(
            "deterministic: expected False with kl_coef, whose divergence of two heads does not "
            "offer it, got True"
        )
    names = ("bias", "logit_scale", "softcap", "temperature", "logits_dtype", "workspace")
    kl = linear_divergence(
        hidden, weight, reference.hidden, reference.weight, mask=mask, reduction="none",
        teacher_bias=reference.bias, teacher_logit_scale=reference.logit_scale,
        teacher_softcap=reference.softcap, **{name: head[name] for name in names},
    )  # fmt: skip
    return {"reference_kl": kl}


def taken_statistics(
    loss: Callable[..., Tensor], options: Mapping[str, Any]
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """What a loss takes beside log-probabilities, and `outputs` and `detached` for the pass.

    The metrics take an entropy, too, without gradient. A statistic that is given is not taken.
    """
    given = given_options(loss, options)
    statistics = tuple(
        name for name, users in OPTION_OUTPUTS.items()
        if any(given.get(user) in values if values else given.get(user)
               for user, values in users.items())
        and given.get(name) is None and name in accepted(loss)
    )  # fmt: skip
    outputs = ("logprob", "entropy", "argmax", *(n for n in statistics if n != "entropy"))
    return statistics, outputs, () if given.get("entropy_coef") else ("entropy",)


def given_options(loss: Callable[..., Tensor], options: Mapping[str, Any]) -> dict[str, Any]:
    """`options`, and those that a module or a `functools.partial` of a loss holds."""
    if isinstance(loss, functools.partial):
        return given_options(loss.func, {**loss.keywords, **options})
    return {**loss.options, **options} if isinstance(loss, Loss) else dict(options)


def accepted(loss: Callable[..., Tensor]) -> frozenset[str]:
    """Names of the arguments that a loss, function or module, takes."""
    if isinstance(loss, functools.partial):
        return accepted(loss.func)
    return _parameters(loss.function if isinstance(loss, Loss) else loss)


@functools.cache
def _parameters(function: Callable[..., Tensor]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def _init_of(fields: dict[str, inspect.Parameter]) -> Callable[..., None]:
    """An ``__init__`` with these keyword arguments.

    The class is no dataclass: FSDP and DDP take those among a forward's arguments apart and make
    new ones, and their metrics would be lost.
    """

    def __init__(self: Loss, *args: Any, **options: Any) -> None:
        try:
            given = signature.bind(self, *args, **options)
        except TypeError as error:
            raise TypeError(f"{type(self).__name__}.__init__() {error}") from None
        given.apply_defaults()
        del given.arguments["self"]
        Loss.__init__(self, **given.arguments)

    bound = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = inspect.Signature([bound, *fields.values()])
    __init__.__signature__ = signature  # type: ignore[attr-defined]
    __init__.__wrapped__ = Loss.__init__  # type: ignore[attr-defined]
    return __init__


@dataclass_transform(kw_only_default=True)
class Loss(nn.Module):
    """A loss function with its options held by a module.

    Call it as the function. ``from_hidden(hidden, weight, target, ...)`` computes the same without
    logits. `metrics` holds detached scalars of the last call; `position_ids` may replace
    `cu_seqlens`.

    A subclass sets `function` and has the function's options as annotated fields, with the same
    defaults: all keyword arguments except those that change from call to call. They become keyword
    arguments of its ``__init__``, as of a dataclass, without a decorator. Or it has an ``__init__``
    of its own, which passes options on.

    Args:
        options: keyword arguments that every call of the function gets.

    Raises:
        TypeError, ValueError: an option that the function does not have or refuses.
    """

    function: ClassVar[Callable[..., Tensor]]
    needs: ClassVar[int] = 0  # tensors per row after (logprob, mask)
    pairs: ClassVar[bool] = False  # rows are the chosen responses, then the rejected ones

    _fields: ClassVar[dict[str, inspect.Parameter]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        hints = inspect.get_annotations(cls).items()
        own = {
            name: inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, annotation=hint,
                default=vars(cls).get(name, inspect.Parameter.empty),
            )
            for name, hint in hints if "ClassVar" not in str(hint)
        }  # fmt: skip
        for name in set(vars(cls)) & set(cls._fields) - set(own):
            raise TypeError(f"{cls.__name__}.{name}: expected an annotation, as the option has one")
        inherited = getattr(cls.__init__, "__wrapped__", cls.__init__)
        if own and inherited is Loss.__init__:  # an __init__ that somebody wrote stays
            cls._fields = cls._fields | own
            cls.__init__ = _init_of(cls._fields)  # type: ignore[method-assign]
            for name in set(own) & set(vars(cls)):  # would hide an option that is a module
                delattr(cls, name)

    def __init__(self, **options: Any) -> None:
        super().__init__()
        for name in options:
            if hasattr(nn.Module, name) or name in ("metrics", "function", "options"):
                raise TypeError(f"{name}: expected another name, modules have an attribute of it")
        self._options = tuple(options)
        for name, value in options.items():
            setattr(self, name, value)
        self.metrics: Metrics = {}
        self._check_options()

    @property
    def options(self) -> Mapping[str, Any]:
        """Arguments that every call of the function gets, by name; set them as attributes."""
        return MappingProxyType({name: getattr(self, name) for name in self._options})

    def _check_options(self) -> None:
        """Call the function on rows of one token: it refuses options out of range."""
        size = self.options.get("group_size", 2)
        count = size if isinstance(size, int) and size > 0 else 2
        one = torch.zeros(count, 1, device="cpu")  # whatever the default device is
        taken, *_ = taken_statistics(self, {})
        takes = accepted(self)
        anchors = {"reference", "reference_kl"} & takes
        if "kl_coef" in takes and not self.options.get("kl_coef"):
            anchors = set()
        given = dict.fromkeys([*(name for name in taken if name in takes), *anchors], one)
        rows = [torch.ones(count, device="cpu")] * self.needs
        self.function(one, torch.ones_like(one), *rows, **given, **self.options)

    def forward(
        self,
        logprob: Tensor,
        mask: Tensor,
        *args: Any,
        position_ids: Tensor | None = None,
        **call: Any,
    ) -> Tensor:
        """As the function; see there.

        Args:
            position_ids: (B, T), or (T,); a document starts where they do not continue by one.
        """
        if position_ids is not None:
            if call.get("cu_seqlens") is not None:
                raise ValueError("position_ids: expected None with cu_seqlens, got both")
            call["cu_seqlens"] = cu = documents(logprob, position_ids)
            if self.pairs and cu is not None:
                has_tokens = Rows(mask, cu).sum((mask != 0).to(torch.float32)) > 0
                if not bool(has_tokens.all()):  # an empty document would shift the pairs
                    raise ValueError(
                        "position_ids: expected response tokens in every document, got "
                        f"{int((~has_tokens).sum())} without any (padding?); leave position_ids "
                        "out for padded rows, or give cu_seqlens"
                    )
        found = call.pop("metrics", None)
        self.metrics = {} if found is None else found
        return self.function(logprob, mask, *args, metrics=self.metrics, **self.options, **call)

    def from_hidden(
        self, hidden: Tensor, weight: Tensor, target: Tensor, *args: Any, **call: Any
    ) -> Tensor:
        """`ift.losses.from_hidden` with this loss."""
        return from_hidden(self, hidden, weight, target, *args, **call)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def documents(like: Tensor, position_ids: Tensor) -> Tensor | None:
    """`cu_seqlens` of the documents that `position_ids` pack; None if each row is one document.

    Raises:
        ValueError: another shape than that of `like` (or one row of it).
    """
    flat = like.dim() == 1
    grid = like[None] if flat else like
    return boundaries(document_starts(grid, position_ids[None] if flat else position_ids))
