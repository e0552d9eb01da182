// Builds elements. Text always enters as text nodes: nothing on this page parses HTML out of a
// string, so whatever a model or a file's name says can never become an element.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

// An element. `on`: its listeners; other attributes: true means present, false and null absent.
export function el(tag, { on = {}, ...attributes } = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  for (const [event, listener] of Object.entries(on)) element.addEventListener(event, listener);
  element.append(...children.filter((child) => child != null && child !== ""));
  return element;
}

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#icon-${name}`);
  svg.append(use);
  return svg;
}

// A button that shows an icon and says `label` to whoever cannot see it.
export function iconButton(name, label, listener, className = "plain") {
  const attributes = { type: "button", class: className, "aria-label": label, title: label };
  return el("button", { ...attributes, on: { click: listener } }, icon(name));
}

// crypto.randomUUID is there on https and localhost only; this page is also opened by address.
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

// The clipboard of the browser needs https or localhost as well; the old way does not.
export async function copyText(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = el("textarea", { class: "unseen", "aria-hidden": "true" });
  area.value = text;
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

// A copy button that shows for a moment that it has done so.
export function copyButton(label, textOf) {
  const button = iconButton("copy", label, async () => {
    await copyText(textOf());
    button.replaceChildren(icon("done"));
    setTimeout(() => button.replaceChildren(icon("copy")), 1500);
  });
  return button;
}

// A short message over the page; action: {label, run} of a button in it.
export function showNote(text, action = null, seconds = 7) {
  const end = () => note.remove();
  const run = () => (end(), action.run());
  const button = action && el("button", { type: "button", class: "words", on: { click: run } }, action.label);
  const note = el("p", { class: "note-card" }, el("span", {}, text), button);
  byId("notes").append(note);
  setTimeout(end, seconds * 1000);
  return note;
}

// Told to screen readers once; the same text twice is told twice.
export function say(text) {
  byId("said").replaceChildren(el("p", {}, text));
}
