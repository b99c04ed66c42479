// Spans as typed arrays, a lane a rank. All times are microseconds since one epoch of the page, so that a new base or a
// fetched window never moves what is on the screen.

const CLASS_NAMES = Object.keys(CLASSES);
const KEPT_US = 30e6;
const FIRST_CAPACITY = 1024;
const COLUMNS = { t0: Float64Array, t1: Float64Array, reach: Float64Array, cls: Uint8Array, step: Float64Array, mb: Int32Array, peer: Int32Array, merged: Int32Array };

const laneKey = (lane) => `${lane.stage}/${lane.rank}`;

// The spans of one rank by begin. They may nest (a pause inside a wait), so `reach` holds the latest end so far: it only
// grows, and can be searched.
class LaneSpans {
  constructor() {
    this.begin = 0;
    this.end = 0;
    this.capacity = FIRST_CAPACITY;
    for (const name in COLUMNS) this[name] = new COLUMNS[name](this.capacity);
  }

  get length() {
    return this.end - this.begin;
  }

  // Adds a span at its place: rows of a lane come in order but for a few.
  add(t0, t1, cls, step, mb, peer, merged) {
    if (this.end === this.capacity) this.makeRoom();
    let at = this.end++;
    while (at > this.begin && this.t0[at - 1] > t0) at -= 1;
    if (at < this.end - 1) for (const name in COLUMNS) this[name].copyWithin(at + 1, at, this.end - 1);
    this.t0[at] = t0;
    this.t1[at] = t1;
    this.cls[at] = cls;
    this.step[at] = step;
    this.mb[at] = mb;
    this.peer[at] = peer;
    this.merged[at] = merged;
    for (; at < this.end; at++) this.reach[at] = at > this.begin ? Math.max(this.reach[at - 1], this.t1[at]) : this.t1[at];
  }

  makeRoom() {
    const isHalfFree = this.begin > this.capacity / 2;
    if (!isHalfFree) this.capacity *= 2;
    for (const name in COLUMNS) {
      const held = this[name].subarray(this.begin, this.end);
      if (isHalfFree) this[name].set(held, 0);
      else (this[name] = new COLUMNS[name](this.capacity)).set(held, 0);
    }
    this.end -= this.begin;
    this.begin = 0;
  }

  dropBefore(us) {
    this.begin = this.firstReaching(us);
  }

  // The first span that ends after `us`; the end if there is none.
  firstReaching(us) {
    return this.search(this.reach, us);
  }

  // The first span that begins after `us`.
  firstAfter(us) {
    return this.search(this.t0, us);
  }

  search(column, us) {
    let low = this.begin;
    let high = this.end;
    while (low < high) {
      const middle = (low + high) >>> 1;
      if (column[middle] > us) high = middle;
      else low = middle + 1;
    }
    return low;
  }
}

// What one source gave: the stream, or a window that was fetched.
class SpanStore {
  constructor() {
    this.clear();
  }

  clear() {
    this.spans = new Map();
    this.lanes = [];
    this.open = [];
    this.gaps = [];
    this.from = Infinity; // complete from here
    this.until = -Infinity; // to here
    this.since = -Infinity; // the oldest that could be asked for
    this.isMerged = false;
    this.isGrowing = false;
  }

  get size() {
    let size = 0;
    for (const lane of this.spans.values()) size += lane.length;
    return size;
  }

  // Takes in one `insitu.spans/1` document.
  apply(event, epochNs, isTrimmed) {
    if (event.reset) this.clear();
    const shift = Number(BigInt(event.base) - epochNs) / 1e3;
    this.lanes = event.lanes;
    this.until = Math.max(this.until, event.until_us + shift);
    if (event.since) this.since = Number(BigInt(event.since) - epochNs) / 1e3;
    const kept = isTrimmed ? this.until - KEPT_US : -Infinity;
    this.addSpans(event, shift, kept);
    this.open = event.open.map((each) => ({ ...each, key: laneKey(event.lanes[each.lane]), t0: each.t0_us + shift, name: event.classes[each.cls] }));
    this.addGaps(event, shift, kept);
    if (isTrimmed) this.trim(kept);
  }

