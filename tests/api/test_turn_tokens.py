"""Ids and targets of rows under the kinds of tokenizers that differ in how they join text."""

import logging

import numpy as np
import pytest
import transformers as hf
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from ift import tiny
from ift.data import encode, encode_whole, prompt_ids
from ift.data_rows import DataError, Row, pair_row
from ift.preference_data import encode_pairs
from ift.token_spans import token_ids, token_spans

CORPUS = [
    "the cat sat on the mat, hello there user. a dog runs", "Quick brown fox: 12 and 345!",
    "你好世界，我喜欢猫。", "日本語のテキストです", "สวัสดีครับ", "👍🏽 and 😀 or 👨‍👩‍👧",
    "user:\nassistant:\n\n system: [INST] x [/INST]", "x  two   y\n\nz",
]  # fmt: skip
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def wrapped(tokenizer, **names):
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **names}
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def trained(made, trainer, size, special=SPECIAL, *, times=2, unk="<unk>", **options):
    """The tokenizer with a vocabulary of this size, of the corpus so many times."""
    options |= {"vocab_size": size, "special_tokens": special, "show_progress": False}
    made.train_from_iterator(CORPUS * times, trainer(**options))
    return wrapped(made, unk_token=unk)


def unigram(scheme, *steps):
    made = Tokenizer(models.Unigram())
    if steps:
        made.normalizer = normalizers.Sequence(list(steps))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return trained(made, trainers.UnigramTrainer, 250, times=4, unk_token="<unk>")


def llama(legacy):
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if legacy:
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        made.normalizer = normalizers.Sequence(steps)
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    starting = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.post_processor = starting
    return trained(made, trainers.BpeTrainer, 450, SPECIAL + BYTES, limit_alphabet=60)


def byte_level(trim_offsets):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return trained(made, trainers.BpeTrainer, 420, initial_alphabet=alphabet)


def word_pieces():
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    return trained(made, trainers.WordPieceTrainer, 220, ["[UNK]", *SPECIAL], unk="[UNK]")


KINDS = {
    "first": lambda: unigram("first"),
    "always": lambda: unigram("always"),
    "never": lambda: unigram("never"),
    "normalizer": lambda: unigram(
        "always", normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(Regex(" +"), " ")
    ),
    "llama": lambda: llama(legacy=False),
    "llama-legacy": lambda: llama(legacy=True),
    "bytes": lambda: byte_level(trim_offsets=False),
    "bytes-trimmed": lambda: byte_level(trim_offsets=True),
    "word-pieces": word_pieces,
    "slow": lambda: hf.ByT5Tokenizer(bos_token="<s>"),
}
LOSSY = ("normalizer", "word-pieces", "slow")  # the last drops white space beside special tokens
MADE = {}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def tokenizer(kind):
    made = MADE.get(kind)
    if made is None:
        made = MADE[kind] = KINDS[kind]()
    made.chat_template = None
    return made


