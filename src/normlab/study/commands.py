"""Commands as the runs of a study: placeholders filled by arms, and the numbers that a run gives.

    python train.py --norm {norm} --seed {seed}      one argument each, whatever the value holds
    python train.py {*options}                       the value split into arguments, or none

`{seed}`, `{arm}`, `{threads}` and `{out}`, a folder of the run's own, are filled here. No shell
reads a command unless it is asked for; then values are quoted for it.
"""

import csv
import hashlib
import inspect
import io
import json
import math
import os
import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from normlab.core.children import outer_environment
from normlab.errors import UserError, nearest
from normlab.study import versions

OWN = ("seed", "arm", "threads", "out")
PLACEHOLDER = re.compile(r"\{(\*?)([A-Za-z_][A-Za-z0-9_-]*)\}")
MOST_OUTPUT = 16 << 20  # bytes of a log's or a result's end that are read
MOST_HASHED = 64 << 20  # bytes of a file named in a command
THREADS = (
    *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"),
    *("VECLIB_MAXIMUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"),
)


class NoNumber(UserError):
    """A run has ended well and its number is not where it was said to be."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """What a study's runs do, and where they leave their numbers.

    Attributes:
        text: with placeholders.
        shell: whether /bin/sh reads it.
        result: `FILE:key`, with placeholders; None for the last JSON line of the output.
        pattern: a regular expression with one group, whose last match is the number; or None.
        time_limit: seconds after which a run is ended; None for no limit.
        files: SHA-256 of the files that the command names, by these names: they are the study's.
    """

    text: str
    shell: bool = False
    result: str | None = None
    pattern: str | None = None
    time_limit: float | None = None
    files: dict[str, str] | None = None

    def __post_init__(self) -> None:
        if not self.words({name: "0" for _, name in self.placeholders}):
            raise UserError("--command is empty: give the command of one run")
        if self.result is not None and self.pattern is not None:
            raise UserError("--result and --pattern are two places for one number: give one")
        if self.result is not None and not all(self.result.rpartition(":")):
            raise UserError(f"--result {self.result!r}: give FILE:key, as in out/result.json:loss")
        if self.time_limit is not None and not 0 < self.time_limit < math.inf:
            raise UserError(f"--time-limit {self.time_limit:g}: give seconds above 0")
        if self.pattern is not None:
            try:
                groups = re.compile(self.pattern).groups
            except re.error as e:
                raise UserError(f"--pattern {self.pattern!r} is no regular expression ({e})") from e
            if groups != 1:
                raise UserError(
                    f"--pattern {self.pattern!r} has {groups} groups: put brackets around the "
                    "number alone, as in 'accuracy: ([0-9.]+)'"
                )

    @property
    def placeholders(self) -> list[tuple[str, str]]:
        """Each placeholder of the command as (star or nothing, name)."""
        return [(found[1], found[2]) for found in PLACEHOLDER.finditer(self.text)]

    @property
    def where(self) -> str:
        """Where the number stands, in words."""
        if self.result is not None:
            return f"the file {self.result.rpartition(':')[0]}"
        if self.pattern is not None:
            return f"what the run prints, by the pattern {self.pattern!r}"
        return "the last JSON line of the run's standard output"

    def words(self, values: Mapping[str, str]) -> list[str]:
        """The command of one run as arguments.

        Raises:
            UserError: quotes that do not end.
        """
        if self.shell:

            def quoted(found: re.Match[str]) -> str:
                value = values[found[2]]
                return value if found[1] else shlex.quote(value)

            return ["/bin/sh", "-c", PLACEHOLDER.sub(quoted, self.text)]
        words: list[str] = []
        for word in _split(self.text, "--command"):
            whole = PLACEHOLDER.fullmatch(word)
            if whole and whole[1]:
                words += _split(values[whole[2]], f"{{*{whole[2]}}}")
            else:
                words.append(filled(word, values))
        return words

    def check_arms(self, arms: Mapping[str, Mapping[str, str]]) -> None:
        """Refuse arms and placeholders that do not fit each other.

        Raises:
            UserError: naming the placeholder or the value, and the remedy.
        """
        texts = [self.text, self.result or ""]
        names = {found[2] for text in texts for found in PLACEHOLDER.finditer(text)}
        for arm, values in arms.items():
            if own := sorted(values.keys() & set(OWN)):
                raise UserError(f"arm {arm!r} sets {own[0]!r}, which normlab fills itself")
            for name in values:
                if name not in names:
                    known = sorted(names - set(OWN)) or ["(none)"]
                    raise UserError(
                        f"arm {arm!r} sets {name!r}, and the command has no {{{name}}}: it has "
                        f"{', '.join(known)}"
                    )
            if missing := sorted(names - values.keys() - set(OWN)):
                raise UserError(
                    f"arm {arm!r} does not fill {{{missing[0]}}} of the command: "
                    f"--arm '{arm}: {missing[0]}=VALUE'"
                )
        if "seed" not in {name for _, name in self.placeholders}:
            raise UserError(
                "the command has no {seed}, so all runs of an arm would be one and the same: put "
                "it where the script takes its seed, or in its environment (env SEED={seed} …)"
            )
        if self.result is not None and not _named(self.result) & {"out", "seed"}:
            raise UserError(
                f"--result {self.result!r} would be one file for all runs: let each write to a "
                "folder of its own, {out}, in the command and in --result"
            )


def filled(text: str, values: Mapping[str, str]) -> str:
    """`text` with its placeholders filled.

    >>> filled("--norm={norm}", {"norm": "batch; rm -r ~"})
    '--norm=batch; rm -r ~'
    """
    return PLACEHOLDER.sub(lambda found: values[found[2]], text)


def files_of(command: Command, folder: Path) -> dict[str, str]:
    """SHA-256 of each file that the command names, such as its script; very large ones are left.

    A script that changes while its study goes on would spoil it; what it imports is not seen.
    """
    found = {}
    names = {name: "{" + name + "}" for _, name in command.placeholders}
    words = _split(command.text, "--command") if command.shell else command.words(names)[1:]
    for word in words:
        path = folder / word
        try:
            if path.is_file() and path.stat().st_size <= MOST_HASHED:
                found[word] = hashlib.sha256(path.read_bytes()).hexdigest()
        except (OSError, ValueError):  # a name too long, or with a zero byte: no file
            continue
    return found


def environment_of(threads: int) -> dict[str, str]:
    """The user's own environment, with the number of threads; 0 leaves it as it is."""
    counts = {name: str(threads) for name in THREADS} if threads else {}
    return {**outer_environment(), **counts}


