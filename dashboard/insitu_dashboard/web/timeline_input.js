// Wheel, drag, click and keys over a canvas of the timeline, as intentions; what they do is the page's business.

const DRAG_FROM_PX = 4;
const WHEEL_RATE = 0.0015;
const KEY_ZOOM = 1.6;
const KEYS = {
  ArrowLeft: ["step", -1],
  ArrowRight: ["step", 1],
  ArrowUp: ["lane", -1],
  ArrowDown: ["lane", 1],
  "+": ["zoom", 1 / KEY_ZOOM],
  "=": ["zoom", 1 / KEY_ZOOM],
  "-": ["zoom", KEY_ZOOM],
  Enter: ["open"],
  Escape: ["close"],
};

// follow(canvas, {onDrag(fromX, x), onDragEnd(fromX, x), onClick(x, y)}): one pointer from press to release.
function follow(canvas, { onDrag, onDragEnd, onClick }) {
  let from = null;
  let last = 0;
  let isDrag = false;
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return { x: event.clientX - box.left, y: event.clientY - box.top };
  };
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    from = place(event);
    last = from.x;
    isDrag = false;
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!from) return;
    const { x } = place(event);
    if (!isDrag && Math.abs(x - from.x) < DRAG_FROM_PX) return;
    isDrag = true;
    onDrag(from.x, x, x - last);
    last = x;
  });
  canvas.addEventListener("pointerup", (event) => {
    if (!from) return;
    const { x, y } = place(event);
    if (isDrag) onDragEnd(from.x, x);
    else onClick(x, y);
    from = null;
  });
  canvas.addEventListener("pointercancel", () => {
    if (from && isDrag) onDragEnd(from.x, last);
    from = null;
  });
}

// handlers: zoom(factor, x or null), pan(pixels), select(x, y), live(), step(-1 | 1), lane(-1 | 1), open(), close().
function listenToTimeline(canvas, handlers) {
  follow(canvas, {
    onDrag: (from, x, moved) => handlers.pan(-moved),
    onDragEnd: () => {},
    onClick: handlers.select,
  });
  canvas.addEventListener("dblclick", handlers.live);
  canvas.addEventListener(
    "wheel",
    (event) => {
      event.preventDefault();
      const rows = event.deltaMode === 1 ? 16 : 1;
      if (Math.abs(event.deltaX) > Math.abs(event.deltaY)) return handlers.pan(event.deltaX * rows);
      const x = event.clientX - canvas.getBoundingClientRect().left;
      handlers.zoom(Math.exp(Math.max(-400, Math.min(400, event.deltaY * rows)) * WHEEL_RATE), x);
    },
    { passive: false },
  );
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !KEYS[event.key]) return;
    event.preventDefault();
    const [name, value] = KEYS[event.key];
    handlers[name](value, null);
  });
}
