// The life of one transfer as its owner sees it: create, watch, cancel; repeated where the contract allows it.
import { randomUUID } from "node:crypto";
import { setTimeout as delay } from "node:timers/promises";

import { type Client, createClient } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";
import { RequestService, type Transfer, Transfer_State } from "@beamwire/gen/beamwire/request/v1/request_service_pb";

import { type Credentials, refusal } from "./credentials.js";
import { isUnavailable } from "./errors.js";

const ATTEMPTS = 5;
const FIRST_PAUSE_MS = 100;
const LONGEST_PAUSE_MS = 2_000;
const DEADLINE_MS = 15_000;
const ENDED = new Set([
  Transfer_State.SUCCEEDED,
  Transfer_State.CANCELLED,
  Transfer_State.FAILED,
  Transfer_State.EXPIRED,
]);

export type RequestClient = Client<typeof RequestService>;

/** A client of a facility's request service, over mutual TLS. Connects at its first call. */
export function connect(url: string, { key, chain, bundle, trustDomain }: Credentials): RequestClient {
  const transport = createGrpcTransport({
    baseUrl: url,
    defaultTimeoutMs: DEADLINE_MS,
    pingIntervalMs: 5_000,
    pingTimeoutMs: 3_000,
    nodeOptions: {
      key,
      cert: chain,
      ca: bundle,
      minVersion: "TLSv1.2",
      // The root may itself be signed by a parent, in whom nobody here believes.
      allowPartialTrustChain: true,
      checkServerIdentity: (host, certificate) => refusal(host, certificate, trustDomain),
    },
  });
  return createClient(RequestService, transport);
}

/** Creates a transfer. Every attempt has the same request id, so that however many arrive, there is one transfer. */
export async function createTransfer(client: RequestClient, transfer: Transfer): Promise<Transfer> {
  const request = { transfer, requestId: randomUUID() };
  return retried(() => client.createTransfer(request));
}

/** Cancels a transfer; one that has ended stays as it is. */
export async function cancelTransfer(client: RequestClient, name: string): Promise<Transfer> {
  const request = { name, requestId: randomUUID() };
  return retried(() => client.cancelTransfer(request));
}

/** Yields a transfer whenever its state changes, the terminal state last; takes up again a watch that broke. */
export async function* watchTransfer(client: RequestClient, name: string): AsyncGenerator<Transfer> {
  let etag = "";
  let state: Transfer_State | undefined;
  for (let failures = 0; ; ) {
    try {
      // A watch lasts as long as the transfer: no deadline.
      for await (const { transfer } of client.watchTransfer({ name, etag }, { timeoutMs: 0 })) {
        failures = 0;
        if (transfer !== undefined && transfer.state !== state) {
          state = transfer.state;
          yield transfer;
        }
        etag = transfer?.etag ?? etag;
      }
      if (state === undefined || !ENDED.has(state)) {
        throw new Error(`the watch of ${name} ended before the transfer did`);
      }
      return;
    } catch (error) {
      failures += 1;
      await pauseOrThrow(error, failures);
    }
  }
}

/** Makes a call up to five times as long as the service cannot be reached. */
export async function retried<T>(call: () => Promise<T>): Promise<T> {
  for (let failures = 1; ; failures += 1) {
    try {
      return await call();
    } catch (error) {
      await pauseOrThrow(error, failures);
    }
  }
}

async function pauseOrThrow(error: unknown, failures: number): Promise<void> {
  if (!isUnavailable(error) || failures >= ATTEMPTS) {
    throw error;
  }
  const pause = Math.min(FIRST_PAUSE_MS * 2 ** (failures - 1), LONGEST_PAUSE_MS);
  await delay(pause * (0.8 + 0.4 * Math.random()));
}
