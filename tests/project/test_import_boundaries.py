"""`import ift` works without the trainers' libraries; what needs one names it."""

import pytest

from processes import python


def run_without(modules, code):
    """Run `code` in a process in which `modules` cannot be imported."""
    return python("-c", f"import sys; sys.modules.update(dict.fromkeys({modules!r}))\n{code}")


def test_ift_without_any_of_them():
    code = """
import ift, ift_kernels, ift.losses
assert ift.IFTConfig().lam == 0.2 and ift.losses.IFTLoss
for name in ("patch", "unpatch", "IFTTrainer"):
    try:
        getattr(ift, name)
    except ImportError as error:
        assert "ift-kernels[train]" in str(error) and name in str(error), error
    else:
        raise SystemExit(f"{name} loaded without transformers")
print("fine")
"""
    trainers = ("transformers", "trl", "peft", "triton", "accelerate", "datasets", "matplotlib")
    done = run_without(trainers, code)
    assert done.stdout == "fine\n", done.stderr


@pytest.mark.parametrize(
    ("names", "code", "extra"),
    [
        (("transformers",), "import ift; ift.patch", "ift-kernels[train]"),
        (("trl",), "import ift.integrations.trl", "ift-kernels[trl]"),
    ],
)
def test_what_needs_one_names_its_extra(names, code, extra):
    done = run_without(names, code)
    assert done.returncode and extra in done.stderr.splitlines()[-1]


def test_import_loads_no_transformers():
    done = python("-c", "import ift, sys; print('transformers' in sys.modules)")
    assert done.stdout == "False\n", done.stderr
