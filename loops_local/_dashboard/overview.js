// Everything at once: the figures of the last minutes, and the tables.

import { Card } from "./cards.js";
import { outline } from "./charts.js";
import { byId, element, show, showFacts, text } from "./dom.js";
import * as format from "./format.js";
import { Table } from "./tables.js";

const MINUTES = 10;

let last = null;

export function showOverview(data) {
  last = data;
  showFacts(byId("facts"), [
    ["Address", data.address],
    ["Engine", data.service.engine],
    ["Models", modelsInWords(data.models)],
    ["Up for", format.duration(data.now - data.service.started_at)],
    ["Memory", format.bytes(data.memory)],
    ["Version", data.service.version],
  ]);
  showFigures(data);
  tables.runs.update(chosen(data.runs));
  tables.samplers.update(data.samplers);
  tables.operations.update(data.work.operations);
  tables.checkpoints.update(data.checkpoints.newest);
  tables.faults.update(data.faults);
  tables.log.update(data.log);
  show(byId("runs-count"), format.count(data.runs.length));
  show(byId("samplers-count"), format.count(data.samplers.length));
  show(byId("operations-count"), operationsInWords(data.work));
  show(byId("checkpoints-count"), `${format.count(data.checkpoints.count)}, ${format.bytes(data.checkpoints.size_bytes)}`);
  show(byId("faults-count"), format.count(data.faults.length));
}

function operationsInWords(work) {
  return `${format.count(work.operations_under_way)} under way, ${format.count(work.operations_waiting)} waiting`;
}

function modelsInWords(models) {
  return models.map((model) => (model.loaded ? model.name : `${model.name} (not loaded)`)).join(", ");
}

function chosen(runs) {
  const wanted = byId("filter").value.trim().toLowerCase();
  const fits = (run) => [run.name ?? "", run.id, run.model, format.words(run.status)].some((each) => each.toLowerCase().includes(wanted));
  const found = wanted ? runs.filter(fits) : runs;
  return [...found.filter((run) => run.active), ...found.filter((run) => !run.active)];
}

// --- figures over the last minutes ---

const figures = {
  samples: new Card("Samples per second", [""], 132),
  latency: new Card("Latency of a sample", ["p50", "p95"], 132),
  work: new Card("Samples and operations", ["under way", "waiting"], 132),
  memory: new Card("Memory", [""], 132),
};

function showFigures(data) {
  const { samples, work, slices, now } = data;
  const over = (name) => slices.map((slice) => [slice.time - now, slice[name]]);
  const start = -Math.min(60 * MINUTES, Math.max(60, now - data.service.started_at));
  const xTicks = [[start, `${format.duration(-start)} ago`], [0, "now"]];
  const draw = (card, values, names, write, whole = false) => {
    const spec = { series: names.map(over), x: [start, 0], xTicks, fromZero: true, format: write, whole };
    card.update(values, spec, (at) => `${format.duration(-at)} ago`);
  };
  draw(figures.samples, [format.rate(samples.per_second)], ["samples_per_second"], format.number);
  draw(figures.latency, [format.duration(samples.p50), format.duration(samples.p95)], ["p50", "p95"], format.duration);
  draw(figures.work, [format.count(work.under_way), format.count(work.waiting)], ["under_way", "waiting"], format.count, true);
  draw(figures.memory, [format.bytes(data.memory)], ["memory"], format.bytes);
}

// --- tables ---

const now = () => last.now;

function status(row) {
  const kind = { RUNNING: "on", ACTIVE: "on", FAILED: "failed", DEPLOY_FAILED: "failed", INACTIVE: "off", STOPPED: "off", SCALED_TO_ZERO: "off" };
  return element("span", { className: `status ${kind[row.status] ?? "starting"}`, textContent: format.words(row.status) });
}

function nameOfRun(run) {
  const link = element("a", { href: `#run=${encodeURIComponent(run.id)}` }, text(run.name ?? run.id));
  return element("span", { className: "name" }, link, element("small", { textContent: run.local ? `${run.id}, local mode` : run.id }));
}

