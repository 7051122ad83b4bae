# SPDX-License-Identifier: Apache-2.0
import pytest

from diffusers_hart.conversion import read_system_prompt


def write_constants(checkout, code: str):
    path = checkout / "hart" / "utils" / "constants.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code)
    return path


def test_text_stands_for_itself():
    for text in ("Draw this: ", "", "Describe it.\nUser prompt:\n", "one/two or three", "x" * 10000):
        assert read_system_prompt(text) == text


def test_a_text_file_is_taken_as_it_is(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes("D\u00e9cris:\n\n".encode())
    assert read_system_prompt(path) == read_system_prompt(str(path)) == "D\u00e9cris:\n\n"


@pytest.mark.parametrize(
    "literal",
    ['"""Say "more".\nPrompt:\\n"""', "'Say \"more\".\\n' 'Prompt:\\n'", "('Say \"more\".\\n'\n 'Prompt:\\n')"],
)
@pytest.mark.parametrize("annotation", ["", ": str"])
def test_a_checkout_is_parsed_and_not_run(tmp_path, literal, annotation):
    code = f"import nothing_of_this_name\nother = 1\nllm_system_prompt{annotation} = {literal}\nraise SystemExit\n"
    path = write_constants(tmp_path, code)
    assert read_system_prompt(tmp_path) == read_system_prompt(path) == 'Say "more".\nPrompt:\n'


def test_sources_that_hold_no_system_prompt(tmp_path):
    with pytest.raises(FileNotFoundError, match="pass a checkout of the original code"):
        read_system_prompt(tmp_path)
    path = write_constants(tmp_path, "def f():\n    llm_system_prompt = 'inside'\n")
    with pytest.raises(ValueError, match="assigns no `llm_system_prompt`"):
        read_system_prompt(tmp_path)
    for code in (
        "llm_system_prompt = ['a', 'b']\n",
        "llm_system_prompt = open('x').read()\n",
        "llm_system_prompt: str\n",
    ):
        path.write_text(code)
        with pytest.raises(ValueError, match="must be one string literal"):
            read_system_prompt(tmp_path)
    path.write_text("llm_system_prompt = (\n")
    with pytest.raises(ValueError, match="is not Python code"):
        read_system_prompt(tmp_path)
    binary = tmp_path / "prompt.txt"
    binary.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="must be UTF-8"):
        read_system_prompt(binary)


def test_a_path_that_leads_nowhere_is_not_taken_for_text(tmp_path):
    for source in (tmp_path / "missing.txt", str(tmp_path / "missing"), "missing.txt"):
        with pytest.raises(FileNotFoundError, match="missing"):
            read_system_prompt(source)
