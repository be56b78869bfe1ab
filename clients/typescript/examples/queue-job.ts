// The edge function `queue-job`: submits a user's job to its family's endpoint.
//   deno run --allow-net --allow-env --allow-read queue-job.ts

import { Client, familyOf, type Job, RequestFailed } from "../mod.ts";
import { push } from "./lists.ts";

const client = new Client({
  apiKey: Deno.env.get("RUNPOD_API_KEY") ?? "",
  baseUrl: Deno.env.get("RUNPOD_BASE_URL"),
  workerKey: Deno.env.get("WORKER_API_KEY"),
  endpoints: {
    sdxl: Deno.env.get("SDXL_ENDPOINT_ID"),
    chat: Deno.env.get("CHAT_ENDPOINT_ID"),
    wan: Deno.env.get("WAN_ENDPOINT_ID"),
  },
});

/** The families whose jobs go to the endpoints. Other jobs still go to their Redis lists. */
const moved = (Deno.env.get("MOVED_FAMILIES") ?? "sdxl,chat,wan,admin").split(",");

export async function queue(request: Request): Promise<Response> {
  const job = await request.json() as Job;
  try {
    if (!moved.includes(familyOf(job))) {
      await push(job);
      return Response.json({ jobId: job.id, status: "queued" });
    }
    const submitted = await client.submit(job);
    // Store `runpod` in the job's row: status, cancel and stream need it later.
    return Response.json({ jobId: job.id, status: "queued", runpod: submitted });
  } catch (error) {
    const status = error instanceof RequestFailed ? 503 : 400;
    return Response.json({ success: false, error: (error as Error).message }, { status });
  }
}

if (import.meta.main) {
  Deno.serve({ port: Number(Deno.env.get("PORT") ?? 8000), hostname: "127.0.0.1" }, queue);
}
