"""Losses of vision-language models with images: positions, images and masks stay the model's."""

import pytest
import torch
import transformers as hf

from causal_lms import assert_as_dense
from ift.config import IFTConfig
from ift.patching import patch

TEXT = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 4,
}  # fmt: skip
IMAGE = 90


def tokens(rows, length, start, count, prompt):
    """Rows with an image of `count` tokens at column `start`; the last is padded on the left."""
    g = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 89, (rows, length), generator=g)
    ids[:, start : start + count] = IMAGE
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :prompt] = -100
    labels[-1, -2:] = -100
    if rows > 1:
        mask[-1, :2] = 0
        ids[-1, :2] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def qwen2_vl(rows=2):
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = hf.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={
            "depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2,
            "patch_size": 4,
        },
        image_token_id=IMAGE, video_token_id=91, vision_start_token_id=92, vision_end_token_id=93,
    )  # fmt: skip
    batch = tokens(rows, 16, 3, 4, 9)
    batch["pixel_values"] = torch.randn(16 * rows, 96)
    batch["image_grid_thw"] = torch.tensor([[1, 4, 4]] * rows)
    batch["mm_token_type_ids"] = (batch["input_ids"] == IMAGE).int()
    return hf.Qwen2VLForConditionalGeneration(config), batch


def llava(rows=2):
    clip = {"model_type": "clip_vision_model", "patch_size": 8, "projection_dim": 16}
    config = hf.LlavaConfig(
        vision_config=VISION | clip, text_config={"model_type": "llama", **TEXT},
        image_token_index=IMAGE, vision_feature_layer=-1,
    )  # fmt: skip
    batch = tokens(rows, 16, 3, 4, 9)
    batch["pixel_values"] = torch.randn(rows, 3, 16, 16)
    return hf.LlavaForConditionalGeneration(config), batch


def gemma3(rows=2):
    config = hf.Gemma3Config(
        text_config={**TEXT, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 64},
        vision_config=VISION, mm_tokens_per_image=4, image_token_index=IMAGE,
        boi_token_index=91, eoi_token_index=92,
    )  # fmt: skip
    batch = tokens(rows, 16, 3, 4, 9)
    batch["token_type_ids"] = (batch["input_ids"] == IMAGE).long()
    batch["pixel_values"] = torch.randn(rows, 3, 16, 16)
    return hf.Gemma3ForConditionalGeneration(config), batch


def idefics3(rows=2):
    config = hf.Idefics3Config(
        text_config={"model_type": "llama", **TEXT}, vision_config=VISION, image_token_id=IMAGE,
        scale_factor=2, tie_word_embeddings=False,
    )  # fmt: skip
    batch = tokens(rows, 16, 3, 4, 9)
    batch["pixel_values"] = torch.randn(rows, 1, 3, 16, 16)
    return hf.Idefics3ForConditionalGeneration(config), batch


MODELS = {make.__name__: make for make in (qwen2_vl, llava, gemma3, idefics3)}


@pytest.mark.parametrize("name", MODELS)
def test_sft_and_ift_with_images_are_those_of_the_logits(name):
    model, inputs = MODELS[name]()
    unshared = IFTConfig(share_prompt=False, lam=0.7)
    kth = IFTConfig(embedding_grad=True, rule="kth")
    assert_as_dense(model, inputs, None, IFTConfig(), unshared, kth)


@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_a_batch_with_images_reaches_the_next_one(name):
    (model, images), (_, text) = MODELS[name](), MODELS[name]()
    text = {k: text[k].clamp(max=80) for k in ("input_ids", "labels", "attention_mask")}
    model = patch(model.eval())
    with torch.no_grad():
        options = {"ift": IFTConfig()}
        alone = model(**text, **options).loss
        model(**images, **options)
        torch.testing.assert_close(model(**text, **options).loss, alone, rtol=1e-6, atol=1e-7)
        one = {k: v[:1] for k, v in text.items()}
        model(**one, **options)
        torch.testing.assert_close(model(**text, **options).loss, alone, rtol=1e-6, atol=1e-7)
