// The heat map: a row a rank, a column a bucket, the share of wall time that one class took. Brushing it sets a window.

const HEAT_AXIS_PX = 20;
const CIVIDIS = ["#00224E", "#123570", "#3B496C", "#575D6D", "#707173", "#8A8678", "#A59C74", "#C3B369", "#FEE838"];
const CIVIDIS_RGB = CIVIDIS.map((hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16)));
const HEAT_OF_VERDICT = { gc_pause: "gc", host_contended: "contended", slow_stage: "compute", stage_limits: "compute" };

function cividis(part, rgba, at) {
  const place = Math.max(0, Math.min(1, part)) * (CIVIDIS_RGB.length - 1);
  const low = Math.min(CIVIDIS_RGB.length - 2, Math.floor(place));
  for (let band = 0; band < 3; band++) {
    rgba[at + band] = CIVIDIS_RGB[low][band] + (place - low) * (CIVIDIS_RGB[low + 1][band] - CIVIDIS_RGB[low][band]);
  }
  rgba[at + 3] = 255;
}

// The class that shows the first verdict best; waiting upstream is where any other stall ends up.
function heatClass(picture) {
  const held = picture.heat.percent;
  const wanted = picture.verdicts.map((verdict) => HEAT_OF_VERDICT[verdict.kind]).find((cls) => cls in held);
  return wanted || ("wait_upstream" in held ? "wait_upstream" : Object.keys(held)[0] || "wait_upstream");
}

