// The page: a form for a payload, a stage for the job's progress and assets, and the document.

import {
  addressOf,
  caption,
  ending,
  eventsOf,
  familyOf,
  fieldsOf,
  pathOf,
  payloadOf,
  pretty,
  tell,
} from "./job.js";

const AGAIN_MS = 2000;
const GROUPS = { sdxl: "SDXL", wan: "WAN", chat: "Chat", admin: "Administration" };

const at = (id) => document.getElementById(id);
/** WORKER_API_KEY, if the worker has one. It is stored only in this variable. */
let key = "";
/** The running job: its id and its user. */
let job = { id: "", user: undefined };
let earlier = [];
let shown = [];

async function call(path, options = {}) {
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  if (options.body) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) askForKey();
  return answer;
}

// --- the worker ---

async function meet() {
  const answer = await call("worker/info").catch(() => undefined);
  if (!answer || answer.status === 503) {
    at("worker").textContent = answer ? "the models are being loaded" : "no answer";
    setTimeout(meet, AGAIN_MS);
  } else if (answer.ok) {
    at("key-form").hidden = true;
    welcome(await answer.json());
  } else if (answer.status === 401) {
    at("worker").textContent = key
      ? "the worker does not know this key"
      : "the worker asks for a key";
  }
}

function askForKey() {
  at("key-form").hidden = false;
  at("key").focus();
}

function welcome({ families, job_types: types }) {
  at("worker").textContent = `serves ${families.join(", ")}`;
  const groups = Map.groupBy(types, familyOf);
  at("type").replaceChildren(...[...groups].map(([family, names]) => {
    const group = make("optgroup", { label: GROUPS[family] ?? family });
    group.append(...names.map((name) => make("option", { textContent: name })));
    return group;
  }));
  at("send").disabled = false;
  draw();
}

// --- the form ---

function draw() {
  earlier = [];
  let pair;
  const rows = [];
  for (const field of fieldsOf(at("type").value)) {
    if (field.half) {
      if (!pair) rows.push(pair = make("div", { className: "pair" }));
      pair.append(labelled(field));
    } else {
      pair = undefined;
      rows.push(labelled(field));
    }
  }
  at("fields").replaceChildren(...rows);
  write();
}

function labelled(field) {
  const input = inputOf(field);
  input.name = field.at;
  const label = make("label", { className: field.check ? "check" : "" });
  label.append(...(field.check ? [input, field.label] : [field.label, input]));
  return label;
}

function inputOf({ choices, rows, number, check, value = "", hint = "" }) {
  if (check) return make("input", { type: "checkbox", checked: value });
  if (choices) {
    const select = make("select");
    select.append(...choices.map((choice) => make("option", { textContent: choice })));
    return select;
  }
  if (rows) return make("textarea", { rows, value });
  return make("input", { type: number ? "number" : "text", step: "any", value, placeholder: hint });
}

function values() {
  const fields = fieldsOf(at("type").value);
  return Object.fromEntries(fields.map((field) => {
    const input = at("ask").elements[field.at];
    if (field.check) return [field.at, input.checked];
    const isNumber = field.number || typeof field.choices?.[0] === "number";
    return [field.at, isNumber && input.value !== "" ? Number(input.value) : input.value];
  }));
}

function write() {
  at("payload").value = JSON.stringify(payloadOf(at("type").value, values(), earlier), null, 2);
}

// --- a job ---

async function run(event) {
  event.preventDefault();
  at("refused").textContent = "";
  let payload;
  try {
    payload = JSON.parse(at("payload").value);
  } catch (error) {
    at("raw").open = true;
    return refuse(`The payload is not JSON: ${error.message}`);
  }
  busy(true);
  clear();
  say("sending");
  try {
    const answer = await call("jobs", { method: "POST", body: JSON.stringify({ input: payload }) });
    const told = await answer.json();
    at("document").textContent = pretty(told);
    if (!answer.ok) {
      say("refused", true);
      return refuse(told.error);
    }
    job = { id: told.job_id, user: payload.user_id };
    at("stop").hidden = false;
    say("queued");
    await watch(payload);
  } catch (error) {
    say(`The worker is not there any more: ${error.message}`, true);
  } finally {
    busy(false);
  }
}

