// Typed reads: questions about a text, answered with probabilities.

import { element } from "./canvas.js";
import { ask } from "./net.js";

const HINTS = {
  noul: "Is the customer angry?",
  choice: "Which team should answer?",
  score: "How urgent is it?",
};
const LEVELS = { noul: "", choice: "billing, shipping, other", score: "not at all, somewhat, very" };

export function startReads(problem) {
  const form = document.getElementById("read");
  const list = document.getElementById("questions");
  const answers = document.getElementById("answers");
  form.elements.state.value = "My parcel has not arrived, and nobody answers my letters!";

  function add(kind = "noul") {
    const set = element("fieldset");
    set.append(element("legend", "", `Question ${list.children.length + 1}`));
    const type = element("select");
    for (const [value, text] of [["noul", "yes or no"], ["choice", "one of"], ["score", "how much"]]) {
      const option = element("option", "", text);
      option.value = value;
      type.append(option);
    }
    type.setAttribute("aria-label", "Kind of question");
    const question = element("input");
    question.size = 40;
    question.setAttribute("aria-label", "Question");
    const options = element("input");
    options.size = 40;
    options.setAttribute("aria-label", "Options, with commas between them");
    const remove = element("button", "", "Remove");
    remove.type = "button";
    remove.addEventListener("click", () => set.remove());
    function suit() {
      question.value = HINTS[type.value];
      options.value = LEVELS[type.value];
      options.hidden = type.value === "noul";
    }
    type.addEventListener("change", suit);
    type.value = kind;
    suit();
    const row = element("div", "row");
    row.append(type, question, options, remove);
    set.append(row);
    set.read = () => {
      const names = options.value.split(",").map((name) => name.trim()).filter(Boolean);
      const made = { type: type.value, instructions: question.value };
      if (type.value === "choice") made.criteria = Object.fromEntries(names.map((name) => [name, null]));
      if (type.value === "score") made.criteria = names;
      return made;
    };
    list.append(set);
  }

  function show(id, question, answer) {
    const table = element("table");
    table.append(element("caption", "", question.instructions));
    const probabilities = answer.probabilities ?? { yes: answer.noul, no: 1 - answer.noul };
    for (const [name, value] of Object.entries(probabilities)) {
      const line = element("tr");
      const bar = element("meter");
      bar.value = value;
      const cell = element("td");
      cell.append(bar, element("span", "quiet", ` ${(100 * value).toFixed(1)} %`));
      line.append(element("th", "", answer.legend?.[name] ?? name), cell);
      table.append(line);
    }
    answers.append(table);
  }

  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    problem("");
    const questions = Object.fromEntries([...list.children].map((set, i) => [`q${i + 1}`, set.read()]));
    try {
      const { models } = await ask("/v1/models");
      const body = { model: models[0].name, state: form.elements.state.value, questions };
      const reply = await ask("/v1/systemone", body);
      answers.replaceChildren();
      for (const [id, answer] of Object.entries(reply.answers)) show(id, questions[id], answer);
    } catch (error) {
      problem(error);
    }
  });
  form.elements.add.addEventListener("click", () => add());
  for (const kind of ["noul", "choice", "score"]) add(kind);
}
