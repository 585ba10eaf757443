"""What a message says to install: the packages of an extra, by name."""

import re
import shlex
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

from normlab.errors import install

ROOT = Path(__file__).parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"][
    "optional-dependencies"
]


def test_it_names_every_package_of_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """As setuptools writes them into the metadata."""
    lines = [f'{p}; extra == "{extra}"' for extra, packages in EXTRAS.items() for p in packages]
    monkeypatch.setattr(metadata, "requires", lambda name: ["torch>=2.6", *lines])
    for extra in ("onnx", "serve", "heic", "pretrained"):
        assert shlex.split(install(extra)) == ["pip", "install", *EXTRAS[extra]]
    monkeypatch.setattr(metadata, "requires", lambda name: lines[:1])
    assert install("serve") == "pip install --editable '.[serve]'"


def test_messages_name_extras_that_there_are() -> None:
    asked = [
        extra
        for path in (ROOT / "src").rglob("*.py")
        for extra in re.findall(r"[^.]\binstall\(\"?'?(\w+)'", path.read_text("utf-8"))
    ]
    assert len(asked) >= 11
    assert set(asked) <= EXTRAS.keys()


def test_nothing_tells_people_to_install_what_is_not_published() -> None:
    texts = [ROOT / "README.md", *(ROOT / "docs").glob("[!r]*/*.md"), *(ROOT / "docs").glob("*.md")]
    texts += [*(ROOT / "src").rglob("*.py"), *(ROOT / "examples").glob("*")]
    for path in texts:
        if path.is_file() and path.name != "errors.py":
            assert not re.search(r"install[^\n.]* '?normlab\b", path.read_text("utf-8")), path
