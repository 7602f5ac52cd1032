"""Part "models": every model of transformers that can be made tiny, patched against unpatched.

Six cases each: SFT, IFT in two passes and IFT with a shared prompt, with padding right and left.
A model passes a case when it is equal to 1e-5, or is refused by name at `ift.patch`; IFT may be
refused at its first forward, too. What cannot be built or run unpatched is listed with its reason.
Anything else is a fault.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

import ift
from ift.checking import compare
from ift.checking.compare import REFUSALS
from tests.proofs.batches import Inputs, find_inputs, make_batch
from tests.proofs.tiny_models import Architecture, architectures, tiny_model

SOURCES = (
    "python_api/ift/config.py",
    "python_api/ift/documents.py",
    "python_api/ift/head_pass.py",
    "python_api/ift/input_embeddings.py",
    "python_api/ift/measure.py",
    "python_api/ift/one_pass.py",
    "python_api/ift/patching.py",
    "python_api/ift/prefix.py",
    "python_api/ift/two_pass.py",
    "python_api/ift/checking/as_found.py",
    "python_api/ift/checking/compare.py",
    "python_api/ift/checking/naive.py",
    "python_api/ift/losses/*.py",
    "python_api/ift/token_stats.py",
    "ift_kernels/*.py",
    "ift_kernels/common/*.py",
    "ift_kernels/operators/*.py",
    "ift_kernels/schedule/*.py",
    "ift_kernels/backends/*.py",
    "ift_kernels/backends/reference/*.py",
    "ift_kernels/backends/cpu/*.py",
    "csrc/*.h",
    "csrc/cpu/**/*",
    "tests/proofs/models.py",
    "tests/proofs/tiny_models.py",
    "tests/proofs/batches.py",
)
PADDINGS = ("right", "left")
METHODS = ("sft", "ift_two_passes", "ift_shared_prompt")
LIMIT_SECONDS = 600  # for one model, on a machine that is busy with other things


def cases() -> list[str]:
    """Names of the model classes."""
    return [each.name for each in architectures()]


def architecture_of(case: str) -> Architecture:
    """The architecture of a case."""
    return next(each for each in architectures() if each.name == case)


def run(case: str) -> dict[str, Any]:
    """All that is found about one model, as a line of the log."""
    architecture = architecture_of(case)
    line: dict[str, Any] = {
        "case": case,
        "model_type": architecture.model_type,
        "kind": architecture.kind,
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            refusal = _refusal(architecture)
            if refusal:
                every = {
                    f"{method}/{padding}": refusal for padding in PADDINGS for method in METHODS
                }
                return {**line, "inputs": "none", "results": every}
            model, inputs = _runnable(architecture)
    except Exception as error:  # whatever transformers raises for this config
        return {**line, "unbuilt": _first_line(error)}
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    line |= {"dtype": dtype, "inputs": inputs.form, "results": {}}
    for padding in PADDINGS:
        batch = make_batch(model, inputs, padding)
        for method in METHODS:
            line["results"][f"{method}/{padding}"] = _compared(model, batch, method)
    return line


def _refusal(architecture: Architecture) -> dict[str, Any]:
    """The result of a model that `ift.patch` refuses, which needs no forward; else empty."""
    model = tiny_model(architecture, torch.float32)
    try:
        ift.patch(model)
    except REFUSALS as error:
        if architecture.name in str(error):
            return {"verdict": "refused", "at": "patch", "reason": _one_line(error)}
    except Exception:  # a fault, which `compare` reports
        pass
    return {}


def _runnable(architecture: Architecture) -> tuple[Any, Inputs]:
    """A model and inputs for which its own loss and gradients are finite.

    In fp64, where rounding cannot be mistaken for a fault; in fp32 where its code demands that, and
    there with padding on the right at least.
    """
    try:
        return _running(architecture, torch.float64, PADDINGS)
    except Exception:  # any: of a dtype, or NaN of rows that are masked altogether
        return _running(architecture, torch.float32, PADDINGS[:1])


def _running(
    architecture: Architecture, dtype: torch.dtype, paddings: tuple[str, ...]
) -> tuple[Any, Inputs]:
    model = tiny_model(architecture, dtype)
    inputs = find_inputs(model)
    for padding in paddings:
        _check_runs(model, make_batch(model, inputs, padding))
    return model, inputs


def _check_runs(model: Any, batch: dict[str, Any]) -> None:
    loss = model(**batch).loss
    if loss is None:
        raise ValueError("returns no loss for labels")
    if not bool(loss.isfinite()):
        raise ValueError(f"its own loss is {loss.item()}")
    loss.backward()
    finite = all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    model.zero_grad(set_to_none=True)
    if not finite:
        raise ValueError("its own gradient is not finite")


def _compared(model: Any, batch: dict[str, Any], method: str) -> dict[str, Any]:
    config = None if method == "sft" else ift.IFTConfig(share_prompt=method == "ift_shared_prompt")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = compare(model, batch, ift=config, tolerance=1e-5)
    except Exception as error:  # the reference cannot be made
        return {"verdict": "no reference", "reason": _first_line(error)}
    result: dict[str, Any] = {"verdict": found.verdict}
    if found.refused_at:
        result["at"] = found.refused_at
    if found.reason:
        result["reason"] = _one_line(found.reason)
    if found.errors:
        worst = max(found.errors, key=lambda name: found.errors[name])
        result["error"] = float(f"{found.errors[worst]:.1e}")
        if found.verdict != "equal":
            result["errors"] = {name: float(f"{e:.1e}") for name, e in found.errors.items()}
            result["worst"] = found.worst_parameter
    if found.notes:
        result["note"] = found.notes[0].split(": ", 1)[-1]
    return result


def fault(line: dict[str, Any]) -> str:
    """What is wrong with a line of the log, or an empty string."""
    if "crashed" in line:
        return str(line["crashed"])
    wrong = []
    for name, result in line.get("results", {}).items():
        verdict = result["verdict"]
        late = verdict == "refused" and result["at"] != "patch" and name.startswith("sft")
        passed = verdict in ("equal", "refused") or result.get("reason", "").endswith("not finite")
        if late or not passed:
            what = "refused only at its first loss" if late else verdict
            wrong.append(f"{name}: {what}: {result.get('reason', '')}")
    return "; ".join(wrong)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {_one_line(error)}"


def _one_line(text: object) -> str:
    return " ".join(str(text).split())[:250]
