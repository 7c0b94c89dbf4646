// The bytes of every release mean the same here as in Python, which wrote them.
import assert from "node:assert/strict";
import { readdirSync, readFileSync } from "node:fs";
import { test } from "node:test";

import { createRegistry, fromBinary, toJson } from "@bufbuild/protobuf";
import { file_beamwire_buffer_v1_buffer_service } from "@beamwire/gen/beamwire/buffer/v1/buffer_service_pb";
import { file_beamwire_certificate_v1_certificate_service } from "@beamwire/gen/beamwire/certificate/v1/certificate_service_pb";
import { file_beamwire_job_v1_job_service } from "@beamwire/gen/beamwire/job/v1/job_service_pb";
import { file_beamwire_request_v1_request_service } from "@beamwire/gen/beamwire/request/v1/request_service_pb";
import { file_beamwire_stream_v1_frame } from "@beamwire/gen/beamwire/stream/v1/frame_pb";
import { file_google_rpc_error_details } from "@beamwire/gen/google/rpc/error_details_pb";

const GOLDEN = new URL("../../../tests/contract/golden/", import.meta.url);
const registry = createRegistry(
  file_beamwire_buffer_v1_buffer_service,
  file_beamwire_certificate_v1_certificate_service,
  file_beamwire_job_v1_job_service,
  file_beamwire_request_v1_request_service,
  file_beamwire_stream_v1_frame,
  file_google_rpc_error_details,
);
const releases = readdirSync(GOLDEN).filter((name) => /^\d/.test(name));
const messages = releases.flatMap((release) =>
  readdirSync(new URL(`${release}/`, GOLDEN))
    .filter((name) => name.endsWith(".binpb"))
    .map((name) => `${release}/${name.slice(0, -".binpb".length)}`),
);

test("there are golden files", () => {
  assert.ok(messages.length >= 6);
});

for (const path of messages) {
  test(`${path} means what it meant`, () => {
    const schema = registry.getMessage(path.slice(path.indexOf("/") + 1));
    assert.ok(schema !== undefined);
    const message = fromBinary(schema, readFileSync(new URL(`${path}.binpb`, GOLDEN)));
    const expected: unknown = JSON.parse(readFileSync(new URL(`${path}.json`, GOLDEN), "utf8"));
    assert.deepEqual(toJson(schema, message, { registry, useProtoFieldName: true }), expected);
  });
}
