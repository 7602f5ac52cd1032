"""`ift train`: dtypes, attention, checkpointing, packing, reporters, disk and sharding."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from causal_lms import make
from command_line import read_log, refusal, train, untimed, write_rows
from ift.cli import main
from ift.tiny import train_tokenizer
from processes import join, start

WORDS = ["the", "model", "learns", "to", "name", "what", "comes", "next", "and", "some", "more"]
FEW = ["--lr", "1e-3", "--batch-size", "4", "--max-length", "48", "--log-steps", "1"]


SIZE = {"hidden_size": 32, "num_hidden_layers": 1}
OTHERS = {
    "mamba": lambda given: hf.MambaForCausalLM(hf.MambaConfig(**SIZE, state_size=4, **given)),
    "gpt_neox_japanese": lambda given: hf.GPTNeoXJapaneseForCausalLM(
        hf.GPTNeoXJapaneseConfig(**SIZE, num_attention_heads=4, **given)
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    draw, rows = random.Random(0), []
    for _ in range(16):
        words = draw.sample(WORDS, draw.randint(2, 6))
        right, wrong = (" ".join(words[: draw.randint(1, 4)]), draw.choice(WORDS))
        rows.append({"prompt": " ".join(words) + " :", "chosen": right, "rejected": wrong})
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory):
    """Write a model of some architecture and dtype with a tokenizer; its directory."""
    texts = [t for line in Path(data).read_text().splitlines() for t in json.loads(line).values()]
    tokenizer = train_tokenizer(texts, 300)

    def save(name="llama", dtype=torch.float32, **options):
        directory = tmp_path_factory.mktemp(name)
        options |= {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
        model = OTHERS[name](options) if name in OTHERS else make(name, **options)
        model.to(dtype).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return directory

    return save


# ---- dtypes --------------------------------------------------------------------------------------


def dtypes_in(directory):
    return {w.dtype for w in load_file(directory / "model.safetensors").values()}


def test_a_bf16_model_is_trained_in_fp32_and_saved_as_bf16(saved, data, tmp_path):
    base = saved(dtype=torch.bfloat16, tie_word_embeddings=True)
    few = ["--loss", "sft", *FEW, "--max-steps", "3", "--save-steps", "2"]
    assert main(train(data, tmp_path / "a", *few, model=base)) == 0
    run = tmp_path / "a"
    assert dtypes_in(run / "checkpoint-2") == {torch.float32}
    assert dtypes_in(run / "model") == {torch.bfloat16}
    config = json.loads((run / "model" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    model = hf.AutoModelForCausalLM.from_pretrained(run / "model")
    assert model.dtype is torch.bfloat16 and model.lm_head.weight is model.model.embed_tokens.weight
    sizes = [
        (d / "model.safetensors").stat().st_size for d in (run / "model", run / "checkpoint-3")
    ]
    assert sizes[0] < 0.6 * sizes[1]
    trained = load_file(run / "checkpoint-3" / "model.safetensors")
    for name, weight in load_file(run / "model" / "model.safetensors").items():
        assert weight.equal(trained[name].bfloat16())
    # Resumed, it is the same run; and the dtype is remembered.
    shutil.copytree(run, tmp_path / "b")
    for name in ("checkpoint-3", "model"):
        shutil.rmtree(tmp_path / "b" / name)
    assert main(train(data, tmp_path / "b", *few, "--resume", model=base)) == 0
    assert untimed(read_log(tmp_path / "b")) == untimed(read_log(run))
    files = [(tmp_path / d / "model" / "model.safetensors").read_bytes() for d in "ab"]
    assert files[0] == files[1]


def test_a_dtype_that_is_given(saved, data, tmp_path, capsys):
    base = saved(dtype=torch.bfloat16)
    few = ["--loss", "sft", *FEW, "--max-steps", "2", "--save-steps", "1"]
    wide = ["--dtype", "float32"]
    assert main(train(data, tmp_path / "wide", *few, *wide, model=base)) == 0
    assert dtypes_in(tmp_path / "wide" / "model") == {torch.float32}
    assert "lost in rounding" not in capsys.readouterr().err
    narrow = ["--dtype", "bfloat16", "--lr", "1e-7"]
    assert main(train(data, tmp_path / "narrow", *few, *narrow, model=base)) == 0
    for directory in ("checkpoint-2", "model"):
        assert dtypes_in(tmp_path / "narrow" / directory) == {torch.bfloat16}
    assert "steps of --lr 1e-07 are lost in rounding for most weights" in capsys.readouterr().err
    before, after = (load_file(d / "model.safetensors") for d in (base, tmp_path / "narrow/model"))
    assert sum(int((after[n] != w).sum()) for n, w in before.items()) < 100  # it told the truth
    shutil.rmtree(tmp_path / "narrow" / "checkpoint-2")
    again = train(data, tmp_path / "narrow", *few, *narrow, "--resume", model=base)
    assert main(again) == 0
    refused = train(data, tmp_path / "half", *few, "--dtype", "float16", model=base)
    assert "--dtype: got float16, in which small gradients" in refusal(refused, capsys)


def test_a_configuration_without_a_dtype(saved, data, tmp_path):
    """As checkpoints of other programs: the weights say it."""
    base = saved(dtype=torch.bfloat16)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    few = ["--loss", "sft", *FEW, "--max-steps", "1"]
    assert main(train(data, tmp_path / "out", *few, model=base)) == 0
    assert dtypes_in(tmp_path / "out" / "model") == {torch.bfloat16}
    assert dtypes_in(tmp_path / "out" / "checkpoint-1") == {torch.float32}


# ---- attention, checkpointing, packing: the same run ---------------------------------------------


def assert_same(run, other, rel=1e-5):
    for got, wanted in zip(read_log(run), read_log(other), strict=True):
        for key in ("loss", "grad_norm", "token_accuracy", "entropy", "eval_loss"):
            if key in wanted:
                assert got[key] == pytest.approx(wanted[key], rel=rel, abs=1e-6), key


@pytest.fixture(scope="module")
def plain(saved, data, tmp_path_factory):
    """Two steps and evaluations of a loss as they are by default: (run, arguments)."""
    base, made = saved(), {}

    def run(loss):
        if loss not in made:
            few = ["--loss", loss, *FEW, "--max-steps", "2", "--eval-data", data]
            few += ["--eval-steps", "1"]
            made[loss] = (tmp_path_factory.mktemp(loss), few, base)
            assert main(train(data, made[loss][0], *few, model=base)) == 0
        return made[loss]

    return run


@pytest.mark.parametrize("option", ["--packing", "--gradient-checkpointing", "--attn eager"])
@pytest.mark.parametrize("loss", ["sft", "ift"])
def test_another_way_to_the_same_run(loss, option, plain, data, tmp_path):
    run, few, base = plain(loss)
    assert main(train(data, tmp_path / "other", *few, *option.split(), model=base)) == 0
    assert_same(tmp_path / "other", run)


def test_checkpointing_and_packing_with_an_adapter(saved, data, tmp_path):
    pytest.importorskip("peft")
    base = saved()
    few = ["--loss", "ift", *FEW, "--max-steps", "2", "--lora-rank", "2"]
    both = ["--packing", "--gradient-checkpointing"]
    assert main(train(data, tmp_path / "a", *few, model=base)) == 0
    assert main(train(data, tmp_path / "b", *few, *both, model=base)) == 0
    assert_same(tmp_path / "b", tmp_path / "a")
    assert read_log(tmp_path / "b")[0]["grad_norm"] > 0


def test_a_dry_run_times_packed_rows(data, tmp_path, monkeypatch):
    """As they are trained: in one sequence without padding."""
    from ift.cli.trainer import RunTrainer

    shapes, step = [], RunTrainer.training_step

    def watched(self, model, inputs, *rest):
        shapes.append(tuple(inputs["input_ids"].shape))
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(RunTrainer, "training_step", watched)
    given = ["--loss", "sft", *FEW, "--dry-run"]
    for more in ((), ("--packing",)):
        assert main(train(data, tmp_path / "run", *given, *more)) == 0
    padded, _, packed, _ = shapes
    assert padded[0] == 4 and packed[0] == 1 and packed[1] < padded[0] * padded[1]


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_packing_of_pairs_is_refused(loss, data, tmp_path, capsys):
    said = refusal(train(data, tmp_path / "out", "--loss", loss, "--packing"), capsys)
    assert (
        f"--packing: got it with --loss {loss}; expected --loss sft or asft or psft or ift" in said
    )


@pytest.mark.parametrize("name", ["mamba", "falcon_h1", "roberta"])
def test_packing_is_refused_where_rows_would_mix(name, saved, data, tmp_path, capsys):
    base = saved(name)
    said = refusal(train(data, tmp_path / "out", "--packing", *FEW, model=base), capsys)
    assert said.splitlines()[-1].startswith("ift: --packing: ")


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flex_attention"])
def test_attention_of_gpus_is_refused_on_a_cpu(name, saved, data, tmp_path, capsys):
    said = refusal(train(data, tmp_path / "out", "--attn", name, model=saved()), capsys)
    assert said.splitlines()[-1].startswith(f"ift: --attn: got {name} on a CPU; expected eager")


def test_checkpointing_that_a_model_does_not_have(saved, data, tmp_path, capsys):
    base = saved("gpt_neox_japanese")
    given = train(data, tmp_path / "out", *FEW, "--gradient-checkpointing", model=base)
    assert "--gradient-checkpointing: GPTNeoXJapaneseForCausalLM does not support it" in refusal(
        given, capsys
    )


# ---- reporters -----------------------------------------------------------------------------------


def test_reporters(data, tmp_path, capsys):
    said = refusal(train(data, tmp_path, "--report-to", "wandb,paper"), capsys)
    assert "--report-to: got 'paper'; expected one of tensorboard, wandb" in said
    missing = [
        name for name in ("clearml", "dvclive", "swanlab")
        if name not in hf.integrations.get_available_reporting_integrations()
    ]  # fmt: skip
    said = refusal(train(data, tmp_path, *FEW, "--report-to", missing[0]), capsys)
    assert f"--report-to: {missing[0]} is not installed; expected some of those that" in said


def test_tensorboard(data, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    few = ["--loss", "sft", *FEW, "--max-steps", "2", "--report-to", "tensorboard"]
    assert main(train(data, tmp_path, *few)) == 0
    (directory,) = (tmp_path / "runs").iterdir()
    found = events.EventAccumulator(str(directory)).Reload().Scalars("train/loss")
    assert [e.value for e in found] == pytest.approx([r["loss"] for r in read_log(tmp_path)])


# ---- checkpoints and the disk --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limit", "kept"), [([], [4, 5]), (["--save-total-limit", "1"], [5]),
                        (["--save-total-limit", "0"], [1, 2, 3, 4, 5])]
)  # fmt: skip
def test_checkpoints_that_are_kept(limit, kept, data, tmp_path):
    few = ["--loss", "sft", *FEW, "--max-steps", "5", "--save-steps", "1"]
    assert main(train(data, tmp_path, *few, *limit)) == 0
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == [
        f"checkpoint-{n}" for n in kept
    ]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop", "sgd", "adafactor"])
def test_the_disk_that_was_announced(optimizer, data, tmp_path):
    from ift.cli.weights import checkpoint_bytes

    few = ["--loss", "sft", *FEW, "--max-steps", "1", "--optimizer", optimizer]
    assert main(train(data, tmp_path, *few)) == 0
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    files = ("model.safetensors", "optimizer.pt")
    wrote = sum((tmp_path / "checkpoint-1" / name).stat().st_size for name in files)
    assert wrote == pytest.approx(checkpoint_bytes(model, optimizer), abs=60_000)


def test_a_disk_that_is_too_small(saved, data, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    few = ["--loss", "sft", *FEW, "--max-steps", "3", "--save-steps", "1"]
    base = saved(dtype=torch.bfloat16)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=250_000))
    said = refusal(train(data, tmp_path / "out", *few, model=base), capsys).splitlines()[-1]
    assert (
        "ift: --output: " in said and "has 250.0 kB free, and the run writes 2 checkpoints" in said
    )
    one = [*few, "--save-total-limit", "1", "--save-steps", "3", "--optimizer", "sgd"]
    assert main(train(data, tmp_path / "out", *one, model=base)) == 0
    said = capsys.readouterr().err
    assert "disk: 1 checkpoint of " in said and "at once; 250.0 kB free" in said


# ---- FSDP ----------------------------------------------------------------------------------------


def sharded(rank, processes, directory):
    """Runs under ``accelerate launch --use_fsdp --fsdp_version 2``, on CPUs.

    accelerate shards on accelerators alone; torch does on CPUs, too.
    """
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    os.environ |= FSDP
    for number, arguments in enumerate(json.loads(Path(directory, "runs.json").read_text())):
        if rank == 0 and "--resume" in arguments:  # from the checkpoint before the last
            output = Path(arguments[arguments.index("--output") + 1])
            shutil.copytree(output, f"{output}_before")
            shutil.rmtree(output / "checkpoint-3")
        join(rank, processes, Path(directory, str(number)))
        assert main(arguments) == 0
        AcceleratorState._reset_state(reset_partial_state=True)


FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",  # its default, of which no model is written
}


def run_sharded(directory, *runs):
    for number in range(len(runs)):
        (directory / str(number)).mkdir(parents=True)
    (directory / "runs.json").write_text(json.dumps(runs))
    start(sharded, 2, directory)


@pytest.mark.slow
def test_fsdp_is_one_process(saved, data, tmp_path):
    base = saved(dtype=torch.bfloat16)
    few = ["--loss", "ift", *FEW, "--max-steps", "3", "--save-steps", "2", "--eval-data", data]
    half = [*few, "--bf16", "--lora-rank", "2"]
    assert main(train(data, tmp_path / "one", *few, model=base)) == 0
    assert main(train(data, tmp_path / "one_bf16", *half, model=base)) == 0
    arguments = train(data, tmp_path / "two", *few, "--batch-size", "2", model=base)
    in_bf16 = train(data, tmp_path / "two_bf16", *half, "--batch-size", "2", model=base)
    run_sharded(tmp_path, arguments, in_bf16, [*arguments, "--resume"])
    assert untimed(read_log(tmp_path / "two")) == untimed(read_log(tmp_path / "two_before"))
    assert_same(tmp_path / "two", tmp_path / "one", rel=1e-4)
    assert_same(tmp_path / "two_bf16", tmp_path / "one_bf16", rel=3e-2)
    last = tmp_path / "two" / "checkpoint-3"
    assert list(last.glob("pytorch_model_fsdp*"))  # it was sharded
    wanted = load_file(tmp_path / "one" / "checkpoint-3" / "model.safetensors")
    found = load_file(last / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, atol=1e-4, rtol=1e-4)
    assert dtypes_in(tmp_path / "two" / "model") == {torch.bfloat16}
    hf.AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "model")


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "use_fsdp: accelerate shards nothing on a CPU"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "needs deepspeed, which is not installed"),
    ],
)
def test_launchers_that_are_refused(environment, said, data, tmp_path, capsys, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert f"accelerate launch: {said}" in refusal(train(data, tmp_path, *FEW), capsys)
