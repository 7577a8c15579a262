// One slice on a canvas: windowed pixels, a comparison beside, across or subtracted, outlines, ellipses, crosshair.

const VIRIDIS = [[68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142], [31, 158, 137], [53, 183, 121],
  [109, 205, 89], [180, 222, 44], [253, 231, 37]];

export function viridis(share) {
  const at = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1);
  const below = Math.min(Math.floor(at), VIRIDIS.length - 2);
  return VIRIDIS[below].map((low, c) => Math.round(low + (VIRIDIS[below + 1][c] - low) * (at - below)));
}

const bytesOf = (colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));

/* From one head of the model to the other: blue by way of grey to orange. */
export function between(share) {
  const at = Math.min(Math.max(share, 0), 1), ends = [[86, 180, 233], [150, 150, 150], [230, 159, 0]];
  const [from, to, part] = at < 0.5 ? [ends[0], ends[1], 2 * at] : [ends[1], ends[2], 2 * at - 1];
  return from.map((low, c) => Math.round(low + (to[c] - low) * part));
}

/* A header and arrays, as the server packs them. */
export function unpack(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const kinds = {float32: Float32Array, uint8: Uint8Array, uint16: Uint16Array};
  let at = 4 + length;
  const arrays = {};
  for (const {name, dtype, shape} of header.arrays) {
    const count = shape.reduce((product, side) => product * side, 1);
    const data = new kinds[dtype](buffer, at, count);
    arrays[name] = {data, shape};
    at += Math.ceil(data.byteLength / 4) * 4;
  }
  return {header, ...arrays};
}

/* (C, H, W) values in [0, 1] -> RGBA bytes, those from low to high spread from black to white. */
export function windowed({data, shape}, low, high) {
  const [channels, height, width] = shape, size = height * width;
  const out = new Uint8ClampedArray(4 * size), scale = 255 / Math.max(high - low, 1e-9);
  for (let pixel = 0; pixel < size; pixel++) {
    for (let c = 0; c < 3; c++) out[4 * pixel + c] = (data[pixel + (channels === 1 ? 0 : c) * size] - low) * scale;
    out[4 * pixel + 3] = 255;
  }
  return new ImageData(out, width, height);
}

/* Where the first is above (orange) or below (blue) the second; full colour at ``most``. */
export function difference(ours, theirs, most) {
  const [channels, height, width] = ours.shape, size = height * width;
  const out = new Uint8ClampedArray(4 * size);
  for (let pixel = 0; pixel < size; pixel++) {
    let sum = 0;
    for (let c = 0; c < channels; c++) {
      sum += ours.data[pixel + c * size] - theirs.data[pixel + Math.min(c, theirs.shape[0] - 1) * size];
    }
    const share = Math.min(Math.max(sum / channels / most, -1), 1), strength = Math.abs(share);
    const colour = share > 0 ? [255, 159, 0] : [64, 165, 255];
    for (let c = 0; c < 3; c++) out[4 * pixel + c] = colour[c] * strength;
    out[4 * pixel + 3] = 255;
  }
  return new ImageData(out, width, height);
}

/* Marching squares: segments [u, v, u, v] in px along which ``inside(value)`` (H, W) crosses 0.5. */
export function outline(values, width, height) {
  const segments = [];
  for (let row = 0; row < height - 1; row++) {
    for (let column = 0; column < width - 1; column++) {
      const at = row * width + column;
      const a = values[at], b = values[at + 1], c = values[at + width + 1], d = values[at + width];
      const kind = (a >= 0.5) | ((b >= 0.5) << 1) | ((c >= 0.5) << 2) | ((d >= 0.5) << 3);
      if (kind === 0 || kind === 15) continue;
      const cross = (p, q) => (0.5 - p) / (q - p);
      const top = [column + cross(a, b), row], right = [column + 1, row + cross(b, c)];
      const bottom = [column + cross(d, c), row + 1], left = [column, row + cross(a, d)];
      const pairs = {1: [left, top], 2: [top, right], 3: [left, right], 4: [right, bottom], 6: [top, bottom],
        7: [left, bottom], 8: [bottom, left], 9: [bottom, top], 11: [bottom, right], 12: [right, left], 13: [right, top],
        14: [top, left]};
      if (kind === 5) segments.push([...left, ...top], [...right, ...bottom]);
      else if (kind === 10) segments.push([...top, ...right], [...bottom, ...left]);
      else segments.push([...pairs[kind][0], ...pairs[kind][1]]);
    }
  }
  return segments;
}

