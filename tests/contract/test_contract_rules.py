"""Checks every rule of the contract that can be read from its descriptor set; docs/contract.md states them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from google.protobuf.descriptor_pb2 import FieldDescriptorProto

from beamwire.common.v1 import access_pb2

if TYPE_CHECKING:
    from tests.contract.conftest import Contract, Message

PROTOS: Final = Path(__file__).resolve().parents[2] / "protos"
MESSAGE: Final = FieldDescriptorProto.TYPE_MESSAGE
STRING: Final = FieldDescriptorProto.TYPE_STRING
NUMBERS: Final = {
    FieldDescriptorProto.TYPE_DOUBLE,
    FieldDescriptorProto.TYPE_FLOAT,
    FieldDescriptorProto.TYPE_INT32,
    FieldDescriptorProto.TYPE_INT64,
    FieldDescriptorProto.TYPE_UINT32,
    FieldDescriptorProto.TYPE_UINT64,
}
TIMESTAMP: Final = ".google.protobuf.Timestamp"
DURATION: Final = ".google.protobuf.Duration"
READING_VERBS: Final = (
    *("Get", "List", "Watch", "Tail", "Describe", "Explain", "Check", "Who", "Introduce", "Estimate", "Download"),
)
UNITS: Final = ("_bytes", "_count", "_frames")
# Numbers that count or measure nothing, so that no unit belongs to their names.
PURE_NUMBERS: Final = {
    "authority_generation",
    "batch_size",
    "consumer",
    "delivery",
    "epoch",
    # The unit is in the middle.
    "cores_per_process",
    "events_per_second",
    "gpus_per_process",
    # In the units of the array, whatever they are.
    "error_bound",
    "event_ids",
    "exit_code",
    "first_missing_sequence",
    "first_sequence",
    "generation",
    "last_sequence",
    "number",
    "page_size",
    # Counts the runs of a job.
    "step",
    "processes_per_node",
    "producer",
    "sequence",
    "shape",
    "shard",
    "stored_sequence",
    "version",
}
# Their answers are secrets, and must not be kept for the sake of repeating the call.
SECRET_ANSWERS: Final = {
    "CreateDelegationToken": "beamwire.certificate.v1.DelegationToken",
    "CreateJoinToken": "beamwire.certificate.v1.JoinToken",
    "IssueTicket": "beamwire.buffer.v1.Ticket",
}
# Repeating these changes nothing: they say what shall be there, or what is so.
REPEATABLE: Final = {"ReportJob", "UploadFile"}
# Stands in for a data connection: it streams both ways, and is taken up again by what it says.
DATA_CONNECTIONS: Final = {"Consume"}
# Tells of all resources of its kind, which have no life of their own.
COLLECTION_WATCHES: Final = {"WatchTrustBundles"}
# What is listed is no resource: it has no life of its own.
PART_LISTS: Final = {"ListBackends", "ListJobFiles"}


def snake(name: str) -> str:
    """`TrustBundle` as `trust_bundle`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def plural(message: Message) -> str:
    """The field that holds several of a resource: `trust_bundles`."""
    assert message.resource is not None
    return snake(message.resource.plural)


def test_the_set_holds_every_file(contract: Contract) -> None:
    on_disk = {str(path.relative_to(PROTOS)) for path in (PROTOS / "beamwire").rglob("*.proto")}
    assert {file.name for file in contract.files} == on_disk


def test_packages_are_directories_and_versions(contract: Contract) -> None:
    for file in contract.files:
        assert str(Path(file.name).parent).replace("/", ".") == file.package
        assert re.fullmatch(r"beamwire\.[a-z]+\.v1", file.package)


def test_one_service_per_api_named_after_it(contract: Contract) -> None:
    for file in contract.files:
        api = file.package.split(".")[1]
        expected = [f"{api.capitalize()}Service"] if file.name.endswith(f"{api}_service.proto") else []
        assert [service.name for service in file.service] == expected
    assert sum(len(file.service) for file in contract.files) == 4


def test_every_element_has_a_comment(contract: Contract) -> None:
    assert [element.name for element in contract.elements if not element.comment] == []
    assert len(contract.elements) > 300


def test_every_method_says_who_may_call_it(contract: Contract) -> None:
    for method in contract.methods:
        assert method.proto.options.HasExtension(access_pb2.access), method.name
        roles = list(method.proto.options.Extensions[access_pb2.access].roles)
        assert roles, method.name
        assert access_pb2.ROLE_UNSPECIFIED not in roles, method.name
        assert len(set(roles)) == len(roles), method.name


