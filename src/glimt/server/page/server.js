// Talks to the server: limits, health, the model's name, and an answer as a stream of pieces.

export class ServerError extends Error {
  // status: of HTTP, or 0 where no reply came; code: the server's own; waitS: when to try again
  constructor(status, message, code = null, waitS = null) {
    super(message);
    Object.assign(this, { status, code, waitS });
  }
}

const LIMITS = { limit_images: 8, max_image_bytes: 20 * 2 ** 20, max_image_pixels: 50_000_000 };

// What the server takes; its defaults, where it does not say.
export async function readLimits() {
  try {
    const reply = await fetch("/page/limits.json");
    return reply.ok ? { ...LIMITS, ...(await reply.json()) } : LIMITS;
  } catch {
    return LIMITS;
  }
}

// "ready", "loading", "draining", "failed", or "away" where there is no reply.
export async function readState() {
  try {
    const reply = await fetch("/health");
    return reply.ok ? "ready" : ((await reply.json()).status ?? "loading");
  } catch {
    return "away";
  }
}

// The name of the model that is served. Raises ServerError.
export async function readModel(key) {
  const reply = await send("/v1/models", { headers: headersOf(key) });
  return (await reply.json()).data[0].id;
}

// Pieces of an answer: {text, finish, usage}, each only where the server said so.
// Raises ServerError; an AbortError when `signal` says so.
export async function* streamAnswer(body, key, signal) {
  const headers = { ...headersOf(key), "Content-Type": "application/json" };
  const reply = await send("/v1/chat/completions", { method: "POST", headers, body: JSON.stringify(body), signal });
  let isWhole = false;
  for await (const data of eventsOf(reply.body)) {
    if (data === "[DONE]") return;
    const piece = pieceOf(JSON.parse(data));
    isWhole ||= piece.finish !== null;
    yield piece;
  }
  if (!isWhole) throw new ServerError(0, "", "cut");
}

function pieceOf(event) {
  if (event.error) throw errorOf(500, event);
  const choice = event.choices?.[0];
  return { text: choice?.delta?.content ?? "", finish: choice?.finish_reason ?? null, usage: event.usage ?? null };
}

// The data of each server-sent event; comments, which keep a connection open, are passed over.
async function* eventsOf(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder(); // not a stream of its own: that drops what it holds when one breaks
  let rest = "";
  while (true) {
    const { value, done } = await read(reader);
    if (done) return;
    const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "", "cut");
  }
}

const headersOf = (key) => (key ? { Authorization: `Bearer ${key}` } : {});

async function send(path, options) {
  let reply;
  try {
    reply = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError(0, "", "network");
  }
  if (reply.ok) return reply;
  const waitS = parseFloat(reply.headers.get("Retry-After"));
  throw errorOf(reply.status, await reply.json().catch(() => ({})), Number.isNaN(waitS) ? null : waitS);
}

// Both forms of an error: OpenAI's nested one, and the flat one of other protocols.
function errorOf(status, body, waitS = null) {
  const { error } = body;
  const message = typeof error === "string" ? error : (error?.message ?? body.message ?? "");
  return new ServerError(status, message, error?.code ?? null, waitS);
}
