// Draws the talk: turns with their reasoning, text, facts and buttons; the model's layers; the memory it uses.

const $ = (id) => document.getElementById(id);

function icon(name) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const use = document.createElementNS(space, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.setAttribute("aria-hidden", "true");
  svg.append(use);
  return svg;
}

function button(name, label, act) {
  return make("button", { type: "button", class: "icon", "aria-label": label, title: label, onclick: act }, icon(name));
}

async function copy_text(text, from) {
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // pages that are not served securely have no clipboard; the old way still works there
    const field = make("textarea", { class: "unseen", readonly: true });
    field.value = text;
    (from.closest("dialog") || document.body).append(field);
    field.select();
    done = document.execCommand("copy");
    field.remove();
    from.focus();
  }
  from.classList.toggle("done", done);
  setTimeout(() => from.classList.remove("done"), 1200);
  say(done ? "Copied" : "Copying is not allowed here");
}

/** Tells those who listen instead of look. */
function say(text) {
  $("status").textContent = text;
}

const thousands = (n) => Math.round(n).toLocaleString("en");

function bytes(n) {
  for (const [unit, scale] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (n >= scale) return `${(n / scale).toFixed(n / scale >= 100 ? 0 : 1)} ${unit}`;
  }
  return `${n} bytes`;
}

function count(n) {
  for (const [unit, scale] of [["B", 1e9], ["M", 1e6]]) {
    if (n >= scale) return `${(n / scale).toFixed(n / scale >= 100 ? 0 : 1)} ${unit}`;
  }
  return thousands(n);
}

/** What is known of an answer, in words: speed, length, waiting, reuse. */
function facts_in_words(facts) {
  if (!facts) return "";
  const parts = [];
  if (facts.rate) parts.push(`${facts.rate < 100 ? facts.rate.toFixed(1) : thousands(facts.rate)} tokens/s`);
  if (facts.tokens) parts.push(`${thousands(facts.tokens)} token${facts.tokens === 1 ? "" : "s"}`);
  if (facts.first != null) parts.push(`first after ${facts.first.toFixed(2)} s`);
  if (facts.cached) parts.push(`${thousands(facts.cached)} of ${thousands(facts.prompt)} prompt tokens reused`);
  if (facts.reason === "length") parts.push("cut at the longest answer");
  if (facts.reason === "cancelled") parts.push("stopped");
  return parts.join(" · ");
}

/** The nodes of one turn. `acts` has copy, edit, again, turn_to(step); `at` is {place, of} among its siblings. */
class TurnView {
  constructor(turn, at, acts) {
    this.turn = turn;
    const isUser = turn.role === "user";
    this.prose = make("div", { class: "prose" });
    this.facts = make("span", { class: "facts" });
    this.failure = make("div", { class: "failure", hidden: true });
    const versions = at.of > 1 ? this.versions(at, acts) : null;
    const more = isUser
      ? button("edit", "Edit this message", () => acts.edit(this))
      : button("again", "Answer again", () => acts.again(turn));
    const copy = button("copy", isUser ? "Copy this message" : "Copy this answer", () => copy_text(turn.content, copy));
    this.tools = make("div", { class: "tools" }, versions, copy, more, this.facts);
    this.node = make("li", { class: `turn ${turn.role}`, "aria-label": isUser ? "You" : "Model" });
    if (isUser) {
      this.prose.append(turn.content);
      this.node.append(this.prose, this.tools);
    } else {
      this.summary = make("summary");
      this.thoughts = make("div", { class: "prose thoughts" });
      this.reasoning = make("details", { class: "reasoning", hidden: true }, this.summary, this.thoughts);
      // what is folded is drawn when it is opened
      this.reasoning.addEventListener("toggle", () => this.update());
      this.text = new Growing(this.prose);
      this.thinking = new Growing(this.thoughts);
      this.node.append(this.reasoning, this.prose, this.failure, this.tools);
      this.retry = () => acts.again(turn);
      this.update();
    }
  }

  versions(at, acts) {
    const back = button("back", "Earlier version", () => acts.turn_to(this.turn, -1));
    const next = button("next", "Later version", () => acts.turn_to(this.turn, 1));
    back.disabled = at.place === 0;
    next.disabled = at.place === at.of - 1;
    return make("span", { class: "versions" }, back, `${at.place + 1}/${at.of}`, next);
  }