def test_only_enrolment_is_open_to_strangers(contract: Contract) -> None:
    open_to_all = {m.proto.name for m in contract.methods if m.proto.options.Extensions[access_pb2.access].anonymous}
    assert open_to_all == {"EnrollMember", "GetTrustBundle", "WatchTrustBundles"}


def test_changing_methods_are_idempotent_by_request_id(contract: Contract) -> None:
    for method in contract.methods:
        name = method.proto.name
        repeats = name not in {*SECRET_ANSWERS, *DATA_CONNECTIONS, *REPEATABLE}
        changes = repeats and not name.startswith(READING_VERBS)
        assert method.request.has("request_id", STRING, "OPTIONAL") == changes, method.name


def test_requests_have_their_methods_names(contract: Contract) -> None:
    for method in contract.methods:
        package = method.name.rsplit(".", 2)[0]
        assert method.request.name == f"{package}.{method.proto.name}Request"
        assert method.response.resource or method.response.name in {
            f"{package}.{method.proto.name}Response",
            SECRET_ANSWERS.get(method.proto.name),
        }


def test_only_what_has_no_bound_streams(contract: Contract) -> None:
    for method in contract.methods:
        both_ways = method.proto.name in DATA_CONNECTIONS
        answers = both_ways or method.proto.name.startswith(("Watch", "Tail", "Download"))
        asks = both_ways or method.proto.name.startswith("Upload")
        assert method.proto.server_streaming == answers, method.name
        assert method.proto.client_streaming == asks, method.name


def test_create(contract: Contract) -> None:
    created = [m for m in contract.methods if m.verb_and_noun[0] == "Create" and m.response.resource]
    for method in created:
        field = snake(method.verb_and_noun[1])
        assert method.response.name.endswith(f".{method.verb_and_noun[1]}")
        assert method.request.has(field, MESSAGE, "REQUIRED", method.response.name), method.name
        assert method.request.has(f"{field}_id", STRING, "OPTIONAL"), method.name
        assert method.request.has("validate_only", FieldDescriptorProto.TYPE_BOOL, "OPTIONAL"), method.name
        assert set(method.request.fields) == {field, f"{field}_id", "request_id", "validate_only"}
    assert len(created) == 3


@pytest.mark.parametrize("verb", ["Get", "Cancel", "Seal"])
def test_get_and_changes_of_state_return_the_resource(contract: Contract, verb: str) -> None:
    methods = [method for method in contract.methods if method.verb_and_noun[0] == verb]
    for method in methods:
        assert method.response.name.endswith(f".{method.verb_and_noun[1]}")
        assert method.response.resource is not None
        assert method.request.has("name", STRING, "REQUIRED"), method.name
        assert method.request.reference("name") == method.response.resource.type
    assert methods


def test_list(contract: Contract) -> None:
    plurals = {resource.resource.plural.lower(): resource for resource in contract.resources() if resource.resource}
    every = [method for method in contract.methods if method.verb_and_noun[0] == "List"]
    listed = [method for method in every if method.proto.name not in PART_LISTS]
    for method in listed:
        resource = plurals[method.verb_and_noun[1].lower()]
        assert list(method.request.fields) == ["page_size", "page_token", "filter"], method.name
        assert method.request.has("page_size", FieldDescriptorProto.TYPE_INT32, "OPTIONAL")
        assert method.request.has("page_token", STRING, "OPTIONAL")
        assert method.request.has("filter", STRING, "OPTIONAL")
        assert list(method.response.fields) == [plural(resource), "next_page_token"], method.name
        assert method.response.has(plural(resource), MESSAGE, type_name=resource.name)
        assert method.response.fields[plural(resource)].label == FieldDescriptorProto.LABEL_REPEATED
        assert method.response.has("next_page_token", STRING)
    assert len(listed) == 6


def test_delete(contract: Contract) -> None:
    deleted = [method for method in contract.methods if method.verb_and_noun[0] == "Delete"]
    for method in deleted:
        assert list(method.request.fields) == ["name", "request_id"], method.name
        assert method.request.has("name", STRING, "REQUIRED")
        assert list(method.response.fields) == [], method.name
    assert len(deleted) == 3


def test_watch(contract: Contract) -> None:
    every = [method for method in contract.methods if method.verb_and_noun[0] == "Watch"]
    watched = [method for method in every if method.proto.name not in COLLECTION_WATCHES]
    for method in watched:
        field = snake(method.verb_and_noun[1])
        assert list(method.request.fields) == ["name", "etag"], method.name
        assert method.request.has("name", STRING, "REQUIRED")
        assert method.request.has("etag", STRING, "OPTIONAL")
        assert list(method.response.fields) == [field], method.name
        inner = contract.messages[method.response.fields[field].type_name.lstrip(".")]
        assert inner.has_life, method.name
    with_life = [resource for resource in contract.resources() if resource.has_life]
    assert len(watched) == len(with_life) == 3


