"""What was looked at and how it is: findings, and a report of them for people, programs and CI."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any
from xml.etree import ElementTree


class Severity(StrEnum):
    """How bad it is."""

    OK = "ok"
    # Nothing fails yet, or somebody has to know.
    WARNING = "warning"
    # Something does not work, or will not when the services start.
    ERROR = "error"


_EXIT_CODES = {Severity.OK: 0, Severity.WARNING: 1, Severity.ERROR: 2}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: `area` as in `certificates`, what it is about, how it is, and what to do."""

    severity: Severity
    area: str
    subject: str
    story: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.severity.value:8}{self.area}: {self.subject}: {self.story}"
        return f"{line}\n        -> {self.remedy}" if self.remedy else line


def ok(area: str, subject: str, story: str) -> Finding:
    """All is well."""
    return Finding(Severity.OK, area, subject, story)


def warning(area: str, subject: str, story: str, remedy: str) -> Finding:
    """Somebody has to know."""
    return Finding(Severity.WARNING, area, subject, story, remedy)


def error(area: str, subject: str, story: str, remedy: str) -> Finding:
    """Something does not work."""
    return Finding(Severity.ERROR, area, subject, story, remedy)


@dataclass(frozen=True, slots=True)
class Report:
    """All findings about one facility."""

    facility: str
    findings: tuple[Finding, ...]

    @property
    def worst(self) -> Severity:
        """The worst of them; OK if there are none."""
        return max((each.severity for each in self.findings), key=list(Severity).index, default=Severity.OK)

    @property
    def exit_code(self) -> int:
        """0 if all is well, 1 if somebody has to know something, 2 if something does not work."""
        return _EXIT_CODES[self.worst]

    def counts(self) -> dict[str, int]:
        """How many there are of each severity."""
        counted = Counter(each.severity for each in self.findings)
        return {severity.value: counted[severity] for severity in Severity}

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        findings = [asdict(each) | {"severity": each.severity.value} for each in self.findings]
        return {
            "facility": self.facility,
            "worst": self.worst.value,
            "counts": self.counts(),
            "findings": findings,
        }

    def to_junit(self) -> bytes:
        """For CI and dashboards that read JUnit: one test case for each finding, an error is a failure."""
        counts = self.counts()
        suite = ElementTree.Element(
            "testsuite",
            name=f"beamwired doctor {self.facility}",
            tests=str(len(self.findings)),
            failures=str(counts[Severity.ERROR]),
            errors="0",
            skipped="0",
        )
        for each in self.findings:
            case = ElementTree.SubElement(suite, "testcase", classname=each.area, name=_xml(each.subject))
            text = _xml(f"{each.story}\n{each.remedy}".strip())
            if each.severity is Severity.ERROR:
                ElementTree.SubElement(case, "failure", message=_xml(each.story)).text = text
            else:
                ElementTree.SubElement(case, "system-out").text = f"{each.severity.value}: {text}"
        document: bytes = ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True)
        return document


def report(facility: str, findings: Iterable[Finding]) -> Report:
    """Put findings together, the worst first, each area in the order in which it was looked at."""
    found = list(findings)
    order = list(Severity)
    return Report(facility, tuple(sorted(found, key=lambda each: -order.index(each.severity))))


def _xml(text: str) -> str:
    """Without the characters that XML cannot have."""
    return "".join(letter for letter in text if letter in "\n\t" or letter.isprintable())
