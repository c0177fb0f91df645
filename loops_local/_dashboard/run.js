// One run: its facts, and a chart for each of its curves.

import { Card } from "./cards.js";
import { byId, show, showFacts } from "./dom.js";
import * as format from "./format.js";

const TITLES = { loss: "Loss", grad_norm: "Gradient norm", learning_rate: "Learning rate" };
let shownRun = null, cards = new Map();

export function showRun(data, id) {
  if (shownRun !== id) forgetRun(id);
  const run = data.run;
  show(byId("run-name"), run?.row.name ?? id);
  if (run === null) {
    showFacts(byId("run-facts"), []);
    return show(byId("run-note"), `There is no run ${id}.`);
  }
  showFacts(byId("run-facts"), factsOfRun(run, data.now));
  const curves = [...run.curves.filter(isWorthShowing), ...run.own];
  for (const curve of curves) showCurve(curve, run.versions);
  show(byId("run-note"), noteOfRun(run, curves));
}

function forgetRun(id) {
  shownRun = id;
  cards = new Map();
  byId("run-curves").replaceChildren();
}

function factsOfRun({ row, curves }, now) {
  const rate = curves.find((curve) => curve.name === "learning_rate");
  return [
    ["Id", row.id],
    ["Model", row.model],
    ["Rank", format.count(row.rank)],
    ["Status", format.words(row.status)],
    ["Step", format.count(row.step)],
    ["Version served", format.count(row.version)],
    ["Learning rate", format.number(rate?.last)],
    ["Tokens per second", format.rate(row.tokens_per_second)],
    ["Last use", format.ago(row.used_at, now)],
  ];
}

/** A learning rate that does not change is a fact, not a curve. */
function isWorthShowing(curve) {
  return curve.name !== "learning_rate" || new Set(curve.points.map((point) => point[1])).size > 1;
}

function noteOfRun(run, curves) {
  if (!curves.some((curve) => curve.points.length)) return "No step since the service was started.";
  return run.versions.length ? "Dashed lines are the versions that the sampler served." : "";
}

function showCurve(curve, versions) {
  if (!curve.points.length) return;
  const card = cards.get(curve.name) ?? newCard(curve.name);
  const newest = curve.last === null ? "not a number" : format.number(curve.last);
  const first = curve.points[0][0];
  const marks = versions.filter(([version]) => version >= first).map(([version]) => [version, `v${version}`]);
  const spec = { series: [curve.points], marks, xUnit: "step", format: format.number };
  card.update([newest], spec, (step) => `step ${format.count(step)}`);
}

function newCard(name) {
  const card = new Card(TITLES[name] ?? name, [""], name === "loss" ? 240 : 180);
  card.element.classList.toggle("first", name === "loss");
  cards.set(name, card);
  byId("run-curves").append(card.element);
  return card;
}
