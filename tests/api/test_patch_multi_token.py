"""Models whose checkpoints have layers for multi-token prediction: what a patch leaves as it is,
and how those layers are trained."""

import pytest
import torch
import transformers as hf

import ift
from causal_lms import SMALL
from examples.multi_token import NextDepth, States
from ift.losses import MultiTokenLoss, multi_token_targets

layers = pytest.importorskip("transformers.modeling_layers")
if not hasattr(layers, "MtpModel"):
    pytest.skip("this transformers has no MTP layers", allow_module_level=True)

V, DEPTHS = SMALL["vocab_size"], 3
EXPERTS = {
    "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}  # fmt: skip
CONFIGS = {
    "deepseek_v3": (hf.DeepseekV3Config, EXPERTS | LATENT | {"num_key_value_heads": 4}),
    "glm4_moe": (hf.Glm4MoeConfig, EXPERTS | {"head_dim": 8}),
}


def model_of(name):
    kind, more = CONFIGS[name]
    torch.manual_seed(0)
    config = kind(**SMALL | more | {"num_mtp_layers": DEPTHS - 1})
    return hf.AutoModelForCausalLM.from_config(config).eval()


IDS = torch.randint(V, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_patch_is_the_loss_of_transformers_which_has_no_part_for_further_tokens(name, tmp_path):
    model = model_of(name)
    names = [n for n, _ in model.named_parameters() if "mtp" in n or "eh_proj" in n]
    assert not names and len(model.model.layers) == SMALL["num_hidden_layers"]
    wanted = model(input_ids=IDS, labels=IDS).loss
    ift.patch(model)
    got = model(input_ids=IDS, labels=IDS)
    assert got.logits is None
    torch.testing.assert_close(got.loss, wanted)
    model.save_pretrained(tmp_path)
    saved = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="MtpModel weights are missing"):
        layers.MtpModel.from_pretrained(saved)


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_of_transformers_are_trained_through_the_patched_models_head(name):
    model = model_of(name)
    ift.patch(model)
    mtp = layers.MtpModel(model, DEPTHS - 1).eval()
    for layer in mtp.layers:  # whose experts are not initialised
        layer.mtp_block.load_state_dict(model.model.layers[-1].state_dict())
    position = torch.arange(IDS.shape[1]).expand_as(IDS)
    states = [model.model(IDS, use_cache=False).last_hidden_state]
    ids = IDS
    for depth in range(DEPTHS - 1):
        ids = torch.nn.functional.pad(ids[:, 1:], (0, 1))
        states.append(mtp.forward_layer(depth, states[-1], position, None, input_ids=ids))
    hidden, target = torch.stack(states), multi_token_targets(IDS, DEPTHS)
    got = MultiTokenLoss().from_hidden(hidden, model.lm_head.weight, target)
    logits = mtp._project_to_logits(hidden)
    logp = logits.log_softmax(-1).gather(-1, target.clamp(min=0)[..., None])[..., 0]
    wanted = MultiTokenLoss()(logp, target >= 0)
    torch.testing.assert_close(got, wanted)
    trained = [p for p in mtp.parameters() if p.requires_grad]
    found, right = (
        torch.autograd.grad(x, trained, retain_graph=True, allow_unused=True) for x in (got, wanted)
    )
    largest = max(g.abs().max() for g in right if g is not None)
    for a, b in zip(found, right, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a - b).abs().max() <= 1e-5 * largest
    assert sum(g is not None for g in found) > len(trained) / 2


def test_the_module_of_the_example_is_the_layer_of_transformers():
    torch.manual_seed(0)
    config = hf.LlamaConfig(**SMALL | {"num_mtp_layers": 1})
    model = hf.LlamaForCausalLM(config).eval()
    mtp = layers.MtpModel(model, 1).eval()
    (layer,) = mtp.layers
    states = States(model.model, 2).eval()
    (module,) = states.further
    assert isinstance(module, NextDepth)
    names = {"embedding_norm": "enorm", "hidden_norm": "hnorm", "projection": "eh_proj",
             "layer": "mtp_block", "norm": "post_norm"}  # fmt: skip
    for ours, theirs in names.items():
        getattr(module, ours).load_state_dict(getattr(layer, theirs).state_dict())
    position = torch.arange(IDS.shape[1]).expand_as(IDS)
    trunk, further = states(IDS, position)
    shifted = torch.nn.functional.pad(IDS[:, 1:], (0, 1))
    wanted = mtp.forward_layer(0, trunk, position, None, input_ids=shifted)
    torch.testing.assert_close(further[:, :-1], wanted[:, :-1])  # the last one sees what is padded


def test_packed_documents_are_what_they_are_alone():
    torch.manual_seed(0)
    states = States(hf.LlamaModel(hf.LlamaConfig(**SMALL)), DEPTHS).eval()
    weight, lengths = torch.randn(V, SMALL["hidden_size"]), (5, 2, 7)
    documents = [torch.randint(V, (1, length)) for length in lengths]
    positions = [torch.arange(length)[None] for length in lengths]
    loss = MultiTokenLoss(depth_weights=[1.0, 1.0, 1.0], reduction="sum")

    def value(ids, position):
        target = multi_token_targets(ids, DEPTHS, position_ids=position)
        return loss.from_hidden(states(ids, position), weight, target)

    together = value(torch.cat(documents, 1), torch.cat(positions, 1))
    alone = [value(*pair) for pair in zip(documents, positions, strict=True)]
    parameters = [*states.parameters()]
    torch.testing.assert_close(together, sum(alone))
    for a, b in zip(
        torch.autograd.grad(together, parameters), torch.autograd.grad(sum(alone), parameters),
        strict=True,
    ):  # fmt: skip
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
