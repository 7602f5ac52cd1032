"""Rows, conversations and tokenizers of tests of data."""

import json

from ift import tiny

TEXTS = ["def add(a, b):\n", "Return the sum of two numbers.", "Say hello to the user, twice."]


def made(template=None, bos=False):
    """A tokenizer with another template, or with a start token."""
    fresh = tiny.train_tokenizer(TEXTS, vocab_size=300)
    if template is not None:
        fresh.chat_template = template
    if bos:
        from tokenizers.processors import TemplateProcessing

        fresh.add_special_tokens({"bos_token": "<|start|>"})
        fresh.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|start|> $A", special_tokens=[("<|start|>", fresh.bos_token_id)]
        )
    return fresh


def targets(example):
    """The ids that the loss sees."""
    labels = example["labels"]
    assert (example["input_ids"] == labels)[labels != -100].all()
    return labels[labels != -100].tolist()


def said(role, content, **more):
    """A message."""
    return {"role": role, "content": content, **more}


HI, YES, TERSE = said("user", "hi"), said("assistant", "yes"), said("system", "Be terse.")
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALLED = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
ASKS = said("assistant", "", tool_calls=[CALLED])


def in_json_lines(folder, rows):
    """The path of a file with these rows."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
