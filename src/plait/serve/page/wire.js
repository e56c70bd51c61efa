// Talks with the server in the OpenAI protocol: which model there is, and answers as a stream of events.

class Refusal extends Error {
  constructor(message, status, wait) {
    super(message);
    this.status = status;
    this.wait = wait; // seconds after which the server wants to be asked again
  }
}

function headers() {
  const key = sessionStorage.getItem("plait.key");
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

async function ask(path, body, signal) {
  const how = body ? { method: "POST", body: JSON.stringify(body) } : {};
  const reply = await fetch(path, { ...how, headers: headers(), signal });
  if (reply.ok) return reply;
  const text = await reply.text().catch(() => "");
  let message = "";
  try {
    message = JSON.parse(text).error.message;
  } catch {
    message = text.slice(0, 300);
  }
  const wait = parseFloat(reply.headers.get("Retry-After"));
  throw new Refusal(message || `The server said ${reply.status}.`, reply.status, Number.isFinite(wait) ? wait : 1);
}

async function first_model() {
  const reply = await ask("v1/models");
  return (await reply.json()).data[0];
}

/** Yields what the answer grows by: {content, reasoning, reason, usage}, each where there is one. */
async function* answer(request, signal) {
  const reply = await ask("v1/chat/completions", { ...request, stream: true, stream_options: { include_usage: true } }, signal);
  for await (const data of events(reply.body)) {
    if (data === "[DONE]") return;
    const part = JSON.parse(data);
    if (part.error) throw new Refusal(part.error.message || "The server failed.", part.error.code);
    const choice = (part.choices && part.choices[0]) || {};
    const delta = choice.delta || {};
    yield {
      content: delta.content || "",
      reasoning: delta.reasoning_content || delta.reasoning || "",
      reason: choice.finish_reason,
      usage: part.usage,
    };
  }
  throw new Refusal("The connection ended before the answer did.", 0);
}

/** The data of server-sent events. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  let data = [];
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (held + value).split(/\r\n|\n|\r(?!$)/);
    held = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
      else if (!line && data.length) {
        yield data.join("\n");
        data = [];
      }
    }
  }
}
