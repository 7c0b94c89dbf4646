"""What a client relies on around a call: the reasons of errors, and which calls are repeated."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import grpc
import pytest

from beamwire.common.v1 import reason_pb2
from beamwire.mesh.errors import Reason
from beamwire.mesh.rpc.channel import service_config
from beamwire.mesh.rpc.status import CODES

if TYPE_CHECKING:
    from tests.contract.conftest import Contract

ROOT: Final = Path(__file__).resolve().parents[2]
PROTOS: Final = ROOT / "protos"
SERVICE_FILES: Final = sorted(PROTOS.glob("beamwire/*/v1/*_service.proto"))


def test_each_error_reason_names_its_code(contract: Contract) -> None:
    comments = {element.name.rsplit(".", 1)[-1]: element.comment for element in contract.elements}
    for value in reason_pb2.ErrorReason.DESCRIPTOR.values[1:]:
        stated = comments[value.name].partition(":")[0]
        code = CODES[Reason[value.name.removeprefix("ERROR_REASON_")]]
        assert stated in {code.name, "In a resource", "In a stream"}, value.name
        assert (value.number >= 60) == stated.startswith("In a "), value.name


def test_the_page_about_the_contract_lists_each_reason_with_its_code() -> None:
    rows = dict(
        re.findall(r"^\| `([A-Z_]+)` \| ([A-Z_]+) \|", (ROOT / "docs" / "contract.md").read_text(), re.MULTILINE)
    )
    assert rows == {reason.name: code.name for reason, code in CODES.items()}


@pytest.mark.parametrize("proto", SERVICE_FILES, ids=lambda path: path.stem)
def test_service_configs_retry_each_method_when_nothing_was_done(contract: Contract, proto: Path) -> None:
    config = json.loads(proto.with_name(f"{proto.stem}_config.json").read_text())
    names = [f"{entry['service']}.{entry['method']}" for part in config["methodConfig"] for entry in part["name"]]
    package = str(proto.relative_to(PROTOS).parent).replace("/", ".")
    # Who streams to a service begins anew by what it has read, not by what it once said.
    assert names == [
        method.name
        for method in contract.methods
        if method.name.startswith(f"{package}.") and not method.proto.client_streaming
    ]
    for part in config["methodConfig"]:
        # The last two if nobody began to answer: whatever else our servers answer with them forbids it.
        retried = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED)
        assert part["retryPolicy"]["retryableStatusCodes"] == [code.name for code in retried]
        # gRPC makes at most five attempts whatever is asked for, and lets `timeout` fire early.
        assert 2 <= part["retryPolicy"]["maxAttempts"] <= 5
        assert set(part) == {"name", "retryPolicy"}


@pytest.mark.parametrize("proto", SERVICE_FILES, ids=lambda path: path.stem)
def test_our_own_channels_retry_as_the_service_configs_say(proto: Path) -> None:
    written = json.loads(proto.with_name(f"{proto.stem}_config.json").read_text())
    ours = service_config()
    assert ours["loadBalancingConfig"] == written["loadBalancingConfig"]
    policies = [part["retryPolicy"] for part in (*ours["methodConfig"], *written["methodConfig"])]
    assert policies == [policies[0]] * len(policies)
