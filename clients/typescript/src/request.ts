// What to ask for: a transfer as JSON in a file, or a small synthetic one.
import { readFileSync } from "node:fs";

import { fromJson, type JsonValue } from "@bufbuild/protobuf";
import { type Transfer, TransferSchema } from "@beamwire/gen/beamwire/request/v1/request_service_pb";

import { UsageError } from "./options.js";

const SYNTHETIC: JsonValue = {
  config: {
    event_source: {
      type: "SyntheticEventSource",
      parameters: { number_of_events: 32, shape: [64, 64] },
    },
    data_sources: { detector_data: { type: "SyntheticDetector" } },
    processing_pipeline: [{ type: "BatchProcessingPipeline", parameters: { batch_size: 8 } }],
  },
};

/** The transfer in a file of JSON, fields spelled as in the contract or in camelCase; a synthetic one without a file. */
export function loadTransfer(path: string | undefined): Transfer {
  if (path === undefined) {
    return fromJson(TransferSchema, SYNTHETIC);
  }
  try {
    return fromJson(TransferSchema, JSON.parse(readFileSync(path, "utf8")) as JsonValue);
  } catch (error) {
    throw new UsageError(`${path}: ${error instanceof Error ? error.message : String(error)}`);
  }
}
