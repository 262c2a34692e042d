"use strict";
// Everything that is known of what is chosen: one Linear, or several at once (equal facts once, numbers as ranges).

const facts = byId("facts");
let cameFrom = null; // the item that Escape returns to

function focusFacts(item) {
  cameFrom = item;
  facts.focus();
}
facts.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && cameFrom?.isConnected) cameFrom.focus();
});

// How each field of a Linear is shown; a field that is not here is shown as it is.
const FIELDS = {
  kind: ["kind", String],
  shape: ["shape [N, K]", (shape) => `${number(shape[0])} × ${number(shape[1])}`],
  plan: ["plan", String],
  types_alike: ["all types alike", (alike) => (alike ? "yes" : "no")],
  engine: ["engine", String],
  kernel: ["kernel", String],
  precision: ["precision", String],
  dense_bytes: ["dense weight", bytes],
  packed_bytes: ["packed", bytes],
  engine_bytes: ["held by the engine", (n) => (n ? bytes(n) : "nothing besides")],
  time_ms: ["time", milliseconds],
  dense_time_ms: ["time of the dense Linear", milliseconds],
};
const SHOWN_ELSEWHERE = ["name", "group", "state", "type_source", "reason", "way_out", "graphs", "measured_error", "predicted_error"];
const isEmpty = (value) => value === null || value === undefined || value === "" || (Array.isArray(value) && !value.length);

function summary(values, format) {
  const there = values.filter((value) => !isEmpty(value));
  if (!there.length) return null;
  const different = [...new Set(there.map((value) => JSON.stringify(value)))];
  if (different.length === 1) return format(there[0]);
  if (there.every(isNumber)) return `${format(Math.min(...there))} – ${format(Math.max(...there))}`;
  return `${different.length} different`;
}

const spaced = (name) => name.split(".").flatMap((part, at) => (at ? [".", el("wbr"), part] : [part]));

function commonName(members) {
  const names = [...new Set(members.map((i) => starred(linears[i].name)))];
  return names.length === 1 ? names[0] : null;
}

const linkTo = (i, text) => el("button", {
  type: "button", class: "link", on: { click: () => { choose([i]); reveal([i]); } },
}, text ?? spaced(linears[i].name));

function renderFacts(members, { title } = {}) {
  if (!members.length) {
    const keys = [["/", "find a layer or Linear"], ["↑ ↓", "walk through layers and Linears"], ["→ ←", "unfold, fold"],
      ["Enter", "read the facts here"], ["Esc", "back to where you were"]];
    facts.replaceChildren(el("h2", {}, "Facts"), el("p", { class: "hint" }, "Choose a Linear in the walk, the heat map or the table."),
      el("dl", { class: "keys" }, keys.map(([key, what]) => [el("dt", {}, key.split(" ").map((one) => el("kbd", {}, one))), el("dd", {}, what)])));
    return;
  }
  const rows = members.map((i) => linears[i]);
  const name = members.length === 1 ? rows[0].name : (title ?? commonName(members) ?? plural(members.length, "Linear"));
  facts.replaceChildren(
    el("h2", {}, spaced(name)),
    el("p", { class: "sub", hidden: members.length === 1 }, plural(members.length, "Linear")),
    badges(rows), callout(rows), typeFacts(rows), errorFacts(members), plainFacts(rows), groupFacts(rows),
    graphLinks(rows), memberList(members),
  );
  facts.scrollTop = 0;
}

function badges(rows) {
  const kinds = new Map();
  for (const linear of rows) {
    const [plan, state] = [planOf(linear), stateOf(linear)];
    kinds.set(`${plan} ${state}`, [plan, state, (kinds.get(`${plan} ${state}`)?.[2] ?? 0) + 1]);
  }
  return el("ul", { class: "badges" }, [...kinds.values()].map(([plan, state, count]) =>
    el("li", {}, swatch(plan, state), state === "alone" ? "left alone" : `${plan}, ${state}`, kinds.size > 1 && ` × ${count}`)));
}

function callout(rows) {
  const reasons = [...new Set(rows.filter(isLeftAlone).map((linear) => JSON.stringify([linear.reason, linear.way_out ?? ""])))];
  if (!reasons.length) return el("div", { hidden: true });
  return el("div", { class: "callout" }, reasons.slice(0, 5).map((pair) => {
    const [reason, wayOut] = JSON.parse(pair);
    return [el("p", {}, el("b", {}, "Left alone: "), reason), wayOut && el("p", {}, el("b", {}, "Way out: "), wayOut)];
  }));
}

function typeFacts(rows) {
  const source = summary(rows.map((linear) => linear.type_source), String);
  if (!source) return el("div", { hidden: true });
  // A sentence about lost types is no chain.
  const claims = rows[0].state === "refused" ? [source] : source.split("; ");
  const steps = claims.flatMap((claim) => claim.split(" -> ").map((step, i) => el("li", { class: i ? "" : "start" }, el("code", {}, step))));
  return el("section", {}, el("h3", {}, "Token types"),
    el("p", {}, summary(rows.map((linear) => STATES[stateOf(linear)]), String)),
    el("ol", { class: "chain", "aria-label": "Where the types come from" }, steps),
    claims.length > 1 && el("p", { class: "hint" }, "Where several speak of a token, the later wins."));
}

