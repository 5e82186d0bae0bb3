// The live console: reads /api/live and shows it. What has not changed is not touched, so that hundreds of rows cost little.
"use strict";

const REQUESTS_SHOWN = 40;
const STALE_AFTER_MS = 3500;
const GIVEN_UP_AFTER_MS = 10000;
const RETRY_MS = [500, 1000, 2000, 4000];
// A table that is sorted anew each second cannot be read.
const SORT_EVERY_MS = 3000;

const byId = (id) => document.getElementById(id);
const thin = "\u202f";

// ---- figures as text

function grouped(number) {
  return String(Math.round(number)).replace(/\B(?=(\d{3})+$)/g, thin);
}

function short(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size >= 1e6) return (value / 1e6).toFixed(size >= 1e7 ? 1 : 2) + thin + "M";
  if (size >= 1e4) return (value / 1e3).toFixed(size >= 1e5 ? 0 : 1) + thin + "k";
  if (size >= 100) return grouped(value);
  if (size >= 10) return value.toFixed(1);
  return value === 0 ? "0" : value.toFixed(2);
}

function whole(value) {
  return value === null || value === undefined ? "–" : grouped(value);
}

function time(us) {
  if (us === null || us === undefined) return "–";
  if (us < 1000) return us + thin + "µs";
  if (us < 1e6) return (us / 1e3).toFixed(us < 1e4 ? 1 : 0) + thin + "ms";
  if (us < 1e8) return (us / 1e6).toFixed(us < 1e7 ? 2 : 1) + thin + "s";
  return grouped(us / 1e6) + thin + "s";
}

function usd(value) {
  if (value === 0) return "0";
  if (value >= 100) return grouped(value);
  if (value >= 0.995) return value.toFixed(2);
  return value >= 0.000001 ? value.toPrecision(2) : "<" + thin + "0.000001";
}

function percent(share) {
  if (share === null || share === undefined) return "–";
  const value = share * 100;
  return (value > 0 && value < 10 ? value.toFixed(1) : Math.round(value)) + thin + "%";
}

function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) { value /= 1024; unit += 1; }
  return (unit === 0 ? value : value.toFixed(1)) + thin + units[unit];
}

function span(seconds) {
  if (seconds < 90) return Math.round(seconds) + thin + "s";
  if (seconds < 5400) return Math.round(seconds / 60) + thin + "min";
  if (seconds < 172800) return Math.round(seconds / 3600) + thin + "h";
  return Math.round(seconds / 86400) + thin + "days";
}

function clock(us) {
  const at = new Date(us / 1000);
  return [at.getHours(), at.getMinutes(), at.getSeconds()].map((part) => String(part).padStart(2, "0")).join(":");
}

// ---- changes to the page

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function setClass(node, name, on) {
  if (node.classList.contains(name) !== on) node.classList.toggle(name, on);
}

function setWidth(node, share) {
  const width = (Math.max(0, Math.min(1, share)) * 100).toFixed(1) + "%";
  if (node.style.width !== width) node.style.width = width;
}

function setAttribute(node, name, value) {
  if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}

function setHidden(node, hidden) {
  if (node.hidden !== hidden) node.hidden = hidden;
}

function make(tag, className) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  return node;
}

const svgTag = "http://www.w3.org/2000/svg";

// ---- kinds of cells: each is made once, and then told its value

const plain = { make() {}, show(cell, text) { setText(cell, text); } };

const meter = {
  make(cell) {
    const box = make("span", "meter");
    const track = make("i");
    track.append(make("b"));
    box.append(track, make("span"));
    cell.append(box);
  },
  show(cell, share) {
    const box = cell.firstChild;
    setWidth(box.firstChild.firstChild, share || 0);
    setClass(box, "full", share >= 0.95 && cell.dataset.fills === "bad");
    setText(box.lastChild, percent(share));
  },
};

