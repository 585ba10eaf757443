"""Build the documentation site into site/: `make docs`.

Reference pages come from the code: commands from their own help; Python, recipes, rules and exit
codes from docstrings. docs/ is staged with them. Links to files outside docs/ (CHANGELOG.md,
examples/) and to raw results are pointed to where the site has them. A link whose target does not
exist fails the build, as every warning of Sphinx does.
"""

import argparse
import inspect
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from posixpath import dirname, normpath, relpath

import click

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s:#]+)(#[^)\s]*)?(?:\s\"([^\"]*)\")?\)")
CODE = re.compile(r"(^```.*?^```|`[^`\n]*`)", re.DOTALL | re.MULTILINE)
OUTSIDE = ("README.md", "CHANGELOG.md", "LOG.md", "CONTRIBUTING.md", "SECURITY.md")


def stage(folder: Path) -> list[str]:
    """Write every page into `folder`, raw files into `folder/extra`; links without a target."""
    shutil.copytree(DOCS, folder, dirs_exist_ok=True)
    for raw in folder.glob("results/**/*.md"):
        raw.unlink()
    _list_all(folder / "index.md")
    for name in OUTSIDE:
        _write(folder / "project" / name, (ROOT / name).read_text(encoding="utf-8"))
    for name, make in PAGES.items():
        _write(folder / "reference" / f"{name}.md", make())
    for place in [DOCS / "results", *(p for p in DOCS.glob("results/**/*") if p.is_dir())]:
        name = place.relative_to(DOCS).as_posix()
        _write(folder / name / "index.md", listing(place, name))
    shutil.copytree(DOCS / "results", folder / "extra" / "results")
    shutil.copytree(DOCS / "learn", folder / "extra" / "learn", ignore=_pages, dirs_exist_ok=True)
    _copy(ROOT / "scripts" / "learn_data.py", folder / "extra/project/scripts/learn_data.py")
    broken: list[str] = []
    for page in sorted(folder.glob("**/*.md")):
        here = page.relative_to(folder).as_posix()
        text = page.read_text(encoding="utf-8")
        page.write_text(mended(text, here, folder, broken), encoding="utf-8")
    return broken


def _list_all(index: Path) -> None:
    """Put pages that the index forgot at the end of its guides."""
    text = index.read_text(encoding="utf-8")
    named = set(re.findall(r"^[\w/-]+$", text, re.MULTILINE)) | {"index"}
    more = [p.stem for p in sorted(DOCS.glob("*.md")) if p.stem not in named]
    index.write_text(text.replace("\nserve\n", "\n".join(["\nserve", *more, ""])), encoding="utf-8")


def _pages(_: str, names: list[str]) -> set[str]:
    return {n for n in names if n.endswith(".md")}


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def mended(text: str, here: str, folder: Path, broken: list[str]) -> str:
    """The page with its links pointed to where the site has their targets; code stays as it is."""
    real = here.removeprefix("project/") if here.startswith("project/") else f"docs/{here}"

    def mend(found: re.Match[str]) -> str:
        picture, words, target, anchor = found[1], found[2], found[3], found[4] or ""
        title = f' title="{found[5]}"' if found[5] else ""
        if target.startswith("mailto"):
            return found[0]
        wanted = normpath(f"{dirname(real)}/{target}".lstrip("/"))
        inside = wanted.removeprefix("docs/") if wanted.startswith("docs/") else f"project/{wanted}"
        if (folder / inside).is_dir():
            inside += "/index.md"
        url = relpath(inside, dirname(here) or ".")
        if picture:
            source = folder / inside
            if not source.exists():
                broken.append(f"{here}: {target}")
            return f"![{words}]({url})"
        if (folder / inside).suffix == ".md" and (folder / inside).exists():
            return f"[{words}]({url}{anchor})"
        if (folder / "extra" / inside).exists():
            return f'<a href="{url}"{title}>{words.replace("`", "")}</a>'
        if (folder / inside).exists():
            _copy(folder / inside, folder / "extra" / inside)
            return f'<a href="{url}"{title}>{words.replace("`", "")}</a>'
        if wanted[0] != "." and (ROOT / wanted).is_file():
            _copy(ROOT / wanted, folder / "extra" / inside)
            return f'<a href="{url}"{title}>{words.replace("`", "")}</a>'
        broken.append(f"{here}: {target}")
        return found[0]

    parts = CODE.split(text)  # code at the odd places
    return "".join(part if n % 2 else LINK.sub(mend, part) for n, part in enumerate(parts))


