"""Small random causal LMs of the architectures that `ift.patch` is tested on."""

import torch
import transformers as hf

import dense
from ift.checking import compare

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

GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4}
PER_LAYER = {
    "head_dim": 8,
    "vocab_size_per_layer_input": V,
    "hidden_size_per_layer_input": 6,
    "layer_types": ["sliding_attention", "full_attention"],
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
        GPT | {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    ),
    "granite": (hf.GraniteConfig, {"logits_scaling": 13.0, "embedding_multiplier": 3.0}),
    "cohere": (hf.CohereConfig, {"logit_scale": 0.0625}),
    "gemma3": (hf.Gemma3TextConfig, {"head_dim": 8, "query_pre_attn_scalar": 8}),
    "olmo2": (hf.Olmo2Config, {}),  # norms behind the layers
    "starcoder2": (hf.Starcoder2Config, {"use_bias": True}),  # tied
    "gemma3n": (  # layers look up tokens by themselves
        hf.Gemma3nTextConfig,
        {
            **PER_LAYER,
            "num_kv_shared_layers": 0,
            "laurel_rank": 4,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.0, 0.0],
        },
    ),
    # That too, and a softcap.
    "gemma4": (hf.Gemma4TextConfig, PER_LAYER | {"final_logit_softcapping": 3.0}),
    "mixtral": (  # auxiliary loss of a mixture of experts
        hf.MixtralConfig,
        {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5},
    ),
}
# For single tests.
OTHERS = {
    "opt": (  # positions from the mask
        hf.OPTConfig,
        {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "init_std": 0.2},
    ),
    "bloom": (  # biases by distance from the row's first token
        hf.BloomConfig,
        {"n_layer": 2, "n_head": 4, "hidden_dropout": 0.0, "attention_dropout": 0.0},
    ),
    "biogpt": (  # positions from the mask
        hf.BioGptConfig,
        {
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "activation_dropout": 0.0,
            "layerdrop": 0.0,
            "attn_implementation": "sdpa",
        },
    ),
    "roberta": (  # positions from the ids
        hf.RobertaConfig,
        {"is_decoder": True, "type_vocab_size": 1, "attn_implementation": "sdpa"},
    ),
    "gptj": (hf.GPTJConfig, GPT | {"rotary_dim": 4}),
    "falcon_h1": (  # embeddings scaled behind their module
        hf.FalconH1Config,
        {
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_chunk_size": 8,
            "embedding_multiplier": 5.0,
            "lm_head_multiplier": 0.5,
            "attn_implementation": "sdpa",
        },
    ),
}


def make(name, seed=0, **overrides):
    """A new model with random weights, in training mode."""
    config_class, special = (ARCHITECTURES | OTHERS)[name]
    size = SMALL if "n_embd" not in special else {k: SMALL[k] for k in SMALL if "_size" not in k}
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


def rows(targets, seed=0):
    """Rows of 12 tokens; of each so many, after three, are targets."""
    g, made = torch.Generator().manual_seed(seed), []
    for count in targets:
        ids = torch.randint(3, V, (12,), generator=g)
        labels = torch.full_like(ids, -100)
        labels[3 : 3 + count] = ids[3 : 3 + count]
        made.append({"input_ids": ids, "labels": labels})
    return made


def gradients(model):
    """Gradients by name, and a clean model."""
    grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return grads


def step(model, **inputs):
    """Loss and gradients of one forward and backward, and a clean model."""
    loss = model(**inputs).loss
    loss.backward()
    return loss.detach(), gradients(model)


def lora(model, **options):
    """The model in training mode with adapters that change it; its own weights are frozen."""
    import peft

    torch.manual_seed(1)
    adapters = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return peft.get_peft_model(model, peft.LoraConfig(**adapters | options)).train()


def token_metrics(model, rows):
    """Loss, accuracy and entropy over all targets of the rows, of logits in fp64."""
    ids, labels = (torch.stack([row[k] for row in rows]) for k in ("input_ids", "labels"))
    with torch.no_grad():
        z, target = model(input_ids=ids).logits[:, :-1].double(), labels[:, 1:]
    valid, stats = target != -100, dense.oracle.statistics(z, target)
    correct = (stats["argmax"] == target) & valid
    sums = {"loss": -stats["logprob"], "token_accuracy": correct, "entropy": stats["entropy"]}
    return {name: (value.sum() / valid.sum()).item() for name, value in sums.items()}


def packed(documents, labels):
    """Documents in one row, and the same documents as padded rows."""
    pad = torch.nn.utils.rnn.pad_sequence
    row = {
        "input_ids": torch.cat(documents)[None],
        "labels": torch.cat(labels)[None],
        "position_ids": torch.cat([torch.arange(len(d)) for d in documents])[None],
    }
    rows = {
        "input_ids": pad(documents, batch_first=True),
        "attention_mask": pad([torch.ones_like(d) for d in documents], batch_first=True),
        "labels": pad(labels, batch_first=True, padding_value=-100),
    }
    return row, rows


def assert_as_dense(model, inputs, *configs):
    """The loss and every gradient are those of the model's own logits; None in `configs` is SFT."""
    for config in configs:
        result = compare(model, inputs, ift=config)
        assert result.verdict == "equal", str(result)


def assert_same_step(ours, theirs, rtol=1e-5, atol=1e-6):
    """Two results of `step`: the loss within these tolerances, gradients within `assert_close`."""
    torch.testing.assert_close(ours[0], theirs[0], rtol=rtol, atol=atol)
    assert_close(ours[1], theirs[1])


def assert_close(ours, theirs, tolerance=1e-5):
    """Two sets of gradients: each tensor relative to its own largest entry."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        got = ours[name]
        assert (got is None) == (expected is None), name
        if expected is not None:
            error = (got - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
            assert error <= tolerance, f"{name}: {error:.2e}"
