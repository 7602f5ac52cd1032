"""Errors against fp64 of every operation on a head, and of others beside it: ``ift numerics``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ift.numerics import calls, inputs, invariance, operations, peers
from ift.numerics.calls import Call, Check
from ift_kernels.schedule import plan

DTYPES = ("float32", "bfloat16", "float16")
OPTIONS: dict[str, dict[str, Any]] = {
    "linear_logprobs": {"outputs": ("logprob", "lse", "entropy"), "detached": ("lse", "entropy"),
                        "ignore_index": -100},
    "linear_cross_entropy": {"ignore_index": -100, "label_smoothing": 0.0, "z_loss": 1e-4,
                             "weight_grad_sum": "auto", "reduction": "mean", "num_items": None,
                             "class_weight": None, "return_stats": False, "dims": ()},
    "linear_token": {"rule": "greedy", "k": 1, "seed": 0, "row_offset": 0},
    "linear_divergence": {"kind": "forward", "beta": 0.5, "teacher_logit_scale": 1.0,
                          "teacher_softcap": None, "reduction": "none", "num_items": None},
    "linear_expected_embedding": {},
}  # fmt: skip
COLUMNS = (
    "operation", "result", "implementation", "backend", "schedule", "dtype", "logits_dtype",
    "inputs", "max", "rms", "relative", "ulp", "share",
)  # fmt: skip
Row = dict[str, Any]  # by COLUMNS; what does not apply is None
Progress = Callable[[float, str], None]  # the share that is done, and what comes next


def measure(
    device: torch.device, *, quick: bool = False, progress: Progress = lambda *_: None
) -> dict[str, Any]:
    """Errors and invariance on a device, as plain JSON values.

    Args:
        quick: smaller, with the schedules that the plan takes, and without what has to be compiled.
    """
    rows, width, vocabulary = (32, 64, 1000) if quick else (48, 128, 4096)
    schedules = (None,) if quick else plan.SCHEDULES
    combinations = [
        (dtype, logits_dtype, kind)
        for dtype in DTYPES
        for logits_dtype in (None, torch.float32)[: 1 if dtype == "float32" else 2]
        for kind in inputs.KINDS
    ]
    found: list[Row] = []
    absent: dict[str, str] = {}
    for at, (dtype, logits_dtype, kind) in enumerate(combinations):
        progress(at / len(combinations), f"{dtype}, {kind}")
        call = Call(
            "linear_logprobs", dtype=dtype, kind=kind, shape=(rows,), width=width,
            vocabulary=vocabulary, masked=0.0, numerics={"logits_dtype": logits_dtype},
            device=device.type,
        )  # fmt: skip
        found += _ours(call, schedules)
        if logits_dtype is None:
            found += _peers(call, absent, quick)
    progress(1.0, "invariance")
    return {
        "size": {"rows": rows, "width": width, "vocabulary": vocabulary},
        "inputs": dict(inputs.KINDS),
        "errors": {
            "columns": list(COLUMNS),
            "rows": [[row.get(c) for c in COLUMNS] for row in found],
        },
        "absent": absent,
        "invariance": invariance.check(device, quick=quick),
    }


def rows(report: dict[str, Any]) -> list[Row]:
    """The errors of a report."""
    errors = report["errors"]
    return [dict(zip(errors["columns"], row, strict=True)) for row in errors["rows"]]


def _ours(call: Call, schedules: tuple[str | None, ...]) -> Iterator[Row]:
    for operation, options in OPTIONS.items():
        for backend in operations.available(torch.device(call.device)):
            # Forward alone, or schedules of its own.
            fixed = operation in ("linear_token", "linear_expected_embedding")
            some = (None,) if fixed else schedules
            for schedule in some:
                one = replace(
                    call, operation=operation, options=options, backend=backend, schedule=schedule
                )
                for check in operations.run(one):
                    # Values do not depend on the schedule of gradients.
                    same = schedule != some[0] and not check.name.startswith("d ")
                    if not same and check.name != "ids":
                        yield _row(one, "ift", check) | {
                            "backend": backend,
                            "schedule": schedule,
                            "share": _rounded(check.share()),
                        }


def _peers(call: Call, absent: dict[str, str], quick: bool) -> Iterator[Row]:
    """Log-probabilities and their gradients of the peers, for the tensors of our call."""
    call = replace(call, options=OPTIONS["linear_logprobs"])
    exact = {check.name: check for check in operations.run(call)}
    for name, peer in peers.PEERS.items():
        if quick and name in peers.COMPILED:
            absent[name] = "not in a quick run"
            continue
        t = calls.tensors(call)
        hidden, weight = (x.detach().requires_grad_() for x in (t.hidden, t.weight))
        bias = None if t.bias is None else t.bias.detach()
        upstream = calls.upstream(call, 0, call.shape)
        assert upstream is not None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                logprob = peer(hidden, weight, bias, t.target)
                upstream = upstream.to(logprob.device, logprob.dtype)
                grads = torch.autograd.grad(logprob, (hidden, weight), upstream)
        except peers.NotServed as error:
            absent.setdefault(name, str(error))
            continue
        except Exception as error:  # whatever another package raises, the others still run
            absent.setdefault(name, f"fails: {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        values = {"logprob": logprob, "d hidden": grads[0], "d weight": grads[1]}
        for result, value in values.items():
            yield _row(call, name, exact[result]._replace(ours=value))


def _row(call: Call, implementation: str, check: Check) -> Row:
    """Largest and root-mean-square error; ulp: the former, of the largest exact value's."""
    ours, exact = check.ours.detach().cpu().double(), check.exact.double()
    error = torch.where(ours == exact, 0, (ours - exact).abs())
    largest = float(exact[exact.isfinite()].abs().amax()) if bool(exact.isfinite().any()) else 0.0
    return {
        "operation": call.operation,
        "result": check.name,
        "implementation": implementation,
        "dtype": call.dtype,
        "logits_dtype": "float32" if call.numerics.get("logits_dtype") else None,
        "inputs": call.kind,
        "max": _rounded(float(error.amax())),
        "rms": _rounded(float(error.square().mean().sqrt())),
        "relative": _rounded(_ratio(float(error.square().mean().sqrt()), exact)),
        "ulp": _rounded(float(error.amax()) / _ulp(largest, check.ours)),
    }


def _ratio(rms: float, exact: Tensor) -> float:
    size = float(torch.where(exact.isfinite(), exact, 0).square().mean().sqrt())
    return rms / size if size else 0.0


def _ulp(value: float, like: Tensor) -> float:
    """A unit in the last place of `value` in the dtype of `like`."""
    info = torch.finfo(like.dtype)
    return float(info.eps) * 2.0 ** math.floor(math.log2(max(value, info.tiny)))


def _rounded(value: float) -> float | None:
    """Three digits; None is not finite."""
    return float(f"{value:.3g}") if math.isfinite(value) else None