function errorFacts(members) {
  const kinds = [["measured", "measured_error"], ["predicted", "predicted_error"]].filter(([, key]) =>
    members.some((i) => linears[i][key]));
  if (!kinds.length) return el("div", { hidden: true });
  const largest = worstOf(members) || 1;
  const types = [...new Set(members.flatMap((i) => kinds.flatMap(([, key]) => Object.keys(linears[i][key] ?? {}))))];
  const cell = (key, type) => {
    const found = members.map((i) => [linears[i][key]?.[type], i]).filter(([x]) => isNumber(x));
    if (!found.length) return el("td", {}, "–");
    const [worst, where] = found.reduce((a, b) => (b[0] > a[0] ? b : a));
    const text = summary(found.map(([x]) => x), percent);
    return el("td", {}, el("span", { class: "bar", style: `--part:${Math.min(1, worst / largest)}` }), text,
      found.length > 1 && el("div", {}, "worst: ", linkTo(where, placeName(where))));
  };
  return el("section", {}, el("h3", {}, "Error of the output, per type"),
    el("table", { class: "small" },
      el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "type"), kinds.map(([word]) => el("th", { scope: "col" }, word)))),
      el("tbody", {}, types.map((type) => el("tr", {}, el("th", { scope: "row" }, type), kinds.map(([, key]) => cell(key, type)))))));
}
const placeName = (i) => (places[i] ? `${places[i].layer}` : linears[i].name);

function plainFacts(rows) {
  const keys = [...new Set(rows.flatMap(Object.keys))].filter((key) => !SHOWN_ELSEWHERE.includes(key));
  const known = Object.keys(FIELDS).filter((key) => keys.includes(key));
  const others = keys.filter((key) => !(key in FIELDS));
  const pairs = [...known, ...others].flatMap((key) => {
    const [label, format] = FIELDS[key] ?? [key.replaceAll("_", " "), (value) => (typeof value === "string" ? value : JSON.stringify(value))];
    const text = summary(rows.map((linear) => linear[key]), format);
    return text === null ? [] : [el("dt", {}, label), el("dd", {}, text)];
  });
  const dense = rows.filter((linear) => !isLeftAlone(linear)).reduce((sum, linear) => sum + linear.dense_bytes, 0);
  const packed = rows.reduce((sum, linear) => sum + linear.packed_bytes, 0);
  if (rows.length > 1) pairs.push(el("dt", {}, "all together"), el("dd", {}, packed ? `${bytes(dense)} dense, ${bytes(packed)} packed` : bytes(rows.reduce((sum, linear) => sum + linear.dense_bytes, 0))));
  return el("section", {}, el("h3", {}, "Facts"), el("dl", {}, pairs));
}

function groupFacts(rows) {
  const names = [...new Set(rows.map((linear) => linear.group).filter(Boolean))];
  const all = names.map((name) => groups.get(name)).filter(Boolean);
  if (!all.length) return el("div", { hidden: true });
  const get = (key, format) => summary(all.map((group) => group[key]), format);
  const list = (values) => values.join(", ");
  const pairs = [
    ["members", all.length === 1 ? all[0].members.map((name) =>
      el("div", {}, indexOf.has(name) ? linkTo(indexOf.get(name)) : name)) : `of ${all.length} groups`],
    ["plan", get("plan", String)],
    ["left factor", get("left", (shape) => shape.join(" × "))],
    ["right factor", get("right", (shape) => shape.join(" × "))],
    ["rank of the branch", get("rank", (rank) => (rank ? String(rank) : ""))],
    ["widths of the slices", get("widths", list)],
    ["rare types", get("rare_types", list)],
    ["tokens seen", get("type_counts", (counts) => Object.entries(counts).filter(([, n]) => n).map(([type, n]) => `${type} ${number(n)}`).join(", "))],
  ].filter(([, value]) => !isEmpty(value));
  return el("section", {}, el("h3", {}, "Group"),
    el("dl", {}, pairs.map(([label, value]) => [el("dt", {}, label), el("dd", {}, value)])),
    all.length === 1 ? [planErrors(all[0], "predicted_error", "Predicted by plan"), planErrors(all[0], "measured_error", "Measured by plan")] : null);
}

function planErrors(group, key, caption) {
  const entries = Object.entries(group[key] ?? {});
  if (!entries.length) return null;
  const isNested = entries.some(([, value]) => value !== null && typeof value === "object");
  const columns = isNested ? [...new Set(entries.flatMap(([, value]) => Object.keys(value ?? {})))] : ["error"];
  const cell = (value, column) => percent(isNested ? value?.[column] : value);
  return el("table", { class: "small" }, el("caption", {}, caption),
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "plan"), columns.map((column) => el("th", { scope: "col" }, column)))),
    el("tbody", {}, entries.map(([plan, value]) => el("tr", { class: plan === group.plan ? "taken" : null },
      el("th", { scope: "row" }, plan, plan === group.plan && " ✓"), columns.map((column) => el("td", {}, cell(value, column)))))));
}

function graphLinks(rows) {
  const found = [...new Set(rows.flatMap((linear) => linear.graphs ?? []))];
  if (!found.length) return el("div", { hidden: true });
  return el("section", {}, el("h3", {}, "In the code"), el("p", {}, found.slice(0, 8).map((index) =>
    el("button", { type: "button", class: "plain", on: { click: () => showInCode(index) } }, `Graph ${index}, before and after`))));
}

function memberList(members) {
  if (members.length < 2) return el("div", { hidden: true });
  const sorted = [...members].sort((a, b) => (worstError(linears[b]) ?? -1) - (worstError(linears[a]) ?? -1) || a - b);
  const shown = sorted.slice(0, 100);
  const box = el("details", {}, el("summary", {}, `All ${members.length}, worst first`));
  box.addEventListener("toggle", () => {
    if (box.open && box.children.length === 1)
      box.append(el("ul", { class: "links" }, shown.map((i) => el("li", {}, linkTo(i), el("span", { class: "note" },
        worstError(linears[i]) === null ? "" : percent(worstError(linears[i])))))),
      sorted.length > shown.length ? el("p", { class: "hint" }, "The first 100; the table below has all.") : "");
  });
  return box;
}

choice.listeners.push(renderFacts);
