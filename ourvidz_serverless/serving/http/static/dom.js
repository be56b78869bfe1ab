// Short names for what every part of the page does with the document.

/** The element with this id. */
export const at = (id) => document.getElementById(id);

/** A new element with these properties. */
export function make(tag, properties = {}) {
  return Object.assign(document.createElement(tag), properties);
}

/** A button that is no form's own. */
export function button(textContent, onclick) {
  return make("button", { type: "button", textContent, onclick });
}

/** Copy a text, and say so on the button that was pressed. */
export async function copy(text, { target }) {
  const words = target.textContent;
  try {
    await navigator.clipboard.writeText(text);
    target.textContent = "Copied";
  } catch {
    // The clipboard is closed to pages without TLS, except on this machine.
    target.textContent = "The browser did not allow it";
  }
  setTimeout(() => target.textContent = words, 2000);
}

/** What this tab remembers over a reload; undefined if there is nothing or no storage. */
export function recall(name) {
  try {
    return JSON.parse(sessionStorage.getItem(name)) ?? undefined;
  } catch {
    return undefined;
  }
}

/** Remember a value in this tab, or forget it. Without storage nothing is remembered. */
export function remember(name, value) {
  try {
    if (value === undefined) sessionStorage.removeItem(name);
    else sessionStorage.setItem(name, JSON.stringify(value));
  } catch {
    // Storage is full, or turned off.
  }
}
