"""Groups of entries that take turns: A B C A B C …, each in a process of its own."""

import multiprocessing
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.entry import Options, serve

TOLERANCE = 1e-4  # of a probability


class BenchError(Exception):
    """A peer failed, or does not compute what the others compute."""


@dataclass(frozen=True)
class Entry:
    """Who takes part in a group.

    Attributes:
        name: in tables.
        peer: `module:function` in `benchmarks.peers`, which makes the entry.
        extra: what it is told besides the group's options.
        network: whose prepared weights its answers belong to.
    """

    name: str
    peer: str
    extra: dict[str, Any] = field(default_factory=dict)
    network: str | None = "notebook"


@dataclass(frozen=True)
class Group:
    """What is measured side by side.

    Attributes:
        key: in the JSON.
        seconds: an entry's part of a round.
        rounds: that count, after one that does not.
    """

    key: str
    entries: Sequence[Entry]
    seconds: float
    rounds: int


class Peer:
    """An entry's process, as seen from here."""

    def __init__(self, entry: Entry, options: Options) -> None:
        self.entry = entry
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        module, maker = entry.peer.split(":")
        self.process = context.Process(
            target=serve, args=(end, module, maker, options), daemon=True
        )
        self.process.start()
        end.close()

    def receive(self) -> Any:
        """Wait for an answer.

        Raises:
            BenchError: the process failed or died.
        """
        try:
            answer = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise BenchError(
                f"{self.entry.name}: its process ended with code {self.process.exitcode}"
            ) from None
        if isinstance(answer, str):
            raise BenchError(f"{self.entry.name} failed:\n{answer}")
        return answer

    def ask(self, *order: Any) -> Any:
        self.pipe.send(order)
        return self.receive()

    def close(self) -> int:
        """End the process; returns the most memory it used, in MiB."""
        self.pipe.send(None)
        peak: int = self.receive()
        self.process.join()
        return peak


def measure(group: Group, options: Options) -> dict[str, Any]:
    """Start all entries, check that they compute the same, time them in turn.

    Returns:
        `entries`: by name, what each tells of itself and `peak_mib`; `samples`: by case and name,
        one dictionary a round, its `seconds` those of one repeat.

    Raises:
        BenchError: a peer failed, or its answers differ.
    """
    peers = [Peer(e, Options(options.folder, options.threads, e.extra)) for e in group.entries]
    try:
        entries = {peer.entry.name: peer.receive() for peer in peers}
        for peer in peers:
            if entries[peer.entry.name]["answers"]:
                entries[peer.entry.name]["difference"] = _check(peer, options)
        samples = {}
        for case in next(iter(entries.values()))["cases"]:
            samples[case] = _race(group, peers, entries, case)
        for peer in peers:
            entries[peer.entry.name]["peak_mib"] = peer.close()
    finally:
        for peer in peers:
            peer.process.kill()
    return {"entries": entries, "samples": samples}


def _check(peer: Peer, options: Options) -> float:
    """The largest difference of a probability to normlab's, with the same weights."""
    network = peer.entry.network
    expected = options.array(f"{network}-answers")
    answers = peer.ask("answer", np.array(options.array("x_test")[: len(expected)]))
    difference = float(np.abs(answers - expected).max())
    if not difference <= TOLERANCE:
        raise BenchError(
            f"{peer.entry.name}: with the same weights of {network} its probabilities differ from "
            f"normlab's by {difference:.2g}, more than {TOLERANCE:g}: nothing was measured"
        )
    return difference


def _race(
    group: Group, peers: list[Peer], entries: dict[str, Any], case: str
) -> dict[str, list[dict[str, Any]]]:
    names = [peer.entry.name for peer in peers]
    whole = {name: entries[name]["cases"][case]["whole"] for name in names}
    repeats = {
        peer.entry.name: 1 if whole[peer.entry.name] else _calibrate(peer, case, group.seconds)
        for peer in peers
    }
    samples: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(1, group.rounds + 1):
        for name, peer in zip(names, peers, strict=True):
            sample = peer.ask("run", case, repeats[name])
            samples[name].append({**sample, "seconds": sample["seconds"] / repeats[name]})
        if any(whole.values()):
            print(f"  round {number} of {group.rounds}", file=sys.stderr, flush=True)
    return samples


def _calibrate(peer: Peer, case: str, seconds: float) -> int:
    """Warm up; how many repeats take about `seconds`."""
    peer.ask("run", case, 1)
    repeats = 1
    while (took := peer.ask("run", case, repeats)["seconds"]) < seconds / 4:
        repeats *= 2
    return max(1, round(repeats * seconds / took))
