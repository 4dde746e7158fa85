// The chat, with the canvas of the answer under way.

import { Film, element, words } from "./canvas.js";
import { events } from "./net.js";

export function startChat(problem, speak) {
  const form = document.getElementById("ask");
  const turns = document.getElementById("turns");
  const field = form.elements;
  let messages = [];
  let running = null;

  function turn(role, title) {
    const card = element("article", `turn ${role}`);
    card.append(element("h2", "", title));
    turns.append(card);
    return card;
  }

  async function answer() {
    const card = turn("assistant", "Model");
    const thought = element("div", "thought");
    const said = element("div", "said");
    const film = new Film();
    const facts = element("div", "quiet cost");
    card.append(thought, said, film.root, facts);
    const body = {
      messages,
      stream: true,
      max_tokens: Number(field.max_tokens.value),
      diffusion: { frames: "tokens" },
      chat_template_kwargs: { enable_thinking: field.thinking.checked },
    };
    if (field.seed.value !== "") body.seed = Number(field.seed.value);
    let text = "";
    let reason = "";
    for await (const chunk of events("/v1/chat/completions", body, running.signal)) {
      const choice = chunk.choices[0];
      if (chunk.type === "diffusion_frame") film.add(chunk);
      if (choice?.delta.reasoning_content) thought.textContent += choice.delta.reasoning_content;
      if (choice?.delta.content) said.textContent = text += choice.delta.content;
      if (choice?.finish_reason) reason = choice.finish_reason;
      if (chunk.timings) facts.textContent = words(chunk.timings) + (reason === "length" ? "; cut by its limit" : "");
      card.scrollIntoView({ block: "nearest" });
    }
    messages.push({ role: "assistant", content: text });
    speak(text);
  }

  async function send() {
    const text = field.text.value;
    if (!text.trim() || running) return;
    problem("");
    messages.push({ role: "user", content: text });
    turn("user", "You").append(element("div", "said", text));
    field.text.value = "";
    running = new AbortController();
    field.send.disabled = true;
    field.stop.disabled = false;
    try {
      await answer();
    } catch (error) {
      messages = messages.slice(0, messages.findLastIndex((message) => message.role === "user"));
      if (error.name !== "AbortError") problem(error);
    } finally {
      running = null;
      field.send.disabled = false;
      field.stop.disabled = true;
      field.text.focus();
    }
  }

  form.addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  field.text.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  field.stop.addEventListener("click", () => running?.abort());
  field.clear.addEventListener("click", () => {
    running?.abort();
    messages = [];
    turns.replaceChildren();
    field.text.focus();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") running?.abort();
  });
  return {
    // A first question, where nothing was written yet.
    suggest(text) {
      if (!field.text.value && !messages.length) field.text.value = text;
    },
  };
}
