// Pictures that a person gives: read from a file, made smaller if they are large, and shown.

import { at, make } from "./dom.js";

/** A file that is larger, in bytes, is made smaller. RunPod takes 10 MB of text for a request. */
const MAX_BYTES = 3_000_000;
/** The longest side of a picture that was made smaller; no model makes longer ones. */
const MAX_SIDE = 2048;
/** The kinds that the worker reads. Others that the browser can read become JPEG. */
const KINDS = ["image/png", "image/jpeg", "image/webp"];

/**
 * A file as a data URI, with a name that says what it is and how long. Throws if the browser
 * cannot read the file as a picture.
 */
export async function readPicture(file) {
  const bitmap = await createImageBitmap(file).catch(() => undefined);
  if (!bitmap) throw new Error(`The browser cannot read ${file.name} as a picture.`);
  const fits = KINDS.includes(file.type) && file.size <= MAX_BYTES;
  const blob = fits ? file : await smaller(bitmap);
  const size = fits ? bitmap : await createImageBitmap(blob);
  const kilobytes = Math.ceil(blob.size / 1000);
  return {
    data: await dataOf(blob),
    name: `<${file.name}, ${size.width} × ${size.height}, ${kilobytes} kB>`,
  };
}

async function smaller(bitmap) {
  for (let side = MAX_SIDE;; side /= 2) {
    const share = Math.min(1, side / Math.max(bitmap.width, bitmap.height));
    const width = Math.max(1, Math.round(bitmap.width * share));
    const height = Math.max(1, Math.round(bitmap.height * share));
    const canvas = make("canvas", { width, height });
    const brush = canvas.getContext("2d");
    // JPEG has no transparency. The worker, too, reads transparent parts over white.
    brush.fillStyle = "white";
    brush.fillRect(0, 0, width, height);
    brush.drawImage(bitmap, 0, 0, width, height);
    const blob = await new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.9));
    if (blob.size <= MAX_BYTES) return blob;
  }
}

function dataOf(blob) {
  return new Promise((done, failed) => {
    const reader = new FileReader();
    reader.onload = () => done(reader.result);
    reader.onerror = () => failed(reader.error);
    reader.readAsDataURL(blob);
  });
}

/**
 * A field for a picture. `onChange` is called with the name of the picture, or with "" when it is
 * removed; `pictures` has the data of every name.
 */
export function pictureField(label, pictures, onChange) {
  const element = at("picture-field").content.firstElementChild.cloneNode(true);
  const find = (selector) => element.querySelector(selector);
  const picker = find("input"), remove = find("button");
  find("legend").textContent = label;
  find(".pick .unseen").textContent = ` (${label})`;
  remove.setAttribute("aria-label", `Remove the picture (${label})`);

  function show(name) {
    find(".empty").hidden = Boolean(name);
    find(".full").hidden = !name;
    find("img").src = pictures[name] ?? "data:,";
    find(".full .hint").textContent = name.slice(1, -1);
    find(".wrong").textContent = picker.value = "";
  }

  async function take(file) {
    const picture = await readPicture(file).catch((error) => error);
    if (picture instanceof Error) return find(".wrong").textContent = picture.message;
    const name = unusedName(picture, pictures);
    pictures[name] = picture.data;
    const hadFocus = element.contains(document.activeElement);
    show(name);
    if (hadFocus) remove.focus();
    onChange(name);
  }

  picker.addEventListener("change", () => picker.files.length && take(picker.files[0]));
  remove.addEventListener("click", () => {
    show("");
    picker.focus();
    onChange("");
  });
  return { element, show, take, isEmpty: () => find(".full").hidden };
}

/** The name, or the name with a number if another picture has it. */
function unusedName({ name, data }, pictures) {
  for (let count = 1;; count++) {
    const own = count === 1 ? name : name.replace(/>$/, `, ${count}>`);
    if (!Object.hasOwn(pictures, own) || pictures[own] === data) return own;
  }
}

/** Give dropped and pasted files to the field under them, else to the first empty one. */
export function takeDropsAndPastes(currentFields) {
  const fieldFor = (target) => {
    const fields = currentFields();
    return fields.find(({ element }) => element.contains(target)) ??
      fields.find((field) => field.isEmpty()) ?? fields[0];
  };
  const mark = (marked) =>
    currentFields().forEach((field) => field.element.classList.toggle("over", field === marked));
  document.addEventListener("dragover", (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    // Without this the browser leaves the page and opens the file.
    event.preventDefault();
    mark(fieldFor(event.target));
  });
  document.addEventListener("dragleave", (event) => event.relatedTarget ?? mark());
  document.addEventListener("drop", (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    mark();
    const [file] = event.dataTransfer.files;
    if (file) fieldFor(event.target)?.take(file);
  });
  document.addEventListener("paste", (event) => {
    const file = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
    const isText = event.clipboardData.types.includes("text/plain");
    const field = file && !isText && fieldFor(event.target);
    if (!field) return;
    event.preventDefault();
    field.take(file);
  });
}
