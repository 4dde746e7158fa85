// The playground for gaps: each is filled in turn, and seen while it is denoised between its two sides.

import { Film, element, words } from "./canvas.js";
import { events } from "./net.js";

const MARK = "<gap/>";
const EXAMPLE = "On Sunday Emma found a<gap/> in the school. Emma gave the white cup to Mia. Mia took<gap/> home that " +
  "Sunday and never went back to the school.";

export function startInfill(problem, speak) {
  const form = document.getElementById("fill");
  const place = document.getElementById("filled");
  const field = form.elements;
  field.text.value = EXAMPLE;
  let running = null;

  function mark() {
    const at = field.text.selectionStart;
    field.text.setRangeText(MARK, at, field.text.selectionEnd, "end");
    field.text.focus();
  }

  // One gap: the text before it, and the rest, in which later gaps are left out.
  async function fillGap(before, behind, number) {
    const card = element("article", "turn");
    card.append(element("h2", "", `Gap ${number}`));
    const view = element("div", "document");
    const gap = element("span", "gap");
    view.append(element("span", "", before), gap, element("span", "", behind));
    const film = new Film();
    const list = element("ol");
    const facts = element("div", "quiet cost");
    card.append(view, film.root, list, facts);
    place.append(card);
    const body = {
      input_prefix: before,
      input_suffix: behind,
      n_predict: Number(field.max_gap.value),
      n_cmpl: Number(field.n.value),
      seed: Number(field.seed.value),
      stream: true,
      diffusion: { frames: "tokens" },
    };
    let text = "";
    for await (const event of events("/infill", body, running.signal)) {
      if (event.superseded) throw new Error("another request of this browser took its place");
      if (event.type === "diffusion_frame") {
        film.add(event);
        gap.textContent = event.text;
      } else if (event.stop) {
        facts.textContent = words(event.timings);
        for (const candidate of event.candidates ?? []) {
          const item = element("li");
          item.append(
            element("code", "", candidate.content || "(nothing)"),
            element("span", "quiet", ` ${candidate.tokens_predicted} tokens, score ${candidate.score.toFixed(2)}`),
          );
          list.append(item);
        }
      } else {
        gap.textContent = text += event.content;
      }
    }
    speak(text);
    return text;
  }

  async function fill() {
    const parts = field.text.value.split(MARK);
    if (parts.length < 2 || running) {
      problem(parts.length < 2 ? new Error(`mark a gap with ${MARK} first`) : "");
      return;
    }
    problem("");
    place.replaceChildren();
    running = new AbortController();
    field.send.disabled = true;
    field.stop.disabled = false;
    try {
      let before = parts[0];
      for (let i = 1; i < parts.length; i++) {
        before += await fillGap(before, parts.slice(i).join(""), i);
        before += parts[i];
      }
    } catch (error) {
      if (error.name !== "AbortError") problem(error);
    } finally {
      running = null;
      field.send.disabled = false;
      field.stop.disabled = true;
    }
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    fill();
  });
  field.mark.addEventListener("click", mark);
  field.stop.addEventListener("click", () => running?.abort());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
    if (event.altKey && event.key.toLowerCase() === "g" && document.activeElement === field.text) {
      event.preventDefault();
      mark();
    }
  });
}
