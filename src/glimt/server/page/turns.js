// How a conversation's turns look: questions with their pictures, answers with their times.

import { byId, copyButton, el, icon, iconButton } from "./dom.js";
import { renderMarkdown } from "./markdown.js";
import { showBlob } from "./pictures.js";
import { loadPicture } from "./store.js";
import { number, t } from "./words.js";

// --- questions ------------------------------------------------------------------------------------

// onEdit: of the last question only, else null
export function questionView({ text, pictures = [] }, onEdit) {
  const shown = pictures.map(pictureView);
  const edit = onEdit && iconButton("edit", t("edit"), onEdit);
  return el("li", { class: "turn question" },
    el("h3", { class: "unseen" }, t("you")),
    shown.length ? el("div", { class: "pictures" }, ...shown) : null,
    el("div", { class: "asked" }, edit, text && el("p", {}, text)));
}

function pictureView({ id, name, width, height }) {
  const image = el("img", { alt: name, width, height });
  const show = async () => {
    const picture = await loadPicture(id);
    byId("viewer-image").alt = name;
    showBlob(byId("viewer-image"), picture.blob);
    byId("viewer").showModal();
  };
  loadPicture(id).then((picture) => picture && showBlob(image, picture.blob));
  return el("button", { type: "button", class: "picture", "aria-label": t("openPicture", name), on: { click: show } }, image);
}

export function setUpViewer() {
  const viewer = byId("viewer");
  viewer.addEventListener("click", () => viewer.close());
}

// --- answers --------------------------------------------------------------------------------------

// An answer while it is written and after. Text that comes fast is drawn once a frame.
export class AnswerView {
  constructor() {
    this.text = el("div", { class: "text" });
    this.foot = el("div", { class: "foot" });
    this.element = el("li", { class: "turn answer" }, el("h3", { class: "unseen" }, t("theModel")), this.text, this.foot);
    this.frame = 0;
  }

  wait(text) {
    this.element.classList.add("is-open");
    this.text.replaceChildren(el("p", { class: "waiting" }, text));
  }

  write(text, onDrawn) {
    this.latest = text;
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      this.text.replaceChildren(renderMarkdown(this.latest));
      onDrawn();
    });
  }

  // actions: {again, key}; again is null for any but the last answer
  end(answer, actions) {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    this.element.classList.remove("is-open");
    this.text.replaceChildren(renderMarkdown(answer.text));
    if (answer.error) this.text.append(errorView(answer.error, actions));
    const copy = answer.text && copyButton(t("copy"), () => answer.text);
    const again = actions.again && !answer.error && iconButton("again", t("again"), actions.again);
    const facts = el("p", { class: "facts" }, ...factTexts(answer).map((text) => el("span", {}, text)));
    this.foot.replaceChildren(...[copy, again, facts].filter(Boolean));
  }
}

function factTexts({ finish, facts = {} }) {
  const { firstS, perSecond, tokens, promptTokens, imageTokens, cachedTokens } = facts;
  const texts = [];
  if (finish === "stopped") texts.push(t("stopped"));
  if (finish === "length") texts.push(t("cut"));
  if (firstS != null) texts.push(t("first", number(firstS, firstS < 1 ? 2 : 1)));
  if (perSecond) texts.push(t("speed", number(perSecond, perSecond < 100 ? 1 : 0)));
  if (tokens) texts.push(t("tokens", number(tokens)));
  if (promptTokens) texts.push(promptText(promptTokens, imageTokens, cachedTokens));
  return texts;
}

function promptText(promptTokens, imageTokens, cachedTokens) {
  const inside = [];
  if (imageTokens) inside.push(t("ofPictures", number(imageTokens)));
  if (cachedTokens) inside.push(t("cached", number(cachedTokens)));
  const text = t("prompt", number(promptTokens));
  return inside.length ? `${text} (${inside.join(", ")})` : text;
}

// --- errors ---------------------------------------------------------------------------------------

// What happened, in the page's words, then the server's own for those who can do something with it.
function errorView(error, { again, key }) {
  const button = (label, act) => el("button", { type: "button", class: "words", on: { click: act } }, label);
  const buttons = [];
  if (error.status === 401) buttons.push(button(t("settings"), key));
  if (again) buttons.push(button(t("retry"), again));
  const detail = error.message ? el("p", { class: "detail" }, error.message) : null;
  const said = el("p", {}, icon("close"), el("span", {}, t(errorName(error))));
  return el("div", { class: "error", role: "alert" }, said, detail, el("div", { class: "ways" }, ...buttons));
}

const BY_STATUS = { 401: "errorKey", 403: "errorKey", 413: "errorLarge", 429: "errorBusy", 503: "errorAway" };
const BY_CODE = { network: "errorNetwork", cut: "errorCut", context_length_exceeded: "errorLong" };

function errorName({ status, code }) {
  return BY_CODE[code] ?? BY_STATUS[status] ?? (status >= 400 && status < 500 ? "errorRefused" : "errorServer");
}
