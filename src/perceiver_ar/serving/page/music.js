"use strict";
// Music and sound: a piano roll that grows, a waveform, and a keyboard to play a beginning on.
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name);

// Sharp on any screen: a canvas that is drawn again when its size changes.
function drawn(canvas, draw) {
  const again = () => {
    const {width, height} = canvas.getBoundingClientRect(), scale = devicePixelRatio;
    if (!width) return;
    [canvas.width, canvas.height] = [width * scale, height * scale];
    const context = canvas.getContext("2d");
    context.scale(scale, scale);
    draw(context, width, height);
  };
  new ResizeObserver(again).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  return again;
}

// A click on a canvas moves the sound there; the line shows where it is.
function seek(canvas, audio, again) {
  canvas.onclick = event => {
    const box = canvas.getBoundingClientRect();
    if (audio.duration) audio.currentTime = audio.duration * (event.clientX - box.left) / box.width;
  };
  const frame = () => {
    again();
    if (!audio.paused) requestAnimationFrame(frame);
  };
  for (const name of ["play", "seeked", "pause"]) audio.addEventListener(name, frame);
}

class Roll {
  // notes: [start, end, pitch, velocity] of the prompt, in seconds
  constructor(notes) {
    this.prompt = new Set(notes.map(([start, , pitch]) => `${start} ${pitch}`));
    this.kept = notes.length;
    this.notes = notes;
    this.canvas = make("canvas", {className: "roll"});
    this.canvas.setAttribute("role", "img");
    this.audio = null;
    this.again = drawn(this.canvas, (context, width, height) => this.draw(context, width, height));
    this.label();
  }

  change(kept, notes) {
    this.notes = [...this.notes.slice(0, kept), ...notes];
    this.label();
    this.again();
  }

  label() {
    const added = Math.max(0, this.notes.length - this.kept);
    this.canvas.setAttribute("aria-label", `Piano roll: ${this.kept} notes to go on from, ${added} new ones`);
  }

  follow(audio) {
    this.audio = audio;
    audio.addEventListener("loadedmetadata", this.again);
    seek(this.canvas, audio, this.again);
  }

  draw(context, width, height) {
    const end = this.audio?.duration || this.notes.reduce((most, note) => Math.max(most, note[1]), 1);
    const pitches = this.notes.map(note => note[2]), low = Math.min(60, ...pitches) - 2, high = Math.max(72, ...pitches) + 2;
    const x = seconds => width * seconds / end, y = pitch => height * (high - pitch) / (high - low);
    const colours = [colour("--soft"), colour("--written")], thick = Math.max(2, height / (high - low));
    for (const [start, stop, pitch, velocity] of this.notes) {
      context.fillStyle = colours[+!this.prompt.has(`${start} ${pitch}`)];
      context.globalAlpha = .35 + .65 * velocity / 127;
      context.fillRect(x(start), y(pitch), Math.max(1, x(stop) - x(start) - .5), thick);
    }
    context.globalAlpha = 1;
    if (this.audio?.currentTime) {
      context.fillStyle = colour("--warn");
      context.fillRect(x(this.audio.currentTime), 0, 1.5, height);
    }
  }
}

function waveform(audio) {
  const canvas = make("canvas");
  let sound = null;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", "Waveform");
  const again = drawn(canvas, (context, width, height) => {
    if (!sound) return;
    const step = sound.length / width;
    for (let i = 0; i < width; i++) {
      let most = 0;
      for (let j = Math.floor(i * step); j < (i + 1) * step; j++) most = Math.max(most, Math.abs(sound[j] ?? 0));
      context.fillStyle = colour(i / width < audio.currentTime / audio.duration ? "--warn" : "--written");
      context.fillRect(i, height / 2 * (1 - most), 1, Math.max(1, height * most));
    }
  });
  fetch(audio.src).then(answer => answer.arrayBuffer()).then(async data => {
    sound = (await new OfflineAudioContext(1, 1, 44100).decodeAudioData(data)).getChannelData(0);
    again();
  }).catch(error => say(`the waveform cannot be drawn: ${error.message}`, true));
  seek(canvas, audio, again);
  return canvas;
}

// A keyboard of two octaves and a fourth, from C3; A is C4.
const LETTERS = "awsedftgyhujk", BLACK = new Set([1, 3, 6, 8, 10]);
const played = [];       // [start, end, pitch, velocity] in seconds; end is null while the key is down
const down = new Map();  // pitch -> its note, and its sound
let began = 0, speakers = null;

