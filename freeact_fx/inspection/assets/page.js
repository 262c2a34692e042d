"use strict";
// The page: header, overview with what deserves attention, search; then every part is drawn once.

const SECTIONS = [["overview", "Overview"], ["walk", "Walk"], ["errors", "Errors"], ["costs", "Memory, time"], ["activations", "Activations"], ["linears", "Linears"], ["graphs", "Graphs"]];

function parameters(n) {
  for (const [size, unit] of [[1e9, "B"], [1e6, "M"], [1e3, "K"]]) if (n >= size) return `${(n / size).toPrecision(3)} ${unit} parameters`;
  return plural(n, "parameter");
}

function renderHeader() {
  const { model = {}, environment = {} } = report;
  byId("brand").replaceChildren(el("h1", {}, model.class ?? "Model"), el("p", {}, [
    model.num_parameters ? parameters(model.num_parameters) : null,
    ...["freeact_fx", "torch", "triton"].filter((name) => environment[name]).map((name) => `${name} ${environment[name]}`),
    environment.device,
  ].filter(Boolean).join(" · ")));
  byId("sections").replaceChildren(...SECTIONS.map(([id, text]) => el("a", { href: `#${id}` }, text)));
}

// ---------------------------------------------------------------- overview

function renderOverview() {
  const counts = report.counts ?? {};
  const size = report.bytes ?? {};
  const tile = (value, label, ...more) => el("div", { class: "tile" }, el("strong", {}, value), el("span", {}, label), ...more);
  const states = [["typed", counts.typed], ["default", counts.default], ["refused", counts.refused], ["alone", counts.left_alone]];
  const bar = el("div", { class: "parts", role: "img", "aria-label": states.map(([state, n]) => `${n} ${state}`).join(", ") },
    states.filter(([, n]) => n).map(([state, n]) => el("i", { "data-state": state, "data-plan": state === "alone" ? "none" : "any", style: `flex:${n}`, class: "swatch" })));
  byId("overview").replaceChildren(
    el("div", { class: "tiles" },
      tile(`${number(counts.quantized)} of ${number(counts.found)}`, "Linears quantised", bar),
      tile(size.dense ? `${bytes(size.dense)} → ${bytes(size.packed)}` : "–", "their weights, packed",
        size.packed ? el("em", {}, `${(size.dense / size.packed).toPrecision(3)} times smaller`) : null),
      tile(number(counts.groups ?? 0), "groups of Linears", el("em", {}, plansText())),
      tile(number((report.graphs ?? []).length), (report.graphs ?? []).length === 1 ? "graph" : "graphs", el("em", {}, breaksText())),
      tile(number(typeNames.length), "token types", el("em", {}, typeNames.join(", ")))),
    ...notices());
}

function plansText() {
  const counted = new Map();
  for (const group of groups.values()) counted.set(group.plan, (counted.get(group.plan) ?? 0) + 1);
  return [...counted].map(([plan, n]) => `${n} ${plan}`).join(", ");
}
const withBreaks = () => (report.graphs ?? []).filter((graph) => graph.break_reason);
const compiledAgain = () => (report.graphs ?? []).filter((graph) => graph.compiled_again_because);
const breaksText = () => `${plural(withBreaks().length, "break")}, ${plural(compiledAgain().length, "recompile")}`;

function alikeBy(rows, keyOf) {
  const found = new Map();
  for (const row of rows) found.set(keyOf(row), [...(found.get(keyOf(row)) ?? []), row]);
  return [...found.values()];
}
const indices = (graphs) => graphs.map((graph) => graph.index).join(", ");

// What a reader should know: [{level, text, detail, filter}]; the most serious first.
function findings() {
  const found = [];
  const say = (level, text, detail, filter) => found.push({ level, text, detail, filter });
  const { refused = 0, default: byDefault = 0 } = report.counts ?? {};
  const wayOut = (state) => [...new Set(linears.filter((linear) => stateOf(linear) === state).map((linear) => linear.way_out).filter(Boolean))].slice(0, 2).join(" ");
  if (refused) say("warn", `${plural(refused, "Linear")} with refused types: a single transform for all tokens`, wayOut("refused"), "refused");
  if (byDefault) say("warn", `${plural(byDefault, "Linear")} planned for the default type “${report.default_type ?? typeNames[0]}”: no source of types in sight`, wayOut("default"), "default");
  const unknown = (report.graphs ?? []).filter((graph) => (graph.types_from ?? []).some((place) => place.source === "unknown"));
  if (unknown.length) say("warn", `Types unknown where tokens enter: ${unknown.map((graph) => `graph ${graph.index}`).join(", ")}`, "The default type was assumed there.");
  for (const alike of alikeBy(withBreaks(), (graph) => graph.break_reason))
    say("warn", alike.length === 1 ? `Graph ${alike[0].index} ends at a break` : `Graphs ${indices(alike)} end at the same break`, alike[0].break_reason);
  for (const alike of alikeBy(compiledAgain(), (graph) => graph.compiled_again_because))
    say("warn", alike.length === 1 ? `Graph ${alike[0].index} was compiled again` : `Graphs ${indices(alike)} were compiled again`, alike[0].compiled_again_because);
  const crossing = (graph) => (graph.types_from ?? []).find((place) => place.source === "an earlier graph");
  for (const graph of (report.graphs ?? []).filter(crossing))
    say("info", `Graph ${graph.index} takes its types from ${graphName(crossing(graph))}`, "They crossed a break.");
  const rare = [...groups.values()].filter((group) => group.rare_types?.length);
  if (rare.length) say("info", `Rare types in ${plural(rare.length, "group")}: ${[...new Set(rare.flatMap((group) => group.rare_types))].join(", ")}`, "Too few tokens were seen to fit anything to them alone.");
  for (const alike of alikeBy(linears.filter(isLeftAlone), (linear) => (linear.reason ?? "").replace(/\d+/g, "#")))
    say("info", `${plural(alike.length, "Linear")} left alone: ${alike[0].reason}`, alike[0].way_out ?? "", alike.length === 1 ? alike[0].name : alike[0].reason);
  return found;
}

