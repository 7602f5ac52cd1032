"""What truncation leaves of rows, and which tokens of conversations are learned."""

import logging
from dataclasses import replace

import pytest

from chats import ASKS, HI, TERSE, TEXTS, TOOL, YES, made, said, targets
from ift import tiny
from ift.chat_template import SIMPLE_CHAT_TEMPLATE
from ift.data import encode, encode_whole, shortened
from ift.data_rows import DataError, Row, pair_row, training_row
from ift.preference_data import encode_pairs, encode_responses


@pytest.fixture(scope="module")
def tokenizer():
    return made()


# ---- truncation ----------------------------------------------------------------------------------


def cut_rows(rows, tokenizer, limit, how):
    """The examples, None for a row that is left out."""
    return [shortened(whole, tokenizer, limit, how) for whole in encode_whole(rows, tokenizer)]


@pytest.mark.parametrize("bos", [False, True])
def test_truncation(bos):
    tokenizer = made(bos=bos)
    rows = [
        Row(f"row {i}", {"prompt": TEXTS[0] * (3 * i), "completion": TEXTS[1]}) for i in range(3)
    ]
    rows.append(Row("row 3", {"messages": [said("user", "hello " * 9), YES, HI, YES]}))
    whole = encode_whole(rows, tokenizer)
    sizes = [len(example["input_ids"]) for example in whole]
    limit = sizes[1] - 2
    assert sizes[0] < limit < sizes[2]
    for how in ("end", "start", "drop"):
        encoded = encode(rows, tokenizer, limit, how)
        cut = dict(zip([r.where for r in rows], cut_rows(rows, tokenizer, limit, how), strict=True))
        assert [e["input_ids"].tolist() for e in encoded.examples] == [
            e["input_ids"].tolist() for e in cut.values() if e is not None
        ]
        assert all(len(e["input_ids"]) <= limit for e in encoded.examples)
        too_long = [r.where for r, size in zip(rows, sizes, strict=True) if size > limit]
        if how == "drop":
            assert encoded.truncated == too_long and not encoded.dropped
            assert len(encoded.examples) == len(rows) - len(too_long)
        for row, example in zip(rows, whole, strict=True):
            found, size = cut[row.where], len(example["input_ids"])
            if size <= limit:
                assert found["labels"].tolist() == example["labels"].tolist()
            elif how == "start":
                first = int(bos and row.messages is None)  # the template writes no start token
                for key in ("input_ids", "labels"):
                    kept = [*example[key][:first], *example[key][size - limit + first :]]
                    assert found[key].tolist() == kept
                assert row.where in encoded.truncated
            elif how == "end" and found is not None:
                assert found["labels"].tolist() == example["labels"][:limit].tolist()
                assert row.where in encoded.truncated
            elif how == "end":
                assert row.where in encoded.dropped and row.where not in encoded.truncated


@pytest.mark.parametrize("bos", [False, True])
def test_a_cut_at_the_start_leaves_whole_answers(bos):
    """An answer that the cut reaches is no target; a text without a prompt is cut."""
    tokenizer = made(bos=bos)
    words = said("assistant", TEXTS[2])
    rows = {
        "plain": {"prompt": TEXTS[0], "completion": TEXTS[1]},
        "chat": {"messages": [HI, words]},
        "turns": {"messages": [HI, words, HI, words]},
        "text": {"prompt": "", "completion": TEXTS[1]},
    }
    for name, content in rows.items():
        row = Row(name, content)
        (whole,) = encode_whole([row], tokenizer)
        ids, labels = whole["input_ids"].tolist(), whole["labels"].tolist()
        first = int(ids[0] == tokenizer.bos_token_id)
        border = next(i for i, label in enumerate(labels) if label != -100)
        spare = border - max(1, first)  # tokens before the answer that can be cut off
        limits = {len(ids) - count for count in (1, spare, spare + 1, spare + 3) if count > 0}
        for limit in limits:
            found = cut_rows([row], tokenizer, limit, "start")[0]
            cut = len(ids) - limit
            kept = labels[:first] + labels[first + cut :]
            if name == "text" or cut <= spare:
                assert found["labels"].tolist() == kept
            elif name == "turns":
                assert len(found["labels"]) == limit
                assert targets(found) == [x for x in labels if x != -100][-len(targets(found)) :]
                assert 2 * len(targets(found)) == sum(x != -100 for x in labels)
            else:
                assert found is None
                with pytest.raises(DataError, match="maximum length above that of the answers"):
                    encode([row], tokenizer, limit, "start")
                single = replace(row, desirable=True)
                both = encode_responses([single, Row("b", rows["text"], desirable=True)],
                                        tokenizer, limit, truncate="start")  # fmt: skip
                assert both.dropped == [name] and both.indices == [1]


