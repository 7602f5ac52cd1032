"""Why a compiled module of this package is not there."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from typing import Any

from ift_kernels.backends import contract


def check_contract(module: Any) -> None:
    """Refuse a compiled module of other sources, whose results would be wrong without a word.

    Raises:
        ImportError: it implements another version of the backends' contract.
    """
    if (found := getattr(module, "contract", 1)) != contract.VERSION:
        raise ImportError(
            f"it implements version {found} of the backends' contract, this package has version "
            f"{contract.VERSION}: rebuild it, by reinstalling ift-kernels"
        )


def extension_error(what: str, module: str, error: ImportError, remedy: str = "") -> str:
    """Why a compiled module of this package is not there."""
    if importlib.util.find_spec(f"ift_kernels.{module}") is not None:
        return f"{what} does not load ({error})"
    package = Path(__file__).resolve().parents[1]
    if installed := _installed_elsewhere(module, package):
        return (
            f"{what} is not in {package}, which hides the installed package in {installed}: start "
            "Python in another folder (python -m puts the current one first on sys.path)"
        )
    return f"{what} was not built{remedy}"


def _installed_elsewhere(module: str, package: Path) -> Path | None:
    """Another folder of this package on the path, which has the compiled module."""
    for entry in sys.path:
        folder = Path(entry, "ift_kernels").resolve()
        files = (folder / f"{module}{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES)
        if folder != package and any(file.exists() for file in files):
            return folder
    return None
