// The strip at the top of every page: how old the data is, what is missing, what the probe costs, pause; and the banner.

const STATES = {
  loading: ["○", "LOADING"],
  empty: ["○", "NO DATA"],
  live: ["●", "LIVE"],
  stale: ["▲", "STALE"],
  ended: ["■", "ENDED"],
  error: ["✕", "ERROR"],
  paused: ["❚❚", "PAUSED"],
  lost: ["▲", "NOT CONNECTED"],
};

function ageText(seconds) {
  if (seconds === null || seconds === undefined) return "";
  if (seconds < 60) return `${seconds.toFixed(1)} s old`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min old`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h old` : `${Math.round(seconds / 86400)} days old`;
}

function percentText(share) {
  if (share === null || share === undefined) return "–";
  return `${Number((100 * share).toPrecision(share < 0.0995 ? 2 : 3))} %`;
}

// Commands are marked up for terminals and documents; here they are words.
function plain(text) {
  return text.replaceAll("`", "");
}

function countText(count, word) {
  return `${count} ${word}${count === 1 ? "" : "s"}`;
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// createStrip(root, {onPause}) -> {show(header, notice, receivedAtMs), connection(state), paused(bool)}
function createStrip(root, { onPause }) {
  const bar = element("div", "insitu-strip");
  const chips = {};
  for (const name of ["state", "run", "clock", "drops", "overhead"]) {
    chips[name] = element("span", `insitu-chip insitu-chip-${name}`);
    bar.append(chips[name]);
  }
  const button = element("button", "insitu-pause", "❚❚ Pause");
  button.type = "button";
  button.addEventListener("click", () => onPause(!isPaused));
  bar.append(button);
  const banner = element("div", "insitu-notice");
  banner.hidden = true;
  const said = element("strong");
  const remedy = element("span");
  banner.append(said, document.createTextNode(" "), remedy);
  root.append(bar, banner);

  let isPaused = false;
  let isConnected = true;
  let last = null;

  function draw() {
    if (!last) return;
    const { header, receivedAtMs } = last;
    const age = header.age_s === null ? null : header.age_s + (isPaused ? 0 : (performance.now() - receivedAtMs) / 1000);
    const state = isPaused ? "paused" : isConnected ? header.state : "lost";
    const [sign, word] = STATES[state] || STATES.error;
    chips.state.dataset.state = state;
    setText(chips.state, `${sign} ${word} ${isPaused ? "" : ageText(age)}`.trim());
    chips.state.title = "Age of the newest record of any rank";
    const model = header.model ? `${header.model} · ${countText(header.stages, "stage")} · ${countText(header.ranks, "rank")}` : "no model yet";
    setText(chips.run, header.replica ? `${model} · ${header.replica}` : model);
    setText(chips.clock, header.clock ? `clock: ${header.clock}` : "");
    chips.clock.title = "Processes of one host share one clock; hosts are compared by their wall clocks";
    setText(chips.drops, header.drops ? `▲ ${header.drops.toLocaleString("en")} rows missing` : "drops 0");
    chips.drops.dataset.bad = header.drops ? "1" : "";
    chips.drops.title = Object.entries(header.drop_reasons || {}).map(([reason, rows]) => `${reason}: ${rows}`).join(", ");
    setText(chips.overhead, header.overhead === null ? "probe –" : `probe ${percentText(header.overhead)} of step time`);
    chips.overhead.title = "What the probe takes: CPU time of its thread and time in hooks, as a share of the time in which there was work, worst rank, last minute; the budget is a share of the same";
  }

  function say(notice) {
    banner.hidden = !notice;
    if (!notice) return;
    banner.dataset.level = notice.level;
    banner.setAttribute("role", notice.level === "info" ? "status" : "alert");
    setText(said, plain(notice.text));
    setText(remedy, plain(notice.remedy));
  }

  function tell() {
    if (isConnected || isPaused) {
      say(last ? last.notice : null);
    } else {
      say({
        level: "warning",
        text: "The dashboard's server does not answer. What is shown is the last that came.",
        remedy: "Start it again: insitu dashboard STORE. This page goes on by itself.",
      });
    }
    draw();
  }

  const timer = setInterval(draw, 1000);
  return {
    show(header, notice, receivedAtMs) {
      last = { header, notice, receivedAtMs };
      tell();
    },
    connection(state) {
      isConnected = state === "open";
      tell();
    },
    paused(value) {
      isPaused = value;
      button.textContent = value ? "▶ Go on" : "❚❚ Pause";
      button.setAttribute("aria-pressed", String(value));
      tell();
    },
    close() {
      clearInterval(timer);
    },
  };
}
