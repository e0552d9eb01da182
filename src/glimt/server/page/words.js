// Every text of the interface, in two languages, and which of them is shown.

const EN = {
  newConversation: "New conversation", conversations: "Conversations", conversation: "Conversation",
  keptHere: "Kept in this browser only.", notKept: "This browser keeps nothing here: conversations are gone when the page is closed.",
  skip: "Skip to the question", close: "Close", settings: "Settings", cancel: "Cancel", done: "Done",
  welcome: "Show a picture, ask about it", welcomeMore: "Drop, paste or choose one picture or several, in any turn, or ask without one.",
  composer: "Your question", question: "Question", ask: "Ask something…", send: "Send", stop: "Stop",
  addPictures: "Add pictures", picturesToSend: "Pictures to send", picture: "Picture",
  drop: "Drop the pictures here", keys: "Enter sends · Shift+Enter starts a new line · Esc stops",
  editing: "Editing your last question", edit: "Edit question", again: "Answer again", copy: "Copy",
  rename: "Rename", remove: "Delete", removed: "The conversation was deleted.", undo: "Undo",
  temperature: "Temperature", topP: "Top-p", maxTokens: "Max. tokens", seed: "Seed",
  default: "default", maxTokensDefault: "as fits", seedDefault: "random",
  system: "System prompt", apiKey: "API key", apiKeyHint: "none", reset: "Reset",
  apiKeyNote: "Only if the server asks for one. Forgotten when this tab is closed.",
  retry: "Try again", code: "Code", you: "You", theModel: "Answer", thinking: "Reading…",
  answering: "Answering", finished: "Answer finished", stopped: "stopped", cut: "cut at the longest length",
  loading: "The model is still loading; the question is asked as soon as it is ready…",
  modelLoading: "loading…", modelAway: "not reachable", keyNeeded: "key needed",
  starters: ["What is in the picture?", "What does the text say?", "What is different between the two pictures?"],
  looking: (n) => (n === 1 ? "Looking at the picture…" : `Looking at ${n} pictures…`),
  removePicture: (name) => `Remove ${name}`, openPicture: (name) => `Show ${name} larger`,
  busy: (s) => `The server is busy; trying again in ${s} s…`,
  first: (s) => `first token after ${s} s`, speed: (n) => `${n} tokens/s`,
  tokens: (n) => (n === 1 ? "1 token" : `${n} tokens`),
  prompt: (n) => `prompt ${n}`, ofPictures: (n) => `${n} from pictures`, cached: (n) => `${n} cached`,
  badPicture: (name) => `${name} cannot be read as a picture.`,
  tooMany: (most, has) => `At most ${most} pictures fit into one conversation; this one would have ${has}.`,
  shrunk: (name, w, h) => `${name} was larger than the server takes and is sent as ${w} × ${h}.`,
  errorKey: "The server asks for an API key, or does not know this one.",
  errorBusy: "The server has too many questions at the moment.",
  errorAway: "The server does not take questions at the moment.",
  errorNetwork: "The server cannot be reached.", errorCut: "The connection ended in the middle of the answer.",
  errorLong: "The conversation does not fit into the model's context any more: start a new one, or ask with fewer pictures.",
  errorLarge: "The pictures of this conversation are too large together: start a new one, or send fewer.",
  errorRefused: "The server refused the question.", errorServer: "The server failed.",
};

