// The card of one span: its facts as text. Announced by screen readers when it opens.

const WAITS = ["wait_upstream", "wait_downstream", "collective", "transfer", "no_demand"];

function utcText(unixUs) {
  const whole = new Date(Math.floor(unixUs / 1e3)).toISOString().slice(0, 19);
  return `${whole.replace("T", " ")}.${String(Math.floor(unixUs % 1e6)).padStart(6, "0")} UTC`;
}

function peerText(span) {
  if (!WAITS.includes(span.cls)) return "";
  return span.peer >= 0 ? `rank ${span.peer}` : "the driver";
}

// One line that says all of a span: for screen readers, and as a canvas's status.
function spanText(span) {
  const peer = peerText(span);
  const wait = peer ? ` for ${peer}` : "";
  const step = span.step >= 0 ? `, step ${span.step}` : "";
  return `${classOf(span.cls).label}${wait}, ${durationText((span.t1 - span.t0) / 1e6)}, stage ${span.stage}, rank ${span.rank}${step}`;
}

function spanFacts(span, epochUs) {
  const peer = peerText(span);
  const merged = span.merged > 1 ? `${span.merged} spans merged: too short to tell apart at this zoom` : "";
  return [
    ["stage", span.stage],
    ["rank", span.rank],
    ["class", classOf(span.cls).label],
    ["took", Number.isFinite(span.t1) ? durationText((span.t1 - span.t0) / 1e6) : "not loaded"],
    ["step", span.step >= 0 ? span.step : "none"],
    ["micro-batch", span.mb >= 0 ? span.mb : "none"],
    ["waits for", peer],
    ["began", tickText(epochUs + span.t0, 1e3)],
    ["note", merged],
  ].filter(([, value]) => value !== "");
}

// createSpanCard(root, onClose) -> {show(span or null, epochUs)}
function createSpanCard(root, onClose) {
  const region = element("div"); // always there: screen readers announce what appears inside
  region.setAttribute("aria-live", "polite");
  const card = element("div", "insitu-span-card");
  card.hidden = true;
  region.append(card);
  root.append(region);
  let shown = "";
  return {
    show(span, epochUs) {
      const key = span ? JSON.stringify(spanFacts(span, epochUs)) : "";
      if (key === shown) return;
      shown = key;
      card.hidden = !span;
      if (!span) return card.replaceChildren();
      const list = element("dl");
      for (const [name, value] of spanFacts(span, epochUs)) {
        const fact = element("div");
        const text = element("dd", "", value);
        if (name === "began") text.title = utcText(epochUs + span.t0);
        fact.append(element("dt", "", name), text);
        list.append(fact);
      }
      const close = element("button", "", "Close");
      close.type = "button";
      close.setAttribute("aria-label", "Close the span's card (Escape)");
      close.addEventListener("click", onClose);
      card.replaceChildren(list, close);
    },
  };
}
