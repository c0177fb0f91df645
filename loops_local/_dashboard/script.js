// Reads the data every two seconds, and shows all of it, or one run (`#run=ID`).

import { byId, show } from "./dom.js";
import { showOverview } from "./overview.js";
import { showRun } from "./run.js";

const EVERY = 2000, AT_MOST = 15000;
const STORED = "loops-dashboard-token";

// --- the token, which leaves the address bar at once ---

function parameters() {
  return new URLSearchParams(location.hash.slice(1));
}

function keepToken() {
  const given = parameters();
  if (!given.has("token")) return;
  sessionStorage.setItem(STORED, given.get("token"));
  given.delete("token");
  history.replaceState(null, "", `${location.pathname}#${given}`);
}

// --- reading ---

let timer = null, asked = 0;

async function read() {
  clearTimeout(timer);
  const turn = ++asked;
  const run = parameters().get("run");
  const query = run === null ? "" : `?run=${encodeURIComponent(run)}`;
  const token = sessionStorage.getItem(STORED) ?? "";
  try {
    const answer = await fetch(`dashboard/data${query}`, {
      headers: { Authorization: `Bearer ${token}` },
      signal: AbortSignal.timeout(AT_MOST),
    });
    if (turn !== asked) return; // another page was chosen meanwhile
    if (answer.status === 401) return askForToken();
    if (!answer.ok) throw new Error(`the service answers ${answer.status}`);
    const data = await answer.json();
    if (turn === asked) showAll(data);
  } catch (error) {
    if (turn === asked) state(`not reachable: ${error.message}`, "off");
  }
  if (turn === asked && !document.hidden) timer = setTimeout(read, EVERY);
}

function askForToken() {
  state("the token is missing or wrong", "off");
  only("entry");
}

function only(id) {
  for (const each of ["entry", "overview", "run"]) byId(each).hidden = each !== id;
}

function state(words, kind) {
  show(byId("state"), words);
  byId("state").className = kind;
}

function showAll(data) {
  state("live", "on");
  const run = parameters().get("run");
  only(run === null ? "overview" : "run");
  if (run === null) showOverview(data);
  else showRun(data, run);
  document.title = `${run === null ? "" : `${data.run?.row.name ?? run} – `}Loops on this machine`;
}

// --- the start ---

function start() {
  byId("entry").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem(STORED, byId("key").value.trim());
    byId("key").value = "";
    read();
  });
  addEventListener("hashchange", () => {
    keepToken();
    scrollTo(0, 0);
    read();
  });
  document.addEventListener("visibilitychange", () => !document.hidden && read());
  keepToken();
  read();
}

start();
