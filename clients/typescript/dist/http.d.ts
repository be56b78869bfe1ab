import { type Connection } from "./endpoint.js";
import type { ChatJob, Usage } from "./types.js";
/** A chat's payload; the route says what its type is. */
export type ChatCall = Omit<ChatJob, "type">;
export interface Reply {
    success: true;
    job_id: string;
    response?: string;
    enhanced_prompt?: string;
    finish_reason?: "stop" | "length";
    usage?: Usage;
    [key: string]: unknown;
}
/** `url` is `https://ENDPOINT_ID.api.runpod.ai`, or a pod's; `apiKey` goes in the bearer. */
export interface FaceOptions extends Omit<Connection, "baseUrl"> {
    url: string;
    /** The worker's own key, where the bearer is the gateway's. */
    workerKey?: string;
}
export declare class Face {
    #private;
    constructor(options: FaceOptions);
    /** The next reply of a conversation, in `response`. Throws RequestFailed with the error's text. */
    chat(call: ChatCall): Promise<Reply>;
    chatUnrestricted(call: ChatCall): Promise<Reply>;
    /** A better prompt, in `enhanced_prompt`. */
    enhance(call: ChatCall): Promise<Reply>;
    /** A reply, piece by piece, and at its end the whole. */
    stream(call: ChatCall, route?: string): AsyncGenerator<string, Reply>;
}