def listing(folder: Path, name: str) -> str:
    """A page that lists a folder of raw results."""
    parts = [
        "---\nno-search: true\n---",
        f"# {'Raw results' if name == 'results' else name}",
        "Raw results, as the commands wrote them.",
    ]
    rows = []
    for path in sorted(folder.iterdir()):
        target = f"{path.name}/index.md" if path.is_dir() else path.name
        rows.append(f"- [{path.name}{'/' if path.is_dir() else ''}]({target})")
    folders = [p.name for p in sorted(folder.iterdir()) if p.is_dir()]
    if folders:
        tree = "\n".join(f"{f}/index" for f in folders)
        rows.append(f"\n```{{toctree}}\n:hidden:\n\n{tree}\n```")
    return "\n\n".join(parts) + "\n\n" + "\n".join(rows) + "\n"


def commands() -> str:
    """The help of every command, as the terminal shows it."""
    from normlab.cli import cli

    parts = [
        "# Commands",
        "What `normlab COMMAND --help` prints, asked of the program when this page was built.",
        fenced(help_of(cli, "normlab")),
    ]

    def add(command: click.Command, name: str) -> None:
        parts.extend((f"## {name}", fenced(help_of(command, name))))
        if isinstance(command, click.Group):
            for word, inner in command.commands.items():
                add(inner, f"{name} {word}")

    for word, command in cli.commands.items():
        add(command, f"normlab {word}")
    return "\n\n".join(parts)


def help_of(command: click.Command, name: str) -> str:
    """Help text at 80 columns."""
    context = click.Context(command, info_name=name, terminal_width=80, max_content_width=80)
    return command.get_help(context)


def fenced(text: str, language: str = "text") -> str:
    """As a block of code."""
    return f"```{language}\n{text.rstrip()}\n```"


def recipes() -> str:
    """Every recipe: what it gives, and the settings that differ from the notebook's."""
    from normlab.recipes import RECIPES

    parts = [
        "# Recipes",
        "A recipe is every number that decides the weights of a training. `normlab train NAME` "
        "trains one; each of its settings is an option ([commands](commands.md)). What they "
        "reached over seeds stands in [the benchmarks](../benchmarks.md). The settings below are "
        "those that are not as `notebook` has them.",
    ]
    plain = RECIPES["notebook"]().settings()
    for name, make in RECIPES.items():
        parts.extend((f"## {name}", inspect.cleandoc(make.__doc__ or "")))
        mine = {k: v for k, v in make().settings().items() if v != plain.get(k)}
        rows = [f"| `--{k.replace('_', '-')}` | `{v}` |" for k, v in mine.items()]
        if rows and name != "notebook":
            parts.append("\n".join(("| setting | value |", "|---|---|", *rows)))
    return "\n\n".join(parts)


def rules() -> str:
    """Every rule of the doctor: what it finds, how bad that can be, what to do, who says so."""
    from normlab.diagnosis.rules import RULES

    parts = [
        "# The doctor's rules",
        "`normlab doctor` checks these; [the doctor](../doctor.md) says on what, and how to read a "
        "finding. *Up to* is the worst severity that the rule gives.",
        "| rule | what it finds | up to | what to do | source |",
        "|---|---|---|---|---|",
    ]
    for rule in RULES:
        cells = (f"`{rule.id}`", rule.title, rule.worst, rule.remedy, rule.source)
        parts.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    return "\n\n".join(parts[:2]) + "\n\n" + "\n".join(parts[2:])


def exit_codes() -> str:
    """What a command leaves with, from the classes of errors."""
    from normlab import errors

    rows = ["| code | when | class |", "|---:|---|---|", "| 0 | all went well | |"]
    kinds = [errors.NormlabError, errors.UserError, errors.DataError, errors.TooLargeError]
    for kind in (*kinds, errors.NonFiniteError):
        said = inspect.cleandoc(kind.__doc__ or "").split(";")[0].splitlines()[0]
        rows.append(f"| {kind.exit_code} | {said.rstrip('.')} | `{kind.__name__}` |")
    rows.append(
        "| 130, 143 | SIGINT (Ctrl-C) or SIGTERM asked it to end, and it ended in order "
        "| `Interrupted` |"
    )
    return "\n".join(
        (
            "# Exit codes",
            "",
            "An error is one line on standard error: what happened, the value received, what to "
            "do. There is no traceback. Commands whose answer is yes or no use 1 for no: `doctor` "
            "found something serious, `export` found that file and run differ, `predict` could not "
            "read a picture, `data verify` found a wrong hash.",
            "",
            *rows,
            "",
        )
    )


