// The page: state in the address, slices on request, mouse and keyboard.
import {between, SliceView, unpack, viridis} from "./slices.js";

const $ = (id) => document.getElementById(id);
const PRESETS = {"Soft tissue": [40, 400], "Lung": [-600, 1500], "Bone": [400, 1800], "Brain": [40, 80],
  "Liver": [60, 160], "Mediastinum": [50, 350]};
const COMPARISONS = {frame: "Input frame", linear: "Linear interpolation", heldout: "Held-out frame",
  reference: "Reference volume"};
const ELLIPSES = 4000;
const client = Math.random().toString(36).slice(2, 12);

const about = await (await fetch("/api/about")).json();
const last = about.frames - 1;
const [windowLow, windowHigh] = about.window;
const span = windowHigh - windowLow;
const marks = [...Array(about.frames).keys(), ...about.heldout].sort((a, b) => a - b);
const state = {t: Math.floor(last / 2), level: (windowLow + windowHigh) / 2, width: span, mask: "outline", opacity: 0.9,
  against: "", how: "wipe", wipe: 0.5, ellipses: false, colour: "opacity", zoom: 1, panX: 0, panY: 0,
  theme: "dark", layout: "planes", u: (about.width - 1) / 2, v: (about.height - 1) / 2, hidden: ""}; // hidden: ids of labels, between dots
for (const [name, text] of new URLSearchParams(location.hash.slice(1))) {
  if (!(name in state)) continue;
  const value = {number: Number(text), boolean: text === "true", string: text}[typeof state[name]];
  if (!Number.isNaN(value)) state[name] = value;
}
if (about.ct && !location.hash.includes("level=")) [state.level, state.width] = PRESETS["Soft tissue"];
state.t = Math.min(Math.max(state.t, 0), last);
if (!about.comparisons.includes(state.against)) state.against = "";

const view = new SliceView($("picture"), about.width, about.height, about.pixel);
const isHidden = (id) => state.hidden.split(".").includes(String(id));
const showLabels = () => (view.labels = about.labels.filter(({id}) => !isHidden(id)));
view.soft = about.soft;
showLabels();
Object.assign(view, {zoom: state.zoom, pan: [state.panX, state.panY], wipe: state.wipe, cross: [state.u, state.v]});
let current = about, volume = null, asked = 0, shown = 0, running = null, cursor = null;

// ---- places: pixels of the frame at t and patient millimetres --------------------------------------------------------

const add = (a, b, times = 1) => a.map((value, i) => value + b[i] * times);
const minus = (a, b) => a.map((value, i) => value - b[i]);
const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
const cross3 = (a, b) => [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];

function originAt(t) {
  const before = Math.min(Math.floor(t), Math.max(last - 1, 0)), after = Math.min(before + 1, last);
  return add(about.origins[before], minus(about.origins[after], about.origins[before]), t - before);
}
const toPatient = (u, v, t) => add(add(originAt(t), about.column, u), about.row, v);

/* The inverse: frames are parallel, so their distance along the normal tells t. */
function toFrame(mm) {
  const normal = cross3(about.column, about.row);
  const depths = about.origins.map((origin) => dot(origin, normal));
  const sign = depths[last] >= depths[0] ? 1 : -1, wanted = dot(mm, normal) * sign;
  let t = 0;
  while (t < last - 1 && depths[t + 1] * sign < wanted) t++;
  if (last) t += (wanted - depths[t] * sign) / ((depths[t + 1] - depths[t]) * sign);
  t = Math.min(Math.max(t, 0), last);
  const inPlane = minus(mm, originAt(t));
  const [cc, cr, rr] = [dot(about.column, about.column), dot(about.column, about.row), dot(about.row, about.row)];
  const [pc, pr] = [dot(inPlane, about.column), dot(inPlane, about.row)], determinant = cc * rr - cr * cr;
  return [(pc * rr - pr * cr) / determinant, (pr * cc - pc * cr) / determinant, t];
}

// ---- the slice ---------------------------------------------------------------------------------------------------------