  addSpans(event, shift, kept) {
    const stores = event.lanes.map((lane) => this.laneOf(laneKey(lane)));
    const places = event.classes.map((name) => Math.max(0, CLASS_NAMES.indexOf(name in CLASSES ? name : "other")));
    for (let i = 0; i < event.t0_us.length; i++) {
      const t0 = event.t0_us[i] + shift;
      const t1 = t0 + event.us[i];
      if (t1 <= kept) continue;
      if (t0 < this.from) this.from = t0;
      const merged = event.merged[i];
      if (merged > 1) this.isMerged = true;
      stores[event.lane[i]].add(t0, t1, places[event.cls[i]], event.step[i], event.mb[i], event.peer[i], merged);
    }
  }

  // Every document holds all gaps that are known.
  addGaps({ gaps, lanes }, shift, kept) {
    const placed = gaps.map((gap) => ({ key: laneKey(lanes[gap.lane]), t0: gap.t0_us + shift, t1: gap.t1_us + shift, text: gap.text }));
    this.gaps = placed.filter((gap) => gap.t1 > kept);
  }

  trim(kept) {
    for (const lane of this.spans.values()) lane.dropBefore(kept);
    if (this.from < kept) this.from = kept;
  }

  laneOf(key) {
    let lane = this.spans.get(key);
    if (!lane) this.spans.set(key, (lane = new LaneSpans()));
    return lane;
  }

  // Whether all that exists between two times is held. After `until` there is nothing yet, if it goes on growing.
  covers(t0, t1) {
    return Math.max(t0, this.since) >= this.from && (this.isGrowing || t1 <= this.until);
  }

  newestEnd() {
    let end = -Infinity;
    for (const lane of this.spans.values()) if (lane.length) end = Math.max(end, lane.reach[lane.end - 1]);
    return end;
  }

  // The span at a place of a lane as a plain object: places move, a copy does not.
  spanAt(lane, index) {
    const held = this.spans.get(laneKey(lane));
    const { t0, t1, cls, step, mb, peer, merged } = held;
    return {
      stage: lane.stage, rank: lane.rank, t0: t0[index], t1: t1[index], cls: CLASS_NAMES[cls[index]],
      step: step[index], mb: mb[index], peer: peer[index], merged: merged[index],
    };
  }

  // The span of a rank that begins at `t0` (within a microsecond), of a class if one is named.
  spanBeginning(rank, t0, cls) {
    const lane = this.lanes.find((each) => each.rank === rank);
    const held = lane && this.spans.get(laneKey(lane));
    if (!held) return null;
    for (let i = held.firstAfter(t0 - 1); i < held.end && held.t0[i] <= t0 + 1; i++) {
      if (!cls || CLASS_NAMES[held.cls[i]] === cls) return this.spanAt(lane, i);
    }
    return null;
  }

  // The span shown at a time of a lane, or the nearest within `tolerance` microseconds; the innermost of nested ones.
  spanNear(lane, us, tolerance, isShown) {
    const held = this.spans.get(laneKey(lane));
    let found = -1;
    let best = tolerance;
    const begin = held ? held.firstReaching(us - tolerance) : 0;
    for (let i = begin; held && i < held.end && held.t0[i] < us + tolerance; i++) {
      if (!isShown[held.cls[i]]) continue;
      const distance = Math.max(held.t0[i] - us, us - held.t1[i], 0);
      if (distance > best || (distance === best && distance > 0)) continue;
      best = distance;
      found = i;
    }
    return found < 0 ? null : this.spanAt(lane, found);
  }

  // The next span of a lane (towards = 1) or the one before (-1).
  neighbour(lane, span, towards, isShown) {
    const held = this.spans.get(laneKey(lane));
    if (!held) return null;
    let at = towards > 0 ? held.firstAfter(span.t0) : held.firstAfter(span.t0 - 1e-3) - 1;
    while (at >= held.begin && at < held.end && !isShown[held.cls[at]]) at += towards;
    return at >= held.begin && at < held.end ? this.spanAt(lane, at) : null;
  }
}
