// A job without the page: its form's fields, its payload, its events, and its document as text.

/** The sizes that a form offers, for the small pocket models and for full ones. The first is set. */
const SIZES = {
  sdxl: {
    pocket: ["512x512", "512x288", "288x512", "256x256"],
    full: ["1024x1024", "1216x832", "832x1216", "1344x768", "768x1344"],
  },
  wan: {
    pocket: ["128x128", "192x128", "128x192"],
    full: ["832x480", "480x832", "624x624", "1280x720"],
  },
};
const FAMILY_NAMES = { sdxl: "SDXL", wan: "WAN", chat: "chat" };
const OPERATIONS = [
  ...["health", "info", "status", "memory_status", "memory_report", "pressure_check"],
  ...["debug_env", "enhancement_info", "memory_load", "memory_unload"],
];
/** What a picture is for; without a value it is the start of the new one. */
const USES = [
  { value: "", label: "starting point (image-to-image)" },
  { value: "style", label: "style" },
  { value: "composition", label: "composition" },
  { value: "character", label: "character" },
];

/** How a picture of another shape gets the size; without a value it is cropped. */
const FITS = [
  { value: "", label: "cropped to the size" },
  { value: "pad", label: "with grey around it" },
  { value: "stretch", label: "stretched to the size" },
  { value: "extend", label: "as the middle of a larger picture (outpainting)" },
];

const LANDSCAPE = "yellow mountains under an orange sky, a yellow sun on the right, " +
  "a house on the left";
const VOYAGE = "a boat sails left over a blue sea under an orange sky";

const prompt = (value) => ({ at: "prompt", label: "Prompt", rows: 3, value });
const NEGATIVE = { at: "negative_prompt", label: "Negative prompt", rows: 1 };
const number = (at, label, rest) => ({ at, label, number: true, half: true, ...rest });
const STEPS = "config.num_inference_steps";
const guidance = (value) => number("config.guidance_scale", "Guidance", { value, min: 1, max: 20 });
const SEED = number("config.seed", "Seed", { hint: "random", min: 0 });

function sizes(at, family, isPocket) {
  const choices = SIZES[family][isPocket ? "pocket" : "full"];
  return {
    at,
    label: "Size",
    choices: choices.map((value) => ({ value, label: sizeLabel(value) })),
  };
}

function sizeLabel(size) {
  const [width, height] = size.split("x").map(Number);
  const shape = width > height ? "landscape" : width < height ? "portrait" : "square";
  return `${width} × ${height}, ${shape}`;
}

/** It is asked anew for each picture. */
const consent = (...needs) => ({
  at: "metadata.reference_consent",
  label: "Whoever is in the picture agreed to this use of it",
  check: true,
  value: false,
  needs,
  isOfPicture: true,
});

/**
 * The form of each family: the fields with their place in the payload and their labels.
 * A field with `needs` counts only if one of these pictures is given.
 */
