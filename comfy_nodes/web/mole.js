// What the MoLE nodes show before they run: whom a mask or a strength belongs to is chosen and not typed, sockets
// grow as they are used, and a node says what it will do. Everything is kept in the nodes' own widgets, so that
// workflows and API prompts are the same without this file. Texts of files are only ever set as text.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const GROWING = { MoLERegionMasks: ["mask_", "MASK"], MoLETrainGates: ["reference_", "IMAGE"] };
const SOCKETS = 8;
const WIDTH = 250; // titles fit
const EVERY = 400; // milliseconds
const SHARED_TEXTS = ["PrimitiveStringMultiline", "PrimitiveString"];
const SEPARATORS = /[,;\n]/;

// ---- graph ----

function inputOf(node, name) {
  const index = (node.inputs ?? []).findIndex((input) => input.name === name);
  return index < 0 || node.inputs[index].link == null ? null : node.getInputNode(index);
}

function isConnected(node, name) {
  return (node.inputs ?? []).some((input) => input.name === name && input.link != null);
}

function widgetOf(node, name) {
  return (node.widgets ?? []).find((widget) => widget.name === name);
}

function throughReroutes(node) {
  while (node?.type === "Reroute") node = node.getInputNode(0);
  return node;
}

function stem(file) {
  const name = file.replace(/^starter: /, "").split(/[/\\]/).at(-1);
  return name.replace(/\.safetensors$/, "");
}

// The experts that come along a connection, first to last; null where that cannot be told.
function expertsInto(node) {
  if (!isConnected(node, "experts")) return node.type === "MoLELoadExpert" ? [] : null;
  const source = throughReroutes(inputOf(node, "experts"));
  if (!source) return null;
  const before = expertsInto(source);
  if (source.type === "MoLERegionMasks") return before;
  if (source.type === "MoLEMaskExperts") return before && counting(source, before);
  if (source.type !== "MoLELoadExpert" || before === null) return null;
  const [lora, name, strength] = ["lora", "name", "strength"].map((one) => widgetOf(source, one)?.value);
  if (typeof lora !== "string") return null;
  return [...before, { lora, name: (name ?? "").trim() || stem(lora), strength: Number(strength ?? 1) }];
}

// The experts behind a Mask Experts node: those that it leaves out do not count.
function counting(node, experts) {
  const chosen = names(widgetOf(node, "active")?.value);
  return experts.map((expert) => ({ ...expert, out: chosen.length ? !chosen.includes(expert.name) : expert.out }));
}

// ---- what the server knows of files ----

const facts = new Map();

function factsOf(kind, choice) {
  const key = `${kind}\n${choice}`;
  const known = facts.get(key);
  if (!known || Date.now() - known.asked > 10000) {
    facts.set(key, { asked: Date.now(), value: known?.value ?? null });
    api
      .fetchApi(`/mole/${kind}?choice=${encodeURIComponent(choice)}`)
      .then((answer) => (answer.ok ? answer.json() : null))
      .then((value) => facts.set(key, { asked: Date.now(), value }))
      .catch(() => {});
  }
  return facts.get(key).value;
}

// ---- sockets ----

function grow(node) {
  const [prefix, type] = GROWING[node.type];
  const number = (input) => Number(input.name.slice(prefix.length));
  const own = () => node.inputs.filter((input) => input.name.startsWith(prefix));
  const used = Math.max(0, ...own().filter((input) => input.link != null).map(number));
  const wanted = Math.min(SOCKETS, used + 1);
  const before = own().length;
  for (let last = before; last > wanted; last--)
    node.removeInput(node.inputs.findIndex((input) => input.name === `${prefix}${last}`));
  for (let next = before + 1; next <= wanted; next++) node.addInput(`${prefix}${next}`, type, { shape: 7 });
  if (before !== wanted) fit(node);
  return used;
}

function fit(node) {
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  node.setDirtyCanvas(true, true);
}

// ---- choosing ----

function hide(widget, hidden) {
  if (!widget || widget.hidden === hidden) return;
  widget.hidden = hidden;
  widget.options = { ...widget.options, hidden };
}

function add(node, kind, name, value, callback, options) {
  const widget = node.addWidget(kind, name, value, callback, { ...options, serialize: false });
  widget.serialize = false;
  widget.mole = true;
  return widget;
}

function drop(node, wanted) {
  for (const widget of [...(node.widgets ?? [])].filter(wanted)) {
    widget.onRemove?.();
    node.widgets.splice(node.widgets.indexOf(widget), 1);
  }
}

function names(text) {
  return String(text ?? "").split(SEPARATORS).map((name) => name.trim()).filter(Boolean);
}

function assignments(text) {
  const found = new Map();
  for (const line of String(text ?? "").split("\n")) {
    const at = line.indexOf("=");
    if (at > 0) found.set(line.slice(0, at).trim(), line.slice(at + 1).trim());
  }
  return found;
}

