"use strict";
// The Linears as a table: by layer and folded, or filtered and sorted as one list that is drawn a part at a time.

const PART = 200; // rows that are drawn at once
const COLUMNS = ["Linear", "shape", "types", "plan", "precision", "dense", "packed", "worst error", "source, or why left alone"];
const shown = { filter: "", order: "model", limit: PART };
let tableBody = null;
let tableKeys = null;

const matches = (i, words) => {
  const linear = linears[i];
  const text = `${linear.name} ${stateOf(linear)} ${STATES[stateOf(linear)].split(":")[0]} ${linear.plan} ${linear.precision} ${linear.reason ?? ""} ${linear.type_source ?? ""}`.toLowerCase();
  return words.every((word) => text.includes(word));
};

function linearRow(i, level) {
  const linear = linears[i];
  const [plan, state] = [planOf(linear), stateOf(linear)];
  const worst = worstError(linear);
  const cell = (...content) => el("td", { role: "gridcell" }, ...content);
  return el("tr", { role: "row", "aria-level": level, tabindex: "-1", class: "linear", "data-index": i },
    el("th", { role: "rowheader", scope: "row" }, swatch(plan, state), level > 1 ? places[i].rest : linear.name),
    cell(linear.shape.join(" × ")), cell(state === "alone" ? "left alone" : state), cell(linear.plan || "–"), cell(linear.precision || "–"),
    cell(bytes(linear.dense_bytes)), cell(linear.packed_bytes ? bytes(linear.packed_bytes) : "–"), cell(worst === null ? "–" : percent(worst)),
    cell(linear.reason ?? linear.type_source ?? ""));
}

function layerRow(layer) {
  const sum = (key) => layer.members.reduce((total, i) => total + linears[i][key], 0);
  const worst = worstOf(layer.members);
  const cell = (...content) => el("td", { role: "gridcell" }, ...content);
  return el("tr", { role: "row", "aria-level": 1, "aria-expanded": "false", tabindex: "-1", class: "layer", "data-layer": layer.name },
    el("th", { role: "rowheader", scope: "row" }, el("span", { class: "chevron" }), layer.name),
    el("td", { role: "gridcell", colspan: 4 }, strip(layer.members)), cell(bytes(sum("dense_bytes"))), cell(bytes(sum("packed_bytes"))),
    cell(worst === null ? "–" : percent(worst)), cell(plural(layer.members.length, "Linear")));
}

function unfoldRow(row) {
  const layer = layers.find((one) => one.name === row.dataset.layer);
  row.setAttribute("aria-expanded", "true");
  row.after(...layer.members.map((i) => linearRow(i, 2)));
  markRows();
}
function foldRow(row) {
  row.setAttribute("aria-expanded", "false");
  while (row.nextElementSibling?.getAttribute("aria-level") === "2") row.nextElementSibling.remove();
}

function renderRows() {
  const words = shown.filter.toLowerCase().split(/\s+/).filter(Boolean);
  const isTree = !words.length && shown.order === "model";
  let rows, note;
  if (isTree) {
    rows = walk.flatMap((item) => (item.kind === "linear" ? [linearRow(item.index, 1)] : item.layers.map(layerRow)));
    note = `${plural(linears.length, "Linear")}, by layer`;
  } else {
    const found = linears.map((_, i) => i).filter((i) => matches(i, words));
    const by = { error: (i) => worstError(linears[i]) ?? -1, bytes: (i) => linears[i].dense_bytes }[shown.order];
    if (by) found.sort((a, b) => by(b) - by(a));
    rows = found.slice(0, shown.limit).map((i) => linearRow(i, 1));
    note = `${plural(found.length, "Linear")}${rows.length < found.length ? `, the first ${rows.length} are shown` : ""}`;
    byId("more-rows").hidden = rows.length === found.length;
  }
  if (isTree) byId("more-rows").hidden = true;
  tableBody.replaceChildren(...rows);
  rows[0]?.setAttribute("tabindex", "0");
  byId("rows-note").textContent = note;
  markRows();
}

function showRows(filter, order = shown.order) {
  Object.assign(shown, { filter, order, limit: PART });
  byId("row-filter").value = filter;
  byId("row-order").value = order;
  renderRows();
}

function markRows() {
  const chosen = new Set(choice.members);
  tableBody?.querySelectorAll("tr.linear").forEach((row) => row.setAttribute("aria-selected", String(chosen.has(Number(row.dataset.index)))));
}

function renderTable() {
  tableBody = el("tbody", {});
  byId("linears").replaceChildren(
    el("div", { class: "head" }, el("h2", { id: "linears-title" }, "All Linears"),
      el("div", { class: "tools" },
        el("input", { id: "row-filter", type: "search", placeholder: "Filter: names, states, reasons", "aria-label": "Filter the table", spellcheck: "false",
          on: { input: (event) => showRows(event.target.value) } }),
        el("label", {}, "Order ", el("select", { id: "row-order", on: { change: (event) => showRows(shown.filter, event.target.value) } },
          el("option", { value: "model" }, "of the model"), el("option", { value: "error" }, "worst error first"), el("option", { value: "bytes" }, "largest first"))))),
    el("p", { class: "hint", id: "rows-note", role: "status" }),
    el("div", { class: "scroll" }, el("table", { class: "linears", role: "treegrid", "aria-labelledby": "linears-title" },
      el("thead", {}, el("tr", { role: "row" }, COLUMNS.map((name) => el("th", { scope: "col", role: "columnheader" }, name)))), tableBody)),
    el("button", { id: "more-rows", type: "button", hidden: true, on: { click: () => { shown.limit += PART; renderRows(); } } }, `Show ${PART} more`),
  );
  const touch = (row) => row.dataset.index !== undefined ? choose([Number(row.dataset.index)])
    : choose(layers.find((one) => one.name === row.dataset.layer).members, { title: row.dataset.layer });
  const toggle = (row) => (row.getAttribute("aria-expanded") === "false" ? unfoldRow(row) : foldRow(row));
  tableKeys = rove(tableBody, "tr", {
    unfold: unfoldRow, fold: foldRow, touch,
    open: (row) => (row.dataset.index === undefined ? toggle(row) : focusFacts(row)),
  });
  tableBody.addEventListener("click", (event) => {
    const row = event.target.closest("tr");
    if (!row) return;
    row.focus({ preventScroll: true });
    touch(row);
    if (row.dataset.index === undefined) toggle(row);
  });
  renderRows();
}
choice.listeners.push(markRows);
