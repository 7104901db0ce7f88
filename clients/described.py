"""How the parts of an experiment print themselves."""

from __future__ import annotations


class Described:
    """Prints as its class's name with its settings; a dataclass prints so by itself."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"
