// The page on which people try a model. Who answers is `backend`, of serve.js or web.js: each picture
// is a question of its own, so that answers come one by one and a bad picture stands alone. Text from
// outside only ever becomes text, never markup.
"use strict";

const AT_A_TIME = 4;
const WORDS = {
  unlike: "The picture is unlike those it was trained on. What it would say all the same:",
  undecided: "No class stands out:",
};

const VIEWS = {
  flip: "two: the picture and its mirror image",
  shift: "six: the picture and its mirror image, and both moved by a pixel",
  unsure: "one; six where it gives no sure answer: the mirror image, too, and both moved by a pixel",
};

const byId = (id) => document.getElementById(id);
const megabytes = (bytes) => `${+(bytes / 1e6).toFixed(1)} MB`;
const percent = (p) => (p > 0 && p < 0.0005 ? "< 0.1 %" : `${(100 * p).toFixed(1)} %`);
const milliseconds = (t) => (t < 10 ? t.toFixed(1) : t.toFixed(0)) + " ms";

let model = null;
const queue = [];
let running = 0;
let open = 0; // pictures without an answer yet
let finished = [];

function calibration(doubt) {
  if (doubt?.error_before == null || doubt.error_after == null) return null;
  return `error ${doubt.error_before.toFixed(3)} before, ${doubt.error_after.toFixed(3)} after the temperature ${doubt.temperature.toFixed(2)}, on the ${doubt.held_out} held-out pictures that it was fitted on`;
}

async function describe() {
  model = await backend.describe();
  const trained = model.recipe ? `${model.recipe} on ${model.data}` : "an ONNX model";
  byId("model").textContent =
    `${model.name} – ${trained}, ${model.class_names.length} classes`;
  const most = model.limits && `; up to ${megabytes(model.limits.file_bytes)} and ${model.limits.pixels / 1e6} megapixels each (JPEG: ${model.limits.jpeg_pixels / 1e6})`;
  byId("limits").textContent = model.formats.join(", ") + (most ?? "");
  const rows = {
    Classes: model.class_names.join(", "),
    "It sees": `${model.image_size} × ${model.image_size} pixels: the largest centred square`,
    Views: VIEWS[model.views],
    Recipe: model.recipe,
    Data: model.data,
    Checked: model.checked,
    Sure: model.doubt ? model.doubt.told : "always: it answers whatever it is shown",
    Calibration: calibration(model.doubt),
    "SHA-256": model.sha256,
    ...model.more,
  };
  for (const [term, text] of Object.entries(rows)) {
    if (!text) continue;
    byId("about").append(element("dt", term), element("dd", text));
  }
  if (model.doubt)
    byId("always").textContent =
      "It says “not sure” of pictures unlike those it was trained on, but it cannot know every strange picture.";
  model.samples.forEach(addSample);
  byId("samples-section").hidden = !model.samples.length; // none for a model of other classes
}

function element(name, text) {
  const made = document.createElement(name);
  made.textContent = text;
  return made;
}

function addSample(sample) {
  const button = document.createElement("button");
  button.type = "button";
  const image = document.createElement("img");
  image.src = sample.path;
  image.alt = "sample: ";
  image.width = image.height = 32;
  button.append(image, element("span", sample.label));
  button.addEventListener("click", async () => {
    try {
      take([new File([await backend.sample(sample)], `sample ${sample.label}.png`, { type: "image/png" })]);
    } catch {
      announce(backend.silent);
    }
  });
  byId("samples").append(button);
}

// The status line is read aloud: one sentence for a picture, a summary for many.
function announce(text) {
  byId("status").textContent = text;
}

function take(files) {
  if (!files.length) return;
  byId("results-section").hidden = false;
  const many = files.length + open > 1;
  announce(many ? `Sending ${files.length} pictures.` : `Sending ${files[0].name}.`);
  const cards = files.map(makeCard);
  byId("results").prepend(...cards);
  files.forEach((file, i) => queue.push([file, cards[i]]));
  open += files.length;
  next();
}

function next() {
  while (running < AT_A_TIME && queue.length) {
    const [file, card] = queue.shift();
    running += 1;
    answer(file, card).then((sentence) => {
      running -= 1;
      open -= 1;
      finished.push(sentence);
      if (!open) {
        announce(finished.length === 1 ? finished[0] : `${finished.length} pictures. ${finished.slice(0, 5).join(" ")}`);
        finished = [];
      }
      next();
    });
  }
}

function makeCard(file) {
  const card = byId("result").content.firstElementChild.cloneNode(true);
  card.classList.add("waiting");
  card.querySelector("h3").textContent = file.name || "a pasted picture";
  card.querySelector(".answer").textContent = "looking …";
  const figure = card.querySelector(".original");
  const image = figure.querySelector("img");
  image.alt = `${file.name || "the picture"} as sent`;
  image.addEventListener("load", () => {
    figure.classList.toggle("small-original", image.naturalWidth <= 64);
    URL.revokeObjectURL(image.src);
  });
  image.addEventListener("error", () => {
    URL.revokeObjectURL(image.src);
    figure.hidden = true; // not every browser shows every format
  });
  image.src = URL.createObjectURL(file);
  return card;
}

