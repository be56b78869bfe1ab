// The application's side of a callback: who sent it, and what it says.
/** Why a callback is not to be believed; answer it with 401. */ export class BadSignature extends Error {
  name = "BadSignature";
}
/**
 * The document of a callback, once its signatures hold: `X-Callback-Signature`, and the Standard
 * Webhooks headers, whose time must be within the last five minutes, so that a recorded callback
 * cannot be sent again later. `secret` is JOB_CALLBACK_SECRET; several while it is rotated.
 * Throws BadSignature, or SyntaxError for a body that is no JSON.
 */
export async function verifyCallback(request, secret, options = {}) {
  const sent = {
    headers: request.headers,
    body: new Uint8Array(await request.arrayBuffer())
  };
  for (const each of typeof secret === "string" ? [
    secret
  ] : secret){
    if (await isSigned(sent, each) && await isWebhook(sent, each, options)) {
      return JSON.parse(new TextDecoder().decode(sent.body));
    }
  }
  throw new BadSignature("the callback's signature does not hold");
}
/** Whether `X-Callback-Signature` is the secret's, for this body. */ async function isSigned({ headers, body }, secret) {
  const [, hex] = /^sha256=([0-9a-f]{64})$/.exec(headers.get("X-Callback-Signature") ?? "") ?? [];
  return Boolean(secret && hex) && await holds(utf8(secret), fromHex(hex), body);
}
/** Whether the Standard Webhooks headers are the secret's, for this body and this time. */ async function isWebhook({ headers, body }, secret, { toleranceS = 300, requireWebhook = true, now = Date.now }) {
  const [id, timestamp, signatures] = [
    "webhook-id",
    "webhook-timestamp",
    "webhook-signature"
  ].map((name)=>headers.get(name));
  if (!id && !timestamp && !signatures) return !requireWebhook;
  if (!id || !signatures || !/^\d{1,12}$/.test(timestamp ?? "")) return false;
  if (Math.abs(now() / 1000 - Number(timestamp)) > toleranceS) return false;
  const signed = join(utf8(`${id}.${timestamp}.`), body);
  for (const each of signatures.split(" ")){
    const [version, digest] = each.split(",");
    const bytes = version === "v1" ? fromBase64(digest ?? "") : undefined;
    if (bytes && await holds(webhookKey(secret), bytes, signed)) return true;
  }
  return false;
}
/** WebCrypto's own comparison, which takes the same time however near the signature is. */ async function holds(key, signature, text) {
  const algorithm = {
    name: "HMAC",
    hash: "SHA-256"
  };
  const imported = await crypto.subtle.importKey("raw", bytes(key), algorithm, false, [
    "verify"
  ]);
  return crypto.subtle.verify("HMAC", imported, bytes(signature), bytes(text));
}
/** Standard Webhooks hands out keys as `whsec_` and base64; any other secret is its own key. */ function webhookKey(secret) {
  const encoded = secret.startsWith("whsec_") ? fromBase64(secret.slice(6)) : undefined;
  return encoded ?? utf8(secret);
}
function utf8(text) {
  return new TextEncoder().encode(text);
}
function fromHex(text) {
  return Uint8Array.from(text.match(/../g) ?? [], (pair)=>parseInt(pair, 16));
}
function fromBase64(text) {
  try {
    return Uint8Array.from(atob(text), (letter)=>letter.charCodeAt(0));
  } catch  {
    return undefined;
  }
}
function join(first, second) {
  const joined = new Uint8Array(first.length + second.length);
  joined.set(first);
  joined.set(second, first.length);
  return joined;
}
/** The same bytes, which never lie in shared memory, as WebCrypto's types want to be sure of. */ function bytes(of) {
  return of;
}
