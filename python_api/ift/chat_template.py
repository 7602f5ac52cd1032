"""Conversations → text by a chat template, and which characters of it are targets."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ift.data_files import DataError
from ift.data_messages import function_names
from ift.data_rows import Row

# For tokenizers that bring no chat template.  The assistant's turn ends with the end-of-text token,
# so a trained model knows when to stop.  A first turn has no prompt, so it is no target.
SIMPLE_CHAT_TEMPLATE = (
    "{% macro body(message) %}{{ message.content or '' }}{% for call in message.tool_calls or [] %}"
    "{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endmacro %}"
    "{% if tools %}{{ '<|tools|>\n' + tools | tojson + '\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|' + message.role + '|>\n' }}"
    "{% if message.role == 'assistant' and not loop.first %}"
    "{% generation %}{{ body(message) }}{% endgeneration %}"
    "{% else %}{{ body(message) }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # a template's marks of what is generated


@dataclass(frozen=True)
class Rendered:
    """A conversation as text."""

    text: str
    targets: list[tuple[int, int]]  # characters [start, stop)
    tools_missing: bool  # the template did not render the row's tools


def render_row(row: Row, tokenizer: Any) -> Rendered:
    """The text of a conversation and its targets.

    Raises:
        DataError: the template refuses it, leaves out tool calls, or there is no target.
    """
    messages, options = row.messages or [], row.template_options
    text = render(messages, tokenizer, row.where, options)
    calls = [call for message in messages for call in message.get("tool_calls", [])]
    if missing := [name for name in function_names(calls) if name not in text]:
        raise DataError(
            f"{row.where}: the chat template leaves out the tool call {missing[0]!r}; expected a "
            "template that renders tool calls"
        )
    template = _template_of(tokenizer, options)
    if GENERATION.search(template):
        turns = _marked(messages, template, tokenizer, row.where, options)
        if row.context:
            before = messages[: row.context]
            turns = turns[len(_marked(before, template, tokenizer, row.where, options)) :]
    else:
        turns = _added(row, text, tokenizer)
    if not turns:
        raise DataError(
            f"{row.where}: no assistant turn to learn from; expected one that follows another "
            "message and that the chat template renders unchanged"
        )
    tools = function_names(options.get("tools") or [])
    return Rendered(text, turns, any(name not in text for name in tools))


def render(
    messages: list[dict[str, Any]],
    tokenizer: Any,
    where: str,
    options: Mapping[str, Any] = {},
    *,
    prompt: bool = False,
) -> str:
    """The text of messages, with the generation prompt if it is a `prompt`."""
    template = None if tokenizer.chat_template else SIMPLE_CHAT_TEMPLATE
    with _template_errors(where):
        text: str = tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt,
            **options,
        )  # fmt: skip
    return text


def _template_of(tokenizer: Any, options: dict[str, Any]) -> str:
    if not tokenizer.chat_template:
        return SIMPLE_CHAT_TEMPLATE
    template: str = tokenizer.get_chat_template(None, options.get("tools"))
    return template


def _marked(
    messages: list[dict[str, Any]],
    template: str,
    tokenizer: Any,
    where: str,
    options: dict[str, Any],
) -> list[tuple[int, int]]:
    """The ``{% generation %}`` blocks of a conversation as the template renders it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    with _template_errors(where):
        _, (spans,) = render_jinja_template(
            conversations=[messages],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **{**tokenizer.special_tokens_map, **options},
        )
    return [(start, stop) for start, stop in spans if start < stop]


def _added(row: Row, text: str, tokenizer: Any) -> list[tuple[int, int]]:
    """What the template adds for each assistant turn after the generation prompt.

    A turn that the template rewrites later (Qwen3 drops the thoughts of earlier turns) is context
    only, for the model never sees it in that form when it answers.
    """
    turns, messages, options = [], row.messages or [], row.template_options
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and index >= max(1, row.context):
            before = render(messages[:index], tokenizer, row.where, options, prompt=True)
            turn = render(messages[: index + 1], tokenizer, row.where, options)
            if turn.startswith(before) and text.startswith(turn):
                turns.append((len(before), len(turn)))
    return turns


@contextlib.contextmanager
def _template_errors(where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # templates raise whatever they like through jinja
        raise DataError(f"{where}: the chat template refuses 'messages': {error}") from None
