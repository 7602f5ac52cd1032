"""The committed proofs are of these sources and have no fault; a sample of them is run again."""

import pytest

import ift
from tests.proofs import models, table
from tests.proofs.batches import find_inputs, make_batch
from tests.proofs.log import Log, digest, read_lines
from tests.proofs.parts import PARTS, log_of, part
from tests.proofs.tiny_models import tiny_model

SAMPLE = (
    "LlamaForCausalLM",
    "Gemma2ForCausalLM",
    "OPTForCausalLM",  # positions from the mask
    "RobertaForCausalLM",  # positions from the ids
    "MambaForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen2VLForConditionalGeneration",  # three-dimensional positions
    "LlavaForConditionalGeneration",
    "Gemma3ForConditionalGeneration",  # attention to the whole image
    "BartForCausalLM",  # refused
)


@pytest.mark.parametrize("name", PARTS)
def test_the_committed_proof_is_of_these_sources(name):
    lines = read_lines(log_of(name).path)
    assert lines, f"no proof: make prove PART={name}"
    assert lines[0]["digest"] == log_of(name).header["digest"], f"old: make prove PART={name}"
    assert [line["case"] for line in lines[1:]] == part(name).cases()


@pytest.mark.parametrize("name", PARTS)
def test_the_committed_proof_has_no_fault(name):
    lines = read_lines(log_of(name).path)[1:]
    assert {line["case"]: part(name).fault(line) for line in lines if part(name).fault(line)} == {}


def test_few_deterministic_calls_were_refused():
    """A refused one shows nothing. Of the whole log: a seed may repeat one shape."""
    lines = read_lines(log_of("properties").path)[1:]
    refused, every = (sum(line[name] for line in lines) for name in ("refused", "deterministic"))
    assert every > 300 and refused <= 0.05 * every


def test_the_table_is_of_the_log():
    assert table.PAGE.read_text() == table.page(), "python -m tests.proofs.table"


def test_the_sweep_is_wide():
    lines = read_lines(log_of("models").path)[1:]
    assert sum("results" in line for line in lines) >= 200
    assert sum(line.get("inputs", "text") not in ("text", "none") for line in lines) >= 30


@pytest.mark.parametrize("case", SAMPLE)
def test_sample(case):
    line = models.run(case)
    assert "results" in line and not models.fault(line), line


@pytest.mark.parametrize("padding", models.PADDINGS)
def test_the_batches_are_such_that_prompts_can_be_shared(padding):
    model = tiny_model(models.architecture_of("LlamaForCausalLM"))
    batch = make_batch(model, find_inputs(model), padding)
    ift.patch(model)
    model(**batch, ift=ift.IFTConfig())  # the first one tries things out
    lengths = []
    model.model.register_forward_hook(lambda *given: lengths.append(given[-1][0].shape[1]))
    model(**batch, ift=ift.IFTConfig())
    assert len(lengths) == 3 and lengths[1] == lengths[2], lengths  # prompt, then both passes


FAULTS = (
    ({"crashed": "the process ended"}, "the process ended"),
    ({"results": {"sft/left": {"verdict": "different", "reason": "differs in loss"}}}, "differs"),
    ({"results": {"sft/left": {"verdict": "refused", "at": "forward"}}}, "refused only at its"),
    ({"results": {"ift_two_passes/left": {"verdict": "failed", "reason": "KeyError"}}}, "KeyError"),
)


@pytest.mark.parametrize(("line", "words"), FAULTS)
def test_a_fault_is_one(line, words):
    assert words in models.fault(line)


@pytest.mark.parametrize(
    "result",
    [
        {"verdict": "equal"},
        {"verdict": "refused", "at": "patch"},
        {"verdict": "undecided", "reason": "the loss of the model itself is not finite"},
    ],
)
def test_what_is_no_fault(result):
    assert models.fault({"results": {"sft/right": result}}) == ""
    assert models.fault({"results": {"ift_two_passes/right": {**result, "at": "forward"}}}) == ""


def _digest(tmp_path, source, name="a.py"):
    (tmp_path / name).write_text(source)
    return digest([name], tmp_path)


def test_digest_is_of_the_code_alone(tmp_path):
    code = 'def f(x):\n    """Doc."""\n    return x + 1  # why\n'
    same = _digest(tmp_path, code)
    for other in ("def f(x):\n    return x + 1\n", '"""Module."""\n\ndef f( x ):\n  return x+1\n'):
        assert _digest(tmp_path, other) == same
    for other in (
        code.replace("1", "2"),
        code + 'print("Doc.")\n',
        code.replace("    return", "return"),
    ):
        assert _digest(tmp_path, other) != same
    cpp = _digest(tmp_path, 'int f() { return 1; } // "one"\n', "a.cpp")
    assert _digest(tmp_path, "int f() {\n  /* one */ return 1; }\n", "a.cpp") == cpp
    assert _digest(tmp_path, "int f() { return 2; }\n", "a.cpp") != cpp
    with pytest.raises(ValueError, match="patterns: "):
        digest(["nothing.py"], tmp_path)


def test_log_continues_and_drops_what_is_old(tmp_path):
    log = Log(tmp_path / "x.jsonl", {"digest": "1"})
    assert log.read() == {}
    log.start()
    for case in ("b", "a", "b"):
        log.append({"case": case, "results": {}})
    with open(log.path, "a") as file:
        file.write('{"case": "cut o')
    assert set(log.read()) == {"a", "b"}
    log.sort(["a", "b", "c"])
    assert [line.get("case") for line in read_lines(log.path)] == [None, "a", "b"]
    assert Log(log.path, {"digest": "2"}).read() == {}
