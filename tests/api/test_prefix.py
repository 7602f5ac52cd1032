"""IFT with its prompts run once: the same loss and gradients as two full passes."""

import functools
import logging

import pytest
import torch

from causal_lms import V, assert_as_dense, assert_same_step, batch, gradients, make
from ift import prefix
from ift.checking import compare as compare_models
from ift.config import IFTConfig
from ift.patching import original_forward, patch
from ift.prefix import find_sharing
from ift.two_pass import SampledRows

SHARED = ["llama", "qwen2", "qwen3", "gemma2", "phi", "gpt2", "granite", "cohere"]
# With layers that forget what is outside a window; Gemma 2 has them only when it is told to.
TWO_PASSES = {"mistral": "cache", "mixtral": "auxiliary loss", "gemma2": "cache"}


def uneven(lengths=((9, 4), (6, 5), (8, 1), (7, 0)), left=False, seed=0, vocabulary=V):
    """Rows of (prompt, response) tokens, padded to one length."""
    g = torch.Generator().manual_seed(seed)
    width = max(map(sum, lengths))
    ids = torch.zeros(len(lengths), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, (prompt, response) in enumerate(lengths):
        start = width - prompt - response if left else 0
        end = start + prompt + response
        ids[row, start:end] = torch.randint(3, vocabulary, (prompt + response,), generator=g)
        mask[row, start:end] = 1
        labels[row, start + prompt : end] = ids[row, start + prompt : end]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def both(model, inputs, monkeypatch, **options):
    """(loss, gradients, metrics) shared and not; and how many columns each pass was given."""
    columns, results = [], []
    forward = type(model).forward

    @functools.wraps(forward)  # its signature says whether positions can be given
    def counted(self, *args, **kwargs):
        given = kwargs.get("inputs_embeds")
        columns.append((given if given is not None else kwargs["input_ids"]).shape[1])
        return forward(self, *args, **kwargs)

    model(**inputs, ift=IFTConfig())  # whatever is found out once
    for share in (True, False):
        model._ift_patch.sampled_rows = SampledRows()  # the same for both
        with monkeypatch.context() as m:
            m.setattr(type(model), "forward", counted)
            output = model(**inputs, ift=IFTConfig(share_prompt=share, **options))
        output.loss.backward()
        results.append((output.loss.detach(), gradients(model), dict(model.ift_metrics)))
    return *results, columns


def compare(shared, full):
    assert_same_step(shared, full)
    assert {k: float(v) for k, v in shared[2].items()} == pytest.approx(
        {k: float(v) for k, v in full[2].items()}, rel=1e-5
    )


BATCHES = {
    "even": lambda: uneven([(9, 3)] * 3),
    "uneven": uneven,
    "left padding": lambda: uneven([(9, 4), (6, 4), (8, 3), (7, 4)], left=True),
    "gaps": lambda: {
        **uneven(),
        "labels": uneven()["labels"].index_fill(1, torch.tensor([10]), -100),
    },
    "no mask": lambda: {k: v for k, v in uneven([(8, 4)] * 2).items() if k != "attention_mask"},
}


@pytest.mark.parametrize("batch_name", BATCHES)
@pytest.mark.parametrize("name", SHARED)
def test_a_shared_prompt_is_two_passes(name, batch_name, monkeypatch):
    options = {"layer_types": ["full_attention"] * 2} if name == "gemma2" else {}
    model, inputs = patch(make(name, **options)), BATCHES[batch_name]()
    shared, full, columns = both(model, inputs, monkeypatch)
    assert len(columns) == 5 and columns[3] == columns[4] == inputs["input_ids"].shape[1]
    assert columns[0] >= 7 and columns[1] == columns[2] < columns[3]
    compare(shared, full)


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "sample"}, {"rule": "soft"}, {"rule": "kth"}, {"embedding_grad": True},
        {"rule": "soft", "embedding_grad": True}, {"side": "right", "norm": "softmax"},
        {"objective": "paper"}, {"lam": 1.0, "num_rows": 7},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("frozen", [False, True])
def test_options_are_the_same_either_way(options, implementation, frozen, monkeypatch):
    model = patch(make("llama", attn_implementation=implementation))
    model.get_input_embeddings().requires_grad_(not frozen)
    shared, full, columns = both(model, uneven(), monkeypatch, **options)
    assert len(columns) == 5
    compare(shared, full)


@pytest.mark.parametrize("name", TWO_PASSES)
def test_models_without_a_plain_cache_take_two_passes_and_say_so_once(name, monkeypatch, caplog):
    model, inputs = patch(make(name)), uneven()
    with caplog.at_level(logging.WARNING):
        shared, full, columns = both(model, inputs, monkeypatch)
    assert columns == [inputs["input_ids"].shape[1]] * 4
    assert sum(TWO_PASSES[name] in r.getMessage() for r in caplog.records) == 1
    compare(shared, full)


def test_dropout_checkpointing_and_packed_rows_take_two_passes(monkeypatch):
    inputs = uneven()
    dropout = patch(make("gpt2", resid_pdrop=0.1))
    attention = patch(make("llama", attention_dropout=0.1))
    checkpointing = patch(make("llama"))
    checkpointing.gradient_checkpointing_enable({"use_reentrant": False})
    packed = {**inputs, "position_ids": torch.arange(13)[None]}
    cases = [(dropout, inputs), (attention, inputs), (checkpointing, inputs)]
    for model, given in [*cases, (patch(make("llama")), packed)]:
        assert len(both(model, given, monkeypatch)[2]) == 4
    dropout.eval()
    shared, full, columns = both(dropout, inputs, monkeypatch)
    assert len(columns) == 5
    compare(shared, full)
    checkpointing.gradient_checkpointing_disable()  # it is asked anew each time
    assert len(both(checkpointing, inputs, monkeypatch)[2]) == 5


