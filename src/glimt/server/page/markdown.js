// Markdown as models write it -> DOM nodes. Never HTML from text, never an address but http(s),
// never a picture from elsewhere. What is half written while an answer streams is shown as text.

import { copyButton, el } from "./dom.js";
import { t } from "./words.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])\s*(\1\s*){2,}$/;
const QUOTE = /^ {0,3}>\s?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)、])\s+(.*)$/;
const DIVIDER = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const DEEPEST = 8; // of quotes, lists and emphasis inside each other

export function renderMarkdown(text) {
  const fragment = document.createDocumentFragment();
  fragment.append(...blocks(text.replace(/\r\n?/g, "\n").split("\n"), 0));
  return fragment;
}

// --- blocks: each reader looks at lines[at] and gives [node, next line], or null ------------------

const READERS = [fence, heading, rule, quote, list, table];

function blocks(lines, depth) {
  const nodes = [];
  let at = 0;
  while (at < lines.length) {
    const found = lines[at].trim() ? block(lines, at, depth) : [null, at + 1];
    if (found[0]) nodes.push(found[0]);
    at = found[1];
  }
  return nodes;
}

function block(lines, at, depth) {
  for (const read of depth < DEEPEST ? READERS : []) {
    const found = read(lines, at, depth);
    if (found) return found;
  }
  return paragraph(lines, at, depth);
}

function fence(lines, at) {
  const [, marks, language] = lines[at].match(FENCE) ?? [];
  if (!marks) return null;
  const isEnd = (line) => line.trim().startsWith(marks) && !line.trim().replaceAll(marks[0], "");
  let end = at + 1;
  while (end < lines.length && !isEnd(lines[end])) end++;
  return [codeBlock(lines.slice(at + 1, end).join("\n").replace(/\n$/, ""), language), end + 1];
}

function codeBlock(code, language) {
  const head = el("div", { class: "code-head" }, el("span", {}, language || t("code")), copyButton(t("copy"), () => code));
  const pre = el("pre", { tabindex: "0", "aria-label": language || t("code") }, el("code", {}, code));
  return el("div", { class: "code" }, head, pre);
}

function heading(lines, at, depth) {
  const [, marks, text] = lines[at].match(HEADING) ?? [];
  // The page's own headings are the first two levels.
  return marks ? [el(`h${Math.min(6, marks.length + 2)}`, {}, ...inline(text, depth)), at + 1] : null;
}

function rule(lines, at) {
  return RULE.test(lines[at]) ? [el("hr"), at + 1] : null;
}

function quote(lines, at, depth) {
  let end = at;
  while (end < lines.length && QUOTE.test(lines[end])) end++;
  if (end === at) return null;
  const inner = lines.slice(at, end).map((line) => line.replace(QUOTE, ""));
  return [el("blockquote", {}, ...blocks(inner, depth + 1)), end];
}

function list(lines, at, depth) {
  const first = lines[at].match(ITEM);
  if (!first) return null;
  const isOrdered = /\d/.test(first[2]);
  const items = [];
  while (at < lines.length && startsItem(lines[at], first[1].length, isOrdered)) {
    const [item, next] = listItem(lines, at, depth);
    items.push(item);
    at = next;
  }
  const start = parseInt(first[2], 10);
  return [el(isOrdered ? "ol" : "ul", { start: isOrdered && start !== 1 ? start : null }, ...items), at];
}

function startsItem(line, indent, isOrdered) {
  const found = line.match(ITEM);
  return found && Math.abs(found[1].length - indent) < 2 && /\d/.test(found[2]) === isOrdered;
}

// An item goes on as long as lines are indented under it.
function listItem(lines, at, depth) {
  const [, space, mark, text] = lines[at].match(ITEM);
  const inner = [text];
  const indent = space.length + 2;
  let end = at + 1;
  while (end < lines.length && goesOn(lines, end, indent)) inner.push(lines[end++].slice(Math.min(indent, space.length + mark.length + 1)));
  while (end < lines.length && !lines[end].trim() && ITEM.test(lines[end + 1] ?? "")) end++;
  const [only, ...more] = blocks(inner, depth + 1);
  const isPlain = only?.tagName === "P";
  return [el("li", {}, ...(isPlain ? only.childNodes : [only]), ...more), end];
}