function lossOfRun(run) {
  const newest = run.loss.length && run.last_loss === null ? "not a number" : format.steady(run.last_loss);
  return element("span", { className: "loss" }, outline(run.loss), element("span", { textContent: newest }));
}

const model = { title: "Model", kind: "model", cell: (row) => text(row.model), value: (row) => row.model };
const statusColumn = { title: "Status", kind: "state", cell: status, value: (row) => row.status };
const version = { title: "Version", kind: "number", cell: (row) => format.count(row.version) };
const used = { title: "Last use", kind: "number", cell: (row) => format.ago(row.used_at, now()) };

const tables = {
  runs: new Table(byId("runs"), [
    { title: "Run", kind: "head", cell: nameOfRun, value: (run) => `${run.id} ${run.name}` },
    model,
    { title: "Rank", kind: "number rank", cell: (run) => format.count(run.rank) },
    statusColumn,
    { title: "Step", kind: "number", cell: (run) => format.count(run.step) },
    version,
    { title: "Loss", kind: "number curve", cell: lossOfRun, value: (run) => `${run.loss} ${run.last_loss}` },
    { title: "Tokens/s", kind: "number", cell: (run) => format.rate(run.tokens_per_second) },
    used,
  ], (run) => run.id, "No run."),
  samplers: new Table(byId("samplers"), [
    { title: "Sampler", kind: "head", cell: (row) => element("code", { textContent: row.id }), value: (row) => row.id },
    { title: "Samples", kind: "long", cell: (row) => text(row.of), value: (row) => row.of },
    model,
    statusColumn,
    version,
    used,
  ], (row) => row.id, "No sampler.", 12),
  operations: new Table(byId("operations"), [
    { title: "Operation", kind: "head", cell: (row) => element("code", { textContent: row.name }), value: (row) => row.name },
    { title: "Run", cell: (row) => element("code", { textContent: row.run_id }), value: (row) => row.run_id },
    { title: "State", kind: "state", cell: (row) => (row.started ? "under way" : "waiting") },
    { title: "Age", kind: "number", cell: (row) => format.duration(row.age) },
  ], (row) => `${row.run_id} ${row.id}`, "No operation of a trainer.", 12),
  checkpoints: new Table(byId("checkpoints"), [
    { title: "Checkpoint", kind: "head long", cell: (row) => element("code", { textContent: row.path }), value: (row) => row.path },
    { title: "Kind", cell: (row) => row.kind },
    { title: "Rank", kind: "number", cell: (row) => format.count(row.rank) },
    { title: "Size", kind: "number", cell: (row) => format.bytes(row.size_bytes) },
    { title: "Saved", kind: "number", cell: (row) => format.ago(row.created_at, now()) },
    { title: "Expires", kind: "number", cell: (row) => (row.expires_at === null ? "never" : `in ${format.duration(Math.max(0, row.expires_at - now()))}`) },
  ], (row) => row.path, "No checkpoint.", 12),
  faults: new Table(byId("faults"), [
    { title: "Route", kind: "head long", cell: (row) => element("code", { textContent: row.route }), value: (row) => row.route },
    { title: "What happens", cell: (row) => text(row.what), value: (row) => row.what },
    { title: "Requests left", kind: "number", cell: (row) => format.count(row.times) },
  ], (_, index) => index, "None."),
  log: new Table(byId("log"), [
    { title: "Time", kind: "time", cell: (row) => format.clock(row.time) },
    { title: "Level", kind: "level", cell: (row) => row.level.toLowerCase() },
    { title: "About", kind: "about", cell: (row) => element("code", { textContent: row.about }), value: (row) => row.about },
    { title: "Message", kind: "long message", cell: (row) => text(row.message), value: (row) => row.message },
  ], (row) => `${row.time} ${row.message}`, "No line.", 12),
};

byId("figures").append(...Object.values(figures).map((card) => card.element));
byId("filter").addEventListener("input", () => last && tables.runs.update(chosen(last.runs)));