const FORMS = {
  sdxl: ({ isPocket, isHigh }) => [
    prompt(LANDSCAPE),
    NEGATIVE,
    { at: "config.image", label: "Picture to start from", picture: true },
    { at: "metadata.reference_type", label: "Use it as", choices: USES, needs: ["config.image"] },
    {
      ...number("config.denoise_strength", "Change, from 0 to 1", { min: 0, max: 1, step: 0.05 }),
      hint: "by its use",
      needs: ["config.image"],
    },
    { at: "config.resize_mode", label: "Take it", choices: FITS, needs: ["config.image"] },
    {
      at: "config.mask",
      label: "Mask: only what is white is repainted",
      picture: true,
      needs: ["config.image"],
    },
    consent("config.image"),
    sizes("config.resolution", "sdxl", isPocket),
    {
      at: "config.num_images",
      label: "Pictures",
      choices: options([1, 2, 3, 4, 5, 6]),
      half: true,
    },
    number(STEPS, "Steps", { value: isHigh ? 25 : 15, min: 1, max: 50 }),
    guidance(7),
    SEED,
  ],
  wan: ({ isPocket, isHigh, isVideo }) => [
    prompt(VOYAGE),
    NEGATIVE,
    ...(isVideo
      ? [
        { at: "config.first_frame", label: "First frame", picture: true },
        { at: "config.last_frame", label: "Last frame", picture: true },
      ]
      : [{ at: "config.image", label: "Picture of the subject", picture: true }]),
    consent(...(isVideo ? ["config.first_frame", "config.last_frame"] : ["config.image"])),
    sizes("config.width config.height", "wan", isPocket),
    ...(isVideo
      ? [
        number("config.frames", "Frames", { value: isPocket ? 17 : 81, min: 1, max: 81, step: 4 }),
        number("config.fps", "Frames a second", { value: isPocket ? 8 : 16, min: 8, max: 24 }),
      ]
      : []),
    number(STEPS, "Steps", { value: isHigh ? 50 : 25, min: 1, max: 100 }),
    guidance(5),
    SEED,
  ],
  chat: ({ type }) => [
    { at: "system", label: "System prompt", rows: 2 },
    {
      at: "words",
      label: "Message",
      rows: 3,
      value: type === "chat_enhance" ? "a boat on a lake" : "Why is the sky blue?",
    },
    number("max_tokens", "Tokens, at most", { value: 200, min: 1 }),
    number("temperature", "Temperature", { value: 0.7, min: 0, max: 2, step: 0.1 }),
    { at: "stream", label: "Show the reply while it is written", check: true, value: true },
  ],
  admin: () => [
    { at: "config.operation", label: "Operation", choices: options(OPERATIONS) },
    { at: "config.target_worker", label: "About", hint: "sdxl, chat, wan, or a model" },
  ],
};

/** The form of a family that has none of its own. */
const OTHER_FORM = () => [prompt(LANDSCAPE), SEED];

function options(values) {
  return values.map((value) => ({ value, label: `${value}` }));
}

/** The family of a job type. */
export function familyOf(type) {
  const [first] = type.split("_");
  return /^(image|video)/.test(first) ? "wan" : first;
}

/** The fields of a job type's form. `models` has the name of each family's model. */
export function fieldsOf(type, models = {}) {
  const family = familyOf(type);
  const form = FORMS[family] ?? OTHER_FORM;
  return form({
    type,
    isPocket: models[family] === "pocket",
    isHigh: type.includes("high"),
    isVideo: type.startsWith("video"),
  });
}

/** What a field shows before anybody changes it. */
export function defaultOf({ value, choices }) {
  return value ?? choices?.[0].value ?? "";
}

/**
 * The payload of a form: `values` at the places of its fields, without the empty ones.
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
    const places = place.split(" ");
    const parts = places.length > 1 ? value.split("x").map(Number) : [value];
    places.forEach((each, index) => put(payload, each, parts[index]));
  }
  return payload;
}

function put(payload, place, value) {
  const names = place.split(".");
  const last = names.pop();
  const home = names.reduce((part, name) => part[name] ??= {}, payload);
  home[last] = value;
}

/** The value of a field in a payload; undefined if it is not there. */
export function valueIn(payload, place) {
  const parts = place.split(" ").map((each) =>
    each.split(".").reduce((part, name) => part?.[name], payload)
  );
  return parts.includes(undefined) ? undefined : parts.length > 1 ? parts.join("x") : parts[0];
}

/** The payload of a request's text. A string that is a name in `pictures` becomes that picture. */
export function readPayload(text, pictures = {}) {
  const whole = (_, value) => Object.hasOwn(pictures, value) ? pictures[value] : value;
  return JSON.parse(text, whole);
}

/** The same request with one picture, of this seed. */
export function repeated(payload, seed) {
  const { id: _id, job_id: _job, ...rest } = payload;
  const { num_images: _number, ...config } = payload.config ?? {};
  return { ...rest, config: { ...config, seed } };
}

/** A request as a command for curl. It names the key's variable and never holds a key. */
export function curlOf(payload, url, needsKey) {
  const { api_key: key, ...rest } = payload;
  const header = needsKey || key ? ' -H "Authorization: Bearer $WORKER_API_KEY"' : "";
  const body = JSON.stringify({ input: rest }, null, 2);
  // By a here-document: a picture is too long for an argument, and a prompt may have quotes.
  return `curl -s "${url}"${header} --json @- <<'JSON'\n${body}\nJSON\n`;
}

