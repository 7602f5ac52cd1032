"""Small random causal LMs of the architectures that `ift.patch` is tested on."""

import torch
import transformers as hf

V = 131  # odd, and no other size in these models
SMALL = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
    "initializer_range": 0.3,  # losses far from log V, and no ties
}

# Name → config class, and what this architecture is in the list for.
ARCHITECTURES = {
    "llama": (hf.LlamaConfig, {}),
    "qwen2": (hf.Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (hf.Qwen3Config, {"head_dim": 8}),
    "mistral": (hf.MistralConfig, {"sliding_window": 8}),
    "gemma2": (  # logit softcap, embeddings scaled inside their module, tied
        hf.Gemma2Config,
        {"head_dim": 8, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    ),
    "phi": (hf.PhiConfig, {}),  # head with a bias
    "gpt2": (  # learned positions, tied
        hf.GPT2Config,
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
        },
    ),
    "granite": (hf.GraniteConfig, {"logits_scaling": 13.0, "embedding_multiplier": 3.0}),
    "cohere": (hf.CohereConfig, {"logit_scale": 0.0625}),
    "gemma3": (hf.Gemma3TextConfig, {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "olmo2": (hf.Olmo2Config, {}),  # norms behind the layers
    "starcoder2": (hf.Starcoder2Config, {"use_bias": True}),  # tied
    "gemma3n": (  # layers look up tokens by themselves
        hf.Gemma3nTextConfig,
        {
            "head_dim": 8,
            "vocab_size_per_layer_input": V,
            "hidden_size_per_layer_input": 6,
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0, 0.0],
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "gemma4": (  # that too, and a softcap
        hf.Gemma4TextConfig,
        {
            "head_dim": 8,
            "vocab_size_per_layer_input": V,
            "hidden_size_per_layer_input": 6,
            "final_logit_softcapping": 3.0,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mixtral": (  # auxiliary loss of a mixture of experts
        hf.MixtralConfig,
        {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5},
    ),
}


def make(name, seed=0, **overrides):
    """A new model with random weights, in training mode."""
    config_class, special = ARCHITECTURES[name]
    size = SMALL if name != "gpt2" else {k: SMALL[k] for k in SMALL if "_size" not in k}
    torch.manual_seed(seed)
    config = config_class(**{**size, "vocab_size": V, **special, **overrides})
    model = hf.AutoModelForCausalLM.from_config(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases start as ones and zeros: let them matter
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(rows=3, length=12, prompt=4, seed=0, vocabulary=V):
    """Rows of a prompt and a response, and padding on the right of all but the first."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (rows, length), generator=g)
    mask = torch.ones_like(ids)
    labels = ids.clone()
    labels[:, :prompt] = -100
    for row in range(1, rows):
        mask[row, length - row :] = 0
    return {
        "input_ids": ids.masked_fill(mask == 0, 0),
        "attention_mask": mask,
        "labels": labels.masked_fill(mask == 0, -100),
    }


def gradients(model):
    """Gradients by name, and a clean model."""
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return grads


def assert_close(ours, theirs, tolerance=1e-5):
    """Two sets of gradients: each tensor relative to its own largest entry."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        got = ours[name]
        assert (got is None) == (expected is None), name
        if expected is not None:
            error = (got - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
            assert error <= tolerance, f"{name}: {error:.2e}"
