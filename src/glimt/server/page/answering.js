// One answer from the question to its last token: the request's body, waiting for a server that
// loads or is busy, and the times as they are seen here.

import { dataUrl } from "./pictures.js";
import { loadPicture } from "./store.js";
import { ServerError, readState, streamAnswer } from "./server.js";

const MOST_TRIES = 4; // of a busy server; one that loads is waited for until the user stops it
const POLL_S = 1;
const LEAST_MS = 20; // of an answer that a speed is told of: below, it is one of the network

// The answer to the last question of a conversation, as a turn without its place:
// {text, finish, facts, error}. `on.text(text)` follows it, `on.wait(why, seconds)` says what for.
export async function answerTo(turns, settings, signal, on) {
  const answer = { role: "assistant", text: "", finish: null, facts: {}, error: null };
  try {
    const body = await bodyOf(turns, settings);
    for (let tries = 1; ; tries++) {
      try {
        await follow(body, settings.key, signal, answer, on);
        break;
      } catch (error) {
        if (answer.text || !(await mayRetry(error, tries, signal, on.wait))) throw error;
      }
    }
  } catch (error) {
    if (signal.aborted) answer.finish = "stopped";
    else answer.error = toldOf(error);
  }
  return answer;
}

function toldOf(error) {
  if (error instanceof ServerError) return { status: error.status, code: error.code, message: error.message };
  console.error(error);
  return { status: 0, code: "page", message: String(error) };
}

async function bodyOf(turns, { system, sampling }) {
  const messages = await Promise.all(askedTurns(turns).map(messageOf));
  if (system) messages.unshift({ role: "system", content: system });
  const stream_options = { include_usage: true, continuous_usage_stats: true }; // counts of stopped ones too
  return { messages, stream: true, stream_options, ...sampling };
}

// What the model is told of a conversation: not an answer that never began, and not a question that
// was refused, or its broken picture would have every later question refused as well.
export function askedTurns(turns) {
  const isRefused = (turn) => turn?.role === "assistant" && turn.error && !turn.text;
  return turns.filter((turn, at) => (turn.role === "user" ? !isRefused(turns[at + 1]) : turn.text));
}

async function messageOf({ role, text, pictures = [] }) {
  if (!pictures.length) return { role, content: text };
  const urls = await Promise.all(pictures.map(async ({ id }) => dataUrl((await loadPicture(id)).blob)));
  const parts = urls.map((url) => ({ type: "image_url", image_url: { url } }));
  return { role, content: text ? [...parts, { type: "text", text }] : parts };
}

async function follow(body, key, signal, answer, on) {
  const began = performance.now();
  let first = null;
  for await (const { text, finish, usage } of streamAnswer(body, key, signal)) {
    const now = performance.now();
    if (text) first ??= now;
    answer.text += text;
    answer.finish = finish ?? answer.finish;
    answer.facts = factsOf(began, first, now, usage, answer.facts);
    if (text) on.text(answer.text);
  }
}

// Speed is of the tokens after the first one: the first is paid for by prompt and pictures.
function factsOf(began, first, now, usage, before) {
  const facts = { ...before };
  if (first !== null) facts.firstS ??= (first - began) / 1000;
  if (!usage) return facts;
  facts.tokens = usage.completion_tokens;
  facts.promptTokens = usage.prompt_tokens;
  facts.imageTokens = usage.prompt_tokens_details?.image_tokens ?? 0;
  facts.cachedTokens = usage.prompt_tokens_details?.cached_tokens ?? 0;
  // The last chunk repeats the counts and comes after the last token: it must not slow the rate.
  const isNew = facts.tokens !== before.tokens;
  if (first !== null && now - first > LEAST_MS && facts.tokens > 1 && isNew) {
    facts.perSecond = ((facts.tokens - 1) * 1000) / (now - first);
  }
  return facts;
}

// Waits where waiting helps. False: the error is to be shown.
async function mayRetry(error, tries, signal, onWait) {
  if (signal.aborted || !(error instanceof ServerError)) return false;
  if (error.status === 503) return waitReady(signal, onWait);
  if (error.status !== 429 || tries >= MOST_TRIES) return false;
  for (let left = Math.min(30, Math.max(1, error.waitS ?? 1)); left > 0; left--) {
    onWait("busy", Math.ceil(left));
    await pause(1, signal);
  }
  return true;
}

async function waitReady(signal, onWait) {
  let state;
  while ((state = await readState()) === "loading") {
    onWait("loading");
    await pause(POLL_S, signal);
  }
  return state === "ready";
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => (clearTimeout(timer), reject(signal.reason));
    const timer = setTimeout(() => (signal.removeEventListener("abort", stop), resolve()), seconds * 1000);
    if (signal.aborted) stop();
    signal.addEventListener("abort", stop, { once: true });
  });
}
