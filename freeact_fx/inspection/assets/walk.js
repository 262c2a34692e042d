"use strict";
// The model's walk: its stacks of layers and single Linears from top to bottom; a layer is a graph of its groups
// (a transform, then the Linears that read it), laid out by dagre. Layers of equal facts are one until unfolded.

const tree = byId("tree");
const handles = new WeakMap(); // tree item -> {members, title, unfold, fold}
const layerItems = new Map(); // layer -> function that shows its item, for reveal()
const SIZES = { transform: [70, 30], linear: [98, 44] };

const swatch = (plan, state) => el("span", { class: "swatch", "data-plan": plan, "data-state": state, "aria-hidden": "true" });

function treeItem(level, { label, row, members, title, children, open, kind }) {
  const item = el("li", {
    role: "treeitem", "aria-level": level, "aria-label": label, tabindex: "-1", class: `item ${kind}`,
    "aria-expanded": children ? "false" : null,
  }, row);
  let body = null;
  const handle = {
    members, title,
    unfold() {
      if (!children || body) return;
      body = el("ul", { role: "group" }, children());
      item.append(body);
      item.setAttribute("aria-expanded", "true");
      markChosen();
    },
    fold() {
      if (!body) return;
      body.remove();
      body = null;
      item.setAttribute("aria-expanded", "false");
    },
  };
  handles.set(item, handle);
  if (open) handle.unfold();
  return item;
}

// ---------------------------------------------------------------- the graph of a layer

// Alike layers, drawn once: every node stands for the same Linears of each of them.
function drawLayers(alike, level) {
  const base = alike[0];
  const everywhere = (indices) => {
    const at = indices.map((i) => base.members.indexOf(i));
    return alike.flatMap((layer) => at.map((position) => layer.members[position]));
  };
  const graph = new dagre.graphlib.Graph();
  graph.setGraph({ rankdir: "LR", nodesep: 8, ranksep: 18, marginx: 2, marginy: 4 });
  graph.setDefaultEdgeLabel(() => ({}));
  const nodes = new Map();
  let before = [];
  const entries = groupsOf(base.members);
  entries.forEach((entry, at) => {
    const place = (key, kind, node, from) => {
      const [width, height] = SIZES[kind];
      graph.setNode(key, { width, height });
      nodes.set(key, node);
      from.forEach((other) => graph.setEdge(other, key));
      return key;
    };
    if (entry.groups.length) before = [place(`t${at}`, "transform", transformNode(entry, everywhere, level), before)];
    const from = before;
    before = entry.nodes.map((members, j) => place(`n${at}.${j}`, "linear", linearNode(members, everywhere, level), from));
  });
  dagre.layout(graph);
  // Of a group's Linears, the first stands on top.
  entries.forEach(({ nodes: own }, at) => {
    const placed = own.map((_, j) => graph.node(`n${at}.${j}`));
    const heights = placed.map(({ y }) => y).sort((a, b) => a - b);
    placed.forEach((node, j) => (node.y = heights[j]));
  });
  const { width, height } = graph.graph();
  for (const [key, node] of nodes) {
    const { x, y, width: w, height: h } = graph.node(key);
    node.style.cssText = `left:${x - w / 2}px;top:${y - h / 2}px;width:${w}px;height:${h}px`;
  }
  const edges = graph.edges().map(({ v, w }) => edgePath(graph.node(v), graph.node(w)));
  return el("li", { role: "none", class: "graph-frame" },
    el("div", { class: "graph", role: "none", style: `width:${width}px;height:${height}px` },
      svg("svg", { width, height, "aria-hidden": "true" }, edges), [...nodes.values()]));
}

function edgePath(from, to) {
  const [x0, y0, x1, y1] = [from.x + from.width / 2, from.y, to.x - to.width / 2, to.y];
  const middle = (x0 + x1) / 2;
  return svg("path", { d: `M${x0} ${y0}C${middle} ${y0} ${middle} ${y1} ${x1 - 4} ${y1}`, class: "edge", "marker-end": "url(#arrow)" });
}

