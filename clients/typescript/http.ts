// Chat over the worker's HTTP service, answered on the request.

import { type Connection, fetchAgain, RequestFailed } from "./endpoint.ts";
import type { ChatJob, Usage } from "./types.ts";

/** How long to wait for a reply; twice as long if it may have more than `LONG_REPLY_TOKENS`. */
const REPLY_MS = 45_000;
const LONG_REPLY_TOKENS = 512;
const STREAM_MS = 600_000;

/** A chat's payload without its type, which the route decides. */
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

/** `url` is `https://ENDPOINT_ID.api.runpod.ai`, or a pod's. `apiKey` is sent as the bearer. */
export interface FaceOptions extends Omit<Connection, "baseUrl"> {
  url: string;
  /** The worker's own key, if the bearer is the gateway's. */
  workerKey?: string;
}

/** Calls one worker's HTTP service. */
export class Face {
  readonly #options: FaceOptions;

  constructor(options: FaceOptions) {
    // A second try would come too late for the user.
    this.#options = { retry: { tries: 1 }, ...options };
  }

  /** The next reply of a conversation, in `response`. Throws RequestFailed with the error's text. */
  chat(call: ChatCall): Promise<Reply> {
    return this.#post("chat", call);
  }

  chatUnrestricted(call: ChatCall): Promise<Reply> {
    return this.#post("chat/unrestricted", call);
  }

  /** A better prompt, in `enhanced_prompt`. */
  enhance(call: ChatCall): Promise<Reply> {
    return this.#post("enhance", call);
  }

  /** A reply, piece by piece; the generator's value is the complete reply. */
  async *stream(call: ChatCall, route = "chat"): AsyncGenerator<string, Reply> {
    const unread = (answer: Response) => Promise.resolve(answer);
    const answer = await this.#fetch(route, { ...call, stream: true }, STREAM_MS, unread);
    for await (const { event, data } of events(answer)) {
      if (event === "error") throw new Error(String(data.error));
      if (event === "done") return data as unknown as Reply;
      if (typeof data.delta === "string") yield data.delta;
    }
    throw new RequestFailed(0, "the stream broke off");
  }

  #post(route: string, call: ChatCall): Promise<Reply> {
    const isLong = (call.max_tokens ?? 0) > LONG_REPLY_TOKENS;
    return this.#fetch(route, call, REPLY_MS * (isLong ? 2 : 1), (answer) => answer.json());
  }

  #fetch<T>(
    route: string,
    call: ChatCall,
    timeoutMs: number,
    read: (answer: Response) => Promise<T>,
  ): Promise<T> {
    const { url, apiKey, workerKey } = this.#options;
    const headers = {
      Authorization: `Bearer ${apiKey}`,
      "Content-Type": "application/json",
      ...(workerKey ? { "X-API-Key": workerKey } : {}),
    };
    const init = { method: "POST", headers, body: JSON.stringify(call) };
    const options = { timeoutMs, ...this.#options };
    return fetchAgain(`${url.replace(/\/$/, "")}/${route}`, init, options, read);
  }
}

async function* events(
  answer: Response,
): AsyncGenerator<{ event: string; data: Record<string, unknown> }> {
  const decoder = new TextDecoder();
  const reader = answer.body!.getReader();
  let buffer = "";
  try {
    for (;;) {
      // A broken connection ends the events, as a server that closes it does.
      const { value } = await reader.read().catch(() => ({ value: undefined }));
      if (!value) return;
      buffer += decoder.decode(value, { stream: true });
      const blocks = buffer.split("\n\n");
      buffer = blocks.pop()!;
      for (const block of blocks) {
        const lines = block.split("\n").map((line) => line.split(/: (.*)/s, 2));
        const { event = "message", data } = Object.fromEntries(lines.filter(([name]) => name));
        if (data) yield { event, data: JSON.parse(data) };
      }
    }
  } finally {
    // If the caller stops reading, close the connection: the worker then stops the job.
    await reader.cancel().catch(() => {});
  }
}
