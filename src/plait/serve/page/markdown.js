// Markdown to nodes of the page. What a model writes never becomes markup: every element is made here by name, every
// string goes in as text, and a link leads to http or https or is not one. Bounds keep hostile text cheap.

const DEEPEST = 8; // quotes and lists inside each other
const LONGEST = 40000; // characters of a paragraph that still get emphasis and links

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])\s*(?:\1\s*){2,}$/;
const QUOTE = /^ {0,3}>\s?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(?:(\s+)(.*))?$/;
const COLUMNS = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const MATH = [/^ {0,3}\$\$/, /^ {0,3}\\\[/];

/** Makes an element: name, attributes, children (nodes or texts). */
function make(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value != null) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

/** Shows a text that grows: only its last block is made anew, what stands before it is left alone. */
class Growing {
  constructor(place) {
    this.place = place;
    this.reset();
  }

  reset() {
    this.place.replaceChildren();
    this.settled = 0; // characters whose nodes stay
    this.loose = []; // nodes of the rest
  }

  show(text) {
    const rest = text.slice(this.settled);
    const lines = rest.split("\n");
    const found = blocks(lines);
    for (const node of this.loose) node.remove();
    const nodes = found.map((block) => block_node(block, 0));
    this.place.append(...nodes);
    // a last line that is not whole may still become something else, also what belongs to the block before it
    let keep = found.length - 1;
    while (keep > 0 && found[keep].line >= lines.length - 1) keep -= 1;
    this.loose = nodes.slice(Math.max(keep, 0));
    if (keep > 0) for (let i = 0; i < found[keep].line; i += 1) this.settled += lines[i].length + 1;
  }
}

/** Shows a whole text. */
function render(text) {
  const place = document.createDocumentFragment();
  place.append(...blocks(text.split("\n")).map((block) => block_node(block, 0)));
  return place;
}

const isBlank = (line) => !line.trim();
const indent = (line) => line.length - line.trimStart().length;

function item(line) {
  const found = RULE.test(line) ? null : ITEM.exec(line);
  if (!found) return null;
  const [, before, mark, gap, rest] = found;
  const isOrdered = mark.length > 1;
  // a wide gap is the beginning of the text, not part of the mark
  const width = before.length + mark.length + Math.min((gap || " ").length, 4);
  return { before: before.length, isOrdered, mark: mark.at(-1), start: parseInt(mark, 10), width, rest: rest || "" };
}

function isTable(lines, i) {
  if (i + 1 >= lines.length || !lines[i].includes("|") || !lines[i + 1].includes("-")) return false;
  return COLUMNS.test(lines[i + 1]) && cells(lines[i]).length === cells(lines[i + 1]).length;
}

function ends(lines, i) {
  const line = lines[i];
  if (isBlank(line) || FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line)) return true;
  const found = item(line);
  if (found && found.rest && (!found.isOrdered || found.start === 1)) return true;
  return isTable(lines, i) || MATH.some((opening) => opening.test(line));
}

/** Blocks of some lines, each with the index of its first line. */
function blocks(lines, depth = 0) {
  const found = [];
  let i = 0;
  while (i < lines.length) {
    if (isBlank(lines[i])) {
      i += 1;
      continue;
    }
    const line = i;
    const [block, next] = block_at(lines, i, depth);
    found.push({ ...block, line });
    i = next;
  }
  return found;
}

function block_at(lines, i, depth) {
  const line = lines[i];
  const heading = HEADING.exec(line);
  if (heading) return [{ kind: "heading", level: heading[1].length, text: heading[2] }, i + 1];
  if (FENCE.test(line)) return fence_at(lines, i);
  if (RULE.test(line)) return [{ kind: "rule" }, i + 1];
  if (MATH.some((opening) => opening.test(line))) return math_at(lines, i);
  if (isTable(lines, i)) return table_at(lines, i);
  if (depth < DEEPEST && QUOTE.test(line)) {
    const inner = [];
    while (i < lines.length && !isBlank(lines[i]) && (QUOTE.test(lines[i]) || !ends(lines, i))) {
      inner.push(lines[i].replace(QUOTE, ""));
      i += 1;
    }
    return [{ kind: "quote", blocks: blocks(inner, depth + 1) }, i];
  }
  if (depth < DEEPEST && item(line)) return list_at(lines, i, depth);
  const text = [line];
  for (i += 1; i < lines.length && !ends(lines, i); i += 1) text.push(lines[i]);
  return [{ kind: "paragraph", text: text.map((part) => part.trimStart()).join("\n") }, i];
}