/** What is spent of a budget: a bar, and beside it the share in words. Beyond the whole of it the bar is full, and the words say how much. */
const budgetBar = {
  make(cell) {
    const box = make("span", "meter budget");
    box.setAttribute("role", "meter");
    box.setAttribute("aria-valuemin", "0");
    box.setAttribute("aria-valuemax", "100");
    const track = make("i");
    track.append(make("b"));
    box.append(track, make("span"));
    cell.append(box);
  },
  show(cell, team) {
    const box = cell.firstChild;
    const budget = team.budget;
    setHidden(box, !budget);
    if (!budget) return;
    const share = budgetShare(team);
    setWidth(box.firstChild.firstChild, share);
    setClass(box, "near", share >= 0.8 && share < 1);
    setClass(box, "spent", share >= 1);
    setAttribute(box, "aria-label", `Budget of ${team.team}`);
    setAttribute(box, "aria-valuenow", String(Math.min(100, Math.round(share * 100))));
    const text = `${usd(budget.spent_usd)} of ${usd(budget.usd)} USD for the ${budget.period}`;
    setAttribute(box, "aria-valuetext", `${percent(share)}, ${text}`);
    setAttribute(cell, "title", `${text}; the next begins in ${span(budget.resets_in_s)}`);
    setText(box.lastChild, (share >= 1 ? "✕ " : share >= 0.8 ? "! " : "") + percent(share));
  },
};

const spark = {
  make(cell) {
    const svg = document.createElementNS(svgTag, "svg");
    svg.setAttribute("class", "spark");
    svg.setAttribute("viewBox", "0 0 59 20");
    svg.setAttribute("preserveAspectRatio", "none");
    svg.setAttribute("aria-hidden", "true");
    svg.append(document.createElementNS(svgTag, "path"));
    cell.append(svg);
  },
  show(cell, values) {
    const most = Math.max(1, ...values);
    const points = values.map((value, at) => at + " " + (19 - (value / most) * 18).toFixed(1));
    const line = points.length ? "M" + points.join("L") : "M0 19L59 19";
    const path = cell.firstChild.firstChild;
    if (path.getAttribute("d") !== line) path.setAttribute("d", line);
  },
};

const phases = {
  make(cell) {
    const bar = make("span", "phases");
    bar.setAttribute("aria-hidden", "true");
    bar.append(make("b", "overhead"), make("b", "prefill"), make("b", "decode"), make("b", "whole"));
    cell.append(bar);
  },
  show(cell, { request, scale }) {
    const bar = cell.firstChild;
    const overhead = Math.min(request.gateway_overhead_us || 0, request.duration_us);
    const first = request.ttft_us === null ? null : Math.max(request.ttft_us, overhead);
    const parts = first === null
      ? [overhead, 0, 0, request.duration_us - overhead]
      : [overhead, first - overhead, request.duration_us - first, 0];
    parts.forEach((part, at) => setWidth(bar.children[at], part / scale));
    const text = first === null
      ? `gateway ${time(overhead)}, rest ${time(request.duration_us - overhead)}`
      : `gateway ${time(overhead)}, queue and prefill ${time(first - overhead)}, decode ${time(request.duration_us - first)}`;
    if (bar.title !== text) bar.title = text;
  },
};

// ---- tables: rows by key, cells by column

class Table {
  constructor(id, columns, options = {}) {
    this.node = byId(id);
    this.body = this.node.tBodies[0];
    this.columns = columns;
    this.options = options;
    this.rows = new Map();
    this.sortBy = options.sortBy || null;
    this.down = true;
    this.sortedAt = 0;
    const head = this.node.tHead.rows[0];
    for (const column of columns) {
      const cell = make("th", column.className || "");
      cell.dataset.field = column.key;
      cell.scope = "col";
      if (column.title) cell.title = column.title;
      if (options.sortBy && column.value) {
        const button = make("button");
        button.type = "button";
        button.textContent = column.label;
        button.addEventListener("click", () => this.sort(column.key));
        cell.append(button);
      } else {
        cell.textContent = column.label;
      }
      column.head = cell;
      head.append(cell);
    }
    this.markSort();
  }

  sort(key) {
    this.down = this.sortBy === key ? !this.down : key !== "team";
    this.sortBy = key;
    this.sortedAt = 0;
    this.markSort();
    this.options.again();
  }

  markSort() {
    for (const column of this.columns) {
      if (!this.options.sortBy || !column.value) continue;
      const order = column.key !== this.sortBy ? "none" : this.down ? "descending" : "ascending";
      column.head.setAttribute("aria-sort", order);
    }
  }

  /** Shows these items, each of which `keyOf` tells from the others. */
  show(items, keyOf) {
    const seen = new Set();
    for (const item of items) {
      const key = keyOf(item);
      seen.add(key);
      let row = this.rows.get(key);
      if (!row) {
        row = this.makeRow();
        this.rows.set(key, row);
      }
      this.columns.forEach((column, at) => {
        const cell = row.cells[at];
        (column.kind || plain).show(cell, column.show(item));
        if (column.mark) {
          const mark = column.mark(item);
          for (const name of ["bad", "warn", "good", "zero"]) setClass(cell, name, mark === name);
        }
      });
      if (this.options.quiet) setClass(row, "quiet", this.options.quiet(item));
    }
    for (const [key, row] of this.rows) {
      if (!seen.has(key)) {
        row.remove();
        this.rows.delete(key);
      }
    }
    this.order(items, keyOf);
  }

