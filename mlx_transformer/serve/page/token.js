// The panel of the chosen token: what the model expected in its place, and what it attends to.

import { ask } from "./ask.js";
import * as text from "./text.js";

const panel = document.getElementById("token");
const SHOWN = 5; // tokens that are listed with the weight they are attended with
const known = new Map(); // of this text: answers by the question
let asked = null;

export function forget() {
  known.clear();
  asked?.abort();
  panel.replaceChildren(element("h2", "Token"), element("p", "Point at a token.", "hint"));
}

function element(kind, content, className = "") {
  const made = document.createElement(kind);
  made.textContent = content;
  made.className = className;
  return made;
}

function percent(p) {
  return `${p >= 0.0995 ? (100 * p).toFixed(0) : (100 * p).toPrecision(2)}\u00a0%`.replace(/^.*e-.*$/, "< 0.0001\u00a0%");
}

function row(piece, p, className) {
  const made = element("li", "", `candidate ${className}`);
  const bar = element("span", "", "bar");
  const filled = element("i", "");
  filled.style.width = `${100 * p}%`;
  bar.append(filled);
  const name = element("code", text.shownText(piece));
  name.title = piece.name;
  made.append(name, bar, element("span", percent(p), "p"));
  return made;
}

// attended: {weights, start} of the chosen token, or null. No weights: it is older than what the model still sees
export async function show(index, sampling, attended) {
  asked?.abort();
  asked = new AbortController();
  const piece = text.tokens[index];
  const parts = [element("h2", `“${text.shownText(piece)}”`)];
  if (index === 0) {
    parts.push(element("p", "Nothing stands before it, so the model did not expect it.", "hint"));
  } else {
    const question = { tokens: text.ids(index), token: piece.token, ...sampling };
    const key = JSON.stringify({ index, ...sampling });
    try {
      if (!known.has(key)) {
        await new Promise((resolve) => setTimeout(resolve, 60)); // the pointer may only pass over
        if (text.current() !== index) return;
        known.set(key, await ask("api/look", question, asked.signal));
      }
      parts.push(...expected(known.get(key)));
    } catch (error) {
      if (error.name === "AbortError") return;
      parts.push(element("p", error.message, "hint"));
    }
  }
  if (text.current() !== index) return;
  panel.replaceChildren(...parts, ...attends(attended));
}

function expected({ candidates, own, of }) {
  const list = element("ol", "");
  const classes = (one) => `${own?.token === one.token ? "own " : ""}${one.sampled > 0 ? "" : "dropped"}`;
  list.append(...candidates.map((one) => row(one, one.p, classes(one))));
  if (!own) return [list];
  if (!candidates.some((one) => one.token === own.token)) list.append(row(own, own.p, classes(own)));
  const drawn = own.sampled > 0 ? `${percent(own.sampled)} as it is sampled` : "not sampled with these settings";
  const rank = `rank ${own.rank.toLocaleString("en")} of ${of.toLocaleString("en")}`;
  return [element("p", `Probability ${percent(own.p)}, ${rank}; ${drawn}.`), list];
}

function attends(attended) {
  if (!attended) return [];
  const { weights, start } = attended;
  if (!weights.length) return [element("h3", "The model no longer sees this token.")];
  const order = weights.map((weight, i) => [weight, i]).sort((a, b) => b[0] - a[0]).slice(0, SHOWN);
  const list = element("ol", "");
  list.append(...order.filter(([weight]) => weight > 0).map(([weight, i]) => row(text.tokens[start + i], weight, "")));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  return [element("h3", total > 0 ? "Attends to" : "This layer passes the token on as it is."), list];
}
