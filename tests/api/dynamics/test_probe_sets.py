"""The answers of a probe set: words without spaces between them, and none that equals another."""

import re

import pytest
import transformers as hf

import causal_lms
from chats import TOOL, YES, said
from ift import tiny
from ift.data_rows import DataError
from ift.dynamics import build_probe_set, read_probes, sampler, write_probes
from ift.dynamics.probes import _answer_text
from ift.dynamics.rewrites import SAME, SENTENCES

SPACELESS = {
    "chinese": ["我喜欢猫和狗。", "今天天气很好", "他在北京工作了很久"],
    "japanese": ["猫が好きです", "今日はいい天気ですね", "東京で働いています"],
    "thai": ["สวัสดีครับทุกคน", "ฉันชอบแมว", "วันนี้อากาศดีมาก"],
    "mixed": ["我喜欢 Python 编程", "use the 猫 please", "red green blue"],
}


@pytest.mark.parametrize("script", SPACELESS)
@pytest.mark.parametrize("merges", [0, 200], ids=["bytes", "merged"])
def test_words_of_scripts_without_spaces_are_tokens(script, merges, caplog):
    """Also where a character is several tokens, which no draw takes apart."""
    answers = SPACELESS[script]
    small = tiny.train_tokenizer(answers, 261 + merges)
    data = [{"prompt": f"q{i}", "completion": text} for i, text in enumerate(answers)]
    probes = build_probe_set(data, tokenizer=small, seed=1)
    assert probes == build_probe_set(data, tokenizer=small, seed=1) and caplog.text == ""
    letters = set("".join(answers))
    for probe in probes:
        r = probe.responses
        assert set(r) == {"chosen", "other_train", "permuted", "random_words"}
        assert sorted(r["permuted"].replace(" ", "")) == sorted(r["chosen"].replace(" ", ""))
        assert r["permuted"] != r["chosen"] and r["random_words"] not in answers
        assert set(r["random_words"]) <= letters | {" "}
    if script == "mixed":
        assert sorted(probes[2].responses["permuted"].split()) == ["blue", "green", "red"]
        assert {"use", "the", "please"} <= set(probes[1].responses["permuted"].split())


@pytest.mark.parametrize("slow", [False, True], ids=["no tokenizer", "slow"])
def test_without_offsets_words_of_such_scripts_are_characters(slow, caplog):
    """With their combining marks."""
    data = [{"prompt": f"q{i}", "completion": text} for i, text in enumerate(["กิน ข้าว", "ดื่มน้ำ"])]
    probes = build_probe_set(data, tokenizer=hf.ByT5Tokenizer() if slow else None)
    for probe, letters in zip(
        probes, (["กิ", "น", "ข้", "า", "ว"], ["ดื่", "ม", "น้", "ำ"]), strict=True
    ):
        mixed = probe.responses["permuted"]
        assert all(letter in mixed for letter in letters) and mixed != probe.responses["chosen"]
        assert probe.responses["random_words"] not in ("กิน ข้าว", "ดื่มน้ำ")
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("answers", "missing"),
    [
        (["yes", "no", "yes", "maybe"], "permuted 4"),
        (["ha ha ha", "ho  ho", "ha"], "permuted 3"),
        (["哈哈哈", "哈哈哈哈", "哈"], "permuted 3, random_words 3"),
        (["yes", "yes"], "other_train 2, permuted 2, random_words 2"),
    ],
)
def test_no_answer_equals_the_chosen_one(answers, missing, caplog):
    """Of one word or the same again there is no other order; of few different ones others come."""
    data = [{"prompt": f"q{i}", "completion": text} for i, text in enumerate(answers)]
    small = tiny.train_tokenizer(["哈"], 300)
    for seed in range(5):
        caplog.clear()
        for probe in build_probe_set(data, tokenizer=small, seed=seed):
            chosen = probe.responses.pop("chosen").split()
            assert all(text.split() != chosen for text in probe.responses.values())
        (record,) = caplog.records
        assert record.getMessage().endswith("compared with: " + missing)


def test_given_and_sampled_answers_that_equal_the_chosen_one(caplog):
    """White space apart; of a rewrite of the rejected answer, that one too."""
    data = [
        {"prompt": f"Q{i}?", "chosen": f" the answer {i}", "rejected": f"no {i}"} for i in range(4)
    ]
    for row, changes in zip(data, (
        {"rejected": data[0]["chosen"].strip()},
        {"chosen_semantic": data[1]["chosen"] + "\n"},
        {"reject_gptformat": data[2]["rejected"]},
        {"chosen_paraphrase": "other", "rejected_semantic": "another"},
    ), strict=True):  # fmt: skip
        row |= changes
    test = [{"prompt": "t", "completion": row["chosen"]} for row in data[:2]]
    probes = build_probe_set(
        data, test=test, sample=lambda prompts: ["x", "y", data[2]["chosen"], ""]
    )
    kept = [set(p.responses) - {"chosen", "other_train", "permuted", "random_words"}
            for p in probes]  # fmt: skip
    assert kept == [
        {"unrelated", "sample"}, {"rejected", "unrelated", "sample"}, {"rejected", "unrelated"},
        {"rejected", "unrelated", "chosen_semantic", "rejected_semantic"},
    ]  # fmt: skip
    assert probes[0].responses["unrelated"] == data[1]["chosen"]  # the one that differs
    assert probes[1].responses["unrelated"] == data[0]["chosen"]
    counts = "rejected 1, sample 2, chosen_semantic 1, rejected_format 1"
    assert caplog.records[-1].getMessage().endswith("compared with: " + counts)