  order(items, keyOf) {
    let ordered = items;
    if (this.sortBy) {
      const settled = this.body.rows.length === this.rows.size;
      const held = this.node.matches(":hover") || this.body.contains(document.activeElement);
      const soon = Date.now() - this.sortedAt < SORT_EVERY_MS;
      if (settled && this.sortedAt && (held || soon)) return;
      this.sortedAt = Date.now();
      const column = this.columns.find((one) => one.key === this.sortBy);
      const sign = this.down ? -1 : 1;
      ordered = [...items].sort((left, right) => {
        const [a, b] = [column.value(left), column.value(right)];
        // What is unknown comes last, whichever way the rest goes.
        if (a === null || b === null) return (a === null) - (b === null);
        const order = a < b ? -1 : a > b ? 1 : 0;
        return order ? sign * order : keyOf(left) < keyOf(right) ? -1 : 1;
      });
    }
    let next = this.body.firstChild;
    for (const item of ordered) {
      const row = this.rows.get(keyOf(item));
      if (row === next) next = next.nextSibling;
      else this.body.insertBefore(row, next);
    }
  }

  makeRow() {
    const row = make("tr");
    for (const column of this.columns) {
      const cell = make(column.isName ? "th" : "td", column.className || "");
      if (column.isName) cell.scope = "row";
      if (column.fills) cell.dataset.fills = column.fills;
      cell.dataset.field = column.key;
      (column.kind || plain).make(cell);
      row.append(cell);
    }
    return row;
  }
}

const budgetShare = (team) => (team.budget ? team.budget.spent_usd / team.budget.usd : null);
const tokensPerSecond = (team) => team.prompt_tokens_per_second + team.completion_tokens_per_second;
const tokensTotal = (team) => team.prompt_tokens_total + team.completion_tokens_total;
const perMinute = (team) => Math.round(team.requests_per_second * state.window);

const teamTable = new Table("team-table", [
  { key: "team", label: "Team", className: "text", isName: true, value: (t) => t.team, show: (t) => t.team },
  { key: "share", label: "Share", className: "text", kind: meter, title: "Share of what all teams are charged", value: (t) => t.share, show: (t) => t.share },
  { key: "usd", label: "USD/h", title: "What its requests are charged by the rate card, at this pace", value: (t) => t.charge_usd_per_hour, show: (t) => usd(t.charge_usd_per_hour) },
  { key: "budget", label: "Budget", className: "text", kind: budgetBar, title: "What its requests were charged in this day or month, of what they may be charged", value: budgetShare, show: (t) => t, mark: (t) => (budgetShare(t) >= 1 ? "bad" : budgetShare(t) >= 0.8 ? "warn" : "") },
  { key: "tokens", label: "Tokens/s", title: "Prompt and completion tokens a second", value: tokensPerSecond, show: (t) => short(tokensPerSecond(t)) },
  { key: "rate", label: "Requests/s", className: "narrow", value: (t) => t.requests_per_second, show: (t) => short(t.requests_per_second) },
  { key: "spark", label: "Last minute", className: "mid", kind: spark, title: "Requests that ended in each second, each team to its own scale", show: (t) => t.requests_by_second },
  { key: "in_flight", label: "In flight", className: "narrow", value: (t) => t.in_flight, show: (t) => whole(t.in_flight) },
  { key: "ttft_p50", label: "TTFT p50", className: "mid", title: "Time to first token of streams, median", value: (t) => t.ttft_p50_us, show: (t) => time(t.ttft_p50_us) },
  { key: "ttft_p95", label: "TTFT p95", title: "Time to first token of streams, 95th percentile", value: (t) => t.ttft_p95_us, show: (t) => time(t.ttft_p95_us) },
  { key: "itl_p95", label: "ITL p95", className: "mid", title: "Gap between two chunks of a stream, 95th percentile", value: (t) => t.itl_p95_us, show: (t) => time(t.itl_p95_us) },
  { key: "errors", label: "Errors", title: "Requests that failed, of those of the last minute", value: (t) => t.errors, show: (t) => (t.errors ? `${t.errors} (${percent(t.errors / Math.max(1, perMinute(t)))})` : "0"), mark: (t) => (t.errors ? "bad" : "zero") },
  { key: "requests_total", label: "Requests", className: "wide", title: "Since the start", value: (t) => t.requests_total, show: (t) => whole(t.requests_total) },
  { key: "tokens_total", label: "Tokens", className: "wide", title: "Prompt and completion tokens since the start", value: tokensTotal, show: (t) => whole(tokensTotal(t)) },
], {
  sortBy: "usd",
  again: () => state.snapshot && render(),
  quiet: (t) => t.in_flight === 0 && t.requests_per_second === 0,
});

