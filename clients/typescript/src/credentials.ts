// The files of an enrolled member, and whom they let it believe.
import { X509Certificate } from "node:crypto";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { checkServerIdentity, type PeerCertificate } from "node:tls";

import { UsageError } from "./options.js";

export interface Credentials {
  readonly key: Buffer;
  readonly chain: Buffer;
  readonly bundle: Buffer;
  /** The trust domain of the member: the one whose services it talks to. */
  readonly trustDomain: string;
}

/** Reads key.pem, chain.pem and bundle.pem of a directory. */
export function readCredentials(directory: string): Credentials {
  const [key, chain, bundle] = ["key.pem", "chain.pem", "bundle.pem"].map((name) => read(join(directory, name)));
  if (key === undefined || chain === undefined || bundle === undefined) {
    throw new UsageError(`${directory} has no credentials`);
  }
  const certificate = new X509Certificate(chain);
  const identity = spiffeId(certificate.subjectAltName);
  if (identity === undefined) {
    throw new UsageError(`${join(directory, "chain.pem")}: the certificate has no SPIFFE id`);
  }
  if (new Date(certificate.validTo) < new Date()) {
    throw new UsageError(`the certificate of ${identity.href} ended ${certificate.validTo}; renew it, or enrol again`);
  }
  return { key, chain, bundle, trustDomain: identity.host };
}

function read(path: string): Buffer {
  try {
    return readFileSync(path);
  } catch (error) {
    throw new UsageError(`${error instanceof Error ? error.message : String(error)}; enrol first`);
  }
}

/** The one SPIFFE id among the names of a certificate; undefined if there is none or more than one. */
export function spiffeId(subjectAltName: string | undefined): URL | undefined {
  const uris = (subjectAltName ?? "").split(", ").filter((name) => name.startsWith("URI:"));
  const [only] = uris.map((name) => name.slice("URI:".length));
  return uris.length === 1 && only?.startsWith("spiffe://") ? new URL(only) : undefined;
}

/** Why a server is not to be believed; undefined if its name is right and it is a service of the trust domain. */
export function refusal(host: string, certificate: PeerCertificate, trustDomain: string): Error | undefined {
  const wrongName = checkServerIdentity(host, certificate);
  if (wrongName !== undefined) {
    return wrongName;
  }
  const identity = spiffeId(certificate.subjectaltname);
  if (identity?.host !== trustDomain || !identity.pathname.startsWith("/service/")) {
    return new Error(`${host} is ${identity?.href ?? "nobody"}, which is no service of ${trustDomain}`);
  }
  return undefined;
}
