// What the user may set: sampling, the system prompt, colours, the key. An empty field leaves the choice to the server.

const FIELDS = [
  ["temperature", "Temperature", 0, 2, 0.05],
  ["top_p", "Top-p", 0, 1, 0.01],
  ["top_k", "Top-k", 1, null, 1],
  ["min_p", "Min-p", 0, 1, 0.01],
  ["repetition_penalty", "Repetition penalty", 0.5, 2, 0.01],
  ["presence_penalty", "Presence penalty", -2, 2, 0.1],
  ["frequency_penalty", "Frequency penalty", -2, 2, 0.1],
  ["max_tokens", "Longest answer, tokens", 1, null, 1],
  ["seed", "Seed", 0, null, 1],
];
const THEMES = [["", "As the system"], ["light", "Light"], ["dark", "Dark"]];

/** The fields of a request that the settings ask for. */
function sampling(settings) {
  const wanted = {};
  for (const [name] of FIELDS) if (Number.isFinite(settings[name])) wanted[name] = settings[name];
  const stops = (settings.stops || "").split("\n").filter(Boolean);
  if (stops.length) wanted.stop = stops;
  return wanted;
}

function set(name, value) {
  const settings = store.settings();
  if (value === null || value === "") delete settings[name];
  else settings[name] = value;
  store.write(SETTINGS, settings);
}

function dress(theme) {
  document.documentElement.dataset.theme = theme || "";
}

/** Builds the fields, fills them with what was kept, and keeps what is changed. */
function open_settings_once() {
  const settings = store.settings();
  for (const [name, label, min, max, step] of FIELDS) {
    const field = make("input", { id: name, type: "number", min, max, step: step === 1 ? 1 : "any", inputmode: step === 1 ? "numeric" : "decimal", placeholder: "default" });
    field.value = settings[name] ?? "";
    field.addEventListener("input", () => {
      // a number out of range is shown as wrong and not sent
      set(name, field.value !== "" && field.checkValidity() ? field.valueAsNumber : null);
    });
    $("sampling").append(make("label", {}, make("span", {}, label), field));
  }
  $("stops").value = settings.stops || "";
  $("stops").addEventListener("input", () => set("stops", $("stops").value));
  for (const [value, label] of THEMES) {
    const radio = make("input", { type: "radio", name: "theme", value, checked: (settings.theme || "") === value });
    radio.addEventListener("change", () => {
      set("theme", value);
      dress(value);
    });
    $("theme").append(make("label", {}, radio, make("span", {}, label)));
  }
  $("key").value = sessionStorage.getItem("plait.key") || "";
  $("defaults").addEventListener("click", () => {
    for (const [name] of FIELDS) {
      set(name, null);
      $(name).value = "";
    }
    set("stops", null);
    $("stops").value = "";
  });
}

/** The switch and the budget of thinking. */
function draw_thinking() {
  const settings = store.settings();
  const isOn = settings.thinking !== false;
  $("thinking").setAttribute("aria-pressed", String(isOn));
  $("budget-label").hidden = !isOn;
  $("thinking-controls").hidden = Boolean(model && model.plait && model.plait.thinking === false);
}
