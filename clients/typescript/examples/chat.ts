// The edge function `chat`: a reply within the caller's 45 seconds, streamed if the call asks for it.
//   deno run --allow-net --allow-env --allow-read chat.ts

import { type ChatCall, Face, RequestFailed } from "../mod.ts";

const worker = new Face({
  url: Deno.env.get("CHAT_WORKER_URL") ?? "",
  apiKey: Deno.env.get("RUNPOD_API_KEY") ?? "",
  workerKey: Deno.env.get("WORKER_API_KEY"),
});

export async function chat(request: Request): Promise<Response> {
  const call = await request.json() as ChatCall;
  try {
    if (!call.stream) return Response.json(await worker.chat(call));
    return new Response(words(call), { headers: { "Content-Type": "text/plain; charset=utf-8" } });
  } catch (error) {
    const status = error instanceof RequestFailed ? error.status || 504 : 500;
    return Response.json({ success: false, error: (error as Error).message }, { status });
  }
}

function words(call: ChatCall): ReadableStream<Uint8Array> {
  const encoder = new TextEncoder();
  const reply = worker.stream(call);
  return new ReadableStream({
    async pull(controller) {
      const { done, value } = await reply.next();
      if (done) controller.close();
      else controller.enqueue(encoder.encode(value));
    },
    async cancel() {
      await reply.return(undefined as never);
    },
  });
}

if (import.meta.main) {
  Deno.serve({ port: Number(Deno.env.get("PORT") ?? 8000), hostname: "127.0.0.1" }, chat);
}
