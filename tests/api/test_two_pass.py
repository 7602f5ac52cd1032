"""IFT inside a patched forward, against the released algorithm in plain torch."""

import contextlib
import importlib.util
import logging

import pytest
import torch
import transformers as hf

import dense
from bench.peers.naive_ift import naive_ift_loss
from causal_lms import (
    ARCHITECTURES,
    V,
    assert_as_dense,
    assert_close,
    batch,
    gradients,
    make,
    packed,
    step,
)
from ift.config import IFTConfig
from ift.head_options import HeadOptions
from ift.measure import Measured
from ift.patching import patch, unpatch
from ift.two_pass import _prediction
from ift_kernels.common.transform import LogitTransform
from proofs.models import architecture_of
from proofs.tiny_models import tiny_model

NAMES = [name for name in ARCHITECTURES if name != "mixtral"]  # tested by itself below


def naive(model, inputs, **options):
    """Loss and gradients of the port; zeros for an input embedding that it leaves without."""

    def look_up(model, args, kwargs):  # Gemma 3n and 4: what layers add to a token goes unmixed
        if "inputs_embeds" in kwargs:
            kwargs["per_layer_inputs"] = model.model.get_per_layer_inputs(inputs["input_ids"])
        return args, kwargs

    hooks = contextlib.ExitStack()
    if hasattr(model.base_model, "get_per_layer_inputs"):
        hooks.callback(model.register_forward_pre_hook(look_up, with_kwargs=True).remove)
    with hooks:
        loss = naive_ift_loss(
            model, inputs["input_ids"], inputs["labels"], inputs["attention_mask"], **options
        )
    loss.backward()
    return loss, gradients(model)


def fused(model, inputs, config=None, **more):
    return step(model, **inputs, ift=config or IFTConfig(), **more)


def compare(ours, theirs, embedding=True):
    (loss, grads), (expected_loss, expected) = ours, theirs
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6, check_dtype=False)
    for name, grad in expected.items():
        if grad is None:  # the frozen input path: zeros here, so that DDP is content
            assert embedding and not grads[name].any()
            grads[name] = None
    assert_close(grads, expected)


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_the_released_algorithm(name):
    model, inputs = make(name), batch()
    if name == "gemma4":  # its norms over heads of 8 make 2e-5 of float32's rounding
        model = model.double()
    theirs = naive(model, inputs)
    compare(fused(patch(model), inputs), theirs)


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({"rule": "kth", "k": 3}, {"rule": "kth", "k": 3}),
        ({"lam": 0.7, "gamma": 0.5}, {"lam": 0.7, "gamma": 0.5}),
        ({"lam": 0.0, "gamma": 0.0}, {"lam": 0.0, "gamma": 0.0}),
        ({"lam": 1.0, "objective": "paper"}, {"lam": 1.0, "objective": "paper"}),
        ({"objective": "algorithm1"}, {"objective": "algorithm1"}),
        ({"side": "right", "norm": "L2"}, {"side": "right", "norm": "L2"}),
        ({"propagation": "logps", "detach_weights": True}, {"kind": "logps", "detach": True}),
    ],
    ids=str,
)
def test_options_reach_both_passes(options, theirs):
    model, inputs = make("llama"), batch()
    expected = naive(model, inputs, **theirs)
    compare(fused(patch(model), inputs, IFTConfig(**options)), expected)


def test_the_schedule_follows_the_step():
    model, inputs = patch(make("llama")), batch()
    schedule = {"lam": 0.8, "lambda_schedule": "linear", "warmup_steps": 4}
    expected = fused(model, inputs, IFTConfig(lam=0.4))
    compare(fused(model, inputs, IFTConfig(**schedule, step=2)), expected)
    assert fused(model, inputs, IFTConfig(**schedule, step=3))[0] != expected[0]


