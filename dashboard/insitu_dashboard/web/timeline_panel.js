// The timeline with what a viewer can do to it: zoom, pan, choose a span, read its card. Knows spans and a window, no server.

const OLD_AFTER_MS = 3000;

class TimelinePanel {
  // on: view(), selected(), live(), change(isAsked): the page's answers to what the viewer did.
  constructor(node, on) {
    this.on = on;
    this.epochNs = null;
    this.store = new SpanStore();
    this.viewport = new Viewport();
    this.fetched = new WindowFetch(() => on.change(true));
    this.spansUrl = "";
    this.isPaused = false;
    this.isOver = false; // nothing more will come: the run has ended, or its record has
    this.selected = null; // its card is open
    this.cursor = null; // where the keys are
    this.spansAt = performance.now();
    this.build(node);
  }

  build(node) {
    const head = element("div", "insitu-head");
    this.said = element("span", "insitu-muted insitu-caption");
    const button = (text, name, action) => {
      const made = element("button", "", text);
      made.type = "button";
      made.setAttribute("aria-label", name);
      made.addEventListener("click", action);
      return made;
    };
    this.liveButton = button("▶ Follow live", "Follow live", () => this.on.live());
    const buttons = element("span", "insitu-buttons");
    buttons.append(
      button("+", "Zoom in", () => this.zoom(1 / KEY_ZOOM, null)),
      button("−", "Zoom out", () => this.zoom(KEY_ZOOM, null)),
      this.liveButton,
    );
    head.append(element("h3", "", "Timeline"), this.said, buttons);
    const canvas = (this.canvas = element("canvas", "insitu-chart insitu-spans"));
    canvas.tabIndex = 0;
    canvas.setAttribute("role", "application");
    canvas.setAttribute("aria-roledescription", "timeline");
    canvas.setAttribute("aria-label", "Timeline: no span yet.");
    this.status = element("p", "insitu-hidden");
    this.status.setAttribute("aria-live", "polite");
    node.append(head, canvas, this.status);
    this.card = createSpanCard(node, () => this.select(null));
    this.timeline = new Timeline(canvas);
    listenToTimeline(canvas, {
      zoom: (factor, x) => this.zoom(factor, x),
      pan: (pixels) => this.pan(pixels),
      select: (x, y) => this.select(this.spanUnder(x, y)),
      live: () => this.on.live(),
      step: (towards) => this.stepTo(towards),
      lane: (towards) => this.laneTo(towards),
      open: () => this.select(this.cursor),
      close: () => this.select(null),
    });
    node.addEventListener("keydown", (event) => event.key === "Escape" && this.select(null));
  }

  // -- what is known ---------------------------------------------------------------------------------------------------

  takeSpans(spans) {
    this.epochNs ??= BigInt(spans.base);
    this.store.apply(spans, this.epochNs, !this.isPaused);
    this.store.isGrowing = !this.isPaused;
    if (this.isPaused) this.store.until = Math.min(this.store.until, this.store.newestEnd());
    this.spansAt = performance.now();
  }

  restoreView(view) {
    if (!view) return this.viewport.follow();
    this.epochNs ??= BigInt(view.t0);
    this.viewport.freeze(usOf(view.t0, this.epochNs), usOf(view.t1, this.epochNs), NaN, NaN);
  }

  // A span chosen by an address: known by its begin until its row is here.
  restoreSelected(said) {
    if (said) this.epochNs ??= BigInt(said.t0);
    this.selected = said && { ...said, t0: usOf(said.t0, this.epochNs), t1: NaN, stage: "…", mb: -1, peer: -1, merged: 1 };
  }

  complete(store) {
    if (!this.selected || Number.isFinite(this.selected.t1)) return;
    const found = store.spanBeginning(this.selected.rank, this.selected.t0, this.selected.cls);
    if (found) this.selected = this.cursor = found;
  }

  // Stops where it is. Returns whether there is anything to stop at.
  freeze() {
    const view = this.view();
    if (view.isKnown && this.viewport.isLive) this.viewport.freeze(view.t0, view.t1, NaN, NaN);
    return view.isKnown;
  }

  follow() {
    this.viewport.follow();
    this.fetched.stop();
  }

  view() {
    return this.viewport.shown(this.store.until);
  }

  // What a page's address and Python hold of it: nanoseconds as text.
  viewSaid() {
    const { frozen } = this.viewport;
    return frozen && { t0: String(nsOf(frozen[0], this.epochNs)), t1: String(nsOf(frozen[1], this.epochNs)) };
  }

  selectedSaid() {
    const span = this.selected;
    return span && { rank: span.rank, step: span.step, cls: span.cls, t0: String(nsOf(span.t0, this.epochNs)) };
  }

  // The window in Unix seconds while it stands still.
  windowUnix() {
    const { frozen } = this.viewport;
    return frozen && frozen.map((us) => (us + this.epochUs()) / 1e6);
  }

  epochUs() {
    return this.epochNs === null ? 0 : Number(this.epochNs / 1000n);
  }

  plotWidth() {
    return Math.max(1, this.timeline.width - this.timeline.gutter);
  }

