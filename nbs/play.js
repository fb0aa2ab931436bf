// Sliders for the quantization layer, in place of a still picture. Needs no server and no library.
// Where it does not run, the picture stays. The numbers are those of nsq_repro.quantization.
"use strict";

// The fourth test image of the set "digits": 28×28 bytes in base64.
const DIGIT = `
  AAAAAAAKM1yFp8fn//////HfzbSGWSsZEAcAAAAAAAAACjNchafH5//////x3820hlkrGRAHAAAAAAIFCBU/aZOqu83Z2NfW087Ju45iNSEVCQAA
  AAAFDBMjTnmkrqupp6SioKq3xcSZbkMsHAwAAAAACBMeMV2KtrGbhnRxbWqBocDOpHpQNyMPAAAAAAoWIzdhjLanhWNKSEZEZZK/1quBVzwmEAAA
  AAAHDxgmQ2F+dFxFNT5GT3GbxdmpekoxHw0AAAAABAkNFSU2RkAzJiE0R1p8pMzcqHM+JhgKAAAAAAECAwQHCw4NCggNKkhliK3S36ZsMhwSCAAA
  AAAAAAAAAAAABAkNGj5ihaC40NOaYScUDQUAAAAAAAAAAAAAAAkUHzJbhK28w8rCi1QeDQgDAAAAAAAAAAAAAAANHzFKeKfV2c/FsHxIFAUDAQAA
  AAAAAAAAAAAAECU6Voe56ujVw6l3RhQGBAIAAAAAAAAAAAAAAAsaKD9smcbQz83AkWI0HxQJAAAAAAAAAAAAAAAGDhYnUHmjucjX16t/UzgkDwAA
  AAAAAAAAAAAAAQMEDzRaf6HB4e/FnHJRNBYAAAAAAAAAAAAAAAAAAAckQF2DrNbrxqF8WjkZAAAAAAAAAAAAAAAAAAAFFyk7ZJPD37+fgF48GgAA
  AAAAAAAAAAAAAAAAAgoSGUR6sdO4nYNhPhsAAAAAAAAAAAIDBAUFBQYGBgYxbKbLs5qBYT0aAAAAAAAAAAIIDxUYGhscHBwcRXyy0rKRcVI0FgAA
  AAAAAAADDxomKy4xMzMzM1mLvtqxiWFEKxMAAAAAAAAABBUmNz5DR0pKSkptm8rhsYBQNiIPAAAAAAAAAAchO1VhaHB1dHNyhZ+5wpZpPScZCwAA
  AAAAAAAJLlJ2iJOfp6SioJ+fn5ZyTSkZEAcAAAAAAAAADDtpmK+/ztnV0c65n4VrTjEVCwcDAAAAAAAAAA5Ee7LN3/H++fXwzZ9ySjMcBgAAAAAA
  AAAAAAAORHuyzd/x/vn18M2fckozHAYAAAAAAA==
`;

const sigmoid = (v) => 1 / (1 + Math.exp(-v));

// Thresholds (2k+1)/(2K), one in the middle of each cell.
function thresholds(K) {
  return Array.from({ length: K }, (_, k) => (2 * k + 1) / (2 * K));
}

// The cell k of x in [0, 1]: k/K < x <= (k+1)/K, a border belongs to the cell below.
function cellIndex(x, K) {
  let k = 0;
  for (let i = 1; i < K; i++) if (i / K < x) k = i;
  return k;
}

// Soft quantization S(x), Eq. 3, of a pixel in [0, 1].
function softQuantize(x, K, alpha) {
  const k = cellIndex(x, K);
  return (sigmoid(alpha * (x - (2 * k + 1) / (2 * K))) + k) / K;
}

// Its derivative in closed form, Eq. 8 with the factor 1/K.
function softQuantizeDerivative(x, K, alpha) {
  const e = Math.exp(-Math.abs(alpha * (x - (2 * cellIndex(x, K) + 1) / (2 * K))));
  return (alpha / K) * e / (1 + e) ** 2;
}

// Whether a change of x by at most eps can carry it over a threshold; a pixel exactly eps away counts.
function canCross(x, K, eps) {
  return thresholds(K).some((t) => Math.abs(x - t) <= eps + 1e-6);
}

// The bytes of the digit as pixels in [0, 1].
function digit() {
  return Array.from(atob(DIGIT.replace(/\s/g, "")), (c) => c.charCodeAt(0) / 255);
}

// What the page shows for one setting.
function summary(pixels, K, alpha, eps) {
  const crossing = pixels.filter((x) => canCross(x, K, eps)).length;
  const flat = pixels.filter((x) => softQuantizeDerivative(x, K, alpha) < 0.01).length;
  return { crossing, flat, pixels: pixels.length, steepest: alpha / (4 * K) };
}

function sentence(s) {
  const share = (n) => `${n} of ${s.pixels} pixels (${((100 * n) / s.pixels).toFixed(1)} %)`;
  const steepest = Number(s.steepest.toPrecision(3));
  return `${share(s.crossing)} can cross a threshold. At ${share(s.flat)} the derivative is below 0.01; ` +
    `at a threshold it is ${steepest}.`;
}

