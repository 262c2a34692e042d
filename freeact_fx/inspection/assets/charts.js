"use strict";
// Heat map of errors, bars of bytes and time, histograms of activations; each with its numbers as a table.

const charts = []; // {box, chart, option}: option() is asked again when the colours change
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function addChart(height, label, option, onClick) {
  const box = el("div", { class: "chart", style: `height:${height}px`, role: "img", "aria-label": label });
  const entry = { box, option, chart: null };
  entry.draw = () => {
    entry.chart ??= echarts.init(box, null, { renderer: "svg" });
    const text = colour("--ink");
    entry.chart.setOption({
      animation: false, backgroundColor: "transparent", textStyle: { fontFamily: colour("--font"), color: text },
      aria: { enabled: true, label: { description: label }, decal: { show: true, decals: decals() } }, ...option(),
    }, true);
  };
  charts.push(entry);
  whenNear(box, () => {
    entry.draw();
    if (onClick) entry.chart.on("click", onClick);
    fitWidth.observe(box);
  });
  return box;
}

const fitWidth = new ResizeObserver((seen) => seen.forEach(({ target }) => charts.find((one) => one.box === target)?.chart?.resize()));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => charts.forEach((entry) => entry.chart && entry.draw()));

const decals = () => {
  const lines = { color: colour("--surface"), dashArrayX: [1, 0], symbolSize: 1 };
  return [
    { symbol: "none" },
    { ...lines, dashArrayY: [2, 5], rotation: -Math.PI / 4 },
    { color: colour("--surface"), symbol: "circle", symbolSize: 0.6, dashArrayX: [[6, 6], [0, 6, 6, 0]], dashArrayY: [5, 0] },
    { ...lines, dashArrayY: [2, 5], rotation: Math.PI / 2 },
    { ...lines, dashArrayY: [1, 3], rotation: Math.PI / 4 },
  ];
};
const tip = (...lines) => el("div", {}, lines.filter(Boolean).map((line, at) => el("div", {}, at ? line : el("b", {}, line))));
const tooltip = () => ({ backgroundColor: colour("--surface"), borderColor: colour("--line"), textStyle: { color: colour("--ink"), fontSize: 12 }, confine: true });
const axisStyle = () => ({
  axisLine: { lineStyle: { color: colour("--line") } }, axisTick: { show: false },
  axisLabel: { color: colour("--muted"), fontSize: 11 }, splitLine: { lineStyle: { color: colour("--line") } },
  nameTextStyle: { color: colour("--muted"), fontSize: 11 },
});

function numbersTable(caption, head, rows) {
  const box = el("details", { class: "numbers" }, el("summary", {}, "The numbers as a table"));
  box.addEventListener("toggle", () => {
    if (!box.open || box.children.length > 1) return;
    box.append(el("div", { class: "scroll" }, el("table", { class: "small" }, el("caption", {}, caption),
      el("thead", {}, el("tr", {}, head.map((text) => el("th", { scope: "col" }, text)))),
      el("tbody", {}, rows().map(([first, ...cells]) => el("tr", {}, el("th", { scope: "row" }, first), cells.map((cell) => el("td", {}, cell))))))));
  });
  return box;
}
const heading = (id, text, ...tools) => el("div", { class: "head" }, el("h2", { id: `${id}-title` }, text), el("div", { class: "tools" }, tools));

// ---------------------------------------------------------------- errors

const kinds = [...new Set(linears.flatMap((linear, i) => (isLeftAlone(linear) ? [] : [kindOf(i)])))];
// Columns of the heat map: layers, and single Linears that are quantised, in the order of the walk.
const columns = walk.flatMap((item) =>
  item.kind === "linear" ? (isLeftAlone(linears[item.index]) ? [] : [{ name: linears[item.index].name, label: lastName(linears[item.index].name), members: [item.index] }])
    : item.layers.filter((layer) => layer.members.some((i) => !isLeftAlone(linears[i]))).map((layer) => ({ name: layer.name, label: String(layer.index), members: layer.members })));