function transformNode(entry, everywhere, level) {
  const members = everywhere(entry.nodes.flat());
  const plan = planOf(linears[members[0]]);
  const names = entry.nodes.map((own) => lastName(shortName(own[0]))).join(", ");
  const node = el("div", {
    role: "treeitem", "aria-level": level, tabindex: "-1", class: "node transform", "data-plan": plan,
    "aria-label": `${plan} transform of ${names}`,
    title: "One transform per token type; the Linears behind it read its codes",
  }, plan);
  handles.set(node, { members, title: `transform of ${names}` });
  return node;
}

function linearNode(own, everywhere, level) {
  const members = everywhere(own);
  const linear = linears[members[0]];
  const [plan, state] = [planOf(linear), stateOf(linear)];
  const name = lastName(shortName(own[0]));
  const times = members.length > 1 ? ` × ${members.length}` : "";
  const words = (linear.precision || "–") + (own.length > 1 ? ` × ${own.length}` : ""); // experts
  const node = el("div", {
    role: "treeitem", "aria-level": level, tabindex: "-1", class: "node linear", "data-state": state,
    "aria-label": `${name} ${words}, ${members.length > 1 ? `${members.length} times, ` : ""}${state === "alone" ? "left alone" : `plan ${plan}, types ${state}`}`,
    title: shortName(own[0]) + times,
  }, swatch(plan, state), el("span", { class: "words" }, el("b", {}, name), el("small", {}, words)));
  handles.set(node, { members });
  return node;
}

// ---------------------------------------------------------------- the tree

const strip = (members) => el("span", { class: "strip", "aria-hidden": "true" },
  members.slice(0, 14).map((i) => swatch(planOf(linears[i]), stateOf(linears[i]))), members.length > 14 && "…");

function worstOf(members) {
  const values = members.map((i) => worstError(linears[i])).filter((x) => x !== null);
  return values.length ? Math.max(...values) : null;
}
const errorNote = (members) => {
  const worst = worstOf(members);
  return worst === null ? null : el("span", { class: "note" }, `worst error ${percent(worst)}`);
};

function linearItem(i, level) {
  const linear = linears[i];
  return treeItem(level, {
    kind: "single", members: [i], label: `${linear.name}, ${STATES[stateOf(linear)]}`,
    row: el("div", { class: "row" }, swatch(planOf(linear), stateOf(linear)), el("b", {}, linear.name),
      el("span", { class: "note" }, `${linear.shape.join(" × ")} · ${linear.precision}`), errorNote([i])),
  });
}

function layerItem(layer, level, { open = false, width = 0 } = {}) {
  const item = treeItem(level, {
    kind: "layer", members: layer.members, title: layer.name, open,
    label: `layer ${layer.name}, ${plural(layer.members.length, "Linear")}`,
    row: el("div", { class: "row" }, el("span", { class: "chevron" }), el("b", { style: `min-width:${0.9 * width}ch` }, layer.name), strip(layer.members), errorNote(layer.members)),
    children: () => [drawLayers([layer], level + 1)],
  });
  layerItems.set(layer, () => (handles.get(item).unfold(), item));
  return item;
}

function runItem(run, open) {
  const { layers: alike, stack } = run;
  const name = `${stack}.${alike[0].index} – ${alike.at(-1).index}`;
  const members = alike.flatMap((layer) => layer.members);
  const item = treeItem(1, {
    kind: "run", members, title: name, open,
    label: `${name}: ${alike.length} layers of equal facts`,
    row: el("div", { class: "row" }, el("span", { class: "chevron" }), el("b", {}, name),
      el("span", { class: "count" }, `${alike.length} layers of equal facts`), strip(alike[0].members), errorNote(members)),
    children: () => {
      const list = treeItem(2, {
        kind: "list", members, title: name, label: `${name}, layer by layer`,
        row: el("div", { class: "row" }, el("span", { class: "chevron" }), "Layer by layer"),
        children: () => alike.map((layer) => layerItem(layer, 3, { width: alike.at(-1).name.length })),
      });
      for (const layer of alike)
        layerItems.set(layer, () => {
          handles.get(item).unfold();
          const now = [...item.querySelectorAll(".list")][0];
          handles.get(now).unfold();
          return layerItems.get(layer)();
        });
      return [drawLayers(alike, 2), list];
    },
  });
  for (const layer of alike)
    if (!layerItems.has(layer)) layerItems.set(layer, () => (handles.get(item).unfold(), layerItems.get(layer)()));
  return item;
}

