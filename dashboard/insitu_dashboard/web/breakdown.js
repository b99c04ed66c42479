// Where each rank's wall time went in the window shown: a bar a rank, letters and percents in it, a legend below.

const BAR_PX = 24;
const BAR_GAP_PX = 6;
const CONTENDED_NOTE =
  " · contended: time in compute and host in which the kernel gave the core to others; lanes draw the intervals as recorded";

// The mean percent of each class of one rank over the buckets that `window` (unix seconds) touches; null: no data.
function sharesOf(heat, place, window) {
  const found = {};
  let count = 0;
  heat.unix_s.forEach((begin, column) => {
    const isInside = !window || (begin < window[1] && begin + heat.bucket_s > window[0]);
    const isKnown = Object.values(heat.percent).some((rows) => rows[place][column] >= 0);
    if (!isInside || !isKnown) return;
    count += 1;
    for (const [cls, rows] of Object.entries(heat.percent)) found[cls] = (found[cls] || 0) + Math.max(0, rows[place][column]);
  });
  if (!count) return null;
  for (const cls in found) found[cls] /= count;
  return found;
}

function sharesText(shares) {
  if (!shares) return "no data";
  const largest = Object.entries(shares).filter(([, value]) => value >= 0.5).sort((a, b) => b[1] - a[1]);
  return largest.map(([cls, value]) => `${classOf(cls).label} ${Math.round(value)} %`).join(", ");
}

// createBreakdown(root) -> {show(picture, look, lanes, window)}; show returns each lane's shares in percent.
function createBreakdown(root) {
  const title = element("h3", "", "Breakdown");
  const caption = element("p", "insitu-muted");
  const canvas = element("canvas", "insitu-chart");
  canvas.setAttribute("role", "img");
  const legend = element("div", "insitu-legend");
  root.append(title, caption, canvas, legend);

  function drawBar(context, shares, y, left, width, look) {
    context.fillStyle = look.panel;
    context.fillRect(left, y, width - left, BAR_PX);
    context.fillStyle = look.muted;
    context.textAlign = "left";
    context.font = LANE_FONT;
    if (!shares) return context.fillText("no data in this window", left + 8, y + BAR_PX / 2);
    let x = left;
    const total = Math.max(100, Object.values(shares).reduce((sum, value) => sum + value, 0));
    for (const cls of CLASS_NAMES) {
      const wide = ((shares[cls] || 0) / total) * (width - left);
      if (wide < 0.5) continue;
      context.fillStyle = fill(context, cls, look.isDark);
      context.fillRect(x, y, wide > 3 ? wide - 1 : wide, BAR_PX);
      if (classOf(cls).outline && wide > 4) {
        context.strokeStyle = OUTLINE;
        context.lineWidth = 1;
        context.strokeRect(x + 0.5, y + 0.5, wide - 2, BAR_PX - 1);
      }
      if (wide >= LETTER_FROM_PX) drawText(context, cls, shares[cls], x, wide, y, look);
      x += wide;
    }
  }

  function drawText(context, cls, value, x, wide, y, look) {
    context.font = LETTER_FONT;
    context.textAlign = "center";
    const letter = classOf(cls).letter;
    const text = wide >= 44 ? `${letter} ${Math.round(value)} %` : letter;
    const long = context.measureText(text).width;
    if (classOf(cls).hatch !== "plain") {
      context.fillStyle = classColour(cls, look.isDark);
      context.fillRect(x + wide / 2 - long / 2 - 2, y + 4, long + 4, BAR_PX - 8);
    }
    context.fillStyle = inkOf(cls, look.isDark);
    context.fillText(text, x + wide / 2, y + BAR_PX / 2 + 0.5);
  }

  function showLegend(all, look) {
    const shown = CLASS_NAMES.filter((cls) => all.some((shares) => shares && shares[cls] >= 0.05));
    const key = `${shown.join(" ")} ${look.isDark}`;
    if (legend.dataset.key === key) return;
    legend.dataset.key = key;
    legend.replaceChildren(...shown.map((cls) => {
      const item = element("span", "insitu-legend-item");
      item.append(swatch(cls, look.isDark), document.createTextNode(` ${classOf(cls).label}`));
      return item;
    }));
  }

  return {
    show(picture, look, lanes, window) {
      const { heat } = picture;
      const all = lanes.map((lane) => {
        const place = heat.lanes.findIndex((each) => laneKey(each) === laneKey(lane));
        return place < 0 ? null : sharesOf(heat, place, window);
      });
      const { context, width, height } = fit(canvas, Math.max(1, lanes.length) * (BAR_PX + BAR_GAP_PX));
      context.fillStyle = look.background;
      context.fillRect(0, 0, width, height);
      context.textBaseline = "middle";
      lanes.forEach((lane, place) => {
        const y = place * (BAR_PX + BAR_GAP_PX);
        context.fillStyle = look.text;
        context.textAlign = "left";
        context.font = LANE_FONT;
        context.fillText(laneLabel(lane, width), 0, y + BAR_PX / 2);
        drawBar(context, all[place], y, gutterOf(width), width, look);
      });
      showLegend(all, look);
      const isContended = all.some((shares) => shares && shares.contended >= 1);
      setText(caption, captionText(heat, window) + (isContended ? CONTENDED_NOTE : ""));
      const said = lanes.map((lane, place) => `rank ${lane.rank}: ${sharesText(all[place])}`).join("; ");
      canvas.setAttribute("aria-label", `Share of wall time. ${said || "No rank yet"}.`);
      return all;
    },
  };
}

function captionText(heat, window) {
  if (!heat.unix_s.length) return "% of wall time";
  const first = heat.unix_s[0];
  const last = heat.unix_s[heat.unix_s.length - 1] + heat.bucket_s;
  if (!window) return `% of wall time, ${clockText(first * 1000)} to ${clockText(last * 1000)}`;
  const whole = (at, round) => first + round((at - first) / heat.bucket_s) * heat.bucket_s;
  const begin = Math.max(first, whole(window[0], Math.floor));
  const end = Math.min(last, whole(window[1], Math.ceil));
  if (end <= begin) return "% of wall time: the window lies outside what the heat map covers";
  return `% of wall time, ${clockText(begin * 1000)} to ${clockText(end * 1000)} (whole buckets of ${heat.bucket_s} s)`;
}
