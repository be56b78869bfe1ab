// The application's side of a callback: who sent it, and what it says.

import type { Callback } from "./types.ts";

/** Why a callback is not to be believed; answer it with 401. */
export class BadSignature extends Error {
  override name = "BadSignature";
}

export interface VerifyOptions {
  /** How old a callback may be, and how far the clocks may differ, in seconds. */
  toleranceS?: number;
  /** `false` also takes a callback without any `webhook-*` header, which has no time of its own:
   * whoever has recorded a callback can then leave those headers out and send it again, at any
   * time. For senders that sign with `X-Callback-Signature` alone, while there are any. */
  requireWebhook?: boolean;
  now?: () => number;
}

/**
 * The document of a callback, once its signatures hold: `X-Callback-Signature`, and the Standard
 * Webhooks headers, whose time must be within the last five minutes, so that a recorded callback
 * cannot be sent again later. `secret` is JOB_CALLBACK_SECRET; several while it is rotated.
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

/** Whether `X-Callback-Signature` is the secret's, for this body. */
async function isSigned({ headers, body }: Sent, secret: string): Promise<boolean> {
  const [, hex] = /^sha256=([0-9a-f]{64})$/.exec(headers.get("X-Callback-Signature") ?? "") ?? [];
  return Boolean(secret && hex) && await holds(utf8(secret), fromHex(hex), body);
}

/** Whether the Standard Webhooks headers are the secret's, for this body and this time. */
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

/** WebCrypto's own comparison, which takes the same time however near the signature is. */
async function holds(key: Uint8Array, signature: Uint8Array, text: Uint8Array): Promise<boolean> {
  const algorithm = { name: "HMAC", hash: "SHA-256" };
  const imported = await crypto.subtle.importKey("raw", bytes(key), algorithm, false, ["verify"]);
  return crypto.subtle.verify("HMAC", imported, bytes(signature), bytes(text));
}

/** Standard Webhooks hands out keys as `whsec_` and base64; any other secret is its own key. */
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

/** The same bytes, which never lie in shared memory, as WebCrypto's types want to be sure of. */
function bytes(of: Uint8Array): Uint8Array<ArrayBuffer> {
  return of as Uint8Array<ArrayBuffer>;
}
