// The Live page: is it healthy; if not, where and why.

const WINDOW_NAMES = { 10: "10 s", 60: "60 s", 300: "5 min", 3600: "1 h" };
const QUIET_KINDS = ["healthy", "inconclusive"];
const SERIES = [
  { title: "Time to first token", low: "ttft_p50_s", high: "ttft_p95_s", names: ["p50", "p95"] },
  { title: "Time between tokens", low: "itl_p50_s", high: "itl_p99_s", names: ["p50", "p99"] },
];
const CHART_HEIGHT = 170;

export default function (component) {
  const { data, parentElement } = component;
  let page = parentElement.insituPage;
  if (!page) page = parentElement.insituPage = createLivePage(parentElement, component);
  page.update(component, data);
  const call = (page.calls = (page.calls || 0) + 1);
  // Streamlit may run an older call's clean-up after a newer call: only the newest one ends the page.
  return () => page.calls === call && page.close();
}

function createLivePage(parent, first) {
  const root = element("div", "insitu-root insitu-live");
  root.dataset.ticks = "0";
  parent.append(root);
  let component = first;
  let picture = null;
  let stream = null;
  let streamUrl = null;
  const strip = createStrip(root, { onPause: pause });
  const verdict = section(root, "insitu-verdict", "Verdict");
  verdict.setAttribute("aria-live", "polite");
  const numbers = section(root, "insitu-numbers", "Numbers");
  const pair = element("div", "insitu-pair");
  root.append(pair);
  const grid = section(pair, "insitu-grid", "What each rank does, last 5 s");
  const mix = section(pair, "insitu-mix", "Where the time went");
  const latency = section(root, "insitu-latency", "Latency");
  const canvas = element("canvas", "insitu-chart");
  canvas.setAttribute("role", "img");
  latency.append(canvas);
  const ticks = element("p", "insitu-muted");
  latency.append(ticks);
  const alarms = section(root, "insitu-alarms", "Alarms");
  const resized = new ResizeObserver(() => picture && drawLatency(canvas, picture, theme(root)));
  resized.observe(canvas);

  function pause(wanted) {
    component.setStateValue("paused", wanted ? { t1: picture ? picture.end : null } : null);
  }

  function apply(next) {
    picture = next;
    root.dataset.ticks = String(Number(root.dataset.ticks) + 1);
    strip.show(next.header, next.notice, performance.now());
    const look = theme(root);
    const hasRanks = next.grid.length > 0;
    for (const part of [numbers, pair, latency, alarms, verdict]) part.hidden = !hasRanks;
    if (!hasRanks) return;
    drawVerdict(verdict, next);
    drawNumbers(numbers, next.numbers);
    const isOver = next.header.state === "ended" || next.header.state === "stale";
    drawGrid(grid, next.grid, look, isOver);
    drawMix(mix, next.mix, look, component.data.window_s);
    drawLatency(canvas, next, look);
    const marks = [...next.ticks].sort((a, b) => a.unix_ms - b.unix_ms);
    setText(ticks, marks.length ? `Marks: ${marks.map((tick) => `${clockText(tick.unix_ms)} ${tick.kind.replaceAll("_", " ")}`).join(" · ")}` : "");
    drawAlarms(alarms, next.alarms, isOver);
  }

  return {
    update(next, data) {
      component = next;
      strip.paused(Boolean(data.paused));
      if (data.stream !== streamUrl) {
        if (stream) stream.close();
        streamUrl = data.stream;
        stream = streamUrl ? openStream(streamUrl, { onPicture: apply, onState: told }) : null;
      }
      if (data.picture && (!stream || !picture)) apply(data.picture);
      if (!stream) strip.connection("open");
    },
    close() {
      if (stream) stream.close();
      stream = streamUrl = null;
      resized.disconnect();
      strip.close();
      root.remove();
      delete parent.insituPage;
    },
  };

  function told(state) {
    strip.connection(state);
    if (state === "failed") component.setTriggerValue("fallback", true);
  }
}

function section(root, className, title) {
  const node = element("section", className);
  node.setAttribute("aria-label", title);
  root.append(node);
  return node;
}

// -- verdict ----------------------------------------------------------------------------------------------------------

