"""``python -m tests.proofs.table``: writes docs/models.md from the log of part "models"."""

from __future__ import annotations

from typing import Any

from tests.proofs.log import ROOT, read_lines

PAGE = ROOT / "docs" / "models.md"
LOG = ROOT / "tests" / "proofs" / "models.jsonl"
METHODS = ("sft", "ift_two_passes", "ift_shared_prompt")

HEAD = """\
# Models

Written by `python -m tests.proofs.table` from `tests/proofs/models.jsonl`, the log of
`make prove PART=models`; do not edit.

Every causal and multimodal language model that transformers {transformers} maps, with random
weights and tiny sizes. The loss and every gradient under `ift.patch` are compared with those of
the unpatched model by `ift.checking.compare`: supervised fine-tuning with the model's own loss,
IFT with two full forwards of the model. Rows are unequal, padded right and padded left; the figure
is the larger of both relative errors, the limit is 1e-5.

- **equal**: within the limit. *Both passes* under shared prompt: IFT runs the prompts twice, since
  sharing them would not give the same.
- **refused**: `ift.patch` raises an error that names the model and the reason; **refused at ift=**:
  the first IFT forward does.
- **not finite**: the model itself gives no finite loss or gradient for this padding.
- Input: text alone, or with an image in every prompt, in the form named. Multimodal models with
  text alone have image inputs that the sweep cannot make up.

{built} models were built: {served} are served, {refused} refused.

"""


def page() -> str:
    """The page as it follows from the log."""
    header, *lines = read_lines(LOG)
    built = [line for line in lines if "results" in line]
    others = [line for line in lines if "results" not in line]
    served = sum(line["results"]["sft/right"]["verdict"] == "equal" for line in built)
    text = HEAD.format(
        transformers=header["transformers"],
        built=len(built),
        served=served,
        refused=len(built) - served,
    )
    text += "| model | input | SFT | IFT, two passes | IFT, shared prompt | remark |\n"
    text += "|---|---|---|---|---|---|\n"
    for line in sorted(built, key=lambda line: line["case"].lower()):
        cells = [_cell(line["results"], method) for method in METHODS]
        text += f"| {line['case']} | {line['inputs']} | {' | '.join(cells)} | {_remark(line)} |\n"
    text += "\n## Not built\n\n| model | reason |\n|---|---|\n"
    for line in sorted(others, key=lambda line: line["case"].lower()):
        reason = line.get("unbuilt") or line.get("crashed")
        text += f"| {line['case']} | {_escaped(reason)} |\n"
    return text


def _cell(results: dict[str, Any], method: str) -> str:
    found = {padding: results[f"{method}/{padding}"] for padding in ("right", "left")}
    words = {padding: _word(result) for padding, result in found.items()}
    if words["right"] != words["left"]:
        return "; ".join(f"{padding}: {word}" for padding, word in words.items())
    if found["right"]["verdict"] != "equal":
        return words["right"]
    return f"{words['right']} ({max(result['error'] for result in found.values()):.0e})"


def _word(result: dict[str, Any]) -> str:
    if result["verdict"] == "refused":
        return "refused" if result["at"] == "patch" else "refused at ift="
    if result["verdict"] == "equal" and result.get("note"):
        return "equal, both passes"
    return "not finite" if result["verdict"] == "undecided" else str(result["verdict"])


def _remark(line: dict[str, Any]) -> str:
    """The first reason or note."""
    reasons = [r.get("reason") or r.get("note") for r in line["results"].values()]
    first = next((reason for reason in reasons if reason), "")
    return _escaped(first.removeprefix(f"{line['case']}: "))


def _escaped(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("<", "&lt;")[:160]


if __name__ == "__main__":
    PAGE.write_text(page())
