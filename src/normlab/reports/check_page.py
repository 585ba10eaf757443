"""What `normlab data check` found, as a folder: a page to decide on, and lists."""

import base64
import csv
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from normlab.core.files import write_atomic, write_json
from normlab.core.places import make_folder
from normlab.curation import Check, as_record
from normlab.curation.check import Group
from normlab.reports.pages import render
from normlab.text import counted, have, printable, shell

MOST_GROUPS, MOST_LABELS, MOST_ODD = 300, 500, 100  # on the page; the lists have all
MOST_MEMBERS = 12
_SIDE = 160  # pixels of a photograph on the page
_PART = {"train": "training", "test": "test", "val": "validation"}


def write_check(found: Check, data: str, folder: Path) -> None:
    """Write `index.html`, `check.json` and `findings.csv` into `folder`."""
    make_folder(folder)
    write_json(folder / "check.json", as_record(found))
    write_atomic(folder / "findings.csv", _findings(found).encode())
    write_atomic(folder / "index.html", page(found, data))


def summary_lines(found: Check) -> list[str]:
    """What was found, in a few lines."""
    pictures, suspects = found.pictures, found.suspects
    tests = sum(part == "test" for part in pictures.parts)
    exact = sum(group.exact for group in found.groups)
    differ, leaked = sum(group.contradicts for group in found.groups), len(found.leaked)
    lines = [
        f"{counted(len(found.groups), 'group')} of copies, {exact:,} of them equal to the pixel; "
        f"{leaked:,} of {tests:,} test pictures {have(leaked)} a copy in another part; in "
        f"{counted(differ, 'group')} labels differ"
    ]
    if suspects is None:
        lines.append(f"labels were not looked at: {found.by}")
    else:
        lines.append(
            f"{counted(suspects.count, 'label')} in doubt ({suspects.count / len(pictures):.1%}), "
            f"by {found.by}, which are right on {suspects.accuracy:.1%} of pictures they have not "
            "seen: the worse they are, the more of these labels are right"
        )
    if pictures.groups is not None:
        lines.append(
            f"{counted(int(pictures.groups.max()) + 1, 'group')} by --group-by; no model judges "
            "the label of a picture after it has seen others of its group"
        )
    kinds = list(dict.fromkeys(oddity.kind for oddity in found.oddities))
    odd = [f"{sum(o.kind == kind for o in found.oddities)} {kind}" for kind in kinds]
    lines.append(f"odd pictures: {', '.join(odd) or 'none'}")
    lines += found.classes
    if pictures.passed:
        lines.append(f"{counted(len(pictures.passed), 'file')} passed over: no usable pictures")
    return lines


def page(found: Check, data: str) -> bytes:
    """The page, whole: it works from a file, and asks for nothing."""
    pictures = found.pictures
    names = pictures.class_names
    shown: dict[int, int] = {}
    sections = [
        section for section in (_copies(found), _labels(found), _odd(found)) if section["items"]
    ]
    for section in sections:
        for item in section["items"]:
            item["pictures"] = [shown.setdefault(i, len(shown)) for i in item["pictures"]]
        for action in section["actions"]:
            action["pictures"] = [shown.setdefault(i, len(shown)) for i in action["pictures"]]
    suspects = found.suspects
    doubted = set() if suspects is None else set(suspects.order[: suspects.count].tolist())
    sources = _sources(found, list(shown))
    rows = [
        {
            "name": pictures.names[i],
            "label": printable(names[pictures.labels[i]]),
            "part": _PART[pictures.parts[i]],
            "suggested": printable(names[suspects.suggested[i]])
            if suspects is not None and i in doubted
            else "",
            "source": source,
            "photo": pictures.files[i] is not None,
        }
        for i, source in zip(shown, sources, strict=True)
    ]
    content = {
        "id": hashlib.sha256("\n".join(pictures.names).encode()).hexdigest()[:16],
        "classes": [printable(name) for name in names],
        "pictures": rows,
        "sections": sections,
    }
    seconds = sum(found.seconds.values())
    exclude = ["--exclude", "decided.csv", "--relabel", "decided.csv"]
    by = [] if pictures.group_by is None else ["--group-by", pictures.group_by]
    text = json.dumps(content).replace("<", "\\u003c")
    return render(
        "data_check.html",
        title=f"{pictures.name}: what is odd in it",
        subtitle=f"{len(pictures):,} pictures, {len(names)} classes, looked at in {seconds:.0f} s",
        summary=summary_lines(found),
        command=shell(["normlab", "train", "--data", data, *by, *exclude]),
        planted=[(kind, f"{share:.0%}") for kind, share in found.copies.found.items()],
        classes=found.classes,
        passed=pictures.passed[:200],
        data=Markup(text),
    )


