"use strict";
// What the page knows: the report's dict, and the layers, groups and kinds that follow from names.

const report = JSON.parse(document.getElementById("report-data").textContent);
const linears = report.linears ?? [];
const groups = new Map((report.groups ?? []).map((group) => [group.name, group]));
const typeNames = report.type_names ?? [];

// ---------------------------------------------------------------- elements and words

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name === "on") for (const [type, run] of Object.entries(value)) node.addEventListener(type, run);
    else if (value !== null && value !== undefined && value !== false)
      node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

// Text reaches the page as text nodes only, so a report may contain anything.
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const byId = (id) => document.getElementById(id);

// Run once when an element comes near the view: a page of many parts opens as fast as one of few.
const waiting = new Map();
const nearView = new IntersectionObserver((seen) => {
  for (const { target, isIntersecting } of seen) {
    if (!isIntersecting || !waiting.has(target)) continue;
    nearView.unobserve(target);
    const run = waiting.get(target);
    waiting.delete(target);
    run();
  }
}, { rootMargin: "600px" });
function whenNear(node, run) {
  waiting.set(node, run);
  nearView.observe(node);
}

const number = (x) => x.toLocaleString("en-US");
const isNumber = (x) => typeof x === "number" && Number.isFinite(x);

function bytes(n) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let at = 0;
  while (n >= 999.5 && at < units.length - 1) [n, at] = [n / 1000, at + 1];
  return `${at && n < 100 ? n.toPrecision(n < 10 ? 2 : 3) : Math.round(n)} ${units[at]}`;
}

function percent(x) {
  if (!isNumber(x)) return "–";
  return x > 0 && x < 5e-5 ? "< 0.01 %" : `${(100 * x).toPrecision(x < 0.1 ? 2 : 3)} %`;
}
const milliseconds = (x) => `${x.toPrecision(3)} ms`;
// Who said which types the tokens of an argument have.
const graphName = (place) => (place.graph === undefined ? place.source : `graph ${place.graph}`);
const plural = (n, word) => `${number(n)} ${word}${n === 1 ? "" : "s"}`;

// ---------------------------------------------------------------- states, plans, errors

const PLANS = ["single", "shift", "branch", "paper", "duplicate"];
const STATES = {
  typed: "typed: the type of every token is known",
  default: "default: no source of types in sight, planned for the default type",
  refused: "refused: sources conflict or were lost, runs a single transform",
  alone: "left alone: kept in its own precision",
};
const isLeftAlone = (linear) => linear.reason !== null && linear.reason !== undefined;
const stateOf = (linear) => (isLeftAlone(linear) ? "alone" : linear.state || "typed");
const planOf = (linear) => (isLeftAlone(linear) ? "none" : linear.plan || "none");

const errorOf = (linear) => linear.measured_error ?? linear.predicted_error ?? null;
function worstError(linear) {
  const values = Object.values(errorOf(linear) ?? {}).filter(isNumber);
  return values.length ? Math.max(...values) : null;
}

// ---------------------------------------------------------------- layers

// "model.layers.12.self_attn.q_proj" is "self_attn.q_proj" of layer 12 of the stack "model.layers".
function placeOf(name) {
  const parts = name.split(".");
  const at = parts.findIndex((part) => /^\d+$/.test(part));
  if (at < 0 || at === parts.length - 1) return null;
  const [stack, index] = [parts.slice(0, at).join("."), Number(parts[at])];
  return { stack, index, layer: parts.slice(0, at + 1).join("."), rest: parts.slice(at + 1).join(".") };
}
const places = linears.map((linear) => placeOf(linear.name));
const shortName = (i) => places[i]?.rest ?? linears[i].name;
const lastName = (name) => name.split(".").at(-1);
const starred = (name) => name.replace(/(^|\.)\d+(?=\.|$)/g, "$1*");

// The groups of some Linears of one layer, in order: [{group, members}], a Linear left alone by itself. Groups that
// differ only in a number of their names (experts) and have equal facts are one entry with several of each.
function groupsOf(indices) {
  const found = new Map();
  for (const i of indices) {
    const key = linears[i].group || `alone ${i}`;
    if (!found.has(key)) found.set(key, []);
    found.get(key).push(i);
  }
  const folded = new Map();
  for (const [key, members] of found) {
    const facts = JSON.stringify(members.map((i) => [starred(shortName(i)), ...equalFacts(i)]));
    const isNumbered = members.every((i) => starred(shortName(i)) !== shortName(i));
    const at = isNumbered ? facts : key;
    if (!folded.has(at)) folded.set(at, []);
    folded.get(at).push({ group: groups.get(key) ?? null, members });
  }
  return [...folded.values()].map((alike) => ({
    groups: alike.map((one) => one.group).filter(Boolean),
    // Per member of the first, the ones that stand for it in each group.
    nodes: alike[0].members.map((_, at) => alike.map((one) => one.members[at])),
  }));
}

function equalFacts(i) {
  const linear = linears[i];
  const words = (text) => (text ?? "").replace(/\d+/g, "#");
  return [linear.kind, linear.shape, linear.state, linear.plan, linear.types_alike, linear.engine, linear.kernel, linear.precision,
    words(linear.reason)];
}

// The walk: [{kind: "linear", index}] and [{kind: "layers", stack, layers: [{name, index, members}]}], where
// neighbouring layers of equal facts are together.
function makeWalk() {
  const walk = [];
  let stack = null;
  linears.forEach((_, i) => {
    const place = places[i];
    if (place === null) {
      walk.push({ kind: "linear", index: i });
      stack = null;
      return;
    }
    if (stack === null || stack.name !== place.stack) {
      stack = { name: place.stack, layers: new Map() };
      walk.push({ kind: "stack", stack });
    }
    if (!stack.layers.has(place.index)) stack.layers.set(place.index, { name: place.layer, index: place.index, members: [] });
    stack.layers.get(place.index).members.push(i);
  });
  return walk.flatMap((item) => (item.kind === "stack" ? runsOf(item.stack) : [item]));
}

function runsOf(stack) {
  const runs = [];
  for (const layer of stack.layers.values()) {
    layer.signature = JSON.stringify(layer.members.map((i) => [places[i].rest, ...equalFacts(i)]));
    const last = runs.at(-1);
    if (last && last.layers[0].signature === layer.signature) last.layers.push(layer);
    else runs.push({ kind: "layers", stack: stack.name, layers: [layer] });
  }
  return runs;
}

const walk = makeWalk();
const layers = walk.flatMap((item) => item.layers ?? []);
const layerOf = new Map(layers.flatMap((layer) => layer.members.map((i) => [i, layer])));
const indexOf = new Map(linears.map((linear, i) => [linear.name, i]));

// What a Linear is in its layer: the names of its group there, without numbers; the rows of heat map and bars.
function kindOf(i) {
  if (isLeftAlone(linears[i])) return "left alone";
  const members = groups.get(linears[i].group)?.members ?? [linears[i].name];
  return members.map((name) => lastName(starred(name))).join(", ");
}

// ---------------------------------------------------------------- the choice

// What is chosen: indices of Linears (one, or the same Linear of many layers). Parts of the page listen.
const choice = { members: [], listeners: [] };
function choose(members, options = {}) {
  choice.members = members;
  for (const listener of choice.listeners) listener(members, options);
}
