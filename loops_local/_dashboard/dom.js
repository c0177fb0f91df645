// Elements. What comes from the service is only ever set as text or as an attribute of a fixed name, never as HTML.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

export function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

export function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** Text of others, which must not turn the direction of what stands beside it. */
export const text = (value) => element("bdi", { textContent: value });

/** Change a node's content only where it differs, so that a selection in it stays. */
export function show(node, value) {
  if (node.textContent !== value) node.textContent = value;
}

/** Show terms and values in a `dl`, which is drawn again only when one has changed. */
export function showFacts(place, pairs) {
  const key = JSON.stringify(pairs);
  if (place.dataset.shown === key) return;
  place.dataset.shown = key;
  place.replaceChildren(...pairs.map(([term, value]) => (
    element("div", {}, element("dt", { textContent: term }), element("dd", {}, text(value)))
  )));
}
