"""`python tests/attack`: every attack that docs/reliability.md tells of, and what survived.

files    what a person may be sent: data, runs, studies, models
server   what a client may send to `normlab serve`
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from attack.case import Case

PARTS = ("files", "server")


def cases(part: str, tries: int, seed: int) -> Iterator[Case]:
    """The outcomes of a part's attacks, one by one; none if the part is not there."""
    if find_spec(f"attack.{part}") is None:
        return
    with tempfile.TemporaryDirectory(prefix="attack-") as folder:
        yield from import_module(f"attack.{part}").attacks(
            Path(folder), random.Random(f"{part} {seed}"), tries
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Attack files and the server.")
    parser.add_argument("part", nargs="?", default="all", choices=("all", *PARTS))
    parser.add_argument("--tries", type=int, default=10, help="of each; 0 for the short form")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a JSON file for the counts")
    options = parser.parse_args()
    found = []
    print("| attack | tried | survived |\n|---|---|---|", flush=True)
    for part in PARTS if options.part == "all" else (options.part,):
        for case in cases(part, options.tries, options.seed):
            print(f"| {case.name} | {case.tried} | {case.survived} |", flush=True)
            found.append(case)
    if options.out:
        counts = {case.name: {"tried": case.tried, "survived": case.survived} for case in found}
        document = {"seed": options.seed, "attacks": counts}
        options.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    raise SystemExit(any(case.survived < case.tried for case in found))


if __name__ == "__main__":
    main()
