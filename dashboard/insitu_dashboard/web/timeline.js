// The timeline: one canvas, a lane a rank. Draws what a window holds, and says what lies under a point.

const AXIS_PX = 22;
const LANE_GAP_PX = 6;
const NARROW_PX = 2; // narrower spans share a pixel column, which takes the class with most of its time
const HATCH_FROM_PX = 4;
const LETTER_FROM_PX = 14;
const TEXT_FROM_PX = 76;
const LANE_FONT = "12px sans-serif";
const LETTER_FONT = "bold 11px sans-serif";
const TICK_STEPS = [1, 2, 5];

function gutterOf(width) {
  return width < 560 ? 58 : 116;
}

function laneLabel(lane, width) {
  return width < 560 ? `s${lane.stage} r${lane.rank}` : `stage ${lane.stage} · rank ${lane.rank}`;
}

function laneHeight(count) {
  return count > 32 ? 12 : count > 12 ? 20 : 32;
}

// The step of an axis in microseconds: 1, 2 or 5 times a power of ten, at most one label each `pixels`.
function tickStep(rangeUs, width, pixels) {
  const least = (rangeUs * pixels) / Math.max(1, width);
  const power = 10 ** Math.floor(Math.log10(least));
  for (const times of TICK_STEPS) if (times * power >= least) return times * power;
  return 10 * power;
}

// A time of day, as exact as an axis of that step needs.
function tickText(unixUs, stepUs) {
  const clock = clockText(unixUs / 1e3);
  if (stepUs >= 1e6) return clock;
  const digits = stepUs >= 1e5 ? 1 : stepUs >= 1e4 ? 2 : stepUs >= 1e3 ? 3 : 6;
  const fraction = Math.floor(((unixUs % 1e6) * 10 ** digits) / 1e6 + 1e-6);
  return `${clock}.${String(fraction).padStart(digits, "0")}`;
}

class Timeline {
  constructor(canvas) {
    this.canvas = canvas;
    this.lanes = [];
    this.isShown = CLASS_NAMES.map(() => true);
    this.share = new Float64Array(CLASS_NAMES.length); // of the pixel column in work
    this.look = null;
    this.width = 1;
    this.gutter = 0;
    this.view = null;
  }

  useTheme(look) {
    this.look = look;
    const context = this.canvas.getContext("2d");
    this.colours = CLASS_NAMES.map((name) => classColour(name, look.isDark));
    this.fills = CLASS_NAMES.map((name) => fill(context, name, look.isDark));
  }

  xOf(us) {
    return this.gutter + ((us - this.view.t0) / (this.view.t1 - this.view.t0)) * (this.width - this.gutter);
  }

  usOf(x) {
    return this.view.t0 + ((x - this.gutter) / (this.width - this.gutter)) * (this.view.t1 - this.view.t0);
  }

  yOf(place) {
    return AXIS_PX + place * (this.high + LANE_GAP_PX);
  }

  laneAt(y) {
    const place = Math.floor((y - AXIS_PX + LANE_GAP_PX / 2) / (this.high + LANE_GAP_PX));
    return this.lanes[Math.max(0, Math.min(this.lanes.length - 1, place))];
  }

  // Draws `store` between view.t0 and view.t1. marked: spans to outline. epochUs: unix time of the page's epoch.
  draw(store, live, view, lanes, epochUs, marked) {
    this.lanes = lanes;
    this.view = view;
    this.high = laneHeight(lanes.length);
    const { context, width, height } = fit(this.canvas, this.yOf(Math.max(1, lanes.length)) + 2);
    this.width = width;
    this.gutter = gutterOf(width);
    context.fillStyle = this.look.background;
    context.fillRect(0, 0, width, height);
    context.textBaseline = "middle";
    this.drawLanes(context, height);
    if (!view.isKnown) return this.drawMessage(context, "Waiting for the first spans …");
    this.drawAxis(context, height, epochUs);
    context.save();
    context.beginPath();
    context.rect(this.gutter, AXIS_PX - 2, width - this.gutter, height);
    context.clip();
    lanes.forEach((lane, place) => this.drawSpans(context, store.spans.get(laneKey(lane)), this.yOf(place)));
    this.drawOpen(context, live);
    this.drawGaps(context, store.gaps);
    for (const span of marked) this.drawMark(context, span);
    context.restore();
  }

