"""What a diagnosis says: findings, worst first, and what could not be looked at."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from textwrap import fill
from typing import Any

from normlab.text import counted, printable

SEVERITIES = ("note", "warning", "serious")


@dataclass(frozen=True)
class Finding:
    """One fault in one place.

    Attributes:
        rule: the rule's id, as in docs/doctor.md.
        where: the layer or tensor, by the model's own name for it.
        severity: `note`, `warning` or `serious`.
        evidence: what was seen, in numbers.
        remedy: what to do.
        source: who explains it.
    """

    rule: str
    where: str
    severity: str
    evidence: str
    remedy: str
    source: str


@dataclass(frozen=True)
class Diagnosis:
    """Findings about one model, worst first.

    Attributes:
        path, kind: what was examined and as what.
        normalizers: how many batch normalisations it has.
        checked: ids of the rules that could be checked.
        not_checked: ids of the others, each with what was missing.
        parts: of a file that holds several things, the state dicts that were examined, by the keys
            that lead to them, each with its number of batch normalisations.
        passed_over: what lies beside the weights and was not looked at.
        assumes: what was taken for granted because the file does not say it.
        caveats: sentences on what cannot be seen in such a source.
    """

    path: str
    kind: str
    normalizers: int
    findings: tuple[Finding, ...]
    checked: tuple[str, ...]
    not_checked: dict[str, str]
    parts: dict[str, int] = field(default_factory=dict)
    passed_over: tuple[str, ...] = ()
    assumes: str = ""
    caveats: tuple[str, ...] = ()

    @property
    def serious(self) -> bool:
        return any(f.severity == "serious" for f in self.findings)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self, width: int = 80) -> str:
        """The findings for people, in lines of at most `width`; a rule's places stand together.

        Names come from the file: what in them would command a terminal is replaced.
        """
        lines = [_wrap(self._heading(), width)]
        groups: dict[tuple[str, str], list[Finding]] = {}
        for f in self.findings:
            groups.setdefault((f.severity, f.rule), []).append(f)
        for (severity, rule), found in groups.items():
            lines += ["", _wrap(f"{severity.upper()}  {rule}", width)]
            lines += [_wrap(line, width, "  ") for line in _evidence(found)]
            lines.append(_wrap(f"Remedy: {found[0].remedy}", width, "  "))
            lines.append(_wrap(f"Source: {found[0].source}", width, "  "))
        reasons: dict[str, list[str]] = {}
        for rule, reason in self.not_checked.items():
            reasons.setdefault(reason, []).append(rule)
        lines += ["", _wrap(self._summary(), width)]
        lines += [_wrap(f"{caveat}.", width) for caveat in self.caveats]
        if reasons:
            missing = "; ".join(f"{', '.join(r)} (need {reason})" for reason, r in reasons.items())
            lines.append(_wrap(f"Not checked: {missing}.", width))
        if self.assumes:
            lines.append(_wrap(f"Taken for granted: {self.assumes}.", width))
        if self.passed_over:
            lines.append(_wrap(f"Passed over, unbuilt: {_some(self.passed_over)}.", width))
        return "".join(c if c.isprintable() or c == "\n" else "?" for c in "\n".join(lines))

    def _heading(self) -> str:
        examined = f"examined {counted(self.normalizers, 'batch normalisation')}"
        if self.parts:
            several = len(self.parts) > 1
            names = [f"{part} ({n})" if several else part for part, n in self.parts.items()]
            examined += f" in {counted(len(self.parts), 'state dict')}: {_some(names)}"
        return f"{self.path}: {self.kind}, {examined}"

    def _summary(self) -> str:
        total = f"{len(self.checked)} rules checked"
        if not self.findings:
            return f"Nothing found; {total}."
        counts = [
            f"{sum(f.severity == s for f in self.findings)} {s}" for s in reversed(SEVERITIES)
        ]
        return f"Found: {', '.join(counts)}; {total}."

    def __str__(self) -> str:
        return self.text()


def _some(names: Sequence[str]) -> str:
    """At most six names, and how many more there are."""
    more = [f"and {len(names) - 6} more"] if len(names) > 6 else []
    return ", ".join([*names[:6], *more])


def _evidence(found: list[Finding]) -> list[str]:
    """One line for each thing seen, behind the places where it was; at most six."""
    places: dict[str, list[str]] = {}
    for f in found:
        places.setdefault(f.evidence, []).append(f.where)
    lines = []
    for evidence, names in places.items():
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        lines.append(f"{', '.join(names[:4])}{more}: {evidence}")
    return lines if len(lines) <= 6 else [*lines[:6], f"… and {len(lines) - 6} more such lines"]


def _wrap(text: str, width: int, indent: str = "") -> str:
    return fill(
        printable(text),
        max(width, 20),
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_on_hyphens=False,
    )