def python() -> str:
    """What `import normlab` offers, from signatures and docstrings, read without importing them."""
    import griffe

    import normlab

    package = griffe.load("normlab", search_paths=[ROOT / "src"], docstring_parser="google")
    parts = [
        "# Python",
        "What `import normlab` offers. Importing it loads no PyTorch; a name loads what it needs "
        "when it is first used.",
    ]
    for name in sorted(normlab.__all__, key=str.lower):
        found = package[name]
        parts.extend(entry(found.final_target if found.is_alias else found, f"normlab.{name}"))
    return "\n\n".join(parts)


def entry(found: object, name: str, level: int = 2) -> Iterator[str]:
    """A function or class: signature, docstring, public methods."""
    yield f"{'#' * level} {name}"
    kind = "class " if found.is_class else ""  # type: ignore[attr-defined]
    given = parameters(found)
    yield fenced(f"{kind}{name}({given})", "python")
    doc = found.docstring  # type: ignore[attr-defined]
    if doc is not None:
        for section in doc.parse("google", warnings=False):
            yield from said(section)
    if kind:
        for inner in found.members.values():  # type: ignore[attr-defined]
            public = not inner.name.startswith("_") and not inner.is_alias
            if public and inner.is_function and inner.docstring:
                yield from entry(inner, f"{name}.{inner.name}", level + 1)


def parameters(found: object) -> str:
    """The parameters as they stand in the source, one a line if they are many."""
    shown, starred = [], False
    for p in found.parameters:  # type: ignore[attr-defined]
        if p.name == "self":
            continue
        kind = str(p.kind.value)
        if kind == "keyword-only" and not starred and not any(s.startswith("*") for s in shown):
            shown.append("*")
            starred = True
        stars = {"variadic positional": "*", "variadic keyword": "**"}.get(kind, "")
        note = f": {p.annotation}" if p.annotation is not None else ""
        default = f" = {p.default}" if p.default is not None and not stars else ""
        shown.append(f"{stars}{p.name}{note}{default}")
    line = ", ".join(shown)
    return line if len(line) < 70 else "\n    " + ",\n    ".join(shown) + ",\n"


def said(section: object) -> Iterator[str]:
    """One section of a docstring as Markdown."""
    kind, value = section.kind.value, section.value  # type: ignore[attr-defined]
    if kind == "text":
        yield value.replace("][", "] [")
    elif kind == "admonition":
        yield f"**{section.title}**\n\n{value.contents}"  # type: ignore[attr-defined]
    elif kind == "examples":
        yield from (fenced(text, "python") if k.value == "examples" else text for k, text in value)
    elif kind in ("parameters", "attributes", "raises", "returns", "yields"):
        rows = []
        for item in value:
            head = getattr(item, "name", "") or str(item.annotation or "")
            text = " ".join(item.description.split()).replace("|", "\\|")
            rows.append(f"| {f'`{head}`' if head else ''} | {text} |")
        yield "\n".join((f"| {kind} | |", "|---|---|", *rows))


PAGES = {
    "commands": commands,
    "python": python,
    "recipes": recipes,
    "rules": rules,
    "exit-codes": exit_codes,
}


def reachable(html: str) -> str:
    """Give the theme's captions their level, and let the keyboard scroll what is too wide."""
    html = html.replace('role="heading">', 'role="heading" aria-level="2">')
    html = re.sub(r"<pre>", '<pre tabindex="0">', html)
    return html.replace('class="table-wrapper', 'tabindex="0" class="table-wrapper')


def build(target: Path) -> int:
    """Build the site into `target`; 0 if there was nothing to complain of."""
    from sphinx.cmd.build import main as sphinx

    with tempfile.TemporaryDirectory() as scratch:
        staged, work = Path(scratch, "source"), Path(scratch, "work")
        broken = stage(staged)
        for line in broken:
            print(f"broken link: {line}", file=sys.stderr)
        options = ["-W", "--keep-going", "-q", "-b", "html", "-d", str(work)]
        code = sphinx([*options, str(staged), str(target)])
        for page in target.glob("**/*.html"):
            page.write_text(reachable(page.read_text(encoding="utf-8")), encoding="utf-8")
    return int(code or bool(broken))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the documentation site.")
    parser.add_argument("--out", type=Path, default=ROOT / "site")
    sys.exit(build(parser.parse_args().out))
