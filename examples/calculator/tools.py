"""The tool of the calculator task, which verl loads from ``multi_turn.function_tool_path``."""

from __future__ import annotations

from verl.tools.function_tool import function_tool


@function_tool
def multiply(a: int, b: int) -> str:
    """Multiply two numbers.

    Args:
        a: the first number
        b: the second number
    """
    return str(a * b)
