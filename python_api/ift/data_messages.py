"""Conversations as people write them → messages as chat templates take them.

A message is ``{"role": str, "content": str}``, with ``tool_calls`` and whatever else the template
may read. Content may come in parts of text, and as null beside tool calls; a turn of ShareGPT is
``{"from": "human", "value": str}``.
"""

from __future__ import annotations

import json
from typing import Any

from ift.data_files import DataError, json_type

SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bot", "model", "assistant"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "system": "system",
    "function_call": "function_call",  # of the assistant; its value is JSON
}


def check_messages(value: Any, where: str) -> list[dict[str, Any]]:
    """The messages of a conversation with an assistant's turn.

    Raises:
        DataError: it is none, or has parts that are not text.
    """
    messages = conversation(value, where)
    if not any(message["role"] == "assistant" for message in messages):
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise DataError(f"{where}: roles are {roles}; expected at least one 'assistant' message")
    return messages


def conversation(value: Any, where: str, key: str = "messages") -> list[dict[str, Any]]:
    """The messages of `value`, checked; `key` is its name in the row."""
    if not isinstance(value, list) or not value:
        got = "an empty array" if value == [] else f"a {json_type(value)}"
        raise DataError(f"{where}: {key!r} is {got}; expected a non-empty array of messages")
    return [_message(message, f"{key}[{index}]", where) for index, message in enumerate(value)]


def _message(value: Any, name: str, where: str) -> dict[str, Any]:
    if isinstance(value, dict) and "from" in value and "role" not in value:
        value = _of_sharegpt(value, name, where)
    if not isinstance(value, dict) or not isinstance(value.get("role"), str):
        raise DataError(
            f"{where}: {name} has no string 'role'; "
            'expected {"role": "…", "content": "…"} or {"from": "…", "value": "…"}'
        )
    message = {key: part for key, part in value.items() if part is not None}
    if "function_call" in message:  # as the calls were before there could be several
        message["tool_calls"] = [message.pop("function_call")]
    if message["role"] == "function":
        message["role"] = "tool"
    if "tool_calls" in message:
        message["tool_calls"] = _calls(message["tool_calls"], f"{name}.tool_calls", where)
        if not message["tool_calls"]:
            del message["tool_calls"]
    given = message.get("content")
    if given is None and "tool_calls" not in message:
        null = " (null is for an assistant that calls tools)" if "content" in value else ""
        raise DataError(
            f"{where}: {name} has no string 'content'{null}; "
            'expected {"role": "…", "content": "…"}'
        )
    message["content"] = "" if given is None else text_of(given, f"{name}.content", where)
    check_encodable(json.dumps(message, ensure_ascii=False, default=str), where, name)
    return message


def text_of(content: Any, name: str, where: str) -> str:
    """The text of a message's content, a string or a list of parts.

    Raises:
        DataError: a part that is not text: pictures and sounds are no part of training on text.
    """
    if isinstance(content, str):
        check_encodable(content, where, name)
        return content
    if not isinstance(content, list):
        message, _, key = name.rpartition(".")
        raise DataError(
            f"{where}: {message} has no string {key!r}, got a {json_type(content)}; "
            'expected text or a list of {"type": "text", "text": "…"}'
        )
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part if isinstance(part, str) else kind == "text" and part.get("text")
        if not isinstance(text, str):
            got = f"of the type {kind!r}" if kind not in (None, "text") else "no text"
            raise DataError(
                f"{where}: {name}[{index}] is {got}; expected text alone, "
                '{"type": "text", "text": "…"}'
            )
        check_encodable(text, where, f"{name}[{index}]")
        texts.append(text)
    return "".join(texts)


def _of_sharegpt(value: dict[str, Any], name: str, where: str) -> dict[str, Any]:
    """A turn of ShareGPT as a message."""
    role = SHAREGPT_ROLES.get(value["from"]) if isinstance(value["from"], str) else None
    if role is None:
        raise DataError(
            f"{where}: {name} is from {value['from']!r}; expected {', '.join(SHAREGPT_ROLES)}"
        )
    rest = {key: part for key, part in value.items() if key not in ("from", "value")}
    if role == "function_call":
        calls = _json_of(value.get("value"), f"{name}.value", where)
        calls = calls if isinstance(calls, list) else [calls]
        return {**rest, "role": "assistant", "content": None, "tool_calls": calls}
    if not isinstance(value.get("value"), str):
        raise DataError(f"{where}: {name} has no string 'value'")
    return {**rest, "role": role, "content": value["value"]}


def _calls(value: Any, name: str, where: str) -> list[dict[str, Any]]:
    """Calls with a ``function`` of a name and, as templates expect them, parsed arguments."""
    if not isinstance(value, list):
        raise DataError(f"{where}: {name} is a {json_type(value)}; expected an array")
    calls = []
    for index, call in enumerate(value):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(
                f"{where}: {name}[{index}] names no function; "
                'expected {"function": {"name": "…", "arguments": {…}}}'
            )
        function = {"name": function["name"], "arguments": function.get("arguments", {})}
        if isinstance(function["arguments"], str):
            place = f"{name}[{index}].function.arguments"
            function["arguments"] = _json_of(function["arguments"] or "{}", place, where)
        rest = {k: v for k, v in call.items() if k == "id" and v is not None}
        calls.append({"type": "function", **rest, "function": function})
    return calls


def checked_tools(value: Any, where: str) -> list[dict[str, Any]]:
    """The schemas of the tools that a conversation may call: an array, or JSON of one."""
    tools = _json_of(value, "'tools'", where) if isinstance(value, str) else value
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(
            f"{where}: 'tools' is no array of objects; expected the schemas of functions, "
            '[{"type": "function", "function": {"name": "…", …}}]'
        )
    check_encodable(json.dumps(tools, ensure_ascii=False, default=str), where, "tools")
    return tools


def function_names(functions: list[dict[str, Any]]) -> list[str]:
    """The names in tools or tool calls."""
    names = (function.get("function", function).get("name") for function in functions)
    return [name for name in names if isinstance(name, str)]


def _json_of(text: Any, name: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (TypeError, ValueError, RecursionError):
        raise DataError(f"{where}: {name} is no JSON; expected an object or array") from None


def check_encodable(text: str, where: str, key: str) -> None:
    """JSON may spell half of a surrogate pair, which no tokenizer can take."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: {key} has a lone surrogate at character {error.start}; expected Unicode text"
        ) from None