/* Requests the slice at the state's t. Earlier requests are abandoned, and the server drops them. */
async function ask() {
  const number = ++asked;
  running?.abort();
  running = new AbortController();
  const query = new URLSearchParams({t: state.t, n: number, client});
  if (state.against) query.set("against", state.against);
  if (state.ellipses) query.set("ellipses", ELLIPSES);
  const start = performance.now();
  try {
    const answer = await fetch(`/api/view?${query}`, {signal: running.signal});
    if (answer.status === 204) return;
    if (!answer.ok) throw new Error((await answer.json()).error);
    const data = unpack(await answer.arrayBuffer());
    if (number < shown) return;
    shown = number;
    data.header.roundTrip = performance.now() - start;
    view.data = data;
    $("trouble").hidden = true;
    paint();
    tell();
  } catch (error) {
    if (error.name === "AbortError") return;
    $("trouble").hidden = false;
    $("trouble").textContent = error instanceof TypeError ? "The viewer was stopped: start view.py again." : error.message;
  }
}

let painted = 0;
function paint() {
  cancelAnimationFrame(painted);
  painted = requestAnimationFrame(() => {
    const low = (state.level - state.width / 2 - windowLow) / span, high = (state.level + state.width / 2 - windowLow) / span;
    view.draw({...state, low, high});
    $("bottom-left").textContent = `L ${round(state.level)}  W ${round(state.width)}`;
    showSlice();
    remember();
  });
}

let moved = 0;
function moveTo(t, follow = true) {
  state.t = Math.min(Math.max(t, 0), last);
  $("t").value = state.t;
  tellWhere();
  cancelAnimationFrame(moved);
  moved = requestAnimationFrame(ask);
  if (follow) sync();
}

function round(value) {
  const size = Math.abs(value);
  return value.toFixed(size >= 100 || span > 200 ? 0 : size >= 10 ? 1 : 3);
}

function tellWhere() {
  const place = toPatient(0, 0, state.t);
  const depth = Math.hypot(...minus(place, about.origins[0]));
  const words = about.unit === "mm" ? `${depth.toFixed(2)} mm` : "";
  $("where").textContent = `frame ${state.t.toFixed(3)} of ${last}${words && ` · ${words}`}`;
  $("nifti").href = `/api/slice.nii?t=${state.t}`;
}

function tell() {
  const {header} = view.data, rows = [];
  rows.push(["Frame time", `${header.ms.toFixed(1)} ms`], ["Round trip", `${header.roundTrip.toFixed(0)} ms`]);
  rows.push(["Gaussians", current.gaussians.toLocaleString("en")], ["active here", header.active.toLocaleString("en")]);
  if (header.scores) {
    rows.push([header.scores.of, ""], ["PSNR", `${header.scores.psnr.toFixed(2)} dB`], ["SSIM", header.scores.ssim.toFixed(4)]);
    const {dice} = header.scores;
    if (typeof dice === "number") rows.push([about.soft ? "Dice of the mask" : "Mean Dice of labels", dice.toFixed(4)]);
  }
  $("numbers").replaceChildren(...rows.flatMap(([name, value]) => {
    const term = Object.assign(document.createElement("dt"), {textContent: name});
    return [term, Object.assign(document.createElement("dd"), {textContent: value})];
  }));
  $("corner-left").textContent = header.scores
    ? `${header.scores.of}\n${header.scores.psnr.toFixed(2)} dB, SSIM ${header.scores.ssim.toFixed(3)}` : "in between";
  $("compared").textContent = header.against
    ? `${header.against.words}${Math.abs(header.against.t - header.t) > 1e-4 ? `, at ${header.against.t.toFixed(2)}` : ""}` : "";
  const [low, high] = view.range(state.colour);
  const ends = {opacity: "0 to 1", head: "opacity in images to in masks",
    sigma: `${Math.exp(low).toFixed(3)} to ${Math.exp(high).toFixed(3)} of the sequence`}[state.colour];
  $("scale-words").textContent = header.gaussians
    ? `${ends}; ${Math.min(header.gaussians.active, ELLIPSES).toLocaleString("en")} shown` : "";
}

