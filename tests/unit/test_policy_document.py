"""docs/policy.md: every key is there with its default, and every example can be used."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from pydantic import BaseModel

from beamwire.mesh.policy import Policy
from beamwire.mesh.policy_file import (
    CertificateEntry,
    DelegationSection,
    Document,
    IntroductionEntry,
    PlacementEntry,
    QuotaEntry,
    RuleEntry,
)

TEXT = (Path(__file__).parents[2] / "docs" / "policy.md").read_text()
SECTIONS: dict[str, type[BaseModel]] = {
    "[[rule]]": RuleEntry,
    "[[rule.placement]]": PlacementEntry,
    "[[quota]]": QuotaEntry,
    "[[certificate]]": CertificateEntry,
    "[[introduction]]": IntroductionEntry,
    "[delegation]": DelegationSection,
}


def rows(section: str) -> dict[str, list[str]]:
    """The cells of the table below a heading, by the key."""
    _, _, rest = TEXT.partition(f"### `{section}`")
    body = re.split(r"^##", rest, maxsplit=1, flags=re.MULTILINE)[0]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in body.splitlines() if line[:2] == "| "]
    return {row[0].strip(" `"): row for row in cells[2:]}


@pytest.mark.parametrize("section", SECTIONS)
def test_every_key_is_told(section):
    keys = {field.alias or name for name, field in SECTIONS[section].model_fields.items()}
    assert rows(section).keys() == keys


@pytest.mark.parametrize("key", ["active_transfers", "active_buffers", "active_jobs"])
def test_the_defaults_of_quotas_are_those(key):
    assert rows("[[quota]]")[key][2] == f"`{QuotaEntry.model_fields[key].default}`"


@pytest.mark.parametrize("section", SECTIONS)
def test_every_example_of_a_key_can_be_used(section):
    entry = "\n".join(f"{key} = {row[3].strip(' |').strip('`')}" for key, row in rows(section).items() if key != "deny")
    above = '[[rule]]\nname = "r"\nidentities = ["user/*"]\n' if section == "[[rule.placement]]" else ""
    Policy.of("a.test", Document.model_validate(tomllib.loads(f"{above}{section}\n{entry}\n")))


def test_every_example_can_be_used():
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", TEXT, re.MULTILINE)
    examples = [re.sub(r"^    ", "", block, flags=re.MULTILINE) for block in blocks if "[[rule]]" in block]
    assert len(examples) == 4
    for example in examples:
        policy = Policy.of("a.test", Document.model_validate(tomllib.loads(example)))
        assert policy.rules