def test_resources_are_named_after_themselves(contract: Contract) -> None:
    for message in contract.resources():
        resource = message.resource
        assert resource is not None
        name = message.proto.name
        assert resource.type == f"beamwire.org/{name}"
        assert resource.singular == name[0].lower() + name[1:]
        assert resource.plural == f"{resource.singular}s"
        assert list(resource.pattern) == [f"{resource.plural}/{{{snake(name)}}}"]
        assert message.proto.field[0].name == "name"
        assert message.proto.field[0].number == 1
        assert message.behavior("name") == {"IDENTIFIER"}
    assert len(contract.resources()) == 6


def test_resources_that_change_say_when_whose_and_why(contract: Contract) -> None:
    for message in contract.resources():
        if not message.has_life:
            continue
        state = f"{message.name}.State"
        assert message.has("state", FieldDescriptorProto.TYPE_ENUM, "OUTPUT_ONLY", state), message.name
        assert message.has("etag", STRING, "OUTPUT_ONLY"), message.name
        assert message.has("create_time", MESSAGE, "OUTPUT_ONLY", TIMESTAMP[1:]), message.name
        assert message.has("update_time", MESSAGE, "OUTPUT_ONLY", TIMESTAMP[1:]), message.name
        assert message.has("error", MESSAGE, "OUTPUT_ONLY", "google.rpc.Status"), message.name
        assert message.has("owner", STRING), message.name


def test_enums_are_prefixed_and_begin_with_unspecified(contract: Contract) -> None:
    for name, enum in contract.enums.items():
        prefix = snake(enum.name).upper() + "_"
        assert (enum.value[0].name, enum.value[0].number) == (f"{prefix}UNSPECIFIED", 0), name
        assert [value.name for value in enum.value if not value.name.startswith(prefix)] == []


def test_field_behavior_is_on_every_field_a_caller_fills(contract: Contract) -> None:
    messages = {**contract.requested(), **{message.name: message for message in contract.resources()}}
    silent = [f"{m.name}.{name}" for m in messages.values() for name in m.fields if len(m.behavior(name)) != 1]
    assert silent == []
    assert "beamwire.request.v1.Component" in messages


def test_answers_have_no_field_behavior(contract: Contract) -> None:
    filled = contract.requested()
    for method in contract.methods:
        if method.response.resource is None and method.response.name not in filled:
            assert [name for name in method.response.fields if method.response.behavior(name)] == [], method.name


def test_names_of_resources_say_of_which(contract: Contract) -> None:
    types = {message.resource.type for message in contract.resources() if message.resource}
    for message in {**contract.requested(), **{m.name: m for m in contract.resources()}}.values():
        for field in message.proto.field:
            names_one = field.type == STRING and f"beamwire.org/{field.name.capitalize()}" in types
            if names_one or (field.name == "name" and message.resource is None):
                assert message.reference(field.name) in types, f"{message.name}.{field.name}"


def test_times_and_lengths_of_time_have_their_types(contract: Contract) -> None:
    for name, field in contract.fields():
        last = field.name.rsplit("_", 1)[-1]
        if field.type_name == TIMESTAMP:
            assert last == "time", name
        if last == "time":
            assert field.type_name == TIMESTAMP, name
        if last in {"duration", "ttl", "lease", "grace", "timeout", "interval"}:
            assert field.type_name == DURATION, name


def test_numbers_have_their_unit_in_their_name(contract: Contract) -> None:
    unitless = {
        name
        for name, field in contract.fields()
        if field.type in NUMBERS and not field.name.endswith(UNITS) and field.name not in PURE_NUMBERS
    }
    assert not unitless


def test_keys_never_travel(contract: Contract) -> None:
    forbidden = re.compile(r"(^|_)(key|keys|private|password|passphrase|secret|credential|credentials)(_|$)")
    carriers = {name for name, _ in contract.fields() if forbidden.search(name.rsplit(".", 1)[-1])}
    # The secrets of the contract: one is spent by the call that carries it, the other is kept and never shown.
    assert carriers == {"beamwire.certificate.v1.EnrollMemberRequest.secret", "beamwire.job.v1.Callback.secret"}
    assert contract.messages["beamwire.job.v1.Callback"].behavior("secret") == {"INPUT_ONLY"}