function fence_at(lines, i) {
  const [, marks, info] = FENCE.exec(lines[i]);
  const closing = new RegExp(`^ {0,3}${marks[0]}{${marks.length},}\\s*$`);
  const margin = indent(lines[i]);
  const text = [];
  for (i += 1; i < lines.length && !closing.test(lines[i]); i += 1) {
    text.push(lines[i].slice(Math.min(margin, indent(lines[i]))));
  }
  const isWhole = i < lines.length;
  return [{ kind: "code", language: info.trim().split(/[\s{]/)[0], text: text.join("\n"), isWhole }, i + 1];
}

function math_at(lines, i) {
  const closing = lines[i].trimStart().startsWith("$$") ? "$$" : "\\]";
  const text = [lines[i]];
  let isOpen = !lines[i].trimStart().slice(2).includes(closing);
  for (i += 1; isOpen && i < lines.length && !isBlank(lines[i]); i += 1) {
    text.push(lines[i]);
    isOpen = !lines[i].includes(closing);
  }
  return [{ kind: "math", text: text.join("\n") }, i];
}

function cells(line) {
  const found = [""];
  let ticks = false;
  for (let i = 0; i < line.length; i += 1) {
    if (line[i] === "\\" && line[i + 1] === "|") {
      found[found.length - 1] += "|";
      i += 1;
    } else if (line[i] === "|" && !ticks) found.push("");
    else {
      if (line[i] === "`") ticks = !ticks && line.indexOf("`", i + 1) > 0;
      found[found.length - 1] += line[i];
    }
  }
  const trimmed = found.map((cell) => cell.trim());
  if (trimmed[0] === "") trimmed.shift();
  if (trimmed.at(-1) === "") trimmed.pop();
  return trimmed;
}

function table_at(lines, i) {
  const head = cells(lines[i]);
  const sides = cells(lines[i + 1]).map((cell) => {
    if (cell.endsWith(":")) return cell.startsWith(":") ? "middle" : "end";
    return "";
  });
  const rows = [];
  for (i += 2; i < lines.length && !isBlank(lines[i]) && lines[i].includes("|"); i += 1) {
    rows.push(cells(lines[i]).slice(0, head.length));
  }
  return [{ kind: "table", head, sides, rows }, i];
}

function list_at(lines, i, depth) {
  const first = item(lines[i]);
  const items = [];
  let isLoose = false;
  const belongs = (found) => found && found.mark === first.mark && found.before < first.before + 2;
  while (i < lines.length && belongs(item(lines[i]))) {
    const mine = item(lines[i]);
    const inside = Math.min(mine.width, mine.before + 2);
    const body = [lines[i].slice(mine.width)];
    i += 1;
    while (i < lines.length) {
      const line = lines[i];
      if (isBlank(line)) {
        const next = after_blanks(lines, i);
        if (next === lines.length || indent(lines[next]) < inside) break;
        isLoose ||= !item(lines[next]);
        for (; i < next; i += 1) body.push("");
      } else if (indent(line) >= inside) {
        body.push(line.slice(Math.min(indent(line), mine.width)));
        i += 1;
      } else if (item(line) || ends(lines, i)) break;
      else {
        body.push(line.trimStart());
        i += 1;
      }
    }
    items.push(body);
    const next = after_blanks(lines, i);
    if (next > i && next < lines.length && belongs(item(lines[next]))) {
      isLoose = true;
      i = next;
    }
  }
  const inner = items.map((body) => entry(body, depth));
  return [{ kind: "list", isOrdered: first.isOrdered, start: first.start, isLoose, items: inner }, i];
}

function after_blanks(lines, i) {
  while (i < lines.length && isBlank(lines[i])) i += 1;
  return i;
}

function entry(body, depth) {
  const task = /^\[([ xX])\]\s+/.exec(body[0]);
  if (task) body[0] = body[0].slice(task[0].length);
  return { box: task ? task[1] !== " " : null, blocks: blocks(body, depth + 1) };
}

function block_node(block, depth) {
  switch (block.kind) {
    case "heading":
      // the page has its own first heading
      return inline(block.text, make(`h${Math.min(block.level + 1, 6)}`));
    case "code":
      return code_node(block);
    case "rule":
      return make("hr");
    case "math":
      return make("div", { class: "math" }, block.text);
    case "quote":
      return make("blockquote", {}, ...block.blocks.map((inner) => block_node(inner, depth + 1)));
    case "table":
      return table_node(block);
    case "list": {
      const node = make(block.isOrdered ? "ol" : "ul", {
        start: block.isOrdered && block.start !== 1 ? block.start : null,
        class: block.isLoose ? "loose" : null,
      });
      for (const one of block.items) node.append(entry_node(one, block.isLoose, depth));
      return node;
    }
    default:
      return inline(block.text, make("p"));
  }
}

function entry_node(one, isLoose, depth) {
  const node = make("li", { class: one.box == null ? null : "task" });
  if (one.box != null) node.append(make("input", { type: "checkbox", disabled: true, checked: one.box }), " ");
  for (const inner of one.blocks) {
    if (inner.kind === "paragraph" && !isLoose) inline(inner.text, node);
    else node.append(block_node(inner, depth + 1));
  }
  return node;
}

function table_node(block) {
  const row = (name, texts) =>
    make("tr", {}, ...texts.map((text, i) => inline(text, make(name, { class: block.sides[i] || null }))));
  const body = make("tbody", {}, ...block.rows.map((texts) => row("td", texts)));
  return make("div", { class: "wide" }, make("table", {}, make("thead", {}, row("th", block.head)), body));
}

function code_node(block) {
  const copy = make("button", { type: "button", class: "copy" }, "Copy");
  copy.addEventListener("click", () => copy_text(block.text, copy));
  const inside = make("code");
  if (block.isWhole) highlight(block.text, block.language, inside);
  else inside.append(block.text);
  const bar = make("div", { class: "bar" }, make("span", {}, block.language.slice(0, 40) || "text"), copy);
  return make("figure", { class: "code" }, bar, make("pre", { tabindex: "0", "aria-label": "code" }, inside));
}

/** An address that may be followed, or null. */
function safe_link(text) {
  if (!/^https?:\/\//i.test(text) || /[\s<>"\u0000-\u001f]/.test(text)) return null;
  try {
    const url = new URL(text);
    return url.protocol === "http:" || url.protocol === "https:" ? url.href : null;
  } catch {
    return null;
  }
}

const LINE_BREAK = /^<br\s{0,3}\/?>/i;
const BARE = /^https?:\/\/[^\s<>"'`|\\^{}[\]]+/i;
const isWord = (character) => character !== undefined && /[\p{L}\p{N}]/u.test(character);

/** Puts a text with emphasis, code and links into a node, and returns the node. */
function inline(text, into, depth = 0) {
  if (text.length > LONGEST || depth > DEEPEST) {
    into.append(text);
    return into;
  }
  let plain = "";
  // a search that found nothing finds nothing further on: each kind fails once
  const hopeless = new Set();
  const put = (node) => {
    if (plain) into.append(plain);
    plain = "";
    into.append(node);
  };
  for (let i = 0; i < text.length; ) {
    const found = special(text, i, depth, hopeless);
    if (found && found.node) put(found.node);
    else if (found) plain += found.text;
    else plain += text[i];
    i = found ? found.next : i + 1;
  }
  if (plain) into.append(plain);
  return into;
}

/** What stands at i if it is more than a letter: {node or text, next}. */
function special(text, i, depth, hopeless) {
  switch (text[i]) {
    case "\n":
      return { node: make("br"), next: i + 1 };
    case "\\": {
      const closing = { "(": "\\)", "[": "\\]" }[text[i + 1]];
      const end = closing ? find(text, closing, i + 2, hopeless) : -1;
      if (end >= 0) return { node: make("span", { class: "math" }, text.slice(i, end + 2)), next: end + 2 };
      return /[!-/:-@[-`{-~]/.test(text[i + 1] || "") ? { text: text[i + 1], next: i + 2 } : null;
    }
    case "`": {
      const run = /^`+/.exec(text.slice(i, i + 100))[0];
      const end = span_end(text, i + run.length, run, hopeless);
      if (end < 0) return { text: run, next: i + run.length };
      const inner = text.slice(i + run.length, end).replace(/\n/g, " ");
      const shown = /^ .*[^ ].* $/.test(inner) ? inner.slice(1, -1) : inner;
      return { node: make("code", {}, shown), next: end + run.length };
    }
    case "$":
      return dollars(text, i, hopeless);
    case "*":
    case "_":
    case "~":
      return emphasis(text, i, depth, hopeless);
    case "!":
      return text[i + 1] === "[" ? link(text, i + 1, depth, "image: ") : null;
    case "[":
      return link(text, i, depth, "");
    case "<": {
      const line_break = LINE_BREAK.exec(text.slice(i, i + 9));
      if (line_break) return { node: make("br"), next: i + line_break[0].length };
      const end = text.slice(i, i + 2000).indexOf(">");
      const url = end > 0 ? safe_link(text.slice(i + 1, i + end)) : null;
      return url ? { node: anchor(url, text.slice(i + 1, i + end)), next: i + end + 1 } : null;
    }
    case "h":
    case "H": {
      const bare = isWord(text[i - 1]) ? null : BARE.exec(text.slice(i, i + 2000));
      if (!bare) return null;
      // the end of a sentence is not the end of an address, nor is a parenthesis that it did not open
      let shown = bare[0].replace(/[.,;:!?*_~]+$/, "");
      if (shown.endsWith(")") && !shown.includes("(")) shown = shown.slice(0, -1);
      const url = safe_link(shown);
      return url ? { node: anchor(url, shown), next: i + shown.length } : null;
    }
    default:
      return null;
  }
}

function find(text, what, from, hopeless) {
  if (hopeless.has(what)) return -1;
  const at = text.indexOf(what, from);
  if (at < 0) hopeless.add(what);
  return at;
}

function span_end(text, from, run, hopeless) {
  if (hopeless.has(run)) return -1;
  for (let at = text.indexOf(run, from); at >= 0; at = text.indexOf(run, at)) {
    let end = at;
    while (text[end] === "`") end += 1;
    if (end - at === run.length) return at;
    at = end;
  }
  hopeless.add(run);
  return -1;
}

function dollars(text, i, hopeless) {
  const mark = text[i + 1] === "$" ? "$$" : "$";
  const from = i + mark.length;
  const end = find(text, mark, from, hopeless);
  // prices are no formulas: "$5 and $6"
  const isPrice = mark === "$" && (/\s/.test(text[from] || " ") || /\s/.test(text[end - 1]) || /\d/.test(text[end + 1] || ""));
  if (end <= from || isPrice) return null;
  return { node: make("span", { class: "math" }, text.slice(i, end + mark.length)), next: end + mark.length };
}

function emphasis(text, i, depth, hopeless) {
  const mark = text[i];
  let n = 1;
  while (n < 4 && text[i + n] === mark) n += 1;
  const opens = !/\s/.test(text[i + n] || " ") && !(mark === "_" && isWord(text[i - 1]));
  const size = Math.min(n, 3);
  if (n > 3 || !opens || (mark === "~" && n !== 2)) return { text: mark.repeat(n), next: i + n };
  const end = closing(text, i + n, mark, size, hopeless);
  if (end < 0) return { text: mark.repeat(n), next: i + n };
  const inner = text.slice(i + size, end);
  const names = mark === "~" ? ["del"] : { 1: ["em"], 2: ["strong"], 3: ["strong", "em"] }[size];
  const innermost = make(names.at(-1));
  inline(inner, innermost, depth + 1);
  return { node: names.length > 1 ? make(names[0], {}, innermost) : innermost, next: end + size };
}

function closing(text, from, mark, size, hopeless) {
  const kind = mark + size;
  if (hopeless.has(kind)) return -1;
  for (let at = text.indexOf(mark, from); at >= 0; at = text.indexOf(mark, at)) {
    let end = at;
    while (text[end] === mark) end += 1;
    const n = end - at;
    const closes = !/\s/.test(text[at - 1]) && !(mark === "_" && isWord(text[end]));
    // three marks close one and two at once; the outer takes the last
    if (closes && (n === size || (n === 3 && size < 3))) return end - size;
    at = end;
  }
  hopeless.add(kind);
  return -1;
}

const LINK = /^\[((?:[^[\]\\\n]|\\.|\[[^[\]\n]{0,200}\]){0,1000})\]\(\s{0,3}<?((?:[^\s()<>]|\([^\s()<>]{0,300}\)){1,2000})>?(?:\s{1,3}["'(][^\n]{0,300}?["')])?\s{0,3}\)/;

function link(text, i, depth, before) {
  const found = LINK.exec(text.slice(i, i + 3500));
  const url = found ? safe_link(found[2]) : null;
  // what cannot be followed stays as it was written, for everyone to see
  if (!url) return null;
  const node = anchor(url, before);
  inline(found[1] || url, node, DEEPEST - 1);
  for (const inner of node.querySelectorAll("a")) inner.replaceWith(...inner.childNodes);
  return { node, next: i + found[0].length };
}

function anchor(url, text) {
  return make("a", { href: url, title: url, target: "_blank", rel: "noopener noreferrer nofollow" }, text);
}