@pytest.mark.parametrize("rows", ["padded on the left", "with gaps", "one without response"])
def test_kinds_of_rows(rows):
    model, inputs = make("qwen3" if rows == "with gaps" else "llama"), batch()
    if rows == "padded on the left":
        inputs = {k: v.flip(1) for k, v in inputs.items()}
    elif rows == "with gaps":  # and with a response from the first token
        inputs = batch(prompt=0)
        inputs["labels"][:, 3:6] = -100
    else:
        inputs["labels"][1] = -100
    expected = naive(model, inputs)
    compare(fused(patch(model), inputs), expected)


def test_no_response_tokens_at_all():
    model, inputs = patch(make("llama")), batch()
    inputs["labels"].fill_(-100)
    loss, grads = fused(model, inputs)
    assert loss == 0 and not any(g.any() for g in grads.values())


def eager_ift(model, inputs, other, lam=0.2, gamma=0.0):
    """Loss of the second pass on embeddings mixed with `other` (B, T, E), gradient everywhere."""
    own = model.get_input_embeddings()(inputs["input_ids"])
    mixed_at = (inputs["labels"] != -100)[..., None] & (torch.arange(own.shape[1]) > 0)[:, None]
    mixed = torch.where(mixed_at, (1 - lam) * own + lam * other, own)
    logits = model(inputs_embeds=mixed, attention_mask=inputs["attention_mask"]).logits
    target = inputs["labels"][:, 1:]
    logprob = dense.oracle.statistics(logits[:, :-1], target)["logprob"]
    loss = (-logprob.sum(-1) / (target != -100).sum(-1)).mean()
    loss.backward()
    return loss, gradients(model)


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi", "gpt2"])
@pytest.mark.parametrize("rule", ["greedy", "soft"])
def test_gradient_through_the_input_embedding(name, rule):
    model, inputs = make(name), batch()
    inputs["input_ids"][0, 1] = 0  # the padding token where it counts: its row has no gradient
    embedding = model.get_input_embeddings()
    with torch.no_grad():
        logits = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).logits
        soft = logits.softmax(-1) @ embedding(torch.arange(V))
    other = embedding(logits.argmax(-1)) if rule == "greedy" else soft
    expected = eager_ift(model, inputs, other.roll(1, 1))
    config = IFTConfig(gamma=0.0, rule=rule, embedding_grad=True)
    compare(fused(patch(model), inputs, config), expected, embedding=False)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("given", ["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("rule", ["greedy", "soft"])
def test_packed_documents_are_as_apart_as_rows(name, given, rule):
    model, lengths = patch(make(name)), [7, 1, 12, 5]
    config = IFTConfig(rule=rule)
    g = torch.Generator().manual_seed(1)
    documents = [torch.randint(3, V, (n,), generator=g) for n in lengths]
    labels = [d.clone() for d in documents]  # from the first token: no neighbour may predict it
    labels[2][:4] = -100
    row, rows = packed(documents, labels)
    expected = fused(model, rows, config)
    if given == "cu_seq_lens":
        cu = torch.tensor([0, *lengths]).cumsum(0).int()
        row |= {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu}
    compare(fused(model, row, config), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is None, reason="needs ift-kernels[flash]"
)
@pytest.mark.parametrize("config", [None, IFTConfig()], ids=["sft", "ift"])
def test_packed_rows_of_flash_attention_are_rows(config):
    options = {"head_dim": 32, "hidden_size": 128, "intermediate_size": 256}
    flash = make("llama", attn_implementation="flash_attention_2", **options)
    plain = make("llama", attn_implementation="sdpa", **options)
    lengths, g = [7, 12, 5], torch.Generator().manual_seed(0)
    documents = [torch.randint(3, V, (n,), generator=g) for n in lengths]
    cu = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    labels = [d.index_fill(0, torch.tensor(0), -100) for d in documents]
    row, rows = ({k: v.cuda() for k, v in form.items()} for form in packed(documents, labels))
    row |= {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu}
    row |= {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    losses = []
    for model, inputs in ((flash, row), (plain, rows)):
        model = patch(model.to("cuda", torch.bfloat16))
        losses.append(model(**inputs, ift=config).loss)
    torch.testing.assert_close(*losses, rtol=2e-2, atol=0.0)


def first_pass(model, inputs):
    """Of a plain forward: the sum of the rows' mean losses, and `token_metrics` with the loss."""
    model.eval()
    with torch.no_grad():
        logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits[:, :-1]
    target = inputs["labels"][:, 1:]
    mask, logp = target != -100, logits.log_softmax(-1)
    nll = -logp.gather(-1, target.clamp(min=0)[..., None])[..., 0] * mask
    right, entropy = logits.argmax(-1) == target, -(logp.exp() * logp).sum(-1)
    tokens = {"nll": nll, "correct": right & mask, "entropy": entropy * mask, "tokens": mask}
    model.train()
    means = nll.sum(1) / mask.sum(1).clamp(min=1)
    return means.sum().item(), {name: value.sum().item() for name, value in tokens.items()}


@pytest.mark.parametrize(
    "options",
    [
        *({"rule": rule} for rule in ("greedy", "kth", "sample", "soft")),
        *({"lam": 0.0}, {"share_prompt": False}, {"objective": "paper", "gamma": 0.5}),
    ],
    ids=str,
)
def test_losses_of_both_passes_are_reported(options):
    """As sums over rows, one of which has no response, whatever they are divided by."""
    model, inputs = make("llama"), batch(rows=4)
    inputs["labels"][2] = -100
    expected, tokens = first_pass(model, inputs)
    patch(model)
    for training, num_rows in ((True, None), (True, 7), (False, None)):
        model.train(training)
        loss = model(**inputs, ift=IFTConfig(num_rows=num_rows, **options)).loss.item()
        found = {name: value.item() for name, value in model.ift_metrics.items()}
        assert found["rows"] == 3
        assert found["loss_sft"] == pytest.approx(expected, rel=1e-5)
        assert found["loss_ift"] == pytest.approx(loss * (num_rows or 3), rel=1e-5)
        first = {name[6:]: value for name, value in found.items() if name.startswith("first_")}
        assert first == ({} if training else pytest.approx(tokens, rel=1e-5))


def test_losses_of_both_passes_of_packed_rows_are_those_of_the_rows():
    documents = [torch.randint(3, V, (length,)) for length in (5, 8, 3)]
    labels = [d.index_fill(0, torch.tensor(0), -100) for d in documents]
    model, found = patch(make("llama")), []
    for inputs in packed(documents, labels):
        model(**inputs, ift=IFTConfig())
        found.append({name: value.item() for name, value in model.ift_metrics.items()})
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[0]["rows"] == 3


def test_sampled_rows_never_share_their_noise_and_repeat_by_step():
    model = patch(make("llama"))
    state, flat = model._ift_patch, torch.zeros(V, 32)  # equal logits: draws are all noise
    state.measured = Measured(LogitTransform(), False)

    def draws(step, rows):
        config = IFTConfig(rule="sample", step=step)
        target = torch.zeros(rows, 1, dtype=torch.int64)
        callback = _prediction(model, target, config, state, HeadOptions())
        predicted, _ = callback(torch.zeros(rows, 1, 32), flat, None)
        return predicted.flatten().tolist()

    in_one_forward = draws(5, 4)
    assert len(set(in_one_forward)) > 1
    assert draws(6, 4) != in_one_forward
    assert draws(5, 1) + draws(5, 3) == in_one_forward  # two forwards of the same step


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_checkpointing_keeps_every_gradient(name, reentrant, frozen):
    model, inputs = patch(make(name)), batch()
    if frozen:
        model.get_input_embeddings().requires_grad_(False)
    expected = fused(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    compare(fused(model, inputs), expected)


def test_dropout_is_drawn_in_both_passes_as_the_model_is():
    model, inputs = patch(make("gpt2", resid_pdrop=0.3)), batch()
    model(**inputs, ift=IFTConfig())
    torch.manual_seed(1)
    first, state = model(**inputs, ift=IFTConfig()).loss, torch.get_rng_state()
    torch.manual_seed(1)
    assert model(**inputs, ift=IFTConfig()).loss == first
    assert torch.equal(torch.get_rng_state(), state)
    assert model(**inputs, ift=IFTConfig()).loss != first
    assert all(module.training for module in model.modules())


def test_auxiliary_loss_is_added_as_in_sft():
    model, inputs = patch(make("mixtral")), batch()
    with_aux = model(**inputs, ift=IFTConfig())
    model.config.output_router_logits = False
    without = model(**inputs, ift=IFTConfig())
    torch.testing.assert_close(
        with_aux.loss, without.loss + 0.5 * with_aux.aux_loss, rtol=1e-6, atol=0.0
    )


def test_autocast():
    model, inputs = patch(make("llama")), batch()
    expected, grads = fused(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs, ift=IFTConfig())
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, expected, rtol=0.05, atol=0.0)
    for name, grad in gradients(model).items():
        assert (grad - grads[name]).norm() <= 0.3 * grads[name].norm(), name


def test_no_gradient_no_graph():
    model, inputs = patch(make("llama")).eval(), batch()
    with torch.no_grad():
        output = model(**inputs, ift=IFTConfig())
    assert output.logits is None and not output.loss.requires_grad


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"input_ids": None}, "input_ids: expected token ids"),
        ({"labels": None}, r"labels: expected \(B, T\) token ids with ift"),
        ({"labels": torch.zeros(3, 4).long()}, "labels: expected the shape of input_ids"),
        ({"skip_logits": False}, "skip_logits: expected True or None with ift"),
        ({"logits_to_keep": 3}, "logits_to_keep: expected 0 with ift"),
        ({"shift_labels": torch.zeros(3, 12).long()}, "shift_labels: expected None with ift"),
        ({"past_key_values": object()}, "past_key_values: expected None with ift"),
        ({"use_cache": True}, "use_cache: expected False or None with ift"),
        ({"num_items_in_batch": 5}, "num_items_in_batch: IFT is a mean over rows"),
        ({"position_ids": torch.zeros(3, 1, 12).long()}, "position_ids: expected shape"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_what_cannot_serve_is_refused(change, match):
    model, inputs = patch(make("llama")), batch()
    with pytest.raises(ValueError, match=match):
        model(**{**inputs, "ift": IFTConfig(), **change})
    model(**inputs, ift=IFTConfig(num_rows=3), num_items_in_batch=5)  # told both: fine
    with pytest.raises(TypeError, match=r"ift: expected an ift.IFTConfig"):
        model(**inputs, ift={"lam": 0.2})


def test_a_model_that_scales_what_it_looks_up_mixes_the_scaled():
    model = make("falcon_h1", num_hidden_layers=1)
    configs = None, IFTConfig(), IFTConfig(lam=0.9, share_prompt=False)
    assert_as_dense(model, batch(), *configs)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("name", ["roberta", "deepseek_v4", "gemma3n"])
def test_models_that_take_more_than_embeddings_from_their_ids(name, left):
    if name == "deepseek_v4":  # experts by token id
        model = tiny_model(architecture_of("DeepseekV4ForCausalLM"), torch.float32)
    else:  # positions from the padding token; per-layer embeddings
        model = make(name)
    if left and name == "gemma3n":  # NaN of its own behind padding on the left
        return
    inputs = batch(vocabulary=min(V, model.config.get_text_config().vocab_size))
    if left:
        inputs = {k: v.flip(1) for k, v in inputs.items()}
    assert_as_dense(model, inputs, IFTConfig(), IFTConfig(share_prompt=False, embedding_grad=True))


def looks_up(kind):
    """A Llama whose code does not embed its tokens in one call on whole rows."""

    class Model(hf.LlamaModel):
        def forward(self, input_ids=None, **kwargs):
            if kind == "flat":
                embeds = self.embed_tokens(input_ids.flatten()).view(*input_ids.shape, -1)
            elif kind == "twice":
                embeds = (self.embed_tokens(input_ids) + self.embed_tokens(input_ids)) / 2
            elif kind == "by weight":
                embeds = self.embed_tokens.weight[input_ids]
            else:
                embeds = self.embed_tokens(input_ids.clamp(max=50))
            return super().forward(**{**kwargs, "inputs_embeds": embeds})

    model = make("llama")
    model.model.__class__ = Model
    return model


@pytest.mark.parametrize("kind", ["flat", "twice", "by weight", "other tokens"])
def test_other_ways_to_look_tokens_up_are_refused_by_name(kind):
    model, inputs = patch(looks_up(kind)), batch()
    assert torch.isfinite(model(**inputs).loss)
    match = "embeds other tokens" if kind == "other tokens" else "LlamaForCausalLM: calls its"
    with pytest.raises(RuntimeError, match=match):
        model(**inputs, ift=IFTConfig())
    assert torch.isfinite(model(**inputs).loss)
    assert "forward" not in unpatch(model).model.embed_tokens.__dict__


def test_hooks_on_the_input_embedding_run_on_what_is_mixed():
    model, inputs = make("llama"), batch()
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: output * 3.0)
    assert_as_dense(model, inputs, IFTConfig(), IFTConfig(rule="soft", embedding_grad=True))


def test_an_input_embedding_wrapped_between_two_losses():
    model, inputs = patch(make("llama")), batch()
    expected, grads = fused(model, inputs)
    embedding = model.model.embed_tokens
    forward = embedding.forward
    embedding.forward = lambda ids: forward(ids)
    loss, got = fused(model, inputs)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(got, grads)
    assert embedding(inputs["input_ids"]).shape == (
        *inputs["input_ids"].shape,
        embedding.embedding_dim,
    )


def warned(caplog, run):
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        run()
    return sum("add up without IFTConfig.num_rows" in r.getMessage() for r in caplog.records)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3),
    "fused": lambda p: torch.optim.AdamW(p, 1e-3, fused=True),
    "one by one": lambda p: torch.optim.RMSprop(p, 1e-3, foreach=False),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_steps_without_accumulation_do_not_warn(optimizer, set_to_none, caplog):
    model, inputs = patch(make("llama")), batch()
    optimizer = OPTIMIZERS[optimizer](model.parameters())

    def run():
        for _ in range(3):
            model(**inputs, ift=IFTConfig()).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
        model(**inputs, ift=IFTConfig()).loss.backward()
        model.zero_grad(set_to_none=set_to_none)  # gradients looked at, not used
        model(**inputs, ift=IFTConfig()).loss.backward()

    assert warned(caplog, run) == 0


