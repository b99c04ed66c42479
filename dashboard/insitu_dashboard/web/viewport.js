// Which stretch of time is on the screen: the newest (live), or a window that stands still until it is let go.

const LIVE_MOST_US = 30e6;
const NARROWEST_US = 20;
const WIDEST_US = 3600e6;

class Viewport {
  constructor() {
    this.frozen = null; // [t0, t1] in microseconds since the page's epoch
    this.liveUs = 10e6;
  }

  get isLive() {
    return this.frozen === null;
  }

  // What to draw, given the newest time that is complete.
  shown(untilUs) {
    if (this.frozen) return { t0: this.frozen[0], t1: this.frozen[1], isKnown: true };
    return { t0: untilUs - this.liveUs, t1: untilUs, isKnown: Number.isFinite(untilUs) };
  }

  follow() {
    this.frozen = null;
  }

  // Keeps the width within what makes sense, and some part of the record in sight.
  freeze(t0, t1, sinceUs, untilUs) {
    const middle = (t0 + t1) / 2;
    const half = Math.max(NARROWEST_US, Math.min(WIDEST_US, t1 - t0)) / 2;
    let shift = 0;
    if (Number.isFinite(untilUs) && middle > untilUs) shift = untilUs - middle;
    if (Number.isFinite(sinceUs) && middle < sinceUs) shift = sinceUs - middle;
    this.frozen = [middle - half + shift, middle + half + shift];
  }
}

// A window wider than the screen is asked for, so that a small pan needs nothing; this long after the last move.
const FETCH_PAUSE_MS = 250;
const MARGIN = 0.5;
const FINER_BY = 2;

// Holds one fetched window. need(view, ...) fetches what the stream's store does not hold.
class WindowFetch {
  constructor(onDone) {
    this.store = new SpanStore();
    this.problem = "";
    this.usPerPixel = Infinity;
    this.onDone = onDone;
    this.timer = null;
    this.abort = null;
    this.wanted = "";
  }

  holds(view, pixels) {
    if (!this.store.covers(view.t0, view.t1)) return false;
    return !this.store.isMerged || (view.t1 - view.t0) / pixels > this.usPerPixel / FINER_BY;
  }

  overlaps(view) {
    return this.store.from < view.t1 && this.store.until > view.t0;
  }

  need(view, pixels, epochNs, url) {
    const key = `${url} ${Math.round(view.t0)} ${Math.round(view.t1)} ${Math.round(pixels)}`;
    if (key === this.wanted) return;
    this.wanted = key;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.fetch({ ...view }, pixels, epochNs, url), FETCH_PAUSE_MS);
  }

  async fetch(view, pixels, epochNs, url) {
    if (this.abort) this.abort.abort();
    const abort = (this.abort = new AbortController());
    const margin = Math.min((view.t1 - view.t0) * MARGIN, (WIDEST_US - (view.t1 - view.t0)) / 2);
    const t0 = view.t0 - margin;
    const t1 = view.t1 + margin;
    const columns = Math.round((pixels * (t1 - t0)) / (view.t1 - view.t0));
    const query = `t0=${nsOf(t0, epochNs)}&t1=${nsOf(t1, epochNs)}&px=${columns}`;
    try {
      const answer = await fetch(`${url}${url.includes("?") ? "&" : "?"}${query}`, { signal: abort.signal });
      if (!answer.ok) throw new Error(`${answer.status} ${(await answer.text()).slice(0, 120)}`);
      const store = new SpanStore();
      store.apply(await answer.json(), epochNs, false);
      store.from = t0;
      store.until = t1;
      this.store = store;
      this.usPerPixel = (t1 - t0) / columns;
      this.problem = "";
    } catch (error) {
      if (error.name === "AbortError") return;
      this.problem = `This window could not be loaded (${error.message}). Zoom or pan to try again, or follow live.`;
    }
    this.onDone();
  }

  stop() {
    clearTimeout(this.timer);
    if (this.abort) this.abort.abort();
    this.wanted = "";
  }
}

function nsOf(us, epochNs) {
  return epochNs + BigInt(Math.round(us * 1e3));
}

function usOf(ns, epochNs) {
  return Number(BigInt(ns) - epochNs) / 1e3;
}
