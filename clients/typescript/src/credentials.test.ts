// Whom the program believes.
import assert from "node:assert/strict";
import { test } from "node:test";
import type { PeerCertificate } from "node:tls";

import { readCredentials, refusal, spiffeId } from "./credentials.js";
import { UsageError } from "./options.js";

function certificate(subjectaltname: string): PeerCertificate {
  return { subject: { CN: "localhost" }, subjectaltname } as unknown as PeerCertificate;
}

test("a service of the trust domain under the right name is believed", () => {
  const peer = certificate("DNS:localhost, URI:spiffe://facility.test/service/request");
  assert.equal(refusal("localhost", peer, "facility.test"), undefined);
});

for (const [wrong, names] of Object.entries({
  "another name": "DNS:elsewhere, URI:spiffe://facility.test/service/request",
  "another trust domain": "DNS:localhost, URI:spiffe://other.test/service/request",
  "a member that is no service": "DNS:localhost, URI:spiffe://facility.test/user/mallory",
  "no SPIFFE id": "DNS:localhost",
  "two SPIFFE ids": "DNS:localhost, URI:spiffe://facility.test/service/a, URI:spiffe://facility.test/service/b",
})) {
  test(`${wrong} is refused`, () => {
    assert.ok(refusal("localhost", certificate(names), "facility.test") instanceof Error);
  });
}

test("a SPIFFE id is read from among the other names", () => {
  assert.equal(spiffeId("DNS:a, URI:spiffe://facility.test/user/alice, IP Address:127.0.0.1")?.pathname, "/user/alice");
  assert.equal(spiffeId("URI:https://facility.test/user/alice"), undefined);
  assert.equal(spiffeId(undefined), undefined);
});

test("a directory without credentials is refused, saying what to do", () => {
  assert.throws(
    () => readCredentials("/nowhere"),
    (error) => error instanceof UsageError && /key\.pem.*enrol first/.test(error.message),
  );
});
