(() => {
"use strict";
const { runs, differs } = JSON.parse(document.getElementById("facts").textContent);
const root = document.getElementById("report");
const COLORS = ["#3366cc", "#e8710a", "#188038", "#c5221f", "#8430ce", "#00838f", "#a56300", "#d01884", "#5f6368", "#689f38"];
const color = (index) => COLORS[index % COLORS.length];

// Every text of a run becomes a text node.
const make = (tag, props = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children.filter((child) => child !== null));
  return node;
};
const number = (value) =>
  value === null || value === undefined ? "-" : Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(4)));
const bytes = (count) => {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  while (count >= 1024 && units.length > 1) { count /= 1024; units.shift(); }
  return `${Number(count.toPrecision(3))} ${units[0]}`;
};

const sortable = (heads, rows) => {
  const body = make("tbody");
  const fill = (list) => body.replaceChildren(...list.map((row) => make("tr", {}, ...row.map((cell) => {
    const td = make("td", { className: typeof cell.key === "number" ? "number" : cell.isLong ? "long" : "" });
    td.append(cell.node ?? cell.text);
    return td;
  }))));
  let last = null, sign = 1;
  const head = make("tr", {}, ...heads.map((title, column) => {
    const th = make("th", { scope: "col" });
    th.append(make("button", { type: "button", textContent: title, title: `Sort by ${title}`, onclick: () => {
      sign = last === column ? -sign : 1;
      last = column;
      const rank = (cell) => (cell.key === null ? [1, 0] : [0, cell.key]);
      fill([...rows].sort((a, b) => {
        const [x, y] = [rank(a[column]), rank(b[column])];
        return x[0] - y[0] || sign * (x[1] < y[1] ? -1 : x[1] > y[1] ? 1 : 0);
      }));
      for (const other of head.children) other.removeAttribute("aria-sort");
      th.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
    } }));
    return th;
  }));
  fill(rows);
  return make("div", { className: "scroll" }, make("table", {}, make("thead", {}, head), body));
};
const textCell = (text, isLong = false) => ({ text, key: text, isLong });
const numberCell = (value, text = number(value)) => ({ text, key: value ?? null });

const pairs = (facts) => make("div", { className: "scroll" }, make("table", {}, make("tbody", {},
  ...Object.entries(facts).map(([name, value]) => make("tr", {}, make("th", { scope: "row", textContent: name }),
    make("td", { className: "long", textContent: typeof value === "number" ? number(value) : value }))))));

// ---- Runs

const shownRuns = new Set(runs.keys());
const bests = [...new Set(runs.flatMap((run) => Object.keys(run.best)))];
const tests = [...new Set(runs.flatMap((run) => Object.keys(run.metrics)))].filter((name) => name.startsWith("test"));
root.replaceChildren(
  make("h1", { textContent: runs.length === 1 ? `Run ${runs[0].path}` : `Report of ${runs.length} runs` }),
  make("h2", { textContent: "Runs" }),
);
root.append(sortable(
  ["run", "status", "epoch", "step", "started", "time", ...bests.map((name) => `best ${name}`), ...tests, "steps/s", "size"],
  runs.map((run, index) => {
    const box = make("input", { type: "checkbox", checked: true, ariaLabel: `Show ${run.path}`, onchange: () => {
      box.checked ? shownRuns.add(index) : shownRuns.delete(index);
      draw();
    } });
    const swatch = make("span", { className: "swatch" });
    swatch.style.background = color(index);
    return [
      { node: make("label", {}, box, " ", swatch, run.path), key: run.path },
      textCell(run.reason ? `${run.status}: ${run.reason}` : run.status, run.reason.length > 20),
      numberCell(run.epoch), numberCell(run.step), textCell(run.started), textCell(run.time),
      ...bests.map((name) => numberCell(run.best[name])), ...tests.map((name) => numberCell(run.metrics[name])),
      numberCell(run.throughput["steps per second"]), numberCell(run.num_bytes, bytes(run.num_bytes)),
    ];
  }),
));

if (runs.length > 1) {
  root.append(make("h2", { textContent: "What differs" }));
  root.append(differs.length === 0
    ? make("p", { className: "soft", textContent: "All runs have the same options." })
    : sortable(["option", ...runs.map((run) => run.path)], differs.map((key) => [
        textCell(key), ...runs.map((run) => textCell(run.options[key] ?? "-", true))])));
}

// ---- Curves

const state = { x: "step", smooth: 0, log: false, bands: false };
const names = [...new Set(runs.flatMap((run) => Object.keys(run.curves)))];
const metrics = [...new Set(names.map((name) => name.slice(name.indexOf("/") + 1)))];
const hasGroups = new Set(runs.map((run) => run.group)).size < runs.length;
const panels = make("div", { className: "panels" });
const control = (text, node) => make("label", {}, text, node);
const toggle = (key) => make("input", { type: "checkbox", onchange: (event) => { state[key] = event.target.checked; draw(); } });
const choice = make("select", { onchange: () => { state.x = choice.value; draw(); } },
  ...["step", "epoch"].map((value) => make("option", { value, textContent: value })));
const slider = make("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: 0,
  oninput: () => { state.smooth = Number(slider.value); draw(); } });
root.append(
  make("h2", { textContent: "Curves" }),
  make("div", { className: "controls" },
    control("x axis", choice), control("smoothing", slider), control("log scale", toggle("log")),
    hasGroups ? control("mean and range over seeds", toggle("bands")) : null,
    make("span", { className: "soft", textContent: "Drag to zoom, double-click to reset." })),
  panels,
);

