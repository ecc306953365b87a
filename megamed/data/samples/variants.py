"""Other conventions for the same thing, turned into `messages`, `images`, `videos` and `studies`.

| convention | keys |
|---|---|
| ms-swift, Hugging Face | `messages` with `role` and `content` |
| ShareGPT, LLaVA | `conversations` or `conversation` with `from` and `value`, or with `human` and `assistant` |
| query and response | `query`, `response`, `history` of pairs |
| Alpaca | `instruction`, `input`, `output` |
| any of these | `system`; `image` and `video` for `images` and `videos`, one path or several |
"""

from __future__ import annotations

from typing import Any

ROLES = {
    "system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
    "bot": "assistant", "tool": "tool", "tool_response": "tool",
}

_MESSAGES = ("messages", "conversations", "conversation")
_SYSTEM = ("system", "system_prompt")
_QUERY, _RESPONSE = ("query", "question", "prompt"), ("response", "answer")


class Misfit(ValueError):
    """What cannot be turned: the key, what is wrong with it, and the mend."""

    def __init__(self, key: str, what: str, mend: str):
        super().__init__(key, what, mend)
        self.key, self.what, self.mend = key, what, mend


def messages(row: dict[str, Any]) -> tuple[str, list[tuple[str, Any, Any]]]:
    """The turns of a line of any convention.

    Returns:
        The key that they come from, for messages about them, and of each turn role, content and `loss`, not checked
        but for the role.

    Raises:
        Misfit: there are none, or they are of no convention.
    """
    key = next((key for key in _MESSAGES if row.get(key) is not None), "")
    turns = _turns(key, row[key]) if key else _pairs(row)
    if not turns:
        raise Misfit(key or "messages", "there are none", "give each line its conversation as messages")
    for name in _SYSTEM:
        if row.get(name):
            turns.insert(0, ("system", row[name], None))
    return key or "query", turns


def entries(row: dict[str, Any], plural: str, singular: str) -> list[Any]:
    """What `images` or `image` hold, as a list, where a picture with its path in an object stands for the path."""
    values = row.get(plural)
    if values is None:
        values = row.get(singular)
    if values is None or values == "":
        return []
    if not isinstance(values, list):
        values = [values]
    return [value["path"] if isinstance(value, dict) and value.get("path") else value for value in values]


def _turns(key: str, values: Any) -> list[tuple[str, Any, Any]]:
    if not isinstance(values, list):
        raise Misfit(key, "is no list", "give a list of turns")
    turns = []
    for i, turn in enumerate(values):
        where = f"{key}[{i}]"
        if not isinstance(turn, dict):
            raise Misfit(where, "is no object", 'give {"role": ..., "content": ...}')
        if "role" in turn or "from" in turn:
            turns.append((_role(where, turn.get("role", turn.get("from"))),
                          turn.get("content", turn.get("value")), turn.get("loss")))
        elif "human" in turn and "assistant" in turn:
            turns += [("user", turn["human"], None), ("assistant", turn["assistant"], None)]
        else:
            raise Misfit(where, "has no role", 'give {"role": ..., "content": ...}')
    return turns


def _role(where: str, role: Any) -> str:
    if not isinstance(role, str) or role not in ROLES:
        raise Misfit(f"{where}.role", "is not known", f"it may be {', '.join(ROLES)}")
    return ROLES[role]


def _pairs(row: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Turns of a query and its response, and of those before them."""
    turns: list[tuple[str, Any, Any]] = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise Misfit("history", "is no list", "give a list of pairs, a query and a response each")
    for i, pair in enumerate(history):
        if not isinstance(pair, list) or len(pair) != 2:
            raise Misfit(f"history[{i}]", "is no pair", "give a query and a response")
        turns += [("user", pair[0], None), ("assistant", pair[1], None)]
    if row.get("output") is not None and "response" not in row:
        query, response = _alpaca_query(row), row["output"]
    else:
        query = next((row[key] for key in _QUERY if row.get(key) is not None), None)
        response = next((row[key] for key in _RESPONSE if row.get(key) is not None), None)
    if query is not None:
        turns.append(("user", query, None))
    if response is not None:
        turns.append(("assistant", response, None))
    return turns


def _alpaca_query(row: dict[str, Any]) -> Any:
    parts = [row.get("instruction"), row.get("input")]
    if any(part is not None and not isinstance(part, str) for part in parts):
        raise Misfit("instruction", "or input is no text", "give texts")
    return "\n".join(part for part in parts if part) or None