def test_rows_that_a_probe_cannot_render_are_left_out(caplog):
    """Training puts `tools` and template options before their answers."""
    messages = [said("user", "q"), YES]
    options = ({"tools": [TOOL]}, {"chat_template_kwargs": {"enable_thinking": False}})
    rows = [{"messages": messages, **more} for more in options]
    rows.append({"messages": messages[:1], "chosen": "a", "rejected": "b", "tools": [TOOL]})
    plain = [{"prompt": f"q{i}", "completion": f"a{i}", "tools": []} for i in range(2)]
    probes = build_probe_set(rows + plain, test=rows)
    assert [p.prompt for p in probes] == ["q0", "q1"]
    assert all(p.responses["unrelated"] in ("yes", "a") for p in probes)
    assert "3 of 5 rows have 'tools' or 'chat_template_kwargs', which probes" in caplog.text
    with pytest.raises(DataError, match="data: every row has 'tools' or .*; expected a row w"):
        build_probe_set(rows)


def test_a_sampled_answer_keeps_its_leading_space():
    """A sentencepiece-like decoder drops it from ids of their own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = ["<unk>", "</s>", "▁red", "▁cat", "cat", "▁dog"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    pieces = hf.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="</s>")
    for ids, text in (([2, 3, 5], " cat dog"), ([2, 4, 5, 1], "cat dog"), ([2, 1], "")):
        assert _answer_text("red", ids, 1, pieces) == text
    model = causal_lms.make("llama", vocab_size=len(words))
    assert sampler(model, pieces)([""]) == [""]  # nothing to start from


ANSWERS = [
    ("It is easy.\nFirst find 3 keys, then OPEN the Door!", "You do not need it."),
    ("Red comes first. Blue follows.", "cats and dogs"),
    ("yes", "no"),
]


def test_rewrites_by_rules(tmp_path):
    """Made where no row has them and a rule applies; the set says which."""
    data = [{"prompt": f"q{i}", "chosen": a, "rejected": b} for i, (a, b) in enumerate(ANSWERS)]
    fluent = ["The goat slept.", "yes"]
    probes = build_probe_set(data, rules=True, fluent=fluent, seed=2)
    assert probes == build_probe_set(data, rules=True, fluent=fluent, seed=2)
    first, second, third = (p.responses for p in probes)
    assert first["chosen_semantic"] == "It's simple.\nFirst find 3 keys, then OPEN the Door!"
    assert first["rejected_semantic"] == "You don't require it."
    assert second["chosen_semantic"] == "Blue follows. Red comes first."
    assert "rejected_semantic" not in second
    assert not {"chosen_semantic", "chosen_format"} & set(third)
    # Punctuation, lines, numbers, short words and capitals as they were; other words.
    changed = first["chosen_format"]
    assert re.sub(r"[a-z]{4,}", "w", changed, flags=re.I) == re.sub(
        r"[a-z]{4,}", "w", ANSWERS[0][0], flags=re.I
    )
    assert changed != ANSWERS[0][0]
    words = re.findall(r"[a-z]{4,}", changed, flags=re.I)
    assert words[-2].isupper() and words[-1].istitle() and words[1].istitle()
    assert [p.by_rule for p in probes] == [
        ("chosen_semantic", "chosen_format", "rejected_semantic", "rejected_format"),
        ("chosen_semantic", "chosen_format", "rejected_format"), (),
    ]  # fmt: skip
    assert {first["fluent"], second["fluent"]} <= set(fluent) and third["fluent"] == fluent[0]
    write_probes(probes, tmp_path / "p.jsonl")
    assert read_probes(tmp_path / "p.jsonl") == probes
    # A rewrite that some row has is made for none.
    data[2] |= {"chosen_gptformat": ["maybe"], "irr_hum": "A boat."}
    given = build_probe_set(data, rules=True, fluent=fluent)
    assert [p.responses.get("chosen_format") for p in given] == [None, None, "maybe"]
    assert given[2].responses["fluent"] == "A boat." and given[2].by_rule == ()
    for made in ('"x"', '["other"]', "[[]]"):
        line = f'{{"prompt": "a", "responses": {{"b": "c"}}, "by_rule": {made}}}\n'
        (tmp_path / "bad.jsonl").write_text(line)
        with pytest.raises(DataError, match=r"bad.jsonl line 1: 'by_rule' is no list"):
            read_probes(tmp_path / "bad.jsonl")


def test_built_in_sentences_are_one_each():
    assert len(set(SENTENCES)) == 20 and all(text.endswith(".") for text in SENTENCES)
    assert all(a != b and a == a.lower() for a, b in SAME.items())