const upstreamTable = new Table("upstream-table", [
  { key: "upstream", label: "Upstream", className: "text", isName: true, show: (u) => u.upstream },
  { key: "condition", label: "Condition", className: "text", show: (u) => (u.up ? "✓ " : "✕ ") + u.condition, mark: (u) => (!u.up ? "bad" : u.condition === "queueing" ? "warn" : "good") },
  { key: "models", label: "Serves", className: "text cut mid", show: (u) => (u.models && u.models.length ? u.models.join(", ") : u.serves) },
  { key: "running", label: "Running", title: "Requests in the engine’s batch, as it said at the last scrape", show: (u) => whole(u.running) },
  { key: "waiting", label: "Waiting", title: "Requests in the engine’s queue", show: (u) => whole(u.waiting), mark: (u) => (u.waiting > 0 ? "warn" : "") },
  { key: "kv", label: "KV cache", className: "text", kind: meter, fills: "bad", show: (u) => u.kv_cache_usage },
  { key: "busy", label: "Busy", className: "text narrow", kind: meter, title: "Share of the last minute in which it had a request of this gateway", show: (u) => u.busy_share },
  { key: "in_flight", label: "In flight", className: "narrow", title: "Requests of this gateway", show: (u) => whole(u.in_flight) },
  { key: "age", label: "Read", className: "mid", title: "How long ago the engine’s own metrics were read", show: (u) => (u.scrape_age_s === null ? "–" : u.scrape_ok ? span(u.scrape_age_s) + " ago" : "no answer"), mark: (u) => (u.scrape_ok === false ? "bad" : "zero") },
]);

const failed = (request) => !["completed", "aborted", "refused"].includes(request.outcome);

const requestTable = new Table("request-table", [
  { key: "at", label: "Began", className: "text", show: ({ request }) => clock(request.started_at_us) },
  { key: "team", label: "Team", className: "text cut", show: ({ request }) => request.team || "(none)" },
  { key: "model", label: "Model", className: "text cut mid", show: ({ request }) => request.model || "–" },
  { key: "outcome", label: "Outcome", className: "text narrow", show: ({ request }) => `${request.status_code || "–"} ${request.outcome.replace("_", " ")}`, mark: ({ request }) => (failed(request) ? "bad" : request.outcome === "completed" ? "" : "warn") },
  { key: "tokens", label: "Tokens in → out", className: "mid", show: ({ request }) => `${whole(request.prompt_tokens)} → ${whole(request.completion_tokens)}` },
  { key: "charge", label: "USD", className: "mid", title: "What it is charged by the rate card", show: ({ request }) => usd(request.charge_nano_usd / 1e9) },
  { key: "ttft", label: "TTFT", className: "narrow", show: ({ request }) => time(request.ttft_us) },
  { key: "duration", label: "Total", show: ({ request }) => time(request.duration_us) },
  { key: "phases", label: "Phases", className: "text phase-cell", kind: phases, show: (row) => row },
]);

const causeText = (cause) => cause.replace(/_/g, " ");

const engineTable = new Table("engine-table", [
  { key: "upstream", label: "Tokens of", className: "text", isName: true, show: (e) => e.upstream },
  { key: "prompt", label: "Prompt: engine", className: "narrow", show: (e) => whole(e.engine_prompt_tokens) },
  { key: "prompt_known", label: "attributed", className: "mid", show: (e) => whole(e.attributed_prompt_tokens) },
  { key: "prompt_gap", label: "prompt gap", title: "Counted by the engine and used by no known request, of late", show: (e) => whole(e.gap_prompt_tokens), mark: (e) => (e.gap_exceeded ? "bad" : "") },
  { key: "completion", label: "Completion: engine", className: "narrow", show: (e) => whole(e.engine_completion_tokens) },
  { key: "completion_known", label: "attributed", className: "mid", show: (e) => whole(e.attributed_completion_tokens) },
  { key: "completion_gap", label: "completion gap", title: "Counted by the engine and used by no known request, of late", show: (e) => whole(e.gap_completion_tokens), mark: (e) => (e.gap_exceeded ? "bad" : "") },
  { key: "verdict", label: "Adds up", className: "text narrow", show: (e) => (!e.gap_exceeded ? "✓ yes" : "✕ " + (e.likely_causes.map(causeText).join(", ") || "no")), mark: (e) => (e.gap_exceeded ? "bad" : "good") },
]);