function renderWalk() {
  const longest = new Map(); // of each stack one run is unfolded
  for (const item of walk)
    if (item.layers && item.layers.length > (longest.get(item.stack)?.layers.length ?? 0)) longest.set(item.stack, item);
  const items = walk.map((item) => {
    if (item.kind === "linear") return linearItem(item.index, 1);
    const isOpen = longest.get(item.stack) === item;
    return item.layers.length > 1 ? runItem(item, isOpen) : layerItem(item.layers[0], 1, { open: isOpen });
  });
  const ends = (text, note) => el("li", { role: "none", class: "end" }, el("b", {}, text), el("span", { class: "note" }, note));
  tree.replaceChildren(ends("tokens", `types: ${typeNames.join(", ") || "–"}`), ...items, ends("output", ""));
  tree.querySelector('[role="treeitem"]')?.setAttribute("tabindex", "0");
}

// Unfold down to a Linear and give its node, or that of its layer, the focus.
function reveal(members) {
  const layer = layerOf.get(members[0]);
  const holds = (item) => handles.get(item).members.includes(members[0]);
  let item;
  if (!layer) item = [...tree.querySelectorAll(".single")].find(holds);
  else {
    item = layerItems.get(layer)();
    if (members.length === 1) item = [...item.querySelectorAll(".node.linear")].find(holds) ?? item;
  }
  if (item) walkKeys.focus(item);
}

function markChosen() {
  const chosen = new Set(choice.members);
  for (const item of tree.querySelectorAll('[role="treeitem"]')) {
    const { members } = handles.get(item);
    const held = members.filter((i) => chosen.has(i)).length;
    const isNode = item.classList.contains("linear") || item.classList.contains("single");
    item.setAttribute("aria-selected", String(isNode && held > 0 && held === members.length));
    item.classList.toggle("holds", isNode && held > 0);
  }
}

const foldItem = (item) => handles.get(item).fold?.();
const unfoldItem = (item) => handles.get(item).unfold?.();
const touchItem = (item) => choose(handles.get(item).members, { title: handles.get(item).title });
const walkKeys = rove(tree, '[role="treeitem"]', {
  fold: foldItem,
  unfold: unfoldItem,
  touch: touchItem,
  open(item) {
    touchItem(item);
    if (item.getAttribute("aria-expanded") === "false") unfoldItem(item);
    else focusFacts(item);
  },
});
tree.addEventListener("click", (event) => {
  const item = event.target.closest('[role="treeitem"]');
  if (!item || (!item.classList.contains("node") && !event.target.closest(".row"))) return;
  item.focus({ preventScroll: true });
  touchItem(item);
  if (item.getAttribute("aria-expanded") === "true") foldItem(item);
  else unfoldItem(item);
});
byId("fold-all").addEventListener("click", () => {
  tree.querySelectorAll('[aria-expanded="true"]').forEach(foldItem);
  tree.querySelector('[role="treeitem"]')?.setAttribute("tabindex", "0");
});
byId("unfold-all").addEventListener("click", () => {
  for (let depth = 0; depth < 3; depth++) tree.querySelectorAll('[aria-expanded="false"]').forEach(unfoldItem);
});
choice.listeners.push(markChosen);

function renderLegend() {
  const used = (what, of) => what.filter((one) => linears.some((linear) => of(linear) === one));
  const entry = (picture, text) => el("li", {}, picture, text);
  const plans = used(PLANS, planOf).map((plan) => entry(swatch(plan, "typed"), plan));
  const states = used(Object.keys(STATES), stateOf).map((state) =>
    entry(swatch(state === "alone" ? "none" : "any", state), STATES[state]));
  byId("legend").replaceChildren(
    el("ul", { class: "legend", "aria-label": "Colours: plan" }, el("li", { class: "lead" }, "Plan"), plans,
      entry(el("span", { class: "pill" }), "transform of a group"), entry(el("span", { class: "arrow" }, "→"), "order of the model")),
    el("ul", { class: "legend", "aria-label": "Patterns: token types" }, el("li", { class: "lead" }, "Types"), states),
  );
}
