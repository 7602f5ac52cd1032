"""`import ift` works without the trainers' libraries; what needs one names it."""

import subprocess
import sys

import pytest

BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.split(".")[0])
sys.meta_path.insert(0, Block())
"""


def run(names, code):
    return subprocess.run(
        [sys.executable, "-c", BLOCKED.format(names=names) + code], capture_output=True, text=True
    )


def test_ift_without_any_of_them():
    code = "import ift, ift_kernels, ift.losses; ift.IFTConfig(); print('fine')"
    done = run(("transformers", "trl", "peft", "triton", "accelerate", "datasets"), code)
    assert done.stdout == "fine\n", done.stderr


@pytest.mark.parametrize(
    ("names", "code", "extra"),
    [
        (("transformers",), "import ift; ift.patch", "ift-kernels[train]"),
        (("trl",), "import ift.integrations.trl", "ift-kernels[trl]"),
    ],
)
def test_what_needs_one_names_its_extra(names, code, extra):
    done = run(names, code)
    assert done.returncode and extra in done.stderr.splitlines()[-1]
