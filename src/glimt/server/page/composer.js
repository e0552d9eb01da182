// Where a question is written: its text, and its pictures however they came.

import { byId, el, iconButton, showNote } from "./dom.js";
import { PictureError, readPicture, showBlob } from "./pictures.js";
import { t } from "./words.js";

export class Composer {
  // send({text, pictures}), stop(), endEdit(): what the user wants; limits(): the server's;
  // numPictures(): those that the conversation has already
  constructor({ send, stop, endEdit, limits, numPictures }) {
    Object.assign(this, { send, stop, endEdit, limits, numPictures });
    this.pictures = [];
    this.isAnswering = false;
    this.question = byId("question");
    this.listen();
    this.update();
  }

  listen() {
    byId("composer").addEventListener("submit", (event) => (event.preventDefault(), this.submit()));
    byId("stop").addEventListener("click", () => this.stop());
    byId("editing-end").addEventListener("click", () => this.endEdit());
    byId("choose").addEventListener("click", () => byId("files").click());
    byId("files").addEventListener("change", (event) => this.takeChosen(event.target));
    this.question.addEventListener("input", () => this.update());
    this.question.addEventListener("keydown", (event) => this.onKey(event));
    document.addEventListener("paste", (event) => this.onPaste(event));
    this.listenDrops();
  }

  // Enter that ends the choice of a Chinese character is not the end of the question.
  onKey(event) {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
    event.preventDefault();
    this.submit();
  }

  submit() {
    const text = this.question.value.trim();
    if (this.isAnswering || (!text && !this.pictures.length)) return;
    const { pictures } = this;
    this.fill("", []);
    this.send({ text, pictures });
  }

  fill(text, pictures) {
    this.question.value = text;
    this.pictures = pictures;
    this.showTray();
    this.update();
  }

  setAnswering(isAnswering) {
    const hadFocus = [byId("send"), byId("stop"), document.body].includes(document.activeElement);
    this.isAnswering = isAnswering;
    document.body.classList.toggle("is-answering", isAnswering);
    byId("send").hidden = isAnswering;
    byId("stop").hidden = !isAnswering;
    if (hadFocus) (isAnswering ? byId("stop") : this.question).focus();
    this.update();
  }

  setEditing(isEditing) {
    byId("editing").hidden = !isEditing;
  }

  // The field grows with its text, up to the height that the style sheet allows.
  update() {
    this.question.style.height = "auto";
    this.question.style.height = `${this.question.scrollHeight}px`;
    byId("send").disabled = !this.question.value.trim() && !this.pictures.length;
  }

  // --- pictures ---

  async takeChosen(input) {
    const files = [...input.files];
    input.value = ""; // so that the same file can be chosen again
    await this.take(files);
  }

  onPaste(event) {
    const files = [...(event.clipboardData?.files ?? [])];
    if (!files.length) return;
    event.preventDefault();
    this.take(files);
  }

  listenDrops() {
    const drop = byId("drop");
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
    addEventListener("dragenter", (event) => hasFiles(event) && (drop.hidden = false));
    addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
    addEventListener("dragleave", (event) => event.relatedTarget || (drop.hidden = true));
    addEventListener("drop", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault(); // or the browser leaves the page for the picture
      drop.hidden = true;
      this.take([...event.dataTransfer.files]);
    });
  }

  async take(files) {
    for (const file of files) {
      const most = this.limits().limit_images;
      const has = this.numPictures() + this.pictures.length + 1;
      if (has > most) return void showNote(t("tooMany", most, has));
      await this.takeOne(file);
    }
    this.question.focus();
  }

  async takeOne(file) {
    try {
      const picture = await readPicture(file, this.limits());
      if (picture.isShrunk) showNote(t("shrunk", picture.name, picture.width, picture.height));
      this.pictures = [...this.pictures, picture];
      this.showTray();
      this.update();
    } catch (error) {
      if (!(error instanceof PictureError)) throw error;
      showNote(t("badPicture", file.name));
    }
  }

  showTray() {
    const tray = byId("tray");
    tray.hidden = !this.pictures.length;
    tray.replaceChildren(...this.pictures.map((picture) => this.thumbnail(picture)));
  }

  thumbnail(picture) {
    const image = el("img", { alt: picture.name });
    showBlob(image, picture.blob);
    const remove = () => {
      this.pictures = this.pictures.filter((other) => other !== picture);
      this.showTray();
      this.update();
      this.question.focus();
    };
    return el("li", {}, image, iconButton("close", t("removePicture", picture.name), remove, "remove"));
  }
}
