"""Rows in the formats that people have them in."""

import json

import numpy as np
import pytest

from chats import ASKS, CALLED, HI, TERSE, TEXTS, TOOL, YES, in_json_lines, made, said, targets
from ift import tiny
from ift.data import Collator, encode
from ift.data_columns import column_names
from ift.data_rows import (
    DataError,
    Row,
    pair_row,
    read_preferences,
    read_responses,
    read_rows,
    training_row,
    unpaired_row,
    unread_keys,
)
from ift.preference_data import PairCollator, encode_pairs, encode_responses

PLAIN = [{"prompt": "a", "completion": "b"}]


@pytest.fixture(scope="module")
def tokenizer():
    return made()


PARTS = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
ROWS = {
    "parts": ({"messages": [said("user", PARTS), YES]}, [HI, YES]),
    "null beside calls": ({"messages": [HI, said("assistant", None, tool_calls=[CALLED])]},
                          [HI, ASKS]),
    "arguments in JSON": (
        {"messages": [HI, said("assistant", None, tool_calls=[
            {"function": {"name": "add", "arguments": '{"a": 1}'}}])]}, [HI, ASKS]),
    "a flat call": ({"messages": [HI, said("assistant", "", tool_calls=[
        {"name": "add", "arguments": {"a": 1}}])]}, [HI, ASKS]),
    "function_call": ({"messages": [HI, said("assistant", None, function_call={
        "name": "add", "arguments": '{"a": 1}'}), said("function", "2", name="add"), YES]},
        [HI, ASKS, said("tool", "2", name="add"), YES]),
    "ShareGPT": ({"conversations": [{"from": "system", "value": "Be terse."},
                                    {"from": "human", "value": "hi"},
                                    {"from": "gpt", "value": "yes"}]}, [TERSE, HI, YES]),
    "ShareGPT with tools": (
        {"conversations": [{"from": "human", "value": "hi"},
                           {"from": "function_call", "value": '{"name":"add","arguments":{"a":1}}'},
                           {"from": "observation", "value": "2"}, {"from": "gpt", "value": "yes"}],
         "tools": json.dumps([TOOL]), "system": "Be terse."},
        [TERSE, HI, ASKS, said("tool", "2"), YES]),
    "roles in conversations": ({"conversations": [HI, YES]}, [HI, YES]),
    "Alpaca": ({"instruction": "Add.", "input": "1 2", "output": "3"},
               [said("user", "Add.\n1 2"), said("assistant", "3")]),
    "Alpaca with history": (
        {"instruction": "Add.", "input": "", "output": "3", "system": "Be terse.",
         "history": [["hi", "yes"]]},
        [TERSE, HI, YES, said("user", "Add."), said("assistant", "3")]),
    "completion of messages": ({"prompt": [HI], "completion": [YES]}, [HI, YES]),
    "completion of a message": ({"prompt": "hi", "completion": YES}, [HI, YES]),
    "the whole as completion": ({"prompt": [HI], "completion": [TERSE, HI, YES]},
                                [TERSE, HI, YES]),
    "system": ({"messages": [HI, YES], "system": "Be terse."}, [TERSE, HI, YES]),
    "the same system": ({"messages": [TERSE, HI, YES], "system": "Be terse."}, [TERSE, HI, YES]),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_rows_become_messages(name):
    row, messages = ROWS[name]
    found = training_row(row, "here")
    assert found.messages == messages and not found.unread
    assert training_row(found.content, "again").content == found.content
    if "tools" in row:
        assert found.template_options == {"tools": [TOOL]}


IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
BAD_ROWS = {
    "picture": ({"messages": [said("user", [*PARTS, IMAGE]), YES]},
                r"messages\[0\].content\[2\] is of the type 'image_url'; expected text alone"),
    "sound": ({"messages": [said("user", [{"type": "input_audio"}]), YES]}, "type 'input_audio'"),
    "pictures beside": ({"messages": [HI, YES], "images": ["x.png"]}, "'images' is not text"),
    "null of a user": ({"messages": [said("user", None), YES]},
                       r"messages\[0\] has no string 'content' \(null is for an assistant"),
    "null of an answer": ({"messages": [HI, said("assistant", None)]}, r"messages\[1\] has no str"),
    "a call of nothing": ({"messages": [HI, said("assistant", "", tool_calls=[{"id": "1"}])]},
                          r"messages\[1\].tool_calls\[0\] names no function"),
    "arguments": ({"messages": [HI, said("assistant", "", tool_calls=[
        {"name": "add", "arguments": "{a: 1}"}])]}, "arguments is no JSON"),
    "tools": ({"messages": [HI, YES], "tools": "add"}, "'tools' is no JSON"),
    "tools of text": ({"messages": [HI, YES], "tools": ["add"]}, "'tools' is no array of objects"),
    "surrogate in a call": ({"messages": [HI, said("assistant", "", tool_calls=[
        {"name": "add", "arguments": {"a": "\ud800"}}])]}, "lone surrogate"),
    "from": ({"conversations": [{"from": "narrator", "value": "x"}]}, "is from 'narrator'"),
    "no value": ({"conversations": [{"from": "human"}]}, r"conversations\[0\] has no string"),
    "two formats": ({"messages": [HI, YES], "text": "x"}, "got 'messages' and 'text', each of a"),
    "Alpaca with text": ({"instruction": "a", "output": "b", "text": "c"}, "and 'text', each"),
    "output": ({"instruction": "a", "output": ""}, "'output' is empty"),
    "input": ({"instruction": "a", "input": 3, "output": "b"}, "'input' is a number"),
    "history": ({"instruction": "a", "output": "b", "history": ["c"]}, r"history\[0\] is no pair"),
    "empty text": ({"text": ""}, "'text' is empty"),
    "no text": ({"text": ["a"]}, "'text' is a array"),
    "two systems": ({"messages": [TERSE, HI, YES], "system": "Be long."}, "'system' is not the"),
    "system of plain text": ({"prompt": "a", "completion": "b", "system": "c"}, "with a row"),
    "template options": ({"messages": [HI, YES], "chat_template_kwargs": 1}, "is a number"),
    "no instruction": ({"instruction": "", "output": "b"}, "'instruction' is empty"),
    "empty answer": ({"prompt": [HI], "completion": ""}, "'completion' is empty"),
    "the prompt again": ({"prompt": [HI, YES], "completion": [HI, YES]}, "starts with the role"),
    "another prompt": ({"prompt": "yo", "completion": [HI, YES]}, "'completion' starts with"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_rows_that_cannot_be_served_are_refused(name):
    row, problem = BAD_ROWS[name]
    with pytest.raises(DataError, match=problem) as caught:
        training_row(row, "here")
    assert str(caught.value).startswith("here: ")


def test_columns_have_other_names_and_choose_a_format(tmp_path):
    rows = [{"q": "a", "a": "b", "prompt": "no", "source": "x"}, {"q": "c", "a": "d", "source": ""}]
    path = in_json_lines(tmp_path, rows)
    found = read_rows(path, column_names("prompt=q, completion=a"))
    assert [row.texts for row in found] == [["a", "b"], ["c", "d"]]
    assert unread_keys(found) == {"source": (1, found[0].where)}
    both = [{"instruction": "a", "output": "b", "text": "whole", "system": "s"}]
    path = in_json_lines(tmp_path, both)
    assert read_rows(path, column_names("instruction,output"))[0].messages[1]["content"] == "a"
    with pytest.raises(DataError, match="a system prompt"):
        read_rows(path, column_names("text"))
    with pytest.raises(
        DataError, match="no row has 'question' for 'prompt'; the first has 'instru"
    ):
        read_rows(path, column_names("prompt=question"))
    for text, problem in (("a=b", "got 'a=b'; expected KEY"), ("text,text=x", "'text' twice"),
                          ("", "got ''; expected KEY")):  # fmt: skip
        with pytest.raises(ValueError, match=problem):
            column_names(text)


def test_a_system_message_for_those_without(tmp_path):
    rows = [{"messages": [HI, YES]}, {"messages": [said("system", "x"), HI, YES]},
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "y"}]},
            {"instruction": "a", "output": "b", "system": "y"},
            {"prompt": [HI], "chosen": [YES], "rejected": "no"}]  # fmt: skip
    found = [row.messages[0] for row in read_rows(in_json_lines(tmp_path, rows), None, "Be terse.")]
    assert [message["content"] for message in found] == [
        "Be terse.", "x", "Be terse.", "y", "Be terse."
    ]  # fmt: skip
    assert {message["role"] for message in found} == {"system"}
    with pytest.raises(DataError, match="line 1: a system prompt .* with a row of plain text"):
        read_rows(in_json_lines(tmp_path, PLAIN), None, "Be terse.")


