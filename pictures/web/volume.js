// Three planes and 3-D of a volume, its mask and its meshes, by NiiVue. Places are patient millimetres (RAS).
"use strict";

const bytesOf = (colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));
const MOST_VERTICES = 192; // of the slice in 3-D, along a side
const SEE_THROUGH = 0.5; // opacity of meshes about it

/* canvas: to draw on. parts: image and mask (NIfTI), an ArrayBuffer each, and meshes [{id, buffer}] (PLY, RAS), id
   that of the label they enclose; mask may be missing. cuts: whether meshes show on the planes too, as those
   do that were not made from the mask. labels: [{id, name, colour}] of the mask. moved(mm): called
   where the crosshair was put. Resolves to what the page may do with it. */
async function mountVolume(canvas, {image, mask, meshes = [], cuts = false, labels = [], moved = () => {}, dark = true}) {
  const backgrounds = {true: [0.06, 0.075, 0.09, 1], false: [1, 1, 1, 1]};
  const nv = new niivue.Niivue({
    backColor: backgrounds[dark],
    crosshairColor: [0.34, 0.71, 0.91, 1],
    crosshairWidth: 0.4,
    fontColor: [0.6, 0.65, 0.7, 1],
    isRadiologicalConvention: true,
    isSliceMM: true,
    show3Dcrosshair: true,
    multiplanarShowRender: niivue.SHOW_RENDER.ALWAYS,
    multiplanarLayout: niivue.MULTIPLANAR_TYPE.GRID,
    dragAndDropEnabled: false,
    logLevel: "error",
    loadingText: "",
  });
  let quiet = false; // while the page itself moves the crosshair
  nv.onLocationChange = (place) => quiet || moved(Array.from(place.mm).slice(0, 3));
  await nv.attachToCanvas(canvas);
  nv.setSliceType(niivue.SLICE_TYPE.MULTIPLANAR);
  await nv.addVolumeFromUrl({url: "image.nii", name: "image.nii", buffer: image, colormap: "gray"});
  if (mask) await nv.addVolumeFromUrl({url: "mask.nii", name: "mask.nii", buffer: mask, opacity: 0.35});
  const hidden = new Set(); // ids of labels

  const plane = slicePlane(nv);
  for (const {id, buffer} of meshes) {
    const label = labels.find((other) => other.id === id);
    const rgba255 = [...(label ? bytesOf(label.colour) : [230, 170, 130]), 255];
    const mesh = await nv.addMeshFromUrl({url: "mesh.ply", name: `${id}.ply`, buffer, rgba255, opacity: SEE_THROUGH});
    nv.setMeshShader(mesh.id, "Matte");
  }
  const solids = nv.meshes.slice(1);
  nv.setMeshThicknessOn2D(cuts ? 0.5 * Math.min(...nv.volumes[0].pixDimsRAS.slice(1, 4)) : 0);
  // In 3-D: the meshes with the slice through them, or the volume; the slice is not drawn on the planes.
  let cloudy = !solids.length;
  const [drawMeshes, drawCloud] = [nv.drawMesh3D.bind(nv), nv.drawImage3D.bind(nv)];
  nv.drawMesh3D = (tested, alpha, m, model, normal, flat) => {
    plane.mesh.visible = plane.shown && !flat;
    for (const solid of solids) solid.opacity = flat ? 1 : SEE_THROUGH;
    drawMeshes(tested, alpha, m, model, normal, flat);
  };
  nv.drawImage3D = (...rest) => cloudy && drawCloud(...rest);

  const colourLabels = () => {
    if (!mask) return;
    const table = {R: [0], G: [0], B: [0], A: [0], I: [0], labels: ["outside"]};
    for (const {id, name, colour} of labels) {
      const [r, g, b] = bytesOf(colour);
      table.R.push(r), table.G.push(g), table.B.push(b), table.A.push(255), table.I.push(id), table.labels.push(name);
    }
    nv.volumes[1].setColormapLabel(table);
    nv.volumes[1].hdr.intent_code = 1002; // labels, which NiiVue outlines
    nv.updateGLVolume();
  };
  const ids = mask ? nv.volumes[1].img : null;
  const hideLabels = () => {
    if (!mask) return;
    nv.volumes[1].img = hidden.size ? ids.map((id) => (hidden.has(id) ? 0 : id)) : ids;
    nv.updateGLVolume();
  };
  colourLabels();
  const layouts = {
    planes: niivue.SLICE_TYPE.MULTIPLANAR, axial: niivue.SLICE_TYPE.AXIAL, coronal: niivue.SLICE_TYPE.CORONAL,
    sagittal: niivue.SLICE_TYPE.SAGITTAL, solid: niivue.SLICE_TYPE.RENDER,
  };
  nv.setRenderAzimuthElevation(120, 28);
  nv.setScale(0.9);
  return {
    nv,
    place: () => Array.from(nv.frac2mm(nv.scene.crosshairPos, 0, true)).slice(0, 3),
    goTo(mm) {
      quiet = true;
      nv.scene.crosshairPos = nv.mm2frac(mm, 0, true);
      nv.createOnLocationChange();
      quiet = false;
      nv.drawScene();
    },
    /* The slice in 3-D, out of the volume: the one nearest to a place. */
    setSliceAt(mm) {
      const found = sliceOf(nv, mm, labels.filter(({id}) => !hidden.has(id)));
      plane.set(found.corners, found.pixels);
      nv.drawScene();
    },
    /* The slice in 3-D. corners: millimetres of the pixels (0, 0), (width - 1, 0) and (0, height - 1). pixels: an
       ImageData of that size. */
    setSlice(corners, pixels) {
      plane.set(corners, pixels);
      nv.drawScene();
    },
    setWindow(low, high) {
      Object.assign(nv.volumes[0], {cal_min: low, cal_max: high});
      nv.updateGLVolume();
    },
    /* outlined: the mask's edge alone. */
    setMask(opacity, outlined = false) {
      if (!mask) return;
      nv.opts.atlasOutline = outlined ? opacity : 0;
      nv.setOpacity(1, outlined ? 0 : opacity);
    },
    setLabel(id, on) {
      on ? hidden.delete(id) : hidden.add(id);
      solids.forEach((solid, k) => meshes[k].id === id && (solid.visible = on));
      hideLabels();
    },
    setCloud(on) {
      cloudy = on;
      nv.drawScene();
    },
    isCloud: () => cloudy,
    setLayout: (name) => nv.setSliceType(layouts[name]),
    setDark(on) {
      nv.opts.backColor = backgrounds[on];
      nv.drawScene();
    },
    redraw: () => nv.drawScene(),
  };
}

