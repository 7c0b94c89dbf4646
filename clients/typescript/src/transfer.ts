#!/usr/bin/env node
// The program: creates a transfer, prints its states and its receipt, and cancels it on Ctrl-C.
import { toJson } from "@bufbuild/protobuf";
import { ReceiptSchema, type Transfer, Transfer_State } from "@beamwire/gen/beamwire/request/v1/request_service_pb";

import { readCredentials } from "./credentials.js";
import { problemIn, problemOf } from "./errors.js";
import { cancelTransfer, connect, createTransfer, type RequestClient, watchTransfer } from "./follow.js";
import { HELP, type Options, parseOptions, UsageError } from "./options.js";
import { loadTransfer } from "./request.js";

function print(line: object): void {
  process.stdout.write(`${JSON.stringify(line)}\n`);
}

function printState(transfer: Transfer): void {
  print({
    transfer: transfer.name,
    state: Transfer_State[transfer.state],
    ...(transfer.connectString && { connect_string: transfer.connectString }),
  });
}

function printEnd(transfer: Transfer): void {
  if (transfer.error !== undefined) {
    print({ error: problemIn(transfer.error) });
  }
  if (transfer.receipt !== undefined) {
    print({ receipt: toJson(ReceiptSchema, transfer.receipt, { useProtoFieldName: true }) });
  }
}

async function follow(client: RequestClient, wanted: Transfer): Promise<boolean> {
  const interrupted = new Promise<void>((resolve) => process.once("SIGINT", () => resolve()));
  const { name } = await createTransfer(client, wanted);
  interrupted.then(() => cancelTransfer(client, name)).catch((error: unknown) => print({ error: problemOf(error) }));
  let last: Transfer | undefined;
  for await (last of watchTransfer(client, name)) {
    printState(last);
  }
  if (last !== undefined) {
    printEnd(last);
  }
  return last?.state === Transfer_State.SUCCEEDED;
}

async function run({ url, credentials, request }: Options): Promise<number> {
  const wanted = loadTransfer(request);
  const client = connect(url, readCredentials(credentials));
  try {
    return (await follow(client, wanted)) ? 0 : 1;
  } catch (error) {
    print({ error: problemOf(error) });
    return 1;
  }
}

async function main(): Promise<number> {
  try {
    const options = parseOptions(process.argv.slice(2));
    if (options === "help") {
      process.stdout.write(HELP);
      return 0;
    }
    return await run(options);
  } catch (error) {
    if (error instanceof UsageError) {
      process.stderr.write(`${error.message}\n`);
      return 2;
    }
    throw error;
  }
}

// The connection is kept open for further calls, so the process would not end by itself.
process.exit(await main());
