// The brush over the photo. Gradio gives: element, props, watch. The value is, from the server, the photo as a data
// address; from here, what was painted: a PNG of the photo's shown size, opaque where the hole is; "" for nothing.
const canvas = element.querySelector("canvas");
const hint = element.querySelector(".hint");
const size = element.querySelector("input[type=range]");
const tools = [...element.querySelectorAll("[data-tool]")];
const view = canvas.getContext("2d");
const hole = document.createElement("canvas"); // what is painted, opaque
const ink = hole.getContext("2d", { willReadFrequently: true });
const UNDO_MAX = 20;
let photo = null, tool = "brush", start = null, last = null, cursor = null, before = [], sent = "";

function draw(box) {
  if (!photo) return;
  view.globalAlpha = 1;
  view.drawImage(photo, 0, 0, canvas.width, canvas.height);
  view.globalAlpha = 0.6;
  view.drawImage(hole, 0, 0);
  if (box) {
    view.fillStyle = "#e8590c";
    view.fillRect(...box);
  }
  view.globalAlpha = 1;
  if (cursor) {
    view.beginPath();
    view.arc(cursor.x, cursor.y, radius(), 0, 7);
    view.lineWidth = 2 * pixel();
    view.strokeStyle = "#000";
    view.stroke();
    view.lineWidth = pixel();
    view.strokeStyle = "#fff";
    view.stroke();
  }
}

const pixel = () => canvas.width / (canvas.clientWidth || canvas.width); // of the screen, in the canvas's
const radius = () => (size.value / 2) * pixel();

function stroke(from, to) {
  ink.globalCompositeOperation = tool === "eraser" ? "destination-out" : "source-over";
  ink.strokeStyle = "#e8590c";
  ink.lineCap = ink.lineJoin = "round";
  ink.lineWidth = 2 * radius();
  ink.beginPath();
  ink.moveTo(from.x, from.y);
  ink.lineTo(to.x, to.y + (from.x === to.x && from.y === to.y ? 0.01 : 0));
  ink.stroke();
  ink.globalCompositeOperation = "source-over";
}

function boxOf(a, b) {
  const [x0, x1] = [a.x, b.x].map(Math.round).sort((p, q) => p - q);
  const [y0, y1] = [a.y, b.y].map(Math.round).sort((p, q) => p - q);
  return [x0, y0, x1 - x0, y1 - y0];
}

function keep() {
  before.push(ink.getImageData(0, 0, hole.width, hole.height));
  if (before.length > UNDO_MAX) before.shift();
}

function send() {
  const painted = ink.getImageData(0, 0, hole.width, hole.height).data.some((level, k) => k % 4 === 3 && level > 127);
  sent = painted ? hole.toDataURL("image/png") : "";
  props.value = sent;
}

function at(event) {
  const frame = canvas.getBoundingClientRect();
  return {
    x: ((event.clientX - frame.left) * canvas.width) / frame.width,
    y: ((event.clientY - frame.top) * canvas.height) / frame.height,
  };
}

canvas.addEventListener("pointerdown", (event) => {
  if (!photo || event.button) return;
  canvas.setPointerCapture(event.pointerId);
  keep();
  start = last = at(event);
  if (tool !== "box") stroke(last, last);
  draw();
});
canvas.addEventListener("pointermove", (event) => {
  cursor = tool === "box" ? null : at(event);
  if (start && tool !== "box") {
    for (const step of event.getCoalescedEvents?.() ?? [event]) {
      stroke(last, at(step));
      last = at(step);
    }
  }
  draw(start && tool === "box" ? boxOf(start, at(event)) : null);
});
function lift(event) {
  if (!start) return;
  if (tool === "box") {
    ink.fillStyle = "#e8590c";
    ink.fillRect(...boxOf(start, at(event)));
  }
  start = last = null;
  draw();
  send();
}
canvas.addEventListener("pointerup", lift);
canvas.addEventListener("pointercancel", lift);
canvas.addEventListener("pointerleave", () => { cursor = null; draw(); });

canvas.addEventListener("keydown", (event) => {
  if (!photo) return;
  const step = (event.shiftKey ? 1 : 10) * pixel();
  const move = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -step], ArrowDown: [0, step] }[event.key];
  cursor ??= { x: canvas.width / 2, y: canvas.height / 2 };
  if (move) {
    const from = { ...cursor };
    cursor.x = Math.min(Math.max(cursor.x + move[0], 0), canvas.width);
    cursor.y = Math.min(Math.max(cursor.y + move[1], 0), canvas.height);
    if (last && tool !== "box") stroke(from, cursor);
  } else if (event.key === " " || event.key === "Enter") {
    if (event.repeat) return event.preventDefault();
    if (tool === "box" && start) {
      ink.fillStyle = "#e8590c";
      ink.fillRect(...boxOf(start, cursor));
      start = null;
      send();
    } else {
      keep();
      if (tool === "box") start = { ...cursor };
      else { last = cursor; stroke(cursor, cursor); }
    }
  } else return;
  event.preventDefault();
  draw(start && tool === "box" ? boxOf(start, cursor) : null);
});
canvas.addEventListener("keyup", (event) => {
  if (last && !start && (event.key === " " || event.key === "Enter")) { last = null; send(); }
});
canvas.addEventListener("blur", () => { start = last = cursor = null; draw(); });

for (const button of tools)
  button.addEventListener("click", () => {
    tool = button.dataset.tool;
    for (const other of tools) other.setAttribute("aria-pressed", String(other === button));
  });
element.querySelector("[data-do=undo]").addEventListener("click", () => {
  const image = before.pop();
  if (!image) return;
  ink.putImageData(image, 0, 0);
  draw();
  send();
});
element.querySelector("[data-do=clear]").addEventListener("click", () => {
  if (!photo) return;
  keep();
  ink.clearRect(0, 0, hole.width, hole.height);
  draw();
  send();
});

watch("value", () => {
  const value = props.value;
  if (!value || value === sent || !value.startsWith("data:image/jpeg")) return;
  const image = new Image();
  image.onload = () => {
    photo = image;
    canvas.width = hole.width = image.naturalWidth;
    canvas.height = hole.height = image.naturalHeight;
    before = [];
    canvas.hidden = false;
    hint.hidden = true;
    draw();
    send();
  };
  image.src = value;
});