// Toggles and strengths in place of the texts `active` and `strengths`.
function chooseActive(node, experts) {
  const [active, strengths] = [widgetOf(node, "active"), widgetOf(node, "strengths")];
  const counting = names(active.value);
  const given = assignments(strengths.value);
  const rows = experts.map(({ name, strength }) => ({
    name,
    on: !counting.length || counting.includes(name),
    strength: given.has(name) ? Number(given.get(name)) : strength,
    usual: strength,
  }));
  const write = () => {
    active.value = rows.every((row) => row.on) ? "" : rows.filter((row) => row.on).map((row) => row.name).join(", ");
    strengths.value = rows
      .filter((row) => row.strength !== row.usual)
      .map((row) => `${row.name} = ${row.strength}`)
      .join("\n");
  };
  for (const row of rows) {
    const toggle = add(node, "toggle", row.name, row.on, (on) => {
      row.on = on || rows.every((other) => other === row || !other.on); // one has to stay
      toggle.value = row.on;
      write();
    }, { on: "counts", off: "left out" });
    add(node, "number", `${row.name}: strength`, row.strength, (value) => {
      row.strength = Math.round(value * 100) / 100;
      write();
    }, { min: -4, max: 4, step: 0.5, step2: 0.05, precision: 2 });
  }
}

// A list of experts per mask in place of the text `names`.
function chooseOwners(node, experts, masks) {
  const text = widgetOf(node, "names");
  const all = experts.map((expert) => expert.name);
  const typed = names(text.value);
  const owners = Array.from({ length: masks }, (_, i) => (typed.length ? typed : all)[i] ?? all[i] ?? all[0]);
  owners.forEach((owner, i) => {
    add(node, "combo", `mask_${i + 1} is for`, owner, (value) => {
      owners[i] = value;
      text.value = owners.every((name, k) => name === all[k]) ? "" : owners.join(", ");
    }, { values: all });
  });
}

const CHOOSING = {
  MoLEMaskExperts: { texts: ["active", "strengths"], build: chooseActive },
  MoLERegionMasks: { texts: ["names"], build: chooseOwners },
};

function choose(node, experts, masks) {
  const { texts, build } = CHOOSING[node.type];
  const known = experts !== null && experts.length > 0 && !experts.some(({ name }) => SEPARATORS.test(name));
  const values = texts.map((name) => widgetOf(node, name)?.value);
  const state = JSON.stringify([known && experts.map(({ name, strength }) => [name, strength]), masks]);
  const untouched = JSON.stringify(values) === node.moleValues;
  if (state === node.moleState && (untouched || node.moleBuilt)) {
    node.moleValues = JSON.stringify(values);
    return;
  }
  drop(node, (widget) => widget.mole);
  for (const name of texts) hide(widgetOf(node, name), known);
  if (known) build(node, experts, masks);
  [node.moleState, node.moleValues, node.moleBuilt] = [state, JSON.stringify(values), known];
  fit(node);
}

// ---- notes ----

function strangers(node, experts, named) {
  if (!experts) return [];
  const known = experts.map((expert) => expert.name);
  return named
    .filter((name) => !known.includes(name))
    .map((name) => `'${name}' names no expert here (${known.join(", ")}): Run will stop.`);
}

function prompts(node) {
  const found = [];
  for (const id of node.outputs?.[1]?.links ?? []) {
    const link = node.graph.links instanceof Map ? node.graph.links.get(id) : node.graph.links[id];
    const target = link && node.graph.getNodeById(link.target_id);
    if (target?.type !== "CLIPTextEncode") return null;
    const source = isConnected(target, "text") ? throughReroutes(inputOf(target, "text")) : null;
    if (isConnected(target, "text") && !SHARED_TEXTS.includes(source?.type)) return null;
    found.push(source ? widgetOf(source, "value") : widgetOf(target, "text"));
  }
  return found.length && found.every(Boolean) ? found : null;
}

// Whether a text has a phrase in it, with or without its article; as `names_phrase` of core/phrases.py.
function namesPhrase(text, phrase) {
  const words = phrase.trim().replace(/^(?:a|an|the)\s+/i, "").replace(/[\\^$.*+?()[\]{}|\/]/g, "\\$&");
  return new RegExp(`(?<![\\p{L}\\p{N}_])${words}(?![\\p{L}\\p{N}_])`, "iu").test(text);
}

// Experts that count and whose trigger words no prompt has: they would be drawn without their subject.
function unnamed(experts, texts) {
  return experts.filter((expert) => {
    expert.triggers = factsOf("expert", expert.lora)?.triggers ?? [];
    const named = expert.triggers.some((phrase) => texts.some((text) => namesPhrase(String(text), phrase)));
    return !expert.out && expert.triggers.length && !named;
  });
}

const WITHOUT_GATES = {
  auto: "No gates: words and places find their experts by the prompt.",
  "equal shares": "No gates: every expert counts 1/N everywhere.",
};

