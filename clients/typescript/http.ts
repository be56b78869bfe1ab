// The worker's HTTP service: chat, answered on the request, and jobs of any type.

import type { Typeless, Untyped } from "./client.ts";
import {
  type Connection,
  documentWith,
  fetchAgain,
  RequestFailed,
  type RequestLimits,
} from "./endpoint.ts";
import { FaceJob, type FaceJobName } from "./http_job.ts";
import type { ChatJob, Job, Usage } from "./types.ts";

/** How long to wait for a reply; twice as long if it may have more than `LONG_REPLY_TOKENS`. */
const REPLY_MS = 45_000;
const LONG_REPLY_TOKENS = 512;
const STREAM_MS = 600_000;

/**
 * The header in which RunPod's load balancer names the worker that answered, and in which a caller
 * asks for a worker (https://docs.runpod.io/serverless/load-balancing/worker-affinity).
 */
const WORKER_HEADER = "X-Runpod-Worker-Id";

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

/** Calls the HTTP service of one worker, or of several behind RunPod's load balancer. */
export class Face {
  readonly #options: FaceOptions;

  constructor(options: FaceOptions) {
    this.#options = options;
  }

  /** Queue a job of any type on a worker. Throws RequestFailed, also for a job that is refused. */
  submit(job: Job | Typeless, s3Config?: object): Promise<FaceJob>;
  submit<const T extends { type: string }>(
    job: T & Untyped<T>,
    s3Config?: object,
  ): Promise<FaceJob>;
  submit(job: object, s3Config?: object): Promise<FaceJob> {
    const { id, job_id, user_id } = job as Job;
    const input = { ...job, id: id || job_id || crypto.randomUUID() };
    const request = { body: s3Config ? { input, s3Config } : { input } };
    return this.#send("POST", "jobs", request, async (answer) => {
      const taken = await documentWith<{ job_id: string }>(answer, "job_id");
      const worker = answer.headers.get(WORKER_HEADER) ?? undefined;
      return this.job({ id: taken.job_id, userId: user_id ?? undefined, worker });
    }, namesJob);
  }

  /** A job that was submitted before. */
  job(name: FaceJobName): FaceJob {
    return new FaceJob(name, (method, rest, limits = {}) => {
      const user = name.userId ? `?user_id=${encodeURIComponent(name.userId)}` : "";
      const path = `job/${encodeURIComponent(name.id)}${rest}${user}`;
      const request = { worker: name.worker, ...limits };
      return this.#send(method, path, request, (answer) => documentWith(answer, "status"));
    });
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
    // A second try would come too late for the user.
    const limits = { timeoutMs, retry: { tries: 1 }, ...this.#options };
    return this.#send("POST", route, { body: call, ...limits }, read);
  }

  #send<T>(
    method: string,
    path: string,
    { body, worker, ...limits }: FaceRequest,
    read: (answer: Response) => Promise<T>,
    accepts?: (answer: Response) => Promise<boolean>,
  ): Promise<T> {
    const { url, apiKey, workerKey } = this.#options;
    const headers = {
      Authorization: `Bearer ${apiKey}`,
      "Content-Type": "application/json",
      ...(workerKey ? { "X-API-Key": workerKey } : {}),
      // Strict, since another worker does not know the job and would answer 404.
      ...(worker ? { [WORKER_HEADER]: `strict ${worker}` } : {}),
    };
    const init = { method, headers, ...(body ? { body: JSON.stringify(body) } : {}) };
    const options = { ...this.#options, ...limits };
    return fetchAgain(`${url.replace(/\/$/, "")}/${path}`, init, options, read, accepts);
  }
}

/** Whether a job was taken. One that fails at once is answered with the status of its failure. */
async function namesJob(answer: Response): Promise<boolean> {
  if (answer.ok) return true;
  const body = await answer.clone().json().catch(() => null);
  return typeof body?.job_id === "string";
}

interface FaceRequest extends RequestLimits {
  body?: object;
  worker?: string;
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
