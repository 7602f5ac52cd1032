"""Part "models": every model of transformers that can be made tiny, patched against unpatched.

Six cases each: SFT, IFT in two passes and IFT with a shared prompt, with padding right and left.
A model passes a case when it is equal to 1e-5, or is refused by name at `ift.patch`; IFT may be
refused at its first forward, too. What cannot be built or run unpatched is listed with its reason.
Anything else is a fault.
"""

from __future__ import annotations

import warnings
from typing import Any

from tests.proofs.tiny_models import Architecture, architectures

SOURCES = (
    "python_api/ift/*.py",
    "python_api/ift/checking/*.py",
    "python_api/ift/losses/*.py",
    "ift_kernels/*.py",
    "ift_kernels/backends/*.py",
    "csrc/*.h",
    "csrc/cpu/**/*",
    "tests/proofs/models.py",
    "tests/proofs/tiny_models.py",
    "tests/proofs/batches.py",
)
PADDINGS = ("right", "left")
METHODS = ("sft", "ift_two_passes", "ift_shared_prompt")
LIMIT_SECONDS = 180  # for one model


def cases() -> list[str]:
    """Names of the model classes."""
    return [each.name for each in architectures()]


def run(case: str) -> dict[str, Any]:
    """All that is found about one model, as a line of the log."""
    import torch

    from tests.proofs.batches import find_inputs, make_batch
    from tests.proofs.tiny_models import tiny_model

    architecture = next(each for each in architectures() if each.name == case)
    line: dict[str, Any] = {
        "case": case,
        "model_type": architecture.model_type,
        "kind": architecture.kind,
    }
    reason = ""
    for dtype in (torch.float64, torch.float32):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = tiny_model(architecture, dtype)
                inputs = find_inputs(model)
                for padding in PADDINGS:
                    _check_runs(model, make_batch(model, inputs, padding))
            break
        except Exception as error:
            reason = reason or _first_line(error)
    else:
        return {**line, "unbuilt": reason}
    line |= {"dtype": str(dtype).removeprefix("torch."), "inputs": inputs.form, "results": {}}
    for padding in PADDINGS:
        batch = make_batch(model, inputs, padding)
        for method in METHODS:
            line["results"][f"{method}/{padding}"] = _compared(model, batch, method)
    return line


def _check_runs(model: Any, batch: dict[str, Any]) -> None:
    loss = model(**batch).loss
    if loss is None:
        raise ValueError("returns no loss for labels")
    if not bool(loss.isfinite()):
        raise ValueError(f"its own loss is {loss.item()}")
    loss.backward()
    model.zero_grad(set_to_none=True)


def _compared(model: Any, batch: dict[str, Any], method: str) -> dict[str, Any]:
    from ift import IFTConfig
    from ift.checking import compare

    config = None if method == "sft" else IFTConfig(share_prompt=method == "ift_shared_prompt")
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
        result["reason"] = found.reason.strip().split("\n")[0][:300]
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
        if late or verdict not in ("equal", "refused", "no reference"):
            what = "refused only at its first loss" if late else verdict
            wrong.append(f"{name}: {what}: {result.get('reason', '')}")
    return "; ".join(wrong)


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def architecture_of(case: str) -> Architecture:
    """The architecture of a case."""
    return next(each for each in architectures() if each.name == case)
