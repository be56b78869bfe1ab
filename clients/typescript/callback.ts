// The application's side of a callback: who sent it, and what it says.

import type { Callback } from "./types.ts";

/** Why a callback is not to be believed; answer it with 401. */
export class BadSignature extends Error {
  override name = "BadSignature";
}

/**
 * The document of a callback, once its signatures hold. `secret` is JOB_CALLBACK_SECRET; several
 * while it is rotated. `X-Callback-Signature` must be there; the Standard Webhooks headers must
 * hold where any of them is, and be of the last five minutes, so that a recorded callback cannot
 * be sent again later. Throws BadSignature, or SyntaxError for a body that is no JSON.
 */
export async function verifyCallback(
  request: Request,
  secret: string | readonly string[],
  { toleranceS = 300, now = Date.now }: { toleranceS?: number; now?: () => number } = {},
): Promise<Callback> {
  const body = new Uint8Array(await request.arrayBuffer());
  const secrets = typeof secret === "string" ? [secret] : secret;
  for (const each of secrets) {
    if (await isSigned(request.headers, body, each, toleranceS, now() / 1000)) {
      return JSON.parse(new TextDecoder().decode(body)) as Callback;
    }
  }
  throw new BadSignature("the callback's signature does not hold");
}

async function isSigned(
  headers: Headers,
  body: Uint8Array,
  secret: string,
  toleranceS: number,
  nowS: number,
): Promise<boolean> {
  const [, hex] = /^sha256=([0-9a-f]{64})$/.exec(headers.get("X-Callback-Signature") ?? "") ?? [];
  if (!secret || !hex || !await holds(utf8(secret), fromHex(hex), body)) return false;
  const [id, timestamp, signatures] = ["webhook-id", "webhook-timestamp", "webhook-signature"]
    .map((name) => headers.get(name));
  if (!id && !timestamp && !signatures) return true;
  if (!id || !signatures || !/^\d{1,12}$/.test(timestamp ?? "")) return false;
  if (Math.abs(nowS - Number(timestamp)) > toleranceS) return false;
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
