"use strict";
const seedIsWrong = () => {
  const wrong = $("seed").validity.badInput;
  if (wrong) say("the seed must be a number", true);
  return wrong;
};
const start = () => {
  if (seedIsWrong()) return;
  if (model.writes_text) go(chosenSeed());
  else goOnWithFile();
};
$("go").onclick = start;
$("stop").onclick = () => running?.abort();
$("undo").onclick = undo;
$("retry").onclick = () => {
  if (running || !before.length || seedIsWrong()) return;
  const last = before.pop(), shown = parts();
  show(last.start);
  if ($("seed").value !== "") $("seed").value = +$("seed").value + 1;  // another seed, or the same text would come
  go(chosenSeed(), last.undone, () => {
    before.push(last);
    show(shown);
  });
};
document.addEventListener("keydown", event => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); start(); }
  if (event.key === "Escape") running?.abort();
});
for (const id of sliders) {
  const update = () => { $(`${id}-value`).textContent = $(id).value; };
  $(id).addEventListener("input", update);
  update();
}
$("shade").onchange = () => text.classList.toggle("shaded", $("shade").checked);
$("code").onchange = () => text.classList.toggle("code", $("code").checked);

// What the run is, and how good: bits for each byte of held-out files, or for what its kind of data is made of.
function facts() {
  const parts = [], scores = model.evaluation ?? {}, kinds = Object.keys(scores).filter(kind => kind.startsWith("bits_per_"));
  if (model.parameters) parts.push(`${(model.parameters / 1e6).toPrecision(2)} million parameters`);
  const kind = ["bits_per_byte", "bits_per_dimension", "bits_per_second", ...kinds].find(kind => kind in scores);
  if (kind) {
    const gzip = scores.gzip_bits_per_byte;
    parts.push(`${scores[kind].toFixed(2)} bits a ${kind.slice(9)} on held-out data` +
      (kind === "bits_per_byte" && gzip ? ` (gzip: ${gzip.toFixed(2)})` : ""));
  }
  parts.push(`sees the last ${model.context_length.toLocaleString("en")} tokens`);
  $("facts").textContent = parts.join(" · ");
}

// A field for each condition: its values to choose from, or a text.
const HINTS = {instruments: "such as 0,33,drums", tempo: "such as 96"};
function addConditions() {
  const add = (name, values, note = "") => {
    const field = Array.isArray(values)
      ? make("select", {name}, new Option("unknown", ""), ...values.map(value => new Option(value, value)))
      : make("input", {name, autocomplete: "off", maxLength: values ?? 524288, placeholder: note && (HINTS[name] ?? "")});
    field.id = `condition-${name}`;
    field.addEventListener("change", scoreSoon);
    const label = make("label", {htmlFor: field.id}, name, make("span", {className: "value"}, note));
    $("conditions").append(make("div", {}, label, field));
  };
  for (const [name, values] of Object.entries(model.conditions ?? {})) add(name, values);
  for (const name of model.header_conditions ?? []) add(name, null, "without a file");
  if (model.classes?.length) add("class", model.classes, "without a file");
  $("conditions").hidden = !$("conditions").childNodes.length;
}

fetch("v1/models").catch(() => { throw new Error("the server does not answer"); }).then(async answer => {
  if (!answer.ok) throw new Error(await message(answer));
  ({data: [model]} = await answer.json());
  $("name").textContent = document.title = model.id;
  facts();
  addConditions();
  $("infill").hidden = !model.infills;
  const words = model.writes_text;
  $("files").hidden = words;
  $("piano").hidden = model.file_ending !== ".mid";
  for (const id of ["text", "score", "undo", "retry"]) $(id).hidden = !words;
  for (const id of ["repetition_penalty", "code"]) $(id).closest("div").hidden = !words;
  $("max_tokens").parentElement.hidden = model.document_length !== null;
  $("takes").parentElement.hidden = words;
  $("takes").max = Math.min(4, model.slots);
  if (model.document_length !== null) $("takes").value = $("takes").max;
  $("takes").dispatchEvent(new Event("input"));
}).catch(error => say(error.message, true));
show([]);
buttons();
