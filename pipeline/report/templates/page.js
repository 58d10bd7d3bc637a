"use strict";
// Tables that sort, filter and page; charts by plotly.js; and, when served live, news every few seconds.

const PAGE_ROWS = 50;
const chosen = new Map(); // what a reader chose for a table, by its id: outlives a refresh
const shown = new Map(); // the drawn chart of each figure, by its id, with its data

function element(name, properties) {
  return Object.assign(document.createElement(name), properties);
}

function setUpTable(table) {
  const state = chosen.get(table.id) ?? { column: -1, down: false, text: "", page: 0 };
  chosen.set(table.id, state);
  const body = table.tBodies[0];
  const original = [...body.rows];
  const headings = [...table.tHead.rows[0].cells];
  const words = new Map(original.map((row) => [row, row.textContent.toLowerCase()]));
  const key = (row) => row.cells[state.column].dataset.value ?? row.cells[state.column].textContent.trim();
  const isText = (value) => value === "" || Number.isNaN(Number(value));

  function compare(a, b) {
    const left = key(a), right = key(b);
    if (left === "" || right === "") return (left === "") - (right === ""); // what is absent stays last
    const order = isText(left) || isText(right)
      ? left.localeCompare(right, "en", { numeric: true }) : Number(left) - Number(right);
    return state.down ? -order : order;
  }

  const tools = element("div", { className: "tools" });
  const filter = element("input", { type: "search", placeholder: "Filter", value: state.text });
  filter.setAttribute("aria-label", "Filter the rows");
  const pager = element("div", { className: "pager" });
  const back = element("button", { type: "button", textContent: "‹" });
  const on = element("button", { type: "button", textContent: "›" });
  back.setAttribute("aria-label", "Previous rows");
  on.setAttribute("aria-label", "Next rows");
  const range = element("span");
  pager.append(back, range, on);
  if (original.length > 8) tools.append(filter);
  if (original.length > PAGE_ROWS) tools.append(pager);
  if (tools.childElementCount) table.parentElement.before(tools);

  function render() {
    let rows = original.filter((row) => words.get(row).includes(state.text.toLowerCase()));
    if (state.column >= 0) rows = [...rows].sort(compare);
    const last = Math.max(Math.ceil(rows.length / PAGE_ROWS) - 1, 0);
    state.page = Math.min(state.page, last);
    const first = state.page * PAGE_ROWS;
    const part = rows.slice(first, first + PAGE_ROWS);
    body.replaceChildren(...part);
    range.textContent = rows.length ? `${first + 1}–${first + part.length} of ${rows.length}` : "no rows";
    back.disabled = state.page === 0;
    on.disabled = state.page === last;
    headings.forEach((heading, index) => {
      if (index === state.column) heading.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      else heading.removeAttribute("aria-sort");
    });
  }

  headings.forEach((heading, column) => {
    const button = element("button", { type: "button" });
    button.append(...heading.childNodes);
    heading.append(button);
    button.addEventListener("click", () => {
      // Numbers begin with the largest, text with A.
      const first = heading.classList.contains("number");
      state.down = state.column === column ? !state.down : first;
      state.column = column;
      state.page = 0;
      render();
    });
  });
  filter.addEventListener("input", () => { state.text = filter.value; state.page = 0; render(); });
  back.addEventListener("click", () => { state.page -= 1; render(); });
  on.addEventListener("click", () => { state.page += 1; render(); });
  render();
}

// Plotly reads a few tags and entities in its texts: values of ours are never meant as such.
const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