/* RGBA of one colour where ``values`` are 0.5 and more. */
function filled(values, width, height, colour) {
  const out = new Uint8ClampedArray(4 * width * height);
  const rgb = bytesOf(colour);
  for (let pixel = 0; pixel < width * height; pixel++) if (values[pixel] >= 0.5) out.set([...rgb, 255], 4 * pixel);
  return new ImageData(out, width, height);
}

export class SliceView {
  /* pixel: width and height of a pixel, mm. */
  constructor(canvas, width, height, pixel) {
    Object.assign(this, {canvas, width, height, zoom: 1, pan: [0, 0], wipe: 0.5, cross: null, labels: [], soft: true});
    this.aspect = pixel[1] / pixel[0];
    this.context = canvas.getContext("2d");
    this.buffers = [0, 1, 2].map(() => Object.assign(document.createElement("canvas"), {width, height}));
    this.data = null;
  }

  fit() {
    Object.assign(this, {zoom: 1, pan: [0, 0]});
  }

  panels() {
    return this.data?.other && this.state.how === "beside" ? 2 : 1;
  }

  /* Canvas px: per pixel, of the top left corner of panel 0, and across a panel. */
  frame() {
    const {width, height} = this.canvas, panel = width / this.panels();
    const scale = Math.min(panel / this.width, height / (this.height * this.aspect)) * 0.96 * this.zoom;
    const left = panel / 2 - (this.width * scale) / 2 + this.pan[0] * scale;
    const top = height / 2 - (this.height * this.aspect * scale) / 2 + this.pan[1] * scale;
    return {scale, left, top, panel};
  }

  /* Canvas px -> pixel (u, v), centres on integers. */
  pixelAt(x, y) {
    const {scale, left, top, panel} = this.frame();
    return [((x % panel) - left) / scale - 0.5, (y - top) / (scale * this.aspect) - 0.5];
  }

  draw(state) {
    this.state = state;
    const {context: paint, canvas, data} = this;
    paint.setTransform(1, 0, 0, 1, 0, 0);
    paint.fillStyle = "#000";
    paint.fillRect(0, 0, canvas.width, canvas.height);
    if (!data) return;
    const [ours, theirs] = this.buffers.slice(0, 2).map((buffer) => buffer.getContext("2d"));
    const compared = data.other && state.against ? state.how : null;
    this.pixels = windowed(data.image, state.low, state.high);
    ours.putImageData(compared === "difference" ? difference(data.image, data.other, 0.25) : this.pixels, 0, 0);
    if (compared === "wipe" || compared === "beside") theirs.putImageData(windowed(data.other, state.low, state.high), 0, 0);
    const {scale, left, top, panel} = this.frame();
    paint.imageSmoothingEnabled = scale < 6;
    paint.imageSmoothingQuality = "high";
    const put = (buffer, x) => paint.drawImage(buffer, left + x, top, this.width * scale, this.height * scale * this.aspect);
    for (let shown = 0; shown < this.panels(); shown++) {
      paint.save();
      paint.beginPath();
      paint.rect(shown * panel, 0, panel, canvas.height);
      paint.clip();
      put(this.buffers[shown], shown * panel);
      if (compared === "wipe") {
        const edge = left + this.wipe * this.width * scale;
        paint.save();
        paint.beginPath();
        paint.rect(edge, 0, canvas.width, canvas.height);
        paint.clip();
        put(this.buffers[1], 0);
        paint.restore();
        paint.fillStyle = "#56b4e9";
        paint.fillRect(edge - 1, 0, 2, canvas.height);
        paint.beginPath();
        paint.arc(edge, canvas.height / 2, 7, 0, 7);
        paint.fill();
      }
      // In pixels, centres on integers.
      paint.setTransform(scale, 0, 0, scale * this.aspect, left + shown * panel + scale / 2, top + (scale * this.aspect) / 2);
      if (shown === 0) this.overlays(state, scale);
      paint.restore();
      paint.setTransform(1, 0, 0, 1, 0, 0);
    }
    if (compared === "wipe" || compared === "beside") {
      paint.font = `${13 * devicePixelRatio}px system-ui, sans-serif`;
      paint.fillStyle = "#56b4e9";
      const y = canvas.height - 34 * devicePixelRatio;
      const wipe = compared === "wipe", middle = left + this.wipe * this.width * scale;
      paint.textAlign = wipe ? "right" : "center";
      paint.fillText("ours", wipe ? middle - 10 : panel / 2, y);
      paint.textAlign = wipe ? "left" : "center";
      paint.fillText(data.header.against.words, wipe ? middle + 10 : panel * 1.5, y);
    }
  }

