// The command line: what was asked for, or what is wrong with how it was asked.
import { parseArgs } from "node:util";

export const HELP = `Usage: node dist/transfer.js --address HOST:PORT --credentials DIR [--request FILE]

Creates a transfer and watches it to its end. Prints one line of JSON for each state, and the receipt last.
Exits with 0 if the transfer succeeded, 1 if it did not, 2 if it could not be understood what to do.
Ctrl-C cancels the transfer.

  --address HOST:PORT   where the facility answers
  --credentials DIR     the directory with key.pem, chain.pem and bundle.pem of an enrolled user
  --request FILE        a beamwire.request.v1.Transfer as JSON; 32 synthetic events if left out
  --help                this text
`;

export interface Options {
  /** Where the facility answers, as a URL. */
  readonly url: string;
  readonly credentials: string;
  readonly request: string | undefined;
}

/** Somebody asked for something that cannot be understood. */
export class UsageError extends Error {}

/** Reads the arguments after the program's name; "help" if that is what was asked for. */
export function parseOptions(args: readonly string[]): Options | "help" {
  const values = parse(args);
  if (values.help) {
    return "help";
  }
  if (values.address === undefined || values.credentials === undefined) {
    throw new UsageError("--address and --credentials are needed");
  }
  return { url: toUrl(values.address), credentials: values.credentials, request: values.request };
}

function parse(args: readonly string[]) {
  try {
    const options = {
      address: { type: "string" },
      credentials: { type: "string" },
      request: { type: "string" },
      help: { type: "boolean" },
    } as const;
    return parseArgs({ args: [...args], options }).values;
  } catch (error) {
    throw new UsageError(error instanceof Error ? error.message : String(error));
  }
}

function toUrl(address: string): string {
  if (!/^(\[[0-9a-fA-F:]+\]|[^\s:/@]+):\d{1,5}$/.test(address)) {
    throw new UsageError(`--address must be host:port, not ${address}`);
  }
  return `https://${address}`;
}
