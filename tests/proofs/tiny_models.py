"""Tiny random models of every architecture that transformers maps to a causal or multimodal LM.

Each config class is made with its defaults and every size in it is reduced by the name of its
field; layers are kept so that each kind of layer occurs once. `FIXES` holds the exceptions.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

V = 131  # odd, and no other size in these models
WIDTH, HEADS, HEAD_DIM, FFN = 64, 4, 16, 96
IMAGE, PATCH = 32, 8
FIRST_SPECIAL = 100  # text uses ids 3 … 99; image tokens and the like lie above

MAPPINGS = {
    "text": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "multimodal": "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
}

# Field of a config → its value in a tiny one. Patterns match whole names; the first match wins.
SIZES: tuple[tuple[str, Any], ...] = (
    (r"vocab_size_per_layer_input|.*vocab_size", V),
    (r"hidden_size_per_layer_input", 8),
    (r"(num_)?(hidden_|decoder_|encoder_)?layers|n_layers?|depth|num_layers_per_stack", "layers"),
    (r"num_blocks|conf_num_hidden_layers|resampler_depth|num_(en|de)coder_layers", "layers"),
    (r"mamba_(n|num)_heads", 8),
    (r".*num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups", "kv_heads"),
    (r".*(attention_heads|num_heads|n_heads?|num_attn_heads|resampler_heads)", HEADS),
    (r"linear_num_(key|value)_heads|linear_num_heads|index_n_heads", HEADS),
    (r"qk_(nope|rope)_head_dim", HEAD_DIM // 2),
    (r"qk_head_dim", HEAD_DIM),
    (r"(global_|v_|linear_|linear_key_|linear_value_|index_|swa_|attention_)?head_dim", HEAD_DIM),
    (r"dim_head|d_kv|d_head|kv_channels|attention_head_size|resampler_(dim_)?head_dim", HEAD_DIM),
    (r"rotary_dim", HEAD_DIM // 2),
    (r"mamba_head_?dim|mamba_d_head", 16),
    (r"query_pre_attn_scalar", HEAD_DIM),
    (r".*lora_rank|laurel_rank|adapter_rank|.*_lowrank|gated_norm_rank", 8),
    (r"mamba_d_state|ssm_state_size|state_size", 8),
    (r"(mamba_)?chunk_size|mamba_chunk_size", 8),
    (r"time_step_rank|mamba_dt_rank", 4),
    (r"mamba_d_ssm", 2 * WIDTH),
    (r"n_groups|mamba_n_?groups|n_group|num_expert_group|topk_group", 1),
    (r".*n(um)?_shared_experts", 1),
    (r"(moe_)?(num_|n_)(local_|routed_)?experts|expert_num", 4),
    (r"zero_expert_num", 2),
    (r"num_experts_per_tok(en)?|moe_(k|topk|top_k)|top_k_experts", 2),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"num_nextn_predict_layers|num_mtp_layers|num_kv_shared_layers", 0),
    (r"attn_layer_period|expert_layer_period|layer_group_size|global_attn_every_n_layers", 2),
    (r"attn_layer_offset|expert_layer_offset", 1),
    (r"max_window_layers|insert_layer_id", 1),
    (r"index_topk|index_topk_blocks", 4),
    (r".*sliding_window(_size)?|attention_window_size|local_attention", 8),
    (r"window_size", IMAGE),
    (r"attention_chunk_size", 16),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_(source|target)_positions", 128),
    (r"image_size", IMAGE),
    (r"patch_size", PATCH),
    (r"encoder_hash_byte_group_vocab", 50),
    (r"base_channels", 32),
    (r"num_embeddings|codebook_size|num_embeds", 64),
    (r"num_position_embeddings", 16),
    (r"pos_emb_(height|width)|posemb_grid_size", 4),
    (r"mm_tokens_per_image|num_query_tokens|latent_query_num|resampler_n_latents", 4),
    (r"vision_soft_tokens_per_image|audio_soft_tokens_per_image", 4),
    (r".*(intermediate_size(_mlp)?|ffn_dim|ffn_hidden_size|mlp_dim|d_ff|dim_ff|d_inner)", FFN),
    (r"dff|n_inner|feed_forward_size|share_expert_dim", FFN),
    (r".*(hidden_size|d_model|n_embd|embed_dim|hidden_dim|emb_dim|embedding_size)", WIDTH),
    (r"word_embed_proj_dim|embedding_dim|lru_width|attention_hidden_size", WIDTH),
    (r"(projection|output|out|projector_input|projector_output|projector_hidden)_dim", WIDTH),
    (r"vision_output_dim|adapter_(in|out)_dim|text_dim|projection_hidden_dim", WIDTH),
    (r".*(dropout|dropout_prob|dropout_rate|pdrop|layerdrop|drop_path_rate|dropout_p)", 0.0),
    (r".*jitter.*", 0.0),
    (r".*mask_time_prob|mask_feature_prob", 0.0),
    (r"initializer_range|init_std", 0.2),  # losses far from log V, and no ties
    (r"scale_depth", 1.4),
)  # fmt: skip
_SIZES = [(re.compile(pattern), value) for pattern, value in SIZES]
SPECIAL_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SPECIAL_ID = re.compile(r".*(token|patch|newline|start|end|bos|eos|pad)_(id|index)|image_token")
_INDEX_LISTS = re.compile(r".*(index|indexes|indices|idxs|_ids|_layers|layer_ids)$")

# Class → values, dotted for those of a config inside.
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_BY_LAYER = {"full_attention": _MROPE, "sliding_attention": _MROPE}
_QSA = {"n_heads": 4, "kv_heads": 1, "head_dim": 16, "budget": 8, "compress_ratio": 2}
_MOE = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": FFN}


def _inside(path: str, values: dict[str, Any]) -> dict[str, Any]:
    return {f"{path}.{name}": value for name, value in values.items()}


FIXES: dict[str, dict[str, Any]] = {
    "AriaForConditionalGeneration": {"projector_patch_to_query_dict": {16: 4}},
    "Blip2ForConditionalGeneration": {"image_token_index": FIRST_SPECIAL},
    "InstructBlipForConditionalGeneration": {"image_token_index": FIRST_SPECIAL},
    "DeepseekV2ForCausalLM": {"num_experts_per_tok": 2, "n_routed_experts": 4},
    "ChameleonForConditionalGeneration": {"vocabulary_map": {"<image>": FIRST_SPECIAL}},
    "CohereCompassForCausalLM": {"rope_parameters": _BY_LAYER},
    "CohereCompassForConditionalGeneration": {"text_config.rope_parameters": _BY_LAYER},
    "DbrxForCausalLM": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8.0},
    "DeepseekOcr2ForConditionalGeneration": {
        "text_config.mlp_layer_types": ["dense", "sparse"],
        "text_config.num_experts_per_tok": 2,
    },
    "DiffusionGemmaForBlockDiffusion": _inside("text_config", _MOE),
    "Dots1ForCausalLM": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "Dots3NoteForConditionalGeneration": {"audio_config.adapter_input_size": WIDTH},
    "Ernie4_5_VLMoeForConditionalGeneration": {
        "text_config.rope_parameters": _MROPE | {"mrope_section": [3, 3, 2]}
    },
    "Florence2ForConditionalGeneration": {
        "vision_config.embed_dim": (16, 16, 16, 16),
        "vision_config.num_heads": (2, 2, 2, 2),
        "vision_config.num_groups": (2, 2, 2, 2),
        "vision_config.depths": (1, 1, 1, 1),
    },
    "FunAsrNanoForConditionalGeneration": {"adaptor_config.intermediate_size": WIDTH // 4},
    "Glm5NextForConditionalGeneration": {"text_config.index_kpool": 2},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "Granite4VisionForConditionalGeneration": {"deepstack_layer_map": [(-1, 0)]},
    "HunYuanDenseV1ForCausalLM": {"head_dim": HEAD_DIM},
    "HunYuanMoEV1ForCausalLM": {"head_dim": HEAD_DIM},
    "HunYuanVLForConditionalGeneration": {"text_config.head_dim": HEAD_DIM},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"]},
    "Mamba2ForCausalLM": {"num_heads": 8},
    # In fp32 whatever their dtype: at 0.2 rounding alone moves gradients by 5e-5.
    "MiniCPMV4_6ForConditionalGeneration": {"text_config.initializer_range": 0.1},
    "MiniCPMV4_7ForConditionalGeneration": {"text_config.initializer_range": 0.1},
    "MinistralForCausalLM": {"head_dim": HEAD_DIM},
    "Molmo2ForConditionalGeneration": {"adapter_config.vision_feature_layer": [1, 0]},
    "NemotronForCausalLM": {"num_key_value_heads": 2},
    "NemotronH_Omni_Reasoning_V3": {"vision_config.video_temporal_patch_size": 2},
    "Qwen2VLForConditionalGeneration": {"text_config.rope_parameters": _MROPE},
    "Qwen2_5_VLForConditionalGeneration": {"text_config.rope_parameters": _MROPE},
    "Qwen4ExpForCausalLM": {f"indexer_{name}": value for name, value in _QSA.items()},
    "Qwen4ExpForConditionalGeneration": {
        f"text_config.indexer_{name}": value for name, value in _QSA.items()
    },
    "ZambaForCausalLM": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model class that an auto class of transformers makes from a config."""

    name: str  # of the class
    model_type: str
    kind: str  # key of MAPPINGS: the first one that has it


