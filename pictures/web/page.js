// What a page of one file contains beside its text: binary parts, packed.
"use strict";

async function part(name) {
  const text = document.getElementById(`part-${name}`)?.textContent;
  if (!text) return null;
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

/* The canvas, buttons and sliders about it become three planes and 3-D of the parts image.nii, mask.nii and the meshes:
   mesh.ply, or mesh_<id>.ply of each label. */
async function mountParts(box, {labels, low, high, given}) {
  const trouble = box.querySelector(".waiting");
  try {
    const code = document.createElement("script");
    code.textContent = new TextDecoder().decode(await part("niivue.js"));
    document.head.append(code);
    const [image, mask] = await Promise.all(["image.nii", "mask.nii"].map(part));
    const found = [...document.querySelectorAll('[id^="part-mesh"]')].map(({id}) => id.slice("part-".length));
    const idOf = (name) => Number(/_(\d+)/.exec(name)?.[1] ?? (given ? 0 : 1));
    const meshes = await Promise.all(found.map(async (name) => ({id: idOf(name), buffer: await part(name)})));
    const place = box.querySelector(".place");
    let volume = null;
    const moved = (mm) => {
      place.textContent = `R ${mm[0].toFixed(1)}  A ${mm[1].toFixed(1)}  S ${mm[2].toFixed(1)}`;
      volume?.setSliceAt(mm);
    };
    const dark = !document.documentElement.classList.contains("light");
    volume = await mountVolume(box.querySelector("canvas"), {image, mask, meshes, cuts: given, labels, moved, dark});
    volume.setWindow(low, high);
    moved(volume.place());
    trouble.hidden = true;
    for (const button of box.querySelectorAll("[data-layout]")) {
      button.addEventListener("click", () => {
        volume.setLayout(button.dataset.layout);
        for (const other of box.querySelectorAll("[data-layout]")) other.setAttribute("aria-pressed", other === button);
      });
    }
    const [opacity, outlined] = ["opacity", "outlined"].map((name) => box.querySelector(`.${name}`));
    const remask = () => opacity && volume.setMask(opacity.value * (outlined.checked ? 1 : 0.45), outlined.checked);
    for (const input of [opacity, outlined]) input?.addEventListener("input", remask);
    remask();
    for (const input of box.querySelectorAll(".label")) {
      input.addEventListener("change", () => {
        volume.setLabel(Number(input.dataset.id), input.checked);
        volume.setSliceAt(volume.place());
      });
    }
    const [level, width] = ["level", "width"].map((name) => box.querySelector(`.${name}`));
    const rewindow = () => {
      volume.setWindow(level.value - width.value / 2, Number(level.value) + width.value / 2);
      volume.setSliceAt(volume.place());
    };
    for (const slider of [level, width]) slider.addEventListener("input", rewindow);
    window.medgs = {volume};
  } catch (error) {
    trouble.textContent = `no 3-D here: ${error.message ?? error}`;
  }
}

/* Pictures of a sequence beside each other, moved by a slider, the wheel and the keys. */
function mountSlider(box, frames) {
  const bar = box.querySelector("input"), [ours, theirs] = box.querySelectorAll("img");
  const [left, right] = box.querySelectorAll("figcaption");
  const show = () => {
    const frame = frames[bar.value];
    ours.src = frame.ours;
    theirs.src = frame.theirs ?? "";
    theirs.style.visibility = frame.theirs ? "visible" : "hidden";
    left.textContent = frame.caption;
    right.textContent = frame.other;
  };
  bar.max = frames.length - 1;
  bar.value = Math.floor(frames.length / 2);
  bar.addEventListener("input", show);
  box.addEventListener("wheel", (event) => {
    event.preventDefault();
    bar.value = Number(bar.value) + Math.sign(event.deltaY);
    show();
  }, {passive: false});
  show();
}
