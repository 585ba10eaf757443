// Asks the server of `normlab serve`: one request a picture.
"use strict";

const TRIES = 5;
const sleep = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));

const backend = {
  silent: "The server cannot be reached.",

  async describe() {
    return (await fetch("model")).json();
  },

  async sample({ path }) {
    return (await fetch(path)).blob();
  },

  async heat(file, model) {
    return (await this.ask(file, model, "&heat=true")).heat;
  },

  async ask(file, model, more = "") {
    if (model && file.size > model.limits.file_bytes)
      throw new Error(`It has ${megabytes(file.size)}; at most ${megabytes(model.limits.file_bytes)} can be sent. Make it smaller.`);
    const form = new FormData();
    form.append("files", file, file.name || "pasted");
    for (let attempt = 1; ; attempt++) {
      let response;
      try {
        response = await fetch(`predict?seen=true${more}`, { method: "POST", body: form });
      } catch {
        throw new Error("The file cannot be read, or the server cannot be reached.");
      }
      const told = await response.json().catch(() => ({}));
      if (response.ok) return told.results[0];
      if (response.status === 429 && attempt < TRIES) {
        await sleep(Number(response.headers.get("Retry-After")) || 1);
        continue;
      }
      throw new Error(sentence(told.detail || `the server answered ${response.status}`));
    }
  },
};

function sentence(text) {
  const full = text[0].toUpperCase() + text.slice(1);
  return /[.!?)]$/.test(full) ? full : `${full}.`;
}
