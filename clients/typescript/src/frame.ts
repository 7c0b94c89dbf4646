// Reads frames as docs/frame.md describes them.
import { fromBinary } from "@bufbuild/protobuf";
import { type Array as ArraySpec, Codec, FrameHeaderSchema, type FrameHeader, FrameKind } from "@beamwire/gen/beamwire/stream/v1/frame_pb";

/** A frame that was read; the payload and the segments of its arrays are parts of the message. */
export interface Frame {
  header: FrameHeader;
  payload: Uint8Array;
  arrays: Map<string, Uint8Array>;
  /** Those of a BUNDLE. */
  frames: Frame[];
}

const PREFIX_SIZE = 16;
const MAX_DIMENSIONS = 32;
const MAX_BYTES = 2n ** 62n;
const ARRAY_TYPE = /^(?:\|b1|\|[iu]1|<[iu][248]|<f[248]|<c(?:8|16)|\|S[1-9][0-9]{0,8}|<U[1-9][0-9]{0,7})$/;
const CRC_TABLE = Uint32Array.from({ length: 256 }, (_, byte) => {
  let value = byte;
  for (let bit = 0; bit < 8; bit++) value = value & 1 ? (value >>> 1) ^ 0x82f63b78 : value >>> 1;
  return value;
});

/** The CRC-32C of some bytes. */
export function crc32c(bytes: Uint8Array): number {
  let value = 0xffffffff;
  for (const byte of bytes) value = (value >>> 8) ^ CRC_TABLE[(value ^ byte) & 0xff]!;
  return (value ^ 0xffffffff) >>> 0;
}

/** Reads a message; throws an Error that says why it is corrupt. */
export function readFrame(message: Uint8Array): Frame {
  const view = viewOf(message);
  check(message.length >= PREFIX_SIZE && view.getUint32(0) === 0x42574652, "it is no frame");
  check(view.getUint32(4, true) === 1, "its version or its flags are unknown");
  const end = PREFIX_SIZE + view.getUint32(8, true);
  check(align(end) <= message.length, "its header does not fit");
  const encoded = message.subarray(PREFIX_SIZE, end);
  check(crc32c(encoded) === view.getUint32(12, true), "the checksum of its header is wrong");
  const header = fromBinary(FrameHeaderSchema, encoded);
  const payload = message.subarray(align(end));
  check(crc32c(payload) === header.payloadCrc32c, "the checksum of its payload is wrong");
  checkKind(header);
  const bundle = header.kind === FrameKind.BUNDLE;
  const arrays = header.mediaType !== "" || bundle ? new Map<string, Uint8Array>() : findArrays(header, payload);
  return { header, payload, arrays, frames: bundle ? findFrames(header, payload) : [] };
}

function check(right: boolean, why: string): asserts right {
  if (!right) throw new Error(`the frame is corrupt: ${why}`);
}

function viewOf(bytes: Uint8Array): DataView {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.length);
}

function align(position: number): number {
  return Math.ceil(position / 64) * 64;
}

function checkKind(header: FrameHeader): void {
  const { kind, eventCount, eventIds } = header;
  const data = kind === FrameKind.DATA;
  const bundle = kind === FrameKind.BUNDLE;
  check(kind >= FrameKind.HEADER && kind <= FrameKind.BUNDLE, "its kind is unknown");
  check(eventIds.length === (bundle ? 0 : eventCount), "it has not one id for each event");
  check(data || (header.arrays.length === 0 && header.mediaType === ""), "it carries data and is not DATA");
  check(data || bundle || eventCount === 0, "it has events and is not DATA");
  check((header.stream !== undefined) === (kind === FrameKind.HEADER), "exactly HEADER describes the stream");
  check((header.end !== undefined) === (kind === FrameKind.END), "exactly END says how it ended");
  check(header.mediaType === "" || header.arrays.length === 0, "it has arrays and a media type");
  const sizes = header.frameSizesBytes.length;
  check(bundle ? sizes >= 2 : sizes === 0, "exactly BUNDLE holds frames, two at least");
}

