"""Every command line in README and docs is one that the program takes; cheap ones are run."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from normlab.__main__ import run
from normlab.cli import cli
from normlab.study.arms import make_arms

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    + [path for room in ("learn", "tutorials") for path in (ROOT / "docs" / room).glob("*.md")]
)
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:^ {4}.*\n)+", re.MULTILINE)
INLINE = re.compile(r"`(normlab [^`]+)`")
BETWEEN = {"&&", "&", ";", "|"}


def blocks(text: str) -> Iterator[str]:
    """What is shown as typed at a prompt: fenced as console or sh, or indented."""
    for language, block in FENCED.findall(text):
        if language in ("console", "sh", "bash"):
            yield block
    yield from INDENTED.findall(FENCED.sub("", text))


def commands(text: str) -> list[list[str]]:
    """The words behind each `normlab` and `-m normlab` at a line's start or behind `&&`."""
    found = []
    for block in blocks(text):
        for line in block.replace("\\\n", " ").splitlines():
            typed = line.strip().removeprefix("$ ")
            if not re.match(r"normlab |torchrun ", typed):
                continue
            if re.match(r"normlab [\w-]+: ", typed) or typed.startswith("normlab: "):
                continue  # what the program says
            words: list[str] = []
            for word in [*shlex.split(typed, comments=True), "&&"]:
                if word not in BETWEEN:
                    words.append(word)
                elif "normlab" in words:
                    found.append(words[words.index("normlab") + 1 :])
                    words = []
    return found


def parsed(words: list[str]) -> click.Context:
    """The context of the last command of the line, with its options read and not run."""
    context, command = click.Context(cli, info_name="normlab"), cli
    while isinstance(command, click.Group):
        name, command, words = command.resolve_command(context, words)
        context = command.make_context(name, words, parent=context)
    return context


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_command_is_one_that_there_is(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for words in commands(text):
        given = parsed(words).params
        if given.get("arm") and not given["command"]:
            make_arms(given["arm"])
    for line in INLINE.findall(text):  # often without its arguments, so the names only
        words = [*line.split()[1:], ""]
        command = cli.commands.get(words[0])
        assert command is not None or words[0].startswith("-"), line
        known = {option for p in (command or cli).params for option in (*p.opts, *p.secondary_opts)}
        for word in words:
            if re.match(r"--\w", word) and not isinstance(command, click.Group):
                assert word.partition("=")[0] in known | {"--help", "--version"}, line


def test_a_command_that_there_is_not_is_found() -> None:
    for line in ("train --tme 3", "train --epochs many", "trane", "data chek pets", "predict"):
        [words] = commands(f"```console\nnormlab {line}\n```\n")
        with pytest.raises(click.UsageError):
            parsed(words)


def test_cheap_commands_on_the_sample_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The README's first step without a network, and what the doctor's page says of its run.

    The tutorials' are run by `make soak`: test_tutorials.py. All others need CIFAR-10, pictures of
    the reader's own or minutes.
    """
    monkeypatch.chdir(tmp_path)
    assert "`normlab train --data sample`" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert run(["train", "--data", "sample", "--epochs", "1", "--out", "runs/0001-notebook"]) == 0
    text = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    [words] = [words for words in commands(text) if words[-2:] == ["--data", "sample"]]
    assert words[:2] == ["doctor", "runs/0001-notebook"]
    assert run(words) in (0, 1)  # 1: it found something serious


def test_commands_are_found() -> None:
    assert sum(len(commands(page.read_text(encoding="utf-8"))) for page in PAGES) > 60
