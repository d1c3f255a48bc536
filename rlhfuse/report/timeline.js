"use strict";
// Timelines on a canvas: lanes as rows, one colour per sort of time. Zoom with the wheel (after a
// click, or with Ctrl), drag to pan, arrows and +/- on the keyboard, two fingers on a screen.
// Text reaches the page through canvas text and textContent only.
(() => {
  const GUTTER = 92, AXIS = 24, GAP = 5, OVERVIEW = 12, MOST_ARROWS = 400;

  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const words = (text) => new Uint32Array(bytes(text).buffer);

  function duration(s) {
    const a = Math.abs(s);
    if (a >= 100) return s.toFixed(0) + " s";
    if (a >= 1) return s.toFixed(2) + " s";
    if (a >= 1e-3) return (s * 1e3).toFixed(a >= 0.1 ? 0 : 2) + " ms";
    return (s * 1e6).toFixed(a >= 1e-4 ? 0 : 2) + " \u00b5s";
  }

  function niceStep(raw) {
    const power = Math.pow(10, Math.floor(Math.log10(raw)));
    return power * [1, 2, 5, 10].find((m) => m * power >= raw);
  }

  function textOn(color) {
    const n = parseInt(color.slice(1, 7), 16);
    const light = 0.299 * (n >> 16) + 0.587 * ((n >> 8) & 255) + 0.114 * (n & 255);
    return light > 150 ? "#111" : "#fff";
  }

  class View {
    constructor(root, data, wallS) {
      this.root = root;
      this.data = data;
      this.edges = words(data.edges);
      this.styles = bytes(data.styles);
      this.names = words(data.names);
      this.flows = words(data.flows);
      this.span = Math.max(wallS || data.wallS, data.wallS);
      this.from = 0;
      this.to = this.span;
      this.pick = -1;  // the style that the legend holds up
      this.rowHeight = Math.max(14, Math.min(40, 440 / data.lanes.length));
      this.canvas = root.querySelector("canvas");
      this.tip = root.querySelector(".tip");
      this.canvas.height = 10;
      this.pointers = new Map();
      this.listen();
      this.legend();
      new ResizeObserver(() => this.resize()).observe(root.querySelector(".stage"));
      this.resize();
    }

    // Pieces of a lane: index of the one at tick t, by halving.
    at(lane, t) {
      const base = this.data.offsets[lane] + lane;
      let low = 0, high = this.data.offsets[lane + 1] - this.data.offsets[lane] - 1;
      if (high < 0 || t < this.edges[base]) return -1;
      while (low < high) {
        const middle = (low + high + 1) >> 1;
        if (this.edges[base + middle] <= t) low = middle; else high = middle - 1;
      }
      return low;
    }

    resize() {
      const width = this.root.querySelector(".stage").clientWidth;
      const ratio = window.devicePixelRatio || 1;
      this.width = width;
      this.height = AXIS + this.data.lanes.length * (this.rowHeight + GAP) + OVERVIEW + 6;
      this.canvas.width = Math.round(width * ratio);
      this.canvas.height = Math.round(this.height * ratio);
      this.canvas.style.height = this.height + "px";
      this.ratio = ratio;
      this.draw();
    }

    x(seconds) {
      return GUTTER + (seconds - this.from) / (this.to - this.from) * (this.width - GUTTER);
    }

    seconds(x) {
      return this.from + (x - GUTTER) / (this.width - GUTTER) * (this.to - this.from);
    }

    set(from, to) {
      const least = Math.max(this.span * 1e-7, 1e-8);
      const length = Math.min(this.span, Math.max(least, to - from));
      this.from = Math.min(Math.max(0, from), this.span - length);
      this.to = this.from + length;
      this.draw();
    }

    zoom(factor, around) {
      const center = around === undefined ? (this.from + this.to) / 2 : around;
      this.set(center - (center - this.from) * factor, center + (this.to - center) * factor);
    }

    draw() {
      if (this.pending) return;
      this.pending = requestAnimationFrame(() => { this.pending = 0; this.paint(); });
    }

    paint() {
      const c = this.canvas.getContext("2d");
      const css = getComputedStyle(this.root);
      this.ink = css.getPropertyValue("--ink");
      this.faint = css.getPropertyValue("--rule");
      this.paper = css.getPropertyValue("--card");
      c.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
      c.clearRect(0, 0, this.width, this.height);
      c.font = "12px system-ui, sans-serif";
      this.axis(c);
      for (let lane = 0; lane < this.data.lanes.length; lane++) this.lane(c, lane);
      this.arrows(c);
      this.overview(c);
      this.root.dataset.window = this.from.toFixed(9) + " " + this.to.toFixed(9);
    }

    axis(c) {
      const step = niceStep((this.to - this.from) / Math.max(2, (this.width - GUTTER) / 110));
      c.fillStyle = this.ink;
      c.strokeStyle = this.faint;
      c.textBaseline = "middle";
      c.textAlign = "left";
      for (let t = Math.ceil(this.from / step) * step; t <= this.to; t += step) {
        const x = Math.round(this.x(t)) + 0.5;
        c.beginPath(); c.moveTo(x, AXIS - 5); c.lineTo(x, this.height - OVERVIEW - 8); c.stroke();
        const digits = Math.max(0, Math.min(9, -Math.floor(Math.log10(step) + 1e-9)));
        const text = t.toFixed(digits) + " s";
        if (x + c.measureText(text).width + 4 < this.width) c.fillText(text, x + 3, AXIS / 2 - 1);
      }
    }

    top(lane) { return AXIS + lane * (this.rowHeight + GAP); }

    lane(c, lane) {
      const y = this.top(lane), h = this.rowHeight, tick = this.data.tickS;
      c.fillStyle = this.ink;
      c.textAlign = "right";
      c.textBaseline = "middle";
      c.save();
      c.beginPath(); c.rect(0, y, GUTTER - 6, h); c.clip();
      c.fillText(this.data.lanes[lane], GUTTER - 10, y + h / 2);
      c.restore();
      c.save();
      c.beginPath(); c.rect(GUTTER, y, this.width - GUTTER, h); c.clip();
      const first = Math.max(0, this.at(lane, this.from / tick)), last = this.at(lane, this.to / tick);
      if (last - first < 3 * this.width) this.pieces(c, lane, first, last);
      else this.columns(c, lane);
      c.restore();
    }

    pieces(c, lane, first, last) {
      const base = this.data.offsets[lane] + lane, tick = this.data.tickS;
      for (let i = first; i <= last; i++) {
        const left = this.x(this.edges[base + i] * tick), right = this.x(this.edges[base + i + 1] * tick);
        const piece = this.data.offsets[lane] + i;
        this.box(c, lane, left, right - left, this.styles[piece]);
        const name = this.data.nameTable[this.names[piece]];
        if (name && right - left > 22) this.label(c, lane, left, right, name, this.styles[piece]);
      }
    }

    // More pieces than pixels: each column takes the one piece that lies in its middle.
    columns(c, lane) {
      const step = 1 / this.ratio, tick = this.data.tickS;
      let runStyle = -1, runFrom = 0, x = GUTTER;
      for (; x < this.width; x += step) {
        const i = this.at(lane, this.seconds(x + step / 2) / tick);
        const style = i < 0 ? -1 : this.styles[this.data.offsets[lane] + i];
        if (style === runStyle) continue;
        if (runStyle >= 0) this.box(c, lane, runFrom, x - runFrom, runStyle);
        runStyle = style; runFrom = x;
      }
      if (runStyle >= 0) this.box(c, lane, runFrom, x - runFrom, runStyle);
    }

    box(c, lane, x, width, style) {
      const [, color, idle] = this.data.styleTable[style];
      const y = this.top(lane), h = this.rowHeight;
      c.globalAlpha = this.pick < 0 || this.pick === style ? 1 : 0.15;
      c.fillStyle = color;
      const inset = width > 4 ? 0.5 : 0;
      if (idle && this.pick !== style) {
        c.globalAlpha *= 0.16; c.fillRect(x, y, width, h);
        c.globalAlpha /= 0.16; c.fillRect(x, y + h - 3, width, 3);
      } else c.fillRect(x + inset, y, Math.max(width - 2 * inset, 0.5), h);
      c.globalAlpha = 1;
    }

    label(c, lane, left, right, name, style) {
      const from = Math.max(left, GUTTER), to = Math.min(right, this.width);
      if (to - from < 22 || (this.pick >= 0 && this.pick !== style)) return;
      const short = name.slice(name.lastIndexOf(":") + 1), room = to - from - 8;
      const text = c.measureText(name).width <= room ? name : short;
      if (c.measureText(text).width > room) return;
      c.textAlign = "left";
      c.fillStyle = textOn(this.data.styleTable[style][1]);
      c.fillText(text, from + 5, this.top(lane) + this.rowHeight / 2);
    }

    // Messages as arrows, from the end of what made them to the start of what used them, once few
    // enough are in sight to be told apart.
    arrows(c) {
      const f = this.flows, tick = this.data.tickS, count = f.length / 4;
      this.arrowsDrawn = 0;
      if (this.pick >= 0 || !count) return;
      let low = 0, high = count;
      while (low < high) {
        const middle = (low + high) >> 1;
        if (f[4 * middle + 3] * tick < this.from) low = middle + 1; else high = middle;
      }
      const seen = [];
      for (let i = low; i < count && f[4 * i + 3] * tick <= this.to; i++) {
        if (seen.length > MOST_ARROWS) return;
        seen.push(i);
      }
      c.save();
      c.beginPath(); c.rect(GUTTER, AXIS, this.width - GUTTER, this.height); c.clip();
      c.strokeStyle = this.ink; c.fillStyle = this.ink; c.globalAlpha = 0.5; c.lineWidth = 1;
      for (const i of seen) {
        const down = f[4 * i + 2] > f[4 * i], h = this.rowHeight;
        const x0 = this.x(f[4 * i + 1] * tick), y0 = this.top(f[4 * i]) + (down ? h : 0);
        const x1 = this.x(f[4 * i + 3] * tick), y1 = this.top(f[4 * i + 2]) + (down ? 0 : h);
        c.beginPath(); c.moveTo(x0, y0); c.lineTo(x1, y1); c.stroke();
        const s = down ? -5 : 5;
        c.beginPath(); c.moveTo(x1, y1); c.lineTo(x1 - 3, y1 + s); c.lineTo(x1 + 3, y1 + s); c.fill();
      }
      this.arrowsDrawn = seen.length;
      c.restore();
    }

    overview(c) {
      if (this.to - this.from > 0.999 * this.span) return;
      const y = this.height - OVERVIEW, wide = this.width - GUTTER;
      c.fillStyle = this.faint;
      c.fillRect(GUTTER, y, wide, OVERVIEW - 4);
      c.fillStyle = this.ink;
      const left = this.from / this.span * wide, right = this.to / this.span * wide;
      c.globalAlpha = 0.55;
      c.fillRect(GUTTER + left, y, Math.max(2, right - left), OVERVIEW - 4);
      c.globalAlpha = 1;
    }

    legend() {
      const list = this.root.querySelector(".legend");
      list.replaceChildren();
      const total = this.data.styleSeconds.reduce((a, b) => a + b, 0) || 1;
      const order = [...this.data.styleTable.keys()].filter((i) => this.data.styleSeconds[i] > 0);
      order.sort((a, b) => this.data.styleTable[a][2] - this.data.styleTable[b][2]
        || this.data.styleSeconds[b] - this.data.styleSeconds[a]);
      for (const i of order) {
        const [label, color, idle] = this.data.styleTable[i];
        const item = document.createElement("button");
        item.type = "button";
        item.setAttribute("aria-pressed", "false");
        const swatch = document.createElement("span");
        swatch.className = idle ? "swatch idle" : "swatch";
        swatch.style.setProperty("--c", color);
        const share = (100 * this.data.styleSeconds[i] / total).toFixed(1) + " %";
        const text = document.createElement("span");
        text.textContent = label;
        const number = document.createElement("span");
        number.className = "quiet";
        number.textContent = share;
        item.append(swatch, text, number);
        item.addEventListener("click", () => this.toggle(i, list, item));
        list.append(item);
      }
    }

    toggle(style, list, item) {
      this.pick = this.pick === style ? -1 : style;
      for (const other of list.children) other.setAttribute("aria-pressed", String(other === item && this.pick >= 0));
      this.draw();
    }

    listen() {
      const canvas = this.canvas, stage = this.root.querySelector(".stage");
      stage.addEventListener("wheel", (event) => {
        const held = document.activeElement === stage;
        if (!held && !event.ctrlKey && !event.metaKey) return;
        event.preventDefault();
        const position = event.clientX - canvas.getBoundingClientRect().left;
        if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) this.pan(event.deltaX / this.width);
        else this.zoom(Math.exp(Math.max(-60, Math.min(60, event.deltaY)) * 0.006), this.seconds(Math.max(GUTTER, position)));
      }, { passive: false });
      stage.addEventListener("keydown", (event) => this.key(event));
      canvas.addEventListener("pointerdown", (event) => this.press(event));
      canvas.addEventListener("pointermove", (event) => this.move(event));
      for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (event) => this.pointers.delete(event.pointerId));
      canvas.addEventListener("pointerleave", () => { this.tip.hidden = true; });
      canvas.addEventListener("dblclick", () => this.set(0, this.span));
      const act = { in: () => this.zoom(0.5), out: () => this.zoom(2), all: () => this.set(0, this.span) };
      for (const button of this.root.querySelectorAll("[data-act]")) button.addEventListener("click", () => act[button.dataset.act]());
      matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    }

    key(event) {
      const moves = {
        ArrowLeft: () => this.pan(-0.15), ArrowRight: () => this.pan(0.15), a: () => this.pan(-0.15), d: () => this.pan(0.15),
        "+": () => this.zoom(0.7), "=": () => this.zoom(0.7), w: () => this.zoom(0.7),
        "-": () => this.zoom(1 / 0.7), s: () => this.zoom(1 / 0.7), Home: () => this.set(0, this.span), 0: () => this.set(0, this.span),
      };
      if (event.ctrlKey || event.metaKey || !(event.key in moves)) return;
      event.preventDefault();
      moves[event.key]();
    }

    pan(share) {
      const by = share * (this.to - this.from);
      this.set(this.from + by, this.to + by);
    }

    press(event) {
      this.root.querySelector(".stage").focus({ preventScroll: true });
      this.canvas.setPointerCapture(event.pointerId);
      this.pointers.set(event.pointerId, event.offsetX);
      this.tip.hidden = true;
      if (event.offsetY > this.height - OVERVIEW - 3) {
        const center = (event.offsetX - GUTTER) / (this.width - GUTTER) * this.span;
        this.set(center - (this.to - this.from) / 2, center + (this.to - this.from) / 2);
      }
    }

    move(event) {
      const before = this.pointers.get(event.pointerId);
      if (before === undefined) return this.hover(event);
      if (this.pointers.size === 2) {
        const other = [...this.pointers.entries()].find(([id]) => id !== event.pointerId)[1];
        const scale = Math.abs(before - other) / Math.max(8, Math.abs(event.offsetX - other));
        this.zoom(scale, this.seconds(other));
      } else {
        const by = (before - event.offsetX) / (this.width - GUTTER) * (this.to - this.from);
        this.set(this.from + by, this.to + by);
      }
      this.pointers.set(event.pointerId, event.offsetX);
    }

    hover(event) {
      const lane = Math.floor((event.offsetY - AXIS) / (this.rowHeight + GAP));
      const inside = lane >= 0 && lane < this.data.lanes.length && event.offsetX > GUTTER;
      const t = this.seconds(event.offsetX);
      const i = inside && t <= this.data.wallS ? this.at(lane, t / this.data.tickS) : -1;
      if (i < 0) { this.tip.hidden = true; return; }
      const base = this.data.offsets[lane] + lane, piece = this.data.offsets[lane] + i;
      const start = this.edges[base + i] * this.data.tickS, end = this.edges[base + i + 1] * this.data.tickS;
      const [label, , idle] = this.data.styleTable[this.styles[piece]];
      const name = this.data.nameTable[this.names[piece]];
      const [head, body] = this.tip.children;
      head.textContent = (idle ? "idle: " : "") + label + (name && name !== label ? " \u00b7 " + name : "");
      body.textContent = this.data.lanes[lane] + " \u00b7 " + duration(end - start) + " from " + start.toFixed(4) + " s";
      this.tip.hidden = false;
      const room = this.width - this.tip.offsetWidth - 8;
      this.tip.style.left = Math.max(0, Math.min(room, event.offsetX + 14)) + "px";
      this.tip.style.top = (event.offsetY + 18) + "px";
    }
  }

  window.rlhfuseViews = [];
  const parse = (id) => JSON.parse(document.getElementById(id).textContent);
  for (const root of document.querySelectorAll(".timeline")) {
    const wall = Number(root.dataset.wall) || 0;
    window.rlhfuseViews.push(new View(root, parse(root.dataset.source), wall));
  }
})();
