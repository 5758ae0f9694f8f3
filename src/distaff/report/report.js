(() => {
"use strict";
const { runs, differs, unreadable = [], version } = JSON.parse(document.getElementById("facts").textContent);
const root = document.getElementById("report");
const NUM_COLORS = 10;
const variable = (index) => `--c${index % NUM_COLORS}`;
const color = (index) => getComputedStyle(document.documentElement).getPropertyValue(variable(index)).trim();

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

// ---- What the reader has chosen; a page that follows its runs keeps it when it reloads.

const state = { x: "step", smooth: 0, log: false, bands: false, hidden: [], splits: [], open: {}, sort: {}, zoom: {} };
const kept = "distaff-report";
if (version) {
  try { Object.assign(state, JSON.parse(sessionStorage.getItem(kept) ?? "{}")); } catch { /* begin again */ }
}
const keep = () => {
  if (!version) return;
  try { sessionStorage.setItem(kept, JSON.stringify(state)); } catch { /* storage is off */ }
};

const sortable = (name, heads, rows) => {
  const body = make("tbody");
  const isNumber = heads.map((_, column) => rows.some((row) => typeof row[column].key === "number"));
  const fill = (list) => body.replaceChildren(...list.map((row) => make("tr", {}, ...row.map((cell, column) => {
    const td = make("td", { className: isNumber[column] ? "number" : cell.isLong ? "long" : "" });
    td.append(cell.node ?? cell.text);
    return td;
  }))));
  const head = make("tr", {}, ...heads.map((title, column) => {
    const th = make("th", { scope: "col", className: isNumber[column] ? "number" : "" });
    th.append(make("button", { type: "button", textContent: title, title: `Sort by ${title}`, onclick: () => {
      const [last, sign] = state.sort[name] ?? [];
      state.sort[name] = [title, last === title ? -sign : 1];
      keep();
      order();
    } }));
    return th;
  }));
  const order = () => {
    const [title, sign] = state.sort[name] ?? [];
    const column = heads.indexOf(title);
    const rank = (cell) => (cell.key === null ? [1, 0] : [0, cell.key]);
    fill(column < 0 ? rows : [...rows].sort((a, b) => {
      const [x, y] = [rank(a[column]), rank(b[column])];
      return x[0] - y[0] || sign * (x[1] < y[1] ? -1 : x[1] > y[1] ? 1 : 0);
    }));
    [...head.children].forEach((th, i) => {
      if (i === column) th.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      else th.removeAttribute("aria-sort");
    });
  };
  order();
  return make("div", { className: "scroll", tabIndex: 0 }, make("table", {}, make("thead", {}, head), body));
};
const textCell = (text, isLong = false) => ({ text, key: text, isLong });
const valueCell = (text) => {
  const value = text === undefined || text.trim() === "" ? NaN : Number(text);
  return Number.isNaN(value) ? textCell(text ?? "-", true) : { text, key: value };
};
const numberCell = (value, text = number(value)) => ({ text, key: value ?? null });

const pairs = (facts) => make("div", { className: "scroll", tabIndex: 0 }, make("table", {}, make("tbody", {},
  ...Object.entries(facts).map(([name, value]) => make("tr", {}, make("th", { scope: "row", textContent: name }),
    make("td", { className: "long", textContent: typeof value === "number" ? number(value) : value }))))));

// ---- Runs

const isShown = (run) => !state.hidden.includes(run.path);
const union = (pick) => [...new Set(runs.flatMap((run) => Object.keys(pick(run))))];
const bests = union((run) => run.best);
const tests = union((run) => run.metrics).filter((name) => name.startsWith("test"));
const hasTags = runs.some((run) => run.tags.length > 0);
const lasts = bests.length ? [] : union((run) => run.metrics).filter((name) => name.startsWith("val") || name === "train/loss");
const named = (run, index) => {
  const swatch = make("span", { className: "swatch" });
  swatch.style.background = `var(${variable(index)})`;
  return [swatch, run.path];
};
const live = make("p", { className: "soft", role: "status" });
root.replaceChildren(
  make("h1", { textContent: runs.length === 1 ? `Run ${runs[0].path}` : `Report of ${runs.length} runs` }), live,
  ...unreadable.map(({ path, why }) => make("p", { className: "problem", textContent: `${path} cannot be read: ${why}` })),
);
if (runs.length === 0) root.append(make("p", { textContent: "There is no run yet." }));
else root.append(make("h2", { textContent: "Runs" }), sortable(
  "runs",
  ["run", ...(hasTags ? ["tags"] : []), "status", "epoch", "step", "started", "time", ...bests.map((name) => `best ${name}`), ...lasts, ...tests, "size"],
  runs.map((run, index) => {
    const box = make("input", { type: "checkbox", checked: isShown(run), ariaLabel: `Show ${run.path}`, onchange: () => {
      state.hidden = box.checked ? state.hidden.filter((path) => path !== run.path) : [...state.hidden, run.path];
      draw();
    } });
    return [
      { node: make("label", {}, box, " ", ...named(run, index)), key: run.path },
      ...(hasTags ? [textCell(run.tags.join(", "))] : []),
      textCell(run.reason ? `${run.status}: ${run.reason}` : run.status, run.reason.length > 20),
      numberCell(run.epoch), numberCell(run.step), textCell(run.started), textCell(run.time),
      ...bests.map((name) => numberCell(run.best[name])), ...lasts.map((name) => numberCell(run.metrics[name])), ...tests.map((name) => numberCell(run.metrics[name])),
      numberCell(run.num_bytes, bytes(run.num_bytes)),
    ];
  }),
));

if (runs.length > 1) {
  root.append(make("h2", { textContent: "What differs" }));
  root.append(differs.length === 0
    ? make("p", { className: "soft", textContent: "All runs have the same options." })
    : sortable("differs", ["run", ...differs], runs.map((run, index) => [
        { node: make("span", {}, ...named(run, index)), key: run.path },
        ...differs.map((key) => valueCell(run.options[key]))])));
}

// ---- Curves

const NAMES = { step: "train" };  // means of log windows within an epoch
const splitOf = (name) => name.slice(0, name.indexOf("/"));
const metricOf = (name) => name.slice(name.indexOf("/") + 1);
const names = union((run) => run.curves).filter((name) => name.includes("/"));
const metrics = [...new Set(names.map(metricOf))];
const rankOf = (split) => (split === "train" ? 0 : split === "val" ? 1 : split.startsWith("test") ? 3 : 2);
const splits = [...new Set(names.map((name) => NAMES[splitOf(name)] ?? splitOf(name)))].sort((a, b) => rankOf(a) - rankOf(b));
const hasGroups = new Set(runs.map((run) => run.group)).size < runs.length;
const settings = differs.filter((key) => key !== "seed");
const panels = make("div", { className: "panels" });
const control = (text, node) => make("label", {}, ...(node.type === "checkbox" ? [node, text] : [text, node]));
const toggle = (key) => make("input", { type: "checkbox", checked: state[key], onchange: (event) => { state[key] = event.target.checked; draw(); } });
const splitToggle = (split) => make("input", { type: "checkbox", checked: !state.splits.includes(split), onchange: (event) => {
  state.splits = event.target.checked ? state.splits.filter((each) => each !== split) : [...state.splits, split];
  draw();
} });
const choice = make("select", { onchange: () => { state.x = choice.value; state.zoom = {}; draw(); } },
  ...["step", "epoch", "minutes"].map((value) => make("option", { value, textContent: value, selected: value === state.x })));
const amount = make("output", { textContent: state.smooth });
const slider = make("input", { type: "range", min: 0, max: 0.99, step: 0.01, value: state.smooth,
  oninput: () => { state.smooth = Number(slider.value); amount.textContent = slider.value; draw(); } });
if (metrics.length) root.append(
  make("h2", { textContent: "Curves" }),
  make("div", { className: "controls" },
    control("x axis", choice), make("label", {}, "smoothing", slider, amount), control("log scale", toggle("log")),
    hasGroups ? control("mean and range over seeds", toggle("bands")) : null,
    ...(splits.length > 1 ? splits.map((split) => control(split, splitToggle(split))) : []),
    make("span", { className: "soft", textContent: "Drag to zoom, double-click to reset." })),
  panels,
);

const smoothed = (values) => {  // a debiased exponential moving average
  let sum = 0, weight = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = state.smooth * sum + (1 - state.smooth) * value;
    weight = state.smooth * weight + (1 - state.smooth);
    return sum / weight;
  });
};

