// The page: the model's description, the form, and the choice of an attention head.

import { ask, stream } from "./ask.js";
import * as text from "./text.js";
import * as token from "./token.js";

const $ = (id) => document.getElementById(id);
const OFF = { top_p: 1, top_k: 0, min_p: 0 }; // values of the sliders that filter nothing
let writing = null; // the AbortController of the text that is being written
let map = null; // {key, start, rows}: weights of a head over the text
let asking = null; // the key of the map that was asked for

function sampling() {
  const values = { temperature: Number($("temperature").value) };
  for (const [name, off] of Object.entries(OFF)) {
    const value = Number($(name).value);
    if (value !== off) values[name] = value;
  }
  return values;
}

function showSettings() {
  const names = { top_p: "off", top_k: "off", min_p: "off" };
  for (const name of ["temperature", "top_p", "top_k", "min_p"]) {
    const value = $(name).value;
    $(`${name}-value`).textContent = Number(value) === OFF[name] ? names[name] : value;
  }
  if ($("temperature").value === "0") $("temperature-value").textContent = "0: the most probable token";
}

function showError(error) {
  $("error").textContent = error ? error.message : "";
  $("error").hidden = !error;
}

// A whole number of a field, null if it is empty. What a browser does not read as a number is sent for the server to name.
function whole(id) {
  const field = $(id);
  if (field.validity.badInput) return "no number";
  return field.value === "" ? null : Number(field.value);
}

async function write(event) {
  event.preventDefault();
  writing?.abort();
  const mine = (writing = new AbortController());
  showError(null);
  $("stop").disabled = false;
  $("status").textContent = "reading …";
  const began = performance.now();
  let count = 0;
  let finished = false;
  try {
    const asked = { prompt: $("prompt").value, max_tokens: whole("max_tokens"), seed: whole("seed"), ...sampling() };
    for await (const event of stream("api/write", asked, mine.signal)) {
      if (event.prompt) {
        text.clear();
        token.forget();
        map = null;
        event.prompt.forEach((piece) => text.add(piece, true));
      } else if (event.ended !== undefined) {
        text.finish(event.rest);
        finished = true;
        const times = event.slides === 1 ? "once" : `${event.slides} times`;
        const slides = event.slides ? `; older text was forgotten ${times}` : "";
        $("status").textContent = `${ending(event.ended, count, began)}${slides}`;
      } else {
        text.add(event, false);
        count += 1;
        $("status").textContent = `${count} tokens`;
      }
    }
    if (!finished) throw new Error("the server was ended before the text");
  } catch (error) {
    if (mine === writing) $("status").textContent = error.name === "AbortError" ? `stopped after ${count} tokens` : "";
    if (error.name !== "AbortError") showError(error);
  }
  if (mine !== writing) return;
  writing = null;
  $("stop").disabled = true;
  attend();
}

function ending(ended, count, began) {
  const speed = count / ((performance.now() - began) / 1000);
  return `${count} tokens, ${speed.toFixed(0)} tokens/s; ${ended ? "the model ended the text" : "cut at the limit"}`;
}

function chosenHead() {
  if ($("layer").value === "") return null;
  return { layer: Number($("layer").value), head: $("head").value === "" ? null : Number($("head").value) };
}

// Show the chosen token: shade the text by its weights, which are asked for where they are not known.
async function attend() {
  const index = text.current();
  const head = $("head").disabled ? null : chosenHead();
  const key = head && JSON.stringify(head);
  if (!head || map?.key !== key) text.shade(null);
  if (head && index !== null && (map?.key !== key || index >= map.start + map.rows.length)) {
    const question = { tokens: text.ids(), ...head };
    const mine = (asking = `${key} ${question.tokens.length}`);
    try {
      const answer = await ask("api/attend", question);
      if (mine !== asking) return;
      map = { key, ...answer };
    } catch (error) {
      $("attention-note").textContent = error.message;
    }
  }
  show();
}

function show() {
  const index = text.current();
  if (index === null) return;
  const weights = map && !$("head").disabled ? map.rows[index - map.start] ?? [] : null; // []: it is forgotten
  if (weights) text.shade(weights, map.start);
  token.show(index, sampling(), weights && { weights, start: map.start });
}

function chooseLayer(layers) {
  const layer = layers[$("layer").value];
  const options = (layer?.heads ? ["mean of heads", ...Array(layer.heads).keys()] : []).map((name, i) =>
    i ? new Option(`head ${name}`, name) : new Option(name, ""),
  );
  $("head").replaceChildren(...options);
  $("head").disabled = !layer?.heads;
  const without = layer && !layer.heads;
  $("attention-note").textContent = without
    ? `${layer.mixer} has no attention weights to show`
    : layer ? "shade: how much the chosen token attends to each one" : "";
  map = null;
  attend();
}

async function describe() {
  const model = await (await fetch("api/model")).json();
  const kind = model.code ?? `phase ${model.phase}`;
  $("run").textContent = model.run;
  document.title = `${model.run} · play with a model`;
  const parts = [
    model.branch ? `${kind}, ${model.branch}` : kind,
    `${model.parameters.toLocaleString("en")} parameters`,
    `context of ${model.context.toLocaleString("en")} tokens`,
    `${model.vocabulary.toLocaleString("en")} tokens (${model.tokenizer})`,
    model.device,
  ];
  $("model").textContent = parts.join(" · ");
  const names = model.layers.map(({ mixer, heads }, i) => `layer ${i}${heads ? "" : ` (${mixer}: none)`}`);
  $("layer").append(...names.map((name, i) => new Option(name, i)));
  $("layer").addEventListener("change", () => chooseLayer(model.layers));
}

$("form").addEventListener("submit", write);
$("stop").addEventListener("click", () => writing?.abort());
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) write(event);
});
$("dice").addEventListener("click", () => {
  $("seed").value = Math.floor(Math.random() * 1e6);
});
$("head").addEventListener("change", () => {
  map = null;
  attend();
});
for (const name of ["temperature", "top_p", "top_k", "min_p"]) {
  $(name).addEventListener("input", showSettings);
  $(name).addEventListener("change", show);
}
text.whenChosen(attend);
showSettings();
describe().catch(showError);
