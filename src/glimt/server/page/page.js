// The chat page: one conversation on the screen, the others in the list, and who tells whom.

import { answerTo, askedTurns } from "./answering.js";
import { Composer } from "./composer.js";
import { byId, el, newId, say, showNote } from "./dom.js";
import { History } from "./history.js";
import { readLimits, readModel, readState } from "./server.js";
import { openSettings, readSettings, setUpSettings } from "./settings.js";
import { openStore, picturesOf, loadPicture, removePictures, saveConversation, savePicture } from "./store.js";
import { AnswerView, questionView, setUpViewer } from "./turns.js";
import { switchLanguage, t, writeWords } from "./words.js";

const TITLE_CHARACTERS = 40;
const NEAR_END_PX = 80; // whoever has scrolled up further than that is reading and is left alone

const emptyConversation = () => ({ id: newId(), title: "", updated: 0, turns: [] });

class Page {
  constructor() {
    this.conversation = emptyConversation();
    this.stopper = null; // of the answer that is being written
    this.isEditing = false;
    this.forgotten = new Set(); // ids of deleted conversations: a late answer must not bring one back
    this.limits = {};
  }

  async start() {
    writeWords();
    setUpSettings(() => this.showModel());
    setUpViewer();
    this.composer = new Composer({
      send: (question) => this.ask(question),
      stop: () => this.stop(),
      endEdit: () => this.endEdit(),
      limits: () => this.limits,
      numPictures: () => picturesOf(askedTurns(this.keptTurns())).length,
    });
    this.history = new History({
      open: (conversation) => this.open(conversation),
      current: () => this.conversation.id,
      rename: (conversation, title) => this.rename(conversation, title),
      gone: (id) => this.forget(id),
      back: (id) => this.forgotten.delete(id),
    });
    this.listen();
    const [isKept, limits] = await Promise.all([openStore(), readLimits()]);
    this.limits = limits;
    if (!isKept) showNote(t("notKept"));
    await this.history.show();
    this.open(this.conversation);
    this.showModel();
  }

