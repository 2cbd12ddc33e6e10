
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const [w, h] = data.cells, size = w * h;
  const $ = (id) => document.getElementById(id);
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const floats = (text) => (text === null ? null : new Float32Array(bytes(text).buffer));
  const mean = floats(data.mean), given = floats(data.given), used = floats(data.used);
  const union = floats(data.union), subtract = floats(data.subtract), palette = bytes(data.palette);

  // ------------------------------------------------------------ the mask, as the library computes it
  // Float32Array rounds what is stored in it to float32, f a number in between: where torch rounds, so does this.

  const f = Math.fround;

  // diffedit.threshold_maps from the mean on: the heat map, null where the texts do not differ.
  function heatOf(clip) {
    const top = clip === null ? Infinity : f(f(clip) * data.average);
    const m = mean.map((v) => Math.min(v, top));
    const low = m.reduce((a, b) => Math.min(a, b)), high = m.reduce((a, b) => Math.max(a, b)), range = f(high - low);
    return range <= data.least ? null : m.map((v) => f(v - low) / range);
  }

  // masks.dilate: rows, then columns; below 0 the same of the negative.
  function dilate(mask, cells) {
    const sign = cells < 0 ? -1 : 1, reach = Math.abs(cells);
    const along = (from, count, stride, at) => {
      const to = new Float32Array(size);
      for (let i = 0; i < size; i++) {
        const here = at(i), first = Math.max(0, here - reach), last = Math.min(count - 1, here + reach);
        let best = -Infinity;
        for (let k = first; k <= last; k++) best = Math.max(best, from[i + (k - here) * stride]);
        to[i] = best;
      }
      return to;
    };
    const rows = along(mask.map((v) => sign * v), w, 1, (i) => i % w);
    return along(rows, h, w, (i) => Math.floor(i / w)).map((v) => sign * v);
  }

  // masks.feather
  function feather(mask, cells) {
    const faded = mask.slice();
    for (let k = 1; k <= cells; k++) {
      const share = f(1 - k / (cells + 1));
      dilate(mask, k).forEach((v, i) => { faded[i] = Math.max(faded[i], f(v * share)); });
    }
    return faded;
  }

  // masks.largest_piece: cells above HAZE that share a side; of equal pieces the first in reading order.
  const HAZE = 1 / 64;
  function largest(mask) {
    const piece = new Int32Array(size).fill(-1), sizes = [];
    for (let start = 0; start < size; start++) {
      if (mask[start] <= HAZE || piece[start] >= 0) continue;
      const number = sizes.length, open = [start];
      sizes.push(0);
      piece[start] = number;
      while (open.length) {
        const i = open.pop(), x = i % w;
        sizes[number] += 1;
        for (const [next, inside] of [[i - 1, x > 0], [i + 1, x < w - 1], [i - w, i >= w], [i + w, i < size - w]]) {
          if (inside && mask[next] > HAZE && piece[next] < 0) {
            piece[next] = number;
            open.push(next);
          }
        }
      }
    }
    const best = sizes.indexOf(Math.max(...sizes));
    return mask.map((v, i) => (piece[i] === best ? v : 0));
  }

  // The mask of some settings: computed or given, then masks.Steering in its order.
  function maskOf(s) {
    let mask = given;
    if (mean) {
      const heat = heatOf(s.clip);
      if (heat === null) return new Float32Array(size);
      mask = heat.map((v) => (v > f(s.threshold) ? 1 : 0));
    }
    if (mask === null) return used;
    if (s.largest) mask = largest(mask);
    if (s.invert) mask = mask.map((v) => 1 - v);
    mask = feather(dilate(mask, s.dilate), s.feather);
    if (union) mask = mask.map((v, i) => Math.max(v, union[i]));
    if (subtract) mask = mask.map((v, i) => Math.min(v, f(1 - subtract[i])));
    return mask;
  }

  // ------------------------------------------------------------ a mask as PNG

  const crcs = Array.from({ length: 256 }, (_, n) => {
    for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
    return n;
  });
  const ascii = (text) => Uint8Array.from(text, (c) => c.charCodeAt(0));
  const joined = async (...parts) => new Uint8Array(await new Blob(parts).arrayBuffer());

  async function deflated(content) {
    const stream = new Blob([content]).stream().pipeThrough(new CompressionStream("deflate"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  async function chunk(kind, content) {
    const body = await joined(ascii(kind), content), ends = new DataView(new ArrayBuffer(8));
    ends.setUint32(0, content.length);
    ends.setUint32(4, ~body.reduce((crc, byte) => crcs[(crc ^ byte) & 255] ^ (crc >>> 8), -1));
    return joined(ends.buffer.slice(0, 4), body, ends.buffer.slice(4));
  }

  // images.mask_picture: cells as blocks at the picture's size, and the cells themselves in a text chunk.
  async function pngOf(mask) {
    const width = data.widths.reduce((a, b) => a + b), height = data.heights.reduce((a, b) => a + b);
    const pixels = new Uint8Array(height * (width + 1)), line = new Uint8Array(width + 1);
    let y = 0;
    data.heights.forEach((tall, row) => {
      let x = 1;
      data.widths.forEach((wide, column) => {
        const grey = f(mask[row * w + column] * 255), down = Math.floor(grey);
        const even = grey - down === 0.5 ? down + (down % 2) : Math.round(grey); // torch rounds halves to even
        line.fill(even, x, x += wide);
      });
      for (let k = 0; k < tall; k++) pixels.set(line, (width + 1) * y++);
    });
    const head = new DataView(new ArrayBuffer(13));
    head.setUint32(0, width);
    head.setUint32(4, height);
    head.setUint8(8, 8); // bits of grey
    const cells = Array.from(await deflated(new Uint8Array(mask.slice().buffer)), (c) => String.fromCharCode(c)).join("");
    return joined(
      Uint8Array.of(137, 80, 78, 71, 13, 10, 26, 10),
      await chunk("IHDR", new Uint8Array(head.buffer)),
      await chunk("tEXt", ascii("minidiffedit-mask\0" + w + "x" + h + " " + btoa(cells))),
      await chunk("IDAT", await deflated(pixels)),
      await chunk("IEND", new Uint8Array(0)),
    );
  }

  // ------------------------------------------------------------ drawing

  const least = (values) => values.reduce((a, b) => Math.min(a, b)), most = (values) => values.reduce((a, b) => Math.max(a, b));
  const percent = (share) => (Math.floor(1000 * share + 0.5) / 10).toFixed(1) + " %";
  const covered = (mask) => mask.reduce((count, v) => count + (v > 0), 0);

  function paint(canvas, values, grey) {
    canvas.width = w;
    canvas.height = h;
    const context = canvas.getContext("2d"), picture = context.createImageData(w, h);
    values.forEach((v, i) => {
      const at = Math.round(255 * Math.max(0, Math.min(1, v)));
      for (let k = 0; k < 3; k++) picture.data[4 * i + k] = grey ? at : palette[3 * at + k];
      picture.data[4 * i + 3] = 255;
    });
    context.putImageData(picture, 0, 0);
  }

  function tint(context, mask) {
    mask.forEach((v, i) => {
      context.fillStyle = "rgb(255 88 20 / " + 0.55 * v + ")";
      if (v > 0) context.fillRect(i % w, Math.floor(i / w), 1, 1);
    });
  }

  function drawOverlay(mask) {
    const canvas = $("overlay"), [width, height] = data.working, a = width / w, b = height / h;
    // Small pictures are drawn larger, so that the outline is thin.
    const scale = Math.max(1, Math.ceil(640 / Math.max(width, height)));
    canvas.width = width * scale;
    canvas.height = height * scale;
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage($("source"), 0, 0, canvas.width, canvas.height);
    context.scale(a * scale, b * scale);
    tint(context, mask);
    const edges = new Path2D(), inside = (x, y) => x >= 0 && y >= 0 && x < w && y < h && used[y * w + x] > 0;
    for (let y = 0; y <= h; y++) {
      for (let x = 0; x <= w; x++) {
        if (inside(x, y) !== inside(x - 1, y)) { edges.moveTo(x, y); edges.lineTo(x, y + 1); }
        if (inside(x, y) !== inside(x, y - 1)) { edges.moveTo(x, y); edges.lineTo(x + 1, y); }
      }
    }
    context.setTransform(1, 0, 0, 1, 0, 0);
    const outline = new Path2D();
    outline.addPath(edges, new DOMMatrix([a * scale, 0, 0, b * scale, 0, 0]));
    const thin = Math.min(2 * canvas.width / 640, 0.15 * a * scale);
    for (const [style, thick] of [["rgb(0 0 0 / 70%)", 2 * thin], ["#fff", thin]]) {
      context.strokeStyle = style;
      context.lineWidth = thick;
      context.stroke(outline);
    }
    if (cell) { // where the keyboard paints
      context.strokeStyle = "#1450ff";
      context.strokeRect(cell[0] * a * scale, cell[1] * b * scale, a * scale, b * scale);
    }
  }

  const BINS = 72;

  function drawHistogram(s, heat) {
    const unit = data.average || 1, low = least(mean) / unit, high = most(mean) / unit;
    const end = Math.max(3.2, Math.min(high, 10)), svg = $("histogram"), counts = new Array(BINS).fill(0);
    for (const v of mean) counts[Math.min(BINS - 1, Math.floor(BINS * v / unit / end))] += 1;
    const top = s.clip === null ? high : Math.min(high, s.clip), cut = low + s.threshold * (top - low);
    const tallest = Math.sqrt(Math.max(...counts)), wide = 100 / BINS, at = (x) => Math.min(100, 100 * x / end);
    const bars = counts.map((count, i) => {
      const tall = 100 * Math.sqrt(count) / tallest, inside = heat !== null && (i + 0.5) / BINS * end > cut;
      return '<rect class="' + (inside ? "in" : "") + '" x="' + i * wide + '" width="' + 0.8 * wide + '" y="' + (100 - tall) + '" height="' + tall + '"/>';
    });
    const upright = (kind, x) => '<line class="' + kind + '" x1="' + at(x) + '" x2="' + at(x) + '" y1="0" y2="100"/>';
    svg.innerHTML = bars.join("") + upright("threshold", cut) + (s.clip === null ? "" : upright("clip", s.clip));
    svg.setAttribute("aria-label", "histogram of the mean map, from 0 to " + end.toFixed(1) + " times its mean; the threshold is at "
      + cut.toFixed(2) + ", the clip " + (s.clip === null ? "off" : "at " + s.clip));
    $("histogram-end").textContent = end.toFixed(1) + (high > end ? " and above" : "");
    $("threshold-label").style.left = at(cut) + "%";
    $("threshold-label").classList.toggle("flip", at(cut) < 18);
    $("clip-label").style.left = at(s.clip ?? 0) + "%";
    $("clip-label").hidden = s.clip === null;
    $("clip-label").classList.toggle("flip", at(s.clip ?? 0) > 90);
  }

  // ------------------------------------------------------------ the mask's controls

  // What was painted over the mask, last of all: 1 edited, 0 kept, null as the controls have it; and what it was before.
  let painted = new Array(size).fill(null), strokes = [], cell = null;

  const NAMES = ["threshold", "clip", "largest", "invert", "dilate", "feather"];
  const start = Object.fromEntries(NAMES.map((name) => [name, data[name]]));
  let chosen = { ...start }, current = used;

  function options(s) {
    const said = mean ? ["--mask-threshold", s.threshold, "--mask-clip", s.clip ?? "none"] : [];
    const steered = [["--largest", s.largest], ["--invert", s.invert]].filter((pair) => pair[1]).map((pair) => pair[0]);
    if (s.dilate) steered.push("--dilate", s.dilate);
    if (s.feather) steered.push("--feather", s.feather);
    return [...said, ...(steered.length ? steered : plainly())].join(" ");
  }

  // A saved edit's steering stays unless another is asked for.
  const plainly = () => (data.commands.steered ? ["--dilate", 0] : []);

  function show() {
    const s = chosen, heat = mean && heatOf(s.clip);
    current = maskOf(s).map((v, i) => painted[i] ?? v);
    const file = data.name.replace(/[^\w.-]/g, "_") + "-mask.png";
    if (mean) {
      const zeros = new Float32Array(size), dark = most(mean) || 1;
      document.querySelectorAll("[data-draw]").forEach((canvas) => {
        const kind = canvas.dataset.draw;
        if (kind === "mean") paint(canvas, mean.map((v) => v / dark));
        else if (kind === "used-heat") paint(canvas, heatOf(start.clip) ?? zeros);
        else if (kind === "heat") paint(canvas, heat ?? zeros);
        else paint(canvas, (heat ?? zeros).map((v) => (v > f(s.threshold) ? 1 : 0)), true);
      });
      $("heat-caption").textContent = (s.clip === null ? "" : "clipped at " + s.clip + " × mean, ") + "rescaled";
      $("mask-caption").textContent = "above " + s.threshold;
      drawHistogram(s, heat);
    }
    for (const name of ["threshold", "clip", "dilate", "feather"]) {
      $(name).value = s[name] ?? start.clip ?? 3;
      $(name + "-value").textContent = name === "clip" ? (s.clip === null ? "off" : s.clip + " ×") : s[name];
    }
    $("clip").disabled = $("unclipped").checked = s.clip === null;
    $("largest").checked = s.largest;
    $("invert").checked = s.invert;
    drawOverlay(current);
    const cells = covered(current), added = current.filter((v, i) => v > 0 && !(used[i] > 0)).length;
    const gone = cells - added < covered(used) ? covered(used) - (cells - added) : 0;
    let said = "Coverage " + percent(f(cells / size)) + ", " + cells + " of " + size + " cells";
    if (mean && heat === null) said = "No difference: what spread the maps have is rounding noise; the mask is empty";
    said += added || gone ? "; against the edit’s mask " + added + " more, " + gone + " fewer." : "; the edit’s mask.";
    $("said").textContent = said;
    const bound = s.clip * s.threshold, reached = mean && s.clip !== null && most(mean) >= s.clip * data.average && heat !== null;
    $("bound").textContent = reached && bound > 1
      ? "Some cell reaches the clip, so at most 1 / (clip × threshold) = " + percent(1 / bound) + " of the cells are above the threshold." : "";
    const base = data.commands.start;
    $("by-file").textContent = [base, "--mask", file, ...plainly()].join(" ");
    $("by-options").textContent = base + " " + options(s);
    document.querySelectorAll(".by-options").forEach((part) => { part.hidden = !data.commands.options || !options(s) || painted.some((v) => v !== null); });
    $("save").dataset.file = file;
  }

  function choose(change) {
    chosen = { ...chosen, ...change };
    show();
  }

  for (const name of ["threshold", "clip", "dilate", "feather"]) {
    $(name).addEventListener("input", (event) => choose({ [name]: Number(event.target.value) }));
  }
  for (const name of ["largest", "invert"]) $(name).addEventListener("change", (event) => choose({ [name]: event.target.checked }));
  $("unclipped").addEventListener("change", (event) => choose({ clip: event.target.checked ? null : Number($("clip").value) }));
  $("reset").addEventListener("click", () => {
    painted.fill(null);
    strokes = [];
    choose(start);
  });
  if (!("CompressionStream" in window)) {
    $("save").disabled = true;
    $("save").textContent = "A newer browser can save the mask";
  }
  $("save").addEventListener("click", async (event) => {
    const link = document.createElement("a"), file = event.target.dataset.file;
    link.href = URL.createObjectURL(new Blob([await pngOf(current)], { type: "image/png" }));
    link.download = file;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    $("said").textContent = "Saved as " + file + ".";
  });

  // ------------------------------------------------------------ the brush, and copies of the commands

  function brush() {
    const canvas = $("overlay"), kind = () => document.querySelector("[name=brush]:checked").value;
    const dab = ([x, y]) => {
      const reach = Number($("brush-size").value), from = -Math.floor((reach - 1) / 2);
      for (let i = from; i < from + reach; i++) {
        for (let j = from; j < from + reach; j++) {
          if (x + i >= 0 && x + i < w && y + j >= 0 && y + j < h) painted[(y + j) * w + x + i] = Number(kind());
        }
      }
      show();
    };
    const begin = () => strokes.push(painted.slice());
    const at = (event) => {
      const box = canvas.getBoundingClientRect();
      const clip = (v, n) => Math.min(n - 1, Math.max(0, Math.floor(v * n)));
      return [clip((event.clientX - box.left) / box.width, w), clip((event.clientY - box.top) / box.height, h)];
    };
    canvas.addEventListener("pointerdown", (event) => {
      if (!kind()) return;
      begin();
      canvas.setPointerCapture(event.pointerId);
      dab(at(event));
    });
    canvas.addEventListener("pointermove", (event) => { if (kind() && event.buttons) dab(at(event)); });
    canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
      if (!kind() || !(step || event.key === " ")) return;
      event.preventDefault();
      cell = cell ?? [Math.floor(w / 2), Math.floor(h / 2)];
      if (step) {
        cell = [Math.min(w - 1, Math.max(0, cell[0] + step[0])), Math.min(h - 1, Math.max(0, cell[1] + step[1]))];
        show();
        $("said").textContent = "Column " + (cell[0] + 1) + " of " + w + ", row " + (cell[1] + 1) + " of " + h + ".";
      } else {
        begin();
        dab(cell);
      }
    });
    document.querySelectorAll("[name=brush]").forEach((one) => one.addEventListener("change", () => {
      canvas.tabIndex = kind() ? 0 : -1;
      canvas.classList.toggle("painting", kind() !== "");
      cell = null;
      show();
    }));
    $("undo").addEventListener("click", () => {
      painted = strokes.pop() ?? painted;
      show();
    });
  }

  function copies() {
    document.querySelectorAll("pre").forEach((part) => {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: "Copy" });
      button.className = "copy " + part.className;
      button.setAttribute("aria-label", "Copy the " + part.getAttribute("aria-label"));
      button.addEventListener("click", async () => {
        try {
          await navigator.clipboard.writeText(part.textContent);
          button.textContent = "Copied";
        } catch { // a browser that keeps its clipboard from files
          getSelection().selectAllChildren(part);
          button.textContent = "Marked: copy it by the keyboard";
        }
        setTimeout(() => { button.textContent = "Copy"; }, 2000);
      });
      part.after(button);
    });
  }

  // ------------------------------------------------------------ the levels

  const { levels, columns, tile: [across, down], ...sheets } = data.frames;

  // The curve, and the table from the top level down.
  function numbers() {
    const rows = data.levels, top = Math.max(...rows.map((row) => row[3])), last = Math.max(1, rows.length - 1);
    $("top").textContent = top.toFixed(2);
    document.querySelectorAll(".top").forEach((part) => { part.textContent = rows.at(-1)[0] ?? ""; });
    $("chart").setAttribute("aria-label", $("chart").getAttribute("aria-label") + ", from 0 to " + top.toFixed(2));
    $("curve").setAttribute("points", rows.map((row, i) => i / last + "," + (1 - row[3] / (top || 1))).join(" "));
    const number = (v, digits) => (v === null ? "–" : v.toFixed(digits));
    for (const [j, t, alpha, inside, most, outside, x, y] of [...rows].reverse()) {
      const both = x !== null && y !== null, line = $("numbers").insertRow(), head = document.createElement("th");
      head.scope = "row";
      head.textContent = j ?? "–";
      line.append(head);
      const apart = both ? [number(inside, 3), number(most, 3), String(Number(outside.toPrecision(6)))] : ["–", "–", "–"];
      for (const said of [t, alpha.toFixed(5), number(x, 3), number(y, 3), ...apart]) line.insertCell().textContent = said;
    }
  }

  async function walk() {
    numbers();
    const canvases = [...document.querySelectorAll("[data-frame]")];
    canvases.forEach((canvas) => { canvas.closest("figure").hidden = !(canvas.dataset.frame in sheets); });
    const drawn = await Promise.all(canvases.filter((canvas) => canvas.dataset.frame in sheets).map(async (canvas) => {
      const picture = new Image();
      picture.src = sheets[canvas.dataset.frame];
      await picture.decode();
      canvas.width = across;
      canvas.height = down;
      return [canvas, picture, canvas.getAttribute("aria-label")];
    }));
    const slider = $("level"), last = data.levels.length - 1;
    const draw = () => {
      const i = Number(slider.value), at = levels[i], [j, t, alpha, inside, , outside] = data.levels[at];
      for (const [canvas, picture, label] of drawn) {
        const context = canvas.getContext("2d");
        context.clearRect(0, 0, across, down);
        context.drawImage(picture, i % columns * across, Math.floor(i / columns) * down, across, down, 0, 0, across, down);
        canvas.setAttribute("aria-label", label + " at t = " + t);
      }
      $("level-value").textContent = (j === null ? "" : (sheets.x ? "" : "level ") + j + ", ") + "t = " + t + ", ᾱ = " + alpha.toFixed(4);
      slider.setAttribute("aria-valuetext", $("level-value").textContent);
      const apart = inside.toFixed(3) + " apart (root mean square)";
      const said = used ? "Inside the mask the two are " + apart + "; outside, " + outside + " at most." : "The two are " + apart + ".";
      $("level-said").textContent = sheets.apart ? said : "";
      for (const end of ["x1", "x2"]) $("cursor").setAttribute(end, at / last);
    };
    slider.max = levels.length - 1;
    slider.value = Math.floor(levels.length / 2); // where there is something to see in every picture
    slider.addEventListener("input", draw);
    let timer = null;
    const stop = () => {
      clearInterval(timer);
      timer = null;
      $("play").textContent = "Play";
      $("play").setAttribute("aria-pressed", "false");
    };
    $("play").addEventListener("click", () => {
      if (timer !== null) return stop();
      if (slider.value === "0") slider.value = slider.max;
      $("play").textContent = "Stop";
      $("play").setAttribute("aria-pressed", "true");
      timer = setInterval(() => {
        slider.value = Number(slider.value) - 1;
        draw();
        if (slider.value === "0") stop();
      }, 150);
    });
    draw();
  }

  // ------------------------------------------------------------ the words

  // Shares of one level: [step][word] -> values of its cells; the last step is the mean of all.
  async function sharesOf(look, level) {
    const [wide, high] = level.cells, canvas = document.createElement("canvas"), picture = new Image();
    picture.src = level.sheet;
    await picture.decode();
    canvas.width = picture.width;
    canvas.height = picture.height;
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.drawImage(picture, 0, 0);
    const tile = (i) => {
      const pixels = context.getImageData(i % level.columns * wide, Math.floor(i / level.columns) * high, wide, high).data;
      return Float32Array.from({ length: wide * high }, (_, k) => level.top * (pixels[4 * k] / 255) ** 2);
    };
    const steps = level.steps.map((_, s) => look.words.map((_, n) => tile(s * look.words.length + n)));
    const average = look.words.map((_, n) => steps[0][n].map((_, k) => steps.reduce((sum, one) => sum + one[n][k], 0) / steps.length));
    return [...steps, average];
  }

  // Values 0..1 as a picture of the palette; the colder, the more transparent where `clear`.
  function heat(canvas, [wide, high], values, clear) {
    const context = canvas.getContext("2d"), picture = context.createImageData(wide, high);
    canvas.width = wide;
    canvas.height = high;
    values.forEach((v, i) => {
      const at = Math.round(255 * Math.max(0, Math.min(1, v)));
      for (let k = 0; k < 3; k++) picture.data[4 * i + k] = palette[3 * at + k];
      picture.data[4 * i + 3] = clear ? 60 + 0.6 * at : 255;
    });
    context.putImageData(picture, 0, 0);
  }

  async function words() {
    const known = new Map(), stages = { mask: "seeking the mask", encode: "encoding", decode: "decoding", generate: "sampling" };
    const option = (text, value) => Object.assign(document.createElement("option"), { textContent: text, value });
    const slider = $("look-step");
    let chosen = 0, look, level, shares;
    const draw = () => {
      const s = Number(slider.value), all = s === level.steps.length, own = $("own-scale").checked;
      $("look-value").textContent = all ? "all, their mean" : "t = " + level.steps[s];
      slider.setAttribute("aria-valuetext", $("look-value").textContent);
      const scaled = look.words.map((_, n) => {
        const range = own ? shares.map((one) => [least(one[n]), most(one[n])]) : [[0, level.top]];
        const low = Math.min(...range.map((one) => one[0])), high = Math.max(...range.map((one) => one[1]));
        return shares[s][n].map((v) => Math.sqrt(Math.max(0, v - low) / (high - low || 1)));
      });
      look.words.forEach((word, n) => {
        const button = $("tiles").children[n];
        heat(button.firstChild, level.cells, scaled[n], false);
        button.setAttribute("aria-pressed", String(n === chosen));
      });
      heat($("look"), level.cells, scaled[chosen], true);
      const mean = shares[s][chosen].reduce((a, b) => a + b) / shares[s][chosen].length;
      const said = "“" + look.words[chosen] + "”: " + percent(mean) + " of the attention, at most " + percent(most(shares[s][chosen])) + " in a cell";
      $("look-said").textContent = said;
      $("look").setAttribute("aria-label", "heat map: " + said);
    };
    const pickLevel = async () => {
      const before = slider.max ? slider.value / slider.max : 1; // at first the mean of all steps
      level = look.levels[$("look-level").value];
      if (!known.has(level)) known.set(level, await sharesOf(look, level));
      shares = known.get(level);
      slider.max = level.steps.length;
      slider.value = Math.round(before * level.steps.length);
      draw();
    };
    const pick = async () => {
      look = data.looks[$("looked").value];
      $("looked-at").src = $(look.stage === "decode" || look.stage === "generate" ? "result" : "source").src;
      $("look-level").replaceChildren(...look.levels.map((one, i) => option(one.cells.join(" × "), i)));
      $("tiles").replaceChildren(...look.words.map((word, n) => {
        const button = Object.assign(document.createElement("button"), { type: "button" }), name = document.createElement("span");
        name.textContent = word;
        button.append(Object.assign(document.createElement("canvas"), { className: "cells" }), name);
        button.addEventListener("click", () => { chosen = n; draw(); });
        return button;
      }));
      level = look.levels[0];
      known.set(level, await sharesOf(look, level));
      const average = known.get(level).at(-1).map(most);
      chosen = average.indexOf(Math.max(...average)); // the word that stands out
      await pickLevel();
    };
    $("looked").replaceChildren(...data.looks.map((one, i) => option(stages[one.stage] + " under “" + one.prompt + "”", i)));
    $("looked").addEventListener("change", pick);
    $("look-level").addEventListener("change", pickLevel);
    slider.addEventListener("input", draw);
    $("own-scale").addEventListener("change", draw);
    await pick();
  }

  // ------------------------------------------------------------ the start

  async function main() {
    document.querySelectorAll("[data-copy]").forEach((picture) => { picture.src = $(picture.dataset.copy).src; });
    const seam = () => $("compare").parentElement.style.setProperty("--at", $("seam").value + "%");
    $("seam").addEventListener("input", seam);
    seam();
    await $("source").decode();
    if (start.clip > 10) $("clip").max = start.clip;
    for (const name of ["dilate", "feather"]) {
      $(name).max = Math.max($(name).max, start[name]);
      $(name).min = Math.min($(name).min, start[name]);
    }
    if (used) {
      $("tint").width = w;
      $("tint").height = h;
      tint($("tint").getContext("2d"), used);
      show();
      brush();
    }
    copies();
    if (sheets.y) await walk();
    if (data.looks.length) await words();
    document.body.dataset.ready = "yes";
  }

  // For a test, or a reader's own console.
  window.minidiffedit = { data, start, maskOf, pngOf, choose, current: () => current };
  main();
})();
