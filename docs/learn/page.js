// The page on batch normalisation: eight pictures to move. Plain JavaScript; nothing is fetched.
(() => {
  "use strict";
  const data = window.normlabData, $ = (id) => document.getElementById(id);
  if (!data) return;

  // ---- small tools -------------------------------------------------------------------------------
  const NS = "http://www.w3.org/2000/svg";
  const svg = (tag, attrs = {}, ...inner) => fill(document.createElementNS(NS, tag), attrs, inner);
  const el = (tag, attrs = {}, ...inner) => fill(document.createElement(tag), attrs, inner);
  function fill(node, attrs, inner) {
    for (const [k, v] of Object.entries(attrs)) {
      if (k.startsWith("on")) node.addEventListener(k.slice(2), v);
      else if (v !== null && v !== undefined && v !== false) node.setAttribute(k, v);
    }
    node.append(...inner);
    return node;
  }
  const set = (node, attrs) => { for (const k in attrs) node.setAttribute(k, attrs[k]); };
  const fixed = (v, n = 2) => (Math.abs(v) < 0.5 * 10 ** -n ? 0 : v).toFixed(n).replace("-", "−");
  const signed = (v, n = 2) => (v > 0 ? "+" : "") + fixed(v, n);
  const range = (label, attrs, act) => {
    const input = el("input", { type: "range", ...attrs, oninput: () => act(+input.value) });
    return [el("label", {}, label, input), input];
  };
  const choice = (legend, name, options, act) => el("fieldset", {}, el("legend", {}, legend),
    ...options.map(([value, text], i) => el("label", {}, el("input", { type: "radio", name, value,
      checked: i === 0 ? "" : null, onchange: () => act(value) }), text)));
  const half = (h) => { // a float16's value
    const s = h & 0x8000 ? -1 : 1, e = (h >> 10) & 31, f = h & 1023;
    return s * (e === 0 ? f * 2 ** -24 : e === 31 ? (f ? NaN : Infinity) : (1 + f / 1024) * 2 ** (e - 15));
  };
  function unpack({ kind, data: text }) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    if (kind === "uint8") return bytes;
    if (kind === "float32") return Float64Array.from(new Float32Array(bytes.buffer));
    return Float64Array.from(new Uint16Array(bytes.buffer), half);
  }
  const pictureUrl = (pixels, n) => {
    const canvas = el("canvas", { width: 32, height: 32 }), context = canvas.getContext("2d");
    const image = context.createImageData(32, 32);
    for (let i = 0; i < 1024; i++) {
      for (let c = 0; c < 3; c++) image.data[i * 4 + c] = pixels[n * 3072 + i * 3 + c];
      image.data[i * 4 + 3] = 255;
    }
    context.putImageData(image, 0, 0);
    return canvas.toDataURL();
  };
  // A widget takes the place of the picture that readers without scripts see.
  function widget(id, make) {
    const figure = $(id);
    if (!figure) return;
    const parts = make();
    figure.querySelectorAll("img.still").forEach((still) => still.remove());
    figure.prepend(...parts.nodes);
    if (parts.draw) {
      parts.draw();
      new ResizeObserver(() => parts.draw()).observe(figure);
    }
  }

  // ---- 1. What it computes -----------------------------------------------------------------------
  widget("bn-computes", () => {
    const d = data.dots, raw = unpack(d.values), pixels = unpack(d.pictures);
    const N = d.names.length, P = raw.length / N, M = raw.length, EPS = d.eps;
    const shift = new Float64Array(N), start = { gamma: 1, beta: 0 };
    let { gamma, beta } = start, stored = false;
    const high = Math.max(...raw), low = 0, wide = (high - low) || 1;
    const xs = [low - 0.35 * wide, high + 0.55 * wide], ys = [-4.2, 4.2], ROW = 27, TOP = 40;
    const H = TOP + N * ROW + 34;
    const chart = svg("svg", { role: "group", "aria-label": "Values of eight pictures before and after batch normalisation" });
    const band = [0, 1].map(() => svg("rect", { y: TOP, height: N * ROW, fill: "var(--two)", opacity: 0.16 }));
    const line = [0, 1].map(() => svg("line", { y1: TOP - 4, y2: TOP + N * ROW, stroke: "var(--two)", "stroke-width": 2 }));
    const zero = svg("line", { y1: TOP, y2: TOP + N * ROW, stroke: "var(--faint)" });
    const heads = [0, 1].map(() => svg("text", { y: 12, "font-weight": 600 }));
    const marks = [0, 1].map(() => svg("text", { y: 30, "text-anchor": "middle" }));
    const axes = [svg("g"), svg("g")];
    const rows = d.names.map((name, i) => {
      const bar = svg("rect", { y: TOP + i * ROW + 1, height: ROW - 2, fill: "var(--soft)", rx: 3 });
      const dots = [0, 1].map((side) => Array.from({ length: P }, (_, j) => svg("circle", {
        r: 2.6, cy: TOP + i * ROW + 6 + ((j * 7) % (ROW - 12)), fill: "var(--one)", opacity: 0.62 })));
      const thumb = svg("image", { href: pictureUrl(pixels, i), x: 0, y: TOP + i * ROW + 2, width: ROW - 4, height: ROW - 4 });
      const grip = svg("g", { class: "drag", tabindex: 0, role: "slider", "aria-valuemin": -100, "aria-valuemax": 100 },
        svg("title", {}, `Drag to move all values of the ${name}`), bar, thumb, ...dots[0]);
      const move = (to) => { shift[i] = Math.max(-0.3 * wide, Math.min(0.5 * wide, to)); moved("all"); };
      let from = null;
      grip.addEventListener("pointerdown", (e) => { from = [e.clientX, shift[i]]; grip.setPointerCapture(e.pointerId); });
      grip.addEventListener("pointermove", (e) => { if (from) move(from[1] + (e.clientX - from[0]) / X.px); });
      for (const end of ["pointerup", "pointercancel"]) grip.addEventListener(end, () => { from = null; });
      grip.addEventListener("keydown", (e) => {
        const by = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 5, PageDown: -5 }[e.key];
        if (by) move(shift[i] + by * 0.02 * wide);
        else if (e.key === "Home" || e.key === "Escape") move(0);
        else return;
        e.preventDefault();
      });
      return { bar, dots, grip, name };
    });
    const aim = raw.reduce((s, v) => s + v, 0) / M * 1.8; // the ringed value is the first picture's, off the mean
    const FOLLOW = [0, Array.from({ length: P }, (_, j) => j).reduce((b, j) => (Math.abs(raw[j] - aim) < Math.abs(raw[b] - aim) ? j : b), 0)];
    const rings = [0, 1].map(() => svg("circle", { r: 6, fill: "none", stroke: "var(--two)", "stroke-width": 2, "pointer-events": "none" }));
    chart.append(...band, zero, ...line, ...rows.map((r) => r.grip), ...rows.flatMap((r) => r.dots[1]), ...rings, ...heads, ...marks, ...axes);
    const lines = ["mean", "var", "hat", "out"].map(() => el("li"));
    const formula = el("ul", { class: "formula", "aria-live": "off" }, ...lines);
    const said = el("p", { class: "say", "aria-live": "polite" });
    let X = { px: 1 }, timers = [];
    const light = (from) => {
      timers.forEach(clearTimeout);
      timers = lines.map((li, k) => k < from ? null : setTimeout(() => {
        li.classList.add("lit"); setTimeout(() => li.classList.remove("lit"), 350);
      }, (k - from) * 130));
    };
    let W = 0;
    function size() {
      const width = chart.clientWidth || 640;
      if (width === W) return;
      W = width;
      set(chart, { viewBox: `0 0 ${W} ${H}`, height: H });
      const left = ROW + 4, gap = 16, panel = (W - left - gap) / 2;
      X = { px: panel / (xs[1] - xs[0]), at: (v) => left + (v - xs[0]) * panel / (xs[1] - xs[0]),
        out: (v) => left + panel + gap + (v - ys[0]) * panel / (ys[1] - ys[0]), left, panel, gap };
      const narrow = W < 480;
      heads[0].textContent = narrow ? "in: x" : "What the layer gets: x";
      heads[1].textContent = narrow ? "out: y" : "What it hands on: y";
      set(heads[0], { x: left }); set(heads[1], { x: left + panel + gap });
      rows.forEach((r) => set(r.bar, { x: 0, width: left + panel }));
      set(zero, { x1: X.out(0), x2: X.out(0) });
      axes.forEach((axis, side) => {
        const place = side ? X.out : X.at, ends = side ? ys : xs;
        const step = side ? 2 : wide > 2 ? 1 : wide > 0.8 ? 0.5 : wide > 0.3 ? 0.2 : 0.05;
        const ticks = [];
        for (let k = Math.ceil(ends[0] / step); k * step <= ends[1]; k++) ticks.push(k * step);
        axis.replaceChildren(...ticks.map((v) => svg("text", { x: place(v), y: H - 18, "text-anchor": "middle", class: "dim" },
          fixed(v, step < 0.1 ? 2 : step < 1 ? 1 : 0))));
      });
    }
    function moved(what) {
      size();
      let sum = 0;
      for (let i = 0; i < N; i++) for (let j = 0; j < P; j++) sum += raw[i * P + j] + shift[i];
      const own = sum / M;
      let square = 0;
      for (let i = 0; i < N; i++) for (let j = 0; j < P; j++) square += (raw[i * P + j] + shift[i] - own) ** 2;
      const mean = stored ? d0.mean : own, variance = stored ? d0.var : square / M, sigma = Math.sqrt(variance + EPS);
      for (let i = 0; i < N; i++) {
        rows[i].dots[0].forEach((dot, j) => dot.setAttribute("cx", X.at(raw[i * P + j] + shift[i])));
        rows[i].dots[1].forEach((dot, j) => {
          const y = gamma * (raw[i * P + j] + shift[i] - mean) / sigma + beta;
          dot.setAttribute("cx", X.out(Math.max(ys[0], Math.min(ys[1], y))));
        });
        set(rows[i].grip, { "aria-valuenow": Math.round(100 * shift[i] / wide),
          "aria-label": `All values of picture ${i + 1}, ${rows[i].name}, moved by`, "aria-valuetext": `${signed(shift[i])}; mean of the batch ${fixed(mean, 3)}` });
      }
      set(band[0], { x: X.at(mean - sigma), width: X.at(mean + sigma) - X.at(mean - sigma) });
      set(line[0], { x1: X.at(mean), x2: X.at(mean) });
      const a = Math.abs(gamma);
      set(band[1], { x: X.out(beta - a), width: X.out(beta + a) - X.out(beta - a) });
      set(line[1], { x1: X.out(beta), x2: X.out(beta) });
      marks[0].textContent = "μ"; marks[1].textContent = "β";
      set(marks[0], { x: X.at(mean) }); set(marks[1], { x: X.out(beta) });
      const v = raw[FOLLOW[0] * P + FOLLOW[1]] + shift[FOLLOW[0]], hat = (v - mean) / sigma, y = gamma * hat + beta;
      const cy = rows[FOLLOW[0]].dots[0][FOLLOW[1]].getAttribute("cy");
      set(rings[0], { cx: X.at(v), cy }); set(rings[1], { cx: X.out(Math.max(ys[0], Math.min(ys[1], y))), cy });
      lines[0].innerHTML = stored ? `μ = stored = <b>${fixed(mean, 3)}</b>` : `μ = (1/M) Σ x = <b>${fixed(mean, 3)}</b> &emsp;(M = ${N} · ${P} = ${M})`;
      lines[1].innerHTML = stored ? `σ² = stored = <b>${fixed(variance, 4)}</b>` : `σ² = (1/M) Σ (x − μ)² = <b>${fixed(variance, 4)}</b>`;
      lines[2].innerHTML = `x̂ = (x − μ)/√(σ² + ε) = (${fixed(v)} − ${fixed(mean)})/${fixed(sigma, 3)} = <b>${fixed(hat)}</b>`;
      lines[3].innerHTML = `y = γ · x̂ + β = ${fixed(gamma)} · ${fixed(hat)} ${beta < 0 ? "−" : "+"} ${fixed(Math.abs(beta))} = <b>${fixed(y)}</b>`;
      if (what === "all") {
        if (!stored) light(0); else light(2);
        const most = shift.reduce((best, s, i) => (Math.abs(s) > Math.abs(shift[best]) ? i : best), 0);
        said.textContent = stored
          ? "Evaluation: μ and σ² are stored numbers. Only the picture that you move changes; the others stay where they are."
          : shift[most] === 0 ? "" : `You moved picture ${most + 1}, the ${rows[most].name}. μ ${shift[most] > 0 ? "rises" : "falls"} with it, so most outputs of the seven others move ${shift[most] > 0 ? "left" : "right"}, although their own values have not changed. The ringed value is the ${rows[0].name}'s.`;
      } else if (what === "out") light(3);
    }
    const d0 = { mean: raw.reduce((s, v) => s + v, 0) / M };
    d0.var = raw.reduce((s, v) => s + (v - d0.mean) ** 2, 0) / M;
    const g = el("output", {}, "1.00"), b = el("output", {}, "0.00");
    const [gammaLabel, gammaInput] = range("γ", { min: 0, max: 2, step: 0.02, value: 1 }, (v) => { gamma = v; g.textContent = fixed(v); moved("out"); });
    const [betaLabel, betaInput] = range("β", { min: -2, max: 2, step: 0.02, value: 0 }, (v) => { beta = v; b.textContent = fixed(v); moved("out"); });
    gammaLabel.append(g); betaLabel.append(b);
    const keep = el("input", { type: "checkbox", onchange: () => { stored = keep.checked; moved("all"); } });
    const back = el("button", { type: "button", onclick: () => {
      shift.fill(0); gamma = 1; beta = 0; gammaInput.value = 1; betaInput.value = 0; g.textContent = "1.00"; b.textContent = "0.00";
      stored = keep.checked = false; moved("all");
    } }, "Start again");
    return { nodes: [chart, formula, el("div", { class: "row" }, gammaLabel, betaLabel, el("label", {}, keep, "μ and σ² stored (evaluation)"), back), said],
      draw: () => moved("size") };
  });

  // ---- 2. Training and evaluation are two functions -------------------------------------------------
  widget("bn-two", () => {
    const pictures = unpack(data.networks.pictures), labels = data.networks.labels, T = labels.length, K = 10;
    const weights = {};
    for (const which of ["early", "end"]) {
      weights[which] = {};
      for (const name in data.networks[which]) weights[which][name] = unpack(data.networks[which][name]);
    }
    const source = `${network}\n(${answering})()`;
    let worker = null, id = 0, which = "end", content = "mixed", size = 32, running = 0;
    const sizes = [1, 2, 4, 8, 16, 32, 64, 200], known = {};
    const order = Array.from({ length: T }, (_, i) => (i % K) * (T / K) + Math.floor(i / K)); // one of each class in turn
    const cut = () => {
      const list = [];
      if (content === "same") for (let i = 0; i < T; i++) list.push([order[i]]);
      else if (content === "class") {
        const n = Math.min(size, T / K);
        for (let k = 0; k < K; k++) for (let i = 0; i < T / K; i += n) list.push(Array.from({ length: Math.min(n, T / K - i) }, (_, j) => k * T / K + i + j));
      } else for (let i = 0; i < T; i += size) list.push(order.slice(i, i + size));
      return list;
    };
    const KINDS = [["batch", "batch"], ["running", "running"], ["population", "population"]];
    const bars = {}, texts = {};
    const list = el("dl", {}, ...KINDS.map(([kind, name]) => {
      bars[kind] = el("i", { style: "width:0" }); texts[kind] = el("dd", {}, "–");
      return el("div", { class: "score" }, el("dt", {}, name), el("dd", { class: "barcell" }, el("div", { class: `bar ${kind === "batch" ? "b" : ""}`, "aria-hidden": "true" }, bars[kind])), texts[kind]);
    }));
    const CELL = 32, COLS = 20;
    const canvas = el("canvas", { width: COLS * CELL, height: (T / COLS) * CELL, style: "width:100%", role: "img", "aria-label": "The 200 pictures in their batches; those named wrongly are faded" });
    const context = canvas.getContext("2d"), sprites = document.createElement("canvas");
    sprites.width = 32; sprites.height = 32 * T;
    const image = sprites.getContext("2d").createImageData(32, 32 * T);
    for (let i = 0; i < T * 1024; i++) {
      for (let c = 0; c < 3; c++) image.data[i * 4 + c] = pictures[i * 3 + c];
      image.data[i * 4 + 3] = 255;
    }
    sprites.getContext("2d").putImageData(image, 0, 0);
    const said = el("p", { class: "say", "aria-live": "polite" });
    const key = (statistics) => (statistics === "batch" ? `${which} batch ${content} ${size}` : `${which} ${statistics}`);
    function ask(statistics) {
      const k = key(statistics);
      if (known[k]) return;
      const batches = statistics === "batch" ? cut() : Array.from({ length: T / 20 }, (_, b) => Array.from({ length: 20 }, (_, i) => b * 20 + i));
      known[k] = { id: ++id, right: new Int8Array(T).fill(-1), done: false, logits: new Float64Array(T * K) };
      worker.postMessage({ id, which, statistics, batches });
    }
    function answered({ data: m }) {
      // By number, not by key: answers to a job that was dropped must not fill, or end, its successor's.
      const found = Object.values(known).find((f) => f.id === m.id);
      if (!found) return;
      if (m.done) found.done = true;
      else m.batch.forEach((picture, i) => {
        let best = 0;
        for (let c = 0; c < K; c++) {
          found.logits[picture * K + c] = m.logits[i * K + c];
          if (m.logits[i * K + c] > m.logits[i * K + best]) best = c;
        }
        found.right[picture] = best === labels[picture] ? 1 : 0;
      });
      requestAnimationFrame(draw);
    }
    const score = (found) => {
      let seen = 0, right = 0;
      for (const r of found.right) if (r >= 0) { seen++; right += r; }
      return { seen, right };
    };
    function draw() {
      for (const [kind] of KINDS) {
        const found = known[key(kind)];
        const { seen, right } = found ? score(found) : { seen: 0, right: 0 };
        bars[kind].style.width = `${seen ? 100 * right / T : 0}%`;
        texts[kind].textContent = !seen ? "…" : seen < T ? `${right} of ${seen} so far` : `${right} of ${T}: ${fixed(100 * right / T, 1)} %`;
      }
      const found = known[key("batch")], batches = cut(), sequence = batches.flat();
      context.clearRect(0, 0, canvas.width, canvas.height);
      sequence.forEach((picture, at) => {
        const x = (at % COLS) * CELL, y = Math.floor(at / COLS) * CELL, right = found ? found.right[picture] : -1;
        context.globalAlpha = right === 0 ? 0.22 : 1;
        context.drawImage(sprites, 0, picture * 32, 32, 32, x + 1, y + 1, CELL - 2, CELL - 2);
      });
      context.globalAlpha = 1;
      context.strokeStyle = getComputedStyle(canvas).getPropertyValue("--two") || "#b3500b";
      context.lineWidth = 2;
      let at = 0;
      if (batches[0].length > 1) for (const b of batches) {
        const x = (at % COLS) * CELL, y = Math.floor(at / COLS) * CELL;
        context.beginPath(); context.moveTo(x + 1, y + 1); context.lineTo(x + 1, y + CELL - 1); context.stroke();
        at += b.length;
      }
      if (found && score(found).seen === T) tell(); else said.textContent = "Computing…";
    }
    function tell() {
      const b = score(known[key("batch")]).right, r = known[key("running")], rr = r ? score(r) : null;
      const lone = content === "same" || size === 1;
      let text;
      if (lone) text = `Each picture is alone with itself. The last two normalisations then see one value a channel: x − μ is 0, so they hand on β, whatever the picture. Every picture gets the same answer, and ${b} of ${T} happen to have that class.${content === "same" && size > 1 ? ` ${size} copies of one picture are no better than one: it is variety that a batch needs, not number.` : ""}${size === 1 ? " PyTorch and normlab refuse such a batch in training." : ""}`;
      else if (content === "class") text = `Batches of one class${size > T / K ? ` (there are only ${T / K} pictures of each)` : ""}: what all pictures of a class have in common is their mean, and the mean is subtracted. The network loses what it should see: ${b} of ${T}.`;
      else if (size < 16) text = `With ${size} pictures the mean and variance are a rough guess, another one for each batch: noise in every output.`;
      else text = `Mixed batches of ${size}: the batch's statistics are close to those of the training set, and so is the score.`;
      if (rr && rr.seen === T && which === "early" && !lone) text += b > rr.right
        ? ` After 100 steps eval() is the worse: the running statistics still weigh where they began (0.99¹⁰⁰ = 37 %), at mean 0 and variance 1.` : "";
      said.textContent = text;
    }
    function change() {
      if (!worker) return;
      draw();
      // Batches first; the two scores that do not depend on them are computed once.
      const k = key("batch");
      if (known[k] && !known[k].done) delete known[k];
      for (const old in known) if (old.includes(" batch ") && !known[old].done && old !== k) delete known[old];
      ask("batch"); ask("running"); ask("population");
    }
    const shown = el("output", {}, "32");
    const [sizeLabel, sizeInput] = range("Pictures in a batch", { min: 0, max: sizes.length - 1, step: 1, value: 5, "aria-valuetext": "32" }, (v) => {
      size = sizes[v]; shown.textContent = size; sizeInput.setAttribute("aria-valuetext", size); change();
    });
    sizeLabel.append(shown);
    const begin = () => {
      if (worker) return;
      worker = new Worker(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
      worker.onmessage = answered;
      worker.postMessage({ pictures, weights });
      change();
    };
    new IntersectionObserver((seen, me) => { if (seen.some((s) => s.isIntersecting)) { me.disconnect(); begin(); } }, { rootMargin: "600px" }).observe($("bn-two"));
    window.normlabTwo = { known, begin }; // for the test that compares with PyTorch
    return { nodes: [
      el("div", { class: "row" }, choice("Network", "bn-which", [["end", "at the end of its training"], ["early", "after 100 steps"]], (v) => { which = v; change(); })),
      el("div", { class: "row" }, sizeLabel),
      el("div", { class: "row" }, choice("A batch holds", "bn-content", [["mixed", "all classes"], ["class", "one class"], ["same", "one picture"]], (v) => { content = v; change(); })),
      list, canvas, said] };
  });

  // ---- charts of lines over something, with a cursor ------------------------------------------------
  function lines({ label, x, series, log = false, logX = false, height = 150, bands = [] }) {
    const node = svg("svg", { role: "img", "aria-label": label });
    const paths = series.map((s) => svg("path", { fill: "none", stroke: s.colour, "stroke-width": 2, "stroke-dasharray": s.dash || "none" }));
    const areas = bands.map((b) => svg("path", { fill: b.colour, opacity: 0.18 }));
    const cursor = svg("line", { y1: 22, stroke: "var(--ink)", "stroke-width": 1.5 });
    const dots = series.map((s) => svg("circle", { r: 4.5, fill: s.colour }));
    const title = svg("text", { x: 0, y: 12, "font-weight": 600 }, label), grid = svg("g");
    node.append(title, grid, ...areas, ...paths, cursor, ...dots);
    let place = null, at = 0;
    const everything = [...series.map((s) => s.y), ...bands.flatMap((b) => [b.low, b.high])].flat().filter((v) => Number.isFinite(v) && (!log || v > 0));
    const floor = log ? Math.min(...everything) : Math.min(0, ...everything), roof = Math.max(...everything);
    const t = (v) => (log ? Math.log10(Math.max(v, floor)) : v), lowest = t(floor), highest = t(roof) === lowest ? lowest + 1 : t(roof);
    const u = (v) => (logX ? Math.log10(v) : v);
    const draw = () => {
      const W = node.clientWidth || 300, H = height, left = 44, bottom = H - 18, top = 22;
      set(node, { viewBox: `0 0 ${W} ${H}`, height: H });
      const px = (v) => left + (u(v) - u(x[0])) * (W - left - 8) / (u(x[x.length - 1]) - u(x[0]) || 1);
      const py = (v) => bottom - (t(v) - lowest) * (bottom - top) / (highest - lowest);
      place = { px, py };
      const path = (y) => { let pen = "M"; return y.map((v, i) => { if (!Number.isFinite(v)) { pen = "M"; return ""; } const p = `${pen}${px(x[i]).toFixed(1)} ${py(v).toFixed(1)}`; pen = "L"; return p; }).join(""); };
      series.forEach((s, k) => paths[k].setAttribute("d", path(s.y)));
      bands.forEach((b, k) => areas[k].setAttribute("d", path(b.high) + [...b.low.keys()].reverse().map((i) => `L${px(x[i]).toFixed(1)} ${py(b.low[i]).toFixed(1)}`).join("") + "Z"));
      const ticks = [];
      if (log) for (let e = Math.ceil(lowest - 1e-9); e <= highest; e++) ticks.push(10 ** e);
      else for (const v of [floor, (floor + roof) / 2, roof]) ticks.push(v);
      grid.replaceChildren(...ticks.flatMap((v) => [svg("line", { x1: left, x2: W - 8, y1: py(v), y2: py(v), stroke: "var(--soft)" }),
        svg("text", { x: left - 5, y: py(v) + 4, "text-anchor": "end", class: "dim" }, Math.abs(v) >= 1000 || (v && Math.abs(v) < 0.01) ? v.toExponential(0).replace("e-", "e−").replace("e+", "e") : `${+v.toPrecision(2)}`)]),
        svg("text", { x: left, y: H - 3, class: "dim" }, `${+x[0].toPrecision(3)}`),
        svg("text", { x: W - 8, y: H - 3, class: "dim", "text-anchor": "end" }, `${+x[x.length - 1].toPrecision(3)}`));
      to(at);
    };
    const to = (i) => {
      at = i;
      if (!place) return;
      set(cursor, { x1: place.px(x[i]), x2: place.px(x[i]), y2: height - 18 });
      series.forEach((s, k) => { const v = s.y[i]; if (Number.isFinite(v)) set(dots[k], { cx: place.px(x[i]), cy: place.py(v), opacity: 1 }); else set(dots[k], { opacity: 0 }); });
    };
    return { node, draw, to };
  }
  const ARMS = [["batch", "with batch normalisation", "var(--one)"], ["none", "without", "var(--two)"]];
  const legend = () => el("p", { class: "row" }, ...ARMS.map(([arm, name], i) => el("span", {}, el("span", { class: `key ${i ? "b" : ""}`, "aria-hidden": "true" }), name + (i ? " (dashed)" : ""))));

  // ---- 3. What it does during a training -------------------------------------------------------------
  widget("bn-training", () => {
    const R = data.recordings, steps = R.batch.step, LAYERS = Object.keys(R.batch.layers), T = Math.min(steps.length, R.none.step.length);
    const raw = {};
    for (const [arm] of ARMS) { raw[arm] = {}; for (const layer of LAYERS) { raw[arm][layer] = {}; for (const m in R[arm].layers[layer]) raw[arm][layer][m] = unpack(R[arm].layers[layer][m]); } }
    const NAMES = { conv1: "conv1 (first)", conv2: "conv2", conv3: "conv3", hidden: "hidden (dense)", output: "output (last)" };
    let layer = "hidden", at = T - 1, charts = [];
    const hist = svg("svg", { role: "img", "aria-label": "What the layer is given: how often each value occurs, with batch normalisation above, without below" });
    const areas = ARMS.map(([, , colour], i) => svg("path", { fill: colour, opacity: 0.5, stroke: colour }));
    const meds = ARMS.map(() => svg("line", { stroke: "var(--ink)", "stroke-width": 1.5 })), spans = ARMS.map(() => svg("line", { stroke: "var(--ink)", "stroke-width": 4, opacity: 0.5 }));
    const heads = ARMS.map(([, name]) => svg("text", { "font-weight": 600 }, name)), axis = svg("g");
    hist.append(...areas, ...spans, ...meds, ...heads, axis);
    const place = el("div", { class: "cols" }), said = el("p", { class: "say" });
    function bounds(arm) { // of the 15th and 85th percentiles over all steps, widened: an axis that stays
      const p = raw[arm][layer].percentiles;
      let low = Infinity, high = -Infinity;
      for (let i = 0; i < T; i++) { low = Math.min(low, p[i * 3]); high = Math.max(high, p[i * 3 + 2]); }
      const w = (high - low) || 1;
      return [low - 0.5 * w, high + 0.9 * w];
    }
    let limits = {};
    function histogram() {
      const W = hist.clientWidth || 300, H = 240, all = [];
      set(hist, { viewBox: `0 0 ${W} ${H}`, height: H });
      ARMS.forEach(([arm], k) => {
        const { histogram: h, range: r, percentiles: p } = raw[arm][layer], base = k ? 214 : 94, B = 64, lo = r[at * 2], hi = r[at * 2 + 1];
        const [left, right] = limits[arm], px = (v) => (v - left) / (right - left) * W, inside = (v) => Math.max(-2, Math.min(W + 2, px(v)));
        let d = "";
        for (let b = 0; b < B; b++) {
          const x0 = inside(lo + (hi - lo) * b / B), x1 = inside(lo + (hi - lo) * (b + 1) / B), y = base - 66 * Math.sqrt(h[at * B + b] / 255);
          d += `${b ? "L" : `M${x0.toFixed(1)} ${base}L`}${x0.toFixed(1)} ${y.toFixed(1)}L${x1.toFixed(1)} ${y.toFixed(1)}`;
        }
        areas[k].setAttribute("d", `${d}L${inside(hi).toFixed(1)} ${base}Z`);
        set(spans[k], { x1: px(p[at * 3]), x2: px(p[at * 3 + 2]), y1: base + 3, y2: base + 3 });
        set(meds[k], { x1: px(p[at * 3 + 1]), x2: px(p[at * 3 + 1]), y1: base - 6, y2: base + 6 });
        set(heads[k], { x: 0, y: base - 78 });
        const rough = (right - left) / 5, ten = 10 ** Math.floor(Math.log10(rough)), step = [1, 2, 5, 10].map((f) => f * ten).find((v) => v >= rough);
        for (let v = Math.ceil(left / step); v * step <= right; v++) all.push(svg("text", { x: px(v * step), y: base + 20, "text-anchor": "middle", class: "dim" }, `${+(v * step).toPrecision(3)}`.replace("-", "−")));
      });
      axis.replaceChildren(...all);
    }
    function build() {
      for (const [arm] of ARMS) limits[arm] = bounds(arm);
      const of = (m, title, log) => lines({ label: title, x: steps.slice(0, T), log, logX: true, height: 118,
        series: ARMS.map(([arm, , colour], k) => ({ colour, dash: k ? "6 3" : null, y: raw[arm][layer][m] ? Array.from(raw[arm][layer][m]).slice(0, T) : Array(T).fill(NaN) })) });
      charts = [of("drift", "Drift of its input, in σ a step", true), of("grad", "Norm of the gradient", true), of("dead", "Share of dead channels", false)];
      place.replaceChildren(...charts.map((c) => c.node));
      charts.forEach((c) => { c.draw(); c.to(at); });
    }
    const tell = () => {
      const read = (arm, m) => { const a = raw[arm][layer][m]; return a ? a[at] : NaN; };
      const of = (v, n) => (Number.isFinite(v) ? (v && Math.abs(v) < 0.001 ? v.toExponential(1).replace("e-", "e−") : `${+v.toPrecision(n)}`) : "–");
      said.textContent = `Step ${steps[at].toLocaleString("en")}, ${NAMES[layer]}: the last step moved its input by ${of(read("batch", "drift"), 2)} σ with and ${of(read("none", "drift"), 2)} σ without; gradient ${of(read("batch", "grad"), 2)} and ${of(read("none", "grad"), 2)}; dead ${fixed(100 * read("batch", "dead"), 0)} % and ${fixed(100 * read("none", "dead"), 0)} %.`;
    };
    const go = (i) => { at = i; histogram(); charts.forEach((c) => c.to(i)); input.setAttribute("aria-valuetext", `step ${steps[i]}`); tell(); };
    const [label, input] = range("Step", { min: 0, max: T - 1, step: 1, value: T - 1, class: "wide", "aria-label": "Step of the training" }, go);
    label.style.flex = "1 1 100%";
    const select = el("select", { onchange: () => { layer = select.value; build(); go(at); } }, ...LAYERS.map((l) => el("option", { value: l, ...(l === layer ? { selected: "" } : {}) }, NAMES[l])));
    return { nodes: [el("div", { class: "row" }, el("label", {}, "Layer", select), legend()), el("div", { class: "row" }, label),
      el("div", { class: "cols" }, el("div", {}, hist)), place, said], draw: () => { if (!charts.length) build(); charts.forEach((c) => c.draw()); go(at); } };
  });

  // ---- 4b. A smoother loss -------------------------------------------------------------------------
  widget("bn-smooth", () => {
    const L = data.landscape, mean = (rows) => rows[0].map((_, i) => rows.reduce((s, r) => s + r[i], 0) / rows.length);
    const edge = (rows, f) => rows[0].map((_, i) => f(...rows.map((r) => r[i])));
    const chart = lines({ label: "Range of the loss along one step of the gradient", x: L.steps, log: true, height: 190,
      series: ARMS.map(([arm, , colour], k) => ({ colour, dash: k ? "6 3" : null, y: mean(L.arms[arm].range) })),
      bands: ARMS.map(([arm, , colour]) => ({ colour, low: edge(L.arms[arm].range, Math.min), high: edge(L.arms[arm].range, Math.max) })) });
    const said = el("p", { class: "say" });
    const at = (i) => {
      chart.to(i);
      const [a, b] = ARMS.map(([arm]) => mean(L.arms[arm].range)[i]);
      said.textContent = `Step ${L.steps[i]}: within the length of one step the loss varies by ${+a.toPrecision(2)} with batch normalisation and by ${+b.toPrecision(2)} without. ${L.steps[i] < 20 ? "Only in the first 20 steps does it vary more with it." : ""}`;
    };
    const [label, input] = range("Step", { min: 0, max: L.steps.length - 1, step: 1, value: 30, class: "wide", "aria-label": "Step of the training" }, at);
    label.style.flex = "1 1 100%";
    return { nodes: [legend(), chart.node, el("div", { class: "row" }, label), said], draw: () => { chart.draw(); at(+input.value); } };
  });

  // ---- 4c. Scale does not matter, and so the rate does -------------------------------------------------
  widget("bn-scale", () => {
    const S = data.stretched, x = S.batch.factor;
    const of = (key, title, log) => lines({ label: title, x, log, logX: true, height: 150, series: ARMS.map(([arm, , colour], k) => ({ colour, dash: k ? "6 3" : null, y: S[arm][key] })) });
    const charts = [of("loss", "Loss", false), of("gradient", "Norm of the gradient of these weights", true)];
    const said = el("p", { class: "say" });
    const at = (i) => {
      charts.forEach((c) => c.to(i));
      const k = x[i], m = x.indexOf(1);
      input.setAttribute("aria-valuetext", `times ${+k.toPrecision(3)}`);
      said.textContent = `Weights times ${+k.toPrecision(3)}: the loss is ${fixed(S.batch.loss[i])} with batch normalisation (${fixed(S.batch.loss[m])} at 1) and ${fixed(S.none.loss[i])} without (${fixed(S.none.loss[m])}); with it the gradient is ${+(S.batch.gradient[i] / S.batch.gradient[m]).toPrecision(3)} times as long.`;
    };
    const [label, input] = range("Factor", { min: 0, max: x.length - 1, step: 1, value: x.indexOf(1), class: "wide", "aria-label": "Factor of the weights of conv2" }, at);
    label.style.flex = "1 1 100%";
    const cols = el("div", { class: "cols" }, ...charts.map((c) => c.node));
    return { nodes: [legend(), cols, el("div", { class: "row" }, label), said], draw: () => { charts.forEach((c) => c.draw()); at(+input.value); } };
  });

  // ---- 5. Folding -----------------------------------------------------------------------------------
  widget("bn-fold", () => {
    const F = data.fold, S = 30, C = F.a.shape[0], input = unpack(F.input), a = unpack(F.a), b = unpack(F.b), weight = unpack(F.weight), bias = unpack(F.bias);
    const { convolve } = network();
    let picture = 0, channel = 0, share = 0, map = false, cache = {};
    // Both ways for one picture and output channel. The constant part b has nine values on a 3 × 3 kernel.
    function parts() {
      const key = `${picture} ${channel}`;
      if (cache[key]) return cache[key];
      const x = new Float64Array(C * S * S), ones = new Float64Array(C * S * S), w = weight.subarray(channel * C * 9, (channel + 1) * C * 9);
      for (let c = 0; c < C; c++) for (let i = 0; i < S * S; i++) { x[c * S * S + i] = a[c] * input[(picture * C + c) * S * S + i]; ones[c * S * S + i] = b[c]; }
      const scaled = convolve(x, C, S, w, [bias[channel]], 1, 1), constant = convolve(ones, C, S, w, [0], 1, 1);
      return (cache[key] = { scaled, constant, inner: constant[S + 1] });
    }
    const names = ["Normalise, then convolve", "Folded into the convolution", "Difference"];
    const heads = names.map((n) => el("div", { class: "say", style: "min-height:0;font-weight:600" }, n));
    const views = names.map((n) => el("canvas", { width: S, height: S, role: "img", "aria-label": n, style: "width:100%;aspect-ratio:1;border:1px solid var(--faint)" }));
    const said = el("p", { class: "say", "aria-live": "polite" });
    const pipe = svg("svg", { height: 74,  role: "img", "aria-label": "b moves from the normalisation before the convolution to the bias behind it" });
    const box = (text) => [svg("rect", { y: 22, height: 30, rx: 5, fill: "var(--soft)", stroke: "var(--line)" }), svg("text", { y: 41, "text-anchor": "middle" }, text)];
    const boxes = ["x · a", "3 × 3 convolution", "+ bias"].map(box), arrows = [0, 1].map(() => svg("text", { y: 42, "text-anchor": "middle" }, "→"));
    const token = svg("g", { class: "drag" }, svg("circle", { r: 14, fill: "var(--two)" }), svg("text", { y: 5, "text-anchor": "middle", style: "fill:var(--color-background-primary);font-weight:700" }, "+ b"));
    pipe.append(...boxes.flat(), ...arrows, token);
    let track = [0, 1], dragging = false;
    token.addEventListener("pointerdown", (e) => { dragging = true; token.setPointerCapture(e.pointerId); });
    token.addEventListener("pointermove", (e) => { if (dragging) { const r = pipe.getBoundingClientRect(); move((e.clientX - r.left - track[0]) / (track[1] - track[0])); } });
    for (const end of ["pointerup", "pointercancel"]) token.addEventListener(end, () => { dragging = false; });
    const move = (v) => { share = Math.max(0, Math.min(1, v)); slide.value = share; draw(); };
    function lay() {
      const W = pipe.clientWidth || 500;
      set(pipe, { viewBox: `0 0 ${W} 74` });
      const widths = [0.24, 0.32, 0.24].map((f) => f * W), gap = (W - widths.reduce((s, w) => s + w, 0)) / 2;
      let x = 0;
      boxes.forEach(([r, t], k) => { set(r, { x, width: widths[k] }); set(t, { x: x + widths[k] * (k ? 0.5 : 0.35) }); if (k < 2) set(arrows[k], { x: x + widths[k] + gap / 2 }); x += widths[k] + gap; });
      boxes[1][1].textContent = W < 420 ? "conv" : "3 × 3 convolution";
      track = [widths[0] * 0.86, W - widths[2] * 0.5];
    }
    const paint = (canvas, values, low, high, both) => {
      const context = canvas.getContext("2d"), image = context.createImageData(S, S);
      for (let i = 0; i < S * S; i++) {
        const v = both ? values[i] / high : (values[i] - low) / (high - low || 1), t = Math.max(both ? -1 : 0, Math.min(1, v));
        const c = both ? (t >= 0 ? [255 - t * 90, 255 - t * 175, 255 - t * 235] : [255 + t * 225, 255 + t * 160, 255 + t * 85]) : [40 + 205 * t, 50 + 195 * t, 80 + 165 * t];
        image.data.set([c[0], c[1], c[2], 255], i * 4);
      }
      context.putImageData(image, 0, 0);
    };
    function draw() {
      lay();
      const { scaled, constant, inner } = parts(), right = new Float64Array(S * S), folded = new Float64Array(S * S), off = new Float64Array(S * S);
      let low = Infinity, high = -Infinity, edge = 0, core = 0, all = 0;
      for (let i = 0; i < S * S; i++) {
        right[i] = scaled[i] + constant[i];
        folded[i] = scaled[i] + (1 - share) * constant[i] + share * (map ? constant[i] : inner);
        off[i] = folded[i] - right[i];
        low = Math.min(low, right[i]); high = Math.max(high, right[i]);
        const y = Math.floor(i / S), q = i % S, border = y === 0 || q === 0 || y === S - 1 || q === S - 1;
        if (border) edge = Math.max(edge, Math.abs(off[i])); else core = Math.max(core, Math.abs(off[i]));
        all = Math.max(all, Math.abs(constant[i] - inner));
      }
      paint(views[0], right, low, high); paint(views[1], folded, low, high); paint(views[2], off, 0, all || 1, true);
      token.setAttribute("transform", `translate(${track[0] + share * (track[1] - track[0])} 37)`);
      slide.setAttribute("aria-valuetext", `${Math.round(100 * share)} % of b behind the convolution`);
      const spread = high - low;
      said.textContent = share === 0 ? "Nothing is folded yet: drag + b to the right, through the convolution, into its bias."
        : map ? `With the bias map: largest difference ${edge < 1e-9 ? "0" : edge.toExponential(1)} everywhere. The border's own sums of b are kept, nine numbers for each output channel.`
          : `Inside: largest difference ${core < 1e-9 ? "0" : core.toExponential(1)}. At the border: ${fixed(edge)}, which is ${fixed(100 * edge / spread, 0)} % of all that this channel varies by. The padding is 0 after the normalisation; folded, it is treated as if it had been normalised, too.`;
    }
    const [label, slide] = range("Share of b behind the convolution", { min: 0, max: 1, step: 0.01, value: 0, class: "wide" }, move);
    label.style.flex = "1 1 100%"; label.style.flexWrap = "wrap";
    const check = el("input", { type: "checkbox", onchange: () => { map = check.checked; draw(); } });
    const pick = (text, names, act) => { const s = el("select", { onchange: () => { act(s.selectedIndex); draw(); } }, ...names.map((n) => el("option", {}, n))); return el("label", {}, text, s); };
    return { nodes: [pipe, el("div", { class: "row" }, label), el("div", { class: "row" }, el("label", {}, check, "with the bias map"),
      pick("Picture", F.names, (i) => { picture = i; }), pick("Channel of conv2", F.channels.map(String), (i) => { channel = i; })),
      el("div", { style: "display:grid;grid-template-columns:repeat(3,1fr);gap:.6rem;align-items:end" }, ...heads, ...views), said], draw };
  });

  // ---- pairs of seeds: the exact sign-flip test ------------------------------------------------------
  function signFlip(d) { // two-sided p of the mean, over all 2ⁿ signs
    const n = d.length, seen = Math.abs(d.reduce((s, v) => s + v, 0)) - 1e-9;
    let count = 0;
    for (let bits = 0; bits < 1 << n; bits++) {
      let sum = 0;
      for (let i = 0; i < n; i++) sum += bits >> i & 1 ? d[i] : -d[i];
      if (Math.abs(sum) >= seen) count++;
    }
    return count / (1 << n);
  }
  function pairs(id, studies, begin) {
    widget(id, () => {
      let chosen = studies[0], n = begin;
      const chart = svg("svg", { role: "img", "aria-label": "Difference of each pair, in points of test accuracy" });
      const said = el("p", { class: "say", "aria-live": "polite" }), H = 96;
      function draw() {
        const d = chosen.differences, W = chart.clientWidth || 400, used = d.slice(0, n);
        const low = Math.min(0, ...d), high = Math.max(0, ...d), pad = (high - low) * 0.08 || 1, px = (v) => 14 + (v - low + pad) / (high - low + 2 * pad) * (W - 28);
        const mean = used.reduce((s, v) => s + v, 0) / n, p = signFlip(used);
        set(chart, { viewBox: `0 0 ${W} ${H}`, height: H });
        chart.replaceChildren(
          svg("line", { x1: px(0), x2: px(0), y1: 14, y2: 70, stroke: "var(--ink)", "stroke-width": 1.5 }), svg("text", { x: px(0), y: 86, "text-anchor": "middle", class: "dim" }, "0: no difference"),
          ...d.map((v, i) => svg("circle", { cx: px(v), cy: 38 + ((i * 5) % 4 - 1.5) * 6, r: 6, fill: i < n ? "var(--one)" : "none", stroke: "var(--one)", opacity: i < n ? 0.85 : 0.4 })),
          svg("line", { x1: px(mean), x2: px(mean), y1: 16, y2: 60, stroke: "var(--two)", "stroke-width": 3 }), svg("text", { x: px(mean), y: 11, "text-anchor": "middle" }, signed(mean)));
        const least = 2 / 2 ** n;
        input.setAttribute("aria-valuetext", `${n} pairs`);
        said.textContent = `${n} pair${n > 1 ? "s" : ""}: mean difference ${signed(mean)} points, p = ${+p.toPrecision(2)}. ${n < 6 ? `With ${n} pairs p cannot be below ${+least.toPrecision(2)}, however large the difference: nothing can be decided.` : p < 0.05 ? "Fewer than one in twenty ways of flipping the signs give a mean as far from 0." : "Chance gives such a mean often: these pairs do not tell the arms apart."}`;
      }
      const [label, input] = range("Pairs", { min: 1, max: chosen.differences.length, step: 1, value: n }, (v) => { n = v; draw(); });
      const select = el("select", { "aria-label": "Study", onchange: () => {
        chosen = studies[select.selectedIndex]; n = Math.min(n, chosen.differences.length); input.max = chosen.differences.length; input.value = n; draw();
      } }, ...studies.map((s) => el("option", {}, s.name)));
      return { nodes: [el("div", { class: "row" }, ...(studies.length > 1 ? [el("label", {}, "Study", select)] : [el("strong", {}, chosen.name)]), label), chart, said], draw };
    });
  }
  const isShaken = (s) => s.study === "shaken";
  if (data.studies.some(isShaken)) pairs("bn-shift", data.studies.filter(isShaken), 6);
  pairs("bn-pairs", data.studies.filter((s) => !isShaken(s)), 3);
})();
