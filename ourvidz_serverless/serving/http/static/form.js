// The form: its fields, what was typed in them, its pictures, and the request as text.

import { at, button, make, recall, remember } from "./dom.js";
import { defaultOf, familyOf, fieldsOf, payloadOf, readPayload, valueIn } from "./job.js";
import { pictureField, takeDropsAndPastes } from "./pictures.js";

const GROUPS = {
  sdxl: "Pictures by SDXL",
  wan: "Videos and pictures by WAN",
  chat: "Text",
  admin: "Administration",
};

/** The data of each picture by its name. The request shows the name. */
const pictures = {};
/** The name of the picture in each field. */
const attached = {};
/** What was typed, by field. It outlives a change of the type, and a reload of the page. */
let { type: wanted, typed = {}, byHand } = recall("form") ?? {};
let models = {};
let inputs = {};
/** The element of each field. */
let elements = {};
let pictureFields = [];
/** The earlier messages of the conversation on the stage. */
let earlier = [];

/** The form for these job types. What was typed stays. */
export function open(types, modelsOfFamilies) {
  models = modelsOfFamilies;
  const groups = Map.groupBy(types, familyOf);
  at("type").replaceChildren(...[...groups].map(([family, names]) => {
    const group = make("optgroup", { label: GROUPS[family] ?? family });
    group.append(...names.map((name) => make("option", { textContent: name })));
    return group;
  }));
  if (types.includes(wanted)) at("type").value = wanted;
  const text = byHand;
  draw();
  if (text === undefined) return;
  at("payload").value = text;
  at("raw").open = true;
  keepText();
}

/** The request as it stands, with the names of its pictures. Throws if it is not JSON. */
export function request() {
  return JSON.parse(at("payload").value);
}

/** The same request with the pictures themselves. */
export function complete(payload) {
  return readPayload(JSON.stringify(payload), pictures);
}

/** Show a request that was sent before. */
export function show(payload) {
  const isOffered = [...at("type").options].some(({ value }) => value === payload.type);
  if (isOffered) at("type").value = payload.type;
  for (const field of fields()) {
    const value = valueIn(payload, field.at);
    if (field.picture) attached[field.at] = Object.hasOwn(pictures, value) ? value : "";
    else typed[nameOf(field)] = value ?? (field.check ? false : "");
  }
  draw();
  at("payload").value = JSON.stringify(payload, null, 2);
}

/** Send these messages before the next one. */
export function goOn(messages) {
  earlier = messages;
  const words = inputs.words;
  if (!words) return;
  // Text that was typed meanwhile is the next message.
  const asked = messages.at(-2)?.content;
  if (words.value === asked) words.value = typed.words = "";
  tellEarlier();
  if (byHand === undefined) write();
}

function fields() {
  return fieldsOf(at("type").value, models);
}

/** A prompt is the same for all families, a number of steps is not, and a consent is its picture's. */
function nameOf({ at: place, needs, isOfPicture }) {
  if (isOfPicture) return `${place} ${needs}`;
  return place.includes(".") ? `${familyOf(at("type").value)} ${place}` : place;
}

function valueOf(field) {
  const value = typed[nameOf(field)];
  const isOffered = !field.choices || field.choices.some((each) => each.value === value);
  return value !== undefined && isOffered ? value : defaultOf(field);
}

function draw() {
  earlier = [];
  inputs = {};
  elements = {};
  pictureFields = [];
  let pair;
  const rows = [];
  for (const field of fields()) {
    const row = elements[field.at] = field.picture ? pictured(field) : labelled(field);
    if (field.half) {
      if (!pair) rows.push(pair = make("div", { className: "pair" }));
      pair.append(row);
    } else {
      pair = undefined;
      rows.push(row);
    }
  }
  at("fields").replaceChildren(...rows);
  tellEarlier();
  write();
}

function pictured({ at: place, label }) {
  const field = pictureField(label, pictures, (name) => {
    attached[place] = name;
    askAnew(place);
    write();
  });
  field.show(attached[place] ?? "");
  pictureFields.push(field);
  return field.element;
}

/** Forget what was said of a field's earlier picture. */
function askAnew(place) {
  for (const field of fields()) {
    if (!field.isOfPicture || !field.needs.includes(place)) continue;
    delete typed[nameOf(field)];
    inputs[field.at].checked = defaultOf(field);
  }
}

function isNeeded({ needs }) {
  return !needs || needs.some((place) => attached[place]);
}

function labelled(field) {
  const input = inputOf(field);
  input.name = field.at;
  inputs[field.at] = input;
  const label = make("label", { className: field.check ? "check" : "" });
  label.append(...(field.check ? [input, field.label] : [field.label, input]));
  return label;
}

function inputOf(field) {
  const { choices, rows, number, check, hint = "", min = "", max = "", step = 1 } = field;
  const value = valueOf(field);
  if (check) return make("input", { type: "checkbox", checked: value });
  if (choices) {
    const select = make("select");
    select.append(
      ...choices.map(({ value, label }) => make("option", { value, textContent: label })),
    );
    select.value = value;
    return select;
  }
  if (rows) return make("textarea", { rows, value });
  if (!number) return make("input", { value, placeholder: hint });
  return make("input", { type: "number", min, max, step, value, placeholder: hint });
}

/** The number of earlier messages, and a way to begin anew. */
function tellEarlier() {
  at("earlier")?.remove();
  if (!earlier.length || !inputs.words) return;
  const told = make("p", { id: "earlier", className: "hint" });
  const count = `The ${earlier.length} earlier messages are sent, too. `;
  const forget = button("New conversation", () => {
    goOn([]);
    inputs.words.focus();
  });
  told.append(count, forget);
  inputs.words.parentElement.after(told);
}

/** What the form says now, by field. */
function values() {
  return Object.fromEntries(fields().filter(isNeeded).map((field) => [field.at, entered(field)]));
}

function entered(field) {
  if (field.picture) return attached[field.at] ?? "";
  const input = inputs[field.at];
  if (field.check) return input.checked;
  const isNumber = field.number || typeof field.choices?.[0].value === "number";
  return isNumber && input.value !== "" ? Number(input.value) : input.value;
}

/** Keep what was typed: what differs from the field's own default. */
function keep({ target }) {
  const field = fields().find(({ at: place }) => place === target.name);
  if (field) typed[nameOf(field)] = entered(field);
  write();
}

function write() {
  for (const field of fields()) {
    if (field.needs) elements[field.at].hidden = !isNeeded(field);
  }
  const payload = payloadOf(at("type").value, values(), earlier);
  at("payload").value = JSON.stringify(payload, null, 2);
  byHand = undefined;
  save();
}

function keepText() {
  byHand = at("payload").value;
  save();
}

function save() {
  wanted = at("type").value;
  // A key is never stored, and a picture is not there any more after a reload.
  const isPlain = byHand && !/api_key/.test(byHand) &&
    !Object.keys(pictures).some((name) => byHand.includes(name));
  remember("form", { type: wanted, typed, byHand: isPlain ? byHand : undefined });
}

at("type").addEventListener("change", draw);
at("fields").addEventListener("input", keep);
at("payload").addEventListener("input", keepText);
takeDropsAndPastes(() => pictureFields);
