"""Small random language models of real architectures, for whole training steps."""

from __future__ import annotations

from typing import Any

import torch

# Name → class of configuration, what makes the architecture itself, and the real vocabulary.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any], int]] = {
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}, 151936),
    "llama": ("LlamaConfig", {}, 128256),
    "mistral": ("MistralConfig", {}, 32000),
    "gemma2": (  # logits are capped
        "Gemma2Config", {"head_dim": 64, "query_pre_attn_scalar": 64}, 256000,
    ),
}  # fmt: skip


def make(
    architecture: str,
    *,
    hidden: int,
    layers: int,
    vocabulary: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Any:
    """A new model with random weights, in training mode.

    Args:
        hidden: width, a multiple of 64; heads have 64, the MLP 8/3 of it.
        vocabulary: None: that of the real models of this architecture.
    """
    import transformers

    config_class, special, real = ARCHITECTURES[architecture]
    heads = max(hidden // 64, 1)
    config = getattr(transformers, config_class)(
        vocab_size=vocabulary or real,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads % 2 == 0 else heads,
        max_position_embeddings=4096,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
        attn_implementation="eager" if architecture == "gemma2" else "sdpa",
        use_cache=False,
        **special,
    )  # fmt: skip
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype).train()