const smoothed = (values) => {  // a debiased exponential moving average
  if (state.smooth === 0) return values;
  let sum = 0, weight = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = state.smooth * sum + (1 - state.smooth) * value;
    weight = state.smooth * weight + (1 - state.smooth);
    return sum / weight;
  });
};

const TITLES = { step: "train" };  // means of log windows within an epoch
const seriesOf = (metric) => {
  const found = [];
  for (const [index, run] of runs.entries()) {
    if (!shownRuns.has(index)) continue;
    for (const [name, curve] of Object.entries(run.curves)) {
      if (name.slice(name.indexOf("/") + 1) !== metric) continue;
      const split = name.slice(0, name.indexOf("/"));
      found.push({ index, group: run.group, split, label: `${run.path} ${TITLES[split] ?? split}`, x: curve[state.x], y: smoothed(curve.value) });
    }
  }
  const splits = new Set(found.map((each) => each.split));
  // Within epochs ("step/") only where there is no mean of the epoch.
  return splits.has("train") && state.x === "epoch" ? found.filter((each) => each.split !== "step")
    : splits.has("step") ? found.filter((each) => each.split !== "train") : found;
};

const banded = (series) => {
  const lines = [];
  for (const group of new Set(series.map((each) => each.group))) {
    for (const split of new Set(series.map((each) => each.split))) {
      const members = series.filter((each) => each.group === group && each.split === split);
      if (members.length === 0) continue;
      if (members.length === 1) { lines.push(members[0]); continue; }
      const at = new Map();
      for (const { x, y } of members) x.forEach((value, i) => { if (y[i] !== null) at.set(value, [...(at.get(value) ?? []), y[i]]); });
      const x = [...at.keys()].sort((a, b) => a - b);
      const base = { ...members[0], x, label: `${members.length} seeds ${TITLES[split] ?? split}` };
      lines.push({ ...base, y: x.map((v) => at.get(v).reduce((a, b) => a + b) / at.get(v).length) });
      lines.push({ ...base, y: x.map((v) => Math.max(...at.get(v))), edge: "high" }, { ...base, y: x.map((v) => Math.min(...at.get(v))), edge: "low" });
    }
  }
  return lines;
};

const dashes = { train: [6, 3], step: [6, 3], test: [2, 2] };
const plots = [];
const panel = (metric) => {
  let series = seriesOf(metric);
  if (state.bands) series = banded(series);
  if (series.length === 0) return null;
  const xs = [...new Set(series.flatMap((each) => each.x))].sort((a, b) => a - b);
  const data = [xs, ...series.map((each) => {
    const at = new Map(each.x.map((value, i) => [value, each.y[i]]));
    return xs.map((value) => { const y = at.get(value); return y === undefined ? undefined : state.log && y <= 0 ? null : y; });
  })];
  const style = getComputedStyle(document.documentElement);
  const axis = { stroke: style.getPropertyValue("--soft"), grid: { stroke: style.getPropertyValue("--line"), width: 1 }, ticks: { show: false } };
  const bands = [];
  series.forEach((each, i) => { if (each.edge === "high") bands.push({ series: [i + 1, i + 2], fill: `${color(each.index)}33` }); });
  const node = make("div", { className: "panel" }, make("h3", { textContent: metric }));
  panels.append(node);
  plots.push(new uPlot({
    width: node.clientWidth, height: 280, bands, cursor: { drag: { x: true, y: true, uni: 20 } },
    scales: { x: { time: false }, y: { distr: state.log ? 3 : 1 } },
    axes: [{ ...axis, label: state.x, labelSize: 20 }, { ...axis, size: 64, values: (_, splits) => splits.map((v) => (v === null ? "" : number(v))) }],
    series: [{ label: state.x }, ...series.map((each) => ({
      label: each.edge ? `${each.label} ${each.edge}` : each.label, stroke: color(each.index), width: each.edge ? 0 : 1.75,
      dash: dashes[each.split], spanGaps: true, points: { show: each.x.length < 2 }, value: (_, v) => number(v),
    }))],
    legend: { live: true },
  }, data, node));
  return node;
};

const draw = () => {
  plots.splice(0).forEach((plot) => plot.destroy());
  panels.replaceChildren();
  metrics.forEach(panel);
};
draw();
addEventListener("resize", () => plots.forEach((plot) => plot.setSize({ width: plot.root.parentElement.clientWidth, height: 280 })));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

// ---- Each run

root.append(make("h2", { textContent: "Details" }));
for (const run of runs) {
  const block = (title, node) => [make("h3", { textContent: title }), node];
  const pre = (text) => make("pre", { textContent: text, tabIndex: 0 });
  root.append(make("details", { open: runs.length === 1 },
    make("summary", { textContent: run.path }),
    ...block("Repeat it", pre(run.command || "The command is not recorded.")),
    ...(run.images.length + run.left_out.length ? block("Figures and images", make("div", {},
      ...run.images.map((image) => make("figure", {}, make("img", { src: image.url, alt: image.name, loading: "lazy" }), make("figcaption", { textContent: image.name }))),
      run.left_out.length ? make("p", { className: "soft", textContent: `Left out, to keep the report small: ${run.left_out.join(", ")}` }) : null)) : []),
    ...block("Metrics at the end", pairs(run.metrics)),
    ...block("Time and throughput", pairs(run.throughput)),
    ...block("Options", pairs(run.options)),
    ...block("Environment", pairs(run.environment)),
    ...(run.model ? block("Model", pre(run.model)) : []),
    ...(run.log ? block("Log", pre(run.log)) : []),
  ));
}
})();