function notices() {
  const found = findings();
  if (!found.length) return [el("p", { class: "hint" }, "Nothing needs attention: every Linear is quantised, and the types of its tokens are known.")];
  const mark = { warn: "▲", info: "○" };
  const entry = ({ level, text, detail, filter }) => el("li", { class: level }, el("span", { class: "mark", role: "img", "aria-label": level === "warn" ? "Attention" : "Note" }, mark[level]),
    el("div", {}, el("b", {}, text), detail && el("p", {}, detail)),
    filter && el("button", { type: "button", class: "plain", on: { click: () => { showRows(filter); byId("linears").scrollIntoView(); byId("row-filter").focus({ preventScroll: true }); } } }, "Show"));
  const first = found.slice(0, 6).map(entry);
  return [el("ul", { class: "notices", "aria-label": "What deserves attention" }, first),
    found.length > 6 && el("details", { class: "more" }, el("summary", {}, `${found.length - 6} more`), el("ul", { class: "notices" }, found.slice(6).map(entry)))].filter(Boolean);
}

// ---------------------------------------------------------------- search

function makeSearch() {
  const [input, list] = [byId("search"), byId("found")];
  const targets = [
    ...layers.map((layer) => ({ text: layer.name, note: plural(layer.members.length, "Linear"), members: layer.members, title: layer.name })),
    ...linears.map((linear, i) => ({ text: linear.name, note: isLeftAlone(linear) ? "left alone" : `${linear.plan}, ${linear.state}`, members: [i] })),
  ];
  let found = [];
  let at = -1;
  const close = () => {
    list.hidden = true;
    input.setAttribute("aria-expanded", "false");
    input.removeAttribute("aria-activedescendant");
  };
  const go = (target) => {
    close();
    input.value = target.text;
    choose(target.members, { title: target.title });
    reveal(target.members);
  };
  const mark = () => {
    [...list.children].forEach((item, i) => item.setAttribute("aria-selected", String(i === at)));
    if (at >= 0) {
      input.setAttribute("aria-activedescendant", `found-${at}`);
      list.children[at]?.scrollIntoView({ block: "nearest" });
    }
  };
  input.addEventListener("input", () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    if (!words.length) return close();
    const rank = ({ text }) => (text === input.value ? 0 : text.endsWith(input.value) ? 1 : 2);
    found = targets.filter(({ text }) => words.every((word) => text.toLowerCase().includes(word)));
    const total = found.length;
    found = found.sort((a, b) => rank(a) - rank(b)).slice(0, 12);
    at = found.length ? 0 : -1;
    list.replaceChildren(...found.map((target, i) => el("li", { role: "option", id: `found-${i}`, on: { mousedown: (event) => { event.preventDefault(); go(target); } } },
      el("span", {}, target.text), el("span", { class: "note" }, target.note))),
    ...(total > found.length ? [el("li", { class: "hint", role: "presentation" }, `and ${total - found.length} more`)] : []),
    ...(total ? [] : [el("li", { class: "hint", role: "presentation" }, "Nothing has these words in its name")]));
    list.hidden = false;
    input.setAttribute("aria-expanded", "true");
    mark();
  });
  input.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      if (!found.length || list.hidden) return;
      event.preventDefault();
      at = (at + (event.key === "ArrowDown" ? 1 : -1) + found.length) % found.length;
      mark();
    } else if (event.key === "Enter" && at >= 0 && !list.hidden) go(found[at]);
    else if (event.key === "Escape") close();
  });
  input.addEventListener("blur", close);
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.target.closest("input, select, textarea")) return;
    event.preventDefault();
    input.focus();
    input.select();
  });
}

// ---------------------------------------------------------------- all

renderHeader();
renderOverview();
renderLegend();
renderWalk();
renderErrors();
renderCosts();
renderActivations();
renderTable();
renderGraphs();
makeSearch();

// An address with a name, report.html#model.layers.3.mlp.up_proj, opens there.
const asked = decodeURIComponent(location.hash.slice(1));
if (indexOf.has(asked)) {
  choose([indexOf.get(asked)]);
  reveal(choice.members);
} else renderFacts([]);
choice.listeners.push((members) => {
  if (members.length === 1) history.replaceState(null, "", `#${encodeURIComponent(linears[members[0]].name)}`);
});
byId("footer").replaceChildren(el("details", {}, el("summary", {}, "Configuration"), el("pre", { tabindex: "0" }, JSON.stringify(report.config ?? {}, null, 2))),
  el("p", { class: "hint" }, "Drawn with dagre (MIT) and Apache ECharts (Apache-2.0). This file makes no network request."));
document.documentElement.dataset.readyMs = Math.round(performance.now());
