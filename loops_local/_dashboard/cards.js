// A card: a name, the newest values, and their chart. The values at the pointer take the place of the newest ones.

import { Chart } from "./charts.js";
import { element, show, text } from "./dom.js";
import { NONE } from "./format.js";

export class Card {
  constructor(title, names, height) {
    this.values = names.map((name, index) => element("span", { className: `value value-${index}` }, element("b"), ` ${name}`));
    this.chart = new Chart(height, title);
    this.at = element("span", { className: "at" });
    this.element = element("article", {},
      element("div", { className: "top" }, element("h3", {}, text(title)), this.at),
      element("p", { className: "values" }, ...this.values),
      this.chart.element,
    );
    this.chart.onPoint = (points) => this.point(points);
  }

  update(values, spec, place) {
    [this.shown, this.place, this.format] = [values, place, spec.format];
    this.chart.draw(spec);
  }

  /** Show the values at the pointer, or the newest ones. */
  point(points) {
    this.values.forEach((value, index) => {
      const there = points?.[index];
      show(value.firstChild, there ? this.format(there[1]) : points ? NONE : this.shown[index]);
    });
    const first = points?.find((point) => point);
    show(this.at, first ? this.place(first[0]) : "");
  }
}