function evidenceLink(verdict, picture) {
  const run = picture.replica ? `${picture.run}.${picture.replica}` : picture.run;
  const link = element("a", "insitu-link", "see it on the timeline");
  const begin = BigInt(verdict.t0);
  const end = BigInt(verdict.t1);
  const most = 10_000_000_000n;
  const from = end - begin > most ? end - most : begin;
  link.href = `pipeline?run=${encodeURIComponent(run)}&t0=${from}&t1=${end > from ? end : from + 1_000_000_000n}`;
  link.target = "_self";
  return link;
}

function drawVerdict(node, picture) {
  const isOld = picture.header.state === "stale";
  const key = JSON.stringify([isOld, picture.verdicts.map((each) => [each.id, each.text, each.state, each.num_requests])]);
  if (node.dataset.key === key) return; // read aloud only when it changed
  node.dataset.key = key;
  const cards = picture.verdicts.map((verdict, place) => {
    const card = element("div", "insitu-card");
    card.dataset.level = !QUIET_KINDS.includes(verdict.kind) ? "bad" : verdict.kind === "healthy" && !isOld ? "good" : "unsure";
    const sign = { good: "✓", unsure: "?", bad: "▲" }[card.dataset.level];
    const over = verdict.state === "closed" && card.dataset.level === "bad" ? " (it is over)" : "";
    const before = isOld ? "Told before the record stopped: " : "";
    const [head, rest] = parted(verdict.text);
    card.append(element(place ? "h4" : "h3", "", `${sign} ${before}${head}${over}`));
    if (rest) card.append(element("p", "insitu-finding", rest));
    const remedy = plain(verdict.remedy || "");
    if (remedy) card.append(element("p", "", card.dataset.level === "bad" ? `What helps: ${remedy}` : remedy));
    const facts = element("p", "insitu-muted");
    const requests = verdict.num_requests === 1 ? "request" : "requests";
    const count = verdict.num_requests ? ` · ${verdict.num_requests.toLocaleString("en")} ${requests} affected` : "";
    const named = verdict.requests.length ? `: ${verdict.requests.slice(0, 3).join(", ")}${verdict.num_requests > 3 ? ", …" : ""}` : "";
    facts.append(element("span", "", `since ${clockText(Number(BigInt(verdict.t0) / 1000000n))} · confidence ${percentText(verdict.confidence)}${count}${named} · `));
    facts.append(evidenceLink(verdict, picture));
    card.append(facts);
    return card;
  });
  if (!cards.length) cards.push(element("div", "insitu-card", "No verdict yet."));
  node.replaceChildren(...cards);
}

// The claim of a verdict, and what it rests on: its first clause, with more of it where that alone names no place.
function parted(text) {
  const colon = text.indexOf(": ");
  const isClaim = colon > 0 && text.slice(0, colon).split(" ").length > 3;
  const ends = [isClaim ? colon : -1, text.indexOf("; "), text.indexOf(". ")].filter((place) => place > 0);
  if (!ends.length) return [text, ""];
  const end = Math.min(...ends);
  const rest = text.slice(end + 2);
  return [text.slice(0, end), rest.charAt(0).toUpperCase() + rest.slice(1)];
}

// -- numbers ----------------------------------------------------------------------------------------------------------

function drawNumbers(node, numbers) {
  const count = (value, unit) => (value === null || value === undefined ? "–" : `${Number(value.toPrecision(3)).toLocaleString("en")}${unit}`);
  const time = (value) => (value === null || value === undefined ? "–" : durationText(value));
  const shown = [
    ["tokens", count(numbers.tokens_per_s, " /s")],
    ["requests done", count(numbers.requests_per_s, " /s")],
    ["running", count(numbers.running, "")],
    ["failed, last 30 s", count(numbers.failed, "")],
    ["steps", count(numbers.steps_per_s, " /s")],
    ["first token p95", time(numbers.ttft_p95_s)],
    ["between tokens p50", time(numbers.itl_p50_s)],
    ["between tokens p99", time(numbers.itl_p99_s)],
  ];
  if (node.childElementCount !== shown.length) {
    node.replaceChildren(
      ...shown.map(([name]) => {
        const item = element("div", "insitu-number");
        item.append(element("span", "insitu-muted", name), element("b", ""));
        return item;
      }),
    );
  }
  shown.forEach(([, text], place) => setText(node.children[place].lastChild, text));
}

// -- what ranks do ----------------------------------------------------------------------------------------------------