def test_batches_that_would_not_gain_take_two_passes(monkeypatch):
    model = patch(make("llama"))
    for inputs in (batch(prompt=1), uneven([(1, 11), (11, 1)]), uneven([(5, 0), (6, 0)])):
        assert len(both(model, inputs, monkeypatch)[2]) == 4


def test_a_model_that_goes_on_from_a_cache_otherwise_is_noticed(monkeypatch):
    model = patch(make("llama"))
    monkeypatch.setattr(prefix, "new_cache", lambda layers, detached: None)
    shared, full, columns = both(model, uneven(), monkeypatch)
    assert len(columns) == 4
    compare(shared, full)


def test_rows_are_moved_until_their_responses_start_together():
    inputs = uneven([(9, 3), (10, 2), (8, 0)])
    rows = prefix.aligned(inputs["input_ids"], inputs["labels"], inputs["attention_mask"])
    assert rows.start == 9 and rows.ids.shape == (3, 13)
    assert rows.positions[0].tolist() == [0, *range(12)]
    assert rows.mask.tolist() == [[0] + [1] * 12, [1] * 12 + [0], [1] * 8 + [0] * 5]
    assert (rows.labels[:2, 10] != -100).all() and (rows.labels[:, :10] == -100).all()
    inputs["attention_mask"][0, 8] = 0  # what predicts the first label
    assert prefix.aligned(inputs["input_ids"], inputs["labels"], inputs["attention_mask"]) is None


LENGTHS = {
    "ends together": ((9, 5), (7, 3), (2, 4)),
    "one long": ((3, 12), (9, 1), (10, 2)),
    "a row without answer": ((9, 4), (6, 5), (8, 0)),
}


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", ["opt", "bloom", "biogpt", "llama", "gpt2"])
def test_padded_rows_of_unequal_length_are_those_of_whole_rows(name, lengths, left):
    inputs = uneven(LENGTHS[lengths], left=left)
    for config in (IFTConfig(lam=0.5), IFTConfig(lam=1.0, rule="kth", embedding_grad=True)):
        assert_as_dense(make(name), inputs, config)


def test_a_padded_row_is_the_row_alone():
    model = patch(make("opt"))
    inputs = uneven(LENGTHS["ends together"], left=True)
    loss = model(**inputs, ift=IFTConfig(lam=0.5)).loss
    alone = 0.0
    for row in range(3):
        own = inputs["attention_mask"][row].bool()
        one = {k: v[row : row + 1, own] for k, v in inputs.items()}
        alone += model(**one, ift=IFTConfig(lam=0.5, num_rows=3)).loss
    torch.testing.assert_close(loss, alone, rtol=1e-5, atol=1e-6)
    assert model._ift_patch.sharing == prefix.Sharing(plain=True, moved="own")
    llama = patch(make("llama"))
    llama(**inputs, ift=IFTConfig())
    assert llama._ift_patch.sharing == prefix.Sharing(plain=True, moved="columns")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_float64_with_padding_is_finite(name, implementation):
    model = make(name, attn_implementation=implementation).double()
    for left in (False, True):
        inputs = uneven(LENGTHS["ends together"], left=left)
        result = compare_models(model, inputs, ift=IFTConfig())
        of_its_own = "undecided" if left and implementation == "eager" else "equal"
        assert result.verdict in ("equal", of_its_own), str(result)


def test_other_tensors_beside_the_tokens_take_two_passes(monkeypatch):
    model, inputs = patch(make("llama")), uneven()
    for extra in ({"position_ids": torch.arange(13)[None]}, {"pixel_values": torch.zeros(1)}):
        assert (
            prefix.unsupported_reason(model, {**inputs, **extra}) == f"{next(iter(extra))} is given"
        )
    assert not prefix.unsupported_reason(model, {**inputs, "return_dict": True})


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rows_for_which_rotary_frequencies_change_take_two_passes(kind, left, monkeypatch):
    """Rotary embeddings that compute other frequencies for prompts than for whole rows."""
    more = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4} if kind == "longrope" else {}
    rope = {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4, **more}
    if kind == "longrope":
        rope["original_max_position_embeddings"] = 16
    longest = 16 if kind == "dynamic" else 64
    model = make("llama", rope_parameters=rope, max_position_embeddings=longest)
    patch(model)
    for lengths, whole in (((9, 4), (9, 5)), False), (((14, 9), (14, 8)), True):
        inputs = uneven(lengths, left=left)
        shared, full, columns = both(model, inputs, monkeypatch)
        assert (columns[0] == inputs["input_ids"].shape[1]) == whole
        compare(shared, full)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_all_hidden_states_share_hides_no_difference(dtype):
    model = patch(make("opt").to(dtype))
    with torch.no_grad():
        model.model.decoder.final_layer_norm.bias[0] = 1000.0
    assert find_sharing(model, original_forward(model), model.device).moved != "columns"


def test_a_first_batch_without_text_decides_nothing(monkeypatch):
    model = patch(make("llama"))
    for ids in (torch.ones(1, 1, dtype=torch.long), torch.zeros(2, 12, dtype=torch.long)):
        model(input_ids=ids, labels=ids, ift=IFTConfig(lam=0.5))
    sharing = find_sharing(model, original_forward(model), model.device)
    assert sharing.plain and model._ift_patch.sharing in (None, sharing)


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_results_of_whole_rows_that_the_config_asks_for(name):
    model, inputs = make("llama"), uneven()
    setattr(model.config, name, True)
    output = patch(model)(**inputs, ift=IFTConfig())
    length = inputs["input_ids"].shape[1]
    results = output.hidden_states if name == "output_hidden_states" else output.attentions
    assert all(result.shape[-2] == length for result in results)