def architectures() -> list[Architecture]:
    """Every class of `MAPPINGS` once, in the order of the mappings."""
    found: dict[str, Architecture] = {}
    for kind, mapping in MAPPINGS.items():
        for model_type, names in getattr(modeling_auto, mapping).items():
            for name in (names,) if isinstance(names, str) else names:
                found.setdefault(name, Architecture(name, model_type, kind))
    return list(found.values())


def tiny_config(architecture: Architecture) -> Any:
    """Its config with every size reduced."""
    model_class = getattr(transformers, architecture.name)
    config_class = model_class.config_class or CONFIG_MAPPING[architecture.model_type]
    return _Shrinker(FIXES.get(architecture.name, {})).shrunk(config_class, "")


def tiny_model(
    architecture: Architecture, dtype: torch.dtype = torch.float64, *, limit: int = 20_000_000
) -> Any:
    """The model with random weights, the same ones every time.

    Raises:
        Exception: whatever transformers raises for its config, optional packages included.
        ValueError: it has more than `limit` parameters all the same.
    """
    config = tiny_config(architecture)
    model_class = getattr(transformers, architecture.name)
    with torch.device("meta"):
        size = sum(p.numel() for p in _from_config(model_class, config).parameters())
    if size > limit:
        raise ValueError(f"{size} parameters after shrinking its config")
    torch.manual_seed(0)
    model = _from_config(model_class, config).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and dtype == torch.float32:
                parameter.mul_(0.5)  # less sharp attention amplifies rounding less
            if parameter.dim() <= 1:  # norms and biases start as ones and zeros: let them matter
                parameter.add_(0.1 * torch.randn_like(parameter))
            if not bool(parameter.isfinite().all()):  # `torch.empty` that is never initialised
                parameter.copy_(0.2 * torch.randn_like(parameter))
    return model.eval()


