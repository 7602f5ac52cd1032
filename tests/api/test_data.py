"""JSONL → token ids, labels and batches; and the docstrings that the demo learns from."""

from __future__ import annotations

import json

import pytest
import torch

from examples import docstrings
from ift import tiny
from ift.data import Collator, encode, split_rows
from ift.data_rows import DataError, Row, read_rows

TEXTS = ["def add(a, b):\n", "Return the sum of two numbers.", "Say hello to the user, twice."]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.train_tokenizer(TEXTS, vocab_size=300)


def write(path, *lines):
    path.write_bytes(b"".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return path


def prompt_row(prompt="Say hello", completion="hello"):
    return Row("f line 1", {"prompt": prompt, "completion": completion})


def chat_row(*turns):
    messages = [{"role": role, "content": content} for role, content in turns]
    return Row("f line 7", {"messages": messages})


def targets(example):
    """The ids that the loss sees."""
    labels = example["labels"]
    assert (example["input_ids"][labels != -100] == labels[labels != -100]).all()
    return labels[labels != -100].tolist()


# ---- reading -------------------------------------------------------------------------------------

GOOD = '{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{not json}\n", "line 2: not JSON"),
        ('["a"]\n', "line 2: got a JSON array"),
        ("3\n", "line 2: got a JSON number"),
        ('{"prompt": "a"}\n', "line 2: got 'prompt'; expected"),
        ('{"texts": "a"}\n', "line 2: got 'texts'; expected"),
        ("{}\n", "line 2: got no keys; expected"),
        ('{"prompt": 3, "completion": "b"}\n', "line 2: 'prompt' is a number; expected a string"),
        ('{"prompt": "a", "completion": null}\n', "line 2: 'completion' is a null"),
        ('{"prompt": "a", "completion": ""}\n', "line 2: 'completion' is empty"),
        ('{"prompt": "a", "completion": "\\ud800"}\n', "line 2: completion has a lone surrogate"),
        ('{"messages": []}\n', "line 2: 'messages' is an empty array"),
        ('{"messages": "hi"}\n', "line 2: 'messages' is a string"),
        ('{"messages": ["hi"]}\n', r"line 2: messages\[0\] has no string 'role'"),
        ('{"messages": [{"role": "user", "content": 1}]}\n', r"messages\[0\] has no string 'con"),
        ('{"messages": [{"role": "user", "content": "x"}]}\n', "roles are user; expected at least"),
        (b'{"prompt": "\xff", "completion": "b"}\n', "line 2: not UTF-8"),
        ("[" * 100_000 + "\n", "line 2: "),
        ('{"prompt": ' + "1" * 5000 + "}\n", "line 2: an integer has too many digits"),
    ],
)
def test_malformed_rows_name_their_line(tmp_path, line, problem):
    with pytest.raises(DataError, match=problem):
        read_rows(write(tmp_path / "f.jsonl", GOOD, line))


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_empty_file(tmp_path, content):
    with pytest.raises(DataError, match=r"f\.jsonl: the file has no rows; expected one object"):
        read_rows(write(tmp_path / "f.jsonl", content))


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(DataError, match=r"no\.jsonl: No such file"):
        read_rows(tmp_path / "no.jsonl")
    with pytest.raises(DataError, match="a folder without a file of rows; expected .jsonl"):
        read_rows(tmp_path)


def test_reads_both_formats_blank_lines_and_bom(tmp_path):
    chat = '{"messages": [{"role": "user", "content": "é"}, {"role": "assistant", "content": "y"}]}'
    rows = read_rows(write(tmp_path / "f.jsonl", b"\xef\xbb\xbf", GOOD, "\n", chat))
    assert [row.where.split()[-1] for row in rows] == ["1", "3"]
    assert rows[0].texts == ["a", "b"] and rows[1].texts == ["é", "y"]


def test_split_is_a_partition_and_repeats():
    rows = [prompt_row(completion=str(i)) for i in range(50)]
    train, held_out = split_rows(rows, 0.1, seed=3)
    assert len(held_out) == 5 and len(train) == 45
    assert {id(r) for r in train} | {id(r) for r in held_out} == {id(r) for r in rows}
    assert split_rows(rows, 0.1, seed=3) == (train, held_out)
    assert split_rows(rows, 0.1, seed=4)[1] != held_out
    assert split_rows(rows, 0, seed=3) == (rows, [])
    assert [len(part) for part in split_rows(rows[:2], 0.999, seed=0)] == [1, 1]
    with pytest.raises(DataError, match="1 row to split"):
        split_rows(rows[:1], 0.5, seed=0)


# ---- tokenising ----------------------------------------------------------------------------------


def test_prompt_is_masked_and_the_end_token_learned(tokenizer):
    (example,) = encode([prompt_row("Say hello ", "to the user")], tokenizer, 64).examples
    ids = tokenizer("to the user")["input_ids"]
    assert targets(example) == [*ids, tokenizer.eos_token_id]
    assert tokenizer.decode(example["input_ids"]) == "Say hello to the user" + tiny.EOS


def test_start_token_where_the_tokenizer_adds_one(tokenizer):
    from tokenizers.processors import TemplateProcessing

    starting = tiny.train_tokenizer(TEXTS, vocab_size=300)
    starting.add_special_tokens({"bos_token": "<|start|>"})
    bos = starting.bos_token_id
    starting.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", bos)]
    )
    (with_start,) = encode([prompt_row()], starting, 64).examples
    (without,) = encode([prompt_row()], tokenizer, 64).examples
    assert with_start["input_ids"].tolist() == [bos, *without["input_ids"].tolist()]
    assert with_start["labels"][0] == -100