/** Follow a job to its end. */
async function watch(payload) {
  const talk = familyOf(payload.type ?? "") === "chat" ? converse(payload) : undefined;
  const answer = await call(pathOf(job, "events"));
  for await (const { event, data } of eventsOf(answer.body)) {
    if (event === "progress") {
      const { words, share } = tell(data);
      say(words);
      fill(share);
    } else if (event === "message") {
      say("speaking");
      talk?.grow(data.delta);
    } else {
      await end(data, talk);
    }
  }
}

async function end(document, talk) {
  at("document").textContent = pretty(document);
  const failed = document.status === "failed";
  say(ending(document), failed);
  fill(failed ? 0 : 1);
  talk?.end(failed ? undefined : document.response ?? document.enhanced_prompt);
  for (const asset of document.assets ?? []) if (asset.type !== "text") await show(asset);
}

/** A conversation on the stage: the user's message, and the streamed reply. */
function converse({ messages = [], prompt }) {
  const box = make("div", { className: "talk" });
  const spoken = messages.filter(({ role }) => role !== "system");
  for (
    const { role, content } of spoken.length ? spoken : [{ role: "user", content: prompt ?? "" }]
  ) {
    const className = role === "user" ? "asked" : "";
    box.append(make("p", { className, textContent: content }));
  }
  const reply = make("p", { className: "growing" });
  box.append(reply);
  at("seen").append(box);
  return {
    grow: (words) => reply.append(words),
    end: (words) => {
      reply.className = "";
      if (words === undefined) return;
      reply.textContent = words;
      earlier = [...spoken, { role: "assistant", content: words }];
      const asked = at("ask").elements.words;
      if (!asked) return;
      // Text that was typed meanwhile is the next message.
      if (asked.value === spoken.at(-1)?.content) asked.value = "";
      write();
    },
  };
}

/** An asset on the stage, fetched with the key: an image's own request has no key. */
async function show(asset) {
  const address = addressOf(asset);
  const answer = address && await call(address);
  const figure = make("figure");
  if (answer?.ok) {
    const src = URL.createObjectURL(await answer.blob());
    shown.push(src);
    const film = { controls: true, loop: true, muted: true, autoplay: true };
    figure.append(
      asset.type === "video"
        ? make("video", { src, ...film })
        : make("img", { src, alt: `picture ${asset.metadata.asset_index + 1}` }),
      make("figcaption", { textContent: caption(asset.metadata) }),
    );
  } else {
    const words = `${asset.url} lies in storage, out of this page's sight.`;
    figure.append(make("figcaption", { textContent: words }));
  }
  at("seen").append(figure);
}

function clear() {
  shown.forEach((src) => URL.revokeObjectURL(src));
  shown = [];
  at("seen").replaceChildren();
  fill(0);
}

/** Show Stop only while a job runs. */
function busy(is) {
  at("send").disabled = is;
  at("stop").hidden = true;
}

function say(words, isWrong = false) {
  at("state").textContent = words;
  at("state").className = isWrong ? "wrong" : "";
}

function refuse(words) {
  at("refused").textContent = words;
}

function fill(share) {
  at("bar").firstElementChild.style.width = `${Math.round(share * 100)}%`;
}

function make(tag, properties = {}) {
  return Object.assign(document.createElement(tag), properties);
}

at("ask").addEventListener("submit", run);
at("type").addEventListener("change", draw);
at("fields").addEventListener("input", write);
at("stop").addEventListener(
  "click",
  () => call(pathOf(job, "cancel"), { method: "POST" }),
);
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = at("key").value;
  meet();
});
at("send").disabled = true;
meet();