function tellCursor() {
  const {data} = view;
  if (!cursor || !data) return ($("bottom-right").textContent = "");
  const [u, v] = cursor.map(Math.round);
  if (u < 0 || v < 0 || u >= about.width || v >= about.height) return ($("bottom-right").textContent = "");
  const size = about.width * about.height, at = v * about.width + u;
  const values = [...Array(about.channels).keys()].map((c) => round(windowLow + data.image.data[at + c * size] * span));
  const mm = toPatient(...cursor, state.t).map((value) => value.toFixed(1));
  const inside = data.mask && (about.soft ? data.mask.data[at] >= 128 && "in the mask"
    : about.labels.find(({id}) => id === data.mask.data[at])?.name);
  const place = about.unit === "mm" ? `R ${mm[0]}  A ${mm[1]}  S ${mm[2]} mm` : "";
  $("bottom-right").textContent = `${values.join(" ")}${inside ? `  ${inside}` : ""}\n(${u}, ${v})\n${place}`;
}

// ---- the volume ---------------------------------------------------------------------------------------------------------

async function loadVolume() {
  $("waiting").hidden = false;
  $("waiting").firstElementChild.textContent = "rendering the volume";
  const watching = setInterval(async () => {
    const now = await (await fetch("/api/state")).json();
    $("waiting").querySelector("progress").value = now.volume;
  }, 400);
  const get = async (name) => (await fetch(`/api/volume/${name}`)).arrayBuffer();
  try {
    const image = await get("image.nii");
    const mask = about.masks ? await get("mask.nii") : null;
    const found = await (await fetch("/api/volume/meshes")).json(); // mesh.ply, or mesh_<id>.ply of each label
    const idOf = (name) => Number(/_(\d+)/.exec(name)?.[1] ?? (about.given ? 0 : 1));
    const meshes = await Promise.all(found.map(async (name) => ({id: idOf(name), buffer: await get(name)})));
    const canvas = $("volume").cloneNode(); // each checkpoint is a new scene
    $("volume").replaceWith(canvas);
    const {labels, given: cuts} = about;
    volume = await mountVolume(canvas, {image, mask, meshes, cuts, labels, dark: state.theme === "dark", moved: fromVolume});
    $("waiting").hidden = true;
    volume.setLayout(state.layout);
    volume.setWindow(state.level - state.width / 2, state.level + state.width / 2);
    setMask();
    for (const {id} of about.labels) if (isHidden(id)) volume.setLabel(id, false);
    $("cloud").hidden = !meshes.length;
    $("cloud").setAttribute("aria-pressed", volume.isCloud());
    sync();
    paint();
  } catch (error) {
    $("waiting").firstElementChild.textContent = `no volume: ${error.message ?? error}`;
    console.error(error);
  } finally {
    clearInterval(watching);
  }
}

/* The crosshair was moved in the volume. */
function fromVolume(mm) {
  const [u, v, t] = toFrame(mm);
  view.cross = [u, v];
  tellPlace(mm);
  moveTo(t, false);
}

/* The slice or its crosshair moved: the volume's follows. */
let synced = 0;
function sync() {
  if (!volume) return;
  cancelAnimationFrame(synced);
  synced = requestAnimationFrame(() => {
    const mm = toPatient(...view.cross, state.t);
    volume.goTo(mm);
    tellPlace(mm);
  });
}

function tellPlace(mm) {
  $("place").textContent = about.unit === "mm" ? `R ${mm[0].toFixed(1)}  A ${mm[1].toFixed(1)}  S ${mm[2].toFixed(1)} mm` : "";
}

/* The slice as it is drawn, with the mask's edge, through the mesh in 3-D. */
function showSlice() {
  if (!volume || !view.pixels) return;
  const {t} = view.data.header, corners = [[0, 0], [about.width - 1, 0], [0, about.height - 1]].map(([u, v]) => toPatient(u, v, t));
  volume.setSlice(corners, view.withEdges());
}

function setMask() {
  const outlined = state.mask === "outline";
  volume?.setMask(state.mask === "none" ? 0 : state.opacity * (outlined ? 1 : 0.45), outlined);
}

function setWindow(level, width) {
  Object.assign(state, {level, width: Math.max(width, span / 1000)});
  const preset = Object.keys(PRESETS).find((name) => PRESETS[name][0] === level && PRESETS[name][1] === width);
  $("preset").value = about.ct && preset ? preset : "";
  $("level").value = round(state.level);
  $("width").value = round(state.width);
  volume?.setWindow(state.level - state.width / 2, state.level + state.width / 2);
  paint();
}

// ---- the state in the address, colours, exports --------------------------------------------------------------------------

