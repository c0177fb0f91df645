// Charts as SVG: lines over steps or over time, with axes; and the small curves in the list of runs.

import { svg } from "./dom.js";
import { number } from "./format.js";

const LEFT = 56, RIGHT = 10, TOP = 14, BOTTOM = 22;
const SMALL = { width: 104, height: 26, margin: 3 };

/** Return about `most` round numbers from `low` to `high`. */
export function ticks(low, high, most, whole = false) {
  const rough = Math.max((high - low) / most, whole ? 1 : 0);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.7);
  const first = Math.ceil(low / step - 1e-9), last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, index) => (first + index) * step);
}

/** Return the lowest and the highest value that the axis shows. */
function range(values, fromZero) {
  const known = values.filter((value) => value !== null);
  if (!known.length) return [0, 1];
  let low = fromZero ? 0 : Math.min(...known), high = Math.max(...known);
  if (low === high) [low, high] = low === 0 ? [0, 1] : [low - Math.abs(low) / 2, high + Math.abs(high) / 2];
  if (fromZero) return [low, high * 1.08];
  const space = (high - low) * 0.06;
  return [low - space, high + space];
}

/** Return the path through points; a value that is not a number interrupts it. */
function path(points, x, y) {
  let drawing = false, data = "";
  for (const [at, value] of points) {
    if (value !== null) data += `${drawing ? "L" : "M"}${x(at).toFixed(1)} ${y(value).toFixed(1)}`;
    drawing = value !== null;
  }
  return data;
}

/** Whether a point has no neighbour to which a line could lead. */
function isAlone(_, index, points) {
  return [points[index - 1], points[index + 1]].every((each) => (each?.[1] ?? null) === null);
}

const scale = (low, high, start, end) => (value) => start + ((value - low) / (high - low || 1)) * (end - start);

const label = (content, attributes) => {
  const made = svg("text", attributes);
  made.textContent = content;
  return made;
};

/**
 * A chart that is drawn again with each new data.
 *
 * `draw` takes `series` (lists of points `[x, y]`), `x` (`[first, last]`, or by the data), `fromZero`, `xTicks`
 * (pairs of place and text, or by the data), `xUnit`, `format` and `whole` (of y), and `marks` (pairs of place and text).
 */
export class Chart {
  constructor(height, name) {
    this.height = height;
    this.element = svg("svg", { class: "chart", height, role: "img", "aria-label": name });
    this.element.addEventListener("pointermove", (event) => this.point(event.offsetX));
    this.element.addEventListener("pointerleave", () => this.point(null));
    new ResizeObserver(() => this.spec && this.draw(this.spec)).observe(this.element);
  }

  draw(spec) {
    this.spec = spec;
    const width = this.element.clientWidth;
    if (width < LEFT + RIGHT + 20) return; // it is hidden
    const all = spec.series.flat();
    const [first, last] = spec.x ?? [Math.min(...all.map((point) => point[0])), Math.max(...all.map((point) => point[0]))];
    const [low, high] = range(all.map((point) => point[1]), spec.fromZero);
    this.x = scale(first, last, LEFT, width - RIGHT);
    this.y = scale(low, high, this.height - BOTTOM, TOP);
    this.element.setAttribute("viewBox", `0 0 ${width} ${this.height}`);
    this.element.replaceChildren(
      ...this.rows(ticks(low, high, this.height < 160 ? 3 : 4, spec.whole), width),
      ...this.columns(spec.xTicks ?? this.steps(first, last, width), width),
      ...this.marks(spec.marks ?? [], width),
      ...spec.series.map((points, index) => svg("path", { class: `line line-${index}`, d: path(points, this.x, this.y) })),
      ...spec.series.flatMap((points, index) => this.dots(points.filter(isAlone), index)),
      (this.cursor = svg("g", { class: "cursor" })),
    );
    this.point(this.at ?? null);
  }

  rows(values, width) {
    return values.flatMap((value) => [
      svg("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: this.y(value), y2: this.y(value) }),
      label(this.spec.format(value), { x: LEFT - 8, y: this.y(value) + 4, "text-anchor": "end" }),
    ]);
  }

  columns(places, width) {
    return places.map(([at, name]) => {
      const x = this.x(at);
      const anchor = x < LEFT + 20 ? "start" : x > width - RIGHT - 20 ? "end" : "middle";
      return label(name, { x, y: this.height - 6, "text-anchor": anchor });
    });
  }

  steps(first, last, width) {
    const places = first === last ? [first] : ticks(first, last, Math.max(2, Math.floor(width / 110)), true);
    return places.map((value, index) => [value, index ? number(value) : `${this.spec.xUnit} ${number(value)}`]);
  }

  marks(places, width) {
    let free = LEFT - 20;
    return places.flatMap(([at, name]) => {
      const x = this.x(at), place = Math.min(x, width - RIGHT - 8);
      const line = svg("line", { class: "mark", x1: x, x2: x, y1: TOP, y2: this.height - BOTTOM });
      if (place < free) return [line];
      free = place + 38;
      return [line, label(name, { class: "mark-name", x: place, y: TOP - 4, "text-anchor": "middle" })];
    });
  }

  dots(points, index) {
    const known = points.filter((point) => point[1] !== null);
    return known.map(([at, value]) => svg("circle", { class: `dot dot-${index}`, cx: this.x(at), cy: this.y(value), r: 2.5 }));
  }

  /** Show the values of the points that are next to a place. */
  point(place) {
    this.at = place;
    if (!this.cursor) return;
    const nearest = place === null ? [] : this.spec.series.map((points) => this.next(points, place));
    const found = nearest.map((point, index) => [point, index]).filter(([point]) => point);
    this.cursor.replaceChildren(...found.flatMap(([point, index]) => this.dots([point], index)));
    this.onPoint?.(found.length ? nearest : null);
  }

  next(points, place) {
    const known = points.filter((point) => point[1] !== null);
    return known.reduce((best, point) => {
      const isNearer = !best || Math.abs(this.x(point[0]) - place) < Math.abs(this.x(best[0]) - place);
      return isNearer ? point : best;
    }, null);
  }
}

/** Return a small curve without axes. */
export function outline(values) {
  const { width, height, margin } = SMALL;
  const known = values.filter((value) => value !== null);
  const image = svg("svg", { class: "outline", viewBox: `0 0 ${width} ${height}`, width, height, "aria-hidden": "true" });
  if (!known.length) return image;
  const x = scale(0, values.length - 1, margin, width - margin);
  const y = scale(Math.min(...known), Math.max(...known), height - margin, margin);
  const end = values.findLastIndex((value) => value !== null);
  const middle = Math.min(...known) === Math.max(...known) ? () => height / 2 : y;
  image.append(
    svg("path", { class: "line line-0", d: path(values.map((value, index) => [index, value]), x, middle) }),
    svg("circle", { class: "dot dot-0", cx: x(end), cy: middle(values[end]), r: 2 }),
  );
  return image;
}