  // The store to draw from: the stream's, unless only a fetched window holds what is shown in full detail.
  shownStore() {
    const view = this.view();
    if (this.viewport.isLive) return this.store;
    if (this.store.covers(view.t0, view.t1) && !this.store.isMerged) return this.store;
    if (this.fetched.holds(view, this.plotWidth())) return this.fetched.store;
    if (this.epochNs !== null && this.spansUrl) this.fetched.need(view, this.plotWidth(), this.epochNs, this.spansUrl);
    return this.fetched.overlaps(view) ? this.fetched.store : this.store;
  }

  // -- what the viewer does --------------------------------------------------------------------------------------------

  moveTo(t0, t1) {
    if (this.epochNs === null) return;
    this.viewport.freeze(t0, t1, this.store.since, this.store.until);
    this.on.view();
    this.on.change(true);
  }

  moveToUnix(t0S, t1S) {
    this.moveTo(t0S * 1e6 - this.epochUs(), t1S * 1e6 - this.epochUs());
  }

  zoom(factor, x) {
    const view = this.view();
    if (!view.isKnown) return;
    const at = x === null ? (view.t0 + view.t1) / 2 : Math.max(view.t0, this.timeline.usOf(x));
    const wide = Math.max(NARROWEST_US, Math.min(WIDEST_US, (view.t1 - view.t0) * factor));
    const part = (at - view.t0) / (view.t1 - view.t0);
    this.moveTo(at - part * wide, at + (1 - part) * wide);
  }

  pan(pixels) {
    const view = this.view();
    if (!view.isKnown) return;
    const us = (pixels * (view.t1 - view.t0)) / this.plotWidth();
    this.moveTo(view.t0 + us, view.t1 + us);
  }

  spanUnder(x, y) {
    const view = this.view();
    const lane = this.timeline.laneAt(y);
    if (!view.isKnown || !lane || x < this.timeline.gutter) return null;
    const near = (4 * (view.t1 - view.t0)) / this.plotWidth();
    return this.shownStore().spanNear(lane, this.timeline.usOf(x), near, this.timeline.isShown);
  }

  select(span) {
    this.selected = span;
    if (span) this.cursor = span;
    this.on.selected();
    this.on.change(true);
  }

  stepTo(towards) {
    if (!this.cursor) return this.laneTo(0);
    const lane = this.timeline.lanes.find((each) => each.rank === this.cursor.rank);
    const next = lane && this.shownStore().neighbour(lane, this.cursor, towards, this.timeline.isShown);
    if (next) this.pointAt(next);
  }

  laneTo(towards) {
    const view = this.view();
    const { lanes, isShown } = this.timeline;
    if (!view.isKnown || !lanes.length) return;
    const now = lanes.findIndex((lane) => this.cursor && lane.rank === this.cursor.rank);
    const lane = lanes[Math.max(0, Math.min(lanes.length - 1, now + (now < 0 ? 1 : towards)))];
    const at = this.cursor ? Math.max(view.t0, Math.min(view.t1, this.cursor.t0)) : (view.t0 + view.t1) / 2;
    const span = this.shownStore().spanNear(lane, at, view.t1 - view.t0, isShown);
    if (span) this.pointAt(span);
  }

  // Moves the cursor. The window stands still from then on, and follows only the cursor.
  pointAt(span) {
    const view = this.view();
    const half = (view.t1 - view.t0) / 2;
    const isInside = span.t0 >= view.t0 && span.t0 < view.t1;
    this.cursor = span;
    this.status.textContent = spanText(span);
    if (this.selected) this.select(span);
    this.moveTo(isInside ? view.t0 : span.t0 - half, isInside ? view.t1 : span.t0 + half);
  }

  // -- drawing ---------------------------------------------------------------------------------------------------------

  draw(lanes) {
    const store = this.shownStore();
    this.complete(store);
    const marked = [this.cursor, this.selected].filter((span) => span && Number.isFinite(span.t1));
    this.timeline.draw(store, this.store, this.view(), lanes, this.epochUs(), marked);
    this.card.show(this.selected, this.epochUs());
    this.caption();
  }

  describe(lanes, shares) {
    const most = lanes.map((lane, place) => `rank ${lane.rank} ${sharesText(shares[place]).split(", ")[0]}`).join(", ");
    const keys = "Left and right move between spans, up and down between ranks, Enter opens a span, plus and minus zoom.";
    this.canvas.setAttribute("aria-label", `Timeline of ${lanes.length} ranks, most time: ${most || "no data"}. ${keys}`);
  }

  caption() {
    const view = this.view();
    const { isLive } = this.viewport;
    this.liveButton.disabled = isLive && !this.isPaused;
    if (!view.isKnown) return setText(this.said, "no span yet");
    if (!isLive && this.fetched.problem) return setText(this.said, this.fetched.problem);
    if (!isLive && view.t1 < this.store.since) {
      const since = clockText((this.epochUs() + this.store.since) / 1e3);
      return setText(this.said, `This window is older than what is still held (since ${since}): follow live.`);
    }
    const silence = performance.now() - this.spansAt;
    const old = silence > OLD_AFTER_MS && !this.isPaused && !this.isOver ? ` · nothing new for ${Math.round(silence / 1000)} s` : "";
    const state = this.isPaused ? "paused" : !isLive ? "standing still" : this.isOver ? "the end" : "live";
    const end = clockText((this.epochUs() + view.t1) / 1e3);
    setText(this.said, `${state}: ${durationText((view.t1 - view.t0) / 1e6)} up to ${end}${old}`);
  }
}