const costOf = (c) => c.teams_nano_usd + c.idle_nano_usd + c.unattributed_nano_usd + c.loading_nano_usd + c.down_nano_usd + c.scaled_to_zero_nano_usd;
const costText = (nanoUsd) => usd(nanoUsd / 1e9);

const costTable = new Table("cost-table", [
  { key: "upstream", label: "USD of", className: "text", isName: true, show: (c) => c.upstream },
  { key: "cost", label: "Cost", title: "Price times time of the hour’s booked windows", show: (c) => costText(costOf(c)) },
  { key: "teams", label: "Teams", title: "What teams’ requests took", show: (c) => costText(c.teams_nano_usd) },
  { key: "idle", label: "Idle", title: "Time in which nobody used it, whoever pays for that", show: (c) => costText(c.idle_nano_usd) },
  { key: "idle_share", label: "Idle share", className: "text", kind: meter, show: (c) => (costOf(c) ? c.idle_nano_usd / costOf(c) : null) },
  { key: "unattributed", label: "Unattributed", className: "narrow", title: "What no known request asked for", show: (c) => costText(c.unattributed_nano_usd) },
  { key: "away", label: "Loading or away", className: "mid", title: "Loading its model, down, or scaled to zero", show: (c) => costText(c.loading_nano_usd + c.down_nano_usd + c.scaled_to_zero_nano_usd) },
]);

// ---- lists of terms

class Terms {
  constructor(id) {
    this.node = byId(id);
    this.values = new Map();
  }

  show(entries) {
    for (const [term, text, mark] of entries) {
      let value = this.values.get(term);
      if (!value) {
        const box = make("div");
        const name = make("dt");
        name.textContent = term;
        value = make("dd");
        box.append(name, value);
        this.node.append(box);
        this.values.set(term, value);
      }
      setText(value, text);
      for (const name of ["bad", "warn"]) setClass(value, name, mark === name);
    }
  }
}

const tiles = new Terms("tiles");
const losses = new Terms("losses");

// ---- the whole page

const state = {
  snapshot: null,
  requests: [],
  window: 60,
  at: 0,
  askedAt: 0,
  paused: false,
  lost: false,
  token: sessionStorage.getItem("token"),
  level: null,
};

function announce(text) {
  byId("announce").textContent = text;
}

/** What is wrong, worst first: [level, text]. */
function troubles(snapshot) {
  const found = [];
  for (const upstream of snapshot.upstreams) {
    if (!upstream.up) found.push(["bad", `upstream ${upstream.upstream} is down`]);
  }
  const ended = snapshot.teams.reduce((sum, team) => sum + perMinute(team), 0);
  const errors = snapshot.teams.reduce((sum, team) => sum + team.errors, 0);
  const share = ended ? errors / ended : 0;
  if (share >= 0.05) found.push(["bad", `${percent(share)} of requests fail`]);
  else if (share >= 0.01) found.push(["warn", `${percent(share)} of requests fail`]);
  const spent = snapshot.teams.filter((team) => budgetShare(team) >= 1).map((team) => team.team);
  if (spent.length) found.push(["warn", spent.length === 1 ? `${spent[0]} has spent its budget` : `${spent.length} teams have spent their budgets`]);
  const books = snapshot.reconciliation;
  if (books && books.store) {
    if (books.store.dropped_rows) found.push(["bad", `${whole(books.store.dropped_rows)} rows were lost`]);
    if (books.store.quarantined_rows) found.push(["bad", `${whole(books.store.quarantined_rows)} rows were refused by ClickHouse`]);
    if (books.store.oldest_age_s > 60) found.push(["warn", `rows wait for ClickHouse since ${span(books.store.oldest_age_s)}`]);
  }
  for (const engine of books ? books.engines : []) {
    if (!engine.gap_exceeded) continue;
    const causes = engine.likely_causes.map(causeText).join(", ");
    found.push(["warn", `tokens of ${engine.upstream} belong to no known request${causes ? ": " + causes : ""}`]);
  }
  if (books && books.tap) {
    if (!books.tap.is_in_place) found.push(["warn", "the kernel probe is not where the servers are"]);
    if (books.tap.lost_records) found.push(["warn", `the kernel probe lost ${whole(books.tap.lost_records)} records`]);
  }
  for (const upstream of snapshot.upstreams) {
    // A short queue is what a busy engine has; one as long as its batch is a wait that users feel.
    if (upstream.waiting > 0 && upstream.waiting >= upstream.running) {
      found.push(["warn", `${whole(upstream.waiting)} requests wait at ${upstream.upstream}`]);
    }
    if (upstream.up && upstream.kv_cache_usage >= 0.95) found.push(["warn", `the KV cache of ${upstream.upstream} is full`]);
  }
  if (snapshot.gateway.is_draining) found.push(["warn", "the gateway is ending"]);
  return found.sort((left, right) => (left[0] === "bad" ? 0 : 1) - (right[0] === "bad" ? 0 : 1));
}

