// The Redis lists: a job goes to the right end of its family's list, as the application pushes it.
// The bridge takes jobs from the left end, first in first out; the old workers take from the right.

import { familyOf, type Job, RequestFailed } from "../mod.ts";

const LISTS = { sdxl: "sdxl_queue", chat: "chat_queue", wan: "wan_queue", admin: "chat_queue" };

export async function push(job: Job): Promise<void> {
  const answer = await fetch(`${Deno.env.get("UPSTASH_REDIS_REST_URL")}/pipeline`, {
    method: "POST",
    headers: { Authorization: `Bearer ${Deno.env.get("UPSTASH_REDIS_REST_TOKEN")}` },
    body: JSON.stringify([["RPUSH", LISTS[familyOf(job)], JSON.stringify(job)]]),
  });
  if (!answer.ok) throw new RequestFailed(answer.status, "the list did not take the job");
}