const ZH = {
  newConversation: "新对话", conversations: "对话列表", conversation: "对话",
  keptHere: "只保存在这个浏览器里。", notKept: "这个浏览器不保存内容：关闭页面后对话即消失。",
  skip: "跳到提问框", close: "关闭", settings: "设置", cancel: "取消", done: "完成",
  welcome: "给一张图片，问点什么", welcomeMore: "拖入、粘贴或选择一张或多张图片；每一轮都可以，不带图片也可以。",
  composer: "你的问题", question: "问题", ask: "请输入问题…", send: "发送", stop: "停止",
  addPictures: "添加图片", picturesToSend: "待发送的图片", picture: "图片",
  drop: "把图片放在这里", keys: "Enter 发送 · Shift+Enter 换行 · Esc 停止",
  editing: "正在修改上一个问题", edit: "修改问题", again: "重新回答", copy: "复制",
  rename: "重命名", remove: "删除", removed: "对话已删除。", undo: "撤销",
  temperature: "温度", topP: "Top-p", maxTokens: "最大词元数", seed: "随机种子",
  default: "默认", maxTokensDefault: "不限", seedDefault: "随机",
  system: "系统提示词", apiKey: "API 密钥", apiKeyHint: "无", reset: "恢复默认",
  apiKeyNote: "仅在服务器要求时填写。关闭此标签页后即清除。",
  retry: "重试", code: "代码", you: "你", theModel: "回答", thinking: "正在阅读…",
  answering: "正在回答", finished: "回答完毕", stopped: "已停止", cut: "已达最大长度",
  loading: "模型仍在加载；就绪后会立即提问…",
  modelLoading: "加载中…", modelAway: "无法连接", keyNeeded: "需要密钥",
  starters: ["图片里是什么？", "图片里写了什么？", "两张图片有什么不同？"],
  looking: (n) => (n === 1 ? "正在看图片…" : `正在看 ${n} 张图片…`),
  removePicture: (name) => `移除 ${name}`, openPicture: (name) => `放大 ${name}`,
  busy: (s) => `服务器繁忙，${s} 秒后重试…`,
  first: (s) => `首个词元 ${s} 秒`, speed: (n) => `${n} 词元/秒`,
  tokens: (n) => `${n} 个词元`,
  prompt: (n) => `提示 ${n}`, ofPictures: (n) => `图片 ${n}`, cached: (n) => `缓存 ${n}`,
  badPicture: (name) => `${name} 不是可以读取的图片。`,
  tooMany: (most, has) => `一个对话最多 ${most} 张图片，现在会有 ${has} 张。`,
  shrunk: (name, w, h) => `${name} 超出服务器的限制，将以 ${w} × ${h} 发送。`,
  errorKey: "服务器要求 API 密钥，或不认识这个密钥。",
  errorBusy: "服务器此刻的请求太多。",
  errorAway: "服务器此刻不接受提问。",
  errorNetwork: "无法连接服务器。", errorCut: "回答中途连接断开。",
  errorLong: "对话已超出模型的上下文：请新建对话，或减少图片。",
  errorLarge: "这个对话的图片总量太大：请新建对话，或减少图片。",
  errorRefused: "服务器拒绝了这个问题。", errorServer: "服务器出错了。",
};

const LANGUAGES = { en: { words: EN, tag: "en", other: "中文" }, zh: { words: ZH, tag: "zh-CN", other: "English" } };
const KEPT = "glimt-language";

const preferred = navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
let shown = LANGUAGES[localStorage.getItem(KEPT)] ? localStorage.getItem(KEPT) : preferred;

// The text of a name in the language that is shown; some take figures.
export function t(name, ...figures) {
  const text = LANGUAGES[shown].words[name];
  return typeof text === "function" ? text(...figures) : text;
}

export const number = (value, digits = 0) =>
  value.toLocaleString(LANGUAGES[shown].tag, { minimumFractionDigits: digits, maximumFractionDigits: digits });

// Writes the texts into what index.html marked with data-text, data-label and data-hint.
export function writeWords() {
  const { tag, other } = LANGUAGES[shown];
  document.documentElement.lang = tag;
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = t(element.dataset.text);
  for (const element of document.querySelectorAll("[data-hint]")) element.placeholder = t(element.dataset.hint);
  for (const element of document.querySelectorAll("[data-label]")) {
    element.setAttribute("aria-label", t(element.dataset.label));
    if (element.tagName === "BUTTON") element.title = t(element.dataset.label);
  }
  const button = document.getElementById("language");
  button.textContent = other;
  button.lang = shown === "zh" ? "en" : "zh-CN";
}

export function switchLanguage() {
  shown = shown === "zh" ? "en" : "zh";
  localStorage.setItem(KEPT, shown);
  writeWords();
}