function bar(classes, look) {
  const canvas = element("canvas", "insitu-bar");
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", Object.entries(classes).map(([cls, share]) => `${classOf(cls).label} ${percentText(share)}`).join(", "));
  canvas.title = canvas.getAttribute("aria-label");
  canvas.style.width = "100%";
  requestAnimationFrame(() => {
    if (!canvas.isConnected) return;
    const { context, width, height } = fit(canvas, 22);
    context.clearRect(0, 0, width, height);
    let x = 0;
    for (const cls of Object.keys(CLASSES).filter((name) => classes[name])) {
      const wide = classes[cls] * width;
      context.fillStyle = fill(context, cls, look.isDark);
      context.fillRect(x, 0, wide, height);
      if (classOf(cls).outline && wide > 2) {
        context.strokeStyle = OUTLINE;
        context.strokeRect(x + 0.5, 0.5, wide - 1, height - 1);
      }
      if (wide > 14) {
        context.fillStyle = classColour(cls, look.isDark);
        context.fillRect(x + wide / 2 - 6, 4, 12, 14);
        context.fillStyle = inkOf(cls, look.isDark);
        context.font = "bold 12px sans-serif";
        context.textAlign = "center";
        context.textBaseline = "middle";
        context.fillText(classOf(cls).letter, x + wide / 2, height / 2 + 0.5);
      }
      x += wide;
    }
  });
  return canvas;
}

function drawGrid(node, cells, look, isOver) {
  const table = element("table", "insitu-table");
  const head = element("tr");
  for (const name of ["stage", "rank", "mostly", ""]) head.append(element("th", "", name));
  table.append(head);
  for (const cell of cells) {
    const row = element("tr");
    row.append(element("td", "", `stage ${cell.stage}`), element("td", "", `rank ${cell.rank}`));
    const mostly = element("td");
    if (cell.open) {
      mostly.append(element("b", "insitu-open", `▲ ${cell.open.text}`));
    } else if (cell.cls) {
      mostly.append(swatch(cell.cls, look.isDark), element("span", "", ` ${classOf(cell.cls).label} ${percentText(cell.share)}`));
    } else {
      mostly.append(element("span", "insitu-muted", "no record"));
    }
    const share = element("td", "insitu-wide");
    share.append(bar(cell.classes, look));
    row.append(mostly, share);
    table.append(row);
  }
  node.replaceChildren(element("h4", "", isOver ? "What each rank did in the last 5 s recorded" : "What each rank does now (last 5 s)"), table);
}

function drawMix(node, stages, look, windowS) {
  const shown = new Set();
  const rows = stages.map((stage) => {
    const row = element("div", "insitu-mix-row");
    row.append(element("span", "", `stage ${stage.stage}`), bar(stage.classes, look));
    for (const [cls, share] of Object.entries(stage.classes)) if (share >= 0.005) shown.add(cls);
    return row;
  });
  const legend = element("div", "insitu-legend");
  for (const cls of Object.keys(CLASSES).filter((name) => shown.has(name))) {
    const item = element("span", "insitu-legend-item");
    item.append(swatch(cls, look.isDark), element("span", "", ` ${classOf(cls).label}`));
    legend.append(item);
  }
  node.replaceChildren(element("h4", "", `Where the time went (last ${WINDOW_NAMES[windowS] || `${windowS} s`}, % of wall time)`), ...rows, legend);
}

// -- latency ----------------------------------------------------------------------------------------------------------

function drawLatency(canvas, picture, look) {
  const isNarrow = canvas.clientWidth < 640;
  const { context, width, height } = fit(canvas, isNarrow ? 2 * CHART_HEIGHT : CHART_HEIGHT);
  context.clearRect(0, 0, width, height);
  SERIES.forEach((series, place) => {
    const box = isNarrow
      ? { x: 0, y: place * CHART_HEIGHT, width, height: CHART_HEIGHT }
      : { x: (place * width) / 2, y: 0, width: width / 2 - 12, height: CHART_HEIGHT };
    drawSeries(context, box, series, picture, look);
  });
  const last = SERIES.map((series) => {
    const values = (picture.latency[series.high] || []).filter((value) => value !== null);
    return `${series.title} ${series.names[1]} ${values.length ? durationText(values[values.length - 1]) : "not recorded"}`;
  });
  canvas.setAttribute("aria-label", `Latency over time. Last: ${last.join("; ")}.`);
}

function niceTop(value) {
  const scale = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * scale).find((step) => step >= value);
}