// Fills the card; gives the sentence to read aloud.
async function answer(file, card) {
  const name = file.name || "The picture";
  try {
    const started = performance.now();
    const result = await backend.ask(file, model);
    const took = performance.now() - started;
    if (backend.heat) offerHeat(card, file, name);
    return show(card, name, result, took);
  } catch (error) {
    card.classList.replace("waiting", "bad");
    card.querySelector(".answer").textContent = "No answer";
    card.querySelector(".took").textContent = error.message;
    return `${name}: no answer. ${error.message}`;
  }
}

// Hides a part of the picture after the other, which takes 65 runs: only if asked for.
function offerHeat(card, file, name) {
  const button = card.querySelector(".look");
  const figure = card.querySelector(".heat");
  const image = figure.querySelector("img");
  image.alt = `${name}: where the network looked`;
  button.hidden = false;
  button.addEventListener("click", async () => {
    button.disabled = true;
    button.textContent = "looking …";
    try {
      image.src = await backend.heat(file, model);
      figure.hidden = false;
      button.hidden = true;
      announce(`${name}: a map of where it looked is there.`);
    } catch (error) {
      button.disabled = false;
      button.textContent = "Where did it look?";
      announce(error.message);
    }
  });
}

function show(card, name, result, total) {
  const [best] = result.predictions;
  card.classList.remove("waiting");
  card.querySelector(".answer").textContent = result.doubt ? "Not sure" : best.class;
  card.classList.toggle("unsure", Boolean(result.doubt));
  card.querySelector(".doubt").textContent = result.doubt ? WORDS[result.doubt] : "";
  const bars = card.querySelector(".bars");
  for (const { class: label, probability } of result.predictions) {
    const bar = byId("bar").content.firstElementChild.cloneNode(true);
    bar.querySelector(".name").textContent = label;
    bar.querySelector(".value").textContent = percent(probability);
    bar.querySelector(".fill").style.width = `${100 * probability}%`;
    bars.append(bar);
  }
  const figure = card.querySelector(".seen");
  const image = figure.querySelector("img");
  image.src = result.seen;
  image.alt = `${name} as the network sees it`;
  figure.querySelector("figcaption").textContent =
    `as the network sees it: ${model ? `${model.image_size} × ${model.image_size}` : "small"}`;
  figure.hidden = false;
  const { decoding, model: run } = result.milliseconds;
  card.querySelector(".took").textContent =
    `${milliseconds(total)} in all: reading the picture ${milliseconds(decoding)}, the network ${milliseconds(run)}`;
  if (result.doubt) return `${name}: not sure. ${WORDS[result.doubt]}`;
  return `${name}: ${best.class}, ${percent(best.probability)}.`;
}

byId("files").addEventListener("change", (event) => {
  take([...event.target.files]);
  event.target.value = ""; // so that the same file can be chosen again
});

document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  if (files.length) {
    event.preventDefault();
    take(files);
  } else {
    announce("The clipboard holds no picture.");
  }
});

let depth = 0; // elements under a dragged file: each one entered and left on the way
for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return;
    event.preventDefault();
    depth += { dragenter: 1, dragover: 0, dragleave: -1, drop: -depth }[kind];
    document.body.classList.toggle("dragging", depth > 0);
    if (kind === "drop") take([...event.dataTransfer.files]);
  });
}

let stream = null; // of the camera, while it is on

async function cameraOn() {
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch {
    announce("The camera cannot be used.");
    return;
  }
  byId("view").srcObject = stream;
  byId("camera-section").hidden = false;
  await byId("view").play();
  byId("shoot").focus();
}

function cameraOff() {
  stream?.getTracks().forEach((track) => track.stop());
  stream = null;
  byId("camera-section").hidden = true;
  byId("camera").focus();
}

byId("camera").addEventListener("click", cameraOn);
byId("camera-off").addEventListener("click", cameraOff);
byId("shoot").addEventListener("click", () => {
  const view = byId("view");
  const canvas = document.createElement("canvas");
  canvas.width = view.videoWidth;
  canvas.height = view.videoHeight;
  canvas.getContext("2d").drawImage(view, 0, 0);
  canvas.toBlob((content) => take([new File([content], "camera.png", { type: "image/png" })]));
});
navigator.mediaDevices?.enumerateDevices?.().then((devices) => {
  byId("camera").hidden = !devices.some((device) => device.kind === "videoinput");
}).catch(() => {}); // without a camera, or without leave to look for one, there is no button

byId("clear").addEventListener("click", () => {
  byId("results").replaceChildren();
  byId("results-section").hidden = true;
  announce("Answers cleared.");
  byId("files").focus();
});

describe().catch(() => {
  byId("model").textContent = backend.silent;
});
