// The Pipeline page: who waits for whom, a rank a lane; the heat map and the breakdown under it.

const REPORT_PAUSE_MS = 400;
const ECHO_MS = 5000; // so long may Python's answer still speak of before
const SLOW_DRAW_MS = 1000; // for people who asked for less motion

export default function (component) {
  const { parentElement } = component;
  let page = parentElement.insituPage;
  if (!page) page = parentElement.insituPage = new PipelinePage(parentElement);
  const call = page.update(component);
  // Streamlit may run an older call's clean-up after a newer call: only the newest one ends the page.
  return () => page.calls === call && page.close();
}

class PipelinePage {
  constructor(parent) {
    this.parent = parent;
    this.calls = 0;
    this.numTicks = 0;
    this.picture = null;
    this.stream = this.streamUrl = null;
    this.given = {}; // what Python said or was told last, as text: an echo of that is no news
    this.awaited = {}; // until when an answer that differs is taken to be an old one
    this.reporting = {};
    this.unsaid = new Map();
    this.saying = null;
    this.drawnAt = 0;
    this.frame = 0;
    this.slow = matchMedia("(prefers-reduced-motion: reduce)");
    this.build();
  }

  build() {
    const root = (this.root = element("div", "insitu-root insitu-pipeline"));
    this.strip = createStrip(root, { onPause: (wanted) => this.pause(wanted) });
    const section = (className, title) => {
      const node = element("section", className);
      node.setAttribute("aria-label", title);
      root.append(node);
      return node;
    };
    const panel = (this.panel = new TimelinePanel(section("insitu-timeline", "Timeline"), {
      view: () => this.report("view", () => panel.viewSaid()),
      selected: () => this.report("selected", () => panel.selectedSaid()),
      live: () => this.followLive(),
      change: (isAsked) => this.drawSoon(isAsked),
    }));
    this.heat = createHeat(section("insitu-heat-part", "Heat map"), { onBrush: (t0S, t1S) => panel.moveToUnix(t0S, t1S) });
    this.breakdown = createBreakdown(section("insitu-breakdown", "Breakdown"));
    this.parent.append(root);
    this.resized = new ResizeObserver(() => this.drawSoon(true));
    this.resized.observe(panel.canvas);
    this.clock = setInterval(() => panel.caption(), 1000);
  }

  // -- what Python says ------------------------------------------------------------------------------------------------

  update(component) {
    const { data } = component;
    const { panel } = this;
    this.component = component;
    this.data = data;
    if (this.isNews("paused", Boolean(data.paused))) panel.isPaused = Boolean(data.paused);
    panel.spansUrl = data.spans_url;
    panel.viewport.liveUs = Math.min(LIVE_MOST_US, data.window_s * 1e6);
    this.strip.paused(panel.isPaused);
    this.connect(data.stream);
    if (data.picture && (!this.stream || !this.picture)) this.takePicture(data.picture);
    if (data.spans && (!this.stream || !panel.store.lanes.length)) this.takeSpans(data.spans);
    if (this.isNews("view", data.view) && (data.view || !panel.isPaused)) panel.restoreView(data.view);
    if (panel.isPaused) panel.freeze();
    if (this.isNews("selected", data.selected)) panel.restoreSelected(data.selected);
    this.look = theme(this.root);
    panel.timeline.useTheme(this.look);
    this.drawSoon(true);
    this.heard();
    this.calls += 1;
    return this.calls;
  }

  connect(url) {
    if (url === this.streamUrl) return;
    if (this.stream) this.stream.close();
    if (url && this.streamUrl) this.panel.store.clear(); // another run
    this.streamUrl = url;
    this.stream = url
      ? openStream(url, {
          onPicture: (picture) => this.takePicture(picture),
          onSpans: (spans) => this.takeSpans(spans),
          onState: (state) => this.told(state),
        })
      : null;
    if (!url) this.strip.connection("open");
  }

  told(state) {
    this.strip.connection(state);
    if (state === "failed") this.component.setTriggerValue("fallback", true);
  }

  // Whether Python says something that the page does not know and that it was not just told otherwise.
  isNews(name, value) {
    const text = JSON.stringify(value ?? null);
    if (this.given[name] === text) {
      delete this.awaited[name];
      return false;
    }
    if (performance.now() < this.awaited[name]) return false;
    this.given[name] = text;
    return true;
  }

