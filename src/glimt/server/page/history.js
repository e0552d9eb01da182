// The list of conversations: open, rename, delete with a way back.

import { byId, el, iconButton, showNote } from "./dom.js";
import { listConversations, loadConversation, removeConversation, removePictures, saveConversation } from "./store.js";
import { t } from "./words.js";

const UNDO_S = 8;

export class History {
  // open(conversation): shows one; current(): the id of the one that is shown;
  // rename(conversation, title): gives one a title; gone(id), back(id): one was deleted, or that undone
  constructor({ open, current, rename, gone, back }) {
    Object.assign(this, { open, current, giveTitle: rename, gone, back });
  }

  async show() {
    const all = await listConversations();
    byId("history").replaceChildren(...all.map((conversation) => this.row(conversation)));
    return all;
  }

  row(conversation) {
    const isShown = conversation.id === this.current();
    const open = el("button", {
      type: "button", class: "history-open", "aria-current": isShown ? "true" : null,
      title: conversation.title, on: { click: () => this.openLatest(conversation.id) },
    }, conversation.title);
    const rename = iconButton("edit", t("rename"), () => this.rename(row, conversation));
    const remove = iconButton("delete", t("remove"), () => this.remove(conversation));
    const row = el("li", { class: isShown ? "is-shown" : null }, open, rename, remove);
    return row;
  }

  // As it is kept now: an answer may have come since the list was shown. Whoever opened another one
  // meanwhile wants that.
  async openLatest(id) {
    const before = this.current();
    const conversation = await loadConversation(id);
    if (conversation && this.current() === before) this.open(conversation);
  }

  rename(row, conversation) {
    const input = el("input", { class: "rename", "aria-label": t("rename"), maxlength: "80" });
    input.value = conversation.title;
    let isOver = false; // leaving the field is also what taking it away causes
    const end = async (title) => {
      if (isOver) return;
      isOver = true;
      if (title) await this.giveTitle(conversation, title);
      await this.show();
    };
    input.addEventListener("blur", () => end(input.value.trim()));
    input.addEventListener("keydown", (event) => {
      if (event.isComposing) return;
      if (event.key === "Enter") end(input.value.trim());
      if (event.key === "Escape") (event.stopPropagation(), end(""));
    });
    row.replaceChildren(input);
    input.select();
  }

  // Its pictures go when there is no way back any more.
  async remove(conversation) {
    this.gone(conversation.id);
    await removeConversation(conversation.id);
    const forget = setTimeout(() => removePictures(conversation.turns), UNDO_S * 1000);
    const undo = async () => {
      clearTimeout(forget);
      this.back(conversation.id);
      await saveConversation(conversation);
      await this.show();
    };
    showNote(t("removed"), { label: t("undo"), run: undo }, UNDO_S);
    await this.show();
  }
}