function renderErrors() {
  const section = byId("errors");
  const keys = ["measured_error", "predicted_error"].filter((key) => linears.some((linear) => linear[key]));
  if (!keys.length) {
    section.replaceChildren(heading("errors", "Error per type"), el("p", { class: "hint" },
      "No error is known: the transforms are data-free. A checkpoint of freeact_fx.calibrate brings predicted and measured ones."));
    return;
  }
  const word = { measured_error: "measured", predicted_error: "predicted" };
  const draw = (key) => {
    charts.splice(0, charts.length, ...charts.filter(({ box, chart }) => !section.contains(box) || (chart?.dispose(), false)));
    const types = typeNames.filter((type) => linears.some((linear) => isNumber(linear[key]?.[type])));
    const rows = kinds.filter((kind) => columns.some(({ members }) => members.some((i) => kindOf(i) === kind && linears[i][key])));
    const cells = types.map((type) => columns.flatMap(({ members }, x) => rows.flatMap((kind, y) => {
      const found = members.filter((i) => kindOf(i) === kind && isNumber(linears[i][key]?.[type]));
      return found.length ? [{ value: [x, y, Math.max(...found.map((i) => linears[i][key][type]))], members: members.filter((i) => kindOf(i) === kind) }] : [];
    })));
    const values = cells.flat().map(({ value }) => value[2]);
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const [top, gap, cellHeight] = [30, 46, 26];
    const block = rows.length * cellHeight;
    const named = rows.map((kind) => kind.length);
    const left = Math.min(230, 20 + 6.6 * Math.max(...named));
    const option = () => ({
      tooltip: { ...tooltip(), formatter: ({ data, seriesIndex }) => tip(columns[data.value[0]].name, rows[data.value[1]],
        `${types[seriesIndex]}: ${percent(data.value[2])} ${word[key]}, the worst of ${data.members.length}`) },
      title: types.map((type, t) => ({ text: type, left: 0, top: top - 26 + t * (block + gap), textStyle: { fontSize: 13, fontWeight: 600, color: colour("--ink") } })),
      grid: types.map((_, t) => ({ left, right: 72, top: top + t * (block + gap), height: block })),
      xAxis: types.map((_, t) => ({ ...axisStyle(), type: "category", gridIndex: t, data: columns.map(({ label }) => label), splitLine: { show: false } })),
      yAxis: types.map((_, t) => ({ ...axisStyle(), type: "category", gridIndex: t, data: rows, inverse: true, splitLine: { show: false } })),
      visualMap: { type: "continuous", min: low, max: high === low ? low + 1e-9 : high, dimension: 2, right: 0, top: top - 6,
        itemHeight: Math.max(60, Math.min(160, block - 20)), itemWidth: 12, text: [percent(high), percent(low)],
        formatter: percent, textStyle: { color: colour("--muted"), fontSize: 11 },
        inRange: { color: colour("--scale").split(/,\s*/) } },
      aria: { enabled: false },
      series: types.map((type, t) => ({ type: "heatmap", name: type, xAxisIndex: t, yAxisIndex: t, data: cells[t],
        itemStyle: { borderColor: colour("--surface"), borderWidth: 1 },
        label: { show: columns.length <= 14, fontSize: 11, formatter: ({ value }) => percent(value[2]) },
        emphasis: { itemStyle: { borderColor: colour("--ink"), borderWidth: 2 } } })),
    });
    const label = `Heat map of the ${word[key]} error, one for each token type; layers from left to right, groups from top to bottom.`;
    const show = ({ data }) => { choose(data.members); reveal(data.members.slice(0, 1)); };
    const chart = addChart(top + types.length * (block + gap) + 4, label, option, show);
    section.replaceChildren(
      heading("errors", "Error per type", keys.length > 1 && el("label", {}, "Show ", el("select", { on: { change: (event) => draw(event.target.value) } },
        keys.map((one) => el("option", { value: one, selected: one === key }, word[one]))))),
      el("p", { class: "hint" }, "Squared error of a group's outputs relative to their energy, of its worst Linear. Choose a cell to see the group."),
      chart, numbersTable(`${word[key]} error`, ["Linear", ...types], () =>
        linears.flatMap((linear, i) => (linear[key] ? [[linkTo(i), ...types.map((type) => percent(linear[key][type]))]] : [])).slice(0, 2000)));
  };
  draw(keys[0]);
}

