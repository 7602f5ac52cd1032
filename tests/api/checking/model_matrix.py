"""Small real configurations for `ift.check`: name → model, batch, and what is expected."""

import torch
import transformers as hf

import causal_lms

RIGHT, REFUSED = "", "refused"


def adapter(name, kind="LoraConfig", **options):
    import peft

    torch.manual_seed(2)
    given = {"task_type": "CAUSAL_LM"} | options
    model = peft.get_peft_model(causal_lms.make(name), getattr(peft, kind)(**given))
    with torch.no_grad():
        for parameter in model.parameters():  # adapters start as the identity
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(0, 0.1)
    return model


def lora(name, **options):
    return causal_lms.lora(causal_lms.make(name), **options)


def resized(name, rows):
    model = causal_lms.make(name)
    model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def frozen_trunk(name):
    model = causal_lms.make(name)
    model.requires_grad_(False)
    model.get_output_embeddings().requires_grad_(True)
    return model


def vlm_text():
    """The text of a model that also takes pictures."""
    torch.manual_seed(0)
    text = {k: v for k, v in causal_lms.SMALL.items() if k != "attn_implementation"}
    config = hf.Qwen2_5_VLConfig(
        text_config=text | {"rope_parameters": {"mrope_section": [1, 1, 2], "rope_type": "default",
                                                "rope_theta": 1e4}},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2,
                       "out_hidden_size": 32},
        image_token_id=120, video_token_id=121, vision_start_token_id=122, vision_end_token_id=123,
    )  # fmt: skip
    return hf.Qwen2_5_VLForConditionalGeneration(config)


def left(batch):
    """Padding on the other side."""
    lengths = batch["attention_mask"].sum(1)
    width = batch["labels"].shape[1]
    rolled = [
        {k: v[i].roll(width - int(n)) for k, v in batch.items()} for i, n in enumerate(lengths)
    ]
    return {k: torch.stack([row[k] for row in rolled]) for k in batch}


def packed():
    ids = [torch.randint(3, causal_lms.V, (n,), generator=torch.Generator().manual_seed(n))
           for n in (5, 7)]  # fmt: skip
    return causal_lms.packed(ids, [torch.cat([i[:1] * 0 - 100, i[1:]]) for i in ids])[0]


class Int8Linear(torch.nn.Module):
    """A stand-in for the kinds of quantized layers: another class, integers and scales."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach()
        scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.weight = torch.nn.Parameter((weight / scale).round().to(torch.int8), False)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) * self.scale)


def quantized(name, *, head):
    model = causal_lms.make(name).requires_grad_(False)
    for parent in list(model.modules()):
        for key, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear and (head or key != "lm_head"):
                setattr(parent, key, Int8Linear(child))
    model.model.norm.requires_grad_(True)
    return model


def int8_head(name, **options):
    """Of torchao, in place; with options, LoRA around it."""
    from torchao import quantization

    model = causal_lms.make(name)
    quantization.quantize_(
        model, quantization.Int8WeightOnlyConfig(), lambda part, path: path == "lm_head"
    )
    model.lm_head.requires_grad_(False)
    return causal_lms.lora(model, **options) if options else model


def nf4_head(name, **options):
    """Of bitsandbytes, with LoRA around it."""
    import bitsandbytes as bnb

    model = causal_lms.make(name)
    weight = model.lm_head.weight.detach()
    model.lm_head = bnb.nn.Linear4bit(*weight.T.shape, bias=False)
    model.lm_head.weight = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type="nf4", module=model.lm_head
    )
    model.lm_head.to("cpu")  # which quantizes
    model.is_loaded_in_4bit = True
    return causal_lms.lora(model, **options)


make, batch = causal_lms.make, causal_lms.batch

# Name → (model, batch, expected): add a row, and a new kind is checked.
MODELS = {
    "llama": (lambda: make("llama"), batch, RIGHT),
    "llama, left padding": (lambda: make("llama"), lambda: left(batch()), RIGHT),
    "llama, packed": (lambda: make("llama", attn_implementation="sdpa"), packed, RIGHT),
    "qwen2, tied": (lambda: make("qwen2"), batch, RIGHT),
    "gemma2, tied, softcap": (lambda: make("gemma2"), batch, RIGHT),
    "phi, bias": (lambda: make("phi"), batch, RIGHT),
    "gpt2, learned positions": (lambda: make("gpt2"), lambda: left(batch()), RIGHT),
    "granite, scale": (lambda: make("granite"), batch, RIGHT),
    "mixtral, experts": (lambda: make("mixtral"), batch, RIGHT),
    "falcon_h1, states": (lambda: make("falcon_h1"), batch, RIGHT),
    "bf16": (lambda: make("llama").bfloat16(), batch, RIGHT),
    "frozen trunk": (lambda: frozen_trunk("llama"), batch, RIGHT),
    "lora": (lambda: lora("llama"), batch, RIGHT),
    "lora, tied": (lambda: lora("qwen2"), batch, RIGHT),
    "lora, head saved": (lambda: lora("llama", modules_to_save=["lm_head"]), batch, RIGHT),
    "dora": (lambda: lora("llama", use_dora=True), batch, RIGHT),
    "lora head": (lambda: lora("llama", target_modules=["q_proj", "lm_head"]), batch, RIGHT),
    "lora head, tied": (
        lambda: lora("qwen2", target_modules=["q_proj", "lm_head"]), batch, RIGHT,
    ),
    "token indices": (
        lambda: lora("llama", trainable_token_indices={"embed_tokens": [5, 9]}), batch, RIGHT,
    ),
    "token indices, tied": (
        lambda: lora("qwen2", trainable_token_indices={"embed_tokens": [5, 9]}), batch, REFUSED,
    ),
    "prompt tuning": (
        lambda: adapter("llama", "PromptTuningConfig", num_virtual_tokens=3), batch, RIGHT,
    ),
    "prefix": (lambda: adapter("llama", "PrefixTuningConfig", num_virtual_tokens=3), batch, RIGHT),
    "resized": (lambda: resized("llama", 140), batch, RIGHT),
    "resized, tied": (lambda: resized("qwen2", 160), batch, RIGHT),
    "quantized trunk": (lambda: quantized("llama", head=False), batch, RIGHT),
    "quantized head": (lambda: quantized("llama", head=True), batch, REFUSED),
    "int8 head": (lambda: int8_head("llama"), batch, RIGHT),
    "nf4 head, lora": (lambda: nf4_head("llama", target_modules=["lm_head"]), batch, RIGHT),
    "int8 head, lora": (lambda: int8_head("llama", target_modules=["lm_head"]), batch, RIGHT),
    "vlm, text": (vlm_text, lambda: batch(vocabulary=119), RIGHT),
}  # fmt: skip
