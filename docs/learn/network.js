// The small network's forward pass, in double precision, in a worker. Formula for formula as in PyTorch;
// tests/site/test_learn.py compares them. Everything inside `network` is sent to the worker as text.
function network() {
  "use strict";
  const EPS = 1e-3;

  // Mean and biased variance of each channel over the batch: x holds n pictures of c channels of m values.
  function moments(x, n, c, m) {
    const mean = new Float64Array(c), variance = new Float64Array(c);
    for (let k = 0; k < c; k++) {
      let sum = 0;
      for (let i = 0; i < n; i++) for (let j = 0, at = (i * c + k) * m; j < m; j++) sum += x[at + j];
      const mu = mean[k] = sum / (n * m);
      let square = 0;
      for (let i = 0; i < n; i++) for (let j = 0, at = (i * c + k) * m; j < m; j++) square += (x[at + j] - mu) ** 2;
      variance[k] = square / (n * m);
    }
    return [mean, variance];
  }

  // γ·(x − μ)/√(σ² + ε) + β, in place.
  function normalize(x, n, c, m, mean, variance, gamma, beta) {
    for (let k = 0; k < c; k++) {
      const a = gamma[k] / Math.sqrt(variance[k] + EPS), mu = mean[k], b = beta[k];
      for (let i = 0; i < n; i++) for (let j = 0, at = (i * c + k) * m; j < m; j++) x[at + j] = (x[at + j] - mu) * a + b;
    }
  }

  // 3 × 3 convolution of one picture x (cin, s, s), padded by 0 or 1, plus a bias: (cout, t, t).
  function convolve(x, cin, s, weight, bias, cout, pad) {
    const p = s + 2 * pad, t = p - 2, padded = pad ? new Float64Array(cin * p * p) : x;
    if (pad) for (let c = 0; c < cin; c++) for (let y = 0; y < s; y++)
      padded.set(x.subarray((c * s + y) * s, (c * s + y + 1) * s), (c * p + y + 1) * p + 1);
    const out = new Float64Array(cout * t * t);
    for (let o = 0; o < cout; o++) {
      out.fill(bias[o], o * t * t, (o + 1) * t * t);
      for (let c = 0; c < cin; c++) {
        const w = (o * cin + c) * 9, w0 = weight[w], w1 = weight[w + 1], w2 = weight[w + 2], w3 = weight[w + 3],
          w4 = weight[w + 4], w5 = weight[w + 5], w6 = weight[w + 6], w7 = weight[w + 7], w8 = weight[w + 8];
        for (let y = 0; y < t; y++) {
          let a = (c * p + y) * p, b = a + p, d = b + p, to = (o * t + y) * t;
          for (let q = 0; q < t; q++, a++, b++, d++, to++)
            out[to] += w0 * padded[a] + w1 * padded[a + 1] + w2 * padded[a + 2] + w3 * padded[b] + w4 * padded[b + 1] +
              w5 * padded[b + 2] + w6 * padded[d] + w7 * padded[d + 1] + w8 * padded[d + 2];
        }
      }
    }
    return out;
  }

  // The larger of each 2 × 2, an odd last row or column left out, then ReLU.
  function pool(x, c, s) {
    const t = s >> 1, out = new Float64Array(c * t * t);
    for (let k = 0; k < c; k++) for (let y = 0; y < t; y++) for (let q = 0; q < t; q++) {
      const at = (k * s + 2 * y) * s + 2 * q;
      out[(k * t + y) * t + q] = Math.max(0, x[at], x[at + 1], x[at + s], x[at + s + 1]);
    }
    return out;
  }

  function dense(x, cin, weight, bias, cout) {
    const out = new Float64Array(cout);
    for (let o = 0; o < cout; o++) {
      let sum = bias[o];
      for (let i = 0, w = o * cin; i < cin; i++) sum += weight[w + i] * x[i];
      out[o] = sum;
    }
    return out;
  }

  const relu = (x) => x.map((v) => (v > 0 ? v : 0));
  const STAGES = [ // channels and values a channel of what the normaliser gets, and the layer behind it
    [3, 1024, (x, w) => relu(convolve(x, 3, 32, w["conv1.weight"], w["conv1.bias"], 16, 0))],
    [16, 900, (x, w) => pool(convolve(x, 16, 30, w["conv2.weight"], w["conv2.bias"], 16, 1), 16, 30)],
    [16, 225, (x, w) => pool(convolve(x, 16, 15, w["conv3.weight"], w["conv3.bias"], 32, 1), 32, 15)],
    [1568, 1, (x, w) => relu(dense(x, 1568, w["hidden.weight"], w["hidden.bias"], 64))],
    [64, 1, (x, w) => dense(x, 64, w["output.weight"], w["output.bias"], 10)],
  ];

  // Logits of a batch of pictures (uint8, 32 × 32 × 3): statistics are "batch", "running" or "population".
  function forward(pictures, chosen, w, statistics) {
    const n = chosen.length;
    let x = new Float64Array(n * 3072);
    chosen.forEach((picture, i) => {
      for (let at = 0; at < 1024; at++) for (let c = 0; c < 3; c++)
        x[(i * 3 + c) * 1024 + at] = pictures[picture * 3072 + at * 3 + c] / 255;
    });
    STAGES.forEach(([c, m, layer], k) => {
      const name = `norm${k}.`;
      const [mean, variance] = statistics === "batch" ? moments(x, n, c, m)
        : [w[`${name}${statistics}_mean`], w[`${name}${statistics}_var`]];
      normalize(x, n, c, m, mean, variance, w[name + "weight"], w[name + "bias"]);
      const parts = [];
      for (let i = 0; i < n; i++) parts.push(layer(x.subarray(i * c * m, (i + 1) * c * m), w));
      x = new Float64Array(n * parts[0].length);
      parts.forEach((part, i) => x.set(part, i * part.length));
    });
    return x;
  }

  return { forward, moments, convolve };
}

// What runs in the worker: answers batch by batch, and drops a job when a newer one has come.
function answering() {
  const { forward } = network();
  let pictures, weights, newest = 0;
  onmessage = async ({ data }) => {
    if (data.weights) { pictures = data.pictures; weights = data.weights; return; }
    const { id, which, statistics, batches } = data;
    if (statistics === "batch") newest = id;
    for (const batch of batches) {
      if (statistics === "batch" && id !== newest) return;
      postMessage({ id, batch, logits: forward(pictures, batch, weights[which], statistics) });
      await new Promise((go) => setTimeout(go));
    }
    postMessage({ id, done: true });
  };
}