  listen() {
    byId("new").addEventListener("click", () => this.open(emptyConversation()));
    byId("language").addEventListener("click", () => this.changeLanguage());
    for (const id of ["side-open", "side-close", "shade"]) byId(id).addEventListener("click", () => this.toggleSide());
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !event.isComposing) this.onEscape();
    });
  }

  onEscape() {
    if (document.querySelector("dialog[open]")) return; // it closes itself
    if (document.body.classList.contains("side-open")) this.toggleSide();
    else if (this.stopper) this.stop();
    else if (this.isEditing) this.endEdit();
  }

  // --- conversations ---

  open(conversation) {
    if (document.body.classList.contains("side-open")) this.toggleSide();
    if (this.stopper && conversation.id === this.conversation.id) return; // it is being answered
    this.stop();
    this.stopper = null;
    this.composer.setAnswering(false);
    if (this.isEditing) this.endEdit();
    this.conversation = conversation;
    this.showTurns();
    this.history.show();
    this.scrollDown(true);
    if (matchMedia("(pointer: fine)").matches) byId("question").focus(); // a phone would open its keyboard
  }

  // The one on the screen may be ahead of what is kept.
  async rename(conversation, title) {
    const renamed = conversation.id === this.conversation.id ? this.conversation : conversation;
    renamed.title = title;
    await saveConversation(renamed);
    this.showTitle();
  }

  forget(id) {
    this.forgotten.add(id);
    if (id === this.conversation.id) this.open(emptyConversation());
  }

  toggleSide() {
    const isOpen = document.body.classList.toggle("side-open");
    byId("shade").hidden = !isOpen;
    byId("side-open").setAttribute("aria-expanded", String(isOpen));
    (isOpen ? byId("side-close") : byId("side-open")).focus();
  }

  changeLanguage() {
    switchLanguage();
    this.history.show();
    this.composer.showTray();
    if (!this.stopper) this.showTurns();
    this.showModel();
  }

  async save() {
    this.conversation.updated = Date.now();
    await saveConversation(this.conversation);
    await this.history.show();
  }

  // --- showing ---

  showTurns() {
    const { turns } = this.conversation;
    const last = turns.length - 1;
    byId("turns").replaceChildren(...turns.map((turn, at) => this.turnView(turn, at, last)));
    this.showTitle();
    byId("welcome").hidden = turns.length > 0;
    const starter = (text) => el("button", { type: "button", class: "starter", on: { click: () => this.begin(text) } }, text);
    byId("starters").replaceChildren(...t("starters").map(starter));
  }

  showTitle() {
    const { title } = this.conversation;
    byId("title").textContent = title || t("newConversation");
    document.title = title ? `${title} · glimt` : "glimt";
  }

  turnView(turn, at, last) {
    if (turn.role === "user") return questionView(turn, at >= last - 1 ? () => this.edit() : null);
    const view = new AnswerView();
    view.end(turn, this.actions(at === last));
    return view.element;
  }

  actions(isLast) {
    return { again: isLast ? () => this.again() : null, key: () => openSettings("key") };
  }

  begin(text) {
    this.composer.fill(text, this.composer.pictures);
    byId("question").focus();
  }

  scrollDown(isForced = false) {
    const box = byId("scroll");
    if (isForced || this.isNearEnd) box.scrollTop = box.scrollHeight;
  }

  get isNearEnd() {
    const box = byId("scroll");
    return box.scrollHeight - box.scrollTop - box.clientHeight < NEAR_END_PX;
  }

  async showModel() {
    const badge = byId("model");
    badge.classList.remove("is-ready");
    const state = await readState();
    if (state === "loading") {
      badge.textContent = t("modelLoading");
      setTimeout(() => this.showModel(), 2000);
      return;
    }
    try {
      badge.textContent = badge.title = await readModel(readSettings().key);
      badge.classList.add("is-ready");
    } catch (error) {
      badge.textContent = error.status === 401 ? t("keyNeeded") : t("modelAway");
    }
  }

  // --- asking ---

  // What stays when the last question is edited.
  keptTurns() {
    const { turns } = this.conversation;
    return this.isEditing ? turns.slice(0, turns.findLastIndex((turn) => turn.role === "user")) : turns;
  }

  async ask({ text, pictures }) {
    const { conversation } = this;
    const replaced = conversation.turns.slice(this.keptTurns().length);
    conversation.turns = this.keptTurns();
    this.setEditing(false);
    await Promise.all(pictures.map(({ id, name, width, height, blob }) => savePicture({ id, name, width, height, blob })));
    const kept = new Set(pictures.map(({ id }) => id));
    const gone = picturesOf(replaced).filter(({ id }) => !kept.has(id));
    await removePictures([{ pictures: gone }]);
    const described = pictures.map(({ id, name, width, height }) => ({ id, name, width, height }));
    conversation.turns.push({ role: "user", text, pictures: described });
    conversation.title ||= (text || pictures[0].name).slice(0, TITLE_CHARACTERS);
    if (this.conversation === conversation) await this.answer();
    else await saveConversation(conversation); // another one was opened while pictures were kept
  }

  async again() {
    if (this.stopper) return;
    if (this.isEditing) this.endEdit();
    const { turns } = this.conversation;
    if (turns.at(-1)?.role === "assistant") turns.pop();
    await this.answer();
  }

  async answer() {
    const { conversation } = this;
    const stopper = (this.stopper = new AbortController());
    const view = new AnswerView();
    this.showTurns();
    byId("turns").append(view.element);
    view.wait(this.waitingText(conversation.turns.at(-1)));
    this.composer.setAnswering(true);
    this.scrollDown(true);
    say(t("answering"));
    await this.save();
    const answer = await answerTo(conversation.turns, readSettings(), stopper.signal, {
      text: (text) => {
        const follows = this.isNearEnd;
        view.write(text, () => follows && this.scrollDown(true));
      },
      wait: (why, seconds) => view.wait(t(why, seconds)),
    });
    conversation.turns.push(answer);
    await this.finish(conversation, stopper, view, answer);
  }

  async finish(conversation, stopper, view, answer) {
    conversation.updated = Date.now();
    if (!this.forgotten.has(conversation.id)) await saveConversation(conversation);
    if (this.stopper === stopper) this.stopper = null;
    if (this.conversation !== conversation) return; // another one was opened meanwhile
    const follows = this.isNearEnd;
    view.end(answer, this.actions(true));
    if (follows) this.scrollDown(true);
    this.composer.setAnswering(false);
    if (!answer.error) say(`${t("finished")}. ${answer.text}`); // an error is an alert by itself
    if (answer.error?.status === 401) this.showModel();
    await this.history.show();
  }

  waitingText({ pictures }) {
    return pictures.length ? t("looking", pictures.length) : t("thinking");
  }

  // `finish` does the rest, so that the next question stands behind what there is of this answer.
  stop() {
    this.stopper?.abort();
  }

  // --- editing the last question ---

  async edit() {
    if (this.stopper) return;
    const question = this.conversation.turns.findLast((turn) => turn.role === "user");
    const pictures = await Promise.all(question.pictures.map(({ id }) => loadPicture(id)));
    this.setEditing(true);
    this.composer.fill(question.text, pictures.filter(Boolean));
    byId("question").focus();
  }

  endEdit() {
    this.setEditing(false);
    this.composer.fill("", []);
    byId("question").focus();
  }

  setEditing(isEditing) {
    this.isEditing = isEditing;
    this.composer.setEditing(isEditing);
  }
}

new Page().start();
