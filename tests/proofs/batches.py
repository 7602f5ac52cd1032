"""Batches for tiny models: unequal rows of a prompt and a response, padded left or right.

Multimodal models get an image in every prompt where one of a few usual forms of image inputs works:
the forward runs, and its loss depends on the pixels. Else they get text alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.proofs.tiny_models import FIRST_SPECIAL, IMAGE, PATCH

ROWS = ((16, 7), (13, 6), (15, 5))  # tokens of prompt and of response
TOKEN_COUNTS = (16, 4, 1, 8, 2, 9, 5, 17, 20, 24, 12, 25, 36, 64, 0)  # of an image


class Inputs(NamedTuple):
    """What a model gets beside the ids: an image for every row, or nothing."""

    form: str  # "text" or the shape of its pixels
    values: dict[str, Tensor]
    tokens: int  # placeholders in each row


def find_inputs(model: Any) -> Inputs:
    """The first image inputs that serve the model, or those of a text."""
    text = Inputs("text", {}, 0)
    if "pixel_values" not in inspect.signature(model.forward).parameters:
        return text
    for form, values in _image_forms(model):
        failures: list[str] = []
        for tokens in TOKEN_COUNTS:
            inputs = Inputs(form, values, tokens)
            try:
                if _uses_pixels(model, inputs):
                    return inputs
                failures.append("")
            except Exception as error:  # any: these inputs are a guess
                failures.append(str(error))
            if len(failures) > 1 and failures[0] and failures[-1] == failures[0]:
                break  # it is not the number of tokens that is wrong
    return text


def make_batch(model: Any, inputs: Inputs, padding: str) -> dict[str, Tensor]:
    """input_ids, attention_mask, labels and image inputs.

    Args:
        padding: "left" or "right".
    """
    g = torch.Generator().manual_seed(7)
    config = model.config
    before, after = _image_marks(config)
    placeholder = [_image_token(config)] * inputs.tokens
    image = before + placeholder + after if inputs.tokens else []
    length = max(p + r for p, r in ROWS) + len(image)
    ids = torch.zeros(len(ROWS), length, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    kinds = torch.zeros_like(ids)
    for row, (prompt, response) in enumerate(ROWS):
        text = torch.randint(3, FIRST_SPECIAL, (prompt + response,), generator=g).tolist()
        tokens = torch.tensor([1, *image, *text[1:]])
        size = len(tokens)
        at = slice(length - size, length) if padding == "left" else slice(0, size)
        ids[row, at], mask[row, at] = tokens, 1
        labels[row, at][-response:] = tokens[-response:]
        kinds[row, at] = (tokens == _image_token(config)).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    names = inspect.signature(model.forward).parameters
    if inputs.values:
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in names:
                batch[name] = kinds
    return {**batch, **inputs.values}


def _image_token(config: Any) -> int:
    for name in ("image_token_id", "image_token_index", "media_placeholder_token_id"):
        value = getattr(config, name, None)
        if isinstance(value, int):
            return value
    return FIRST_SPECIAL


def _image_marks(config: Any) -> tuple[list[int], list[int]]:
    """Tokens that stand before and behind an image, where the config has them."""
    marks: tuple[list[int], list[int]] = ([], [])
    for side, names in zip(
        marks,
        (("vision_start_token_id", "image_start_token_id"), ("vision_end_token_id",)),
        strict=True,
    ):
        found = [getattr(config, n) for n in names if isinstance(getattr(config, n, None), int)]
        side.extend(found[:1])
    return marks


def _image_forms(model: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    names = inspect.signature(model.forward).parameters
    config = model.config
    vision = getattr(config, "vision_config", config)

    def number(name: str, default: int) -> int:
        value = getattr(vision, name, default)
        value = value[0] if isinstance(value, (list, tuple)) and value else value
        return value if isinstance(value, int) else default

    g = torch.Generator().manual_seed(8)
    dtype = next(model.parameters()).dtype
    rows, size, patch = len(ROWS), number("image_size", IMAGE), number("patch_size", PATCH)
    channels = number("in_channels", number("num_channels", 3))

    def pixels(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    def given(values: dict[str, Tensor]) -> dict[str, Tensor]:
        values = {"high_res_pixel_values": values["pixel_values"], **values}
        return {name: value for name, value in values.items() if name in names}

    sizes = torch.tensor([[size, size]] * rows)
    if "image_grid_thw" in names or "grid_thw" in names:
        grid = torch.tensor([[1, 4, 4]] * rows)
        frames = number("temporal_patch_size", 1)
        for each in dict.fromkeys((frames, 1)):
            flat = pixels(16 * rows, channels * each * patch * patch)
            yield (
                "patches, grid",
                given({"pixel_values": flat, "image_grid_thw": grid, "grid_thw": grid}),
            )
        four = pixels(16 * rows, channels, patch, patch)
        yield (
            "patches of pixels, grid",
            given({"pixel_values": four, "image_grid_thw": grid, "grid_thw": grid}),
        )
    if "spatial_shapes" in names:
        yield (
            "patches, shapes",
            given(
                {
                    "pixel_values": pixels(rows, 16, channels * patch * patch),
                    "spatial_shapes": torch.tensor([[4, 4]] * rows),
                    "pixel_attention_mask": torch.ones(rows, 16, dtype=torch.int64),
                }
            ),
        )
    if "target_sizes" in names:
        yield (
            "strip of patches",
            given(
                {
                    "pixel_values": pixels(1, channels, patch, 16 * rows * patch),
                    "target_sizes": torch.tensor([[4, 4]] * rows),
                }
            ),
        )
    yield "image", given({"pixel_values": pixels(rows, channels, size, size)})
    yield "image", given({"pixel_values": pixels(rows, channels, size, size), "image_sizes": sizes})
    for tiles in (1, 2, 5):
        yield (
            f"{tiles} tiles",
            given(
                {
                    "pixel_values": pixels(rows, tiles, channels, size, size),
                    "pixel_attention_mask": torch.ones(rows, tiles, size, size, dtype=torch.int64),
                    "image_sizes": sizes,
                }
            ),
        )


def _uses_pixels(model: Any, inputs: Inputs) -> bool:
    batch = make_batch(model, inputs, "right")
    with torch.no_grad():
        one = model(**batch).loss
        other = model(**{**batch, "pixel_values": batch["pixel_values"].flip(0) * 0.5}).loss
    return bool(one.isfinite()) and abs(float(one - other)) > 1e-6
