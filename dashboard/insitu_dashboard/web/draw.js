// How classes, numbers and times look; what every canvas of the pages shares.

// ink: of a letter on the colour. outline: the contrast of the colour to a white page is below 3:1.
const CLASSES = {
  compute: { letter: "C", label: "compute", colour: "#0072B2", hatch: "plain", ink: "#FFFFFF" },
  host: { letter: "H", label: "host", colour: "#CC79A7", hatch: "plain", ink: "#000000" },
  gc: { letter: "G", label: "gc", colour: "#CC79A7", hatch: "cross", ink: "#000000" },
  compile: { letter: "K", label: "compile", colour: "#CC79A7", hatch: "dots", ink: "#000000" },
  collective: { letter: "L", label: "collective", colour: "#CC79A7", hatch: "lines", ink: "#000000" },
  wait_upstream: { letter: "U", label: "waits upstream", colour: "#E69F00", hatch: "up", ink: "#000000", outline: true },
  wait_downstream: { letter: "D", label: "waits downstream", colour: "#9C2F00", hatch: "down", ink: "#FFFFFF" },
  transfer: { letter: "T", label: "transfer", colour: "#56B4E9", hatch: "dots", ink: "#000000", outline: true },
  no_demand: { letter: "-", label: "no demand", colour: "#DDDDDD", dark: "#333333", hatch: "plain", ink: "#000000", darkInk: "#FFFFFF" },
  contended: { letter: "X", label: "contended", colour: "#6B6B6B", hatch: "cross", ink: "#FFFFFF" },
  unrecorded: { letter: "?", label: "unrecorded", colour: "#6B6B6B", hatch: "dots", ink: "#FFFFFF" },
  other: { letter: "o", label: "other", colour: "#6B6B6B", hatch: "plain", ink: "#FFFFFF" },
};

const OUTLINE = "#3A2A00";
const HATCH_PX = 8;
const patterns = new Map();

function classOf(cls) {
  return CLASSES[cls] || CLASSES.other;
}

function classColour(cls, isDark) {
  const look = classOf(cls);
  return isDark && look.dark ? look.dark : look.colour;
}

function inkOf(cls, isDark) {
  const look = classOf(cls);
  return isDark && look.darkInk ? look.darkInk : look.ink;
}

// Draws one hatch over a tile so that it repeats without a seam.
function hatch(context, kind, size) {
  const line = (x0, y0, x1, y1) => {
    context.moveTo(x0, y0);
    context.lineTo(x1, y1);
  };
  context.beginPath();
  for (const shift of kind === "lines" || kind === "dots" ? [] : [-size, 0, size]) {
    if (kind === "up" || kind === "cross") line(shift, size, shift + size, 0);
    if (kind === "down" || kind === "cross") line(shift, 0, shift + size, size);
  }
  if (kind === "lines") line(0, size / 2, size, size / 2);
  context.stroke();
  if (kind !== "dots") return;
  for (const [x, y] of [[0.25, 0.25], [0.75, 0.75]]) {
    context.beginPath();
    context.arc(x * size, y * size, 1.1, 0, 2 * Math.PI);
    context.fill();
  }
}

// fill(context, cls, isDark) -> fillStyle: the class's colour with its hatch; made once.
function fill(context, cls, isDark) {
  const key = isDark ? `${cls} dark` : cls;
  let style = patterns.get(key);
  if (style) return style;
  const look = classOf(cls);
  const colour = classColour(cls, isDark);
  if (look.hatch === "plain") {
    style = colour;
  } else {
    const tile = document.createElement("canvas");
    tile.width = tile.height = HATCH_PX;
    const inner = tile.getContext("2d");
    inner.fillStyle = colour;
    inner.fillRect(0, 0, HATCH_PX, HATCH_PX);
    inner.strokeStyle = inner.fillStyle = look.ink === "#FFFFFF" ? "rgba(255,255,255,0.45)" : "rgba(0,0,0,0.45)";
    inner.lineWidth = 1;
    hatch(inner, look.hatch, HATCH_PX);
    style = context.createPattern(tile, "repeat");
  }
  patterns.set(key, style);
  return style;
}

