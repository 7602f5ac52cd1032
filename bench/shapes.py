"""Sizes of linear heads: as numbers, or those of models that people train."""

from __future__ import annotations

import argparse

# Width and vocabulary, from the configuration files of the models.
MODELS = {
    "qwen2.5-0.5b": (896, 151936),
    "qwen2.5-7b": (3584, 152064),
    "llama-3-8b": (4096, 128256),
    "mistral-7b": (4096, 32000),
    "gemma-2-2b": (2304, 256000),
    "deepseek-v3": (7168, 129280),
}
SHAPES = ((2048, 1024, 32000), (1024, 896, 151936))  # N, D, V


def shape(text: str) -> tuple[int, int, int]:
    """Parse N, D and V: ``2048x1024x32000`` as numbers, or ``llama-3-8b@4096``, a model and N."""
    name, at, rows = text.lower().partition("@")
    parts = [rows, *map(str, MODELS[name])] if name in MODELS else text.lower().split("x")
    if at and name not in MODELS:
        raise argparse.ArgumentTypeError(
            f"expected one of {', '.join(MODELS)} before @, got {text!r}"
        )
    try:
        n, d, v = (int(part) for part in parts)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected NxDxV, as 2048x1024x32000, or a model and rows, as llama-3-8b@4096, got "
            f"{text!r}"
        ) from None
    if min(n, v) < 1 or d < 8:
        raise argparse.ArgumentTypeError(f"expected N, V ≥ 1 and D ≥ 8, got {text!r}")
    return n, d, v
