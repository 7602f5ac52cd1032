"""`ift train` with LoRA: what is trained, written, continued and refused."""

import importlib.util
import json
import random
import shutil

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from causal_lms import make
from command_line import read_log, refusal, train, untimed, write_rows
from ift.cli import main
from ift.cli.models import turn_off_dropout
from ift.tiny import tiny_llama, train_tokenizer

peft = pytest.importorskip("peft")
WORDS = ["the", "model", "learns", "to", "name", "what", "comes", "next", "and", "some", "more"]
FEW = ["--lr", "1e-2", "--batch-size", "4", "--max-length", "48", "--log-steps", "1"]


@pytest.fixture(scope="module")
def rows():
    draw, found = random.Random(0), []
    for _ in range(16):
        words = draw.sample(WORDS, 4)
        wrong = " " + " ".join(draw.sample(WORDS, 2))
        found.append(
            {"prompt": " ".join(words) + " :", "chosen": " " + words[0], "rejected": wrong}
        )
    return found


@pytest.fixture(scope="module")
def data(rows, tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def base(rows, tmp_path_factory):
    """A bfloat16 model with a head of its own, and its tokenizer."""
    directory = tmp_path_factory.mktemp("base") / "llama"
    tokenizer = train_tokenizer([text for row in rows for text in row.values()], 300)
    model = make("llama", vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    model.to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


SFT = ["--loss", "sft", *FEW, "--max-steps", "4", "--save-steps", "2"]
LORA = ["--lora-rank", "4", "--lora-dropout", "0.1"]


@pytest.fixture(scope="module")
def adapted(base, data, tmp_path_factory):
    """Four steps of SFT."""
    output = tmp_path_factory.mktemp("runs") / "sft"
    assert main(train(data, output, *SFT, *LORA, model=base)) == 0
    return output


def weights(directory):
    return peft.utils.save_and_load.load_peft_weights(str(directory))


def test_what_a_run_leaves(adapted, base):
    config = json.loads((adapted / "model" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base) and config["task_type"] == "CAUSAL_LM"
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.1)
    names = {path.name for path in (adapted / "model").iterdir()}
    assert "tokenizer_config.json" in names and "model.safetensors" not in names
    found = weights(adapted / "model")
    assert all(w.dtype is torch.float32 for w in found.values())  # over frozen bfloat16
    assert all(w.any() for name, w in found.items() if "lora_B" in name)  # every layer learned
    assert {n.split(".")[-3] for n in found} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    }  # fmt: skip
    assert read_log(adapted)[-1]["loss"] < read_log(adapted)[0]["loss"]
    model = peft.AutoPeftModelForCausalLM.from_pretrained(adapted / "model")
    plain = hf.AutoModelForCausalLM.from_pretrained(base)
    for name, weight in plain.named_parameters():
        if name.startswith(("lm_head", "model.embed")):
            assert weight.equal(model.get_base_model().get_parameter(name))
    ids = torch.arange(3, 9)[None]
    assert (model(ids).logits - plain(ids).logits).abs().max() > 1e-2


def test_resuming_is_exact(adapted, base, data, tmp_path):
    shutil.copytree(adapted, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-4")
    again = train(data, tmp_path / "run", *SFT, *LORA, "--resume", model=base)
    assert main(again) == 0
    assert untimed(read_log(tmp_path / "run")) == untimed(read_log(adapted))
    for name, weight in weights(adapted / "model").items():
        assert weights(tmp_path / "run" / "model")[name].equal(weight), name


def test_a_step_is_that_of_the_logits(base, data, tmp_path):
    """SGD by one step, against PEFT and cross-entropy of logits."""
    from ift.data import Collator, encode
    from ift.data_rows import read_rows

    output = tmp_path / "out"
    options = ["--loss", "sft", "--optimizer", "sgd", "--lr", "1", "--batch-size", "16"]
    options += ["--max-steps", "1", "--lora-rank", "2", "--dtype", "float32", "--log-steps", "1"]
    assert main(train(data, output, *options, model=base)) == 0
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config).train()
    tokenizer = hf.AutoTokenizer.from_pretrained(base)
    batch = Collator(0)(encode(read_rows(data), tokenizer, 1024).examples)
    loss = model(**batch).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    (record,) = read_log(output)
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    found = weights(output / "model")
    for name, weight in peft.get_peft_model_state_dict(model).items():
        gradient = model.get_parameter(name.replace(".weight", ".default.weight")).grad
        torch.testing.assert_close(found[name], weight - gradient, atol=1e-5, rtol=1e-4)


def test_targets_scale_and_a_file_of_peft(base, data, tmp_path):
    few = ["--loss", "sft", *FEW, "--max-steps", "1"]
    given = ["--lora-rank", "2", "--lora-alpha", "3", "--lora-targets", "q_proj, down_proj"]
    assert main(train(data, tmp_path / "options", *few, *given, model=base)) == 0
    found = weights(tmp_path / "options" / "model")
    assert {name.split(".")[-3] for name in found} == {"q_proj", "down_proj"}
    file = tmp_path / "options" / "model" / "adapter_config.json"
    assert json.loads(file.read_text())["lora_alpha"] == 3
    given = ["--lora-config", file]
    assert main(train(data, tmp_path / "file", *few, *given, model=base)) == 0
    for name, weight in weights(tmp_path / "file" / "model").items():
        assert weight.equal(found[name])
    saved = json.loads(file.read_text()) | {"modules_to_save": ["lm_head"], "use_dora": True}
    (tmp_path / "more.json").write_text(json.dumps(saved))
    given = ["--lora-config", tmp_path / "more.json"]
    assert main(train(data, tmp_path / "more", *few, *given, model=base)) == 0
    found = weights(tmp_path / "more" / "model")
    assert any("lm_head" in name for name in found)
    assert any("magnitude" in name for name in found)


def test_an_adapter_is_continued(adapted, base, data, tmp_path):
    few = ["--loss", "ift", *FEW, "--max-steps", "2", "--eval-data", data, "--eval-steps", "1"]
    assert main(train(data, tmp_path / "on", *few, model=adapted / "model")) == 0
    config = json.loads((tmp_path / "on" / "model" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base) and config["r"] == 4
    before, after = weights(adapted / "model"), weights(tmp_path / "on" / "model")
    moved = max((after[n] - before[n]).abs().max() for n in before)
    assert 0 < moved < 0.1  # from where it was, not from new numbers
    assert read_log(tmp_path / "on")[-1]["eval_loss"] < read_log(adapted)[0]["loss"]


def test_a_merged_model(adapted, base, data, tmp_path, capsys):
    """Of the last checkpoint; the adapter is in the weights, in their dtype."""
    shutil.copytree(adapted, tmp_path / "run")
    again = train(data, tmp_path / "run", *SFT, *LORA, "--resume", "--merge", model=base)
    assert main(again) == 0
    assert not (tmp_path / "run" / "model" / "adapter_config.json").exists()
    merged = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert merged.dtype is torch.bfloat16
    model = peft.AutoPeftModelForCausalLM.from_pretrained(adapted / "model", dtype=torch.float32)
    plain = hf.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()
    for name, weight in model.merge_and_unload().state_dict().items():
        rounded = merged.state_dict()[name].float()
        torch.testing.assert_close(rounded, weight, rtol=2**-7, atol=1e-3)
        assert ("_proj" in name) == ((rounded - plain[name]).abs().max() > 5e-3), name


def test_preferences_compare_with_the_model_without_its_adapter(base, data, tmp_path, capsys):
    few = ["--loss", "dpo", *FEW, "--max-steps", "2", "--save-steps", "1"]
    more = ["--lora-rank", "2"]
    assert main(train(data, tmp_path / "dpo", *few, *more, model=base)) == 0
    first, last = read_log(tmp_path / "dpo")
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)  # a bfloat16 model
    assert first["reward_margin"] == pytest.approx(0, abs=1e-3)
    assert abs(last["reward_margin"]) > 2e-3
    shutil.rmtree(tmp_path / "dpo" / "checkpoint-2")
    assert main(train(data, tmp_path / "dpo", *few, *more, "--resume", model=base)) == 0
    assert "reference log-probabilities of 16 examples read" in capsys.readouterr().err
    assert untimed(read_log(tmp_path / "dpo")) == untimed([first, last])
    more += ["--reference", base]
    assert main(train(data, tmp_path / "named", *few, *more, model=base)) == 0
    assert untimed(read_log(tmp_path / "named")) == untimed([first, last])


def test_damaged_adapters_are_refused(adapted, base, data, tmp_path, capsys):
    def said(change):
        directory = tmp_path / change.__name__
        shutil.copytree(adapted / "model", directory)
        change(directory)
        return refusal(train(data, tmp_path / "out", *SFT, model=directory), capsys)

    def no_base(directory):
        (directory / "adapter_config.json").write_text('{"peft_type": "LORA"}')

    def not_json(directory):
        (directory / "adapter_config.json").write_text("{")

    def beside_a_model(directory):
        for file in base.iterdir():
            shutil.copy(file, directory)

    def no_weights(directory):
        (directory / "adapter_model.safetensors").write_bytes(b"")

    def fewer_weights(directory):

        file = directory / "adapter_model.safetensors"
        save_file(dict(list(load_file(file).items())[2:]), file)

    assert "names no base_model_name_or_path; expected" in said(no_base)
    assert "cannot read" in said(not_json)
    assert "holds an adapter that transformers has put into" in said(beside_a_model)
    assert "cannot load the adapter" in said(no_weights)
    assert "lacks weights" in said(fewer_weights)


# Arguments → what is said of them.
REFUSED = {
    "--lora-alpha 2": "--lora-alpha: got it without --lora-rank; expected both",
    "--lora-dropout 0.1": "--lora-dropout: got it without --lora-rank",
    "--lora-targets q_proj": "--lora-targets: got it without --lora-rank",
    "--lora-rank 0": "--lora-rank: got '0'; expected a whole number of at least 1",
    "--lora-rank 2 --lora-dropout 1": "--lora-dropout: got '1'; expected a fraction in [0, 1)",
    "--lora-rank 2 --lora-targets q_proj,": "--lora-targets: got 'q_proj,'; expected names",
    "--lora-rank 2 --lora-targets r_proj": "--lora-targets: Target modules {'r_proj'} not found",
    "--lora-rank 2 --lora-targets q_proj,r_proj": "--lora-targets: got r_proj; Llama",
    "--lora-rank 2 --lora-config x.json": "--lora-config: got it beside --lora-rank",
    "--lora-config /nowhere.json": "--lora-config: cannot read /nowhere.json",
    "--lora-rank 2 --model tiny": "--lora-rank: got it with --model tiny, whose weights",
    "--lora-rank 2 --dtype float16": "--dtype: got float16, in which small gradients are zero",
    "--quantize 4bit": "--quantize: got it without --lora-rank or --lora-config",
    "--lora-rank 2 --freeze-head": "--freeze-head: got it with the adapter of --lora-rank, which",
    "--merge": "--merge: got it without an adapter; expected --lora-rank or --lora-config",
    "--quantize 3bit": "--quantize: got '3bit'; expected one of 4bit, 8bit",
}


@pytest.mark.parametrize("given", REFUSED)
def test_refused(given, base, data, tmp_path, capsys):
    said = refusal(train(data, tmp_path / "out", *SFT, *given.split(), model=base), capsys)
    assert said.splitlines()[-1].startswith(f"ift: {REFUSED[given]}")


def test_lora_on_a_tied_head_trains_it_and_is_not_merged(rows, data, tmp_path, capsys):
    """Merged it would change the embedding, too."""
    tokenizer = train_tokenizer([text for row in rows for text in row.values()], 300)
    base, output = tmp_path / "base", tmp_path / "out"
    for part in (tiny_llama(tokenizer, hidden=32, layers=1), tokenizer):
        part.save_pretrained(base)
    given = ["--lora-rank", "2", "--lora-targets", "q_proj,lm_head"]
    said = refusal(train(data, output, *SFT, *given, "--merge", model=base), capsys)
    assert "--merge: got it with LoRA on an output head that is tied" in said
    assert main(train(data, output, *SFT, *given, model=base)) == 0
    weights = load_file(output / "model" / "adapter_model.safetensors")
    (trained,) = (w for name, w in weights.items() if "lm_head.lora_B" in name)
    assert trained.abs().max() > 0


def test_no_dropout_of_an_adapter_is_in_its_configuration():
    config = peft.LoraConfig(r=2, lora_dropout=0.1, target_modules="all-linear")
    model = peft.get_peft_model(make("llama"), config)
    assert turn_off_dropout(model) > 1
    assert model.peft_config["default"].lora_dropout == 0
    assert not any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))


