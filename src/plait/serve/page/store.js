// What the browser keeps: conversations and settings, each under its own name, and nothing on the server.
//
// A conversation is a tree: an edited question or a regenerated answer stands beside the old one, and `chosen` says
// which is shown. turn = {role, content, reasoning, facts, failure, turns: [...], chosen}

const CHAT = "plait.chat.";
const TITLE = "plait.title.";
const SETTINGS = "plait.settings";

const store = {
  works: true,

  read(name) {
    try {
      return JSON.parse(localStorage.getItem(name));
    } catch {
      return null;
    }
  },

  write(name, value) {
    try {
      localStorage.setItem(name, JSON.stringify(value));
      this.works = true;
    } catch {
      // full or forbidden: the talk goes on, and the page says that it will not be kept
      this.works = false;
    }
    return this.works;
  },

  names(prefix) {
    try {
      return Object.keys(localStorage).filter((name) => name.startsWith(prefix));
    } catch {
      return [];
    }
  },

  /** Titles of all conversations, the newest first. */
  list() {
    const found = this.names(TITLE).map((name) => ({ ...this.read(name), id: name.slice(TITLE.length) }));
    return found.filter((one) => typeof one.title === "string").sort((a, b) => b.time - a.time);
  },

  load(id) {
    const chat = this.read(CHAT + id);
    return chat && Array.isArray(chat.turns) ? { ...chat, id } : null;
  },

  save(chat) {
    const { id, ...rest } = chat;
    return this.write(CHAT + id, rest) && this.write(TITLE + id, { title: chat.title, time: chat.time });
  },

  remove(id) {
    localStorage.removeItem(CHAT + id);
    localStorage.removeItem(TITLE + id);
  },

  settings() {
    const found = this.read(SETTINGS);
    return found && typeof found === "object" ? found : {};
  },
};

function new_chat(system) {
  const id = Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");
  return { id, title: "", time: Date.now(), system, turns: [], chosen: 0 };
}

/** The turns that are shown, from first to last. */
function path_of(chat) {
  const path = [];
  for (let node = chat; node.turns && node.turns.length; ) {
    node = node.turns[Math.min(Math.max(node.chosen || 0, 0), node.turns.length - 1)];
    path.push(node);
  }
  return path;
}

/** Adds a turn beside those that already follow `parent`, and shows it. */
function add_turn(parent, role, content) {
  const turn = { role, content, turns: [], chosen: 0 };
  parent.chosen = parent.turns.push(turn) - 1;
  return turn;
}

function title_of(text) {
  const line = text.trim().split("\n")[0].replace(/\s+/g, " ");
  return line.length > 60 ? `${line.slice(0, 57).trimEnd()}…` : line;
}

/** One conversation as Markdown, as it is shown. */
function as_markdown(chat) {
  const parts = [`# ${chat.title || "Conversation"}`];
  if (chat.system) parts.push(`**System**\n\n${chat.system}`);
  for (const turn of path_of(chat)) {
    if (turn.reasoning) parts.push(`<details><summary>Reasoning</summary>\n\n${turn.reasoning}\n\n</details>`);
    parts.push(`**${turn.role === "user" ? "You" : turn.model || "Model"}**\n\n${turn.content}`);
  }
  return `${parts.join("\n\n")}\n`;
}

function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  const link = make("a", { href: url, download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
