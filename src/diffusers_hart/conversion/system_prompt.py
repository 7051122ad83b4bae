# SPDX-License-Identifier: Apache-2.0
import ast
import os
from pathlib import Path


VARIABLE = "llm_system_prompt"


def read_system_prompt(source: str | os.PathLike) -> str:
    r"""
    The text that goes before each prompt, from wherever it is.

    Args:
        source (`str` or `os.PathLike`):
            A text file, taken as it is, line breaks included; a checkout of the original code, or a `.py` file of it,
            that assigns `llm_system_prompt` (it is parsed and not run); or the text itself.

    Returns:
        `str`: The system prompt.

    Raises:
        FileNotFoundError: If `source` looks like a path and there is nothing there.
        ValueError: If a file is not UTF-8 text, or code has no `llm_system_prompt` that is one string.
    """
    if os.path.isdir(source):
        source = Path(source) / "hart" / "utils" / "constants.py"
        if not source.is_file():
            raise FileNotFoundError(f"There is no {source}: pass a checkout of the original code, a file or the text.")
    if os.path.isfile(source):
        path = Path(source)
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"The system prompt in {path} must be UTF-8 text.") from error
        return _assigned_string(path, text) if path.suffix == ".py" else text
    looks_like_a_path = isinstance(source, os.PathLike) or (
        source.split() == [source] and ("/" in source or source.endswith((".txt", ".md", ".py")))
    )
    if looks_like_a_path:
        raise FileNotFoundError(f"There is no {source} to read the system prompt from.")
    return source


def _assigned_string(path: Path, code: str) -> str:
    """The value of the variable at the top level of some code."""
    try:
        statements = ast.parse(code).body
    except SyntaxError as error:
        raise ValueError(f"{path} is not Python code: {error}.") from error
    for statement in statements:
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        else:
            targets = [statement.target] if isinstance(statement, ast.AnnAssign) else []
        if any(isinstance(target, ast.Name) and target.id == VARIABLE for target in targets):
            try:
                value = ast.literal_eval(statement.value)
            except (ValueError, TypeError):
                value = None
            if not isinstance(value, str):
                raise ValueError(f"`{VARIABLE}` in {path} must be one string literal.")
            return value
    raise ValueError(f"{path} assigns no `{VARIABLE}`.")
