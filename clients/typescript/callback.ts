// Verifies a callback and returns its document.

import type { Callback } from "./types.ts";

/** Thrown for a callback that the worker did not sign. Answer it with 401. */
export class BadSignature extends Error {
  override name = "BadSignature";
}

export interface VerifyOptions {
  /** How old a callback may be, and how much the clocks may differ, in seconds. */
  toleranceS?: number;
  /** `false` also accepts a callback without `webhook-*` headers. Without them a callback has no
   * time, so anybody who has recorded one can send it again at any time. Use `false` only for
   * senders that sign with `X-Callback-Signature` alone. */
  requireWebhook?: boolean;
  now?: () => number;
}

/**
 * The document of a callback, if its signatures are right: `X-Callback-Signature` and the Standard
 * Webhooks headers. Their time must be within the last five minutes, so that a recorded callback
 * cannot be sent again later. `secret` is JOB_CALLBACK_SECRET, or several during a rotation.
 * Throws BadSignature, or SyntaxError for a body that is no JSON.
 */
export async function verifyCallback(
  request: Request,
  secret: string | readonly string[],
  options: VerifyOptions = {},
): Promise<Callback> {
  const sent = {
    headers: request.headers,
    body: new Uint8Array(await request.arrayBuffer()),
  };
  for (const each of typeof secret === "string" ? [secret] : secret) {
    if (await isSigned(sent, each) && await isWebhook(sent, each, options)) {
      return JSON.parse(new TextDecoder().decode(sent.body)) as Callback;
    }
  }
  throw new BadSignature("the callback's signature does not hold");
}

interface Sent {
  headers: Headers;
  body: Uint8Array;
}

/** Whether `X-Callback-Signature` is the signature of this body with the secret. */
async function isSigned({ headers, body }: Sent, secret: string): Promise<boolean> {
  const [, hex] = /^sha256=([0-9a-f]{64})$/.exec(headers.get("X-Callback-Signature") ?? "") ?? [];
  return Boolean(secret && hex) && await holds(utf8(secret), fromHex(hex), body);
}

/** Whether the Standard Webhooks headers sign this body with the secret, at a time near now. */
async function isWebhook(
  { headers, body }: Sent,
  secret: string,
  { toleranceS = 300, requireWebhook = true, now = Date.now }: VerifyOptions,
): Promise<boolean> {
  const [id, timestamp, signatures] = ["webhook-id", "webhook-timestamp", "webhook-signature"]
    .map((name) => headers.get(name));
  if (!id && !timestamp && !signatures) return !requireWebhook;
  if (!id || !signatures || !/^\d{1,12}$/.test(timestamp ?? "")) return false;
  if (Math.abs(now() / 1000 - Number(timestamp)) > toleranceS) return false;
  const signed = join(utf8(`${id}.${timestamp}.`), body);
  for (const each of signatures.split(" ")) {
    const [version, digest] = each.split(",");
    const bytes = version === "v1" ? fromBase64(digest ?? "") : undefined;
    if (bytes && await holds(webhookKey(secret), bytes, signed)) return true;
  }
  return false;
}

/** Whether a signature is right, by WebCrypto's comparison in constant time. */
async function holds(key: Uint8Array, signature: Uint8Array, text: Uint8Array): Promise<boolean> {
  const algorithm = { name: "HMAC", hash: "SHA-256" };
  const imported = await crypto.subtle.importKey("raw", bytes(key), algorithm, false, ["verify"]);
  return crypto.subtle.verify("HMAC", imported, bytes(signature), bytes(text));
}

/** The key in a secret: the base64 after `whsec_` (Standard Webhooks), else the text itself. */
function webhookKey(secret: string): Uint8Array {
  const encoded = secret.startsWith("whsec_") ? fromBase64(secret.slice(6)) : undefined;
  return encoded ?? utf8(secret);
}

function utf8(text: string): Uint8Array {
  return new TextEncoder().encode(text);
}

function fromHex(text: string): Uint8Array {
  return Uint8Array.from(text.match(/../g) ?? [], (pair) => parseInt(pair, 16));
}

function fromBase64(text: string): Uint8Array | undefined {
  try {
    return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  } catch {
    return undefined;
  }
}

function join(first: Uint8Array, second: Uint8Array): Uint8Array {
  const joined = new Uint8Array(first.length + second.length);
  joined.set(first);
  joined.set(second, first.length);
  return joined;
}

/** The same bytes with the type that WebCrypto requires: not in shared memory. */
function bytes(of: Uint8Array): Uint8Array<ArrayBuffer> {
  return of as Uint8Array<ArrayBuffer>;
}