const seriesOf = (metric) => {
  const found = [];
  for (const [index, run] of runs.entries()) {
    if (!isShown(run)) continue;
    for (const [name, curve] of Object.entries(run.curves)) {
      if (!name.includes("/") || metricOf(name) !== metric) continue;
      const split = splitOf(name), title = NAMES[split] ?? split;
      if (state.splits.includes(title)) continue;
      found.push({ index, group: run.group, split, title, label: runs.length > 1 ? `${run.path} ${title}` : title,
        x: run.axes[curve.axis][state.x], steps: run.axes[curve.axis].step, y: curve.value });
    }
  }
  found.sort((a, b) => a.index - b.index || rankOf(a.title) - rankOf(b.title));
  const splits = new Set(found.map((each) => each.split));
  // Within epochs ("step/") only where there is no mean of the epoch.
  return splits.has("train") && state.x === "epoch" ? found.filter((each) => each.split !== "step")
    : splits.has("step") ? found.filter((each) => each.split !== "train") : found;
};

const withSmooth = (series) => state.smooth === 0 ? series
  : series.flatMap((each) => each.x.length < 3 ? [each] : [{ ...each, isFaint: true }, { ...each, y: smoothed(each.y) }]);

const banded = (series) => {
  const lines = [];
  for (const group of new Set(series.map((each) => each.group))) {
    for (const title of new Set(series.map((each) => each.title))) {
      const members = series.filter((each) => each.group === group && each.title === title);
      if (members.length === 0) continue;
      if (members.length === 1 || members.every(({ x }) => x.length < 2)) { lines.push(...members); continue; }
      const at = new Map();  // by step: at a step, seeds differ in their minutes
      for (const { x, y, steps } of members) {
        const values = state.smooth === 0 ? y : smoothed(y);
        steps.forEach((step, i) => {
          if (values[i] === null) return;
          if (!at.has(step)) at.set(step, { x: [], y: [] });
          at.get(step).x.push(x[i]);
          at.get(step).y.push(values[i]);
        });
      }
      const points = [...at.keys()].sort((a, b) => a - b).map((step) => at.get(step));
      const mean = (list) => list.reduce((a, b) => a + b) / list.length;
      const x = points.map((each) => mean(each.x));
      const options = runs[members[0].index].options;
      const setting = settings.map((key) => `${key}=${options[key] ?? "-"}`).join(", ");
      const base = { ...members[0], x, label: `${setting ? `${setting}: ` : ""}${members.length} seeds ${title}` };
      lines.push({ ...base, y: points.map((each) => mean(each.y)) });
      lines.push({ ...base, y: points.map((each) => Math.max(...each.y)), edge: "high" },
        { ...base, y: points.map((each) => Math.min(...each.y)), edge: "low" });
    }
  }
  return lines;
};

