"use strict";
// The graphs: how the model was cut, why, and each one's code before and after the passes, side by side.

const CHUNK = 200; // lines in one block that the browser may leave unrendered
const panes = { graph: null, before: [], after: [], texts: {}, body: {}, hits: {}, at: -1 };

// A Linear's parameters in the code: "layers.0.q_proj" is l_self_modules_layers_modules_0_modules_q_proj_parameters_weight_
// there, or shorter when Dynamo saw an inner module.
function patternOf(name, text) {
  const parts = name.split(".").map((part) => part.replace(/[^A-Za-z0-9_]/g, "_"));
  for (let from = 0; from < parts.length; from++) {
    const pattern = new RegExp(`(?<![A-Za-z0-9])${parts.slice(from).join("[._](?:modules_|_modules_|_)?")}(?![A-Za-z0-9])(?!_?[0-9])`, "i");
    if (pattern.test(text)) return pattern;
  }
  return null;
}

function renderGraphs() {
  const graphs = report.graphs ?? [];
  const row = (graph) => el("tr", { "data-graph": graph.index },
    el("th", { scope: "row" }, el("button", { type: "button", class: "link", on: { click: () => showInCode(graph.index) } }, `Graph ${graph.index}`)),
    el("td", {}, graph.label), el("td", {}, number(graph.linears.length)),
    el("td", {}, graph.num_nodes_after ? `${number(graph.num_nodes_before)} → ${number(graph.num_nodes_after)}` : number(graph.num_nodes_before)),
    el("td", {}, (graph.types_from ?? []).map((place) => el("div", {}, `${place.tokens}: ${graphName(place)}`))),
    el("td", {}, graph.break_reason && el("div", {}, el("b", {}, "Break: "), graph.break_reason),
      graph.compiled_again_because && el("div", {}, el("b", {}, "Compiled again: "), graph.compiled_again_because),
      !graph.break_reason && !graph.compiled_again_because && "–"));
  byId("graphs").replaceChildren(
    heading("graphs", "Graphs"),
    el("div", { class: "scroll" }, el("table", { class: "small wide" }, el("thead", {}, el("tr", {},
      ["graph", "what it is", "Linears", "nodes", "types from", "break, recompile"].map((text) => el("th", { scope: "col" }, text)))), el("tbody", {}, graphs.map(row)))),
    el("div", { id: "code" }));
  const first = graphs.find((graph) => graph.before || graph.after);
  if (first) whenNear(byId("code"), () => panes.graph ?? showGraph(first.index));
  else byId("code").append(el("p", { class: "hint" }, "The code of the graphs is not in this report."));
}

function showGraph(index) {
  const graph = report.graphs.find((one) => one.index === index);
  panes.graph = graph;
  byId("graphs").querySelectorAll("tr[data-graph]").forEach((row) => row.classList.toggle("taken", Number(row.dataset.graph) === index));
  const pane = (stage, title) => {
    const texts = (graph[stage] ?? "").split("\n");
    const lines = texts.map((text, at) =>
      el("span", { class: `line${/freeact/.test(text) ? " ours" : ""}`, "data-line": at + 1 }, `${text}\n`));
    panes[stage] = lines;
    // Where the body begins: the arguments before it are many.
    panes.body[stage] = texts.findIndex((text) => text.startsWith(")"));
    panes.texts[stage] = texts;
    const chunks = [];
    for (let at = 0; at < lines.length; at += CHUNK)
      chunks.push(el("span", { class: "chunk", style: `contain-intrinsic-height:auto ${Math.min(CHUNK, lines.length - at) * 1.5}em` }, lines.slice(at, at + CHUNK)));
    return el("figure", { class: "pane" }, el("figcaption", { id: `${stage}-title` }, title, el("span", { class: "note", id: `${stage}-hits` })),
      el("pre", { id: `pane-${stage}`, tabindex: "0", "aria-labelledby": `${stage}-title` }, graph[stage] ? chunks : el("span", { class: "hint" }, "not recorded")));
  };
  byId("code").replaceChildren(
    el("div", { class: "head" }, el("h3", {}, `Graph ${graph.index}: ${graph.label}`), el("div", { class: "tools" },
      el("span", { class: "note", id: "code-note", role: "status" }),
      el("button", { type: "button", on: { click: () => stepHits(-1) } }, "Previous"), el("button", { type: "button", on: { click: () => stepHits(1) } }, "Next"))),
    el("div", { class: "panes" }, pane("before", "Before the passes"), pane("after", "After the passes")));
  markCode(choice.members);
}

function markCode(members) {
  if (!panes.graph) return;
  // Of many, the first: side by side, lines of one Linear can be compared.
  const names = members.slice(0, 1).map((i) => linears[i].name);
  panes.hits = {};
  for (const stage of ["before", "after"]) {
    byId(`pane-${stage}`).querySelectorAll(".hit").forEach((line) => line.classList.remove("hit", "current"));
    const patterns = names.map((name) => patternOf(name, panes.graph[stage] ?? "")).filter(Boolean);
    const at = panes.texts[stage].flatMap((text, line) => (patterns.some((pattern) => pattern.test(text)) ? [line] : []));
    const uses = at.filter((line) => line > panes.body[stage]);
    const hits = at.map((line) => panes[stage][line]);
    hits.forEach((line) => line.classList.add("hit"));
    panes.hits[stage] = uses.length ? uses.map((line) => panes[stage][line]) : hits;
    byId(`${stage}-hits`).textContent = names.length && hits.length ? plural(hits.length, "line") : "";
  }
  byId("code-note").textContent = names.length ? names[0] : "";
  panes.at = -1;
  stepHits(1);
}

function stepHits(by) {
  const most = Math.max(panes.hits.before?.length ?? 0, panes.hits.after?.length ?? 0);
  if (!most) return;
  panes.at = (panes.at + by + most) % most;
  for (const stage of ["before", "after"]) {
    const [pane, hits] = [byId(`pane-${stage}`), panes.hits[stage]];
    pane.querySelectorAll(".current").forEach((line) => line.classList.remove("current"));
    const line = hits[Math.min(panes.at, hits.length - 1)];
    if (!line) continue;
    line.classList.add("current");
    // Not scrollIntoView: only the pane moves, not the page.
    pane.scrollTop += line.getBoundingClientRect().top - pane.getBoundingClientRect().top - pane.clientHeight / 3;
  }
}

function showInCode(index) {
  if (panes.graph?.index !== index) showGraph(index);
  byId("code").scrollIntoView({ block: "start" });
  byId("pane-before")?.focus({ preventScroll: true });
}
choice.listeners.push(markCode);
