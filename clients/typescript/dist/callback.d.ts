import type { Callback } from "./types.js";
/** Why a callback is not to be believed; answer it with 401. */
export declare class BadSignature extends Error {
    name: string;
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
export declare function verifyCallback(request: Request, secret: string | readonly string[], options?: VerifyOptions): Promise<Callback>;
