"""`ift doctor`: what it reports of this machine and its settings."""

import json
import sys

from ift.cli import main
from processes import python


def test_doctor(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["python"] == sys.version.split()[0]
    assert all(report["versions"][name] for name in ("torch", "numpy", "transformers"))
    assert {"cpu", "reference"} <= {backend["name"] for backend in report["backends"]}
    assert report["threads"]["torch"] >= 1 and report["problem"] is None
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("torch", "transformers", "devices", "backends", "reference", "available"):
        assert word in text
    assert report["promises"]["deterministic"] == "holds"
    rounded = "bfloat16      logits to 2⁻⁸ of their size (2⁻²⁴ with logits_dtype=torch.float32)"
    assert rounded in text
    for backend in report["backends"]:
        if backend["plain_torch"]:
            assert f"in plain torch: {', '.join(backend['plain_torch'])}" in text


def test_doctor_reports_a_wrong_environment():
    done = python("-m", "ift.cli", "doctor", IFT_BACKEND="cpp")
    assert done.stderr == "" and done.returncode == 1
    assert "IFT_BACKEND=cpp" in done.stdout and "problem" in done.stdout