function goesOn(lines, at, indent) {
  const isIndented = (line = "") => line.trim() && line.search(/\S/) >= indent;
  return isIndented(lines[at]) || (!lines[at].trim() && isIndented(lines[at + 1]));
}

function table(lines, at, depth) {
  if (!lines[at].includes("|") || !DIVIDER.test(lines[at + 1] ?? "") || !lines[at + 1].includes("-")) return null;
  const sides = cells(lines[at + 1]).map(sideOf);
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|") && lines[end].trim()) end++;
  const row = (line, tag) => el("tr", {}, ...cells(line).map((cell, i) => el(tag, { class: sides[i] }, ...inline(cell, depth))));
  const body = lines.slice(at + 2, end).map((line) => row(line, "td"));
  const made = el("table", {}, el("thead", {}, row(lines[at], "th")), el("tbody", {}, ...body));
  return [el("div", { class: "table", tabindex: "0" }, made), end];
}

const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());

function sideOf(mark) {
  if (!mark.endsWith(":")) return null;
  return mark.startsWith(":") ? "centre" : "right";
}

function paragraph(lines, at, depth) {
  let end = at + 1;
  const isOther = (line) => !line.trim() || [FENCE, HEADING, RULE, QUOTE, ITEM].some((form) => form.test(line));
  while (end < lines.length && !isOther(lines[end])) end++;
  return [el("p", {}, ...inline(lines.slice(at, end).join("\n").trim(), depth)), end];
}

// --- inline: the first rule that matches at a place wins ------------------------------------------

const INLINE = [
  [/\\([\\`*_{}[\]()#+\-.!|~<>])/y, ([, mark]) => mark],
  [/(`+)([^`]|[^`][\s\S]*?[^`])\1(?!`)/y, ([, , code]) => el("code", {}, code.trim() || code)],
  [/\*\*(?=\S)([\s\S]*?\S)\*\*/y, ([, text], depth) => el("strong", {}, ...inline(text, depth + 1))],
  [/(?<!\w)__(?=\S)([\s\S]*?\S)__(?!\w)/y, ([, text], depth) => el("strong", {}, ...inline(text, depth + 1))],
  [/\*(?=[^\s*])([^*]*[^\s*])\*/y, ([, text], depth) => el("em", {}, ...inline(text, depth + 1))],
  [/(?<!\w)_(?=[^\s_])([^_]*[^\s_])_(?!\w)/y, ([, text], depth) => el("em", {}, ...inline(text, depth + 1))],
  [/~~(?=\S)([\s\S]*?\S)~~/y, ([, text], depth) => el("del", {}, ...inline(text, depth + 1))],
  [/!?\[([^\]\n]*)\]\(\s*<?([^\s()<>]*(?:\([^\s()<>]*\)[^\s()<>]*)*)>?(?:\s+"[^"\n]*")?\s*\)/y, ([all, text, address], depth) => link(address, inline(text, depth + 1)) ?? all],
  [/<?(https?:\/\/[^\s<>"'`）。，；：！？、】》]*[^\s<>"'`）。，；：！？、】》.,;:!?)\]])>?/y, ([all, address]) => link(address, [address]) ?? all],
  [/\n/y, () => el("br")],
];
const MAY_BEGIN = /[\\`*_~[!<h\n]/;

function inline(text, depth) {
  if (depth > DEEPEST) return [text];
  const nodes = [];
  let plain = "";
  for (let at = 0; at < text.length; ) {
    const [node, length] = MAY_BEGIN.test(text[at]) ? inlineAt(text, at, depth) : [null, 0];
    if (node === null) plain += text[at++];
    else {
      nodes.push(plain, node);
      plain = "";
      at += length;
    }
  }
  return [...nodes, plain].filter((node) => node !== "");
}

function inlineAt(text, at, depth) {
  for (const [form, make] of INLINE) {
    form.lastIndex = at;
    const found = form.exec(text);
    if (found) return [make(found, depth), found[0].length];
  }
  return [null, 0];
}

// A link that leaves this page, or null for an address of another kind (javascript:, data:, …).
function link(address, children) {
  if (!/^https?:\/\//i.test(address) || !URL.canParse(address)) return null;
  const shown = children.length ? children : [address];
  return el("a", { href: address, target: "_blank", rel: "noopener noreferrer nofollow" }, ...shown);
}
