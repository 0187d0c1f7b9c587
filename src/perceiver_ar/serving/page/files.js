"use strict";
// For runs that do not write text: a file goes on, and what comes of it is shown and can be saved.
async function goOnWithFile() {
  if (running) return;
  running = new AbortController();
  buttons();
  say("reading …");
  const form = new FormData(), file = played.length ? playedFile() : $("file").files[0];
  const takes = document.createElement("section");
  let roll = null;
  if (file) {
    form.append("file", file);
    if ($("keep").value !== "1") form.append("keep", $("keep").value);
  }
  if (model.document_length === null) form.append("max_new_tokens", $("max_tokens").value);
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
        if (event.notes) takes.append((roll = new Roll(event.notes)).canvas);
      } else if (event.type === "tokens") {
        for (const sample of event.samples) {
          drawn += sample.ids.length;
          if (sample.notes) roll.change(sample.kept, sample.notes);
          if (sample.picture) picture(takes, sample);
        }
        say(`${drawn} tokens …`);
      } else {
        for (const old of takes.querySelectorAll("img")) old.remove();
        takes.append(...event.files.filter(file => !(roll && file.media_type.startsWith("image"))).map(figure));
        const sound = takes.querySelector("audio");
        if (roll && sound) roll.follow(sound);
        say(`${drawn} tokens; the files stay for ${Math.round(event.expires_in / 60)} minutes`);
      }
    }
  } catch (error) {
    if (error.name === "AbortError") say("stopped");
    else say(error.message, true);
  }
  if (!takes.childNodes.length) takes.remove();
  running = null;
  buttons();
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
  const all = document.createElement("figure"), link = document.createElement("a");
  const url = file.url.slice(1), kind = file.media_type.split("/")[0];
  if (kind === "image") {
    const image = new Image();
    image.onload = () => {
      image.classList.toggle("small", image.naturalWidth < 200);
      all.classList.toggle("wide", image.naturalWidth > 600);
    };
    image.src = url;
    image.alt = file.name;
    all.append(image);
  } else if (file.name.endsWith(".wav")) {
    const audio = document.createElement("audio");
    audio.controls = true;
    audio.src = url;
    audio.setAttribute("aria-label", file.name);
    if (model.file_ending === ".wav") all.append(waveform(audio));
    all.append(audio);
  }
  link.href = url;
  link.download = link.textContent = file.name;
  all.append(link);
  return all;
}
