// Answers in this browser: no server, no network. MODEL is of model.js, RUNTIME of runtime.js and
// `ort`, ONNX Runtime Web, of ort.wasm.min.js; all of them are scripts, because a page that was opened
// from a folder may load nothing else.
"use strict";

const MOST_PIXELS = 25e6; // more are reduced to a half, a quarter or an eighth of the side
const READS = "what this browser reads: JPEG, PNG, WebP, GIF, BMP, AVIF";

async function unpacked(base64) {
  const text = atob(base64);
  const packed = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

async function start() {
  const [glue, wasm, graph] = await Promise.all(
    [RUNTIME.glue, RUNTIME.wasm, MODEL.graph].map(unpacked),
  );
  const mjs = URL.createObjectURL(new Blob([glue], { type: "text/javascript" }));
  Object.assign(ort.env.wasm, { numThreads: 1, wasmPaths: { mjs }, wasmBinary: wasm });
  return ort.InferenceSession.create(new Uint8Array(graph), { executionProviders: ["wasm"] });
}

const started = start();
started.catch(() => {}); // whoever asks is told

// Upright pixels, white under transparency, colour profiles left out, as in training.
async function decode(file) {
  let bitmap;
  try {
    const asTheyAre = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
    bitmap = await createImageBitmap(file, asTheyAre);
  } catch {
    throw new Error("This browser cannot read it as a picture. Save it as PNG or JPEG.");
  }
  const times = [1, 2, 4].find((n) => bitmap.width * bitmap.height <= MOST_PIXELS * n * n) ?? 8;
  const width = Math.ceil(bitmap.width / times);
  const height = Math.ceil(bitmap.height / times);
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  if (!context) throw new Error("It is too large for this browser. Make it smaller.");
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  const { data } = context.getImageData(0, 0, width, height);
  const pixels = new Uint8Array(3 * width * height);
  for (let i = 0, j = 0; j < pixels.length; i++) if (i % 4 < 3) pixels[j++] = data[i];
  return new ort.Tensor("uint8", pixels, [1, height, width, 3]);
}

let last = Promise.resolve(); // one picture at a time in the network

// Probabilities in the order of the classes, the pixels (3, S, S) that the network saw, and how
// familiar they are, if the network tells it.
async function look(file) {
  const began = performance.now();
  const images = await decode(file);
  const session = await started;
  const decoded = performance.now();
  const run = last.then(() => session.run({ images }));
  last = run.catch(() => {});
  const { probabilities, pixels, familiarity } = await run;
  const milliseconds = { decoding: decoded - began, model: performance.now() - decoded };
  return { probabilities: probabilities.data, pixels: pixels.data, familiarity: familiarity?.data[0], milliseconds };
}

function drawn(pixels) {
  const size = MODEL.image_size;
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = size;
  const context = canvas.getContext("2d");
  const image = context.createImageData(size, size);
  for (let i = 0; i < size * size; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = pixels[c * size * size + i];
    image.data[4 * i + 3] = 255;
  }
  context.putImageData(image, 0, 0);
  return canvas.toDataURL();
}

function doubtOf(probability, familiarity) {
  if (!MODEL.doubt) return null;
  const { least_probability, least_familiarity } = MODEL.doubt;
  if (least_familiarity !== null && familiarity < least_familiarity) return "unlike";
  return probability < least_probability ? "undecided" : null;
}

const backend = {
  silent: "The model cannot be shown.",

  async describe() {
    return { ...MODEL, formats: [READS] };
  },

  async sample({ path }) {
    const bytes = Uint8Array.from(atob(path.split(",")[1]), (c) => c.charCodeAt(0));
    return new Blob([bytes], { type: "image/png" });
  },

  async ask(file) {
    const { probabilities, pixels, familiarity, milliseconds } = await look(file);
    if (!probabilities.every(Number.isFinite)) throw new Error("The network's answer is not a number.");
    const predictions = [...probabilities]
      .map((probability, k) => ({ class: MODEL.class_names[k], probability }))
      .sort((a, b) => b.probability - a.probability)
      .slice(0, 5);
    return { predictions, doubt: doubtOf(predictions[0].probability, familiarity), seen: drawn(pixels), milliseconds };
  },
};
