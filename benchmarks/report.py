"""Keep a result; its tables go between marks in `docs/benchmarks.md` and `README.md`."""

import json
import statistics
from pathlib import Path

from benchmarks import groups
from benchmarks.summary import (
    EPOCHS,
    REACHED,
    Result,
    Spread,
    accuracies,
    factors,
    fast79,
    names,
    notebook,
    notebook_peers,
    over,
    processor,
    rates,
    ratios,
    seconds,
    spread,
    table,
)

PICTURES = """![Training and inference speeds of the notebook's network](benchmarks.png)

![Accuracy against training time](accuracy-time.png)"""
MARKS = "<!-- {}: begin -->", "<!-- {}: end -->"


def keep(result: Result, out: Path | None, root: Path) -> None:
    """Write the JSON and print the tables; a whole, full run also goes into the docs."""
    path = out or root / "docs" / "results" / f"bench{'-quick' * result['quick']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(tables(result))
    print(f"\n{path}")
    if out is None and not result["quick"] and complete(result):
        write_docs(result, root)


def complete(result: Result) -> bool:
    """Whether every part was measured."""
    parts = {"accuracy", "layers", "inference-notebook", "inference-fast79"}
    return parts <= set(result["groups"]) and "start_up" in result


def write_docs(result: Result, root: Path) -> None:
    """Fill the marked parts of the docs, and draw the pictures."""
    from benchmarks.pictures import draw_accuracy_time, draw_speeds, save
    from benchmarks.recipe_table import recipe_table

    page = root / "docs" / "benchmarks.md"
    fill(page, "bench", f"{tables(result)}\n\n{PICTURES}")
    fill(page, "recipes", recipe_table(root / "docs" / "results"))
    fill(root / "README.md", "bench", headline(result))
    save(draw_speeds(result), root / "docs" / "benchmarks")
    save(draw_accuracy_time(result, root / "docs" / "results"), root / "docs" / "accuracy-time")


def fill(path: Path, part: str, text: str) -> None:
    """Replace what stands between the marks of `part` in `path`.

    Raises:
        ValueError: the marks are not there.
    """
    content = path.read_text(encoding="utf-8")
    begin, end = (mark.format(part) for mark in MARKS)
    if content.count(begin) != 1 or content.count(end) != 1:
        raise ValueError(f"{path} needs {begin!r} and {end!r}, once each")
    before, rest = content.split(begin)
    after = rest.split(end)[1]
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def tables(result: Result) -> str:
    """Everything that was measured, as Markdown."""
    parts = [machine(result)]
    batches = [b for b in groups.BATCHES if f"training-{b}" in result["groups"]]
    parts += [training(result, batch) for batch in batches]
    if "accuracy" in result["groups"]:
        parts += [time_to_accuracy(result), gains(result)]
    if "layers" in result["groups"]:
        parts.append(layers(result))
    for network in ("notebook", "fast79"):
        if f"inference-{network}" in result["groups"]:
            parts.append(inference(result, network))
    if "start_up" in result:
        parts.append(start_up(result))
    return "\n\n".join(parts)


def machine(result: Result) -> str:
    """On what, with what, when, and whether the machine was quiet."""
    m = result["machine"]
    entries = [e for group in result["groups"].values() for e in group["entries"].values()]
    seen = dict.fromkeys(entry["version"] for entry in entries)
    share = result["others_share"]
    took = (
        "what others took is not known"
        if share is None
        else f"others took {share:.1%} of the processor time"
    )
    quiet = took if result["quiet"] else f"**a busy machine ({took}): these figures mean little**"
    return (
        f"{processor(m)}, {m['cores']} cores, {m['cpu_capability']}; {m['threads']} threads; "
        f"{m['platform']}; Python {m['python']}; {'; '.join(seen)}; {quiet}; "
        f"`{result['command']}` at commit {result['commit']}, {result['began']}, "
        f"{result['seconds'] / 60:.1f} minutes.\n\n"
        "Medians, in brackets the quartiles over n rounds; a ratio is taken within each round."
    )


def training(result: Result, batch: int) -> str:
    """Images/s of the notebook's network."""
    group, plain = f"training-{batch}", groups.faster_layout(result["groups"][f"training-{batch}"])
    rows = []
    for name in names(result, group):
        cells = [
            number(spread(rates(result, group, name)), 0),
            times(spread(ratios(result, group, name, groups.KERAS))),
            times(spread(ratios(result, group, name, plain))),
            f"{peak(result, group, name):,}",
        ]
        rows.append([name, *cells])
    head = ["", "images/s", "× Keras", f"× {plain}", "peak memory, MiB"]
    n = len(rates(result, group, plain))
    return f"### Training the notebook's network, batch {batch} (n = {n})\n\n{table(head, rows)}"


def time_to_accuracy(result: Result) -> str:
    """`fast79` beside the notebook's 25 epochs, and beside its ninth."""
    ours, rows = fast79(result, groups.OURS), []
    for layers in (groups.OURS, groups.PURE, groups.STOCK):
        name, scores = groups.FAST + layers, accuracies(result, layers)
        score = f"{statistics.mean(scores):.4f}"
        memory = f"{peak(result, 'accuracy', name):,}"
        took = fast79(result, layers)
        factor = "" if layers == groups.OURS else times(spread(over(took, ours)), 2)
        rows.append([f"`fast79`, {layers}", "its end", number(spread(took), 1)])
        rows[-1] += [factor, score, memory]
    for peer in notebook_peers(result):
        memory = f"{peak(result, 'accuracy', peer + groups.TRAIN):,}"
        for epochs, goal in ((EPOCHS, f"{EPOCHS} epochs"), (REACHED, f"epoch {REACHED}")):
            took = notebook(result, peer, epochs)
            factor = times(spread(over(took, ours)), 1)
            rows.append([f"notebook, {peer}", goal, number(spread(took), 0), factor, "", memory])
    head = ["", "until", "seconds", "× `fast79`", "mean test accuracy", "peak memory, MiB"]
    return f"### Time to accuracy (n = {len(ours)})\n\n{table(head, rows)}"