  /* The windowed slice with the masks' edges drawn on, as an ImageData. */
  withEdges() {
    const {pixels, data: {mask}, width, height} = this;
    if (!mask || this.state.mask === "none") return pixels;
    const out = new ImageData(new Uint8ClampedArray(pixels.data), width, height);
    for (const label of this.present()) {
      const inside = this.insideOf(label), rgb = bytesOf(label.colour);
      for (let at = width; at < width * (height - 1); at++) {
        if (inside(at) && !(inside(at - 1) && inside(at + 1) && inside(at - width) && inside(at + width))) out.data.set(rgb, 4 * at);
      }
    }
    return out;
  }

  /* The labels that this slice has, of those that are switched on. */
  present() {
    if (this.soft) return this.labels;
    const {data} = this;
    data.ids ??= new Set(data.mask.data);
    return this.labels.filter(({id}) => data.ids.has(id));
  }

  /* Whether the pixel at an index is inside a label. The mask is soft, or holds the labels' ids. */
  insideOf(label) {
    const values = this.data.mask.data;
    return this.soft ? (at) => values[at] >= 128 : (at) => values[at] === label.id;
  }

  overlays(state, scale) {
    const {context: paint, data} = this;
    if (data.mask && state.mask !== "none") {
      for (const label of this.present()) {
        const values = Float32Array.from(data.mask.data, (v) => (this.soft ? v / 255 : v === label.id ? 1 : 0));
        paint.strokeStyle = label.colour;
        paint.globalAlpha = state.opacity;
        if (state.mask === "fill") {
          const layer = this.buffers[2].getContext("2d");
          layer.putImageData(filled(values, this.width, this.height, label.colour), 0, 0);
          paint.drawImage(this.buffers[2], -0.5, -0.5);
        } else {
          paint.lineWidth = (1.6 * devicePixelRatio) / scale;
          paint.beginPath();
          for (const [u, v, x, y] of outline(values, this.width, this.height)) {
            paint.moveTo(u, v);
            paint.lineTo(x, y);
          }
          paint.stroke();
        }
        paint.globalAlpha = 1;
      }
    }
    if (data.ellipses && state.ellipses) {
      const {data: values, shape: [count, stride]} = data.ellipses;
      const [low, high] = this.range(state.colour), scaled = state.colour === "head" ? between : viridis;
      paint.lineWidth = (0.8 * devicePixelRatio) / scale;
      for (let k = 0; k < count; k++) {
        const [u, v, a, b, angle, opacity, sigma, inMasks] = values.subarray(stride * k, stride * (k + 1));
        const value = {opacity, sigma: Math.log(sigma), head: inMasks / (opacity + inMasks)}[state.colour];
        paint.strokeStyle = `rgb(${scaled((value - low) / (high - low))})`;
        paint.beginPath();
        paint.ellipse(u, v, Math.min(a, 2000), Math.min(b, 2000), angle, 0, 2 * Math.PI);
        paint.stroke();
      }
    }
    if (this.cross) {
      const [u, v] = this.cross;
      paint.strokeStyle = "#56b4e9";
      paint.globalAlpha = 0.75;
      paint.lineWidth = devicePixelRatio / scale;
      paint.beginPath();
      for (const [x, y, dx, dy] of [[-0.5, v, u - 4.5, v], [u + 4, v, this.width - 0.5, v]]) {
        paint.moveTo(x, y);
        paint.lineTo(Math.max(dx, x), dy);
      }
      paint.moveTo(u, -0.5);
      paint.lineTo(u, Math.max(-0.5, v - 4));
      paint.moveTo(u, Math.min(v + 4, this.height));
      paint.lineTo(u, this.height - 0.5);
      paint.stroke();
      paint.globalAlpha = 1;
    }
  }

  /* Ends of the colour scale: opacity and share of a head from 0 to 1, the logarithm of sigma over what is shown. */
  range(colour) {
    if (colour !== "sigma" || !this.data?.ellipses?.shape[0]) return [0, 1];
    const {data, shape: [count, stride]} = this.data.ellipses, logs = [];
    for (let k = 0; k < count; k++) logs.push(Math.log(data[stride * k + 6]));
    logs.sort((p, q) => p - q);
    return [logs[Math.floor(0.02 * logs.length)], logs[Math.floor(0.98 * (logs.length - 1))] + 1e-6];
  }
}