function drawSeries(context, box, series, picture, look) {
  const { unix_s: times } = picture.latency;
  const left = box.x + 52;
  const top = box.y + 22;
  const right = box.x + box.width - 44;
  const bottom = box.y + box.height - 20;
  const all = [...(picture.latency[series.low] || []), ...(picture.latency[series.high] || [])].filter((value) => value !== null);
  context.font = "12px sans-serif";
  context.textBaseline = "middle";
  context.textAlign = "left";
  context.fillStyle = look.text;
  context.fillText(series.title, box.x, box.y + 8);
  if (!all.length) {
    context.fillStyle = look.muted;
    context.fillText("No token times were recorded in this window.", box.x, top + 20);
    return;
  }
  const peak = niceTop(Math.max(...all));
  const atX = (unixS) => left + ((right - left) * (unixS - times[0])) / Math.max(1e-9, times[times.length - 1] - times[0]);
  const atY = (value) => bottom - ((bottom - top) * value) / peak;
  context.strokeStyle = look.line;
  context.fillStyle = look.muted;
  context.lineWidth = 1;
  context.textAlign = "right";
  for (const part of [0, 0.5, 1]) {
    context.beginPath();
    context.moveTo(left, Math.round(atY(part * peak)) + 0.5);
    context.lineTo(right, Math.round(atY(part * peak)) + 0.5);
    context.stroke();
    context.fillText(part ? durationText(part * peak) : "0", left - 6, atY(part * peak));
  }
  context.textAlign = "left";
  context.fillText(clockText(times[0] * 1000), left, bottom + 11);
  context.textAlign = "right";
  context.fillText(clockText(times[times.length - 1] * 1000), right, bottom + 11);
  for (const tick of picture.ticks) {
    const x = atX(tick.unix_ms / 1000);
    if (x < left || x > right) continue;
    context.strokeStyle = look.text;
    context.setLineDash([3, 3]);
    context.beginPath();
    context.moveTo(x, top - 6);
    context.lineTo(x, bottom);
    context.stroke();
    context.setLineDash([]);
    context.fillStyle = look.text;
    context.textAlign = "center";
    context.fillText("▼", x, top - 8);
  }
  const looks = [
    { name: series.low, label: series.names[0], colour: look.isDark ? "#56B4E9" : "#0072B2", dash: [] },
    { name: series.high, label: series.names[1], colour: look.isDark ? "#E69F00" : "#9C2F00", dash: [6, 3] },
  ];
  const ends = looks.map((each) => drawLine(context, times, picture.latency[each.name], atX, atY, each));
  const isClose = ends[0] && ends[1] && Math.abs(ends[0].y - ends[1].y) < 14;
  context.textAlign = "left";
  context.font = "bold 12px sans-serif";
  looks.forEach((each, place) => {
    if (!ends[place]) return;
    context.fillStyle = each.colour;
    context.fillText(each.label, ends[place].x + 5, ends[place].y + (isClose ? 7 - 14 * place : 0));
  });
}

// Draws a line with gaps where nothing was sampled; returns where it ends, or null.
function drawLine(context, times, values, atX, atY, { colour, dash }) {
  context.strokeStyle = colour;
  context.lineWidth = 1.8;
  context.setLineDash(dash);
  context.beginPath();
  let isDown = false;
  let end = null;
  values.forEach((value, place) => {
    if (value === null) {
      isDown = false;
      return;
    }
    end = { x: atX(times[place]), y: atY(value) };
    if (!isDown) context.moveTo(end.x - 1.5, end.y); // a lone sample is seen too
    context.lineTo(end.x, end.y);
    isDown = true;
  });
  context.stroke();
  context.setLineDash([]);
  return end;
}

// -- alarms -----------------------------------------------------------------------------------------------------------

function drawAlarms(node, alarms, isOver) {
  const key = String(isOver) + JSON.stringify(alarms.map((alarm) => [alarm.id, alarm.state, alarm.text]));
  if (node.dataset.key === key) return;
  node.dataset.key = key;
  const list = element("ul", "insitu-list");
  for (const alarm of alarms) {
    const item = element("li");
    item.append(element("b", "", `told ${clockText(Number(BigInt(alarm.detected) / 1000000n))} `));
    item.append(element("span", "", `${alarm.text}${alarm.state === "closed" ? " (over)" : isOver ? " (so to the end of the record)" : " (still so)"}`));
    list.append(item);
  }
  const none = element("p", "insitu-muted", "None since the run began, as far as its records go.");
  node.replaceChildren(element("h4", "", "Alarms, newest first"), alarms.length ? list : none);
}
