// Keys, buttons, and the beginning.

function is_send(event) {
  // Enter that ends the choice of a character (Japanese, Chinese) is not meant for us
  return event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
}

function grow(field) {
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight + 2, innerHeight * 0.4)}px`;
}

const isWide = () => matchMedia("(min-width: 760px)").matches;

/** Shows or hides the conversations. On a wide page they stand beside the talk, on a narrow one over it. */
function menu(isOpen) {
  document.body.classList.toggle("no-history", isWide() && !isOpen);
  document.body.classList.toggle("with-history", !isWide() && isOpen);
  $("shade").hidden = isWide() || !isOpen;
  $("open-history").setAttribute("aria-expanded", String(isOpen));
}

/** Where the conversations cover the talk, they leave once one is chosen. */
function uncover() {
  if (!isWide()) menu(false);
}

function is_menu_open() {
  const { classList } = document.body;
  return isWide() ? !classList.contains("no-history") : classList.contains("with-history");
}

function press(event) {
  const isTyping = /^(INPUT|TEXTAREA|SELECT)$/.test(event.target.tagName) || $("settings").open;
  if (event.key === "Escape" && !$("settings").open) {
    if (stop()) event.preventDefault();
    else uncover();
  } else if (event.key === "/" && !isTyping && !event.ctrlKey && !event.metaKey && !event.altKey) {
    event.preventDefault();
    $("text").focus();
  }
}

function bind() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("text").addEventListener("keydown", (event) => {
    if (!is_send(event)) return;
    event.preventDefault();
    send();
  });
  $("text").addEventListener("input", () => {
    grow($("text"));
    buttons();
  });
  $("stop").addEventListener("click", stop);
  $("new").addEventListener("click", () => {
    show(new_chat(store.settings().system));
    uncover();
    $("text").focus();
  });
  $("down").addEventListener("click", () => {
    isPinned = true;
    follow();
  });
  $("talk").addEventListener("scroll", () => {
    const { scrollHeight, scrollTop, clientHeight } = $("talk");
    isPinned = scrollHeight - scrollTop - clientHeight < 80;
    $("down").hidden = isPinned;
  });
  $("open-history").addEventListener("click", () => menu(!is_menu_open()));
  $("shade").addEventListener("click", uncover);
  $("open-settings").addEventListener("click", () => $("settings").showModal());
  $("settings").addEventListener("click", (event) => {
    if (event.target === $("settings")) $("settings").close();
  });
  $("system").addEventListener("input", () => {
    chat.system = $("system").value;
    set("system", chat.system);
    if (chat.turns.length) keep(chat);
  });
  $("key").addEventListener("change", () => {
    sessionStorage.setItem("plait.key", $("key").value.trim());
    meet();
  });
  $("thinking").addEventListener("click", () => {
    set("thinking", store.settings().thinking === false);
    draw_thinking();
  });
  $("budget").value = store.settings().budget ?? "";
  $("budget").addEventListener("input", () => {
    const { value, valueAsNumber } = $("budget");
    set("budget", value !== "" && $("budget").checkValidity() ? valueAsNumber : null);
  });
  $("export").addEventListener("click", () => {
    const chats = store.list().map(({ id }) => store.load(id));
    download("plait-conversations.json", JSON.stringify({ kind: "plait-conversations-1", chats }, null, 1), "application/json");
  });
  $("clear").addEventListener("click", () => {
    const all = store.list();
    if (!confirm(`Delete all ${all.length} conversations from this browser?`)) return;
    for (const { id } of all) forget(id);
    show(new_chat(store.settings().system));
  });
  document.addEventListener("keydown", press);
  addEventListener("storage", list);
  addEventListener("pagehide", () => {
    for (const run of running.values()) keep(run.chat);
  });
}

/** Asks the server who answers here. */
async function meet() {
  try {
    model = await first_model();
    $("model").textContent = model.id;
    notice("");
  } catch (error) {
    const words = error.status === 401 ? "The server asks for an API key: enter it in the settings." : `No answer from the server: ${error.message}`;
    notice(words);
  }
  draw_welcome(model);
  draw_thinking();
  memory();
}

dress(store.settings().theme);
open_settings_once();
bind();
show(store.load(location.hash.slice(1)) || new_chat(store.settings().system));
$("open-history").setAttribute("aria-expanded", String(is_menu_open()));
meet();
