// Three planes and 3-D of a volume, its mask and a mesh, by NiiVue. Places are patient millimetres (RAS).
"use strict";

/* canvas: to draw on. parts: image and mask (NIfTI) and mesh (PLY, RAS), an ArrayBuffer each; mask and mesh may be
   missing. labels: [{id, name, colour}] of the mask. moved(mm): called where the crosshair was put.
   Resolves to what the page may do with it. */
async function mountVolume(canvas, {image, mask, mesh, labels = [], moved = () => {}, dark = true}) {
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
  if (mask) {
    await nv.addVolumeFromUrl({url: "mask.nii", name: "mask.nii", buffer: mask, opacity: 0.35});
    const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));
    const table = {R: [0], G: [0], B: [0], A: [0], I: [0], labels: ["outside"]};
    for (const {id, name, colour} of labels) {
      const [r, g, b] = rgb(colour);
      table.R.push(r), table.G.push(g), table.B.push(b), table.A.push(255), table.I.push(id), table.labels.push(name);
    }
    nv.volumes[1].setColormapLabel(table);
    nv.updateGLVolume();
  }
  if (mesh) {
    const rgba255 = [...(labels.length === 1 ? [1, 3, 5].map((i) => parseInt(labels[0].colour.slice(i, i + 2), 16))
      : [230, 170, 130]), 255];
    await nv.addMeshFromUrl({url: "mesh.ply", name: "mesh.ply", buffer: mesh, rgba255});
    nv.setMeshThicknessOn2D(Math.min(...nv.volumes[0].pixDimsRAS.slice(1, 4)));
    nv.opts.meshXRay = 0.04;
  }
  // The current slice as a thin frame about the mesh; its corners are moved, so it is made once.
  let frame = null;
  const setFrame = async (corners) => {
    const middle = corners[0].map((value, axis) => (value + corners[2][axis]) / 2);
    const points = [...corners, ...corners.map((corner) => corner.map((value, i) => middle[i] + 0.98 * (value - middle[i])))];
    if (!frame) {
      const sides = [[1, 2, 6, 5], [2, 3, 7, 6], [3, 4, 8, 7], [4, 1, 5, 8]];
      const faces = sides.map(([a, b, c, d]) => `f ${a} ${b} ${c}\nf ${a} ${c} ${d}\nf ${c} ${b} ${a}\nf ${d} ${c} ${a}\n`);
      const text = points.map((point) => `v ${point.join(" ")}\n`).join("") + faces.join("");
      const buffer = new TextEncoder().encode(text).buffer;
      frame = await nv.addMeshFromUrl({url: "slice.obj", name: "slice.obj", buffer, rgba255: [86, 180, 233, 255]});
    }
    points.flat().forEach((value, at) => (frame.pts[at] = value));
    frame.updateMesh(nv.gl);
  };
  const layouts = {
    planes: niivue.SLICE_TYPE.MULTIPLANAR, axial: niivue.SLICE_TYPE.AXIAL, coronal: niivue.SLICE_TYPE.CORONAL,
    sagittal: niivue.SLICE_TYPE.SAGITTAL, solid: niivue.SLICE_TYPE.RENDER,
  };
  nv.setRenderAzimuthElevation(120, 12);
  nv.setScale(0.85);
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
    setFrame,
    setWindow(low, high) {
      Object.assign(nv.volumes[0], {cal_min: low, cal_max: high});
      nv.updateGLVolume();
    },
    setMask(opacity) {
      if (mask) nv.setOpacity(1, opacity);
    },
    setLayout: (name) => nv.setSliceType(layouts[name]),
    setDark(on) {
      nv.opts.backColor = backgrounds[on];
      nv.drawScene();
    },
    redraw: () => nv.drawScene(),
  };
}
