"use strict";
// The page asks for the state, shows it, and posts what its buttons ask for; all that it shows comes from the server.

const EVERY = 250; // milliseconds between two questions; an unchanged state is an empty answer
const SHOWN = 240; // batches on the curve, at most
const $ = (id) => document.getElementById(id);
const ANSWERED = {
  learned: "The adapter learned from it.",
  held: "The guard held learning: predicted only.",
  source: "The source model answered.",
};
let state = { version: -1 };

function element(name, text, kind) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function say(sentence) {
  $("said").textContent = sentence;
  $("said").hidden = !sentence;
}

async function ask(path, body) {
  const post = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body ?? {}) };
  const answer = await fetch(path, body === undefined ? {} : post);
  if (answer.status === 204) return;
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.detail);
  if (found.version > state.version || body !== undefined) show(found);
}

async function act(path, body) {
  document.body.classList.add("busy"); // a method may need a while to begin
  try {
    await ask(path, body);
    say("");
  } catch (error) {
    say(error.message);
  }
  document.body.classList.remove("busy");
}

async function watch() {
  let wait = EVERY;
  try {
    if (!document.hidden) await ask(`api/state?seen=${state.version}`);
    if (watch.lost) say("");
    watch.lost = false;
  } catch {
    watch.lost = true;
    wait = 2000;
    say("The server does not answer: has tta demo ended?");
  }
  setTimeout(watch, wait);
}

// ---------------------------------------------------------------- what is shown

function show(found) {
  const fresh = found.batch !== state.batch || !found.pictures.length;
  state = found;
  $("play").textContent = state.playing ? "Pause" : "Play";
  for (const button of document.querySelectorAll("[data-set]"))
    button.setAttribute("aria-pressed", String(state[button.dataset.set] === button.value));
  for (const now of document.querySelectorAll("[data-now]")) now.textContent = state[now.dataset.now];
  $("condition").textContent = `Batch ${state.batch}. ${state.playing ? ANSWERED[state.answered] ?? "" : "Paused."}`;
  score($("domain"), state.domain);
  score($("start"), state.start);
  draw();
  if (fresh) pictures();
  events();
}

function score(row, { images, source, adapted }) {
  const cells = row.querySelectorAll("td");
  const percent = (errors) => (images ? `${((100 * errors) / images).toFixed(1)} %` : "–");
  [percent(source), percent(adapted), images].forEach((text, place) => (cells[place].textContent = text));
}

function pictures() {
  $("marked").hidden = !state.pictures.some((one) => one.label !== null);
  $("pictures").classList.toggle("wide", state.pictures.some((one) => one.source[0].length > 3));
  $("pictures").replaceChildren(
    ...state.pictures.map((one) => {
      const item = element("li");
      const image = element("img");
      image.src = one.image;
      image.alt = one.label === null ? "a picture of unknown class" : `a picture of class ${one.label}`;
      image.title = one.label === null ? "" : one.label;
      item.append(image, said("source", one.source), said("adapted", one.adapted));
      return item;
    }),
  );
}

function said(who, [name, right]) {
  const line = element("div", undefined, who);
  line.title = `${who}: ${name}`;
  line.append(element("span", `${who} says`, "unseen"), element("span", name));
  if (right !== null) {
    const mark = element("span", right ? "✓" : "✗", right ? "mark right" : "mark wrong");
    mark.setAttribute("role", "img");
    mark.setAttribute("aria-label", right ? "mark right" : "mark wrong");
    line.append(mark);
  }
  return line;
}

function events() {
  const latest = state.marks.slice(-20).reverse();
  const key = JSON.stringify(latest);
  if (key === events.shown) return; // so that screen readers hear each once
  events.shown = key;
  $("events").replaceChildren(
    ...latest.map(([batch, kind, text]) => {
      const item = element("li", undefined, kind);
      item.append(element("b", `batch ${batch}`), text);
      return item;
    }),
  );
}

// ---------------------------------------------------------------- the curve: numbers only are put into its text

function draw() {
  const svg = $("curve");
  const { width, height } = svg.getBoundingClientRect();
  const [left, right, top, bottom] = [34, width - 6, 8, height - 20];
  const last = Math.max(state.batch, 20);
  const first = Math.max(0, last - SHOWN);
  const x = (batch) => (left + ((batch - first) / (last - first)) * (right - left)).toFixed(1);
  const y = (percent) => (bottom - (percent / 100) * (bottom - top)).toFixed(1);
  const parts = [0, 25, 50, 75, 100].map(
    (percent) =>
      `<line class="grid" x1="${left}" x2="${right}" y1="${y(percent)}" y2="${y(percent)}"/>` +
      `<text x="${left - 6}" y="${+y(percent) + 4}" text-anchor="end">${percent}</text>`,
  );
  parts.push(`<text x="${left}" y="${height - 4}">batch ${first}</text>`);
  parts.push(`<text x="${right}" y="${height - 4}" text-anchor="end">${last}</text>`);
  for (const [batch, kind] of state.marks) {
    if (batch < first || batch > last) continue;
    if (kind === "domain" || kind === "method")
      parts.push(`<line class="change" x1="${x(batch)}" x2="${x(batch)}" y1="${top}" y2="${bottom}"/>`);
    if (kind === "alarm")
      parts.push(`<path class="alarm" d="M${x(batch)} ${top} l6 11 h-12 z"/>`);
  }
  ["source", "adapted"].forEach((who, place) => {
    const line = state.points.map((point) => `${x(point[0])},${y(point[place + 1])}`).join(" ");
    parts.push(`<polyline class="${who}" points="${line}"/>`);
  });
  svg.innerHTML = parts.join("");
  const now = state.points.at(-1);
  svg.setAttribute(
    "aria-label",
    now ? `Online error: source model ${now[1].toFixed(0)} %, adapted ${now[2].toFixed(0)} %` : "Online error: none yet",
  );
}

// ---------------------------------------------------------------- begin

document.addEventListener("click", ({ target }) => {
  if (target.dataset.set === "severity") act("api/change", { severity: Number(target.value) });
  else if (target.dataset.set) act("api/change", { [target.dataset.set]: target.value });
});
$("play").addEventListener("click", () => act("api/change", { playing: !state.playing }));
$("reset").addEventListener("click", () => act("api/reset", {}));
new ResizeObserver(() => state.points && draw()).observe($("curve"));
if (matchMedia("(max-width: 60rem)").matches) document.querySelector("details.long").open = false;
watch();
