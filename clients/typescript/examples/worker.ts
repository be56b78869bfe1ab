// A request to the chat worker, as each of the application's callers must send it.
//   deno run --allow-net --allow-env worker.ts https://ENDPOINT_ID.api.runpod.ai

/** `fetch` with both keys: RunPod's for its gateway, and the worker's own if it has one. */
export function fetchWorker(url: string, path: string, init: RequestInit = {}): Promise<Response> {
  const key = Deno.env.get("WORKER_API_KEY");
  const headers = {
    "Content-Type": "application/json",
    "Authorization": `Bearer ${Deno.env.get("RUNPOD_API_KEY")}`,
    ...(key ? { "X-API-Key": key } : {}),
  };
  return fetch(`${url}${path}`, { ...init, headers });
}

if (import.meta.main) {
  const answer = await fetchWorker(Deno.args[0], "/health", { signal: AbortSignal.timeout(5000) });
  console.log(await answer.text());
}