def numbers_of(command: Command, result: Path | None, stdout: Path, stderr: Path) -> Any:
    """What a run gave: a JSON object, or one number.

    Args:
        result: the file of `--result`; None if there is none.

    Raises:
        NoNumber: there is nothing, or nothing that can be read.
    """
    if command.pattern is not None:
        expression = re.compile(command.pattern)
        for log in (stdout, stderr):
            found = expression.findall(_end(log))
            if found:
                return _number(found[-1], f"--pattern {command.pattern!r}")
        raise NoNumber(f"nothing that it printed matches --pattern {command.pattern!r}")
    if result is not None:
        try:
            text = _end(result)
        except OSError as e:
            raise NoNumber(f"--result: {result}: {e.strerror}") from None
        return _from_file(text, result)
    for line in reversed(_end(stdout).splitlines()):
        value = _json(line)
        if isinstance(value, dict) or (_is_number(value) and line.strip()):
            return value
    raise NoNumber(
        "it printed no line of JSON: let it end with print(json.dumps({'test_accuracy': …})), or "
        "say where the number is with --result FILE:key or --pattern REGEX"
    )


def pick(found: Any, metric: str | None) -> tuple[float, dict[str, float]]:
    """The number that decides, and all numbers by their names, nested ones with dots.

    >>> pick({"test": {"accuracy": 0.5}, "epochs": 3}, "test.accuracy")
    (0.5, {'test.accuracy': 0.5, 'epochs': 3.0})

    Raises:
        NoNumber: the metric is missing, is a text, or must be named.
    """
    if _is_number(found):
        return float(found), {metric or "result": float(found)}
    if not isinstance(found, dict):
        raise NoNumber(f"it gave {_short(found)}: give a number, or numbers by name")
    flat = dict(_flat(found))
    numbers = {name: float(value) for name, value in flat.items() if _is_number(value)}
    if metric is None:
        if len(numbers) != 1:
            names = ", ".join(numbers) or "none"
            raise NoNumber(f"it gave {len(numbers)} numbers ({names}): name one with --metric")
        return next(iter(numbers.values())), numbers
    if metric not in flat:
        raise NoNumber(f"it gave no {nearest(metric, numbers or flat)}")
    if metric not in numbers:
        raise NoNumber(f"its {metric} is {_short(flat[metric])}, which is no number")
    return numbers[metric], numbers


