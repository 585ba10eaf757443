"""What a diagnosis says: findings, worst first, and what could not be looked at."""

from dataclasses import asdict, dataclass
from textwrap import fill
from typing import Any

SEVERITIES = ("note", "warning", "serious")


@dataclass(frozen=True)
class Finding:
    """One illness in one place.

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
    """

    path: str
    kind: str
    normalizers: int
    findings: tuple[Finding, ...]
    checked: tuple[str, ...]
    not_checked: dict[str, str]

    @property
    def serious(self) -> bool:
        return any(f.severity == "serious" for f in self.findings)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self, width: int = 80) -> str:
        """The findings for people, in lines of at most `width`; a rule's places stand together."""
        lines = [_wrap(f"{self.path}: {self.kind}, {self.normalizers} batch normalisations", width)]
        groups: dict[tuple[str, str], list[Finding]] = {}
        for f in self.findings:
            groups.setdefault((f.severity, f.rule), []).append(f)
        for (severity, rule), found in groups.items():
            lines += ["", _wrap(f"{severity.upper()}  {rule}", width)]
            lines += [_wrap(f"{f.where}: {f.evidence}", width, "  ") for f in found[:6]]
            if len(found) > 6:
                lines.append(_wrap(f"… and {len(found) - 6} more", width, "  "))
            lines.append(_wrap(f"Remedy: {found[0].remedy}", width, "  "))
            lines.append(_wrap(f"Source: {found[0].source}", width, "  "))
        lines += ["", _wrap(self._summary(), width)]
        reasons: dict[str, list[str]] = {}
        for rule, reason in self.not_checked.items():
            reasons.setdefault(reason, []).append(rule)
        for reason, rules in reasons.items():
            lines.append(_wrap(f"Not checked, for want of {reason}: {', '.join(rules)}", width))
        return "\n".join(lines)

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


def _wrap(text: str, width: int, indent: str = "") -> str:
    return fill(text, max(width, 20), initial_indent=indent, subsequent_indent=indent + "  ")
