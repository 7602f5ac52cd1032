"""Models that `ift train` must not train without a word: new weights, no causal mask, no room."""

import logging

import pytest
import torch
import transformers as hf

import command_line
from causal_lms import make
from command_line import write_rows
from ift.cli import main
from ift.cli.errors import CliError, refusals
from ift.tiny import train_tokenizer

ROWS = [{"prompt": f"count to {i}: ", "completion": " ".join(map(str, range(i)))} for i in (3, 9)]
TOKENIZER = train_tokenizer([text for row in ROWS for text in row.values()], 300)
V = len(TOKENIZER)
LONGEST = max(
    len(TOKENIZER(r["prompt"])["input_ids"] + TOKENIZER(r["completion"])["input_ids"]) + 1
    for r in ROWS
)  # with an end token

BERT = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48}
BERT |= {"num_hidden_layers": 1, "num_attention_heads": 4}


def llama(**options):
    return make("llama", vocab_size=V, num_hidden_layers=1, **options)


def bart():
    sizes = {"d_model": 32, "decoder_layers": 1, "decoder_ffn_dim": 48, "encoder_layers": 1}
    heads = {"decoder_attention_heads": 4, "encoder_attention_heads": 4}
    return hf.BartConfig(vocab_size=V, **sizes, **heads, encoder_ffn_dim=48)


@pytest.fixture
def train(tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", ROWS)

    def run(model, *more, output="out"):
        for part in (model, TOKENIZER):
            part.save_pretrained(tmp_path / "model")
        more = ["--max-steps", 1, *more]
        capsys.readouterr()
        code = main(command_line.train(data, tmp_path / output, *more, model=tmp_path / "model"))
        return code, [line for line in capsys.readouterr().err.splitlines() if "ift" in line[:4]]

    return run


def refused(result):
    code, lines = result
    assert code == 2
    return lines[-1]


WITHOUT = {
    "a head": (lambda: llama().model, "lm_head.weight of LlamaForCausalLM"),
    "a decoder's head and embedding": (
        lambda: hf.BartForConditionalGeneration(bart()),
        "lm_head.weight, model.decoder.embed_tokens.weight of BartForCausalLM",
    ),
    "a layer": (lambda: shorter(), "and 6 more of LlamaForCausalLM"),
}


def shorter():
    """Two layers by its configuration, one by its weights."""
    model = llama()
    model.config.num_hidden_layers = 2
    return model


@pytest.mark.parametrize("name", WITHOUT)
def test_new_weights_need_permission(name, train):
    build, said = WITHOUT[name]
    line = refused(train(build()))
    assert "has no weights for" in line and said in line and "--allow-new-weights" in line


def test_new_weights_with_permission(train, tmp_path):
    heads = []
    for output in ("a", "b"):
        code, lines = train(llama().model, "--allow-new-weights", "--lr", "1e-9", output=output)
        assert code == 0 and "done" in lines[-1]
        made = hf.AutoModelForCausalLM.from_pretrained(tmp_path / output / "model")
        heads.append(made.lm_head.weight)
    torch.testing.assert_close(*heads)  # of --seed
    assert train(llama(tie_word_embeddings=True).model, output="c")[0] == 0  # it has all


def test_warnings_of_loading_reach_the_user(train, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    train(llama().model)
    found = [record.getMessage() for record in caplog.records]
    assert any("lm_head.weight" in text and "MISSING" in text for text in found)


@pytest.mark.parametrize("kind", ["bert", "electra", "xlnet"])
def test_a_bidirectional_model_is_refused(kind, train):
    if kind == "xlnet":
        config = hf.XLNetConfig(vocab_size=V, d_model=32, n_layer=1, n_head=4, d_inner=48)
        model = hf.XLNetLMHeadModel(config)
    elif kind == "bert":
        model = hf.BertForMaskedLM(hf.BertConfig(**BERT))
    else:
        model = hf.ElectraForCausalLM(hf.ElectraConfig(**BERT, embedding_size=32))
    line = refused(train(model, "--allow-new-weights"))
    assert "attention is bidirectional" in line
    assert line.endswith("set is_decoder to true in its config.json") == (kind != "xlnet")


# Of RoBERTa the first two positions are padding's.
@pytest.mark.parametrize(
    ("name", "reserved"), [("gpt2", 0), ("gptj", 0), ("opt", 0), ("roberta", 2)]
)
def test_rows_beyond_the_positions_are_refused(name, reserved, train):
    positions = LONGEST + reserved - 1
    model = make(name, vocab_size=V, pad_token_id=1, max_position_embeddings=positions)
    line = refused(train(model))
    assert f"--max-length: the longest row of --data has {LONGEST} tokens" in line
    assert f"expected at most {LONGEST - 1}, the positions of" in line
    code, _ = train(model, "--max-length", LONGEST - 1, output="cut")
    assert code == 0


def test_rotary_positions_go_on(train):
    code, lines = train(llama(max_position_embeddings=8))
    assert code == 0 and "go beyond the 8 positions" in lines[0]


def test_a_refusal_of_the_loss_is_one_line_and_leaves_the_output_free(train):
    config = bart()
    config.is_decoder, config.is_encoder_decoder = True, False
    line = refused(train(hf.BartForCausalLM(config)))
    assert line.startswith("ift: --model: BartForCausalLM: ")
    assert train(llama())[0] == 0  # into the same directory


def test_only_refusals_of_ours_become_a_line():
    from ift import IFTConfig

    with pytest.raises(CliError, match="--model: lam: expected"), refusals("--model"):
        IFTConfig(lam=3.0)
    with pytest.raises(CliError, match="--lam: expected"), refusals("--model", {"lam": "lam"}):
        IFTConfig(lam=3.0)
    flags = {"lam": "lam", "gamma": "dpo_kind"}  # parameter → option of another name
    with pytest.raises(CliError, match="--dpo-kind: expected"), refusals("--model", flags):
        IFTConfig(gamma=3.0)
    with pytest.raises(ValueError, match="lam"), refusals("--model", applies=lambda: False):
        IFTConfig(lam=3.0)
    with pytest.raises(RuntimeError, match="size of tensor"), refusals("--model"):
        torch.ones(2) + torch.ones(3)