// ---------------------------------------------------------------- bytes and time

function bars(id, caption, series, format) {
  const all = [...kinds, "left alone"].filter((kind) => linears.some((_, i) => kindOf(i) === kind));
  const sums = series.map(({ key }) => all.map((kind) => linears.reduce((sum, linear, i) => sum + (kindOf(i) === kind ? linear[key] ?? 0 : 0), 0)));
  const left = Math.min(230, 20 + 6.6 * Math.max(...all.map((kind) => kind.length)));
  const option = () => ({
    tooltip: { ...tooltip(), trigger: "axis", axisPointer: { type: "shadow", shadowStyle: { color: colour("--hover") } },
      formatter: (points) => tip(points[0].name, ...points.map(({ seriesName, value }) => `${seriesName}: ${format(value)}`)) },
    legend: { left: 0, top: 0, itemWidth: 18, itemHeight: 11, textStyle: { color: colour("--ink"), fontSize: 12 }, itemGap: 18 },
    color: series.map((one) => colour(one.colour)),
    grid: { left, right: 70, top: 34, bottom: 22 },
    xAxis: { ...axisStyle(), type: "value", axisLabel: { ...axisStyle().axisLabel, formatter: format, hideOverlap: true }, splitNumber: 4 },
    yAxis: { ...axisStyle(), type: "category", data: all, inverse: true, splitLine: { show: false }, axisLabel: { ...axisStyle().axisLabel, width: left - 12, overflow: "truncate" } },
    series: series.map(({ name }, s) => ({ type: "bar", name, data: sums[s], barMaxWidth: 14, barGap: "12%", itemStyle: { borderRadius: [0, 2, 2, 0] },
      label: { show: true, position: "right", fontSize: 11, color: colour("--muted"), formatter: ({ value }) => (value ? format(value) : "") } })),
  });
  return [addChart(60 + all.length * (16 + 18 * series.length), caption, option),
    numbersTable(caption, ["", ...series.map(({ name }) => name)], () => all.map((kind, k) => [kind, ...sums.map((of) => format(of[k]))]))];
}

function renderCosts() {
  const isTimed = linears.some((linear) => isNumber(linear.time_ms));
  const time = isTimed
    ? bars("time", "Time of one call by group, in milliseconds", [{ name: "dense", key: "dense_time_ms", colour: "--dense" }, { name: "quantised", key: "time_ms", colour: "--packed" }], milliseconds)
    : el("p", { class: "hint" }, "Not measured in this report.");
  byId("costs").replaceChildren(
    heading("costs", "Memory and time"), el("h3", {}, "Memory of the weights"),
    ...bars("memory", "Bytes of weights by group", [{ name: "dense", key: "dense_bytes", colour: "--dense" },
      { name: "packed", key: "packed_bytes", colour: "--packed" }, { name: "held by the engine besides", key: "engine_bytes", colour: "--engine" }], bytes),
    el("h3", {}, "Time"), ...[time].flat());
}

// ---------------------------------------------------------------- activations

const TYPE_COLOURS = ["--type-0", "--type-1", "--type-2", "--type-3", "--type-4"];

// Standard deviation and largest magnitude, read off a histogram whose mean is about zero.
function spread({ edges, counts }) {
  let [total, square, largest] = [0, 0, 0];
  counts.forEach((count, b) => {
    const middle = (edges[b] + edges[b + 1]) / 2;
    [total, square] = [total + count, square + count * middle * middle];
    if (count) largest = Math.max(largest, Math.abs(edges[b]), Math.abs(edges[b + 1]));
  });
  const deviation = Math.sqrt(square / total);
  return { deviation, largest, ratio: largest / deviation };
}