const dashes = { train: [6, 3], test: [2, 2] };
const plots = [];
const HEIGHT = 280;
const panel = (metric) => {
  const found = seriesOf(metric);
  const series = state.bands ? banded(found) : withSmooth(found);
  if (series.length === 0) return;
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
  const zoom = state.zoom[metric];
  const plot = new uPlot({
    width: node.clientWidth, height: HEIGHT, bands, cursor: { drag: { x: true, y: true, uni: 20 } },
    scales: { x: { time: false }, y: { distr: state.log ? 3 : 1 } },
    axes: [{ ...axis, label: state.x, labelSize: 18, size: 32 }, { ...axis, size: 64, values: (_, splits) => splits.map((v) => (v === null ? "" : number(v))) }],
    series: [{ label: state.x, value: (_, v) => number(v) }, ...series.map((each) => ({
      label: each.label, class: each.edge || each.isFaint ? "unlisted" : undefined,
      stroke: each.isFaint ? `${color(each.index)}44` : color(each.index), width: each.edge ? 0 : each.isFaint ? 1 : 1.75,
      dash: each.edge || each.isFaint ? undefined : dashes[each.title], spanGaps: false,
      points: { show: !each.edge && each.x.length < 2 }, value: (_, v) => number(v),
    }))],
    hooks: { setSelect: [(plot) => {
      if (plot.select.width + plot.select.height > 0) setTimeout(() => { note(metric, plot); });
    }] },
    legend: { live: true },
  }, data, node);
  plot.over.addEventListener("dblclick", () => { delete state.zoom[metric]; keep(); });
  if (zoom) plot.batch(() => { plot.setScale("x", zoom.x); plot.setScale("y", zoom.y); });
  plots.push(plot);
};
const note = (metric, plot) => {
  const range = ({ min, max }) => ({ min, max });
  state.zoom[metric] = { x: range(plot.scales.x), y: range(plot.scales.y) };
  keep();
};