def decode(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def targets(example):
    labels = example["labels"]
    assert (example["input_ids"] == labels)[labels != -100].all()
    return labels[labels != -100].tolist()


def start_of(example):
    return int((example["labels"] != -100).argmax())


# ---- conversations -------------------------------------------------------------------------------

LINES = (
    "{% for m in messages %}{{ m.role }}:\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ ' ' + m.content + ' ' + eos_token }}"
    "{% else %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}"
)
MARKED = (  # its generation prompt is no prefix of a turn, and earlier turns are rewritten
    "{% for m in messages %}{{ m.role + ':\n' }}{% if m.role == 'assistant' %}{% generation %}"
    "{{ 'think ' if loop.last else '' }}{{ m.content + eos_token }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m.content + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}>>{% endif %}"
)
TALK = [
    ("system", "a dog"), ("user", "hello there"), ("assistant", "the cat"),
    ("user", "👍🏽 你好"), ("assistant", "猫。 😀 x"), ("user", "two"),
    ("assistant", "hello  mat!"),
]  # fmt: skip


def messages(turns=TALK):
    return [{"role": role, "content": content} for role, content in turns]


@pytest.mark.parametrize(
    ("template", "wanted"),
    [
        (LINES, "the cat</s>\n|猫。 😀 x</s>\n|hello  mat!</s>\n"),
        (LLAMA2, " the cat </s>| 猫。 😀 x </s>| hello  mat! </s>"),
        (MARKED, "the cat</s>|猫。 😀 x</s>|think hello  mat!</s>"),
    ],
    ids=["lines", "llama2", "marked"],
)
def test_ids_are_the_chat_templates_and_targets_decode(kind, tokenizer, template, wanted, caplog):
    tokenizer.chat_template = template
    (example,) = encode([Row("here", {"messages": messages()})], tokenizer, 999).examples
    whole = tokenizer.apply_chat_template(messages(), tokenize=True, return_dict=False)
    assert example["input_ids"].tolist() == whole
    assert caplog.text == ""

    parts = wanted.split("|")
    runs = np.split(example["labels"], np.flatnonzero(np.diff(example["labels"] == -100)) + 1)
    found = [run.tolist() for run in runs if run[0] != -100]
    assert len(found) == len(parts)
    for ids, part in zip(found, parts, strict=True):
        if kind in LOSSY:  # what the decoder changes it changes in a text of its own too
            (alone,) = token_ids([part], tokenizer)
            assert decode(tokenizer, ids).split() == decode(tokenizer, alone).split()
        else:
            assert unknown(decode(tokenizer, ids), part, kind)

    last = Row("here", {"messages": messages()}, context=len(TALK) - 1)
    (example,) = encode([last], tokenizer, 999).examples
    assert targets(example) == found[-1] and example["input_ids"].tolist() == whole


def unknown(decoded, text, kind):
    """Equal, but for a leading space that decoders drop, and one that "always" means to add."""
    added = {"always": 1, "llama-legacy": 1}.get(kind, 0)
    if added:
        return "".join(decoded.split()) == "".join(text.split())
    return text in (decoded, " " + decoded)


def test_the_generation_prompt_is_the_context_of_an_answer(kind, tokenizer):
    tokenizer.chat_template = LINES
    (example,) = encode([Row("x", {"messages": messages(TALK[:3])})], tokenizer, 999).examples
    asked = tokenizer.apply_chat_template(
        messages(TALK[:2]), tokenize=True, add_generation_prompt=True, return_dict=False
    )
    assert example["input_ids"][: start_of(example)].tolist() == asked
    assert prompt_ids(messages(TALK[:2]), tokenizer) == asked


@pytest.mark.parametrize("trim", [False, True])
def test_a_token_across_the_border_of_an_answer(trim, caplog):
    """It is a target at the start, none at the end, and a warning counts the rows."""
    tokenizer = byte_level(trim)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content }}{{ '\n' if m.role == 'user' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    answers = [("assistant", "the cat")], [("assistant", " the"), ("user", "y")], [
        ("assistant", "the x "), ("mat", "x"), ("user", "x"),
    ]  # fmt: skip
    rows = [
        Row(f"line {i}", {"messages": messages([("user", "x"), *answer])})
        for i, answer in enumerate(answers, start=1)
    ]
    for row, text in zip(rows, (" the cat", " the", " the x"), strict=True):
        (example,) = encode([row], tokenizer, 999).examples
        whole = tokenizer.apply_chat_template(row.messages, tokenize=True, return_dict=False)
        assert example["input_ids"].tolist() == whole
        assert decode(tokenizer, targets(example)) == text
    caplog.clear()
    encode(rows, tokenizer, 999)
    (record,) = caplog.records
    assert record.getMessage().startswith("2 of 3 conversations (first: line 1): a token lies acr")


@pytest.mark.parametrize("shift", [0, 1, -1, None])
def test_wrong_offsets_are_noticed(shift):
    """Offsets that are off, or empty as some post-processors leave them, do not move targets."""
    tokenizer = MADE.get("bytes") or byte_level(trim_offsets=False)
    text = "user:x\nassistant:the cat\nuser:mat\n"
    out = tokenizer(text, return_offsets_mapping=True)
    given = out["offset_mapping"]
    if shift is None:
        offsets = [(start, start) for start, _ in given]
    else:
        offsets = [(max(0, a + shift), max(0, b + shift)) for a, b in given]
    span = (text.index("the cat"), text.index("user:mat"))
    ((first, stop),), exact = token_spans(text, out["input_ids"], offsets, [span], tokenizer)
    assert exact and decode(tokenizer, out["input_ids"][first:stop]) == "the cat\n"


# ---- prompt and completion -----------------------------------------------------------------------

PLAIN = [
    ("hello\n", "the cat"), ("hello", " there"), ("hello ", "there"), ("hel", "lo user"),
    ("", "the cat"), ("x:", "\n\ny"), ("x\n", "\nz"), ("你好", "世界，猫"), ("👍🏽", "😀 or"),
    ("quick (", "12)"), ("a", "n dog"),
]  # fmt: skip


def test_prompts_are_as_at_inference_and_completions_continue_them(kind, tokenizer):
    rows = [Row(f"{p}|{c}", {"prompt": p, "completion": c}) for p, c in PLAIN]
    for row, example in zip(rows, encode_whole(rows, tokenizer), strict=True):
        prompt, completion = row.texts
        asked = (
            tokenizer(prompt)["input_ids"] if kind != "slow" else token_ids([prompt], tokenizer)[0]
        )
        start = start_of(example) if example is not None else 0
        assert example["input_ids"][:start].tolist() == asked, row
        ids = example["input_ids"].tolist()
        assert ids[-1] == tokenizer.eos_token_id == example["labels"][-1]
        (whole,) = token_ids([prompt + completion], tokenizer)
        body = [*asked[: len(asked) - len(token_ids([prompt], tokenizer)[0])], *whole]
        if tokenizer.unk_token_id not in whole:
            assert decode(tokenizer, ids[:-1]) == decode(tokenizer, body), row


def test_byte_level_rows_are_as_if_tokenised_apart():
    tokenizer = tiny.train_tokenizer(CORPUS, 400)
    for prompt, completion in PLAIN:
        row = Row("", {"prompt": prompt, "completion": completion})
        (example,) = encode_whole([row], tokenizer)
        first, second = token_ids([prompt, completion], tokenizer)
        assert example["input_ids"].tolist() == [*first, *second, tokenizer.eos_token_id]
        assert targets(example) == [*second, tokenizer.eos_token_id]


def test_a_completion_without_a_token_is_dropped(caplog):
    rows = [Row("blank", {"prompt": "the cat", "completion": " \n"}),
            Row("good", {"prompt": "the cat", "completion": " mat"}),
            # An unknown word across the border keeps its tokens.
            Row("unknown", {"prompt": "the \u0394", "completion": "\u0394 cat"})]  # fmt: skip
    encoded = encode(rows, word_pieces(), 99)
    assert encoded.dropped == ["blank"] and len(encoded.examples) == 2


def test_an_unknown_word_across_the_border_gets_no_space():
    tokenizer = unigram("first")
    row = Row("", {"prompt": "the \u0394", "completion": "\u0394"})  # together one unknown word
    (example,) = encode([row], tokenizer, 99).examples
    assert decode(tokenizer, example["input_ids"]) == "the <unk><unk></s>"
    assert decode(tokenizer, targets(example)) == "<unk></s>"


def test_a_tokenizer_that_cannot_continue_a_text_is_refused():
    """Its tokens depend on the end of the text, so none of a completion can follow a prompt."""
    made = Tokenizer(models.WordLevel({"<unk>": 0, "ab": 1, "a": 2, "bc": 3, "abc": 4}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    row = Row("line 4", {"prompt": "a", "completion": "bc"})
    with pytest.raises(DataError, match="line 4: no tokens of 'completion' decode to it behind"):
        encode([row], wrapped(made), 99)


# ---- preferences ---------------------------------------------------------------------------------


def test_responses_share_the_prompts_tokens(kind, tokenizer):
    tokenizer.chat_template = LINES
    user = {"role": "user", "content": "hello there"}
    rows = [
        {"prompt": "hello\n", "chosen": "the cat", "rejected": "mat"},
        {"prompt": "hel", "chosen": "lo", "rejected": "p the cat"},
        {"prompt": [user], "chosen": "the cat", "rejected": "\n\nmat"},
        {"prompt": [{**user, "content": "two"}], "chosen": "two", "rejected": "the x"},
    ]
    pairs = [pair_row(row, f"line {i}") for i, row in enumerate(rows)]
    encoded = encode_pairs(pairs, tokenizer, 99, mismatched=True)
    assert not encoded.dropped
    for index, (row, example) in enumerate(zip(rows, encoded.examples, strict=True)):
        start = start_of(example["chosen"])
        for side in ("chosen", "rejected"):
            assert start_of(example[side]) == start
            part = example[side]["input_ids"][:start]
            assert np.array_equal(part, example["chosen"]["input_ids"][:start])
        # The other row's response is tokenised as an answer to this prompt.
        answer = pairs[(index + 1) % len(pairs)].chosen
        text = answer.messages[-1]["content"] if answer.messages else answer.content["completion"]
        wanted = pair_row({**row, "chosen": text}, "").chosen
        (direct,) = encode_whole([wanted], tokenizer)
        assert np.array_equal(example["kl"]["input_ids"], direct["input_ids"])
        assert np.array_equal(example["kl"]["labels"], direct["labels"])


def test_a_token_across_one_border_of_a_pair(caplog):
    """Both sums of log-probabilities are then of all tokens after the same ones."""
    tokenizer = byte_level(trim_offsets=True)
    tokenizer.chat_template = LINES
    prompt = messages([("user", "x")])
    row = {"prompt": prompt, "chosen": "\n the cat", "rejected": "mat"}
    (example,) = encode_pairs([pair_row(row, "line 1")], tokenizer, 99).examples
    assert decode(tokenizer, targets(example["chosen"])) == "\n\n the cat</s>\n"
    assert decode(tokenizer, targets(example["rejected"])) == "\nmat</s>\n"
    assert "a token lies across the border" in caplog.text


def test_responses_to_different_prompts_are_refused():
    tokenizer = byte_level(trim_offsets=False)
    tokenizer.chat_template = LINES
    other = [("user", "hello there"), ("assistant", "mat"), ("user", "x"), ("assistant", "y")]
    for chosen, rejected in (
        (TALK[1:3], [("user", "a dog"), ("assistant", "the cat")]),
        (TALK[:3], TALK[1:3]),
        (other, [*other[:1], ("assistant", "the cat"), *other[2:]]),
    ):
        row = pair_row({"chosen": messages(chosen), "rejected": messages(rejected)}, "line 2")
        with pytest.raises(DataError, match="line 2: 'chosen' and 'rejected' have different prom"):
            encode_pairs([row], tokenizer, 99)


def test_errors_of_pairs_name_the_line():
    tokenizer = byte_level(trim_offsets=False)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    row = {"prompt": messages([("user", "x")]), "chosen": "y", "rejected": "z"}
    with pytest.raises(DataError, match="^p.jsonl line 7: the chat template refuses 'messages': n"):
        encode_pairs([pair_row(row, "p.jsonl line 7")], tokenizer, 99)


def test_no_warning_without_a_token_across_a_border(caplog):
    caplog.set_level(logging.WARNING)
    tokenizer = tiny.train_tokenizer(CORPUS, 400)
    encode([Row("x", {"messages": messages()})], tokenizer, 999)
    assert caplog.text == ""