function notesOfApply(node) {
  const notes = [];
  const experts = expertsInto(node);
  if (throughReroutes(inputOf(node, "model"))?.type === "MoLEApply")
    notes.push("This MODEL has experts already: chain all Load Expert nodes into one MoLE Apply. Run will stop.");
  const gates = throughReroutes(inputOf(node, "gates"));
  if (!isConnected(node, "gates")) notes.push(WITHOUT_GATES[widgetOf(node, "without_gates")?.value] ?? "No gates.");
  else if (gates?.type === "MoLELoadGates" && experts) {
    const trained = factsOf("gates", widgetOf(gates, "gates")?.value)?.experts;
    const here = experts.map((expert) => expert.name);
    if (trained && [...trained].sort().join("\n") !== [...here].sort().join("\n"))
      notes.push(`These gates are for ${trained.join(", ")}; here are ${here.join(", ")}. Run will stop.`);
  }
  const texts = experts && prompts(node);
  const missing = texts ? unnamed(experts, texts.map((widget) => widget.value)) : [];
  for (const { name, triggers } of missing) notes.push(`No prompt names ${name}: write '${triggers[0]}'.`);
  offer(node, texts, missing);
  return notes;
}

// A button that writes what is missing behind the first prompt.
function offer(node, texts, missing) {
  const button = (node.widgets ?? []).find((widget) => widget.moleOffer);
  if (!missing.length) {
    if (button) drop(node, (widget) => widget.moleOffer);
    return;
  }
  const insert = () => {
    const widget = texts.find((one) => String(one.value).trim()) ?? texts[0];
    widget.value = [String(widget.value).trim(), ...missing.map(({ triggers }) => triggers[0])].filter(Boolean).join(", ");
  };
  if (button) button.callback = insert;
  else {
    add(node, "button", "insert what is missing", null, insert).moleOffer = true;
    fit(node);
  }
}

const NOTES = {
  MoLEApply: notesOfApply,
  MoLELoadGates: (node) => {
    const found = factsOf("gates", widgetOf(node, "gates")?.value);
    return found?.unfinished ? [found.unfinished] : [];
  },
  MoLEMaskExperts: (node, experts) =>
    strangers(node, experts, [
      ...names(widgetOf(node, "active")?.value),
      ...assignments(widgetOf(node, "strengths")?.value).keys(),
    ]),
  MoLERegionMasks: (node, experts) => strangers(node, experts, names(widgetOf(node, "names")?.value)),
  MoLETrainGates: (node, experts) => {
    const said = [...assignments(widgetOf(node, "concepts")?.value).keys()];
    const prompt = widgetOf(node, "prompt")?.value ?? "";
    const asked = (experts ?? []).filter((expert) => !said.includes(expert.name));
    return [
      ...strangers(node, experts, said),
      ...(String(prompt).trim() && !isConnected(node, "prompt") ? unnamed(asked, [prompt]) : []).map(
        ({ name, triggers }) => `The prompt does not name ${name}: write '${triggers[0]}'.`,
      ),
    ];
  },
};

function showNotes(node, lines) {
  const text = lines.join("\n");
  if (text === (node.moleNote?.element.textContent ?? "")) return;
  if (!node.moleNote) {
    const element = document.createElement("div");
    Object.assign(element.style, { font: "12px sans-serif", color: "#e0b050", whiteSpace: "pre-wrap", overflow: "auto" });
    element.className = "mole-note";
    const height = () => (element.textContent ? 18 * lines_of(element.textContent, node.size[0]) + 8 : 0);
    const options = { serialize: false, hideOnZoom: false, getMinHeight: height, getMaxHeight: height };
    node.moleNote = node.addDOMWidget("mole_note", "mole_note", element, options);
    node.moleNote.serialize = false;
  }
  node.moleNote.element.textContent = text;
  if (!text) {
    drop(node, (widget) => widget === node.moleNote);
    node.moleNote = null;
  }
  fit(node);
}

function lines_of(text, width) {
  const columns = Math.max(10, Math.floor((width - 30) / 6.2));
  return text.split("\n").reduce((sum, line) => sum + Math.max(1, Math.ceil(line.length / columns)), 0);
}

// ---- all together ----

function refresh(node) {
  const experts = expertsInto(node);
  const masks = node.type in GROWING ? grow(node) : 0;
  if (node.type in CHOOSING) choose(node, experts, node.type === "MoLERegionMasks" ? masks : 0);
  if (node.type in NOTES) showNotes(node, NOTES[node.type](node, experts));
}

function widen(node) {
  if (node.type?.startsWith("MoLE") && node.size[0] < WIDTH) node.setSize([WIDTH, node.size[1]]);
}

app.registerExtension({
  name: "mole.nodes",
  nodeCreated: widen,
  loadedGraphNode: widen,
  setup() {
    setInterval(() => {
      const graph = app.canvas?.graph ?? app.graph;
      for (const node of graph?.nodes ?? []) if (node.type?.startsWith("MoLE")) refresh(node);
    }, EVERY);
  },
});