  update(isRunning = this.isRunning) {
    const { turn } = this;
    this.isRunning = isRunning;
    this.node.classList.toggle("running", Boolean(isRunning));
    this.node.setAttribute("aria-busy", String(Boolean(isRunning)));
    this.reasoning.hidden = !turn.reasoning;
    if (turn.reasoning) {
      const tokens = turn.facts && turn.facts.reasoning;
      const isThinking = isRunning && !turn.content;
      this.summary.textContent = isThinking ? "Thinking…" : `Reasoning${tokens ? `, ${thousands(tokens)} tokens` : ""}`;
      if (this.reasoning.open && this.drawn_thoughts !== turn.reasoning) {
        this.thinking.show(turn.reasoning);
        this.drawn_thoughts = turn.reasoning;
      }
    }
    if (this.drawn !== turn.content) {
      this.text.show(turn.content);
      this.drawn = turn.content;
    }
    this.facts.textContent = facts_in_words(turn.facts);
    this.failure.hidden = !turn.failure;
    if (turn.failure && this.failure.dataset.words !== turn.failure) {
      this.failure.dataset.words = turn.failure;
      const again = make("button", { type: "button", class: "plain small", onclick: this.retry }, "Try again");
      this.failure.replaceChildren(make("span", {}, turn.failure), again);
    }
  }
}

const KINDS = { M: ["mamba", "Mamba-2"], "*": ["attention", "attention"], "-": ["mlp", "MLP"], E: ["experts", "MoE"] };

/** The opening of an empty conversation: name, layers as coloured tiles, sizes in words. */
function draw_welcome(model) {
  if (!model) return;
  const about = model.plait || {};
  const pattern = typeof about.pattern === "string" ? about.pattern.slice(0, 400) : "";
  $("welcome-name").textContent = model.id;
  const counts = {};
  const tiles = [...pattern].filter((letter) => KINDS[letter]);
  for (const letter of tiles) counts[letter] = (counts[letter] || 0) + 1;
  $("layers").replaceChildren(...tiles.map((letter) => make("i", { class: KINDS[letter][0] })));
  const layers = Object.entries(counts).map(([letter, n]) => `${n} ${KINDS[letter][1]}`);
  $("layers").setAttribute("aria-label", `Layers: ${layers.join(", ") || "unknown"}`);
  $("layers").hidden = !tiles.length;
  const words = [];
  if (about.parameters) words.push(`${count(about.parameters)} parameters`);
  if (layers.length) words.push(`${layers.join(", ")} layers`);
  if (about.state_bytes != null) {
    const growing = about.kv_bytes_per_token ? ` and ${bytes(about.kv_bytes_per_token)} per token` : "";
    words.push(`a conversation takes ${bytes(about.state_bytes)}${growing}`);
  }
  $("welcome-words").textContent = words.length ? `${words.join("; ")}.` : "Ready.";
}

/** Context and memory of the talk after its last answer. */
function draw_memory(facts, model) {
  const about = (model && model.plait) || {};
  const limit = model && model.max_model_len;
  $("memory").hidden = !facts || facts.context == null;
  if ($("memory").hidden) return;
  const state = facts.state ?? about.state_bytes;
  const kv = facts.kv ?? (about.kv_bytes_per_token == null ? null : about.kv_bytes_per_token * facts.context);
  $("memory").classList.toggle("no-bytes", state == null || kv == null);
  if (state != null) $("state-bytes").textContent = bytes(state);
  if (kv != null) $("kv-bytes").textContent = bytes(kv);
  const words = `${thousands(facts.context)}${limit ? ` of ${thousands(limit)}` : ""} tokens`;
  $("context-words").textContent = words;
  $("context-bar").style.width = `${limit ? Math.min(100, (100 * facts.context) / limit) : 0}%`;
  $("memory").classList.toggle("full", Boolean(limit) && facts.context > 0.9 * limit);
  const memory = state == null || kv == null ? "" : `; ${bytes(state)} of constant state, ${bytes(kv)} that grow`;
  $("memory").setAttribute("aria-label", `Context: ${words}${memory}`);
}
