"use strict";
// What the other scripts share.
const $ = id => document.getElementById(id);
const text = $("text"), sliders = ["temperature", "top_p", "repetition_penalty", "max_tokens", "takes"];
let model = {writes_text: true, document_length: null, context_length: 0, file_ending: ""};
let running = null;   // the AbortController of the request that runs
const chosenSeed = () => $("seed").value === "" ? null : +$("seed").value;

// The conditions that are chosen: name -> value.
const conditions = () => Object.fromEntries(
  [...$("conditions").querySelectorAll("select, input")].filter(field => field.value).map(field => [field.name, field.value]));

function buttons() {
  placeholder();
  $("go").disabled = running !== null;
  $("stop").disabled = running === null;
  $("undo").disabled = $("retry").disabled = running !== null || before.length === 0;
  text.setAttribute("aria-busy", String(running !== null));
}

function say(message, wrong = false) {
  $("status").textContent = message;
  $("status").classList.toggle("wrong", wrong);
}

// Why a request ended before its answer did.
function sayError(error) {
  if (error.name === "AbortError") say("stopped");
  else say(error.message, true);
}

// A new element with these properties and children.
function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const complete = (body, signal) => fetch("v1/completions", {
  method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body), signal,
});

// The message of an error; a proxy's may be no JSON.
async function message(answer) {
  try {
    return (await answer.json()).error.message;
  } catch {
    return `the server answers with status ${answer.status}`;
  }
}

async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) throw new Error("the answer broke off");
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      if (!block.startsWith("data: ")) continue;  // a sign of life
      const data = block.slice(6);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}
