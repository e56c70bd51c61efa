// The page itself: what is shown, what runs, and what keys and buttons do.

let model = null; // the server's first
let chat = null; // the conversation that is shown
let views = new Map(); // turn -> TurnView, of the shown path
let isPinned = true; // the newest text stays in sight
const running = new Map(); // id of a conversation -> its answer in the making
const gone = new Set(); // ids of deleted conversations

// ---- showing

function show(other) {
  chat = other;
  location.hash = chat.turns.length ? chat.id : "";
  notice(""); // what was said of the other one
  draw();
  list();
  isPinned = true;
  follow();
  if (isWide()) $("text").focus();
}

function draw() {
  views = new Map();
  const nodes = [];
  let parent = chat;
  for (const turn of path_of(chat)) {
    const view = new TurnView(turn, { place: parent.turns.indexOf(turn), of: parent.turns.length }, acts);
    views.set(turn, view);
    nodes.push(view.node);
    parent = turn;
  }
  const run = running.get(chat.id);
  if (run && views.has(run.turn)) views.get(run.turn).update(true);
  $("turns").replaceChildren(...nodes);
  $("welcome").hidden = nodes.length > 0;
  $("system").value = chat.system || "";
  memory();
  buttons();
}

function memory() {
  const known = path_of(chat).filter((turn) => turn.facts && turn.facts.context != null);
  draw_memory(known.length ? known.at(-1).facts : null, model);
}

function buttons() {
  const run = running.get(chat.id);
  $("stop").hidden = !run;
  $("send").hidden = Boolean(run);
  $("send").disabled = !$("text").value.trim();
  document.title = chat.title ? `${chat.title} · Plait` : "Plait";
}

function list() {
  const rows = store.list().map(({ id, title }) => {
    const isShown = chat && id === chat.id;
    const open = make("button", { type: "button", class: "open", "aria-current": isShown ? "true" : null }, title || "Untitled");
    open.addEventListener("click", () => {
      const found = running.has(id) ? running.get(id).chat : store.load(id);
      if (found) show(found);
      uncover();
    });
    return make("li", {}, open, button("down", "Save as Markdown", () => save_markdown(id)), button("delete", "Delete", () => remove(id)));
  });
  $("conversations").replaceChildren(...rows);
  $("export").disabled = $("clear").disabled = !rows.length;
}

function follow() {
  if (isPinned) $("talk").scrollTop = $("talk").scrollHeight;
  $("down").hidden = isPinned;
}

function notice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function keep(which) {
  if (gone.has(which.id)) return;
  which.time = Date.now();
  if (!store.save(which)) notice("This browser does not keep this conversation: its storage is full or forbidden. Delete or export older ones.");
}

// ---- asking

function messages_until(which, turn) {
  const messages = which.system ? [{ role: "system", content: which.system }] : [];
  for (const one of path_of(which)) {
    if (one === turn) break;
    if (one.role === "user" || one.content) messages.push({ role: one.role, content: one.content });
  }
  return messages;
}

function request_for(which, turn) {
  const settings = store.settings();
  const request = { model: model ? model.id : "default", messages: messages_until(which, turn), ...sampling(settings) };
  const can_think = !model || !model.plait || model.plait.thinking !== false;
  if (can_think) {
    const wants = settings.thinking !== false;
    request.chat_template_kwargs = { enable_thinking: wants };
    if (wants && settings.budget != null) request.thinking_token_budget = settings.budget;
  }
  return request;
}

async function respond(parent) {
  const turn = add_turn(parent, "assistant", "");
  const run = { chat, turn, control: new AbortController(), begin: performance.now(), pieces: 0, frame: 0, saved: 0 };
  running.set(chat.id, run);
  if (model) turn.model = model.id;
  draw();
  follow();
  say("Answering");
  try {
    await stream(run);
  } catch (error) {
    if (error.name === "AbortError") turn.facts = { ...measured(run), reason: "cancelled" };
    else turn.failure = error.status === 401 ? "The server asks for an API key: enter it in the settings." : error.message;
  }
  running.delete(run.chat.id);
  cancelAnimationFrame(run.frame);
  keep(run.chat);
  if (chat === run.chat) {
    if (views.has(turn)) views.get(turn).update(false);
    memory();
    buttons();
    follow();
  }
  list();
  say(turn.failure || "The answer is complete");
}

async function stream(run) {
  const { turn } = run;
  for (let attempt = 0; ; attempt += 1) {
    try {
      for await (const part of answer(request_for(run.chat, turn), run.control.signal)) take(run, part);
      turn.facts = measured(run);
      return;
    } catch (error) {
      // a full server says when to come back; nothing has been shown yet
      if (error.status !== 429 || attempt >= 5 || run.pieces) throw error;
      await pause(error.wait, run);
    }
  }
}

