"""Plant copies and wrong labels in a data set, look for them, and count what was found.

    python -m benchmarks.data_check cifar10 --copies LIST --labels LIST
    python -m benchmarks.data_check FOLDER

Of each kind of change, copies of drawn pictures are added to the data as training pictures; then a
twentieth of the labels is replaced by another class, drawn evenly. One check sees it all. LIST are
published lists for CIFAR-10's test pictures: `test_index,train_index,kind` and
`test_index,…,confirmed`.
"""

import argparse
import csv
import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from normlab.core.environment import describe_machine, resolve_device, resolve_threads
from normlab.core.streams import stream
from normlab.curation import Check, Pictures, check, read_pictures
from normlab.curation.planting import CHANGES
from normlab.training.pretrained import open_pretrained
from normlab.training.starting_points import size_of

COPIES = 150  # of each kind, or a twentieth of the pictures
WRONG = 0.05


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data")
    parser.add_argument("--copies", type=Path, help="a list of near-duplicates of test pictures")
    parser.add_argument("--labels", type=Path, help="a list of judged labels of test pictures")
    parser.add_argument("--from", dest="start", help="a pretrained network to judge labels by")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--note", default="", help="what else ran on the machine")
    parser.add_argument("--out", type=Path, default=Path("docs/results/data-check"))
    options = parser.parse_args(words)
    threads = resolve_threads(options.threads)
    body = None if options.start is None else open_pretrained(options.start)
    original = read_pictures(options.data, size_of(body))
    pictures, sources, wrong = plant(original, options.seed)
    wall, processor = time.perf_counter(), time.process_time()
    found = check(pictures, threads=threads, body=body)
    result: dict[str, Any] = {
        "data": original.name,
        "pictures": len(original),
        "with_planted_copies": len(pictures),
        "seed": options.seed,
        "seconds": round(time.perf_counter() - wall, 1),
        "processor_seconds": round(time.process_time() - processor, 1),
        "parts": {part: round(value, 1) for part, value in found.seconds.items()},
        "machine": describe_machine(threads, resolve_device("cpu")),
        "note": options.note,
        "copies": count_copies(found, sources, len(original)),
        "labels": count_labels(found, wrong),
    }
    if options.copies:
        result["published_copies"] = against_copies(found, options.copies)
    if options.labels:
        result["published_labels"] = against_labels(found, options.labels, wrong)
    options.out.mkdir(parents=True, exist_ok=True)
    name = original.name.strip("/").replace("/", "-")
    if body is not None:
        name += f"-by-{body.origin.network}"
    (options.out / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: v for k, v in result.items() if k != "machine"}, indent=1))


def plant(original: Pictures, seed: int) -> tuple[Pictures, dict[str, list[int]], np.ndarray]:
    """The pictures with copies after them, the sources of each kind, and whose labels are wrong."""
    n, k = len(original), len(original.class_names)
    rng = stream(seed, "plant")
    sources = {kind: rng.permutation(n)[: min(COPIES, n // 20)].tolist() for kind in CHANGES}
    copies = [
        CHANGES[kind](original.pixels[i], rng) for kind, chosen in sources.items() for i in chosen
    ]
    every = [i for chosen in sources.values() for i in chosen]
    wrong = np.sort(rng.permutation(n)[: round(WRONG * n)])
    labels = original.labels.copy()
    labels[wrong] = (labels[wrong] + rng.integers(1, k, len(wrong))) % k
    pictures = replace(
        original,
        pixels=np.concatenate([original.pixels, np.stack(copies)]),
        labels=np.concatenate([labels, original.labels[every]]),
        names=[*original.names, *(f"copy {j} of {original.names[i]}" for j, i in enumerate(every))],
        parts=[*original.parts, *["train"] * len(every)],
        prints=[*original.prints, *(hashlib.sha256(c.tobytes()).digest() for c in copies)],
        files=[*original.files, *[None] * len(every)],
    )
    return pictures, sources, wrong


def count_copies(found: Check, sources: dict[str, list[int]], n: int) -> dict[str, Any]:
    """Of each kind the share that is in a group with its source; groups of no planted copy."""
    group: dict[int, set[int]] = {}
    for number, one in enumerate(found.groups):
        for i in one.members:
            group.setdefault(i, set()).add(number)
    recall, j = {}, n
    for kind, chosen in sources.items():
        hits = 0
        for i in chosen:
            hits += bool(group.get(i, set()) & group.get(j, set()))
            j += 1
        recall[kind] = round(hits / len(chosen), 3)
    others = sum(all(i < n for i in one.members) for one in found.groups)
    return {
        "planted_of_each_kind": len(next(iter(sources.values()))),
        "found": recall,
        "groups": len(found.groups),
        "groups_without_planted": others,
        "aligned_pairs": found.copies.compared,
    }


def count_labels(found: Check, wrong: np.ndarray) -> dict[str, Any]:
    """The share of planted wrong labels among the first pictures of the list."""
    suspects = found.suspects
    if suspects is None:
        return {}
    hits = np.cumsum(np.isin(suspects.order, wrong)) / len(wrong)
    n = len(suspects.order)
    return {
        "planted": len(wrong),
        "by": found.by,
        "accuracy_by_given_labels": round(suspects.accuracy, 4),
        "listed": suspects.count,
        "found_in_list": round(float(hits[max(suspects.count - 1, 0)]), 3),
        **{
            f"found_in_first_{share}_percent": round(float(hits[n * share // 100 - 1]), 3)
            for share in (2, 5, 10, 20)
        },
    }


def against_copies(found: Check, path: Path) -> dict[str, Any]:
    """Listed test pictures that share a group with a training picture, and with their own."""
    names = found.pictures.names
    together = [{names[i] for i in one.members} for one in found.groups if one.leaks]
    real = [one for one in together if any(name.startswith("train/") for name in one)]
    looked = {name for one in real for name in one if name.startswith("test/")}
    kinds: dict[str, list[tuple[bool, bool]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            test, train = f"test/{row['test_index']}", f"train/{row['train_index']}"
            pair = any(test in one and train in one for one in real)
            kinds.setdefault(row["kind"], []).append((test in looked, pair))
    return {
        "test_pictures_to_look_at": len(looked),
        "listed": {kind: len(rows) for kind, rows in kinds.items()},
        "found": {kind: sum(test for test, _ in rows) for kind, rows in kinds.items()},
        "found_with_their_pair": {kind: sum(p for _, p in rows) for kind, rows in kinds.items()},
    }


def against_labels(found: Check, path: Path, wrong: np.ndarray) -> dict[str, Any]:
    """How many listed test pictures are among the first of the test pictures' doubtful labels."""
    suspects, names = found.suspects, found.pictures.names
    if suspects is None:
        return {}
    planted = {names[i] for i in wrong.tolist()}
    tests = [names[i] for i in suspects.order.tolist() if names[i].startswith("test/")]
    tests = [name for name in tests if name not in planted]
    with path.open(newline="") as file:
        rows = [(f"test/{row['test_index']}", row["confirmed"]) for row in csv.DictReader(file)]
    result: dict[str, Any] = {"test_pictures": len(tests)}
    for word, flag in (("confirmed", "1"), ("not_confirmed", "0")):
        listed = {name for name, value in rows if value == flag} - planted
        result[word] = {
            "listed": len(listed),
            **{f"in_first_{m}": len(listed & set(tests[:m])) for m in (100, 250, 500, 1000, 2000)},
        }
    return result


if __name__ == "__main__":
    main()
