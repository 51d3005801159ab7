// The text: a span for each token, one of which may be chosen, and shaded by weights.

const box = document.getElementById("text");
export const tokens = []; // {token, text, name, given, span}
let chosen = null;
let onChoose = () => {};

export function whenChosen(callback) {
  onChoose = callback;
}

export function clear() {
  box.replaceChildren();
  tokens.length = 0;
  chosen = null;
}

export function add(piece, given) {
  const span = document.createElement("span");
  span.textContent = piece.text; // never markup: a model may write <script>
  span.className = given ? "t given" : "t";
  if (!piece.text) {
    span.classList.add("mark");
    span.dataset.name = piece.name;
  }
  span.dataset.index = tokens.length;
  tokens.push({ ...piece, given, span });
  box.append(span);
}

export function finish(rest) {
  if (rest) box.append(document.createTextNode(rest)); // an unfinished character
}

export function ids(end = tokens.length) {
  return tokens.slice(0, end).map((one) => one.token);
}

export function shownText(piece) {
  if (!piece.text || /[\0-\x08\x0b-\x1f\x7f]/.test(piece.text)) return piece.name; // control characters have no shape
  return piece.text.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "⇥");
}

export function choose(index) {
  if (index === chosen || !tokens[index]) return;
  tokens[chosen]?.span.classList.remove("chosen");
  chosen = index;
  tokens[chosen].span.classList.add("chosen");
  onChoose(index);
}

export function current() {
  return chosen;
}

// weights: of the tokens from `start` on; null: none
export function shade(weights, start = 0) {
  tokens.forEach(({ span }, i) => {
    const weight = weights?.[i - start];
    span.classList.toggle("shaded", weight > 0);
    span.classList.toggle("forgotten", weights !== null && i < start);
    if (weight > 0) span.style.setProperty("--weight", (0.8 * Math.sqrt(weight)).toFixed(3));
  });
}

for (const kind of ["pointerover", "pointerdown"]) {
  box.addEventListener(kind, ({ target }) => {
    if (target.dataset.index !== undefined) choose(Number(target.dataset.index));
  });
}
box.addEventListener("keydown", (event) => {
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!step || !tokens.length) return;
  event.preventDefault();
  choose(Math.min(Math.max((chosen ?? -step) + step, 0), tokens.length - 1));
});
