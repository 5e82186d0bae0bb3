//! ClickHouse with databases that tests fill with segments and scrapes of their own making, and bookkeepers of them.

use crate::support::installed::{ClickHouse, free_address};
use clickhouse::Client;
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use vllm_gateway::bookkeeper::job::Bookkeeper;
use vllm_gateway::config::Config;
use vllm_gateway::ledger::{Account, Cutter, Micros, Run, Segment, Span, Window};
use vllm_gateway::store::migrate::{self, Layout};

/// 2026-10-20T00:00:00Z, the start of a window.
pub const START_US: u64 = 1_792_454_400 * SECOND_US;
pub const SECOND_US: u64 = 1_000_000;
pub const MINUTE_US: u64 = 60 * SECOND_US;
pub const WINDOW_US: u64 = Window::LEN_US;

/// An engine for all databases of a test.
pub struct Site {
    dir: PathBuf,
    addr: SocketAddr,
    _clickhouse: ClickHouse,
}

/// One database.
pub struct Database {
    name: String,
    dir: PathBuf,
    addr: SocketAddr,
    client: Client,
}

/// A request that ran.
#[derive(Clone, Debug)]
pub struct Request {
    pub event_id: String,
    pub team: String,
    /// Since 1970.
    pub start_us: u64,
    pub len_us: u64,
    pub completion_tokens: u64,
}

/// A row of `vllm_system_metrics`.
#[derive(Clone, Debug)]
pub struct Scraped {
    gateway: &'static str,
    at_ms: u64,
    running: u64,
    completion_tokens: u64,
}