// swatch(cls, isDark) -> a small canvas of a class's colour, hatch and letter, for a legend; hidden from screen readers.
function swatch(cls, isDark) {
  const canvas = element("canvas", "insitu-swatch");
  canvas.setAttribute("aria-hidden", "true");
  const ratio = window.devicePixelRatio || 1;
  canvas.width = canvas.height = Math.round(16 * ratio);
  canvas.style.width = canvas.style.height = "16px";
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  context.fillStyle = fill(context, cls, isDark);
  context.fillRect(0, 0, 16, 16);
  if (classOf(cls).outline) {
    context.strokeStyle = OUTLINE;
    context.strokeRect(0.5, 0.5, 15, 15);
  }
  context.fillStyle = classColour(cls, isDark);
  context.fillRect(3, 2, 10, 12);
  context.fillStyle = inkOf(cls, isDark);
  context.font = "bold 11px sans-serif";
  context.textAlign = "center";
  context.textBaseline = "middle";
  context.fillText(classOf(cls).letter, 8, 8.5);
  return canvas;
}

// theme(element) -> {text, muted, background, line, isDark} from the variables Streamlit gives a component.
function theme(node) {
  const style = getComputedStyle(node);
  const read = (name, other) => style.getPropertyValue(name).trim() || other;
  const background = read("--st-background-color", "#FFFFFF");
  const isDark = luminance(background) < 0.4;
  return {
    background,
    isDark,
    text: read("--st-text-color", isDark ? "#FAFAFA" : "#31333F"),
    muted: isDark ? "#B3B8C2" : "#5A6070",
    line: isDark ? "#41444C" : "#D5D6D8",
    panel: read("--st-secondary-background-color", isDark ? "#262730" : "#F0F2F6"),
    accent: isDark ? "#FFFFFF" : "#000000",
  };
}

let colourReader = null;

function luminance(colour) {
  if (!colourReader) colourReader = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  colourReader.fillStyle = "#FFFFFF";
  colourReader.fillRect(0, 0, 1, 1);
  colourReader.fillStyle = colour;
  colourReader.fillRect(0, 0, 1, 1);
  const [red, green, blue] = colourReader.getImageData(0, 0, 1, 1).data;
  return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255;
}

// fit(canvas, cssHeight) -> {context, width, height} in CSS pixels. Setting a size wipes a canvas, so only when it changed.
function fit(canvas, cssHeight) {
  const ratio = window.devicePixelRatio || 1;
  const width = Math.max(1, canvas.clientWidth || (canvas.parentElement && canvas.parentElement.clientWidth) || 300);
  const wide = Math.round(width * ratio);
  const high = Math.round(cssHeight * ratio);
  if (canvas.width !== wide) canvas.width = wide;
  if (canvas.height !== high) canvas.height = high;
  const asStyle = `${cssHeight}px`;
  if (canvas.style.height !== asStyle) canvas.style.height = asStyle;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return { context, width, height: cssHeight };
}

const UNITS = [[1, "s"], [1e-3, "ms"], [1e-6, "µs"]];

// durationText(seconds) -> three significant digits and a unit: "12.4 s", "3.21 ms", "80 µs".
function durationText(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  for (const [scale, unit] of UNITS) {
    const value = seconds / scale;
    if (Math.abs(value) < 1) continue;
    return `${Math.abs(value) >= 1000 ? Math.round(value) : Number(value.toPrecision(3))} ${unit}`;
  }
  return `${Math.round(seconds * 1e9)} ns`;
}

// clockText(unixMs) -> "10:31:07" in the viewer's zone.
function clockText(unixMs) {
  const at = new Date(unixMs);
  return [at.getHours(), at.getMinutes(), at.getSeconds()].map((part) => String(part).padStart(2, "0")).join(":");
}

// element(tag, className, text): text is always text. Names come from users and are never markup.
function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined && text !== null) node.textContent = String(text);
  return node;
}
