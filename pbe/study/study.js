"use strict";
// Shows one rater's screens of the plan and writes the answers. Methods have blind names, which are in the data and the
// answers; what is seen, and the document's elements, have letters.
const study = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const QUESTIONS = {
  quality: "Image quality: which result looks most real? Rank from best to worst.",
  consistency: "Consistency: in which result is what was painted most like the example? Rank from best to worst.",
};
const LETTERS = "ABCDE";
let rater = null; // of study.raters
let state = null; // what this browser keeps of the rater; see begin
let undo = []; // earlier places of this screen
let current = 0; // the picture that keys speak of: its index in `shown`
let since = null; // when the clock of this screen last began, in ms
let carried = null; // the picture under the pointer: {index, x, y, ghost}
let justCarried = false; // the click that ends a drag is none
let zoomed = false;

// ---- what is kept

const key = () => `pbe-study:${study.digest}:${rater.rater}`;

function keep() {
  try {
    localStorage.setItem(key(), JSON.stringify(state));
    at("trouble").textContent = "";
  } catch (error) {
    at("trouble").textContent =
      `This browser does not keep your answers (${error.name}). Save them before you close the page.`;
  }
}

function kept() {
  try {
    return JSON.parse(localStorage.getItem(key()));
  } catch (error) {
    at("trouble").textContent =
      `What this browser had kept cannot be read (${error.name}); the answers begin anew. Save them before you close the page.`;
    return null;
  }
}

function begin(number) {
  rater = study.raters.find((one) => one.rater === number);
  // at: the screen shown. done: screens answered so far. answers: by screen, blind names (or null) by place, and seconds
  state = kept() ?? { started: new Date().toISOString(), finished: null, at: 0, done: 0, answers: {} };
  show();
}

// ---- screens

const here = () => rater.screens[state.at];
const answer = () => (state.answers[state.at] ??= { places: here().shown.map(() => null), seconds: 0 });
const isRanked = () => answer().places.every((name) => name !== null);
const letter = (name) => LETTERS[here().shown.indexOf(name)];
const picture = (name) => study.pictures[here().item][name];

function show() {
  const over = state.at >= rater.screens.length;
  at("welcome").hidden = true;
  at("screen").hidden = over;
  at("end").hidden = !over;
  undo = [];
  current = 0;
  zoom(false);
  since = over || document.hidden ? null : performance.now();
  if (over) {
    at("end").querySelector("[data-do=back]").disabled = false;
    at("end").querySelector("h1").focus();
    return;
  }
  const { role, question, shown } = here();
  const counted = rater.screens.filter((one) => one.role !== "practice").length;
  const number = state.at + 1 - (rater.screens.length - counted);
  at("where").textContent = role === "practice" ? "Practice" : `${number} of ${counted}`;
  at("progress").max = rater.screens.length;
  at("progress").value = state.done;
  at("question").textContent = QUESTIONS[question];
  at("practice").hidden = role !== "practice";
  at("photo").src = picture("photo");
  at("exemplar").src = picture("exemplar");
  at("most").textContent = shown.length;
  at("results").style.setProperty("--count", shown.length);
  at("results").replaceChildren(...shown.map((name, index) => card(name, index)));
  at("places").replaceChildren(...shown.map((_, index) => place(index, shown.length)));
  draw();
  scrollTo(0, 0);
  cards()[0].focus({ preventScroll: true });
}

function element(tag, name, text = "") {
  const made = document.createElement(tag);
  made.className = name;
  made.textContent = text;
  return made;
}

function framed(source, alt) {
  const frame = element("div", "frame");
  if (source) {
    const image = element("img", "");
    image.src = source;
    image.alt = alt;
    image.draggable = false;
    frame.append(image);
  }
  return frame;
}

function card(name, index) {
  const made = element("button", "card");
  made.type = "button";
  made.append(element("span", "grip", LETTERS[index]), framed(picture(name), ""), element("span", "rank"));
  return made;
}

function place(index, most) {
  const made = element("button", "place");
  made.type = "button";
  made.dataset.name = index === 0 ? "1 best" : index === most - 1 ? `${most} worst` : `${index + 1}`;
  const line = document.createElement("li");
  line.append(made);
  return line;
}

const cards = () => [...at("results").children];
const places = () => [...at("places").querySelectorAll(".place")];

function draw() {
  const { shown } = here(), ranking = answer().places;
  cards().forEach((one, index) => {
    const rank = ranking.indexOf(shown[index]) + 1;
    one.classList.toggle("placed", rank > 0);
    one.classList.toggle("current", index === current);
    one.tabIndex = index === current ? 0 : -1;
    one.querySelector(".rank").textContent = rank || "";
    one.setAttribute("aria-label", `Result ${LETTERS[index]}, ${rank ? `place ${rank}` : "no place yet"}`);
  });
  places().forEach((one, index) => {
    const name = ranking[index], title = one.dataset.name;
    one.classList.toggle("full", name !== null);
    one.replaceChildren(framed(name && picture(name), ""), document.createTextNode(name ? `${title}: ${letter(name)}` : title));
    one.setAttribute("aria-label", name ? `Place ${title}: result ${letter(name)}; take it off` : `Place ${title}: empty`);
  });
  at("screen").querySelector("[data-do=back]").disabled = !mayGoBack();
  at("screen").querySelector("[data-do=undo]").disabled = !undo.length;
  at("screen").querySelector("[data-do=reset]").disabled = ranking.every((name) => name === null);
  at("screen").querySelector("[data-do=next]").disabled = !isRanked();
}