function renderVerdict(snapshot) {
  const found = troubles(snapshot);
  const level = found.length ? found[0][0] : "ok";
  const section = byId("verdict");
  if (section.dataset.level !== level) section.dataset.level = level;
  const headline = found.length ? found[0][1][0].toUpperCase() + found[0][1].slice(1) : "All is well";
  setText(byId("verdict-title"), headline);
  const reasons = byId("reasons");
  const rest = found.slice(1, 5).map(([, text]) => text);
  if (reasons.dataset.shown !== rest.join("\n")) {
    reasons.dataset.shown = rest.join("\n");
    reasons.replaceChildren(...rest.map((text) => Object.assign(make("li"), { textContent: text })));
  }
  // Spoken only when it gets bad or well again, not with each figure.
  const heard = level === "bad" ? headline : level;
  if (state.level !== null && state.level !== heard && (level === "bad" || level === "ok")) announce(headline);
  state.level = heard;
  const title = (level === "bad" ? "✕ " + headline : "vllm-gateway");
  if (document.title !== title) document.title = title;

  const sum = (of) => snapshot.teams.reduce((total, team) => total + of(team), 0);
  const up = snapshot.upstreams.filter((upstream) => upstream.up).length;
  const ended = sum(perMinute);
  const errors = sum((team) => team.errors);
  tiles.show([
    ["USD/h charged", usd(sum((team) => team.charge_usd_per_hour))],
    ["Tokens/s", short(sum(tokensPerSecond))],
    ["Requests/s", short(sum((team) => team.requests_per_second))],
    ["In flight", whole(sum((team) => team.in_flight))],
    ["Errors", ended ? percent(errors / ended) : "0" + thin + "%", errors / Math.max(1, ended) >= 0.01 ? "bad" : ""],
    ["Upstreams up", `${up} of ${snapshot.upstreams.length}`, up < snapshot.upstreams.length ? "bad" : ""],
  ]);
}

/** 1, 2 or 5 times a power of ten: a scale that changes seldom. */
function scaleOf(most) {
  const power = 10 ** Math.floor(Math.log10(Math.max(most, 1000)));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= most);
}

function renderTeams(snapshot, wanted) {
  const charged = snapshot.teams.reduce((sum, team) => sum + team.charge_usd_per_hour, 0);
  const tokens = snapshot.teams.reduce((sum, team) => sum + tokensPerSecond(team), 0);
  // Where nothing is charged, tokens tell who uses the cluster.
  const share = (team) => (charged ? team.charge_usd_per_hour / charged : tokens ? tokensPerSecond(team) / tokens : 0);
  const teams = snapshot.teams.map((team) => ({ ...team, share: share(team) }));
  const shown = teams.filter((team) => team.team.toLowerCase().includes(wanted));
  // Where nobody has a budget, nobody needs the column.
  setClass(teamTable.node, "no-budgets", !teams.some((team) => team.budget));
  teamTable.show(shown, (team) => team.team);
  const count = wanted ? `${shown.length} of ${teams.length}` : `${teams.length}`;
  setText(byId("teams-note"), `${count} ${teams.length === 1 ? "team" : "teams"}. Rates, percentiles and errors are of the last minute; a request counts when it ends.`);
  setHidden(byId("teams-none"), !(wanted && !shown.length));
}

function renderRequests(wanted) {
  const shown = state.requests.filter((request) => request.team.toLowerCase().includes(wanted)).slice(0, REQUESTS_SHOWN);
  const scale = scaleOf(shown.reduce((most, request) => Math.max(most, request.duration_us), 0));
  requestTable.show(shown.map((request) => ({ request, scale })), ({ request }) => request.sequence);
  const column = requestTable.columns[requestTable.columns.length - 1];
  setText(column.head, shown.length ? `Phases, 0 to ${scale >= 1e6 ? scale / 1e6 + thin + "s" : scale / 1e3 + thin + "ms"}` : "Phases");
  setHidden(byId("requests-none"), shown.length > 0);
}

