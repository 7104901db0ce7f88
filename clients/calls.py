"""Parts written as calls on a command line: ``fedavg, fedprox(mu=0.1), rules.py:Agreement(beta=0.5)``."""

from __future__ import annotations

import ast
from typing import Any

from clients.errors import RequestError
from clients.parts import Part

_WORDS = {"true": True, "false": False}


def parse_call(text: str) -> Part:
    """The part that one call stands for. Values are Python literals; bare words are strings.

    Raises:
        RequestError: where it is not a call of that form.
    """
    name, opened, rest = text.strip().partition("(")
    if opened and not rest.endswith(")"):
        raise RequestError(f"{text!r}: the bracket is not closed; write name(setting=value, ...)")
    try:
        call = ast.parse(f"_({rest[:-1]})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(word.arg is None for word in call.keywords):
            raise RequestError(f"{text!r}: settings need their names; write name(setting=value, ...)")
        return Part.of({"name": name.strip(), **{str(word.arg): _value(word.value) for word in call.keywords}})
    except SyntaxError:
        raise RequestError(f"{text!r} cannot be read; write name(setting=value, ...)") from None
    except ValueError as error:
        raise RequestError(f"{text!r}: {error}") from None


def split_calls(text: str) -> list[Part]:
    """The parts of a list, separated by commas outside brackets and quotes.

    Raises:
        RequestError: for the first that cannot be read, or an empty list.
    """
    calls, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0 and not quote:
            calls.append("")
        else:
            calls[-1] += letter
    found = [parse_call(call) for call in calls if call.strip()]
    if not found:
        raise RequestError(f"{text!r} names nothing; write name, name(setting=value), ...")
    return found


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):
        return _WORDS.get(node.id, node.id)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise ValueError(f"{ast.unparse(node)} is not a value") from None