let remembered = 0;
function remember() {
  clearTimeout(remembered);
  remembered = setTimeout(() => {
    Object.assign(state, {zoom: view.zoom, panX: view.pan[0], panY: view.pan[1], wipe: view.wipe, u: view.cross[0], v: view.cross[1]});
    const short = Object.entries(state).map(([name, value]) => [name, typeof value === "number" ? +value.toFixed(4) : value]);
    history.replaceState(null, "", `#${new URLSearchParams(short)}`);
  }, 200);
}

function setTheme(theme) {
  state.theme = theme;
  document.documentElement.classList.toggle("light", theme === "light");
  $("theme").textContent = theme === "light" ? "Dark" : "Light";
  volume?.setDark(theme === "dark");
  drawMarks();
  remember();
}

function drawMarks() {
  const canvas = $("marks"), paint = canvas.getContext("2d"), css = getComputedStyle(document.documentElement);
  canvas.width = canvas.clientWidth * devicePixelRatio;
  canvas.height = canvas.clientHeight * devicePixelRatio;
  const inset = 8 * devicePixelRatio, x = (t) => inset + (t / Math.max(last, 1)) * (canvas.width - 2 * inset);
  paint.fillStyle = css.getPropertyValue("--faint");
  for (let k = 0; k <= last; k++) paint.fillRect(x(k) - 0.5, canvas.height * 0.35, 1.2 * devicePixelRatio, canvas.height * 0.65);
  paint.strokeStyle = css.getPropertyValue("--accent");
  paint.lineWidth = 1.3 * devicePixelRatio;
  const radius = Math.min(3.5 * devicePixelRatio, (canvas.width / marks.length) * 0.4);
  for (const t of about.heldout) {
    paint.beginPath();
    paint.arc(x(t), canvas.height * 0.3, radius, 0, 7);
    paint.stroke();
  }
}

function drawScale() {
  const paint = $("scale").getContext("2d"), scaled = state.colour === "head" ? between : viridis;
  for (let x = 0; x < 230; x++) {
    paint.fillStyle = `rgb(${scaled(x / 229)})`;
    paint.fillRect(x, 0, 1, 12);
  }
}

