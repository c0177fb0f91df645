// Tables that are updated in place: only cells whose content changed are drawn again, so that selections stay.

import { element } from "./dom.js";
import { count } from "./format.js";


/**
 * A table of rows. A column has a `title`, a `cell` that makes the content (a node or text) from a row, and a `value` (what
 * decides whether the cell is drawn again; the content where it is text). `kind` is its CSS class. The `first` rows are
 * shown until all are asked for.
 */
export class Table {
  constructor(place, columns, keyOf, nothing, first = 50) {
    this.first = first;
    this.columns = columns;
    this.keyOf = keyOf;
    this.rows = new Map();
    this.all = false;
    this.body = element("tbody");
    const head = element("tr", {}, ...columns.map(({ title, kind = "" }) => element("th", { textContent: title, className: kind })));
    this.table = element("table", {}, element("thead", {}, head), this.body);
    this.empty = element("p", { className: "nothing", textContent: nothing });
    this.more = element("button", { className: "more", onclick: () => this.showAll() });
    place.append(this.table, this.empty, this.more);
  }

  update(rows) {
    this.given = rows;
    const shown = this.all ? rows : rows.slice(0, this.first);
    const kept = new Map(shown.map((row, index) => [this.keyOf(row, index), this.drawn(row, this.keyOf(row, index))]));
    const lines = [...kept.values()].map((entry) => entry.line);
    const isSame = lines.length === this.body.rows.length && lines.every((line, index) => line === this.body.rows[index]);
    if (!isSame) this.body.replaceChildren(...lines);
    this.rows = kept;
    this.table.hidden = !rows.length;
    this.empty.hidden = rows.length > 0;
    this.more.hidden = shown.length === rows.length;
    this.more.textContent = `Show all ${count(rows.length)}`;
  }

  showAll() {
    this.all = true;
    this.update(this.given);
  }

  drawn(row, key) {
    const entry = this.rows.get(key) ?? this.made();
    this.columns.forEach((column, index) => {
      const value = (column.value ?? column.cell)(row);
      if (entry.values[index] === value) return;
      entry.values[index] = value;
      entry.cells[index].replaceChildren(column.cell(row));
    });
    return entry;
  }

  made() {
    const cells = this.columns.map(({ title, kind = "" }) => {
      const cell = element("td", { className: kind });
      cell.dataset.title = title;
      return cell;
    });
    return { line: element("tr", {}, ...cells), cells, values: [] };
  }
}
