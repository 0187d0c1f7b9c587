"use strict";
// For runs that do not write text: a file goes on, and what comes of it is shown and can be saved.
async function goOnWithFile() {
  if (running) return;
  const form = new FormData(), file = played.length ? playedFile() : $("file").files[0];
  const bars = [$("first"), $("last")], infill = bars.some(bar => bar.value || bar.validity.badInput);
  if (infill && !(file && bars.every(bar => bar.value)))
    return say(file ? "give both bars, as numbers" : "choose a file whose bars are composed anew", true);
  running = new AbortController();
  buttons();
  say("reading …");
  const takes = make("section"), n = +$("takes").value;
  let rolls = [];
  if (file) form.append("file", file);
  if (infill) form.append("infill", bars.map(bar => bar.value).join(":"));
  else if (file && $("keep").value !== "1") form.append("keep", $("keep").value);
  for (const [name, value] of Object.entries(conditions())) {
    if (name === "class" && model.classes.length) form.append("prompt", value);
    else form.append("condition", `${name}=${value}`);
  }
  if (model.document_length === null && !infill) form.append("max_new_tokens", $("max_tokens").value);
  form.append("n", n);
  for (const id of ["temperature", "top_p"]) form.append(id, $(id).value);
  if ($("seed").value !== "") form.append("seed", $("seed").value);
  form.append("stream", "true");
  let drawn = 0;
  try {
    const answer = await fetch("v1/generate", {method: "POST", body: form, signal: running.signal});
    if (!answer.ok) throw new Error(await message(answer));
    for await (const event of events(answer.body)) {
      if (event.error) throw new Error(event.error.message);
      if (event.type === "prompt") {
        $("results").prepend(takes);
        if (event.notes) rolls = addRolls(takes, event.notes, n);
      } else if (event.type === "tokens") {
        for (const sample of event.samples) {
          drawn += sample.ids.length;
          if (sample.notes) rolls[sample.index].change(sample.kept, sample.notes);
          if (sample.picture) picture(takes, sample);
        }
        say(`${drawn} tokens …`);
      } else {
        for (const old of takes.querySelectorAll("img")) old.remove();
        if (rolls.length) addFiles(takes, rolls, event.files);
        else takes.append(...event.files.map(figure));
        say(`${drawn} tokens; the files stay for ${Math.round(event.expires_in / 60)} minutes`);
      }
    }
  } catch (error) {
    sayError(error);
  }
  if (!takes.childNodes.length) takes.remove();
  running = null;
  buttons();
}

// A piano roll for each take, of which one is shown, and a place for the files of each.
function addRolls(takes, notes, n) {
  const rolls = Array.from({length: n}, () => new Roll(notes)), figures = rolls.map(() => make("figure"));
  const choose = chosen => rolls.forEach((roll, i) => {
    roll.canvas.hidden = i !== chosen;
    figures[i].firstChild.setAttribute("aria-pressed", String(i === chosen));
  });
  figures.forEach((figure, i) => {
    const onclick = () => choose(i);
    figure.append(make("button", {type: "button", textContent: `Take ${i + 1}`, hidden: n === 1, onclick}));
    figure.addEventListener("play", event => {  // of its sound
      choose(i);
      for (const other of $("results").querySelectorAll("audio")) if (other !== event.target) other.pause();
    }, true);
  });
  choose(0);
  takes.append(...rolls.map(roll => roll.canvas), ...figures);
  return rolls;
}

function addFiles(takes, rolls, files) {
  takes.querySelectorAll("figure").forEach((all, i) => {
    const number = new RegExp(`-${i + 1}[.-]`);
    const own = files.filter(({name}) => !name.endsWith(".png") && (rolls.length === 1 || number.test(name)));
    for (const file of own) all.append(...figure(file).childNodes);
    const bar = all.querySelector(".sound");
    if (!bar) return;
    all.firstChild.after(bar);
    rolls[i].follow(bar.querySelector("audio"));
  });
}

// A picture while its rows are drawn.
function picture(takes, {index, picture}) {
  const id = `sample-${index}`, image = [...takes.querySelectorAll("img")].find(one => one.dataset.id === id) ?? new Image();
  image.dataset.id = id;
  image.className = "small";
  image.alt = `sample ${index + 1}, as far as it is drawn`;
  image.src = `data:image/png;base64,${picture}`;
  if (!image.isConnected) takes.append(image);
}

function figure(file) {
  const all = make("figure"), url = file.url.slice(1), kind = file.media_type.split("/")[0];
  if (kind === "image") {
    const image = make("img", {src: url, alt: file.name});
    image.onload = () => {
      image.classList.toggle("small", image.naturalWidth < 200);
      all.classList.toggle("wide", image.naturalWidth > 600);
    };
    all.append(image);
  } else if (file.name.endsWith(".wav")) {
    const audio = make("audio", {controls: true, src: url}), loop = make("button", {type: "button"}, "Loop");
    audio.setAttribute("aria-label", file.name);
    if (model.file_ending === ".wav") all.append(waveform(audio));
    loop.setAttribute("aria-pressed", "false");
    loop.onclick = () => {
      audio.loop = !audio.loop;
      loop.setAttribute("aria-pressed", String(audio.loop));
    };
    all.append(make("div", {className: "sound"}, audio, loop));
  }
  all.append(make("a", {href: url, download: file.name}, file.name));
  return all;
}