def _section(title: str, text: str, items: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    return {"title": title, "text": text, "items": items, "single": False, "actions": [], **more}


def _sureness(group: Group) -> str:
    """How sure a group is; a pair of equal pixels has no score."""
    return "some equal to the pixel" if np.isinf(group.score) else f"score {group.score:.1f}"


def _copies(found: Check) -> dict[str, Any]:
    parts, groups = found.pictures.parts, found.groups
    items = []
    for group in groups[:MOST_GROUPS]:
        facts = ["equal to the pixel" if group.exact else f"near copies, {_sureness(group)}"]
        facts += ["in several parts"] if group.leaks else []
        facts += ["labels differ"] if group.contradicts else []
        members = group.members
        if len(members) > MOST_MEMBERS:
            facts.append(f"{len(members)} pictures, {MOST_MEMBERS} shown")
            members = members[: MOST_MEMBERS // 2] + members[-MOST_MEMBERS // 2 :]
        items.append({"text": ", ".join(facts), "pictures": list(members)})
    tested = [g for g in groups if any(parts[i] == "test" for i in g.members)]
    leaked = {i for g in tested for i in g.members if parts[i] != "test"}
    on_page = {i for item in items for i in item["pictures"]}
    action = {
        "text": "Leave out the training and validation pictures that have a copy among the test "
        "pictures",
        "pictures": sorted(leaked & on_page),
    }
    return _section(
        f"Copies: {counted(len(groups), 'group')}",
        "Those in several parts or under several labels first, then the surest. "
        + _all_of(len(groups), MOST_GROUPS),
        items,
        actions=[action] if action["pictures"] else [],
    )


def _labels(found: Check) -> dict[str, Any]:
    suspects, pictures = found.suspects, found.pictures
    doubted = [] if suspects is None else suspects.order[: suspects.count].tolist()
    items = [
        {
            "text": f"{printable(pictures.class_names[pictures.labels[i]])}, or rather "
            f"{printable(pictures.class_names[suspects.suggested[i]])}?",
            "pictures": [i],
        }
        for i in doubted[:MOST_LABELS]
        if suspects is not None
    ]
    return _section(
        f"Labels in doubt: {len(doubted):,}",
        f"By {found.by}. The most doubtful first. " + _all_of(len(doubted), MOST_LABELS),
        items,
        single=True,
    )


def _odd(found: Check) -> dict[str, Any]:
    items = [
        {"text": f"{oddity.kind}: {oddity.why}", "pictures": [oddity.index]}
        for oddity in found.oddities[:MOST_ODD]
    ]
    text = "Odd is not wrong. " + _all_of(len(found.oddities), MOST_ODD)
    return _section(f"Odd pictures: {len(found.oddities):,}", text, items, single=True)


def _all_of(count: int, most: int) -> str:
    return f"The first {most} of {count:,}; findings.csv has all." if count > most else ""


def _sources(found: Check, chosen: Sequence[int]) -> list[str]:
    """The pictures as URLs with all in them: files at a size to look at, others as they are."""
    from normlab.data.pictures.decoding import Readers

    pictures = found.pictures
    files = [(i, pictures.files[i]) for i in chosen]
    large: dict[int, Any] = {}
    with Readers() as readers:
        present = [(i, file) for i, file in files if file is not None]
        read = readers.read([file for _, file in present], _SIDE)
        large = {i: small for (i, _), (small, _, _) in zip(present, read, strict=True)}
    return [_embedded(large.get(i), pictures.pixels[i]) for i in chosen]


def _embedded(photo: Any, pixels: Any) -> str:
    buffer, kind = io.BytesIO(), "png" if photo is None else "jpeg"
    image = Image.fromarray(np.asarray(pixels if photo is None else photo))
    image.save(buffer, kind, **({} if photo is None else {"quality": 80}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _findings(found: Check) -> str:
    """All that was found, a row for each picture and finding; decisions may be written into it."""
    pictures, suspects = found.pictures, found.suspects
    rows: list[Iterable[object]] = []

    def add(i: int, finding: str, detail: str, suggested: str = "") -> None:
        label = pictures.class_names[pictures.labels[i]]
        rows.append([pictures.names[i], "", suggested, pictures.parts[i], label, finding, detail])

    for number, group in enumerate(found.groups, 1):
        kind = "exact copy" if group.exact else "near copy"
        facts = "; across parts" * group.leaks + "; labels differ" * group.contradicts
        for i in group.members:
            add(i, kind, f"group {number}, {_sureness(group)}{facts}")
    if suspects is not None:
        for i in suspects.order[: suspects.count].tolist():
            suggested = pictures.class_names[suspects.suggested[i]]
            add(i, "label in doubt", f"probability {suspects.own[i]:.3f}", suggested)
    for oddity in found.oddities:
        add(oddity.index, oddity.kind, oddity.why)
    for name, why in pictures.passed:
        rows.append([name, "", "", "", "", "passed over", why])
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["file", "decision", "label", "part", "was", "finding", "detail"])
    writer.writerows([[printable(str(value)) for value in row] for row in rows])
    return buffer.getvalue()