/**
 * The server-sent events of a response's body, as `{event, data}`. They end when the connection
 * is cut, too.
 */
export async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read().catch(() => ({ done: true }));
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

/** Progress as text: the state and the step. `share`, from 0 to 1, is missing while the job waits. */
export function tell({ stage, step, steps, remaining_s: left }) {
  const ahead = steps - step;
  if (stage === "wait" && ahead > 0) {
    return { state: "Waiting", words: `behind ${ahead} other ${ahead === 1 ? "job" : "jobs"}` };
  }
  const state = "Processing";
  if (stage === "wait") return { state, words: "" };
  if (ahead <= 0) return { state, words: `all ${steps} steps done, finishing`, share: 1 };
  const rest = left === undefined ? "" : `, ${duration(left)} left`;
  return { state, words: `step ${step} of ${steps}${rest}`, share: step / steps };
}

function duration(seconds) {
  return seconds < 100 ? `${Math.ceil(seconds)} s` : `${Math.ceil(seconds / 60)} min`;
}

/** The end of a job as text. */
export function ending({ status, code, error, retryable, metadata }) {
  if (code === "CANCELLED") return "Stopped.";
  if (status === "failed") {
    return `Failed: ${error} (${code ?? "no code"})${retryable ? " You can try again." : ""}`;
  }
  const seconds = metadata?.processing_time;
  if (!seconds) return "Completed.";
  return `Completed in ${Number(seconds < 1 ? seconds.toPrecision(1) : seconds.toFixed(1))} s.`;
}

/** What the worker serves, in words. */
export function served({ families, models = {}, device }) {
  const isPocket = (family) => models[family] === "pocket";
  const pocket = families.filter(isPocket);
  const all = pocket.length === families.length;
  const parts = [
    `Serves ${listed(families)}`,
    all && ` with ${families.length > 1 ? "pocket models" : "a pocket model"}`,
    device && ` (${device})`,
  ];
  const rest = !all && pocket.length ? ` ${listed(pocket)}: pocket models.` : "";
  return `${parts.filter(Boolean).join("")}.${rest}`;
}

function listed(families) {
  const names = families.map((family) => FAMILY_NAMES[family] ?? family);
  return names.length < 2 ? names.join() : `${names.slice(0, -1).join(", ")} and ${names.at(-1)}`;
}

/** The caption of a picture or a video. */
export function caption({ width, height, seed, steps, frame_num: frames, fps }) {
  const parts = [`${width} × ${height}`, frames > 1 && `${frames} frames at ${fps} a second`];
  parts.push(seed !== undefined && `seed ${seed}`, steps !== undefined && `${steps} steps`);
  return parts.filter(Boolean).join(" · ");
}

/** The path of a job at the worker. A job with a user is found only with that user. */
export function pathOf({ id, user }, part = "") {
  const query = typeof user === "string" ? `?user_id=${encodeURIComponent(user)}` : "";
  return `job/${encodeURIComponent(id)}${part && `/${part}`}${query}`;
}

/** The file in a `data:` URI of base64, for a policy that lets no script fetch one; else undefined. */
export function fileIn(url) {
  const [, type, data] = /^data:([^,;]*);base64,(.*)$/s.exec(url) ?? [];
  if (data === undefined) return undefined;
  return new Blob([Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0))], { type });
}

/** The path of an asset at the worker; undefined for an asset that is stored elsewhere. */
export function addressOf({ type, url }) {
  const isHere = type !== "text" && !/^[a-z][a-z0-9+.-]*:/i.test(url);
  return isHere ? `assets/${url.split("/").map(encodeURIComponent).join("/")}` : undefined;
}

/** A file name for an asset: its job and its own name. */
export function fileNameOf({ url, metadata }) {
  if (url.startsWith("data:")) return `${metadata.asset_index ?? 0}.${metadata.format}`;
  return url.split("/").slice(-2).join("-");
}

/** A document as text. Embedded data is replaced by its length. */
export function pretty(document) {
  const short = (_, value) =>
    typeof value === "string" && value.startsWith("data:") && value.length > 120
      ? `${value.slice(0, 60)}… (${value.length} characters)`
      : value;
  return JSON.stringify(document, short, 2);
}
