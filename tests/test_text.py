"""Other people's text does nothing in a terminal, a shell, Markdown or HTML."""

import shlex
import subprocess
from html.parser import HTMLParser

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from normlab.errors import DataError
from normlab.text import (
    html,
    listed,
    markdown,
    printable,
    printable_lines,
    shell,
    shown,
    utf8,
)

# With lone surrogates, which names of files and JSON can hold.
texts = st.text(st.characters(exclude_categories=()), max_size=40)


@given(texts)
@example("\x1b]52;c;cm0gLXJm\x07")
@example("\x9b2J\u202e\u2028\x85\r")
def test_a_terminal_only_shows_printable_text(text: str) -> None:
    result = printable(text)
    assert not set(result) & {chr(i) for i in (*range(32), 127, *range(128, 160))}
    assert not set(result) & set("\u202a\u202e\u2066\u2067\u2028\u2029")
    result.encode()  # no half of a letter is left
    assert printable(result) == result


@pytest.mark.parametrize("text", ["a cat", "猫", "Ångström", "می‌خواهم", "a\xa0b", "👩‍🚒"])
def test_letters_of_all_alphabets_stay(text: str) -> None:
    assert printable(text) == text


def test_lines_stay_where_lines_are_printed() -> None:
    assert printable_lines("a\nb\x1bc") == "a\nb\\x1bc"
    assert shown(b"a\xff.png".decode("utf-8", "surrogateescape")) == "a\\xff.png"


def encoded(word: str) -> bytes:
    """The bytes of a file's name; of what no file can be called, its escapes."""
    try:
        return word.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return word.encode("utf-8", "backslashreplace")


@settings(max_examples=60, deadline=None)
@example(["\ud800"])
@given(st.lists(st.text(st.characters(exclude_characters="\0"), max_size=20), max_size=4))
@example(["$(touch x)", "`id`", "a'b", "", "-rf", "~", "a\nb\x1b"])
@example(["\udcff\\'"])
def test_a_shell_takes_a_printed_command_apart_into_the_same_words(words: list[str]) -> None:
    line = shell(words)
    assert printable(line) == line
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True, env={"LANG": "C"}
    )
    expected = [encoded(word) for word in words]
    assert done.stdout.split(b"\0")[:-1] == (expected or [b""])


def test_an_ordinary_command_looks_ordinary() -> None:
    words = ["normlab", "train", "fast79", "--data", "my pictures", "--out", "运行/1"]
    assert shlex.split(shell(words)) == words
    assert "$'" not in shell(words)


@given(texts)
def test_html_is_text_again_when_it_is_read(text: str) -> None:
    found: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            raise AssertionError(tag)

        def handle_data(self, data: str) -> None:
            found.append(data)

    Reader(convert_charrefs=True).feed(html(text) + " ")
    assert "".join(found) == printable_lines(text) + " "
    assert '"' not in html(text)
    utf8(html(text)).decode()


@given(texts)
@example("[a](b) ![c](d) <e> *f* _g_ `h` | i \n# j https://k")
def test_every_mark_of_markdown_is_escaped(text: str) -> None:
    plain = markdown(text)
    assert "\n" not in plain
    while "\\" in plain:
        at = plain.index("\\")
        plain = plain[:at] + plain[at + 2 :]
    assert not set(plain) & set("*_[]<>`|#!{}()~$&")


def test_errors_are_one_line_that_a_terminal_only_shows() -> None:
    assert str(DataError("class 'a\x1b[2Jb\nc\udc80' is not known")) == (
        "class 'a\\x1b[2Jb c\\x80' is not known"
    )


def test_a_long_error_keeps_its_beginning_and_its_end() -> None:
    text = str(DataError(f"class {'x' * 100_000!r}: choose another"))
    assert len(text) < 2_000
    assert text.startswith("class 'xxx")
    assert text.endswith(": choose another")


def test_many_and_long_names_make_no_long_sentence() -> None:
    assert len(listed([f"{i}" * 1_000 for i in range(100_000)])) < 600
