"""A real server in a process of its own, for tests: started, asked over HTTP, ended."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests

# What the command does, with other limits and, for one test, a slower model.
_LAUNCH = """
import json, sys, time
from normlab.__main__ import run
from normlab.serving import server, settings
from normlab.formats.onnx_model import OnnxModel
given = json.loads(sys.argv[1])
delay = given.pop("model_seconds", 0)
if delay:
    answers = OnnxModel.answers
    OnnxModel.answers = lambda self, x: (time.sleep(delay), answers(self, x))[1]
settings.ServerSettings.__init__.__kwdefaults__.update(given)
sys.exit(run(["serve", *sys.argv[2:]]))
"""


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[str]
    url: str
    said: list[str]

    def post(self, *contents: bytes, query: str = "", **options: Any) -> requests.Response:
        files = [("files", (f"{i}.png", content)) for i, content in enumerate(contents)]
        return requests.post(f"{self.url}/predict{query}", files=files, timeout=60, **options)

    def get(self, path: str) -> requests.Response:
        return requests.get(self.url + path, timeout=60)

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def children(self) -> list[int]:
        """Process ids of its decoders."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")  # a thread starts each
        return [int(word) for path in tasks for word in path.read_text().split()]

    def stop(self, signum: int = 15) -> tuple[int, str]:
        """Exit code and what it said on standard error."""
        self.process.send_signal(signum)
        _, errors = self.process.communicate(timeout=200)
        return self.process.returncode, errors


def start(*words: str, limits: Mapping[str, float] | None = None) -> Server:
    """Start `normlab serve WORDS` at a free port and wait until it says its address."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-W", "error", "-c", _LAUNCH, json.dumps(limits or {})),
            *(*words, "--port", "0"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line.rstrip("\n"))
        if found := re.match(r"Serving at (\S+) ", line):
            return Server(process, found[1], said)
    _, errors = process.communicate()
    raise AssertionError(f"exit code {process.returncode}: {errors}")


@contextmanager
def running(*words: str, limits: Mapping[str, float] | None = None) -> Iterator[Server]:
    """The same, ended afterwards; it must have had nothing to complain of."""
    server = start(*words, limits=limits)
    try:
        yield server
    finally:
        code, errors = server.stop()
    if (code, errors) != (143, ""):
        raise AssertionError(f"the server ended with code {code} and said: {errors}")
