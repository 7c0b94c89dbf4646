// How the command line is read, and what is said when it cannot be.
import assert from "node:assert/strict";
import { test } from "node:test";

import { parseOptions, UsageError } from "./options.js";

const NEEDED = ["--address", "localhost:7443", "--credentials", "alice"];

test("an address becomes a URL", () => {
  assert.deepEqual(parseOptions(NEEDED), { url: "https://localhost:7443", credentials: "alice", request: undefined });
});

test("an IPv6 address is written in brackets", () => {
  const options = parseOptions(["--address", "[::1]:7443", "--credentials", "alice", "--request", "r.json"]);
  assert.deepEqual(options, { url: "https://[::1]:7443", credentials: "alice", request: "r.json" });
});

test("help needs nothing else", () => {
  assert.equal(parseOptions(["--help"]), "help");
});

for (const [wrong, args] of Object.entries({
  "nothing at all": [],
  "no credentials": ["--address", "localhost:7443"],
  "no port": ["--address", "localhost", "--credentials", "alice"],
  "a URL": ["--address", "https://localhost:7443/", "--credentials", "alice"],
  "a misspelt option": [...NEEDED, "--requst", "r.json"],
  "an argument too many": [...NEEDED, "r.json"],
})) {
  test(`${wrong} is refused`, () => {
    assert.throws(() => parseOptions(args), UsageError);
  });
}