function findArrays(header: FrameHeader, payload: Uint8Array): Map<string, Uint8Array> {
  const found = new Map<string, Uint8Array>();
  let end = 0n;
  for (const array of header.arrays) {
    const { name, offsetBytes, sizeBytes } = array;
    if (array.codec !== Codec.UNSPECIFIED || array.errorBound !== 0) {
      throw new Error(`array ${name} is encoded with codec ${Codec[array.codec]}, which this program cannot decode`);
    }
    check(!found.has(name) && sizeOf(array) === sizeBytes, `array ${name} is not what it claims`);
    check(offsetBytes % 64n === 0n && offsetBytes >= end, `array ${name} is not where it can be`);
    end = offsetBytes + sizeBytes;
    check(end <= BigInt(payload.length), `array ${name} is not where it can be`);
    found.set(name, payload.subarray(Number(offsetBytes), Number(end)));
  }
  check(end === BigInt(payload.length), "its payload does not end with its arrays");
  const companions = new Set(header.arrays.map((array) => array.rowOffsets));
  for (const array of header.arrays) {
    if (array.rowOffsets !== "") checkRows(array, header, found);
    else check(companions.has(array.name) || array.shape[0] === BigInt(header.eventCount), `${array.name} has other rows`);
    checkText(array, found.get(array.name)!);
  }
  return found;
}

function sizeOf(array: ArraySpec): bigint {
  check(ARRAY_TYPE.test(array.dtype), `array ${array.name} has element type ${array.dtype}`);
  check(array.shape.length > 0 && array.shape.length <= MAX_DIMENSIONS, `array ${array.name} has no possible shape`);
  const item = BigInt(array.dtype.slice(2)) * (array.dtype[1] === "U" ? 4n : 1n);
  const extent = array.shape.reduce((product, axis) => product * (axis || 1n), item);
  check(extent <= MAX_BYTES, `array ${array.name} has no possible shape`);
  return array.shape.reduce((product, axis) => product * axis, item);
}

function checkRows(array: ArraySpec, header: FrameHeader, found: Map<string, Uint8Array>): void {
  const rows = header.arrays.find((other) => other.name === array.rowOffsets);
  const said = `array ${array.name} has no row offsets that divide it`;
  check(rows !== undefined && rows.dtype === "<i8" && rows.shape.length === 1, said);
  check(rows.shape[0] === BigInt(header.eventCount + 1), said);
  const view = viewOf(found.get(rows.name)!);
  let before = 0n;
  for (let at = 0; at < view.byteLength; at += 8) {
    const row = view.getBigInt64(at, true);
    check(at === 0 ? row === 0n : row >= before, said);
    before = row;
  }
  check(before === array.shape[0], said);
}

function checkText(array: ArraySpec, segment: Uint8Array): void {
  if (array.dtype[1] !== "U") return;
  const view = viewOf(segment);
  for (let at = 0; at < segment.length; at += 4) {
    check(view.getUint32(at, true) <= 0x10ffff, `array ${array.name} is not text`);
  }
}

function findFrames(header: FrameHeader, payload: Uint8Array): Frame[] {
  let end = 0;
  const frames = header.frameSizesBytes.map((size, number) => {
    const begin = align(end);
    end = begin + size;
    check(end <= payload.length, "its frames do not fit");
    const frame = readFrame(payload.subarray(begin, end));
    const { kind, epoch, producer, sequence } = frame.header;
    check(kind === FrameKind.DATA && epoch === header.epoch && producer === header.producer, "it bundles strangers");
    check(sequence === header.sequence + BigInt(number), "it bundles frames that do not follow each other");
    return frame;
  });
  const events = frames.reduce((sum, frame) => sum + frame.header.eventCount, 0);
  check(end === payload.length && events === header.eventCount, "its frames are not what it claims");
  return frames;
}