const draw = () => {
  keep();
  plots.splice(0).forEach((plot) => plot.destroy());
  panels.replaceChildren();
  metrics.forEach(panel);
};
draw();
addEventListener("resize", () => plots.forEach((plot) => plot.setSize({ width: plot.root.parentElement.clientWidth, height: HEIGHT })));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);

// ---- Time and throughput

const speeds = union((run) => run.throughput);
if (speeds.length) root.append(make("h2", { textContent: "Time and throughput" }), runs.length === 1 ? pairs(runs[0].throughput) : sortable("speed", ["run", ...speeds],
  runs.map((run, index) => [
    { node: make("span", {}, ...named(run, index)), key: run.path }, ...speeds.map((name) => numberCell(run.throughput[name]))])));

// ---- Each run

if (runs.length) root.append(make("h2", { textContent: "Details" }));
for (const run of runs) {
  const block = (title, node) => [make("h3", { textContent: title }), node];
  const pre = (text, className = "") => make("pre", { textContent: text, tabIndex: 0, className });
  const leftOut = run.left_out.length ? make("p", { className: "soft", textContent: `Left out, to keep the report small: ${run.left_out.join(", ")}` }) : null;
  const media = run.images.map((image) => make("figure", {},
    make("img", { src: image.url, alt: image.name, loading: "lazy", onload: (event) => {
      event.target.classList.toggle("tiny", event.target.naturalWidth < 160);
    } }), make("figcaption", { textContent: image.name })));
  const texts = run.texts.map(({ name, text }) => make("figure", { className: "text" }, pre(text), make("figcaption", { textContent: name })));
  const details = make("details", { open: state.open[run.path] ?? runs.length === 1 },
    make("summary", { textContent: run.path }),
    ...block("Repeat it", pre(run.repeat || "The command is not recorded.", "wrapped")),
    ...(media.length + texts.length || leftOut ? block("Figures and samples", make("div", {}, make("div", { className: "figures" }, ...media), ...texts, leftOut)) : []),
    ...block("Metrics at the end", pairs(run.metrics)),
    ...block("Options", pairs(run.options)),
    ...block("Environment", pairs(run.environment)),
    ...(run.model ? block("Model", pre(run.model)) : []),
    ...(run.log ? block("Log", pre(run.log)) : []),
  );
  details.addEventListener("toggle", () => { state.open[run.path] = details.open; keep(); });
  root.append(details);
}

// ---- A page that follows its runs

if (version) {
  const say = () => {
    const training = runs.filter((run) => run.status === "running").length;
    live.textContent = training ? `Live: ${training} of ${runs.length} in training.` : "Live: no run is in training.";
  };
  say();
  let isDragging = false;  // a reload would end it
  addEventListener("pointerdown", () => { isDragging = true; });
  addEventListener("pointerup", () => { isDragging = false; });
  setInterval(async () => {
    if (document.hidden || isDragging) return;
    try {
      const answer = await fetch(location.href, { method: "HEAD", cache: "no-store" });
      if (!answer.ok) throw new Error(answer.statusText);
      if (answer.headers.get("ETag") !== `"${version}"`) location.reload();
      else say();
    } catch {
      live.textContent = "The server has ended; this is its last page.";
    }
  }, 2000);
}
})();