// ---- ranking

function change(make, said) {
  const before = [...answer().places];
  make(answer().places);
  if (JSON.stringify(before) === JSON.stringify(answer().places)) return;
  undo.push(before);
  keep();
  draw();
  at("said").textContent = said;
}

function put(index, rank) {
  // the pictures between it and the nearest free place move up by one, so that there is never a tie
  const name = here().shown[index];
  change((ranking) => {
    if (ranking.includes(name)) ranking[ranking.indexOf(name)] = null;
    let free = ranking.indexOf(null, rank);
    if (free < 0) free = ranking.lastIndexOf(null, rank);
    ranking.splice(free, 1);
    ranking.splice(rank, 0, name);
  }, `Result ${LETTERS[index]}: place ${rank + 1}`);
}

function takeOff(name) {
  change((ranking) => (ranking[ranking.indexOf(name)] = null), `Result ${letter(name)}: no place`);
}

function toggle(index) {
  const name = here().shown[index], ranking = answer().places;
  if (ranking.includes(name)) takeOff(name);
  else put(index, ranking.indexOf(null));
}

function select(index) {
  current = index;
  draw();
  cards()[index].focus({ preventScroll: true });
}

function selectUnranked() {
  const { shown } = here(), ranking = answer().places;
  const order = shown.map((_, step) => (current + 1 + step) % shown.length);
  select(order.find((index) => !ranking.includes(shown[index])) ?? current);
}

// ---- from screen to screen

function countSeconds() {
  if (since === null || !rater || state.at >= rater.screens.length) return;
  answer().seconds += (performance.now() - since) / 1000;
  since = document.hidden ? null : performance.now();
}

// by one screen, so that nobody looks up an earlier answer to a repeated item
const mayGoBack = () => state.at > 0 && state.at === state.done;

function go(step) {
  countSeconds();
  state.at += step;
  state.done = Math.max(state.done, state.at);
  if (state.at >= rater.screens.length) state.finished = new Date().toISOString();
  keep();
  show();
}

const next = () => isRanked() && go(1);
const back = () => mayGoBack() && go(-1);

const actions = {
  back,
  next,
  undo() {
    if (undo.length) answer().places = undo.pop();
    keep();
    draw();
  },
  reset: () => change((ranking) => ranking.fill(null), "No result has a place"),
  zoom: () => zoom(!zoomed),
  leave() {
    rater = state = null;
    at("end").hidden = true;
    welcome();
  },
};

function zoom(on) {
  zoomed = on;
  at("screen").classList.toggle("zoomed", on);
  at("screen").querySelector("[data-do=zoom]").setAttribute("aria-pressed", String(on));
}

function look(x, y) {
  // every picture is enlarged at the same place, in fractions of its sides
  const within = (share) => `${100 * Math.min(Math.max(share, 0), 1)}%`;
  at("screen").style.setProperty("--x", within(x));
  at("screen").style.setProperty("--y", within(y));
}