def gains(result: Result) -> str:
    """How much of `fast79`'s gain is recipe and how much is kernels."""
    rows = [[name, times(spread(values))] for name, values in factors(result).items()]
    keras, plain, ours = notebook_peers(result)
    fast = fast79(result, groups.OURS)
    whole = over(notebook(result, keras, EPOCHS), fast)
    rows.append(["**together: `fast79` for the notebook on Keras**", times(spread(whole), 1)])
    same = over(notebook(result, plain, EPOCHS), notebook(result, ours, EPOCHS))
    rows.append(["the notebook's own network, normlab for PyTorch", times(spread(same))])
    return f"### What the gain is made of\n\n{table(['', 'faster by'], rows)}"


def layers(result: Result) -> str:
    """The layer alone."""
    rows = []
    for case in result["groups"]["layers"]["samples"]:
        cells = [
            number(spread([1e3 * s for s in seconds(result, "layers", name, case)]), 3)
            for name in ("torch.nn", groups.OURS)
        ]
        ratio = ratios(result, "layers", groups.OURS, "torch.nn", case)
        rows.append([case, *cells, times(spread(ratio))])
    head = ["input", "torch.nn, ms", "normlab, ms", "× torch.nn"]
    n = len(seconds(result, "layers", groups.OURS, case))
    return f"### BatchNorm alone, forward and backward (n = {n})\n\n{table(head, rows)}"


def inference(result: Result, network: str) -> str:
    """Pixels in, probabilities out."""
    group, rows = f"inference-{network}", []
    for name in names(result, group):
        cells = []
        for case in ("256", "1"):
            values = (
                rates(result, group, name, case)
                if case == "256"
                else [1e3 * s for s in seconds(result, group, name, case)]
            )
            cells.append(number(spread(values), 0 if case == "256" else 2))
            cells.append(times(spread(ratios(result, group, groups.FOLDED, name, case))))
        rows.append([name, *cells, f"{peak(result, group, name):,}"])
    head = ["", "batch 256, images/s", "folded is ×", "batch 1, ms", "folded is ×", "peak, MiB"]
    n = len(rates(result, group, groups.FOLDED, "256"))
    title = "the notebook's network" if network == "notebook" else "`fast79`"
    return f"### Inference, {title} (n = {n})\n\n{table(head, rows)}"


def start_up(result: Result) -> str:
    """From cache to first step."""
    samples = result["start_up"]
    first = spread([s["seconds"] for s in samples])
    imports = spread([s["imports"] for s in samples])
    return (
        f"### Start of `fast79`, from the cache to the end of the first step (n = {first.n})\n\n"
        f"{first.median:.2f} s ({first.low:.2f} to {first.high:.2f}), after imports of "
        f"{imports.median:.2f} s."
    )


def headline(result: Result) -> str:
    """The README's share."""
    plain = groups.faster_layout(result["groups"]["training-32"])
    rows = []
    for name in (groups.KERAS, plain, groups.PURE, groups.OURS):
        row = [name]
        for batch in groups.BATCHES:
            group = f"training-{batch}"
            rate = spread(rates(result, group, name)).median
            keras, torch = (
                spread(ratios(result, group, name, peer)).median for peer in (groups.KERAS, plain)
            )
            row.append(f"{rate:,.0f} ({keras:.2f} ×, {torch:.2f} ×)")
        rows.append(row)
    ours, scores = fast79(result, groups.OURS), accuracies(result, groups.OURS)
    whole, reached = (
        spread(over(notebook(result, groups.KERAS, epochs), ours)) for epochs in (EPOCHS, REACHED)
    )
    m, took = result["machine"], spread(ours)
    head = ["training, images/s (× Keras, × PyTorch)", *(f"batch {b}" for b in groups.BATCHES)]
    return (
        f"{table(head, rows)}\n\n"
        f"`fast79` takes {took.median:.1f} s ({took.low:.1f} to {took.high:.1f}, n = {took.n}, "
        f"mean test accuracy {statistics.mean(scores):.4f}): **{whole.median:.0f} times** faster "
        f"than the notebook's 25 epochs on Keras, **{reached.median:.0f} times** faster than its "
        f"first nine, after which its own validation accuracy reaches 79 %. Medians of one run on "
        f"{processor(m)}, {m['cores']} cores, {m['cpu_capability']}, {m['threads']} threads."
    )


def peak(result: Result, group: str, name: str) -> int:
    """MiB."""
    mib: int = result["groups"][group]["entries"][name]["peak_mib"]
    return mib


def number(s: Spread, digits: int) -> str:
    """Median (q1–q3)."""
    if s.n == 1:
        return f"{s.median:,.{digits}f}"
    return f"{s.median:,.{digits}f} ({s.q1:,.{digits}f}–{s.q3:,.{digits}f})"


def times(s: Spread, digits: int = 2) -> str:
    """The same, of a ratio."""
    return number(s, digits)
