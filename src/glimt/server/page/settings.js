// The dialog of sampling settings. They are remembered in this browser; the key only in this tab.

import { byId } from "./dom.js";

const KEPT = "glimt-settings";
const KEPT_KEY = "glimt-key";
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const FIELDS = [...NUMBERS, "system"];

const field = (name) => byId(`set-${name}`);

// {sampling, system, key}: only what was filled in and is a possible value.
export function readSettings() {
  const given = NUMBERS.filter((name) => field(name).value !== "" && field(name).validity.valid);
  const sampling = Object.fromEntries(given.map((name) => [name, field(name).valueAsNumber]));
  return { sampling, system: field("system").value.trim(), key: field("key").value.trim() };
}

// onKey: called when the key has changed.
export function setUpSettings(onKey) {
  restore();
  const dialog = byId("settings");
  byId("settings-open").addEventListener("click", () => openSettings());
  for (const id of ["settings-close", "settings-done"]) byId(id).addEventListener("click", () => dialog.close());
  byId("settings-reset").addEventListener("click", reset);
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close()); // beside it
  for (const name of FIELDS) field(name).addEventListener("input", keep);
  field("key").addEventListener("change", () => {
    sessionStorage.setItem(KEPT_KEY, field("key").value.trim());
    onKey();
  });
}

// focus: the name of the field to start in
export function openSettings(focus = "temperature") {
  byId("settings").showModal();
  field(focus).focus();
}

function restore() {
  const kept = JSON.parse(localStorage.getItem(KEPT) ?? "{}");
  for (const name of FIELDS) field(name).value = kept[name] ?? "";
  field("key").value = sessionStorage.getItem(KEPT_KEY) ?? "";
}

function keep() {
  const values = Object.fromEntries(FIELDS.map((name) => [name, field(name).value]));
  localStorage.setItem(KEPT, JSON.stringify(values));
}

function reset() {
  for (const name of FIELDS) field(name).value = "";
  keep();
}