  drawMessage(context, text) {
    context.fillStyle = this.look.muted;
    context.font = LANE_FONT;
    context.textAlign = "left";
    context.fillText(text, this.gutter + 8, this.yOf(0) + this.high / 2);
  }

  drawLanes(context) {
    context.font = LANE_FONT;
    context.textAlign = "left";
    this.lanes.forEach((lane, place) => {
      const y = this.yOf(place);
      context.fillStyle = this.look.panel;
      context.fillRect(this.gutter, y, this.width - this.gutter, this.high);
      context.fillStyle = this.look.text;
      context.fillText(laneLabel(lane, this.width), 0, y + this.high / 2);
    });
  }

  drawAxis(context, height, epochUs) {
    const { t0, t1 } = this.view;
    const step = tickStep(t1 - t0, this.width - this.gutter, t1 - t0 < 1e6 ? 130 : 90);
    context.font = "11px sans-serif";
    context.textAlign = "center";
    context.strokeStyle = this.look.line;
    context.lineWidth = 1;
    context.fillStyle = this.look.muted;
    const first = Math.ceil((epochUs + t0) / step) * step;
    for (let unixUs = first; unixUs <= epochUs + t1; unixUs += step) {
      const x = Math.round(this.xOf(unixUs - epochUs)) + 0.5;
      context.beginPath();
      context.moveTo(x, AXIS_PX - 4);
      context.lineTo(x, height);
      context.stroke();
      const text = tickText(unixUs, step);
      const half = text.length * 3.2;
      if (x - half >= this.gutter - 12 && x + half <= this.width) context.fillText(text, x, 9);
    }
  }

  // The one loop over all that is in sight, tens of thousands at times: nothing is looked up or made in it that need not be.
  drawSpans(context, held, y) {
    if (!held) return;
    const { t0, t1, cls, mb, end } = held;
    const { isShown, share, gutter, width } = this;
    const { t0: from, t1: to } = this.view;
    const scale = (width - gutter) / (to - from);
    let column = -1;
    for (let i = held.firstReaching(from); i < end && t0[i] < to; i++) {
      const kind = cls[i];
      if (!isShown[kind]) continue;
      const x0 = t0[i] > from ? gutter + (t0[i] - from) * scale : gutter;
      const wide = (t1[i] < to ? gutter + (t1[i] - from) * scale : width) - x0;
      const at = Math.floor(x0);
      if (column >= 0 && (at !== column || wide >= NARROW_PX)) column = this.flushColumn(context, column, y);
      if (wide >= NARROW_PX) {
        this.paint(context, kind, x0, wide, y);
        if (wide >= LETTER_FROM_PX && this.high >= 14) this.letter(context, kind, mb[i], x0, wide, t1[i] - t0[i], y);
      } else {
        column = at;
        share[kind] += wide + 1e-9;
      }
    }
    if (column >= 0) this.flushColumn(context, column, y);
  }

  flushColumn(context, column, y) {
    let most = 0;
    for (let kind = 1; kind < this.share.length; kind++) if (this.share[kind] > this.share[most]) most = kind;
    this.share.fill(0);
    context.fillStyle = this.colours[most];
    context.fillRect(column, y, 1, this.high);
    return -1;
  }

  paint(context, kind, x, width, y) {
    const isHatched = width >= HATCH_FROM_PX;
    context.fillStyle = isHatched ? this.fills[kind] : this.colours[kind];
    // Neighbours of one class stay two spans to the eye: a pixel of the lane shows between them.
    context.fillRect(x, y, width > 6 ? width - 1 : width, this.high);
    if (!isHatched || !classOf(CLASS_NAMES[kind]).outline) return;
    context.strokeStyle = OUTLINE;
    context.lineWidth = 1;
    context.strokeRect(x + 0.5, y + 0.5, width - 2, this.high - 1);
  }