  tell(name, value, said = value) {
    const text = JSON.stringify(value ?? null);
    if (this.given[name] === text) return;
    this.given[name] = text;
    this.awaited[name] = performance.now() + ECHO_MS;
    this.unsaid.set(name, said);
    this.sayNext();
  }

  // One thing at a time: what is said brings the page's address back with it, and the next must go out with that one.
  sayNext() {
    if (this.saying || !this.unsaid.size) return;
    const [[name, said]] = this.unsaid;
    this.unsaid.delete(name);
    this.saying = setTimeout(() => this.heard(), ECHO_MS);
    this.component.setStateValue(name, said);
  }

  heard() {
    clearTimeout(this.saying);
    this.saying = null;
    this.sayNext();
  }

  // -- what the server sends -------------------------------------------------------------------------------------------

  takePicture(picture) {
    this.picture = picture;
    this.panel.isOver = ["ended", "stale"].includes(picture.header.state);
    this.strip.show(picture.header, picture.notice, performance.now());
    this.count();
  }

  takeSpans(spans) {
    this.panel.takeSpans(spans);
    this.count();
  }

  count() {
    this.numTicks += 1;
    this.root.dataset.ticks = String(this.numTicks);
    this.root.dataset.spans = String(this.panel.store.size);
    this.drawSoon(false);
  }

  // -- what the viewer does --------------------------------------------------------------------------------------------

  // Tells Python once the viewer's hand rests.
  report(name, value) {
    clearTimeout(this.reporting[name]);
    this.awaited[name] = performance.now() + REPORT_PAUSE_MS + ECHO_MS;
    this.reporting[name] = setTimeout(() => this.tell(name, value()), REPORT_PAUSE_MS);
  }

  followLive() {
    this.panel.isPaused = false;
    this.strip.paused(false);
    this.panel.follow();
    this.sayWhere(null);
    this.drawSoon(true);
  }

  pause(wanted) {
    if (!wanted) return this.followLive();
    if (!this.panel.freeze()) return;
    this.panel.isPaused = true;
    this.strip.paused(true);
    this.sayWhere({ t1: this.panel.viewSaid().t1 });
  }

  sayWhere(paused) {
    clearTimeout(this.reporting.view);
    this.tell("view", this.panel.viewSaid());
    this.tell("paused", paused !== null, paused);
  }

  // -- drawing ---------------------------------------------------------------------------------------------------------

  // One drawing a frame at most, and none while nothing changed.
  drawSoon(isAsked) {
    if (this.frame || this.isClosed) return;
    const wait = this.slow.matches && !isAsked ? this.drawnAt + SLOW_DRAW_MS - performance.now() : 0;
    if (wait > 0) {
      this.later ??= setTimeout(() => {
        this.later = null;
        this.drawSoon(true);
      }, wait);
      return;
    }
    this.frame = requestAnimationFrame(() => {
      this.frame = 0;
      this.drawnAt = performance.now();
      this.draw();
    });
  }

  lanes() {
    const { stages, ranks } = this.data.filter || {};
    const { lanes } = this.panel.store;
    const known = lanes.length ? lanes : this.picture ? this.picture.grid : [];
    return known.filter((lane) => (!stages || stages.includes(lane.stage)) && (!ranks || ranks.includes(lane.rank)));
  }

  draw() {
    const { panel } = this;
    const { classes } = this.data.filter || {};
    panel.timeline.isShown = CLASS_NAMES.map((name) => !classes || classes.includes(name));
    const lanes = this.lanes();
    panel.draw(lanes);
    const said = panel.viewSaid();
    this.root.dataset.view = said ? `${said.t0}-${said.t1}` : "live";
    if (this.picture) this.drawPicture(lanes, panel.windowUnix());
  }

  drawPicture(lanes, window) {
    const key = JSON.stringify([this.picture.unix_ns, lanes, window, this.panel.canvas.clientWidth, this.look]);
    if (key === this.pictureDrawn) return;
    this.pictureDrawn = key;
    this.heat.show(this.picture, this.look, lanes, window);
    this.panel.describe(lanes, this.breakdown.show(this.picture, this.look, lanes, window));
  }

  close() {
    this.isClosed = true;
    if (this.stream) this.stream.close();
    this.panel.fetched.stop();
    clearInterval(this.clock);
    clearTimeout(this.later);
    clearTimeout(this.saying);
    Object.values(this.reporting).forEach(clearTimeout);
    cancelAnimationFrame(this.frame);
    this.resized.disconnect();
    this.strip.close();
    this.root.remove();
    delete this.parent.insituPage;
  }
}