function renderBooks(books) {
  setHidden(byId("books"), !books);
  if (!books) return;
  engineTable.show(books.engines, (engine) => engine.upstream);
  const costs = books.costs || [];
  setHidden(byId("costs"), costs.length === 0);
  costTable.show(costs, (cost) => cost.upstream);
  // A younger upstream has less than an hour.
  const shortest = costs.reduce((least, cost) => Math.min(least, cost.to_us - cost.from_us), 3.6e9);
  setText(byId("costs-note"), `Cost of the last ${shortest < 3.6e9 ? span(shortest / 1e6) : "hour"}, in USD, by what it was for.`);
  const entries = [];
  if (books.tap) {
    entries.push(
      ["Requests past the gateway", whole(books.tap.direct_exchanges), books.tap.direct_exchanges ? "warn" : ""],
      ["Seen by the kernel and the proxy", whole(books.tap.own_exchanges)],
      ["Not seen whole by the kernel", whole(books.tap.incomplete_exchanges)],
      ["Records lost by the kernel probe", whole(books.tap.lost_records), books.tap.lost_records ? "bad" : ""],
      ["Forged or used request ids", whole(books.tap.forged_ids), books.tap.forged_ids ? "warn" : ""],
    );
  } else {
    entries.push(["Requests past the gateway", "not watched"]);
  }
  if (books.store) {
    const store = books.store;
    entries.push(
      ["Rows that wait for ClickHouse", `${whole(store.waiting_rows)} (${bytes(store.waiting_bytes)})`],
      ["Oldest of them", store.waiting_rows ? span(store.oldest_age_s) : "–", store.oldest_age_s > 60 ? "warn" : ""],
      ["Rows stored", whole(store.stored_rows)],
      ["Rows lost", whole(store.dropped_rows), store.dropped_rows ? "bad" : ""],
      ["Rows refused by ClickHouse", whole(store.quarantined_rows), store.quarantined_rows ? "bad" : ""],
    );
  } else {
    entries.push(["Rows kept", "none (store.url: none)"]);
  }
  losses.show(entries);
}

function renderFirst(snapshot) {
  const gateway = snapshot.gateway;
  // A team with a budget is listed before its first request.
  const waits = snapshot.teams.every((team) => team.requests_total === 0 && team.in_flight === 0) && gateway.clients !== null;
  setHidden(byId("first"), !waits);
  setHidden(byId("team-section"), waits);
  setHidden(byId("request-section"), waits);
  if (!waits) return;
  const model = snapshot.upstreams.flatMap((upstream) => (upstream.serves === "generate" && upstream.models) || [])[0] || "your-model";
  const named = gateway.teamless === "named";
  const clients = gateway.clients.replace(/^(0\.0\.0\.0|\[::\])/, location.hostname);
  const header = named ? "" : ` -H '${gateway.team_header}: my-team'`;
  setText(byId("first-url"), `base_url = http://${clients}/v1\n\ncurl http://${clients}/v1/chat/completions${header} -H 'Content-Type: application/json' \\\n  -d '{"model": "${model}", "stream": true, "messages": [{"role": "user", "content": "Hello"}]}'`);
  setText(byId("first-team"), named
    ? `A request is for the team that its header ${gateway.team_header} names. One without is listed by its API key, as key-xxxxxx, or as unnamed.`
    : `Each request must name its team in the header ${gateway.team_header}.`);
}

function render() {
  const snapshot = state.snapshot;
  const wanted = byId("filter").value.trim().toLowerCase();
  setHidden(byId("figures"), false);
  const gateway = snapshot.gateway;
  const trial = gateway.teamless === "named" ? "trial, nothing is kept · " : "";
  const scope = snapshot.scope === "admin" ? "" : `${snapshot.scope.replace(":", " ")} · `;
  setText(byId("about"), `${scope}${trial}${gateway.gateway_id} · ${gateway.capture} · version ${gateway.gateway_version} · up ${span(gateway.uptime_s)}`);
  renderVerdict(snapshot);
  renderFirst(snapshot);
  renderTeams(snapshot, wanted);
  upstreamTable.show(snapshot.upstreams, (upstream) => upstream.upstream);
  renderRequests(wanted);
  renderBooks(snapshot.reconciliation);
}

