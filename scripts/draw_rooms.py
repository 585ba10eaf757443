"""Draw the rooms of the package and which imports which, as docs/architecture.svg.

    python scripts/draw_rooms.py    # needs pip install '.[dev]'

A room stands above all that it imports. An arrow that follows from two others is left out. The
floors are those of the import contract in pyproject.toml.
"""

import tomllib
from pathlib import Path

import grimp
import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "docs" / "architecture.svg"
WIDTH, HEIGHT = 1.45, 0.42  # of a room, in the units of the drawing
INK, PAPER, LINE = "#1c2431", "#eef3f8", "#7d93ab"


def floors() -> list[list[str]]:
    """The rooms of each floor, from the top, without `__main__`."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = contracts["contracts"][0]["layers"]
    return [[room.strip() for room in layer.split("|")] for layer in layers if layer != "__main__"]


def arrows(rooms: list[str]) -> set[tuple[str, str]]:
    """Which room imports which, without the arrows that follow from two others."""
    graph = grimp.build_graph("normlab")
    found = set()
    for one in rooms:
        for other in rooms:
            if one != other and graph.direct_import_exists(
                importer=f"normlab.{one}", imported=f"normlab.{other}", as_packages=True
            ):
                found.add((one, other))
    reach = set(found)
    for middle in rooms:
        reach |= {(a, d) for a, b in reach if b == middle for c, d in reach if c == middle}
    return {(a, b) for a, b in found if not any((a, m) in reach and (m, b) in reach for m in rooms)}


def draw() -> Figure:
    """The drawing."""
    rows = floors()
    fig = Figure(figsize=(9, 0.78 * len(rows)))
    ax = fig.subplots()
    places = {
        room: ((i - (len(row) - 1) / 2) * 1.9, -y)
        for y, row in enumerate(rows)
        for i, room in enumerate(row)
    }
    for a, b in sorted(arrows(list(places))):
        (x0, y0), (x1, y1) = places[a], places[b]
        bend = 0.0 if abs(y0 - y1) == 1 else 0.28 * (1 if x0 >= 0 else -1)
        arrow = FancyArrowPatch(
            (x0, y0 - HEIGHT / 2),
            (x1, y1 + HEIGHT / 2),
            arrowstyle="-|>",
            mutation_scale=9,
            connectionstyle=f"arc3,rad={bend}",
            color=LINE,
            linewidth=1,
        )
        ax.add_patch(arrow)
    for room, (x, y) in places.items():
        box = FancyBboxPatch(
            (x - WIDTH / 2, y - HEIGHT / 2),
            WIDTH,
            HEIGHT,
            boxstyle="round,pad=0.02",
            facecolor=PAPER,
            edgecolor=INK,
            linewidth=0.9,
        )
        ax.add_patch(box)
        ax.text(x, y, room, ha="center", va="center", fontsize=10, color=INK)
    ax.set_xlim(-4.2, 4.2)
    ax.set_ylim(-len(rows) + 0.5, 0.5)
    ax.axis("off")
    return fig


def main() -> None:
    with mpl.rc_context({"svg.hashsalt": "normlab", "svg.fonttype": "none"}):
        draw().savefig(TARGET, format="svg", metadata={"Date": None}, bbox_inches="tight")
    print(TARGET)


if __name__ == "__main__":
    main()