  letter(context, kind, mb, x, width, us, y) {
    const { letter } = classOf(CLASS_NAMES[kind]);
    if (width < TEXT_FROM_PX) return this.label(context, kind, letter, "", x, width, y);
    const more = mb >= 0 ? `${letter} mb ${mb}` : letter;
    this.label(context, kind, `${more} ${durationText(us / 1e6)}`, letter, x, width, y);
  }

  // A text on a plain ground of the class's colour: a hatch behind letters makes them hard to read. `short`: if it is too long.
  label(context, kind, text, short, x, width, y) {
    const name = CLASS_NAMES[kind];
    context.font = LETTER_FONT;
    context.textAlign = "left";
    let long = context.measureText(text).width;
    if (long + 10 > width && short) {
      text = short;
      long = context.measureText(text).width;
    }
    const left = width < TEXT_FROM_PX ? x + (width - 1 - long) / 2 : x + 6;
    if (classOf(name).hatch !== "plain") {
      context.fillStyle = this.colours[kind];
      context.fillRect(left - 2, y + this.high / 2 - 8, long + 4, 16);
    }
    context.fillStyle = inkOf(name, this.look.isDark);
    context.fillText(text, left, y + this.high / 2 + 0.5);
  }

  drawOpen(context, live) {
    for (const open of live.open) {
      const place = this.lanes.findIndex((lane) => laneKey(lane) === open.key);
      const kind = CLASS_NAMES.indexOf(open.name);
      if (place < 0 || kind < 0 || !this.isShown[kind] || open.t0 >= this.view.t1 || live.until <= this.view.t0) continue;
      const x = Math.max(this.gutter, this.xOf(open.t0));
      const y = this.yOf(place);
      this.paint(context, kind, x, this.width - x, y);
      const { letter } = classOf(open.name);
      if (this.width - x >= LETTER_FROM_PX) this.label(context, kind, open.text, letter, x, this.width - x, y);
    }
  }

  drawGaps(context, gaps) {
    for (const gap of gaps) {
      const place = this.lanes.findIndex((lane) => laneKey(lane) === gap.key);
      if (place < 0 || gap.t1 < this.view.t0 || gap.t0 > this.view.t1) continue;
      const y = this.yOf(place);
      const x = Math.max(this.gutter, this.xOf(gap.t0));
      const width = Math.max(3, Math.min(this.width, this.xOf(gap.t1)) - x);
      context.globalAlpha = 0.4;
      context.fillStyle = fill(context, "contended", this.look.isDark);
      context.fillRect(x, y, width, this.high);
      context.globalAlpha = 1;
      context.font = LETTER_FONT;
      context.textAlign = "left";
      const text = context.measureText(gap.text).width + 16 <= width ? gap.text : "lost";
      const long = context.measureText(text).width + 8;
      if (long > width) continue;
      context.fillStyle = this.look.background;
      context.fillRect(x + 2, y + this.high - 15, long, 14);
      context.fillStyle = this.look.text;
      context.fillText(text, x + 6, y + this.high - 8);
    }
  }

  drawMark(context, span) {
    const place = this.lanes.findIndex((lane) => lane.rank === span.rank);
    if (place < 0 || span.t1 < this.view.t0 || span.t0 > this.view.t1) return;
    const x = Math.max(this.gutter, this.xOf(span.t0));
    const width = Math.max(3, Math.min(this.width, this.xOf(span.t1)) - x);
    context.lineWidth = 3;
    context.strokeStyle = this.look.background;
    context.strokeRect(x - 1.5, this.yOf(place) - 0.5, width + 2, this.high + 1);
    context.lineWidth = 2;
    context.strokeStyle = this.look.accent;
    context.strokeRect(x - 2, this.yOf(place) - 2, width + 3, this.high + 4);
  }
}