def test_rows_cut_down_to_their_prompt_are_reported(tokenizer):
    long, short = prompt_row("Say hello to the user " * 5), prompt_row()
    encoded = encode([short, long], tokenizer, 12)
    assert len(encoded.examples) == 1 and encoded.dropped == ["f line 1"]
    with pytest.raises(DataError, match=r"no completion tokens left in any of 1 rows .* 12 tokens"):
        encode([long], tokenizer, 12)


def test_cut_at_max_length(tokenizer):
    (whole,) = encode([prompt_row(completion=TEXTS[1])], tokenizer, 64).examples
    (cut,) = encode([prompt_row(completion=TEXTS[1])], tokenizer, 9).examples
    for key in ("input_ids", "labels"):
        assert cut[key].tolist() == whole[key][:9].tolist()


def test_a_completion_alone_learns_all_but_its_first_token(tokenizer):
    encoded = encode([prompt_row("", "hello")], tokenizer, 64)
    assert encoded.target_tokens == len(tokenizer("hello")["input_ids"])  # − first, + end
    with pytest.raises(DataError, match="no completion tokens left"):
        encode([prompt_row("", "hello")], tokenizer, 1)


CONVERSATION = (("system", "Say"), ("user", "two"), ("assistant", "sum"),
                ("user", "the"), ("assistant", "hello"))  # fmt: skip


@pytest.mark.parametrize("own_template", [True, False])
def test_every_assistant_turn_is_learned(tokenizer, own_template, monkeypatch):
    if not own_template:
        monkeypatch.setattr(tokenizer, "chat_template", None)
    (example,) = encode([chat_row(*CONVERSATION)], tokenizer, 128).examples
    assert tokenizer.decode(targets(example)) == f"sum{tiny.EOS}\nhello{tiny.EOS}\n"
    text = "".join(
        f"<|{role}|>\n{content}{tiny.EOS if role == 'assistant' else ''}\n"
        for role, content in CONVERSATION
    )
    assert tokenizer.decode(example["input_ids"]) == text


def with_template(tokenizer, template):
    copy = tiny.train_tokenizer(TEXTS, vocab_size=300)
    copy.chat_template = template
    return copy


def test_turns_that_the_template_rewrites_later_are_context(tokenizer):
    thinking = (  # the last assistant turn keeps its thoughts, earlier ones lose them
        "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' and loop.last %}(hm)"
        "{% endif %}{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    copy = with_template(tokenizer, thinking)
    (example,) = encode([chat_row(*CONVERSATION)], copy, 128).examples
    assert copy.decode(targets(example)) == "(hm)hello;"
    assert "[assistant]sum;" in copy.decode(example["input_ids"])


@pytest.mark.parametrize(
    ("template", "turns", "problem"),
    [
        ("{{ raise_exception('no system') }}", CONVERSATION, "f line 7: the chat template refuses"),
        ("{{ messages[0].nothing.at.all }}", CONVERSATION, "f line 7: the chat template refuses"),
        (None, (("assistant", "hello"),), "f line 7: no assistant turn to learn from"),
    ],
)
def test_conversations_that_do_not_fit(tokenizer, template, turns, problem):
    copy = with_template(tokenizer, template) if template else tokenizer
    with pytest.raises(DataError, match=problem):
        encode([chat_row(*turns)], copy, 64)


def test_collator_pads_on_the_right(tokenizer):
    rows = [prompt_row(), prompt_row(completion=TEXTS[1])]
    examples = encode(rows, tokenizer, 64).examples
    batch = Collator(pad_id=5)(examples)
    short, long = (len(example["input_ids"]) for example in examples)
    assert {t.shape for t in batch.values()} == {torch.Size([2, long])}
    assert {t.dtype for t in batch.values()} == {torch.int64}
    assert batch["attention_mask"].sum(-1).tolist() == [short, long]
    assert (batch["input_ids"][0, short:] == 5).all() and (batch["labels"][0, short:] == -100).all()
    for row, example in enumerate(examples):
        for key in ("input_ids", "labels"):
            assert batch[key][row, : len(example[key])].tolist() == example[key].tolist()


# ---- docstrings ----------------------------------------------------------------------------------

SOURCE = '''
import does_not_exist
def plain(a, *rest, key=None) -> int:
    """  First line
    goes on.

    Second paragraph.
    """
class Box(Base):
    """A box of things."""
    if True:
        async def open(self):
            """Open the box."""
def silent(): pass
'''


def test_pairs_of_a_source():
    assert list(docstrings.pairs_of(SOURCE, "some.module")) == [
        ("# some.module\ndef plain(a, *rest, key=None) -> int:\n", "First line goes on."),
        ("# some.module\nclass Box(Base):\n", "A box of things."),
        ("# some.module\nasync def Box.open(self):\n", "Open the box."),
    ]


def test_collect_is_deterministic_and_does_not_leak(tmp_path, capsys, monkeypatch):
    some = docstrings.stdlib_files()[::4]
    monkeypatch.setattr(docstrings, "stdlib_files", lambda: some)
    train, held_out = docstrings.collect()
    assert len(train) > 500 and 0.02 < len(held_out) / len(train) < 0.1
    completions = [row["completion"] for row in train + held_out]
    assert len(set(completions)) == len(completions)
    assert docstrings.main([str(tmp_path / "new")]) == 0
    assert f"{len(train)} training pairs" in capsys.readouterr().out
    rows = read_rows(tmp_path / "new" / "train.jsonl")
    assert [json.dumps(row.content) for row in rows] == [json.dumps(row) for row in train]
