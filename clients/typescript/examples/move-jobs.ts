// Moves jobs that are under way from the old workers to the endpoints, or back. Reads rows of the
// application's table of jobs, oldest first, as a JSON array.
//   deno run --allow-net --allow-env --allow-read move-jobs.ts to-endpoints < rows.json

import { Client, type Job, type JobName } from "../mod.ts";
import { push } from "./lists.ts";

/** The part of a row that is read here: its payload, and where it was submitted, if it was. */
export interface Row {
  payload: Job;
  runpod?: JobName;
}

/** Submit the jobs that the old workers have not done, each under its own id. */
export async function toEndpoints(client: Client, rows: readonly Row[]): Promise<JobName[]> {
  const names: JobName[] = [];
  for (const { payload } of rows) names.push((await client.submit(payload)).toJSON());
  return names;
}

/** Push the jobs that have not ended back to the Redis lists. Returns their ids. */
export async function toLists(client: Client, rows: readonly Row[]): Promise<string[]> {
  const returned: string[] = [];
  for (const { payload, runpod } of rows) {
    if (!runpod || (await client.status(runpod)).done) continue;
    // Push before the cancel: two runs under one id are better than none.
    await push(payload);
    await client.cancel(runpod);
    returned.push(payload.id!);
  }
  return returned;
}

if (import.meta.main) {
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
  const rows = await new Response(Deno.stdin.readable).json() as Row[];
  const move = Deno.args[0] === "to-lists" ? toLists : toEndpoints;
  console.log(JSON.stringify(await move(client, rows)));
}