function savePicture() {
  $("picture").toBlob((blob) => {
    const link = Object.assign(document.createElement("a"), {href: URL.createObjectURL(blob)});
    link.download = `${about.name}_${state.t.toFixed(3)}.png`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
}

async function copyLink() {
  await new Promise((done) => setTimeout(done, 250)); // the address is updated shortly after the state
  await navigator.clipboard?.writeText(location.href);
  $("link").textContent = "Copied";
  setTimeout(() => ($("link").textContent = "Link"), 1200);
}

let following = 0;
function follow(on) {
  $("follow").setAttribute("aria-pressed", on);
  clearInterval(following);
  if (on) following = setInterval(takeNewest, 2000), takeNewest();
}

let taking = false;
async function takeNewest() {
  if (taking) return;
  taking = true;
  try {
    const now = await (await fetch("/api/state")).json();
    $("follow").textContent = now.training ? "Following training" : "Follow training";
    if (now.newest > now.iteration) {
      current = await (await fetch("/api/reload", {method: "POST"})).json();
      if (current.error) throw new Error(current.error);
      title();
      await ask();
      await loadVolume();
    }
  } finally {
    taking = false;
  }
}

function title() {
  document.title = `${about.name} – MedGS`;
  $("name").textContent = about.name;
  $("about").textContent = `iteration ${current.iteration.toLocaleString("en")} · ${current.gaussians.toLocaleString("en")} Gaussians · `
    + `${about.frames} frames of ${about.width} × ${about.height}`;
}

// ---- mouse and keyboard --------------------------------------------------------------------------------------------

function step(direction, fraction = 8) {
  moveTo(Math.round((state.t + direction / fraction) * fraction) / fraction);
}

function toMark(direction) {
  const there = direction > 0 ? marks.find((t) => t > state.t + 1e-6) : marks.findLast((t) => t < state.t - 1e-6);
  if (there !== undefined) moveTo(there);
}

let playing = 0;
function play() {
  const on = !playing;
  $("play").textContent = on ? "❚❚" : "▶";
  $("play").setAttribute("aria-pressed", on);
  if (!on) {
    cancelAnimationFrame(playing);
    playing = 0;
    return;
  }
  let before = performance.now(), direction = 1;
  const tick = (now) => {
    const next = state.t + (direction * Number($("speed").value) * (now - before)) / 1000;
    before = now;
    if (next >= last || next <= 0) direction = next >= last ? -1 : 1;
    moveTo(next);
    playing = requestAnimationFrame(tick);
  };
  playing = requestAnimationFrame(tick);
}

function zoomBy(factor) {
  view.zoom = Math.min(Math.max(view.zoom * factor, 0.5), 60);
  paint();
}

const canvasPlace = (event) => {
  const box = $("picture").getBoundingClientRect();
  return [(event.clientX - box.left) * devicePixelRatio, (event.clientY - box.top) * devicePixelRatio];
};

let drag = null;
$("picture").addEventListener("pointerdown", (event) => {
  const [x, y] = canvasPlace(event), {scale, left} = view.frame();
  const onWipe = state.against && state.how === "wipe" && Math.abs(x - left - view.wipe * about.width * scale) < 9 * devicePixelRatio;
  const kind = onWipe ? "wipe" : event.button === 2 ? "zoom" : event.button === 1 || event.shiftKey ? "pan" : "window";
  drag = {kind, x, y, start: [x, y], far: false};
  $("picture").setPointerCapture(event.pointerId);
  $("picture").focus();
  event.preventDefault();
});
$("picture").addEventListener("pointermove", (event) => {
  const [x, y] = canvasPlace(event);
  cursor = view.pixelAt(x, y);
  tellCursor();
  if (!drag) return;
  const [dx, dy] = [x - drag.x, y - drag.y], {scale, left} = view.frame();
  Object.assign(drag, {x, y, far: drag.far || Math.hypot(x - drag.start[0], y - drag.start[1]) > 3});
  if (!drag.far) return;
  if (drag.kind === "window") setWindow(state.level + (dy * span) / 400, state.width + (dx * span) / 400);
  if (drag.kind === "zoom") zoomBy(1.005 ** -dy);
  if (drag.kind === "pan") view.pan = [view.pan[0] + dx / scale, view.pan[1] + dy / scale];
  if (drag.kind === "wipe") view.wipe = Math.min(Math.max((x - left) / (about.width * scale), 0), 1);
  paint();
});
$("picture").addEventListener("pointerup", (event) => {
  if (drag && !drag.far && drag.kind === "window") {
    const [u, v] = view.pixelAt(...canvasPlace(event));
    view.cross = [Math.min(Math.max(u, 0), about.width - 1), Math.min(Math.max(v, 0), about.height - 1)];
    sync();
    paint();
  }
  drag = null;
});
$("picture").addEventListener("pointerleave", () => {
  cursor = null;
  tellCursor();
});
$("picture").addEventListener("contextmenu", (event) => event.preventDefault());
$("picture").addEventListener("dblclick", () => (view.fit(), paint()));
$("picture").addEventListener("wheel", (event) => {
  event.preventDefault();
  if (event.ctrlKey) zoomBy(1.0015 ** -event.deltaY);
  else step(Math.sign(event.deltaY));
}, {passive: false});

const cycle = (id) => {
  const choice = $(id);
  choice.selectedIndex = (choice.selectedIndex + 1) % choice.options.length;
  choice.dispatchEvent(new Event("change"));
};
const KEYS = {ArrowLeft: () => step(-1), ArrowRight: () => step(1), ArrowUp: () => toMark(1), ArrowDown: () => toMark(-1),
  PageUp: () => toMark(1), PageDown: () => toMark(-1), Home: () => moveTo(0), End: () => moveTo(last), " ": play,
  "+": () => zoomBy(1.2), "=": () => zoomBy(1.2), "-": () => zoomBy(1 / 1.2), 0: () => (view.fit(), paint()),
  m: () => cycle("mask"), c: () => cycle("against"), g: () => $("ellipses").click(), f: () => $("follow").click(),
  d: () => $("theme").click(), s: savePicture, "?": () => $("keys").showModal(),
  r: () => setWindow((windowLow + windowHigh) / 2, span)};
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || /^(SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
  if (event.target.type === "number" || (event.target.tagName === "BUTTON" && event.key === " ")) return;
  const act = KEYS[event.key] ?? KEYS[event.key.toLowerCase()];
  if (!act || $("keys").open) return;
  event.preventDefault();
  act();
});

// ---- wiring ---------------------------------------------------------------------------------------------------------------

const bind = (id, name, then) => {
  const input = $(id), box = input.type === "checkbox";
  box ? (input.checked = state[name]) : (input.value = state[name]);
  input.addEventListener(input.type === "range" ? "input" : "change", () => {
    state[name] = box ? input.checked : typeof state[name] === "number" ? Number(input.value) : input.value;
    then();
  });
};
const options = (id, entries) => $(id).replaceChildren(...entries.map(([value, text]) => new Option(text, value)));
options("against", [["", "Nothing"], ...about.comparisons.map((name) => [name, COMPARISONS[name]])]);
options("preset", [["", "Window of the frames"], ...(about.ct ? Object.keys(PRESETS).map((name) => [name, name]) : [])]);
$("preset").addEventListener("change", () => {
  const [level, width] = PRESETS[$("preset").value] ?? [(windowLow + windowHigh) / 2, span];
  setWindow(level, width);
});
$("mask-controls").hidden = !about.masks;
$("compare-controls").hidden = !about.comparisons.length;
const boxes = about.labels.map(({id, name, colour}) => {
  const item = document.createElement("li"), spot = document.createElement("i"), line = document.createElement("label");
  const box = Object.assign(document.createElement("input"), {type: "checkbox", checked: !isHidden(id)});
  spot.style.background = colour;
  line.append(box, spot, name);
  item.append(line);
  box.addEventListener("change", () => {
    const ids = state.hidden.split(".").filter((other) => other && other !== String(id));
    state.hidden = [...ids, ...(box.checked ? [] : [id])].join(".");
    showLabels();
    volume?.setLabel(id, box.checked);
    paint();
  });
  return {item, box};
});
$("labels").replaceChildren(...boxes.map(({item}) => item));
$("all-labels").hidden = about.labels.length < 3;
for (const [button, on] of [["all", true], ["none", false]]) {
  $(button).addEventListener("click", () => boxes.forEach(({box}) => box.checked === on || box.click()));
}
bind("level", "level", () => setWindow(state.level, state.width));
bind("width", "width", () => setWindow(state.level, state.width));
bind("mask", "mask", () => (setMask(), paint()));
bind("opacity", "opacity", () => (setMask(), paint()));
bind("against", "against", ask);
bind("how", "how", paint);
bind("ellipses", "ellipses", ask);
bind("colour", "colour", () => (drawScale(), paint(), tell()));
$("t").max = last;
$("t").addEventListener("input", () => moveTo(Number($("t").value)));
for (const [id, act] of Object.entries({play, save: savePicture, link: copyLink, help: () => $("keys").showModal()})) {
  $(id).addEventListener("click", act);
}
$("theme").addEventListener("click", () => setTheme(state.theme === "light" ? "dark" : "light"));
$("follow").addEventListener("click", () => follow($("follow").getAttribute("aria-pressed") !== "true"));
$("cloud").addEventListener("click", () => {
  volume?.setCloud(!volume.isCloud());
  $("cloud").setAttribute("aria-pressed", volume?.isCloud());
});
for (const button of document.querySelectorAll("[data-layout]")) {
  button.addEventListener("click", () => {
    state.layout = button.dataset.layout;
    for (const other of document.querySelectorAll("[data-layout]")) other.setAttribute("aria-pressed", other === button);
    volume?.setLayout(state.layout);
    remember();
  });
}
new ResizeObserver(() => {
  const canvas = $("picture");
  canvas.width = canvas.clientWidth * devicePixelRatio;
  canvas.height = canvas.clientHeight * devicePixelRatio;
  drawMarks();
  paint();
}).observe($("slice"));

if (about.heads.length < 2) $("colour").querySelector("[value=head]").remove();
if (!$("colour").value) $("colour").value = state.colour = "opacity";
title();
drawScale();
setTheme(state.theme);
setWindow(state.level, state.width);
moveTo(state.t);
loadVolume();

// For the console and the tests.
window.medgs = {state, view, about, ask, moveTo, toPatient, toFrame, volume: () => volume};