function renderActivations() {
  const section = byId("activations");
  const all = report.activations ?? [];
  if (!all.length) {
    section.replaceChildren(heading("activations", "Activations"), el("p", { class: "hint" },
      "None were recorded. explain(model, ..., activations=(\"*layers.0.*\",)) records those of the groups with these names."));
    return;
  }
  const names = [...new Set(all.map(({ group }) => group))];
  const picture = el("div", {});
  const draw = (name) => {
    charts.splice(0, charts.length, ...charts.filter(({ box, chart }) => !picture.contains(box) || (chart?.dispose(), false)));
    const mine = all.filter(({ group }) => group === name);
    const types = [...new Set([...typeNames, ...mine.map(({ type }) => type)])].filter((type) => mine.some((one) => one.type === type));
    const option = () => {
      const stages = ["before", "after"];
      const half = (s) => ({ left: s ? "55%" : 56, width: "41%", top: 56, bottom: 40 });
      return {
        tooltip: { ...tooltip(), trigger: "item", formatter: ({ seriesName, value }) => tip(seriesName, `value ${value[0].toPrecision(3)}`, `share of values ${percent(value[1])}`) },
        aria: { enabled: false },
        legend: { left: 0, top: 0, itemWidth: 30, data: types, textStyle: { color: colour("--ink"), fontSize: 12 }, itemGap: 18 },
        title: stages.map((stage, s) => ({ text: `${stage} the transform`, left: half(s).left, top: 30, textStyle: { fontSize: 12, fontWeight: 600, color: colour("--ink") } })),
        grid: stages.map((_, s) => half(s)),
        xAxis: stages.map((_, s) => ({ ...axisStyle(), type: "value", gridIndex: s, name: "value", nameLocation: "middle", nameGap: 24, splitLine: { show: false } })),
        yAxis: stages.map((_, s) => ({ ...axisStyle(), type: "log", gridIndex: s, axisLine: { onZero: false, show: false }, min: (x) => 10 ** Math.floor(Math.log10(Math.max(x.min, 1e-9))),
          axisLabel: { ...axisStyle().axisLabel, formatter: (x) => (x >= 0.01 ? String(x) : x.toExponential(0)) } })),
        series: mine.map((one) => {
          const t = types.indexOf(one.type);
          const total = one.counts.reduce((a, b) => a + b, 0) || 1;
          return {
            type: "line", name: one.type, step: "middle", showSymbol: false, xAxisIndex: stages.indexOf(one.stage), yAxisIndex: stages.indexOf(one.stage),
            color: colour(TYPE_COLOURS[t % TYPE_COLOURS.length]), lineStyle: { width: 2, type: ["solid", "dashed", "dotted"][t % 3] },
            data: one.counts.map((count, b) => [(one.edges[b] + one.edges[b + 1]) / 2, count ? count / total : null])
              .slice(one.counts.findIndex(Boolean), one.counts.findLastIndex(Boolean) + 1),
          };
        }),
      };
    };
    picture.replaceChildren(
      addChart(300, `Histograms of the activation of ${name}, per token type, before and after the transform; shares on a logarithmic axis.`, option),
      el("table", { class: "small" },
        el("caption", {}, "Largest magnitude relative to the standard deviation: the smaller, the better 4 bits fit"),
        el("thead", {}, el("tr", {}, ["type", "tokens", "before", "after"].map((text) => el("th", { scope: "col" }, text)))),
        el("tbody", {}, types.map((type) => {
          const of = (stage) => mine.find((one) => one.type === type && one.stage === stage);
          const ratio = (stage) => (of(stage) ? `${spread(of(stage)).ratio.toPrecision(3)} σ` : "–");
          return el("tr", {}, el("th", { scope: "row" }, type), el("td", {}, number((of("before") ?? of("after")).num_tokens)), el("td", {}, ratio("before")), el("td", {}, ratio("after")));
        }))));
  };
  section.replaceChildren(
    heading("activations", "Activations", el("label", {}, "Group ", el("select", { on: { change: (event) => draw(event.target.value) } }, names.map((name) => el("option", {}, name))))),
    el("p", { class: "hint" }, "The values that the group's transform takes in and gives out, per token type: share of values on a logarithmic axis."), picture);
  draw(names[0]);
}
