"use strict";
// Runs that write text: an editable page that the model continues.
const before = [];    // of each continuation: `start`, the parts it went on from, and `undone`, those that Undo shows

// What is typed inside of what the model wrote is not the model's.
text.addEventListener("beforeinput", event => {
  const letters = {insertText: event.data, insertLineBreak: "\n", insertParagraph: "\n"}[event.inputType];
  const selection = getSelection(), span = selection.anchorNode?.parentElement;
  if (!letters || !selection.isCollapsed || event.isComposing || span?.parentElement !== text) return;
  event.preventDefault();
  const rest = span.cloneNode(), typed = document.createTextNode(letters), node = selection.anchorNode;
  rest.append(node.splitText(selection.anchorOffset), ...[...span.childNodes].slice([...span.childNodes].indexOf(node) + 2));
  span.after(typed, rest);
  selection.collapse(typed, letters.length);
});

// The text as parts: [letters, whether the model wrote them]. The line break at the very end is the browser's.
function parts(node = text, written = false, found = []) {
  for (const child of node.childNodes) {
    if (child === text.lastChild && child.nodeName === "BR") break;
    if (child.nodeType === Node.TEXT_NODE) found.push([child.data, written]);
    else if (child.nodeName === "BR") found.push(["\n", written]);
    else parts(child, written || child.nodeName === "SPAN", found);
  }
  return found;
}

function show(list) {
  const nodes = list.map(([letters, written]) => written ? make("span", {textContent: letters}) : letters);
  text.replaceChildren(...nodes, make("br"));
}

text.addEventListener("input", () => {
  if (text.lastChild?.nodeName !== "BR") text.append(make("br"));
  placeholder();
  scoreSoon();
});

// Bits for each byte of the text so far, and how much of the context it takes: after a pause in typing.
let scoring = null, pause = 0;
function scoreSoon() {
  scoring?.abort();
  clearTimeout(pause);
  $("score").textContent = "";
  pause = setTimeout(score, 800);
}

async function score() {
  const prompt = parts().map(part => part[0]).join("");
  if (running || !prompt) return;
  const {signal} = scoring = new AbortController();
  try {
    const body = {prompt, condition: conditions(), max_tokens: 0, echo: true, logprobs: 0};
    const answer = await complete(body, signal);
    if (!answer.ok) return;  // the text is too long to be scored, or has a character that the model cannot read
    const {choices: [{logprobs}], usage} = await answer.json();
    const nats = -logprobs.token_logprobs.reduce((sum, one) => sum + (one ?? 0), 0);
    const bits = nats / Math.LN2 / new TextEncoder().encode(prompt).length;
    const used = Math.min(usage.prompt_tokens, model.context_length);
    $("score").textContent = `${bits.toFixed(2)} bits a byte · ${used.toLocaleString("en")} of ` +
      `${model.context_length.toLocaleString("en")} tokens of context used`;
  } catch (error) {
    if (error.name !== "AbortError") $("score").textContent = "";
  }
}

const placeholder = () => text.classList.toggle("empty", !parts().some(part => part[0]));

// The model goes on. `undone`: what Undo shows, if that is not the text as it stands. `restore`: called if nothing comes.
async function go(seed, undone = null, restore = () => {}) {
  if (running) return;
  running = new AbortController();
  scoring?.abort();
  clearTimeout(pause);
  $("choices").hidden = true;
  const start = parts();
  before.push({start, undone: undone ?? start});
  buttons();
  say("reading …");
  const prompt = start.map(part => part[0]).join("");
  const body = {
    prompt, condition: conditions(), stream: true, stream_options: {include_usage: true}, seed,
    temperature: +$("temperature").value, top_p: +$("top_p").value, max_tokens: +$("max_tokens").value,
    repetition_penalty: +$("repetition_penalty").value, logprobs: 5,
  };
  let written = false, failed = false, tokens = 0, first = 0, finish = null;
  text.contentEditable = "false";
  try {
    const answer = await complete(body, running.signal);
    if (!answer.ok) throw new Error(await message(answer));
    for await (const event of events(answer.body)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) tokens = event.usage.completion_tokens;
      for (const choice of event.choices) {
        finish = choice.finish_reason ?? finish;
        if (!choice.text) continue;
        if (!written) {
          written = true;
          first = performance.now();
          say("writing …");
        }
        const atEnd = text.scrollHeight - text.scrollTop - text.clientHeight < 40;
        if (text.lastChild?.nodeName !== "BR") text.append(make("br"));
        text.lastChild.before(...spans(choice));
        if (atEnd) text.scrollTop = text.scrollHeight;
      }
    }
    const rate = first && tokens > 1 ? `, ${Math.round(1000 * (tokens - 1) / (performance.now() - first))} a second` : "";
    say(`${tokens} tokens${rate}${finish === "stop" ? "; the text ends here" : ""}`);
  } catch (error) {
    failed = true;
    sayError(error);
  }
  if (!written && (failed || !undone)) {
    before.pop();
    restore();
  }
  running = null;
  text.contentEditable = "plaintext-only";
  buttons();
  scoreSoon();
}

// The pieces of a choice, each token for itself if its letters are its own and not a part of a character.
function spans({text: letters, logprobs}) {
  const whole = logprobs.tokens.join("") === letters;
  return (whole ? logprobs.tokens : [letters]).map((token, i) => {
    const span = make("span", {textContent: token});
    if (whole) {
      span.alternatives = logprobs.top_logprobs[i];
      span.style.setProperty("--doubt", 1 - Math.exp(logprobs.token_logprobs[i]));
    }
    return span;
  });
}

function showChoices(span) {
  const list = Object.entries(span.alternatives).sort((a, b) => b[1] - a[1]);
  $("choices").replaceChildren(...list.map(([token, logprob]) => {
    const name = token.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll(" ", "␣");
    const properties = {disabled: /^(bytes:|<\|)/.test(token), onclick: () => take(span, token)};
    return make("button", properties, make("span", {textContent: name}), `${(100 * Math.exp(logprob)).toFixed(1)}%`);
  }));
  const box = span.getBoundingClientRect(), all = $("choices");
  all.hidden = false;
  all.style.top = `${box.bottom + scrollY + 4}px`;
  all.style.left = `${Math.max(8, Math.min(box.left, innerWidth - all.offsetWidth - 8)) + scrollX}px`;
}

// Another token in a place: what came after it goes, and the model goes on from there.
function take(span, token) {
  const undone = parts();
  while (span.nextSibling) span.nextSibling.remove();
  span.textContent = token;
  delete span.alternatives;
  text.append(make("br"));
  go(chosenSeed(), undone, () => show(undone));
}

const atCaret = () => getSelection().anchorNode?.parentElement;

text.addEventListener("click", event => {
  $("choices").hidden = true;
  if (!running && event.target.alternatives) showChoices(event.target);
});
document.addEventListener("keydown", event => {
  if (event.key === "Escape") $("choices").hidden = true;
  if (event.key !== "ArrowDown" || !event.altKey || running || !atCaret()?.alternatives) return;
  event.preventDefault();
  showChoices(atCaret());
  $("choices").querySelector("button:enabled")?.focus();
});

function undo() {
  if (running || !before.length) return;
  $("choices").hidden = true;
  show(before.pop().undone);
  buttons();
  scoreSoon();
  say("");
}
