// Every test vector is read, or refused, as its index says.
import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { type DescMessage, fromBinary, type Message, toJson } from "@bufbuild/protobuf";
import { FrameHeaderSchema } from "@beamwire/gen/beamwire/stream/v1/frame_pb";
import { SignalSchema } from "@beamwire/gen/beamwire/stream/v1/link_pb";

import { readFrame } from "./frame.js";

interface Vector {
  file: string;
  is: "frame" | "signal" | "transcript";
  good: boolean;
  header?: unknown;
  signal?: unknown;
  // Those that a reader must know, or refuse the frame.
  codecs?: string[];
  steps?: { is: "greeting" | "frame" | "signal"; size: number }[];
}

const VECTORS = new URL("../../../tests/vectors/", import.meta.url);
const index = JSON.parse(readFileSync(new URL("index.json", VECTORS), "utf8")) as Vector[];
const readers = { frame: readFrame, signal: readSignal, greeting: readGreeting };

function readSignal(message: Uint8Array) {
  assert.equal(Buffer.from(message.subarray(0, 4)).toString("latin1"), "BWSG");
  return fromBinary(SignalSchema, message.subarray(4));
}

function readGreeting(message: Uint8Array) {
  assert.match(Buffer.from(message).toString("latin1"), /^\0SP\0\0[\x10\x50\x51]\0\0$/);
}

function same<T extends DescMessage>(schema: T, message: Message, expected: unknown) {
  assert.deepEqual(toJson(schema, message as never, { useProtoFieldName: true }), expected);
}

function readTranscript(wire: Buffer, steps: NonNullable<Vector["steps"]>) {
  let at = 0;
  for (const step of steps) {
    if (step.is !== "greeting") {
      assert.equal(wire.readBigUInt64BE(at), BigInt(step.size));
      at += 8;
    }
    readers[step.is](wire.subarray(at, at + step.size));
    at += step.size;
  }
  assert.equal(at, wire.length);
}

test("there are vectors", () => {
  assert.ok(index.length >= 50);
});

for (const { file, is, good, header, signal, codecs, steps } of index) {
  test(file, () => {
    const content = readFileSync(new URL(file, VECTORS));
    if (is === "transcript") readTranscript(content, steps!);
    else if (codecs) assert.throws(() => readFrame(content), new RegExp(`codec ${codecs[0]!.toUpperCase()}`));
    else if (!good) assert.throws(() => readers[is](content));
    else if (is === "frame") same(FrameHeaderSchema, readFrame(content).header, header);
    else same(SignalSchema, readSignal(content), signal);
  });
}