def test_plain_text_is_learned_as_a_whole(tokenizer):
    row = training_row({"text": TEXTS[1], "prompt": "of another format"}, "here")
    assert row.unread == ("prompt",)
    (example,) = encode([row], tokenizer, 99).examples
    ids = tokenizer(TEXTS[1])["input_ids"]
    assert targets(example) == [*ids, tokenizer.eos_token_id]
    starting = made(bos=True)
    spelled = training_row({"text": f"<|start|>{TEXTS[1]}{tiny.EOS}"}, "here")
    for text in (row, spelled):  # no token is doubled
        (example,) = encode([text], starting, 99).examples
        assert example["input_ids"].tolist() == [
            starting.bos_token_id, *ids, starting.eos_token_id
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "context"),
    [
        ({"prompt": [HI, YES, HI], "completion": YES}, 3),
        ({"prompt": [HI], "completion": [ASKS, said("tool", "2"), YES]}, 1),
        ({"prompt": [HI, YES, HI], "completion": [HI, YES, HI, YES], "system": "s"}, 4),
        ({"messages": [HI, YES]}, 0),
    ],
)
def test_only_a_completion_is_learned(tokenizer, row, context):
    found = training_row(row, "here")
    assert found.context == context
    turns = found.messages[context:]
    (example,) = encode([found], tokenizer, 999).examples
    marked = tokenizer.decode(targets(example))
    assert marked.count(tiny.EOS) == sum(turn["role"] == "assistant" for turn in turns)


