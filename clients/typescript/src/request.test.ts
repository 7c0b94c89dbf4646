// What is asked for, with and without a file.
import assert from "node:assert/strict";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, test } from "node:test";

import { UsageError } from "./options.js";
import { loadTransfer } from "./request.js";

const directory = mkdtempSync(join(tmpdir(), "request-"));
after(() => rmSync(directory, { recursive: true }));

function file(name: string, text: string): string {
  const path = join(directory, name);
  writeFileSync(path, text);
  return path;
}

test("without a file, 32 synthetic events in batches of 8", () => {
  const { config } = loadTransfer(undefined);
  assert.equal(config?.eventSource?.type, "SyntheticEventSource");
  assert.deepEqual(config?.eventSource?.parameters, { number_of_events: 32, shape: [64, 64] });
  assert.deepEqual(Object.keys(config?.dataSources ?? {}), ["detector_data"]);
  assert.deepEqual(config?.processingPipeline[0]?.parameters, { batch_size: 8 });
});

test("a file may spell fields as the contract does or in camelCase", () => {
  const path = file("good.json", '{"process_count": 2, "config": {"maxEventCount": "9007199254740993"}, "lease": "90s"}');
  const transfer = loadTransfer(path);
  assert.equal(transfer.processCount, 2);
  assert.equal(transfer.config?.maxEventCount, 9007199254740993n);
  assert.equal(transfer.lease?.seconds, 90n);
});

for (const [wrong, text] of Object.entries({
  "no JSON": "process_count: 2",
  "an unknown field": '{"procces_count": 2}',
  "a wrong type": '{"process_count": "two"}',
})) {
  test(`${wrong} is refused, naming the file`, () => {
    const path = file("bad.json", text);
    assert.throws(() => loadTransfer(path), (error) => error instanceof UsageError && error.message.startsWith(path));
  });
}

test("a file that is not there is refused", () => {
  assert.throws(() => loadTransfer(join(directory, "absent.json")), UsageError);
});
