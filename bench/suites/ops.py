"""Token choice, sets of ids, expected embedding, temporal residual and scans."""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import ift_kernels
from bench.harness.data import WRONG, Errors, Exact, Wrong
from bench.harness.measure import Cell, Records, Settings, Subject, Suite, by_name, measure, record
from bench.peers import heads
from bench.peers.naive_ift import naive_weights
from bench.suites import grid

SHAPE = (2048, 1024, 32000)  # N, D, V of the head; V and D of the embedding
BATCH = (16, 1024)  # rows and positions of the operations on sequences
GAMMA, LAM = 0.95, 0.2
IDS = 64  # the most likely ones of each row, as in distillation
IMPLEMENTATIONS = ("floor", "ours", "naive", "compile")
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One operation, forward alone or with its backward."""

    name: str
    title: str
    operation: str  # key of NAIVE and OURS
    leaves: tuple[str, ...] = ()  # inputs that get a gradient; none: forward alone
    gemms: int = 0  # products that cannot be avoided

    @property
    def group(self) -> str:
        return {"residual": "residual", "cumsum": "scan", "weights": "scan"}.get(
            self.operation, "head"
        )


CASES: dict[str, Case] = by_name(
    Case("greedy", "linear_token, greedy", "greedy", gemms=1),
    Case("topk", "linear_token, second best", "topk", gemms=1),
    Case("sample", "linear_token, sampled", "sample", gemms=1),
    Case("soft", "linear_expected_embedding", "soft", gemms=2),
    Case("soft-backward", "the same, forward and backward", "soft",
         ("hidden", "weight", "embedding"), gemms=6),
    Case("one-target", "linear_logprobs, forward and backward", "one-target",
         ("hidden", "weight"), gemms=3),
    Case("selected", f"linear_selected_logprobs of {IDS} ids, forward and backward", "selected",
         ("hidden", "weight"), gemms=3),
    Case("in-set", f"the same within the {IDS} ids; floor: gather, bmm, index_add", "in-set",
         ("hidden", "weight")),
    Case("residual", "temporal_residual", "residual"),
    Case("residual-backward", "the same, forward and backward", "residual", ("embedding",)),
    Case("cumsum", "discounted_cumsum", "cumsum"),
    Case("cumsum-backward", "the same, forward and backward", "cumsum", ("x",)),
    Case("weights", "propagation_weights", "weights"),
    Case("weights-backward", "the same, forward and backward", "weights", ("x",)),
)  # fmt: skip


def _mixed_in(t: Tensors) -> Tensor:
    shifted = torch.cat([t["ids"][:, :1], t["predicted"][:, :-1]], 1)
    return torch.where(t["labels"] == -100, t["ids"], shifted)


def _residual(t: Tensors) -> Tensor:
    given, mixed_in = (
        F.embedding(t["ids"], t["embedding"]),
        F.embedding(_mixed_in(t), t["embedding"]),
    )
    return (1 - LAM) * given + LAM * mixed_in


def _cumsum(t: Tensors) -> Tensor:
    """As the released code does it, by a dense (T, T) matrix."""
    x, mask = t["x"], t["mask"]
    position = torch.arange(x.shape[1], device=x.device)
    distance = position[None, :] - position[:, None]
    discount = torch.where(distance >= 0, GAMMA ** distance.clamp(min=0).to(x.dtype), 0)
    return mask * ((mask * x) @ discount.T)


def _logits(t: Tensors) -> Tensor:
    return F.linear(t["hidden"], t["weight"])


def _log_softmax(t: Tensors) -> Tensor:
    return _logits(t).log_softmax(-1)


def _in_set(t: Tensors) -> Tensor:
    """The products of every row with its own head rows, which are gathered first."""
    rows = F.embedding(t["set"], t["weight"])
    return torch.bmm(rows, t["hidden"][..., None])[..., 0].log_softmax(-1)


NAIVE: dict[str, Callable[[Tensors], Tensor]] = {
    "greedy": lambda t: _logits(t).argmax(-1),
    "topk": lambda t: _logits(t).topk(2).indices[:, 1],
    "sample": lambda t: _logits(t).float().softmax(-1).multinomial(1)[:, 0],
    "soft": lambda t: _logits(t).softmax(-1) @ t["embedding"],
    "one-target": lambda t: _log_softmax(t).gather(1, t["set"][:, :1]),
    "selected": lambda t: _log_softmax(t).gather(1, t["set"]),
    "in-set": _in_set,
    "residual": _residual,
    "cumsum": _cumsum,
    "weights": lambda t: naive_weights(
        t["x"], t["mask"], gamma=GAMMA, kind="loss", side="left", norm="L1"
    ),
}
OURS: dict[str, Callable[[Tensors], Tensor]] = {
    "greedy": lambda t: ift_kernels.linear_token(t["hidden"], t["weight"]).ids,
    "topk": lambda t: ift_kernels.linear_token(t["hidden"], t["weight"], rule="kth", k=2).ids,
    "sample": lambda t: ift_kernels.linear_token(t["hidden"], t["weight"], rule="sample").ids,
    "soft": lambda t: ift_kernels.linear_expected_embedding(
        t["hidden"], t["weight"], t["embedding"]
    ),
    "one-target": lambda t: _given(
        ift_kernels.linear_logprobs(t["hidden"], t["weight"], t["set"][:, 0]).logprob
    )[:, None],
    "selected": lambda t: _given(
        ift_kernels.linear_selected_logprobs(t["hidden"], t["weight"], t["set"]).logprob
    ),
    "in-set": lambda t: _given(
        ift_kernels.linear_selected_logprobs(
            t["hidden"], t["weight"], t["set"], outputs=("in_set_logprob",)
        ).in_set_logprob
    ),
    "residual": lambda t: ift_kernels.temporal_residual(
        t["embedding"], t["ids"], t["predicted"], t["labels"], LAM
    ),
    "cumsum": lambda t: ift_kernels.discounted_cumsum(t["x"], GAMMA, mask=t["mask"]),
    "weights": lambda t: ift_kernels.propagation_weights(t["x"], t["mask"], gamma=GAMMA),
}


# --- in the workers -------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _sequences(rows: int, length: int, width: int, v: int, dtype: str, device: str) -> Tensors:
    """Tokens, a table, and log-probabilities; the first quarter of every row is prompt."""
    generator = torch.Generator().manual_seed(0)
    ids, predicted = (torch.randint(v, (rows, length), generator=generator) for _ in range(2))
    prompt = torch.arange(length).expand(rows, length) < length // 4
    made = {
        "embedding": torch.randn(v, width, generator=generator).to(grid.DTYPES[dtype]),
        "ids": ids,
        "predicted": predicted,
        "labels": ids.masked_fill(prompt, -100),
        "x": -torch.rand(rows, length, generator=generator) * 4 - 0.01,
        "mask": ~prompt,
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


def prepare(case_name: str, implementation: str, dtype: str, source: Any, device: str) -> Subject:
    """One cell: `source` is that of a head (`grid.load`), or a tuple: the sizes of sequences."""
    case = CASES[case_name]
    if not isinstance(source, tuple):
        found = grid.load(source, device)
        tensors = {"hidden": found["hidden"], "weight": found["weight"]}
        tensors["embedding"] = tensors["weight"].clone()
        if "weight" in case.leaves and "embedding" not in case.leaves:
            tensors["set"] = ift_kernels.linear_topk(found["hidden"], found["weight"], IDS).ids
    else:
        tensors = dict(_sequences(*source, dtype, device))
    for name in case.leaves:
        tensors[name] = tensors[name].detach().requires_grad_()
    if implementation == "floor":
        return _floor(case, tensors, torch.device(device))
    function = (OURS if implementation == "ours" else NAIVE)[case.operation]
    compiled = implementation == "compile"
    if compiled:
        function = heads.compiled(function)
    call = functools.partial(_call, function, case, tensors)
    check = _check_sequences if isinstance(source, tuple) else _check_head
    return Subject(
        call,
        call,
        functools.partial(check, case, tensors, source, device),
        torch.device(device),
        compiled,
    )


def _call(function: Callable[[Tensors], Tensor], case: Case, tensors: Tensors) -> Any:
    if not case.leaves:
        with torch.no_grad():
            return function(tensors)
    value = function(tensors)
    wanted = [tensors[name] for name in case.leaves]
    return value.detach(), *torch.autograd.grad(value, wanted, _upstream(value))


def _upstream(value: Tensor) -> Tensor:
    """Gradients of mixed sign for any output, which cost little to make."""
    last = torch.arange(value.shape[-1], device=value.device)
    return (((last % 7) - 3.0) / 3).to(value.dtype).expand_as(value)


def _check_head(
    case: Case, tensors: Tensors, source: str | grid.Made, device: str, result: Any
) -> dict[str, float]:
    found = grid.load(source, device)
    reference = Exact(**found["references"]["all"])
    everyone = torch.ones_like(found["target"], dtype=torch.bool)
    hidden, weight = found["hidden"], found["weight"]
    errors = Errors(reference, hidden, weight, found["target"], everyone)
    rows = reference.rows
    if case.operation == "greedy":
        errors.ids(result, reference.best)
    elif case.operation == "topk":
        errors.ids(result, reference.second)
    elif case.operation == "sample":
        # Surprise of a draw from p has p's entropy as its mean.
        surprise = (reference.lse - errors.logits(result))[rows]
        spread = surprise.std() / len(rows) ** 0.5
        off = float((surprise - reference.entropy).mean().abs() / spread.clamp(min=1e-9))
        if off > 6:
            raise Wrong(f"ids: their mean surprise is {off:.1f} standard errors off the entropy")
    elif not case.leaves:
        errors.relative("value", result[rows], reference.mean)
    elif "embedding" not in case.leaves:
        _check_ids(case, tensors, reference, errors, result)
    else:
        h = hidden[rows].double().requires_grad_()
        soft = (h @ weight.double().T).softmax(-1) @ weight.double()
        upstream = _upstream(soft)
        errors.relative("value", result[0][rows], soft.detach())
        errors.relative("d hidden", result[1][rows], torch.autograd.grad(soft, h, upstream)[0])
        # The upstream gradient u is the same for every row: dz = p (E u − soft u).
        columns, p, u = reference.columns, reference.p, upstream[0]
        dz = p * (weight[columns].double() @ u - (result[0].double() @ u)[:, None])
        errors.relative("d weight", result[2][columns], dz.T @ hidden.double())
        errors.relative("d embedding", result[3][columns], p.sum(0)[:, None] * u)
    return errors.found


def _check_ids(case: Case, tensors: Tensors, reference: Exact, errors: Errors, result: Any) -> None:
    """dz_j = a_j - p_j Σ a, a_j only for ids of the set; within the set, p is of the set alone."""
    hidden, weight, ids = (tensors[name].detach() for name in ("hidden", "weight", "set"))
    upstream = _upstream(result[0]).double()
    some = {"hidden": hidden[reference.rows].double().requires_grad_(), "weight": weight.double()}
    value = NAIVE[case.operation](some | {"set": ids[reference.rows]})
    (dh,) = torch.autograd.grad(value, some["hidden"], upstream[reference.rows])
    errors.relative("value", result[0][reference.rows], value.detach())
    errors.relative("d hidden", result[1][reference.rows], dh)
    # Gradients on the columns that are compared, of all rows.
    where = torch.full((len(weight),), -1)
    where[reference.columns.cpu()] = torch.arange(len(reference.columns))
    at = where.to(ids.device)[ids[:, : upstream.shape[1]]]
    p, sums = reference.p, upstream.sum(1, keepdim=True)
    direct = upstream
    if case.operation == "in-set":
        logits = torch.stack(
            [weight[i].double() @ h.double() for i, h in zip(ids, hidden, strict=True)]
        )
        p, direct = torch.zeros_like(p), upstream - logits.softmax(1) * sums
    dz = -p * sums
    rows, columns = (at >= 0).nonzero(as_tuple=True)
    dz.index_put_((rows, at[rows, columns]), direct[rows, columns], accumulate=True)
    errors.relative("d weight", result[2][reference.columns], dz.T @ hidden.double())


def _given(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


def _check_sequences(
    case: Case, tensors: Tensors, source: Any, device: str, result: Any
) -> dict[str, float]:
    """Against the naive form in float64."""
    wide = {k: v.detach().double() if v.is_floating_point() else v for k, v in tensors.items()}
    for name in case.leaves:
        wide[name].requires_grad_()
    true = _call(NAIVE[case.operation], case, wide)
    names = ("value", *(f"d {name}" for name in case.leaves))
    errors = {}
    for name, mine, theirs in zip(
        names, *(r if isinstance(r, tuple) else (r,) for r in (result, true)), strict=True
    ):
        errors[name] = float((mine.double() - theirs).norm() / theirs.norm())
        if not errors[name] <= WRONG[mine.dtype]:
            raise Wrong(f"{name}: error {errors[name]:.2g}")
    return errors


def _floor(case: Case, t: Tensors, device: torch.device) -> Subject:
    """The products of hidden, weight and embedding, into memory that is allocated."""
    h, w = t["hidden"].detach(), t["weight"].detach()
    if not case.gemms:
        return _in_set_floor(h, w, t["set"])
    z, dh = grid.scratch("logits", len(h), len(w), h), grid.scratch("dh", *h.shape, h)
    z_t, dw = grid.scratch("transposed", len(w), len(h), h), grid.scratch("dW", *w.shape, h)
    products = [(h, w.T, z), (z, w, dh), (h, w.T, z), (z, w, dh), (z_t, h, dw), (z_t, h, dw)]

    def call() -> None:
        for a, b, out in products[: case.gemms]:
            torch.mm(a, b, out=out)

    return Subject(call, call, lambda result: {}, device)


def _in_set_floor(hidden: Tensor, weight: Tensor, ids: Tensor) -> Subject:
    """The head rows of each token gathered once, products with them both ways, one sum into dW."""
    upstream = _upstream(hidden.new_empty(ids.shape))

    def call() -> tuple[Tensor, Tensor, Tensor]:
        rows = weight.index_select(0, ids.flatten()).view(*ids.shape, -1)
        logp = torch.bmm(rows, hidden[..., None])[..., 0].log_softmax(-1)
        dz = upstream - logp.exp() * upstream.sum(1, keepdim=True)
        dh = torch.bmm(dz[:, None], rows)[:, 0]
        each = torch.mul(dz[..., None], hidden[:, None], out=rows).flatten(0, 1)
        return logp, dh, torch.zeros_like(weight).index_add_(0, ids.flatten(), each)

    return Subject(call, call, lambda result: {}, hidden.device)


# --- in the command -------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of this suite."""
    parser.add_argument("--shape", type=grid.shape, default=SHAPE, metavar="NxDxV",
                        help="of the head; D and V of the embedding")  # fmt: skip
    parser.add_argument("--batch", default=BATCH, metavar="BxT",
                        type=lambda text: grid.sizes(text, "BxT", "16x1024"),
                        help="rows and positions of sequences")  # fmt: skip
    parser.add_argument("--dtype", nargs="+", choices=grid.DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: all")
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS)


