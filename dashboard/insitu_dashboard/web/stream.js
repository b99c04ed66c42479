// Server-sent events with a growing pause between tries: EventSource's own reconnect has none, and gives up on HTTP errors.

const RETRY_PAUSES_MS = [1000, 2000, 4000];
const SLOW_RETRY_MS = 15000; // once it was called failed: something else shows the data, so there is no hurry
const FAILURES_ALLOWED = 3;

// openStream(url, {onPicture, onSpans, onState}) -> {close()}
// onState: "open" (data flows), "lost" (will be tried again), "failed" (lost three times in a row without data).
function openStream(url, { onPicture, onSpans, onState }) {
  let source = null;
  let timer = null;
  let failures = 0;
  let isClosed = false;
  let told = "";

  function tell(state) {
    if (state === told) return;
    told = state;
    if (onState) onState(state);
  }

  function receive(handler) {
    return (event) => {
      if (isClosed) return;
      failures = 0;
      tell("open");
      if (handler) handler(JSON.parse(event.data));
    };
  }

  function lost() {
    source.close();
    if (isClosed) return;
    failures += 1;
    tell(failures >= FAILURES_ALLOWED ? "failed" : "lost");
    const pause = failures > FAILURES_ALLOWED ? SLOW_RETRY_MS : RETRY_PAUSES_MS[failures - 1];
    timer = setTimeout(connect, pause);
  }

  function connect() {
    source = new EventSource(url);
    source.addEventListener("picture", receive(onPicture));
    source.addEventListener("spans", receive(onSpans));
    source.addEventListener("error", lost);
  }

  connect();
  return {
    close() {
      isClosed = true;
      clearTimeout(timer);
      source.close();
    },
  };
}
