"""Turn one row of a problem set into the chat to ask and the label that is right, or say why that can't be done."""

import random
import re
import string
from collections.abc import Mapping
from typing import Any, Protocol

from milepost.common.labels import LabelReader, read_text

ROLES = ("system", "user", "assistant")
HALF_A_PAIR = re.compile("[\ud800-\udfff]")
MISSING = object()


class ChoiceKeys(Protocol):
    """Where a row has the choices of a question (`configuration.sources.Choices`)."""

    right: str
    wrong: list[str]
    seed: int


def value_at(row: Any, key: str) -> Any:
    """The value at a key of a row; `MISSING` if there is none.

    A key that the row has as it is written comes first. Otherwise its dots step into objects, and numbers between them
    into lists: ``reward_model.ground_truth``, ``prompt.0.content``.
    """
    if isinstance(row, dict) and key in row:
        return row[key]
    head, dot, rest = key.partition(".")
    if isinstance(row, dict) and dot and head in row:
        return value_at(row[head], rest)
    if isinstance(row, list) and head.isdecimal() and int(head) < len(row):
        return value_at(row[int(head)], rest) if dot else row[int(head)]
    return MISSING


def read_messages(row: Mapping[str, Any], key: str) -> list[dict[str, str]]:
    """The chat at a key of a row: a list of messages, or plain text or parts of text, which are one user message.

    Raises:
        ValueError: it is none, or does not end with the user's message.
    """
    value = _required(row, key)
    if isinstance(value, str) or (isinstance(value, list) and value and all(map(_is_part, value))):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key!r} is neither text nor a list of messages")
    messages = []
    for message in value:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise ValueError(f"{key!r} has a message without a role of {', '.join(ROLES)}")
        content = message.get("content")
        if isinstance(content, list):
            content = _joined(content, key)
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"{key!r} has a message without text")
        messages.append({"role": message["role"], "content": content})
    if messages[-1]["role"] != "user":
        raise ValueError(f"{key!r} does not end with the user's message")
    return messages


def read_answer(row: Mapping[str, Any], key: str, after: str | None, reader: LabelReader) -> str | None:
    """The label at a key of a row.

    Args:
        after: the label is what follows the last of this text in the value; None takes all of it.
        reader: how the reward reads it.

    Raises:
        ValueError: there is none that the reward can use.
    """
    value = _required(row, key) if reader.required else value_at(row, key)
    if value is MISSING:
        return None
    try:
        if after is not None:
            text = read_text(value)
            if after not in text:
                raise ValueError(f"has no {after!r}")
            value = text.rpartition(after)[2].strip()
        return reader.read(value)
    except ValueError as error:
        raise ValueError(f"{key!r} {error}") from None


def lettered_choices(row: Mapping[str, Any], question: str, keys: ChoiceKeys) -> tuple[str, str]:
    """The choices of a question, a line each, and the letter of the right one.

    Their order depends only on the seed and the question, so that it stays the same whatever else is in the set.

    Raises:
        ValueError: a choice is missing, or the right one is among the wrong ones.
    """
    right, *more = _choices(row, keys.right)
    wrong = [choice for key in keys.wrong for choice in _choices(row, key)]
    if more:
        raise ValueError(f"{keys.right!r} has several right choices")
    if right in wrong:
        raise ValueError(f"{keys.right!r} is also among the wrong choices")
    choices = [right, *wrong]
    if len(choices) > len(string.ascii_uppercase):
        raise ValueError(f"has {len(choices)} choices, more than there are letters")
    random.Random(f"{keys.seed}/{question}").shuffle(choices)
    letters = string.ascii_uppercase
    lines = [f"{letter}) {choice}" for letter, choice in zip(letters, choices, strict=False)]
    return "\n".join(lines), letters[choices.index(right)]


def passes(row: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a row has, at each key of ``wanted``, the value there or one of the values in a list."""
    return all(
        any(_is_same(value_at(row, key), one) for one in (values if isinstance(values, list) else [values]))
        for key, values in wanted.items()
    )


def _required(row: Mapping[str, Any], key: str) -> Any:
    if (value := value_at(row, key)) is MISSING:
        raise ValueError(f"no {key!r}")
    return value


def _is_part(value: Any) -> bool:
    return isinstance(value, dict) and "type" in value and "role" not in value


def _joined(parts: list[Any], key: str) -> str:
    """The text of a message's parts, one after the other as chat templates put them."""
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{key!r} has a part that is not text, such as an image")
    return "".join(texts)


def _choices(row: Mapping[str, Any], key: str) -> list[str]:
    """The one or several choices at a key."""
    value = _required(row, key)
    try:
        return [read_text(choice).strip() for choice in (value if isinstance(value, list) and value else [value])]
    except ValueError as error:
        raise ValueError(f"{key!r} {error}") from None


def _is_same(found: Any, wanted: bool | float | str) -> bool:
    """Whether a row's value is the wanted one; text, all that CSV has, may spell a number or true and false."""
    if isinstance(found, str) and not isinstance(wanted, str):
        try:
            return found.strip().lower() == str(wanted).lower() if isinstance(wanted, bool) else float(found) == wanted
        except ValueError:
            return False
    return isinstance(found, bool) == isinstance(wanted, bool) and found == wanted