@pytest.mark.parametrize("frozen", [False, True])
def test_accumulation_without_num_rows_warns_once(frozen, caplog):
    model, inputs = patch(make("llama")), batch()
    model.lm_head.requires_grad_(not frozen)

    def run(times=3, scale=1.0, **options):
        for _ in range(times):
            (model(**inputs, ift=IFTConfig(**options)).loss * scale).backward()

    assert warned(caplog, lambda: run(num_rows=9)) == 0
    model.zero_grad()
    assert warned(caplog, lambda: run(scale=1 / 3)) == 0  # a mean over forwards
    model.zero_grad()
    assert warned(caplog, run) == 1
    assert warned(caplog, run) == 0


@pytest.mark.parametrize("by_share", [False, True], ids=["divided", "by share"])
@pytest.mark.parametrize("rows", [(3, 2), (1, 3), (2, 2, 1), (2, 2, 2)])
def test_means_over_other_numbers_of_rows_are_not_the_mean_of_all(rows, by_share, caplog):
    model, inputs = patch(make("llama")), batch()

    def run():
        for count in rows:  # the others of the three have no target
            labels = inputs["labels"].clone()
            labels[count:] = -100
            loss = model(**{**inputs, "labels": labels}, ift=IFTConfig()).loss
            (loss * (count / sum(rows) if by_share else 1 / len(rows))).backward()

    assert warned(caplog, run) == (len(set(rows)) > 1 and not by_share)


def test_one_backward_of_two_losses_and_evaluation_do_not_warn(caplog):
    model, inputs = patch(make("llama")), batch()

    def run():
        total = model(**inputs, ift=IFTConfig()).loss + model(**inputs, ift=IFTConfig()).loss
        total.backward()
        with torch.no_grad():
            model(**inputs, ift=IFTConfig())

    assert warned(caplog, run) == 0