impl Site {
    pub fn start(name: &str) -> Site {
        let dir = std::env::temp_dir().join(format!("vllm-gateway-books-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a directory");
        let clickhouse = ClickHouse::start(free_address(), &dir.join("clickhouse"), None);
        Site {
            addr: clickhouse.addr,
            dir,
            _clickhouse: clickhouse,
        }
    }

    /// A database with the gateway's tables, in which nothing grows old.
    pub async fn database(&self, name: &str) -> Database {
        let client = Client::default().with_url(format!("http://{}", self.addr));
        let layout = Layout {
            database: name.to_owned(),
            cluster: None,
            // A `DateTime` ends in 2106, and what is kept beyond that is gone at once.
            raw_ttl_days: 10_000,
            ledger_ttl_days: 10_000,
        };
        migrate::migrate(&client, &layout).await.expect("a schema");
        let dir = self.dir.join(name);
        std::fs::create_dir_all(&dir).expect("a directory");
        Database {
            name: name.to_owned(),
            dir,
            addr: self.addr,
            client: client.with_database(name),
        }
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

impl Request {
    /// One that starts so long after the start.
    pub fn new(event_id: &str, team: &str, after_us: u64, len_us: u64, completion_tokens: u64) -> Request {
        Request {
            event_id: event_id.to_owned(),
            team: team.to_owned(),
            start_us: START_US + after_us,
            len_us,
            completion_tokens,
        }
    }
}

/// Requests of four teams that overlap, within so long of the start; the first begins with it.
pub fn requests(count: u64, within_us: u64) -> Vec<Request> {
    let request = |number: u64| {
        // Numbers without a pattern, the same in every run.
        let drawn = (number + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(23);
        let start_us = number * (within_us * 3 / 4) / count + drawn % (7 * SECOND_US) * u64::from(number > 0);
        let len_us = 400_000 + (drawn >> 8) % (within_us / 5);
        let team = ["ads", "search", "vision", "a b"][(drawn >> 40) as usize % 4];
        Request::new(
            &format!("event-{number}"),
            team,
            start_us,
            len_us,
            len_us / 20_000 + drawn % 50,
        )
    };
    (0..count).map(request).collect()
}

/// Their segments, in the order in which they ended.
pub fn cut(requests: &[Request]) -> Vec<Segment> {
    let segments_of = |request: &Request| {
        let from = Micros(request.start_us);
        let run = Run {
            span: Span::new(from, Micros(request.start_us + request.len_us)),
            prefilled: Some(Micros(request.start_us + request.len_us / 10)),
            prompt_tokens: 0,
            cached_tokens: 0,
            completion_tokens: request.completion_tokens,
            points: Vec::new(),
            units: request.completion_tokens,
        };
        let account = Account {
            team_id: request.team.as_str().into(),
            project: "p".into(),
            model: "m".into(),
        };
        let event_id = request.event_id.clone();
        let slices = Cutter::default().cut_rest(&run);
        slices.into_iter().map(move |slice| Segment {
            event_id: event_id.as_str().into(),
            account: account.clone(),
            run: slice.run,
            work: slice.work,
        })
    };
    let mut segments: Vec<Segment> = requests.iter().flat_map(segments_of).collect();
    segments.sort_by_key(|segment| segment.run.to());
    segments
}

/// What a gateway sees every 15 s, from and to so long after the start, of an engine that worked on `segments`, and on `direct` tokens a second besides.
pub fn scrapes(
    gateway: &'static str,
    from_us: u64,
    to_us: u64,
    segments: &[Segment],
    direct: u64,
) -> Vec<Scraped> {
    let moments = (from_us.div_ceil(WINDOW_US)..to_us.div_ceil(WINDOW_US)).map(|number| number * WINDOW_US);
    moments
        .map(|after_us| {
            let now = Micros(START_US + after_us);
            let done = |segment: &Segment| {
                let passed = segment.run.within(Span::new(Micros(0), now)).len_us();
                let passed = if segment.run.to() <= now {
                    segment.run.len_us()
                } else {
                    passed
                };
                (segment.work.completion_tokens * passed).checked_div(segment.run.len_us())
            };
            let known: u64 = segments
                .iter()
                .filter(|segment| segment.run.from() <= now)
                .filter_map(done)
                .sum();
            let running = segments
                .iter()
                .filter(|segment| segment.run.from() <= now && now < segment.run.to());
            Scraped {
                gateway,
                at_ms: now.0 / 1000,
                running: running.count() as u64,
                completion_tokens: known + direct * after_us / SECOND_US,
            }
        })
        .collect()
}

impl Scraped {
    /// The same, by a clock that is so many seconds ahead.
    pub fn later(&self, seconds: u64) -> Scraped {
        Scraped {
            at_ms: self.at_ms + 1000 * seconds,
            ..self.clone()
        }
    }
}

/// What must be 0 where statements are whole: windows whose rows do not sum to their head, or are of other revisions; segments whose costs do not sum
/// to their account's row.
pub const CROOKED: &str = "SELECT \
    (SELECT count() FROM (SELECT upstream, window_start, bill_nano_usd, busy_us, revision, state, prompt_tokens + unattributed_prompt_tokens AS prompt, \
      completion_tokens + unattributed_completion_tokens AS completion FROM ledger_windows FINAL) AS head \
     FULL JOIN (SELECT upstream, window_start, sum(cost_nano_usd) AS cost, sum(busy_us) AS busy, sum(prompt_tokens) AS prompt, \
      sum(completion_tokens) AS completion, min(revision) AS low, max(revision) AS high, any(state) AS state, min(cost_nano_usd) AS least \
      FROM cost_ledger FINAL GROUP BY upstream, window_start) AS row USING (upstream, window_start) \
     WHERE (head.bill_nano_usd, head.busy_us, head.prompt, head.completion, head.revision, head.revision, head.state) \
        != (row.cost, row.busy, row.prompt, row.completion, row.low, row.high, row.state) OR row.least < 0) \
    + (SELECT count() FROM (SELECT upstream, window_start, team_id, project, model, cost_nano_usd AS cost, busy_us AS busy, revision, state \
       FROM cost_ledger FINAL WHERE NOT startsWith(team_id, '__') AND model != '__idle__') AS row \
     FULL JOIN (SELECT upstream, window_start, team_id, project, model, sum(cost_nano_usd) AS cost, sum(busy_us) AS busy, max(revision) AS revision, \
       any(state) AS state FROM segment_costs FINAL GROUP BY upstream, window_start, team_id, project, model) AS part \
     USING (upstream, window_start, team_id, project, model) \
     WHERE (row.cost, row.busy) != (part.cost, part.busy) OR (part.revision != 0 AND (row.revision, row.state) != (part.revision, part.state))) \
    + (SELECT count() FROM (SELECT DISTINCT upstream, window_start FROM segment_costs WHERE (upstream, window_start) NOT IN \
       (SELECT upstream, window_start FROM ledger_windows)))";

impl Database {
    pub async fn run(&self, sql: &str) {
        let query = self
            .client
            .query_raw(sql)
            .with_setting("lightweight_deletes_sync", "2");
        query
            .execute()
            .await
            .unwrap_or_else(|error| panic!("{sql}: {error}"));
    }

    pub async fn strings(&self, sql: &str) -> Vec<String> {
        let rows = self.client.query_raw(sql).fetch_all::<String>().await;
        rows.unwrap_or_else(|error| panic!("{sql}: {error}"))
    }

    /// A query that gives one number, which is not negative.
    pub async fn number(&self, sql: &str) -> u64 {
        let found = self
            .strings(&format!("SELECT assumeNotNull(toString(({sql})))"))
            .await;
        found[0].parse().unwrap_or_else(|_| panic!("{sql}: {found:?}"))
    }

    async fn insert(&self, table: &str, rows: impl Iterator<Item = Value>) {
        let rows: Vec<String> = rows.map(|row| row.to_string()).collect();
        for part in rows.chunks(500) {
            self.run(&format!(
                "INSERT INTO {table} FORMAT JSONEachRow {}",
                part.join("\n")
            ))
            .await;
        }
    }

    /// Stores segments, of the gateway that is named for each event.
    pub async fn store_segments(&self, segments: &[Segment], gateway: impl Fn(&str) -> &'static str) {
        let row = |segment: &Segment| {
            json!({
                "window_start": Window::at(segment.run.from()).start().0 / SECOND_US, "upstream": "chat", "event_id": segment.event_id,
                "team_id": segment.account.team_id, "project": segment.account.project, "model": segment.account.model,
                "run_start": segment.run.from().0, "run_end": segment.run.to().0, "prompt_tokens": segment.work.prompt_tokens,
                "cached_tokens": segment.work.cached_tokens, "completion_tokens": segment.work.completion_tokens,
                "kv_token_seconds": segment.work.kv_token_us as f64 / 1e6, "gateway_id": gateway(&segment.event_id)
            })
        };
        self.insert("request_segments", segments.iter().map(row)).await;
    }

    pub async fn store_scrapes(&self, scrapes: &[Scraped]) {
        let row = |scraped: &Scraped| {
            json!({
                "scraped_at": scraped.at_ms, "gateway_id": scraped.gateway, "upstream": "chat", "model": "m", "ok": true, "engines": 1,
                "running": scraped.running, "prompt_tokens_total": 0, "generation_tokens_total": scraped.completion_tokens
            })
        };
        self.insert("vllm_system_metrics", scrapes.iter().map(row)).await;
    }

    fn yaml(&self, id: &str, more: &str, price: &str) -> String {
        let price = if price.is_empty() {
            String::new()
        } else {
            format!(", {price}")
        };
        format!(
            "gateway: {{id: {id}}}\nupstreams:\n  - {{name: chat, url: \"http://127.0.0.1:1\", serves: generate{price}}}\n\
             store: {{url: \"http://{}\", database: {}, raw_days: 10000, ledger_days: 10000}}\n{more}",
            self.addr, self.name
        )
    }

    /// The bookkeeper of a gateway; `more` is further YAML.
    pub fn bookkeeper(&self, id: &str, more: &str) -> Bookkeeper {
        self.bookkeeper_with(id, more, "")
    }

    /// The same, with a price for its upstream.
    pub fn bookkeeper_with(&self, id: &str, more: &str, price: &str) -> Bookkeeper {
        let yaml = self.yaml(id, more, price);
        let config = Config::parse("test.yaml", &yaml, &|_| None).unwrap_or_else(|error| panic!("{error}"));
        Bookkeeper::of(&config).expect("it keeps rows")
    }

    /// Writes the config of [`Database::command`].
    pub fn configure(&self, more: &str, price: &str) {
        std::fs::write(self.dir.join("config.yaml"), self.yaml("me", more, price)).expect("a file");
    }

    /// Runs `vllm-gateway ledger`: its exit code, and what it says on standard output and standard error.
    pub fn command(&self, arguments: &[&str]) -> (Option<i32>, String, String) {
        let output = Command::new(env!("CARGO_BIN_EXE_vllm-gateway"))
            .args(["ledger", "--config", "config.yaml"])
            .args(arguments)
            .current_dir(&self.dir)
            .env_clear()
            .stdin(Stdio::null())
            .output()
            .expect("the program starts");
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        (output.status.code(), text(&output.stdout), text(&output.stderr))
    }

    /// The bill: every row that says anything, but for its revision and state.
    pub async fn ledger(&self) -> Vec<String> {
        self.strings(
            "SELECT toString((window_start, upstream, team_id, project, model, busy_us, prompt_tokens, completion_tokens, cost_nano_usd, method)) AS row \
             FROM cost_ledger FINAL WHERE cost_nano_usd != 0 OR busy_us != 0 OR prompt_tokens != 0 OR completion_tokens != 0 ORDER BY row",
        )
        .await
    }

    /// What each segment cost.
    pub async fn items(&self) -> Vec<String> {
        self.strings(
            "SELECT toString((window_start, upstream, event_id, team_id, project, model, busy_us, cost_nano_usd)) AS row FROM segment_costs FINAL \
             WHERE (window_start, event_id) IN (SELECT window_start, event_id FROM request_segments) OR cost_nano_usd != 0 ORDER BY row",
        )
        .await
    }

    /// Whether all statements are whole.
    pub async fn is_whole(&self) -> bool {
        self.number(CROOKED).await == 0
    }

    /// Whether all statements are whole, and say what their segments say.
    pub async fn check(&self) {
        assert_eq!(
            self.number(CROOKED).await,
            0,
            "statements that do not fit together"
        );
        for (what, of_rows) in [
            ("completion_tokens", "completion_tokens"),
            ("prompt_tokens", "prompt_tokens"),
        ] {
            let booked = self
                .number(&format!(
                    "SELECT sum({of_rows}) FROM cost_ledger FINAL WHERE NOT startsWith(team_id, '__')"
                ))
                .await;
            let known = self
                .number(&format!("SELECT sum({what}) FROM request_segments FINAL"))
                .await;
            assert_eq!(booked, known, "{what}");
        }
    }
}
