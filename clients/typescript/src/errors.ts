// Errors of the service in words: the reason that the contract names, and the fields at fault.
import { Code, ConnectError } from "@connectrpc/connect";
import { anyUnpack } from "@bufbuild/protobuf/wkt";
import { BadRequestSchema, ErrorInfoSchema } from "@beamwire/gen/google/rpc/error_details_pb";
import type { Status } from "@beamwire/gen/google/rpc/status_pb";

export interface Problem {
  /** A reason of beamwire.common.v1.ErrorReason, or gRPC's own code if the service did not answer. */
  readonly reason: string;
  readonly message: string;
  readonly fields?: Readonly<Record<string, string>>;
}

/** What a failed call says. */
export function problemOf(error: unknown): Problem {
  const failure = ConnectError.from(error);
  const [info] = failure.findDetails(ErrorInfoSchema);
  const violations = failure.findDetails(BadRequestSchema).flatMap((detail) => detail.fieldViolations);
  return {
    reason: info?.reason ?? nameOf(failure.code),
    message: failure.rawMessage,
    ...(violations.length > 0 && { fields: Object.fromEntries(violations.map((v) => [v.field, v.description])) }),
  };
}

/** `DeadlineExceeded` as `DEADLINE_EXCEEDED`, which is how the contract spells it. */
function nameOf(code: Code): string {
  return Code[code].replace(/(?<=[a-z])(?=[A-Z])/g, "_").toUpperCase();
}

/** What the error in a resource says. */
export function problemIn(status: Status): Problem {
  const infos = status.details.map((detail) => anyUnpack(detail, ErrorInfoSchema));
  return { reason: infos.find((info) => info !== undefined)?.reason ?? "", message: status.message };
}

/** Whether the contract lets a call be made again. */
export function isUnavailable(error: unknown): boolean {
  return ConnectError.from(error).code === Code.Unavailable;
}
