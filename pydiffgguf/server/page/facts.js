// What the model is, and what it takes; returns what the server says of it.

import { element } from "./canvas.js";
import { ask } from "./net.js";

function bytes(value) {
  const units = ["bytes", "kB", "MB", "GB"];
  let i = 0;
  while (value >= 1000 && i < units.length - 1) {
    value /= 1000;
    i += 1;
  }
  return `${i ? value.toFixed(1) : value} ${units[i]}`;
}

export async function showFacts() {
  const [props, models] = await Promise.all([ask("/props"), ask("/v1/models")]);
  const place = document.getElementById("facts");
  const table = element("table");
  const { memory, ...sampler } = props.diffusion;
  const meta = models.data[0].meta;
  const rows = [
    ["name", models.data.map((entry) => entry.id).join(", ")],
    ["file", `${props.model_path}, ${bytes(meta.size)} of weights`],
    ["context", `${meta.n_ctx} tokens (trained on ${meta.n_ctx_train})`],
    ["vocabulary", `${meta.n_vocab} tokens`],
    ["canvas", `${sampler.canvas_length} tokens`],
    ["sessions", props.total_slots],
    ["build", props.build_info],
    ...Object.entries(memory).map(([name, value]) => [`memory: ${name.replaceAll("_", " ")}`, bytes(value)]),
    ...Object.entries(sampler).map(([name, value]) => [name.replaceAll("_", " "), value]),
  ];
  for (const [name, value] of rows) {
    const line = element("tr");
    line.append(element("th", "", name), element("td", "", String(value)));
    table.append(line);
  }
  const line = element("tr");
  const cell = element("td");
  cell.append(element("pre", "", props.chat_template || "none"));
  line.append(element("th", "", "chat template"), cell);
  table.append(line);
  place.replaceChildren(table);
  document.getElementById("model").textContent = models.data[0].id;
  return props;
}