@lru_cache(maxsize=8)
def versions_of(program: str) -> dict[str, str]:
    """`versions.own_versions` of the Python that a command starts; none of another program."""
    if not re.fullmatch(r"python[0-9.]*", os.path.basename(program)):
        return {}
    try:
        answer = subprocess.run(
            [program, "-c", inspect.getsource(versions)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
            env=outer_environment(),
        )
        found = json.loads(answer.stdout)
        return {str(name): str(value) for name, value in found.items()}
    except (OSError, ValueError, AttributeError, subprocess.SubprocessError):
        return {}


def _split(text: str, where: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as e:
        raise UserError(f"{where} {text!r} cannot be read ({e}): close its quotes") from None


def _named(text: str) -> set[str]:
    return {found[2] for found in PLACEHOLDER.finditer(text)}


def _end(path: Path) -> str:
    with open(path, "rb") as f:
        f.seek(max(0, f.seek(0, os.SEEK_END) - MOST_OUTPUT))
        return f.read().decode("utf-8", "replace")


def _from_file(text: str, path: Path) -> Any:
    """JSON, the last line of JSON lines, or the last row of a table with a head."""
    if path.suffix == ".csv":
        rows = list(csv.DictReader(io.StringIO(text)))
        if not rows:
            raise NoNumber(f"--result: {path} has no row")
        return {name: _maybe(value) for name, value in rows[-1].items() if name is not None}
    lines = text.strip().splitlines()
    for piece in (text, lines[-1] if lines else ""):
        value = _json(piece)
        if isinstance(value, dict) or _is_number(value):
            return value
    raise NoNumber(f"--result: {path} holds no JSON object, line of JSON or number")


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _maybe(text: Any) -> Any:
    try:
        return float(text)
    except (TypeError, ValueError):
        return text


def _number(text: str, where: str) -> float:
    try:
        return float(text.strip().removesuffix("%"))
    except ValueError:
        raise NoNumber(f"{where} found {_short(text)}, which is no number") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _flat(values: Mapping[str, Any], prefix: str = "", depth: int = 0) -> Any:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and depth < 8:
            yield from _flat(value, f"{name}.", depth + 1)
        else:
            yield name, value


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def parse_arm(text: str) -> tuple[str, dict[str, str]]:
    """Read `NAME: key=value, …`; a value with a comma stands in quotes.

    >>> parse_arm("small: width=8, rates='0.1,0.2', options=")
    ('small', {'width': '8', 'rates': '0.1,0.2', 'options': ''})

    Raises:
        UserError: it cannot be read.
    """
    name, colon, rest = text.partition(":")
    name = name.strip()
    if not colon:
        raise UserError(f"arm {text!r}: say what it fills in the command, 'NAME: key=value, …'")
    values = {}
    for item in _items(rest):
        key, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"arm {name!r}: {item.strip()!r} is not key=value")
        value = value.strip()
        if len(value) > 1 and value[0] == value[-1] and value[0] in "'\"":
            value = value[1:-1]
        values[key.strip()] = value
    return name, values


def write_arm(name: str, values: Mapping[str, str]) -> str:
    """The text that `parse_arm` reads."""
    return f"{name}: {', '.join(f'{key}={_written(value)}' for key, value in values.items())}"


def _written(value: str) -> str:
    plain = value == value.strip() and "," not in value and value[:1] not in ("'", '"')
    quote = '"' if "'" in value else "'"
    return value if plain else f"{quote}{value}{quote}"


def _items(text: str) -> Sequence[str]:
    """Split at commas that stand in no quotes."""
    items, quote, start = [], "", 0
    for i, c in enumerate(text):
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"" and text[start:i].rstrip().endswith("="):
            quote = c
        elif c == ",":
            items.append(text[start:i])
            start = i + 1
    items.append(text[start:])
    return [item for item in items if item.strip()]