// createHeat(root, {onBrush(t0S, t1S)}) -> {show(picture, look, lanes, window)}
function createHeat(root, { onBrush }) {
  const head = element("div", "insitu-head");
  const label = element("label", "", "Share of ");
  const select = element("select");
  label.append(select);
  const legend = element("canvas", "insitu-heat-scale");
  legend.setAttribute("role", "img");
  legend.setAttribute("aria-label", "Colour scale from dark blue, 0 % of wall time, to yellow, 100 %");
  head.append(element("h3", "", "Heat map"), label, legend);
  const canvas = element("canvas", "insitu-chart insitu-heat");
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", "Heat map: no data yet.");
  const readout = element("p", "insitu-muted");
  root.append(head, canvas, readout);

  const cells = document.createElement("canvas");
  const state = { picture: null, cls: null, isChosen: false, brush: null, drawn: "", lanes: [], window: null };
  let look = null;

  const left = () => gutterOf(canvas.clientWidth);
  const range = () => {
    const { unix_s: times, bucket_s: bucket } = state.picture.heat;
    return [times[0], times[times.length - 1] + bucket];
  };
  const xOf = (unixS) => left() + ((unixS - range()[0]) / (range()[1] - range()[0])) * (canvas.clientWidth - left());
  const timeAt = (x) => range()[0] + ((x - left()) / (canvas.clientWidth - left())) * (range()[1] - range()[0]);
  const hasData = () => state.picture !== null && state.picture.heat.unix_s.length > 0;

  function fillSelect() {
    const classes = Object.keys(state.picture.heat.percent);
    if (!state.isChosen || !classes.includes(state.cls)) state.cls = heatClass(state.picture);
    if (!classes.includes(state.cls)) classes.push(state.cls);
    const key = classes.join(" ");
    if (select.dataset.key !== key) {
      select.dataset.key = key;
      select.replaceChildren(...classes.map((cls) => Object.assign(element("option", "", classOf(cls).label), { value: cls })));
    }
    if (select.value !== state.cls) select.value = state.cls;
  }

  // No colour of the scale may stand for the absence of a value.
  function noData(context) {
    const tile = document.createElement("canvas");
    tile.width = tile.height = HATCH_PX;
    const inner = tile.getContext("2d");
    inner.fillStyle = look.panel;
    inner.fillRect(0, 0, HATCH_PX, HATCH_PX);
    inner.strokeStyle = look.muted;
    hatch(inner, "up", HATCH_PX);
    return context.createPattern(tile, "repeat");
  }

  function paintCells(rows) {
    const columns = state.picture.heat.unix_s.length;
    cells.width = columns;
    cells.height = rows.length;
    const context = cells.getContext("2d");
    const image = context.createImageData(columns, rows.length);
    rows.forEach((row, at) => row.forEach((percent, column) => {
      if (percent >= 0) cividis(percent / 100, image.data, 4 * (at * columns + column));
    }));
    context.putImageData(image, 0, 0);
  }

  function shownRows() {
    const { lanes, percent } = state.picture.heat;
    const values = percent[state.cls];
    const places = state.lanes.map((lane) => lanes.findIndex((each) => laneKey(each) === laneKey(lane)));
    const none = state.picture.heat.unix_s.map(() => -1);
    return places.map((place) => (values && place >= 0 ? values[place] : none));
  }

  function draw() {
    const high = laneHeight(state.lanes.length) * 0.6;
    const { context, width, height } = fit(canvas, Math.round(state.lanes.length * high) + HEAT_AXIS_PX);
    context.fillStyle = look.background;
    context.fillRect(0, 0, width, height);
    context.font = LANE_FONT;
    context.textBaseline = "middle";
    context.fillStyle = look.text;
    context.textAlign = "left";
    state.lanes.forEach((lane, place) => context.fillText(laneLabel(lane, width), 0, (place + 0.5) * high));
    context.fillStyle = noData(context);
    context.fillRect(left(), 0, width - left(), height - HEAT_AXIS_PX);
    if (!hasData() || !state.lanes.length) return;
    const rows = shownRows();
    paintCells(rows);
    context.imageSmoothingEnabled = false;
    context.drawImage(cells, left(), 0, width - left(), height - HEAT_AXIS_PX);
    drawTimes(context, width, height);
    drawWindow(context, height);
    describe(rows);
  }

  function drawTimes(context, width, height) {
    context.fillStyle = look.muted;
    context.font = "11px sans-serif";
    const [begin, end] = range();
    const count = width < 560 ? 2 : 5;
    for (let part = 0; part <= count; part++) {
      context.textAlign = part === 0 ? "left" : part === count ? "right" : "center";
      const at = begin + (part / count) * (end - begin);
      context.fillText(clockText(at * 1000), xOf(at), height - 8);
    }
  }

  function drawWindow(context, height) {
    const shown = state.brush || state.window;
    if (!shown) return;
    const x0 = Math.max(left(), xOf(shown[0]));
    const x1 = Math.max(x0 + 2, Math.min(canvas.clientWidth, xOf(shown[1])));
    if (x0 > canvas.clientWidth || x1 < left()) return;
    for (const [wide, colour] of [[4, look.background], [2, look.accent]]) {
      context.lineWidth = wide;
      context.strokeStyle = colour;
      context.strokeRect(x0, 1.5, x1 - x0, height - HEAT_AXIS_PX - 3);
    }
  }

  function describe(rows) {
    const mean = (row) => {
      const known = row.filter((value) => value >= 0);
      return known.length ? Math.round(known.reduce((sum, value) => sum + value, 0) / known.length) : null;
    };
    const parts = state.lanes.map((lane, place) => `rank ${lane.rank} ${mean(rows[place]) ?? "no data"}${mean(rows[place]) === null ? "" : " %"}`);
    const [begin, end] = range();
    const label = classOf(state.cls).label;
    canvas.setAttribute("aria-label", `Heat map of ${label}, ${clockText(begin * 1000)} to ${clockText(end * 1000)}. On average: ${parts.join(", ")} of wall time. Drag to set the timeline's window.`);
  }

  function drawLegend() {
    const key = `${look.isDark} ${look.text} ${window.devicePixelRatio}`;
    if (legend.dataset.key === key) return;
    legend.dataset.key = key;
    legend.style.width = "310px";
    const { context } = fit(legend, 18);
    context.clearRect(0, 0, 310, 18);
    const shade = context.createLinearGradient(26, 0, 106, 0);
    CIVIDIS.forEach((colour, at) => shade.addColorStop(at / (CIVIDIS.length - 1), colour));
    context.fillStyle = shade;
    context.fillRect(26, 3, 80, 12);
    context.fillStyle = look.text;
    context.font = "11px sans-serif";
    context.textBaseline = "middle";
    context.fillText("0 %", 2, 9);
    context.fillText("100 % of wall time", 112, 9);
    context.fillText("no data", 252, 9);
    context.fillStyle = noData(context);
    context.fillRect(230, 3, 18, 12);
  }

  function readAt(x, y) {
    if (!hasData() || x < left()) return;
    const { unix_s: times, bucket_s: bucket } = state.picture.heat;
    const column = Math.max(0, Math.min(times.length - 1, Math.floor((timeAt(x) - times[0]) / bucket)));
    const place = Math.min(state.lanes.length - 1, Math.floor(y / (laneHeight(state.lanes.length) * 0.6)));
    const value = (shownRows()[place] || [])[column];
    if (value === undefined) return;
    const what = value < 0 ? "no data" : `${value} % ${classOf(state.cls).label}`;
    setText(readout, `${clockText(times[column] * 1000)} · rank ${state.lanes[place].rank}: ${what} (${bucket} s buckets)`);
  }

  function brushed(fromX, x, isOver) {
    if (!hasData()) return;
    const [begin, end] = range();
    const times = [timeAt(Math.min(fromX, x)), timeAt(Math.max(fromX, x))];
    const brush = times.map((time) => Math.max(begin, Math.min(end, time)));
    state.brush = isOver ? null : brush;
    draw();
    if (isOver && brush[1] > brush[0]) onBrush(brush[0], brush[1]);
  }

  select.addEventListener("change", () => {
    state.cls = select.value;
    state.isChosen = true;
    draw();
  });
  canvas.addEventListener("pointermove", (event) => readAt(event.offsetX, event.offsetY));
  follow(canvas, {
    onDrag: (fromX, x) => brushed(fromX, x, false),
    onDragEnd: (fromX, x) => brushed(fromX, x, true),
    onClick: (x) => {
      const bucket = hasData() ? state.picture.heat.bucket_s : 0;
      const begin = hasData() ? range()[0] + Math.floor((timeAt(x) - range()[0]) / bucket) * bucket : 0;
      if (bucket && x >= left()) onBrush(begin, begin + bucket);
    },
  });
  canvas.addEventListener("keydown", (event) => {
    const towards = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!towards || !hasData()) return;
    event.preventDefault();
    const { bucket_s: bucket } = state.picture.heat;
    const from = state.window || [range()[1] - bucket, range()[1]];
    onBrush(from[0] + towards * bucket, from[1] + towards * bucket);
  });

  return {
    canvas,
    // window: [begin, end] in unix seconds when the timeline stands still, else null.
    show(picture, nextLook, lanes, window) {
      Object.assign(state, { picture, lanes, window });
      look = nextLook;
      fillSelect();
      drawLegend();
      draw();
    },
  };
}