function lookAt(event) {
  const frame = event.target.closest?.(".card, #given figure:first-child")?.querySelector(".frame");
  if (!frame) return;
  const box = frame.getBoundingClientRect();
  look((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
}

// ---- pointer

at("screen").addEventListener("click", (event) => {
  const held = event.target.closest(".card"), slot = event.target.closest(".place");
  if (event.detail && (justCarried || (zoomed && held))) return; // detail is 0 for a click by key
  if (held) {
    current = cards().indexOf(held);
    toggle(current);
    draw();
  } else if (slot) {
    const name = answer().places[places().indexOf(slot)];
    if (name !== null) takeOff(name);
  }
});

at("screen").addEventListener("pointerdown", (event) => {
  justCarried = false;
  if (zoomed && event.target.closest(".frame")) return lookAt(event);
  const held = event.target.closest(".card"), slot = event.target.closest(".place");
  const name = slot && answer().places[places().indexOf(slot)];
  if (event.button || !(held || name)) return;
  // a finger on a picture scrolls the page; on its letter, it carries it
  if (held && event.pointerType === "touch" && !event.target.closest(".grip")) return;
  const index = held ? cards().indexOf(held) : here().shown.indexOf(name);
  carried = { index, from: held ?? slot, pointer: event.pointerId, x: event.clientX, y: event.clientY, ghost: null };
});

addEventListener("pointermove", (event) => {
  if (zoomed) return lookAt(event);
  if (carried?.pointer !== event.pointerId) return;
  if (!carried.ghost) {
    if (Math.hypot(event.clientX - carried.x, event.clientY - carried.y) < 6) return;
    carried.from.setPointerCapture(event.pointerId);
    carried.ghost = document.createElement("img");
    carried.ghost.id = "ghost";
    carried.ghost.src = picture(here().shown[carried.index]);
    document.body.append(carried.ghost);
  }
  carried.ghost.style.left = `${event.clientX}px`;
  carried.ghost.style.top = `${event.clientY}px`;
  const under = placeUnder(event);
  places().forEach((one) => one.classList.toggle("over", one === under));
});

const placeUnder = (event) => document.elementFromPoint(event.clientX, event.clientY)?.closest(".place");

addEventListener("pointerup", (event) => {
  if (carried?.pointer !== event.pointerId) return;
  const { index, ghost, from } = carried;
  lay();
  if (!ghost) return;
  justCarried = true;
  const rank = places().indexOf(placeUnder(event)), name = here().shown[index];
  if (rank >= 0) put(index, rank);
  else if (from.classList.contains("place")) takeOff(name);
});
addEventListener("pointercancel", () => lay());

function lay() {
  carried?.ghost?.remove();
  carried = null;
  places().forEach((one) => one.classList.remove("over"));
}

// ---- keys

addEventListener("keydown", (event) => {
  if (!rater || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("summary, [data-save]")) return;
  const letterKey = event.key.toLowerCase();
  if (state.at >= rater.screens.length) return;
  const most = here().shown.length;
  const move = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (zoomed && move) {
    const now = ["--x", "--y"].map((name) => parseFloat(at("screen").style.getPropertyValue(name) || "50%") / 100);
    look(now[0] + move[0] / 10, now[1] + move[1] / 10);
  } else if (move) select((current + move[0] + move[1] + most) % most);
  else if (/^[1-9]$/.test(event.key) && event.key <= most) {
    put(current, event.key - 1);
    selectUnranked();
  } else if (event.key === "Enter" && isRanked() && !event.target.closest(".place, .tools")) next();
  else if (event.key === "Escape") zoom(false);
  else if (event.key === "Backspace" || letterKey === "u") actions.undo();
  else if (letterKey === "r") actions.reset();
  else if (letterKey === "z") actions.zoom();
  else if (letterKey === "b") back();
  else return;
  event.preventDefault();
});

at("results").addEventListener("focusin", (event) => {
  const index = cards().indexOf(event.target.closest(".card"));
  if (index >= 0 && index !== current) {
    current = index;
    draw();
  }
});

// ---- answers

function answers() {
  countSeconds();
  return rater.screens
    .filter((one) => one.role !== "practice" && state.answers[one.screen]?.places.every((name) => name !== null))
    .filter((one) => one.screen < state.done)
    .map(({ screen, item, role, question, shown }) => {
      const { places, seconds } = state.answers[screen];
      return { screen, item, role, question, shown, ranking: places, seconds: Math.round(10 * seconds) / 10 };
    });
}

function asJson() {
  const { started, finished } = state;
  const head = { format: "pbe-study-answers", version: 1, plan: study.digest, rater: rater.rater, judge: "human" };
  return JSON.stringify({ ...head, started, finished, answers: answers() }, null, 1) + "\n";
}

function asCsv() {
  const ranks = rater.screens[0].shown.map((_, index) => `rank_${index + 1}`);
  const head = ["plan", "rater", "judge", "screen", "item", "role", "question", ...ranks, "shown", "seconds"];
  const lines = answers().map((one) => [
    study.digest, rater.rater, "human", one.screen, one.item, one.role, one.question,
    ...one.ranking, one.shown.join(" "), one.seconds,
  ]);
  const cell = (value) => (/[",\r\n]/.test(value) ? `"${String(value).replaceAll('"', '""')}"` : value);
  return [head, ...lines].map((line) => line.map(cell).join(",") + "\n").join("");
}

function save(form) {
  const [text, type] = form === "json" ? [asJson(), "application/json"] : [asCsv(), "text/csv"];
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type }));
  link.download = `answers-${study.digest}-rater-${String(rater.rater).padStart(3, "0")}.${form}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

// ---- beginning

function welcome() {
  at("welcome").hidden = false;
  at("what").hidden = Boolean(study.without);
  at("without").textContent = study.without;
  if (study.without) return;
  const most = study.raters.length;
  const count = study.raters[0].screens.filter((one) => one.role !== "practice").length;
  at("length").textContent = `There are ${count} screens.`;
  at("rater").max = most;
  at("rater").value = /^#rater=(\d+)$/.exec(location.hash)?.[1] ?? "";
  at("rater").focus();
}

at("enter").addEventListener("submit", (event) => {
  event.preventDefault();
  begin(at("rater").valueAsNumber);
});
document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (button?.dataset.save) save(button.dataset.save);
  else if (button?.dataset.do) actions[button.dataset.do]();
});
document.addEventListener("visibilitychange", () => {
  if (!rater) return;
  if (document.hidden) {
    countSeconds();
    keep();
  } else if (since === null && state.at < rater.screens.length) since = performance.now();
});
addEventListener("pagehide", () => {
  if (!rater) return;
  countSeconds();
  keep();
});
// the same rater in another tab: the newest answers count
addEventListener("storage", (event) => {
  if (rater && event.key === key()) begin(rater.rater);
});
welcome();
