// A job without the page: the fields of its form, its payload, its events, its document as text.

const RESOLUTIONS = ["1024x1024", "1024x576", "576x1024", "512x512"];
const OPERATIONS = [
  ...["health", "info", "status", "memory_status", "memory_report", "pressure_check"],
  ...["debug_env", "enhancement_info", "memory_load", "memory_unload"],
];

/** The fields of each family's form: their place in the payload, their label and their choices. */
export const FIELDS = {
  sdxl: [
    { at: "prompt", label: "Prompt", rows: 3, value: "a red circle on a blue background" },
    { at: "negative_prompt", label: "Negative prompt", rows: 1 },
    { at: "config.resolution", label: "Resolution", choices: RESOLUTIONS, half: true },
    { at: "config.num_images", label: "Pictures", choices: [1, 3, 6], half: true },
    { at: "config.num_inference_steps", label: "Steps", number: true, half: true },
    { at: "config.guidance_scale", label: "Guidance", number: true, half: true },
    { at: "config.seed", label: "Seed", number: true, half: true, hint: "drawn" },
  ],
  wan: [
    {
      at: "prompt",
      label: "Prompt",
      rows: 3,
      value: "a red circle moving right on a blue background",
    },
    { at: "negative_prompt", label: "Negative prompt", rows: 1 },
    { at: "config.width", label: "Width", number: true, half: true, hint: "480" },
    { at: "config.height", label: "Height", number: true, half: true, hint: "832" },
    { at: "config.frames", label: "Frames", number: true, half: true, hint: "81" },
    { at: "config.fps", label: "Frames a second", number: true, half: true, hint: "16" },
    { at: "config.num_inference_steps", label: "Steps", number: true, half: true },
    { at: "config.seed", label: "Seed", number: true, half: true, hint: "drawn" },
  ],
  chat: [
    { at: "system", label: "System prompt", rows: 2 },
    { at: "words", label: "Message", rows: 3, value: "Why is the sky blue?" },
    { at: "max_tokens", label: "Most tokens", number: true, half: true, value: 200 },
    { at: "temperature", label: "Temperature", number: true, half: true, hint: "0.7" },
    { at: "stream", label: "Word by word", check: true, value: true },
  ],
  admin: [
    { at: "config.operation", label: "Operation", choices: OPERATIONS },
    { at: "config.target_worker", label: "About", hint: "sdxl, chat, wan, or a model" },
  ],
};

/** The fields of a family without a form of its own. */
export const COMMON_FIELDS = [
  { at: "prompt", label: "Prompt", rows: 3, value: "a red circle on a blue background" },
  { at: "config.seed", label: "Seed", number: true, half: true, hint: "drawn" },
];

/** The family of a job type. */
export function familyOf(type) {
  const [first] = type.split("_");
  return /^(image|video)/.test(first) ? "wan" : first;
}

/** The fields of a job type's form. */
export function fieldsOf(type) {
  return FIELDS[familyOf(type)] ?? COMMON_FIELDS;
}

/**
 * The payload of a form: `values` at the places of FIELDS, without the empty ones.
 * `earlier` are the earlier messages of a conversation.
 */
export function payloadOf(type, values, earlier = []) {
  const payload = { type, user_id: "page" };
  const { system, words, ...rest } = values;
  if (familyOf(type) === "chat") {
    const begin = system ? [{ role: "system", content: system }] : [];
    payload.messages = [...begin, ...earlier, { role: "user", content: words ?? "" }];
  }
  for (const [place, value] of Object.entries(rest)) {
    if (value === "" || value === undefined || value === false) continue;
    const names = place.split(".");
    const last = names.pop();
    const home = names.reduce((part, name) => part[name] ??= {}, payload);
    home[last] = value;
  }
  return payload;
}

/** The server-sent events of a response's body, as `{event, data}`. */
export async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const blocks = held.split("\n\n");
    held = blocks.pop();
    for (const block of blocks) {
      const lines = block.split("\n").filter((line) => !line.startsWith(":"));
      const field = (name) =>
        lines.find((line) => line.startsWith(`${name}: `))?.slice(name.length + 2);
      const data = field("data");
      if (data !== undefined) yield { event: field("event") ?? "message", data: JSON.parse(data) };
    }
  }
}

/** Progress as text, and as a number from 0 to 1. */
export function tell({ stage, step, steps, remaining_s: left }) {
  const rest = left === undefined ? "" : `, ${Math.ceil(left)} s left`;
  return { words: `${stage} ${step} of ${steps}${rest}`, share: steps ? step / steps : 0 };
}

/** The end of a job as text. */
export function ending(document) {
  if (document.status === "failed") return `${document.code ?? "failed"}: ${document.error}`;
  const seconds = document.metadata?.processing_time;
  return seconds === undefined ? "completed" : `completed in ${Math.round(seconds * 10) / 10} s`;
}

/** The caption of a picture or a video. */
export function caption({ width, height, seed, steps, frame_num: frames, fps }) {
  const parts = [`${width} × ${height}`, frames > 1 && `${frames} frames at ${fps} a second`];
  parts.push(seed !== undefined && `seed ${seed}`, steps !== undefined && `${steps} steps`);
  return parts.filter(Boolean).join(" · ");
}

/** The path of a job at the worker. A job with a user is found only with that user. */
export function pathOf({ id, user }, part) {
  const query = typeof user === "string" ? `?user_id=${encodeURIComponent(user)}` : "";
  return `job/${encodeURIComponent(id)}/${part}${query}`;
}

/** The path of an asset at the worker; undefined for an asset that is stored elsewhere. */
export function addressOf({ type, url }) {
  const isHere = type !== "text" && !/^[a-z][a-z0-9+.-]*:/i.test(url);
  return isHere ? `assets/${url.split("/").map(encodeURIComponent).join("/")}` : undefined;
}

/** A document as text. Embedded data is replaced by its length. */
export function pretty(document) {
  const short = (_, value) =>
    typeof value === "string" && value.startsWith("data:") && value.length > 120
      ? `${value.slice(0, 60)}… (${value.length} characters)`
      : value;
  return JSON.stringify(document, short, 2);
}
