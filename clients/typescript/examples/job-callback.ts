// The edge function `job-callback`: verifies a callback and stores its document, once.
//   deno run --allow-net --allow-env --allow-read job-callback.ts

import { BadSignature, type Callback, verifyCallback } from "../mod.ts";

/** In place of the application's table of jobs. */
const jobs = new Map<string, Callback>();

export async function receive(request: Request): Promise<Response> {
  try {
    const document = await verifyCallback(request, Deno.env.get("JOB_CALLBACK_SECRET") ?? "");
    if (jobs.get(document.job_id)?.status === "completed") {
      return Response.json({ success: true, skipped: "already completed" });
    }
    jobs.set(document.job_id, document);
    for (const { type, url, thumbnail_url, metadata } of document.assets) {
      // With STORAGE_URL=inline: the URL is the whole file. `fetch(url)` reads both kinds.
      const where = url.startsWith("data:") ? "in the document" : url;
      console.log(
        JSON.stringify({
          job: document.job_id,
          type,
          url: where,
          thumbnail_url,
          seed: metadata.seed,
        }),
      );
    }
    if (document.status === "failed") {
      console.log(JSON.stringify({ job: document.job_id, failed: document.error_message }));
    }
    return Response.json({ success: true });
  } catch (error) {
    const status = error instanceof BadSignature ? 401 : 400;
    return Response.json({ success: false, error: (error as Error).message }, { status });
  }
}

if (import.meta.main) {
  Deno.serve({ port: Number(Deno.env.get("PORT") ?? 8000), hostname: "127.0.0.1" }, receive);
}