// The points of a curve over [0, 1] in a box of 300×110, as SVG wants them; `top` is the value at the upper edge.
function curve(f, K, top) {
  const at = new Set(Array.from({ length: 601 }, (_, i) => i / 600));
  for (const t of thresholds(K)) for (let i = -20; i <= 20; i++) at.add(t + (i * Math.abs(i)) / 40000);
  for (let i = 1; i < K; i++) at.add(i / K).add(i / K + 1e-9);
  const xs = [...at].filter((x) => x >= 0 && x <= 1).sort((a, b) => a - b);
  return xs.map((x) => `${(300 * x).toFixed(2)},${(110 * (1 - f(x) / top)).toFixed(2)}`).join(" ");
}

function panel(title, points, bands, ends) {
  const band = ([a, b]) => `<rect x="${300 * a}" width="${300 * (b - a)}" y="0" height="110" class="play-band"/>`;
  const label = (x, y, anchor, text) => `<text x="${x}" y="${y}" text-anchor="${anchor}">${text}</text>`;
  return `<svg viewBox="-44 -18 360 150" role="img" aria-label="${title}">${bands.map(band).join("")}
    <rect width="300" height="110" class="play-frame"/><polyline points="${points}"/>
    ${label(0, -6, "start", title)}${label(-4, 110, "end", "0")}${label(-4, 8, "end", ends)}
    ${label(0, 126, "middle", "0")}${label(300, 126, "middle", "x = 1")}</svg>`;
}

// The bands of x from which a change of eps reaches a threshold; where they meet they become one.
function bands(K, eps) {
  const found = [];
  for (const t of thresholds(K)) {
    const [a, b] = [Math.max(0, t - eps), Math.min(1, t + eps)];
    if (found.length && a <= found[found.length - 1][1]) found[found.length - 1][1] = b;
    else found.push([a, b]);
  }
  return found;
}

function paint(canvas, values, marked) {
  const context = canvas.getContext("2d");
  const image = context.createImageData(28, 28);
  values.forEach((v, i) => {
    const grey = Math.round(255 * v);
    image.data.set(marked && marked[i] ? [230, 120, 20, 255] : [grey, grey, grey, 255], 4 * i);
  });
  context.putImageData(image, 0, 0);
}

const SLIDERS = [
  { id: "K", label: "levels K", min: 1, max: 8, step: 1, value: 1, read: Number, show: String },
  { id: "alpha", label: "sharpness α", min: 0, max: 5, step: 0.05, value: 3, read: (v) => 10 ** v,
    show: (v) => String(Number((10 ** v).toPrecision(3))) },
  { id: "eps", label: "radius ε", min: 0, max: 0.5, step: 0.01, value: 0.1, read: Number, show: (v) => Number(v).toFixed(2) },
];
const PICTURES = [["x", "the digit x"], ["z", "behind the layer, S(x)"], ["near", "pixels that can cross, in orange"]];

// Put the sliders in the place of the still picture.
function start() {
  const still = document.querySelector("#fig-quantization-play img");
  if (!still) return;
  const slider = (s) => `<label>${s.label}<input type="range" id="play-${s.id}" min="${s.min}" max="${s.max}"
    step="${s.step}" value="${s.value}"><output for="play-${s.id}"></output></label>`;
  const picture = ([id, text]) => `<figure><canvas id="play-${id}" width="28" height="28" role="img"
    aria-label="${text}"></canvas><figcaption>${text}</figcaption></figure>`;
  const box = document.createElement("div");
  box.className = "play";
  box.innerHTML = `<div class="play-sliders">${SLIDERS.map(slider).join("")}</div><div class="play-curves"></div>
    <div class="play-pictures">${PICTURES.map(picture).join("")}</div><p aria-live="polite"></p>`;
  const frame = still.closest("a") || still; // a picture that can be enlarged stands in a link
  frame.hidden = true;
  frame.after(box);
  const part = (name) => box.querySelector(name);
  const pixels = digit();
  const draw = () => {
    const [K, alpha, eps] = SLIDERS.map((s) => {
      const input = part(`#play-${s.id}`);
      input.nextElementSibling.value = s.show(input.value);
      input.setAttribute("aria-valuetext", s.show(input.value));
      return s.read(input.value);
    });
    const S = (x) => softQuantize(x, K, alpha);
    const slope = (x) => softQuantizeDerivative(x, K, alpha);
    const s = summary(pixels, K, alpha, eps);
    part(".play-curves").innerHTML =
      panel("S(x)", curve(S, K, 1), bands(K, eps), "1") +
      panel("its derivative S′(x)", curve(slope, K, s.steepest), bands(K, eps), Number(s.steepest.toPrecision(3)));
    paint(part("#play-x"), pixels);
    paint(part("#play-z"), pixels.map(S));
    paint(part("#play-near"), pixels, pixels.map((x) => canCross(x, K, eps)));
    part("p").textContent = sentence(s);
  };
  box.addEventListener("input", draw);
  draw();
}

if (typeof document === "undefined") {
  module.exports = { bands, canCross, cellIndex, curve, digit, sentence, softQuantize, softQuantizeDerivative, summary };
} else if (document.readyState === "loading") {
  document.addEventListener("DOMContentLoaded", start);
} else {
  start();
}