/* The windowed slice of the volume nearest to a place, with the labels' edges, and where it lies. */
function sliceOf(nv, mm, labels) {
  const [volume, mask] = nv.volumes, [, width, height, depth] = volume.hdr.dims, {affine} = volume.hdr;
  const column = (k) => [0, 1, 2].map((i) => affine[i][k]), [right, bottom, up, origin] = [0, 1, 2, 3].map(column);
  const normal = [0, 1, 2].map((i) => right[(i + 1) % 3] * bottom[(i + 2) % 3] - right[(i + 2) % 3] * bottom[(i + 1) % 3]);
  const along = (a) => a.reduce((sum, value, i) => sum + value * normal[i], 0);
  const k = Math.min(Math.max(Math.round(along(mm.map((value, i) => value - origin[i])) / along(up)), 0), depth - 1);
  const at = (u, v) => origin.map((value, i) => value + u * right[i] + v * bottom[i] + k * up[i]);
  const pixels = new ImageData(width, height), first = k * width * height;
  const {cal_min: low, cal_max: high, img, hdr: {scl_slope: slope, scl_inter: intercept}} = volume;
  for (let pixel = 0; pixel < width * height; pixel++) {
    const level = (255 * (img[first + pixel] * slope + intercept - low)) / Math.max(high - low, 1e-9);
    pixels.data.set([level, level, level, 255], 4 * pixel);
  }
  const rgb = new Map(mask ? labels.map(({id, colour}) => [id, bytesOf(colour)]) : []);
  for (let pixel = width; mask && pixel < width * (height - 1); pixel++) {
    const id = mask.img[first + pixel], others = [-1, 1, -width, width].map((step) => mask.img[first + pixel + step]);
    if (rgb.has(id) && others.some((other) => other !== id)) pixels.data.set(rgb.get(id), 4 * pixel);
  }
  return {corners: [at(0, 0), at(width - 1, 0), at(0, height - 1)], pixels};
}

/* A slice as a mesh of its pixels, coloured by vertex, which can be seen from both sides. */
function slicePlane(nv) {
  const shader = nv.setCustomMeshShader(`#version 300 es
precision highp int;
precision highp float;
uniform float opacity;
in vec4 vClr;
out vec4 color;
void main() {
  color = vec4(vClr.rgb, opacity);
}`, "Unlit");
  const bytes = (count) => new Uint8Array(4 * count).fill(255);
  const middle = Array.from(nv.frac2mm([0.5, 0.5, 0.5], 0, true)).slice(0, 3); // within the scene, until it is set
  const pts = new Float32Array([...middle, ...middle, ...middle]);
  const mesh = new niivue.NVMesh(pts, new Uint32Array([0, 1, 2]), "slice", bytes(3), 1, false, nv.gl);
  mesh.meshShaderIndex = shader;
  nv.addMesh(mesh);
  const plane = {mesh, shown: false, size: ""};
  plane.set = ([origin, right, bottom], {data, width, height}) => {
    const step = Math.ceil(Math.max(width, height) / MOST_VERTICES);
    const lines = (side) => [...Array(Math.ceil((side - 1) / step) + 1).keys()].map((k) => Math.min(k * step, side - 1));
    const [columns, rows] = [lines(width), lines(height)], across = columns.length;
    const pts = new Float32Array(3 * across * rows.length), rgba = bytes(across * rows.length);
    let at = 0;
    for (const v of rows) {
      for (const u of columns) {
        const [x, y] = [u / Math.max(width - 1, 1), v / Math.max(height - 1, 1)];
        for (let i = 0; i < 3; i++) {
          pts[3 * at + i] = origin[i] + x * (right[i] - origin[i]) + y * (bottom[i] - origin[i]);
          rgba[4 * at + i] = data[4 * (v * width + u) + i];
        }
        at++;
      }
    }
    if (plane.size !== `${across} ${rows.length}`) {
      plane.size = `${across} ${rows.length}`;
      const tris = [];
      for (let row = 0; row + 1 < rows.length; row++) {
        for (let column = 0; column + 1 < across; column++) {
          const a = row * across + column, b = a + 1, c = a + across, d = c + 1;
          tris.push(a, b, c, b, d, c, a, c, b, b, c, d);
        }
      }
      mesh.tris = new Uint32Array(tris);
    }
    Object.assign(mesh, {pts, rgba255: rgba});
    mesh.updateMesh(nv.gl);
    plane.shown = true;
  };
  return plane;
}
