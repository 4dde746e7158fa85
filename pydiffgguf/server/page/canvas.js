// A canvas while it is denoised, and afterwards the film of its steps. All text goes in through textContent.

export function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

// Entropy in nats, above which a row looks less certain.
const DOUBTS = [0.05, 0.5, 1.5, 3];

function doubt(entropy) {
  return DOUBTS.filter((bound) => entropy > bound).length;
}

function isSpecial(piece) {
  return /^<[^<>\s]+>$/.test(piece);
}

// One frame's rows as spans: settled, in doubt, pinned, special.
export function drawRows(place, frame, before) {
  const canvas = frame.diffusion;
  const end = canvas.tokens.findIndex((piece, i) => isSpecial(piece) && canvas.tokens.slice(i).every(isSpecial));
  const rows = end < 0 ? canvas.tokens.length : Math.min(canvas.tokens.length, end + 1);
  const spans = [];
  for (let i = 0; i < rows; i++) {
    const piece = canvas.tokens[i];
    const span = element("span", "", piece);
    const pinned = canvas.pinned?.[i] === "1";
    const level = pinned ? 0 : doubt(canvas.entropy[i]);
    span.className = pinned ? "pinned" : level ? `doubt${level}` : "settled";
    if (isSpecial(piece)) span.classList.add("special");
    if (!pinned && before && before.diffusion.tokens[i] !== piece) span.classList.add("fresh");
    span.title = pinned ? "pinned" : `${canvas.entropy[i].toFixed(3)} nats`;
    spans.push(span);
  }
  place.replaceChildren(...spans);
}

// The frames of one answer with a slider to look back through them.
export class Film {
  constructor() {
    this.frames = [];
    this.root = element("div");
    this.rows = element("div", "canvas");
    this.rows.setAttribute("aria-hidden", "true");
    this.slider = element("input");
    this.slider.type = "range";
    this.slider.min = 0;
    this.slider.setAttribute("aria-label", "Denoise step");
    this.label = element("span", "quiet");
    const line = element("div", "film");
    line.append(this.slider, this.label);
    this.root.append(this.rows, line, legend());
    this.follows = true;
    this.slider.addEventListener("input", () => {
      this.follows = Number(this.slider.value) === this.frames.length - 1;
      this.show(Number(this.slider.value));
    });
  }

  add(frame) {
    this.frames.push(frame);
    this.slider.max = this.frames.length - 1;
    if (this.follows) this.show(this.frames.length - 1);
  }

  show(index) {
    const frame = this.frames[index];
    const before = this.frames[index - 1];
    this.slider.value = index;
    this.label.textContent = `canvas ${frame.block + 1}, step ${frame.step + 1} of at most ${frame.total}`;
    this.slider.setAttribute("aria-valuetext", this.label.textContent);
    drawRows(this.rows, frame, before && before.block === frame.block ? before : null);
  }
}

function legend() {
  const line = element("div", "legend quiet");
  for (const [name, text] of [["settled", "certain"], ["doubt2", "in doubt"], ["fresh", "changed in this step"],
    ["pinned", "pinned"]]) {
    line.append(element("span", name, text));
  }
  return line;
}

export function words(timings) {
  const seconds = (timings.prompt_ms + timings.predicted_ms) / 1000;
  return `${timings.predicted_n} tokens in ${timings.diffusion_steps} steps, ${seconds.toFixed(2)} s, ` +
    `${timings.predicted_per_second.toFixed(1)} tokens/s; prompt ${timings.prompt_n} + ${timings.cache_n} cached; ` +
    `seed ${timings.seed}`;
}
