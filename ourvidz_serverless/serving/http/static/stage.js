// The stage: what the page says of a job, its progress, its pictures, its conversation.

import { at, button, make } from "./dom.js";
import { addressOf, caption, fileIn, fileNameOf, tell } from "./job.js";

let shown = [];

/** Say where the job is. */
export function say(words, isWrong = false) {
  // A screen reader reads the state at each change, and not the steps.
  if (at("state").textContent !== words) at("state").textContent = words;
  at("state").className = isWrong ? "wrong" : "";
  at("step").textContent = "";
}

/** Show a job's progress. */
export function progress(report) {
  const { state, words, share } = tell(report);
  say(state);
  fill(words, share);
}

/** Set the bar to a share from 0 to 1; without one it moves to and fro. */
function fill(words, share) {
  const bar = at("bar"), percent = Math.round((share ?? 0) * 100);
  at("step").textContent = words;
  bar.firstElementChild.style.width = `${percent}%`;
  bar.setAttribute("aria-valuetext", words || "not known yet");
  if (share === undefined) bar.removeAttribute("aria-valuenow");
  else bar.setAttribute("aria-valuenow", percent);
}

/** An empty stage for a new job, with a bar until `rest`. */
export function clear() {
  at("large").close();
  shown.forEach((src) => URL.revokeObjectURL(src));
  shown = [];
  at("seen").replaceChildren();
  at("warnings").replaceChildren();
  at("told").hidden = true;
  at("bar").hidden = false;
  fill("");
}

/** The stage of a job that is not followed any more. */
export function rest() {
  at("bar").hidden = true;
}

/** The text of the answer, folded away, and the warnings in it. */
export function answer(text, warnings = []) {
  at("told").hidden = false;
  at("document").textContent = text;
  at("warnings").replaceChildren(
    ...warnings.map((textContent) => make("li", { textContent })),
  );
}

/** A conversation on the stage: what was said, and the streamed reply. */
export function converse(spoken) {
  const box = make("div", { className: "talk" });
  for (const { role, content } of spoken) {
    const className = role === "user" ? "asked" : "";
    box.append(make("p", { className, textContent: content }));
  }
  const reply = make("p", { className: "growing" });
  box.append(reply);
  at("seen").replaceChildren(box);
  return {
    grow: (words) => reply.append(words),
    end: (words) => {
      reply.className = "";
      if (words !== undefined) reply.textContent = words;
    },
  };
}

/**
 * An asset on the stage. `call` fetches it with the key: an image's own request has no key.
 * `prompt` describes it; `actions` are buttons beside it, by their label.
 */
export async function show(asset, call, prompt, actions) {
  const address = addressOf(asset);
  const answer = address && await call(address).catch(() => undefined);
  const file = answer?.ok ? await answer.blob().catch(() => undefined) : fileIn(asset.url);
  const figure = make("figure");
  if (file) {
    const src = URL.createObjectURL(file);
    shown.push(src);
    const download = make("a", { href: src, download: fileNameOf(asset), textContent: "Download" });
    const row = make("div", { className: "row actions" });
    row.append(
      download,
      ...Object.entries(actions).map(([label, act]) => button(label, act)),
    );
    figure.append(
      asset.type === "video" ? video(src, prompt) : picture(src, altOf(asset, prompt)),
      make("figcaption", { textContent: caption(asset.metadata) }),
      row,
    );
  } else {
    const words = address
      ? `${asset.url} could not be fetched from the worker.`
      : `${asset.url} is in a bucket. The page shows only what the worker stores itself.`;
    figure.append(make("figcaption", { textContent: words }));
  }
  at("seen").append(figure);
  // Only a picture that was read has a height.
  await figure.querySelector("img")?.decode().catch(() => {});
  return figure;
}

function altOf({ metadata }, prompt) {
  const { asset_index: index = 0, batch_size: count = 1 } = metadata;
  return count > 1 ? `${prompt} (${index + 1} of ${count})` : prompt;
}

function video(src, prompt) {
  const film = make("video", { src, controls: true, loop: true, muted: true, autoplay: true });
  film.setAttribute("aria-label", prompt);
  return film;
}

function picture(src, alt) {
  const open = button("", () => enlarge(src, alt));
  open.className = "open";
  open.append(
    make("img", { src, alt }),
    make("span", { className: "unseen", textContent: " Enlarge" }),
  );
  return open;
}

function enlarge(src, alt) {
  Object.assign(at("large").querySelector("img"), { src, alt });
  at("large").showModal();
}

// A press beside the picture closes it, as Escape does.
at("large").addEventListener("click", ({ target }) => target === at("large") && target.close());
