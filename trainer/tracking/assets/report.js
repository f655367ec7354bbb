"use strict";

// Read-out of the charts: a cursor at the same step in every chart, the numbers beside the one that is pointed at.
const SVG = "http://www.w3.org/2000/svg";
const readout = document.getElementById("readout");
const charts = [...document.querySelectorAll("svg.chart")].map((svg) => ({ svg, data: JSON.parse(svg.dataset.chart) }));

function readable(value) {
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size < 0.001 || size >= 1e7) return value.toExponential(1).replace(".0e", "e").replace("e+", "e");
  if (size >= 999.5) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(3)));
}

function nearest(points, step) {
  let low = 0, high = points.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < step) low = middle + 1; else high = middle;
  }
  return low > 0 && step - points[low - 1][0] < points[low][0] - step ? points[low - 1] : points[low];
}

function xOf(data, step) {
  const [low, high] = data.x;
  return high > low ? data.l + (step - low) / (high - low) * (data.r - data.l) : (data.l + data.r) / 2;
}

function yOf(data, value) {
  const [low, high] = data.y;
  return data.b - (value - low) / (high - low) * (data.b - data.t);
}

function longest(data) {
  return data.s.reduce((a, b) => (b.p.length > a.p.length ? b : a)).p;
}

function clear() {
  readout.style.display = "none";
  for (const { svg } of charts) {
    svg.querySelector(".cursor").style.visibility = "hidden";
    svg.querySelectorAll(".mark").forEach((mark) => mark.remove());
  }
}

function point(chart, step) {
  clear();
  const snapped = nearest(longest(chart.data), step)[0];
  for (const { svg, data } of charts) {
    if (snapped < data.x[0] || snapped > data.x[1]) continue;
    const cursor = svg.querySelector(".cursor");
    cursor.setAttribute("x1", xOf(data, snapped));
    cursor.setAttribute("x2", xOf(data, snapped));
    cursor.style.visibility = "visible";
  }
  return snapped;
}

function row(table, color, name, value) {
  const line = table.insertRow();
  const head = document.createElement("th");
  if (color) {
    const swatch = document.createElement("i");
    swatch.style.background = color;
    head.append(swatch);
  }
  head.append(name);
  line.append(head);
  line.insertCell().textContent = value;
}

function fill(chart, step) {
  const { svg, data } = chart;
  const reach = (data.x[1] - data.x[0]) / Math.max(1, longest(data).length) / 2 + 0.01;
  const table = document.createElement("table");
  let total = 0, shown = 0;
  for (const series of data.s) {
    const [x, y] = nearest(series.p, step);
    if (Math.abs(x - step) > reach || (chart.stacked && y === 0)) continue;
    row(table, series.c, series.n, readable(y) + (chart.stacked ? " s" : ""));
    total += y;
    shown += 1;
    if (chart.stacked || y < data.y[0] || y > data.y[1]) continue;
    const mark = document.createElementNS(SVG, "circle");
    for (const [key, value] of Object.entries({ cx: xOf(data, x), cy: yOf(data, y), r: 4, fill: series.c, class: "mark" }))
      mark.setAttribute(key, value);
    svg.append(mark);
  }
  if (chart.stacked && shown > 1) row(table, "", "together", readable(total) + " s");
  const title = document.createElement("b");
  title.textContent = (Number.isInteger(step) ? "step " : "around step ") + Math.round(step).toLocaleString("en-US");
  readout.replaceChildren(title, table);
}

function place(x, y) {
  readout.style.display = "block";
  const { width, height } = readout.getBoundingClientRect();
  const left = x + 16 + width > innerWidth - 8 ? x - 16 - width : x + 16;
  readout.style.left = Math.max(8, left) + "px";
  readout.style.top = Math.max(8, Math.min(y - height / 2, innerHeight - height - 8)) + "px";
}

for (const chart of charts) {
  const { svg, data } = chart;
  chart.stacked = svg.closest(".figure").classList.contains("stacked");
  const width = svg.viewBox.baseVal.width;
  let current = data.x[1];
  function show(step, x, y) {
    current = point(chart, step);
    fill(chart, current);
    place(x, y);
  }
  function follow(event) {
    const box = svg.getBoundingClientRect();
    const share = ((event.clientX - box.left) / box.width * width - data.l) / (data.r - data.l);
    show(data.x[0] + Math.min(1, Math.max(0, share)) * (data.x[1] - data.x[0]), event.clientX, event.clientY);
  }
  svg.addEventListener("pointermove", follow);
  svg.addEventListener("pointerdown", follow);
  svg.addEventListener("pointerleave", clear);
  svg.addEventListener("blur", clear);
  svg.addEventListener("keydown", (event) => {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move) return;
    event.preventDefault();
    const points = longest(data);
    const index = points.findIndex(([x]) => x === nearest(points, current)[0]);
    const step = points[Math.min(points.length - 1, Math.max(0, index + move))][0];
    const box = svg.getBoundingClientRect();
    show(step, box.left + xOf(data, step) / width * box.width, box.top + box.height / 2);
  });
}

// Sample completions: one step at a time.
const samples = JSON.parse(document.getElementById("completions").textContent);
const steps = [...new Set(samples.map((sample) => sample.step))].sort((a, b) => a - b);

function cell(line, text, name) {
  const made = line.insertCell();
  made.className = name;
  made.textContent = text;
  return made;
}

function addSample(body, sample) {
  const line = body.insertRow();
  const wrong = !(sample.reward > 0);
  line.className = wrong ? "wrong" : "right";
  const verdict = cell(line, wrong ? "\u2717" : "\u2713", "verdict");
  const word = document.createElement("span");
  word.className = "word";
  word.textContent = wrong ? " wrong" : " right";
  verdict.append(word);
  cell(line, sample.prompt, "text");
  const response = cell(line, sample.response, "text");
  const tags = [sample.finish_reason === "stop" ? "" : sample.finish_reason, sample.phase === "val" ? "held-out" : ""];
  for (const tag of tags.filter(Boolean)) {
    const label = document.createElement("span");
    label.className = "tag";
    label.textContent = tag;
    response.append(label);
  }
  cell(line, sample.ground_truth, "text");
  cell(line, sample.reward === null ? "-" : readable(sample.reward), "number");
  cell(line, sample.advantage === null ? "-" : (sample.advantage > 0 ? "+" : "") + sample.advantage.toFixed(2), "number");
}

function showSamples() {
  const step = steps[document.getElementById("step").value];
  const phase = document.getElementById("phase").value;
  const onlyWrong = document.getElementById("wrong").checked;
  const here = samples.filter((sample) => sample.step === step && (phase === "all" || sample.phase === phase));
  const wrong = here.filter((sample) => !(sample.reward > 0));
  const body = document.createElement("tbody");
  (onlyWrong ? wrong : here).forEach((sample) => addSample(body, sample));
  document.querySelector(".samples tbody").replaceWith(body);
  document.getElementById("step-name").textContent = "step " + step;
  document.getElementById("count").textContent = here.length - wrong.length + " of " + here.length + " right";
}

if (steps.length > 0) {
  const slider = document.getElementById("step");
  slider.max = steps.length - 1;
  slider.value = steps.length - 1;
  slider.disabled = steps.length < 2;
  for (const id of ["step", "phase", "wrong"]) document.getElementById(id).addEventListener("input", showSamples);
  showSamples();
}
