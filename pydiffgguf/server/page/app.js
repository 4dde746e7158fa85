// The page: tabs, theme, key, and what goes wrong.

import { startChat } from "./chat.js";
import { showFacts } from "./facts.js";
import { startInfill } from "./infill.js";
import { setKey } from "./net.js";
import { startReads } from "./reads.js";

const WAIT_MS = 1000;
// The bundled model is a toy that knows a few tasks only.
const DEMO_QUESTION = "Solve this Sudoku:\n42..\n1..4\n..42\n2.1.";

function problem(error) {
  const place = document.getElementById("problem");
  place.hidden = !error;
  place.textContent = error ? error.message ?? String(error) : "";
  if (error?.status === 401) document.getElementById("key").hidden = false;
}

// For screen readers: finished text only, never a draft.
function speak(text) {
  document.getElementById("spoken").textContent = text;
}

function startTabs() {
  const tabs = [...document.querySelectorAll('[role="tab"]')];
  function choose(tab) {
    for (const other of tabs) {
      const chosen = other === tab;
      other.setAttribute("aria-selected", String(chosen));
      other.tabIndex = chosen ? 0 : -1;
      document.getElementById(other.getAttribute("aria-controls")).hidden = !chosen;
    }
    tab.focus();
  }
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => choose(tab));
    tab.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (step) choose(tabs[(i + step + tabs.length) % tabs.length]);
    });
  });
  const named = tabs.find((tab) => tab.getAttribute("aria-controls") === location.hash.slice(1));
  if (named) choose(named);
}

function startTheme() {
  const root = document.documentElement;
  const stored = sessionStorage.getItem("pydiffgguf-theme");
  if (stored) root.dataset.theme = stored;
  document.getElementById("theme").addEventListener("click", () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    sessionStorage.setItem("pydiffgguf-theme", root.dataset.theme);
  });
}

async function start() {
  try {
    const props = await showFacts();
    if (props.model_path === "demo.gguf") chat.suggest(DEMO_QUESTION);
    problem("");
  } catch (error) {
    problem(error);
    if (error.status === 503) setTimeout(start, WAIT_MS);
  }
}

document.getElementById("key").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(event.target.elements.key.value);
  event.target.hidden = true;
  start();
});
startTabs();
startTheme();
const chat = startChat(problem, speak);
startInfill(problem, speak);
startReads(problem);
start();
