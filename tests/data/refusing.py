"""What a refused request looks like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from clients.errors import RequestError


def refused(fn: Callable[[], Any], *said: str) -> str:
    """The one line in which a request is refused; it holds all that is ``said``."""
    with pytest.raises(RequestError) as caught:
        fn()
    (line,) = caught.value.problems
    assert "\n" not in line
    for part in ("data.source.", *said):
        assert part in line
    return line