async function pause(seconds, run) {
  for (let left = Math.min(Math.max(Math.ceil(seconds), 1), 60); left > 0; left -= 1) {
    if (chat === run.chat) notice(`The server is full; asking again in ${left} s.`);
    await new Promise((resolve) => setTimeout(resolve, 1000));
    run.control.signal.throwIfAborted();
  }
  notice("");
}

function take(run, part) {
  const { turn } = run;
  if (part.content || part.reasoning) {
    run.last = performance.now();
    run.first ??= run.last;
    run.pieces += 1;
    turn.content += part.content;
    if (part.reasoning) turn.reasoning = (turn.reasoning || "") + part.reasoning;
  }
  if (part.reason) run.reason = part.reason;
  if (part.usage) run.usage = part.usage;
  run.frame ||= requestAnimationFrame(() => paint(run));
}

function paint(run) {
  run.frame = 0;
  run.turn.facts = measured(run);
  if (chat === run.chat && views.has(run.turn)) {
    views.get(run.turn).update(true);
    follow();
  }
  if (performance.now() - run.saved > 2000) {
    run.saved = performance.now();
    keep(run.chat);
  }
}

function measured(run) {
  const usage = run.usage || {};
  const tokens = usage.completion_tokens ?? run.pieces;
  const seconds = run.first == null ? 0 : (run.last - run.first) / 1000;
  const cache = usage.cache || {};
  return {
    tokens,
    rate: tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : null,
    first: run.first == null ? null : (run.first - run.begin) / 1000,
    prompt: usage.prompt_tokens,
    cached: usage.prompt_tokens_details && usage.prompt_tokens_details.cached_tokens,
    reasoning: usage.completion_tokens_details && usage.completion_tokens_details.reasoning_tokens,
    context: usage.prompt_tokens == null ? null : usage.prompt_tokens + tokens,
    state: cache.state_bytes,
    kv: cache.kv_bytes,
    reason: run.reason,
  };
}

function send() {
  const text = $("text").value.trim();
  if (!text || running.has(chat.id)) return;
  $("text").value = "";
  grow($("text"));
  notice("");
  say_to(path_of(chat).at(-1) || chat, text);
}

function say_to(parent, text) {
  const turn = add_turn(parent, "user", text);
  chat.title ||= title_of(text);
  isPinned = true;
  keep(chat);
  history.replaceState(null, "", `#${chat.id}`);
  list();
  respond(turn);
}

function stop() {
  const run = running.get(chat.id);
  if (run) run.control.abort();
  return Boolean(run);
}

function parent_of(turn) {
  const path = path_of(chat);
  return path[path.indexOf(turn) - 1] || chat;
}

const acts = {
  again(turn) {
    if (running.has(chat.id)) return;
    const parent = parent_of(turn);
    // an answer that never began is not a version worth keeping
    if (turn.failure && !turn.content) parent.turns.splice(parent.turns.indexOf(turn), 1);
    isPinned = true;
    respond(parent);
  },

  turn_to(turn, step) {
    if (running.has(chat.id)) return;
    const parent = parent_of(turn);
    parent.chosen = Math.min(Math.max(parent.turns.indexOf(turn) + step, 0), parent.turns.length - 1);
    store.save(chat);
    draw();
  },

  edit(view) {
    if (running.has(chat.id)) return;
    const field = make("textarea", { "aria-label": "Edit your message", rows: "1" });
    field.value = view.turn.content;
    const done = () => draw();
    const submit = (event) => {
      event.preventDefault();
      const text = field.value.trim();
      if (text && text !== view.turn.content) say_to(parent_of(view.turn), text);
      else done();
    };
    const cancel = make("button", { type: "button", class: "plain small", onclick: done }, "Cancel");
    const form = make("form", { class: "edit", onsubmit: submit }, field, make("div", { class: "row" }, cancel, make("button", { class: "plain small strong" }, "Send")));
    field.addEventListener("input", () => grow(field));
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") done();
      else if (is_send(event)) submit(event);
      else return;
      event.stopPropagation();
    });
    view.node.replaceChildren(form);
    grow(field);
    field.focus();
  },
};

// ---- keeping

function save_markdown(id) {
  const found = id === chat.id ? chat : store.load(id);
  if (found) download(`${(found.title || "conversation").replace(/[^\p{L}\p{N} -]/gu, "").slice(0, 50) || "conversation"}.md`, as_markdown(found), "text/markdown");
}

function remove(id) {
  if (!confirm("Delete this conversation from this browser?")) return;
  forget(id);
  if (id === chat.id) show(new_chat(store.settings().system));
  else list();
}

function forget(id) {
  // an answer that still runs must not write the conversation back
  if (running.has(id)) running.get(id).control.abort();
  gone.add(id);
  store.remove(id);
}