function press(pitch, velocity = 80) {
  if (down.has(pitch) || running) return;
  const now = performance.now() / 1000;
  if (!played.length) began = now;
  const note = [now - began, null, pitch, velocity];
  played.push(note);
  speakers ??= new AudioContext();
  const tone = speakers.createOscillator(), volume = speakers.createGain();
  tone.type = "triangle";
  tone.frequency.value = 440 * 2 ** ((pitch - 69) / 12);
  volume.gain.setValueAtTime(.3 * velocity / 127, speakers.currentTime);
  volume.gain.exponentialRampToValueAtTime(.001, speakers.currentTime + 2);
  tone.connect(volume).connect(speakers.destination);
  tone.start();
  down.set(pitch, {note, tone});
  showPlayed();
}

function release(pitch) {
  const {note, tone} = down.get(pitch) ?? {};
  if (!note) return;
  note[1] = performance.now() / 1000 - began;
  tone.stop();
  down.delete(pitch);
  showPlayed();
}

function showPlayed() {
  for (const key of $("keys").children) key.classList.toggle("down", down.has(+key.dataset.pitch));
  $("forget").disabled = !played.length;
  $("played").textContent = played.length ? `${played.length} notes played; they come before a file` : "";
}

// A MIDI file of what was played, with 480 ticks for half a second.
function playedFile() {
  const bytes = [], end = performance.now() / 1000 - began;
  const moments = played.flatMap(([start, stop, pitch, velocity]) =>
    [[start, 0x90, pitch, velocity], [stop ?? end, 0x80, pitch, 0]]).sort((a, b) => a[0] - b[0] || a[1] - b[1]);
  let now = 0;
  for (const [seconds, ...event] of moments) {
    const ticks = Math.round(960 * seconds) - now, digits = [ticks & 127];
    for (let rest = ticks >> 7; rest; rest >>= 7) digits.unshift(rest & 127 | 128);
    bytes.push(...digits, ...event);
    now += ticks;
  }
  bytes.push(0, 0xff, 0x2f, 0);
  const track = [...new TextEncoder().encode("MTrk"), ...[24, 16, 8, 0].map(shift => bytes.length >> shift & 255), ...bytes];
  const head = [...new TextEncoder().encode("MThd"), 0, 0, 0, 6, 0, 0, 0, 1, 480 >> 8, 480 & 255];
  return new File([new Uint8Array([...head, ...track])], "played.mid", {type: "audio/midi"});
}

for (let pitch = 48; pitch <= 77; pitch++) {
  const letter = LETTERS[pitch - 60], className = BLACK.has(pitch % 12) ? "black" : "";
  const key = make("button", {type: "button", tabIndex: -1, className, onpointerdown: () => press(pitch)});
  key.dataset.pitch = pitch;
  key.setAttribute("aria-label", `${["C", "C sharp", "D", "D sharp", "E", "F", "F sharp", "G", "G sharp", "A", "A sharp", "B"][pitch % 12]} ${Math.floor(pitch / 12) - 1}${letter ? `, key ${letter.toUpperCase()}` : ""}`);
  for (const name of ["pointerup", "pointerleave", "pointercancel"]) key.addEventListener(name, () => release(pitch));
  $("keys").append(key);
}
const letter = event => LETTERS.indexOf(event.key?.toLowerCase() ?? " ");  // no key: the browser fills a field in
document.addEventListener("keydown", event => {
  const at = letter(event), writes = event.target.matches("select, input:not([type=range], [type=checkbox])");
  if ($("piano").hidden || at < 0 || event.repeat || event.ctrlKey || event.metaKey || event.altKey || writes) return;
  press(60 + at);
});
document.addEventListener("keyup", event => {
  const at = letter(event);
  if (at >= 0) release(60 + at);
});
window.addEventListener("blur", () => [...down.keys()].forEach(release));
$("forget").onclick = () => {
  [...down.keys()].forEach(release);
  played.length = 0;
  showPlayed();
};
$("midi").onclick = async () => {
  try {
    const inputs = await navigator.requestMIDIAccess(), names = () => [...inputs.inputs.values()].map(input => input.name);
    const listen = () => {
      for (const input of inputs.inputs.values()) {
        input.onmidimessage = ({data: [kind, pitch, velocity]}) => {
          if ((kind & 0xf0) === 0x90 && velocity) press(pitch, velocity);
          else if ((kind & 0xf0) === 0x80 || (kind & 0xf0) === 0x90) release(pitch);
        };
      }
      $("played").textContent = names().length ? `${names().join(", ")}: play` : "no MIDI keyboard is connected";
    };
    inputs.onstatechange = listen;
    listen();
  } catch {
    $("played").textContent = "this browser gives no access to MIDI keyboards";
  }
};