def test_pairs_of_other_formats():
    answers = {"chosen": {"from": "gpt", "value": "yes"}, "rejected": {"from": "gpt", "value": "n"}}
    turns = [{"from": "human", "value": "hi"}]
    share = pair_row({"conversations": turns, **answers, "score": 3}, "here")
    assert share.chosen.messages == [HI, YES] and share.unread == ("score",)
    row = {"instruction": "hi", "chosen": "yes", "rejected": "n", "system": "Be terse."}
    alpaca = pair_row(row, "here")
    assert alpaca.chosen.messages == [TERSE, HI, YES] and alpaca.chosen.context == 2
    whole = {"prompt": "hi", "chosen": [HI, YES], "rejected": [HI, said("assistant", "n")]}
    assert pair_row(whole, "here").chosen.messages == [HI, YES]
    with pytest.raises(DataError, match=r"got 'prompt', 'chosen' \(null\), 'rejected'; expected"):
        pair_row({"prompt": "a", "chosen": None, "rejected": "b"}, "here")
    with pytest.raises(DataError, match="got 'prompt', 'completion', 'label'; .* --loss kto takes"):
        pair_row({"prompt": "a", "completion": "b", "label": True}, "here")


# ---- single responses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "desirable"),
    [
        (True, True),
        (False, False),
        (1, True),
        (0, False),
        (0.0, False),
        ("true", True),
        ("False", False),
        ("1", True),
        ("0", False),
    ],
)
def test_labels(label, desirable):
    row = unpaired_row({"prompt": "a", "completion": "b", "label": label, "id": 1}, "here")
    assert row.desirable is desirable and row.unread == ("id",)
    chat = unpaired_row({"prompt": [HI], "completion": [YES], "label": label}, "here")
    assert chat.messages == [HI, YES] and chat.context == 1 and chat.desirable is desirable
    plain = training_row({"prompt": "a", "completion": "b", "label": label}, "here")
    chat = training_row({"prompt": [HI], "completion": [YES], "label": label}, "here")
    assert plain.desirable is desirable is chat.desirable and not plain.unread + chat.unread
    for bad in (2, "good", 0.5, [True]):
        other = training_row({"prompt": "a", "completion": "b", "label": bad}, "here")
        assert other.desirable is None and other.unread == ("label",)
        with pytest.raises(DataError, match="'label' is .*; expected true or false"):
            unpaired_row({"prompt": "a", "completion": "b", "label": bad}, "here")


def test_single_responses_and_pairs_in_one_file(tmp_path):
    single, pair = ({"prompt": "a", "completion": "b", "label": True},
                    {"prompt": "a", "chosen": "b", "rejected": "c"})  # fmt: skip
    mixed = {
        "line 2: got 'prompt', 'chosen', 'rejected'; expected": [single, pair],
        "line 2: got 'prompt', 'completion', 'label'; .*, in every row, or {\"prompt\"": [
            pair,
            single,
        ],
    }
    for problem, rows in mixed.items():
        with pytest.raises(DataError, match=problem):
            read_responses(in_json_lines(tmp_path, rows))
    assert isinstance(read_responses(in_json_lines(tmp_path, [single]))[0], Row)
    assert read_preferences(in_json_lines(tmp_path, [pair])) == read_responses(
        tmp_path / "rows.jsonl"
    )


def test_mismatched_responses_answer_other_prompts(tokenizer, caplog):
    prompts = ["hello", "hello", "user", "two", "hello"]
    rows = [
        unpaired_row({"prompt": p, "completion": f" {i}", "label": i % 2 == 0}, f"row {i}")
        for i, p in enumerate(prompts)
    ]
    examples = encode_responses(rows, tokenizer, 99).examples
    answers = [tokenizer.decode(targets(example["kl"]))[1] for example in examples]
    assert answers == ["2", "2", "3", "4", "2"]  # the next of another prompt, in a circle
    assert [e["desirable"] for e in examples] == [True, False, True, False, True]
    for example in examples:
        example["reference"] = np.array([1.0, 2.0], np.float32)
    batch = PairCollator(Collator(0))(examples)
    assert batch["desirable"].tolist() == [True, False, True, False, True]
    assert batch["reference"].tolist() == [1] * 5 and batch["kl_reference"].tolist() == [2] * 5
    pairs = [
        pair_row({"prompt": p, "chosen": f" {i}", "rejected": " x"}, f"pair {i}")
        for i, p in enumerate(prompts)
    ]
    examples = encode_pairs(pairs, tokenizer, 99, mismatched=True).examples
    assert [tokenizer.decode(targets(example["kl"]))[1] for example in examples] == answers
    assert not caplog.messages
    alone = encode_responses(rows[:2], tokenizer, 99).examples  # one prompt: any other answer
    assert [tokenizer.decode(targets(e["kl"]))[1] for e in alone] == ["1", "0"]
    encode_pairs(pairs[:2], tokenizer, 99, mismatched=True)
    assert caplog.text.count("all rows (2) have one prompt: expected several for KTO") == 2