function take(snapshot) {
  state.at = Date.now();
  // A gateway that has started anew numbers from 1 again.
  if (state.snapshot && snapshot.gateway.uptime_s < state.snapshot.gateway.uptime_s) state.requests = [];
  const newest = state.requests.length ? state.requests[0].sequence : 0;
  const more = snapshot.requests.filter((request) => request.sequence > newest);
  state.requests = more.concat(state.requests).slice(0, 200);
  state.window = snapshot.window_s;
  state.snapshot = snapshot;
  if (!state.paused) render();
  showConnection();
}

function showConnection() {
  const age = Date.now() - state.at;
  const lost = state.at > 0 && age > STALE_AFTER_MS;
  const [name, text] = state.paused ? ["paused", "Paused"]
    : lost ? ["stale", `Stale: last heard ${span(age / 1000)} ago`]
    : state.at ? ["live", "Live"] : ["connecting", state.failure || "Connecting"];
  const node = byId("connection");
  if (node.dataset.state !== name) node.dataset.state = name;
  setText(byId("connection-text"), text);
  if (lost !== state.lost) {
    state.lost = lost;
    announce(lost ? "The gateway does not answer; figures are stale" : "Figures are live again");
  }
}

// ---- the connection

function askForToken(why) {
  state.token = null;
  sessionStorage.removeItem("token");
  if (why) setText(byId("sign-in-why"), why);
  setHidden(byId("figures"), true);
  setHidden(byId("sign-in"), false);
  setHidden(byId("forget"), true);
  byId("token").focus();
}

/** Reads events until the stream ends. EventSource would do the same, but cannot send a token. */
async function listen(signal) {
  const headers = state.token ? { Authorization: `Bearer ${state.token}` } : {};
  const answer = await fetch("/api/live", { headers, signal, cache: "no-store" });
  if (answer.status === 401) {
    askForToken(state.token ? "The gateway does not know this token." : null);
    return "wait";
  }
  if (!answer.ok) {
    const said = await answer.json().catch(() => null);
    throw new Error(said && said.error ? said.error.message : `status ${answer.status}`);
  }
  setHidden(byId("forget"), !state.token);
  setHidden(byId("sign-in"), true);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return "again";
    text += value;
    let end;
    while ((end = text.indexOf("\n\n")) >= 0) {
      const data = text.slice(0, end).split("\n").filter((line) => line.startsWith("data: "));
      text = text.slice(end + 2);
      if (data.length) take(JSON.parse(data.map((line) => line.slice(6)).join("\n")));
    }
  }
}

let wake = () => {};
let listening = null;

async function run() {
  let failures = 0;
  for (;;) {
    const heard = state.at;
    listening = new AbortController();
    state.askedAt = Date.now();
    let next = "again";
    try {
      next = await listen(listening.signal);
      state.failure = null;
    } catch (error) {
      state.failure = error.name === "AbortError" ? null : `No answer: ${error.message}`;
    }
    listening = null;
    showConnection();
    if (next === "wait") {
      await new Promise((resolve) => { wake = resolve; });
      failures = 0;
      continue;
    }
    failures = state.at === heard ? failures + 1 : 0;
    const pause = RETRY_MS[Math.min(failures, RETRY_MS.length - 1)];
    await new Promise((resolve) => { setTimeout(resolve, pause); });
  }
}

// A host that is gone sends no end: after so long without an event the connection is given up.
setInterval(() => {
  showConnection();
  if (listening && Date.now() - Math.max(state.at, state.askedAt) > GIVEN_UP_AFTER_MS) listening.abort();
}, 1000);

byId("sign-in-form").addEventListener("submit", (event) => {
  event.preventDefault();
  state.token = byId("token").value.trim();
  byId("token").value = "";
  if (!state.token) return;
  sessionStorage.setItem("token", state.token);
  wake();
});

byId("forget").addEventListener("click", () => {
  state.at = 0;
  state.snapshot = null;
  state.requests = [];
  askForToken(null);
  if (listening) listening.abort();
});

byId("pause").addEventListener("click", () => {
  state.paused = !state.paused;
  byId("pause").setAttribute("aria-pressed", String(state.paused));
  if (!state.paused && state.snapshot) render();
  showConnection();
});

byId("filter").addEventListener("input", () => state.snapshot && render());

function applyTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

const theme = localStorage.getItem("theme") || "auto";
byId("theme").value = theme;
applyTheme(theme);
byId("theme").addEventListener("change", (event) => {
  localStorage.setItem("theme", event.target.value);
  applyTheme(event.target.value);
});

run();