def test_truncated_pairs_keep_one_prompt(tokenizer):
    prompt = TEXTS[0] * 4
    rows = [
        pair_row({"prompt": prompt, "chosen": "sum", "rejected": TEXTS[1]}, "long"),
        pair_row({"prompt": "a", "chosen": "b", "rejected": "c"}, "short"),
        pair_row({"prompt": "a", "chosen": TEXTS[1] * 9, "rejected": "c"}, "answer"),
    ]
    whole = encode_pairs(rows, tokenizer, 999).examples
    longest = len(whole[0]["rejected"]["input_ids"])
    limit = longest - 3
    encoded = encode_pairs(rows, tokenizer, limit, mismatched=True, truncate="start")
    assert encoded.truncated == ["long"] and encoded.dropped == ["answer"]
    for side in ("chosen", "rejected"):
        for key in ("input_ids", "labels"):
            assert encoded.examples[0][side][key].tolist() == whole[0][side][key][3:].tolist()
    encoded = encode_pairs(rows, tokenizer, limit, mismatched=True, truncate="drop")
    assert encoded.truncated == ["long", "answer"] and len(encoded.examples) == 1
    encoded = encode_pairs(rows, tokenizer, limit, mismatched=True)
    assert encoded.truncated == ["long", "answer"] and not encoded.dropped
    cut = encoded.examples[0]["rejected"]["input_ids"]
    assert cut.tolist() == whole[0]["rejected"]["input_ids"][:limit].tolist()
    with pytest.raises(DataError, match=r"no pair of 1 has tokens left"):
        encode_pairs(rows[2:], tokenizer, limit, truncate="start")


# ---- chat templates ------------------------------------------------------------------------------

# What tokenizers without a template had before it could mark what is generated.
UNMARKED = (
    "{% for message in messages %}{{ '<|' + message.role + '|>\n' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TALKS = [
    [HI, YES],
    [TERSE, HI, YES, said("user", "\nhello "), said("assistant", " the\n sum ")],
    [YES, HI, said("assistant", "")],
    [HI, YES, YES, said("user", "last")],
]


@pytest.mark.parametrize("own", [True, False])
def test_the_default_template_marks_what_was_learned_before(own):
    marked, before = made(), made(UNMARKED)
    assert marked.chat_template == SIMPLE_CHAT_TEMPLATE
    if not own:
        marked.chat_template = None
    rows = [Row(f"talk {i}", {"messages": talk}) for i, talk in enumerate(TALKS)]
    rows += [Row("last turn", {"messages": TALKS[1]}, context=4)]
    for now, then in zip(
        encode(rows, marked, 999).examples, encode(rows, before, 999).examples, strict=True
    ):
        for key in ("input_ids", "labels"):
            assert now[key].tolist() == then[key].tolist()
    for talk in TALKS:
        text = [t.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
                for t in (made(), before)]  # fmt: skip
        assert text[0] == text[1]


def test_the_mask_of_transformers_and_trl_is_ours(tmp_path):
    tokenizer = made()
    row = Row("", {"messages": [*TALKS[1], HI, ASKS, said("tool", "2"), YES], "tools": [TOOL]})
    (example,) = encode([row], tokenizer, 999).examples
    out = tokenizer.apply_chat_template(
        row.messages, tools=[TOOL], return_dict=True, return_assistant_tokens_mask=True
    )
    assert out["input_ids"] == example["input_ids"].tolist()
    assert out["assistant_masks"] == (example["labels"] != -100).astype(int).tolist()
    text = tokenizer.decode(out["input_ids"])
    assert text.startswith("<|tools|>\n[{") and '<tool_call>{"name": "add"' in text

    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    config = trl.SFTConfig(str(tmp_path), assistant_only_loss=True, report_to=[], use_cpu=True,
                           bf16=False)  # fmt: skip
    rows = [{"messages": talk} for talk in TALKS[:2]]
    trainer = trl.SFTTrainer(
        tiny.tiny_llama(tokenizer, hidden=32, layers=1), config, processing_class=tokenizer,
        train_dataset=datasets.Dataset.from_list(rows),
    )  # fmt: skip
    ours = encode([Row("", row) for row in rows], tokenizer, 999).examples
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    for index, example in enumerate(ours):
        length = len(example["labels"])
        assert batch["labels"][index, :length].tolist() == example["labels"].tolist()


def test_tools_that_a_template_does_not_render(caplog):
    plain = made(UNMARKED)
    rows = [Row(f"row {i}", {"messages": [HI, YES], "tools": [TOOL]}) for i in (1, 2)]
    with caplog.at_level(logging.WARNING):
        encode([*rows, Row("row 3", {"messages": [HI, YES]})], plain, 99)
    (record,) = caplog.records
    assert record.getMessage().startswith("2 of 3 conversations (first: row 1) have tools")
    with pytest.raises(DataError, match="row 4: the chat template leaves out the tool call 'add'"):
        encode([Row("row 4", {"messages": [HI, ASKS]})], plain, 99)


def test_options_reach_the_template():
    template = SIMPLE_CHAT_TEMPLATE.replace(
        "{% if tools %}", "{% if think %}hm{% endif %}{% if tools %}"
    )
    tokenizer = made(template)
    content = {"messages": [HI, YES], "chat_template_kwargs": {"think": True}}
    row = training_row(content, "here")
    (example,) = encode([row], tokenizer, 99).examples
    assert tokenizer.decode(example["input_ids"]).startswith("hm<|user|>")
    assert tokenizer.decode(targets(example)) == f"yes{tiny.EOS}\n"