function draw(plot, chart) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const marks = chart.events ?? [];
  const curves = chart.traces.map((trace) => ({
    type: "scatter", x: trace.x, y: trace.y, name: plain(trace.name), customdata: trace.href,
    mode: trace.points || trace.x.length < 2 ? "markers" : "lines",
    line: { width: 1.75 }, marker: { size: 10 }, text: trace.text?.map(plain),
    hovertemplate: trace.text ? "%{y:.4~g} at %{x:.4~g}<br>%{text}" : "%{y:.5~g}",
  }));
  const symbols = ["x", "triangle-up", "diamond", "star"];
  const events = marks.map((mark, index) => ({
    type: "scatter", mode: "markers", x: mark.x, y: mark.x.map(() => 0.05 + 0.07 * index), yaxis: "y2", name: plain(mark.name),
    text: mark.text.map(plain), hovertemplate: "%{text}",
    marker: { size: 9, symbol: symbols[index % symbols.length], color: colour(index % 2 ? "--warn" : "--bad") },
  }));
  const axis = { gridcolor: colour("--line"), zeroline: false, linecolor: colour("--line"), automargin: true };
  const title = (text) => ({ text: plain(text ?? ""), font: { size: 12, color: colour("--dim") }, standoff: 8 });
  const colorway = [1, 2, 3, 4, 5, 6, 7, 8].map((number) => colour(`--c${number}`));
  const all = [...curves, ...events];
  const layout = {
    margin: { t: 10, r: 14, b: 40, l: 50 }, colorway, uirevision: "kept",
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: colour("--text"), size: 12, family: getComputedStyle(document.body).fontFamily },
    xaxis: { ...axis, title: title(chart.x), type: chart.log_x ? "log" : "linear" },
    yaxis: { ...axis, title: title(chart.y) },
    yaxis2: { overlaying: "y", range: [0, 1], fixedrange: true, visible: false },
    hovermode: chart.traces.some((trace) => trace.points) ? "closest" : "x unified",
    hoverlabel: { bgcolor: colour("--raised"), bordercolor: colour("--line"), font: { color: colour("--text") }, namelength: -1 },
    showlegend: all.length > 1, legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" },
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
  };
  if (chart.log_x) Object.assign(layout.xaxis, { dtick: "D2", tickformat: ",~g" });
  Plotly.react(plot, all, layout, { responsive: true, displayModeBar: false });
}

function setUpChart(figure) {
  const source = figure.querySelector("script").textContent;
  const before = shown.get(figure.id);
  let plot = figure.querySelector(".plot");
  if (before) { // a refreshed page: the old drawing moves in, with its zoom
    plot.replaceWith(before.plot);
    plot = before.plot;
    if (before.source === source) return;
  }
  shown.set(figure.id, { plot, source });
  draw(plot, JSON.parse(source));
  if (!before) {
    plot.on("plotly_click", (click) => {
      const href = click.points[0].customdata;
      if (href) location.href = href;
    });
  }
}

function setUp() {
  document.querySelectorAll("table.sortable").forEach(setUpTable);
  const figures = [...document.querySelectorAll("figure.chart")];
  figures.forEach(setUpChart);
  for (const id of [...shown.keys()]) {
    if (!figures.some((figure) => figure.id === id)) {
      Plotly.purge(shown.get(id).plot);
      shown.delete(id);
    }
  }
}

async function refresh() {
  const live = document.getElementById("live");
  try {
    const answer = await fetch(location.pathname, { cache: "no-cache" });
    if (!answer.ok) throw new Error(answer.statusText);
    const text = await answer.text();
    live.className = "";
    live.textContent = "live, " + new Date().toLocaleTimeString();
    if (text === refresh.text) return;
    const first = refresh.text === undefined;
    refresh.text = text;
    if (first) return; // what is shown was loaded a moment ago
    const main = new DOMParser().parseFromString(text, "text/html").querySelector("main");
    const open = new Set([...document.querySelectorAll("details[open]")].map((details) => details.id));
    const typing = document.activeElement?.type === "search";
    document.querySelector("main").replaceWith(main);
    for (const details of main.querySelectorAll("details")) details.open = open.has(details.id);
    setUp();
    if (typing) main.querySelector("input[type=search]")?.focus();
  } catch {
    live.className = "lost";
    live.textContent = "the server does not answer";
  }
}

setUp();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const { plot, source } of shown.values()) draw(plot, JSON.parse(source));
});
const every = Number(document.documentElement.dataset.live);
if (every) {
  refresh();
  setInterval(refresh, 1000 * every);
}