def _from_config(model_class: Any, config: Any) -> Any:
    for options in ({"experts_implementation": "eager"}, {}):
        try:
            return model_class._from_config(config, **options)
        except (ValueError, TypeError, KeyError) as error:
            refused = error
    raise refused


class _Shrinker:
    """Shrinks one config and those inside it; image tokens are numbered across all of them."""

    def __init__(self, fixes: dict[str, Any]) -> None:
        self.fixes = fixes
        self.special: dict[str, int] = {}

    def shrunk(self, config_class: Any, path: str) -> Any:
        prefix = f"{path}." if path else ""
        fixes = {
            key.removeprefix(prefix): value
            for key, value in self.fixes.items()
            if key.startswith(prefix) and "." not in key.removeprefix(prefix)
        }
        first = {k: v for k, v in fixes.items() if isinstance(v, PreTrainedConfig)}
        default = config_class(**first)
        own = dict(self._values(default))
        kept = self._kept_layers(default)
        values: dict[str, Any] = {}
        for name, value in own.items():
            if isinstance(value, PreTrainedConfig):
                inner = value if name in first else self.shrunk(type(value), prefix + name)
                values[name] = inner
            else:
                new = self._shrink(name, value, own, kept)
                if new is not value:
                    values[name] = new
        if "mrope_section" in getattr(config_class, "ignore_keys_at_rope_validation", ()):
            rope = dict(default.rope_parameters or {})
            if not any(isinstance(value, dict) for value in rope.values()):
                values["rope_parameters"] = _rope({"mrope_section": [16, 24, 24], **rope})
        values.update(fixes)
        return config_class(**values)

    @staticmethod
    def _values(config: Any) -> Iterator[tuple[str, Any]]:
        skipped = {field.name for field in dataclasses.fields(PreTrainedConfig)}
        skipped |= {"id2label", "label2id", "architectures", "torch_dtype"}
        skipped -= {"bos_token_id", "eos_token_id", "pad_token_id"}
        stored = vars(config)
        for field in dataclasses.fields(config):
            name = config.attribute_map.get(field.name, field.name)
            if field.name not in skipped and name in stored:
                yield field.name, stored[name]

    @staticmethod
    def _kept_layers(config: Any) -> tuple[int, list[int]]:
        """Number of layers, and those that stay: the first of each kind, at least two."""
        count = getattr(config, "num_hidden_layers", None)
        if not isinstance(count, int) or count < 1:
            return 0, [0, 1]
        lists = [v for v in vars(config).values() if isinstance(v, list) and len(v) == count]
        lists = [v for v in lists if all(isinstance(each, str) for each in v)]
        first: dict[Any, int] = {}
        for index in range(count):
            first.setdefault(tuple(v[index] for v in lists), index)
        kept = sorted(first.values())[:5]
        others = [i for i in range(count) if i not in kept]
        return count, sorted(kept + others[: max(0, 2 - len(kept))])

    def _shrink(
        self, name: str, value: Any, own: dict[str, Any], kept: tuple[int, list[int]]
    ) -> Any:
        count, layers = kept
        if name in SPECIAL_IDS:
            return SPECIAL_IDS[name]
        if re.fullmatch(
            r".*(token|patch|newline|start|end|bos|eos|pad)_(id|index)|image_token", name
        ):
            if value is None and "token_id" not in name:
                return value
            return self.special.setdefault(name, FIRST_SPECIAL + len(self.special))
        if name == "is_decoder" and not own.get("is_encoder_decoder"):
            return True
        if name == "rope_parameters" and isinstance(value, dict):
            return _rope(value)
        if isinstance(value, (list, tuple)):
            if count and len(value) == count:
                return type(value)(value[i] for i in layers)
            if _INDEX_LISTS.match(name) and value and all(type(v) is int for v in value):
                inside = [v for v in value if v < len(layers)] or [len(layers) - 1]
                return type(value)(inside)
        for pattern, small in _SIZES:
            if not pattern.fullmatch(name):
                continue
            if small == "layers":
                small = len(layers)
            elif small == "kv_heads":
                small = _kv_heads(value, own)
            return small if _may_replace(value, small) else value
        return value


def _kv_heads(value: Any, own: dict[str, Any]) -> Any:
    heads = next((own[n] for n in ("num_attention_heads", "n_heads", "num_heads") if n in own), 0)
    return value if value in (None, 1) else HEADS if value == heads else HEADS // 2


def _may_replace(value: Any, small: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return value != small and (isinstance(small, float) or value > small)


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """The same rotary embedding; sections scaled to the smaller head."""
    if any(isinstance(value, dict) for value in parameters.values()):
        return {k: _rope(v) if isinstance(v, dict) else v for k, v in parameters.items()}
    small = dict(parameters)
    section = small.get("mrope_section")
    if section:
        half = HEAD_DIM // 2
        if "partial_rotary_factor" in small:
            half = int(half * small["partial_rotary_factor"])
        scaled = [max(1, round(s * half / sum(section))) for s in section]
        scaled[0] += half - sum(scaled)
        small["mrope_section"] = scaled
    return small
