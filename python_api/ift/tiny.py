"""A small random Llama and a tokenizer trained on the spot: a model that needs no download."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

PAD, EOS = "<|pad|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")


def train_tokenizer(texts: Iterable[str], vocab_size: int = 8192) -> Any:
    """Train a byte-level BPE tokenizer; every text can be encoded, seen or not.

    Args:
        texts: training text.
        vocab_size: upper bound of the vocabulary; little text gives a smaller one.

    Returns:
        A transformers fast tokenizer with pad and end tokens and a simple chat template.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from ift.chat_template import SIMPLE_CHAT_TEMPLATE

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, EOS, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS)
    fast.chat_template = SIMPLE_CHAT_TEMPLATE
    return fast


def tiny_llama(
    tokenizer: Any,
    *,
    hidden: int = 128,
    layers: int = 2,
    heads: int = 4,
    max_length: int = 1024,
    seed: int = 0,
    tied: bool = True,
) -> Any:
    """Build a random fp32 Llama for the tokenizer.

    Embedding and head are tied by default: with the released frozen-embedding path of IFT an untied
    random embedding would never learn.

    Args:
        tokenizer: gives the vocabulary and the special ids.
        hidden: model width; the MLP is 8/3 of it, in steps of 32.
        layers: transformer blocks.
        heads: attention heads.
        max_length: longest sequence.
        seed: of the initial weights, which are the same for the same seed.
        tied: whether the head is the embedding.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=-(-hidden * 8 // 96) * 32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