def test_other_adapters_in_a_file_are_refused(base, data, tmp_path, capsys):
    file = tmp_path / "adapter.json"
    for content, problem in {
        '{"peft_type": "IA3"}': "has peft_type IA3; expected LORA",
        "[]": "holds a list; expected PEFT's adapter_config.json",
        '{"r": 2, "colour": 3}': "unexpected keyword argument 'colour'",
        '{"r": 2, "target_modules": [3]}': f"--lora-config: PEFT refuses {file} (AttributeError: ",
        '{"r": "x"}': f"--lora-config: PEFT refuses {file} (TypeError: ",
        '{"r": 2, "target_modules": "nothing"}': "Error: Target modules nothing not found",
        '{"r": 2, "task_type": "SEQ_CLS"}': "has task_type SEQ_CLS; expected CAUSAL_LM",
    }.items():
        file.write_text(content)
        given = train(data, tmp_path / "out", *SFT, "--lora-config", file, model=base)
        assert problem in refusal(given, capsys)


def test_a_new_adapter_on_an_adapter_is_refused(adapted, data, tmp_path, capsys):
    given = train(data, tmp_path / "out", *SFT, "--lora-rank", 2, model=adapted / "model")
    assert "which is an adapter already; expected one of the two" in refusal(given, capsys)


@pytest.mark.parametrize(
    ("there", "given", "said"),
    [
        ({"peft": False}, [], "--lora-rank: needs peft, which is not installed: pip install"),
        ({"bitsandbytes": False}, ["--quantize", "4bit"], "--quantize: needs bitsandbytes, which"),
        ({"bitsandbytes": True}, ["--quantize", "8bit"], "--quantize: got 8bit on a CPU; expected"),
        ({"bitsandbytes": True}, ["--quantize", "8bit", "--merge"], "--merge: got it with --quant"),
    ],
)
def test_what_is_not_there(there, given, said, base, data, tmp_path, capsys, monkeypatch):
    find, some = importlib.util.find_spec, importlib.util.find_spec("json")
    found = {name: some if is_there else None for name, is_there in there.items()}
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: found[name] if name in found else find(name, *rest),
    )
    arguments = train(data, tmp_path / "out", *SFT, "--lora-rank", 2, *given, model=base)
    assert said in refusal(arguments, capsys)