def run(arguments: argparse.Namespace, settings: Settings, progress: Any) -> Records:
    """Measure; one record per group, as soon as it is complete."""
    asked = [CASES[name] for name in arguments.cases or CASES]
    n, d, v = arguments.shape
    rows, length = arguments.batch
    # Log-probabilities are float32 whatever the dtype of the model.
    planned = [
        (kind, dtype, cases)
        for kind in ("head", "residual", "scan")
        if (cases := [case for case in asked if case.group == kind])
        for dtype in (["fp32"] if kind == "scan" else arguments.dtype)
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = None if settings.in_process else Path(temporary)
        heads_of = {
            name: grid.source(folder, name, arguments.shape, name) for name in arguments.dtype
        }
        figures: dict[str, dict[str, Any]] = {}
        if planned[0][0] == "head":
            progress.at("making data")
            figures = grid.figures_of(heads_of, arguments.shape, False, settings)
        for at, (kind, dtype, cases) in enumerate(planned):
            source = heads_of[dtype] if kind == "head" else (rows, length, d, v)
            sizes = {"head": f"{n}x{d}x{v}", "residual": f"{rows}x{length}, {v}x{d}"}
            name = f"{kind} {sizes.get(kind, f'{rows}x{length}')} {dtype}"
            cells = _cells(name, cases, source, dtype, arguments)
            measure(cells, settings, progress, 1 / (len(planned) - at), 1 / len(planned))
            yield record(
                name, [n, d, v] if kind == "head" else [rows, length, d, v], dtype, cells,
                {case.name: case.title for case in cases},
                data=figures[dtype] if kind == "head" else {},
            )  # fmt: skip


def _cells(
    group: str, cases: list[Case], source: Any, dtype: str, arguments: argparse.Namespace
) -> list[Cell]:
    device = torch.device(arguments.device)
    n, d, v = arguments.shape
    cells = []
    for case in cases:
        for name in IMPLEMENTATIONS:
            asked = arguments.implementations or IMPLEMENTATIONS
            if name not in asked or (name == "floor" and case.group != "head"):
                continue
            work = case.gemms * n * d * v / grid.RATE[device.type, grid.DTYPES[dtype].itemsize]
            cell = Cell(
                group, case.name, name, prepare, (case.name, name, dtype, source, device.type),
                estimate=0.01 + 1.5 * work, memory=name != "floor", compiled=name == "compile",
            )  # fmt: skip
            if name == "compile":
                cell.reason = heads.PEERS["compile"].unavailable(device, grid.DTYPES[dtype])
            cells.append(cell)
    return cells


SUITE = Suite(__doc__, CASES, add_arguments, run)
