//! The console in a real browser, under real traffic: its figures are those of `/metrics`, it shows what breaks, and anyone can read it.
//!
//! Without Chromium, Python or its registry the test fails: to leave it out on purpose, set `VLLM_GATEWAY_SKIP_BROWSER=1`. Pictures are
//! left in `target/console/`.

mod browser;
mod support;

use browser::Browser;
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use support::{Sim, TestGateway, eventually, metric_sum};

const SKIP: &str = "VLLM_GATEWAY_SKIP_BROWSER";

/// The package that has axe-core in it, and nothing else that is used.
const AXE: &str = "axe-playwright-python==0.1.8";

/// What teams may be charged; some part of it is spent in the few seconds of this test. The sixth team has no budget.
const BUDGETS: [(&str, &str); 5] = [
    ("team-1", "0.005"),
    ("team-2", "0.003"),
    ("team-3", "0.004"),
    ("team-4", "0.001"),
    ("team-5", "0.004"),
];

/// Traffic; it ends with its handle.
struct Load(Child);

impl Load {
    fn start(gateway: &TestGateway, options: &[&str]) -> Load {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vllm-load"));
        command
            .args([
                "--url",
                &gateway.url(),
                "--model",
                "tiny",
                "--no-progress",
                "--endpoints",
                "chat=1",
            ])
            .args(options)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        Load(command.spawn().expect("the load starts"))
    }

    fn ends(mut self) {
        assert!(self.0.wait().expect("our own process").success());
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_console_in_a_browser() {
    if std::env::var_os(SKIP).is_some_and(|value| value == "1") {
        eprintln!("not run: {SKIP}=1");
        return;
    }
    let axe = axe();
    let mut browser = Browser::start();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    under_traffic(&mut browser, &runtime, &axe);
    two_hundred_teams(&mut browser, &runtime, &axe);
    let unexpected = &browser.complaints;
    assert!(unexpected.is_empty(), "the page complains: {unexpected:#?}");
    with_a_token(&mut browser, &axe);
}

fn console(gateway: &TestGateway) -> String {
    format!("http://{}/", gateway.admin)
}

/// A cell of a row in a table, as text.
fn cell(table: &str, row: &str, field: &str) -> String {
    format!(
        "([...document.querySelectorAll('#{table} tbody tr')].find((row) => row.cells[0].textContent === '{row}')\
         ?.querySelector('[data-field={field}]').textContent ?? '')"
    )
}

fn under_traffic(browser: &mut Browser, runtime: &tokio::runtime::Runtime, axe: &str) {
    let chat = Sim::start(&["--model", "tiny", "--step-base-us", "4000"]);
    let other = Sim::start(&["--model", "tiny", "--step-base-us", "4000"]);
    let gateway = TestGateway::start(&format!(
        "upstreams:\n  - {{name: chat-1, url: \"http://{}\", serves: generate}}\n  - {{name: chat-2, url: \"http://{}\", serves: generate}}\n\
         vllm: {{scrape_interval: 500ms}}\n\
         limits:\n  teams:\n{}",
        chat.addr,
        other.addr,
        BUDGETS
            .map(|(team, usd)| format!("    - {{team: {team}, budget: {{usd: {usd}, at_limit: observe}}}}\n"))
            .concat()
    ));
    browser.resize(1280, 1000, 1.0, false);
    browser.prefer("light");
    browser.open(&console(&gateway));
    browser.until("what to do first", "!document.getElementById('first').hidden");
    axe_finds_nothing(browser, axe, "before the first request");

    let load = Load::start(
        &gateway,
        &[
            "--duration",
            "8s",
            "--concurrency",
            "24",
            "--teams",
            "6",
            "--team-weights",
            "9,5,3,2,1,1",
            "--stream-fraction",
            "0.7",
            "--abort-fraction",
            "0.04",
            "--output-tokens",
            "20..160",
        ],
    );
    browser.until(
        "teams while requests run",
        "document.querySelectorAll('#team-table tbody tr').length === 6",
    );
    browser.until(
        "an upstream that is busy",
        &format!(
            "{}.includes('running')",
            cell("upstream-table", "chat-1", "condition")
        ),
    );
    browser.until(
        "enough of a minute to look at",
        "document.querySelectorAll('#request-table tbody tr').length === 40",
    );
    // What is seen by somebody who has let it run for some seconds.
    browser.until("a line that moves", "[...document.querySelectorAll('.spark path')].some((path) => (path.getAttribute('d').match(/19\\.0L/g) || []).length < 57)");
    pictures(browser);
    axe_finds_nothing(browser, axe, "light");
    browser.prefer("dark");
    axe_finds_nothing(browser, axe, "dark");
    browser.prefer("light");
    load.ends();
    figures_are_those_of_the_metrics(browser, runtime, &gateway);

    costs_stand_beside_the_books(browser, axe);
    budgets_are_those_of_the_metrics(browser, runtime, &gateway, axe);

    drop(other);
    let seen = browser.until(
        "the killed upstream",
        &format!(
            "{}.includes('down')",
            cell("upstream-table", "chat-2", "condition")
        ),
    );
    assert!(seen < Duration::from_secs(5), "it took {seen:?}");
    let verdict = browser.value("document.getElementById('verdict-title').textContent");
    assert_eq!(verdict, "Upstream chat-2 is down");
    assert_eq!(
        browser.value("document.getElementById('announce').textContent"),
        verdict,
        "and it is said aloud"
    );
    assert_eq!(browser.value("document.title"), "✕ Upstream chat-2 is down");
    eprintln!("a killed upstream showed after {seen:?}");
    axe_finds_nothing(browser, axe, "with an upstream down");

    // The switch wins over the system's choice, and a gateway that is gone is no calm gateway.
    browser.value("(() => { const theme = document.getElementById('theme'); theme.value = 'dark'; theme.dispatchEvent(new Event('change')); })()");
    assert_eq!(
        browser.value("getComputedStyle(document.body).backgroundColor"),
        "rgb(16, 18, 20)"
    );
    browser.value("localStorage.clear()");
    drop(gateway);
    browser.until(
        "staleness",
        "document.getElementById('connection').dataset.state === 'stale'",
    );
    assert!(
        browser
            .value("document.getElementById('announce').textContent")
            .as_str()
            .expect("a text")
            .contains("stale")
    );
    // The requests that fail meanwhile are the browser's to report, and right.
    browser
        .complaints
        .retain(|complaint| !complaint.contains("net::ERR_"));
}

/// With figures made up, since they take a store: that they are those of `/metrics` is tested where one runs.
fn costs_stand_beside_the_books(browser: &mut Browser, axe: &str) {
    assert_eq!(
        browser.value("document.getElementById('costs').hidden"),
        true,
        "no books are kept"
    );
    browser.value(
        "(() => { document.getElementById('pause').click(); const hour = { from_us: 0, to_us: 3600e6, unattributed_nano_usd: 1e7, loading_nano_usd: 0, \
         down_nano_usd: 2e8, scaled_to_zero_nano_usd: 0 }; renderBooks({ ...state.snapshot.reconciliation, costs: [ \
         { ...hour, upstream: 'chat-1', teams_nano_usd: 29e7, idle_nano_usd: 2e9 }, { ...hour, upstream: 'chat-2', teams_nano_usd: 5e8, idle_nano_usd: 0 }] }); })()",
    );
    for (field, expected) in [
        ("cost", "2.50"),
        ("teams", "0.29"),
        ("idle", "2.00"),
        ("idle_share", "80\u{202f}%"),
        ("unattributed", "0.010"),
        ("away", "0.20"),
    ] {
        assert_eq!(
            browser.value(&cell("cost-table", "chat-1", field)),
            expected,
            "{field}"
        );
    }
    assert_eq!(browser.value(&cell("cost-table", "chat-2", "idle")), "0");
    axe_finds_nothing(browser, axe, "with costs");
    browser.picture(&picture_named("costs"));
    browser.value("document.getElementById('pause').click()");
    browser.until("none again", "document.getElementById('costs').hidden");
}

fn budgets_are_those_of_the_metrics(
    browser: &mut Browser,
    runtime: &tokio::runtime::Runtime,
    gateway: &TestGateway,
    axe: &str,
) {
    let metrics = runtime.block_on(gateway.metrics());
    let bar = |team: &str| {
        format!(
            "[...document.querySelectorAll('#team-table tbody tr')].find((row) => row.cells[0].textContent === '{team}')\
             .querySelector('[data-field=budget] [role=meter]')"
        )
    };
    for (team, _) in BUDGETS {
        let label = format!("team=\"{team}\"");
        let of = |name: &str| metric_sum(&metrics, name, &[&label]);
        let (spent, budget) = (of("gateway_budget_spent_usd"), of("gateway_budget_usd"));
        assert!(spent > 0.0 && budget > 0.0, "{team}: {spent} of {budget}");
        let share = spent / budget * 100.0;
        let now = share.round().min(100.0);
        browser.until(
            &format!("the budget of {team} at {now} %"),
            &format!("{}.getAttribute('aria-valuenow') === '{now}'", bar(team)),
        );
        let width = browser.value(&format!("{}.firstChild.firstChild.style.width", bar(team)));
        let width = width.as_str().and_then(|width| width.strip_suffix('%'));
        let width: f64 = width.and_then(|width| width.parse().ok()).expect("a width");
        assert!(
            (width - share.min(100.0)).abs() < 0.11,
            "{team}: {width} % for {share} %"
        );
        let text = browser.value(&format!("{}.getAttribute('aria-valuetext')", bar(team)));
        let text = text.as_str().expect("a text");
        assert!(text.ends_with(" USD for the month"), "{text}");
    }
    let has_none = format!("{}.hidden", bar("team-6"));
    assert_eq!(browser.value(&has_none), true, "a team without a budget");

    // Made up: one that is nearly spent, and one that is more than spent.
    browser.value(
        "(() => { document.getElementById('pause').click(); const spent = { 'team-1': 0.85, 'team-2': 1.2 }; \
         const teams = state.snapshot.teams.map((team) => ({ ...team, budget: team.team in spent \
         ? { ...team.budget, spent_usd: spent[team.team] * team.budget.usd } : null })); \
         const snapshot = { ...state.snapshot, teams }; renderTeams(snapshot, ''); renderVerdict(snapshot); })()",
    );
    for (team, level, shown, now) in [
        ("team-1", "near", "! 85\u{202f}%", "85"),
        ("team-2", "spent", "✕ 120\u{202f}%", "100"),
    ] {
        assert_eq!(browser.value(&cell("team-table", team, "budget")), shown);
        let bar = bar(team);
        assert_eq!(
            browser.value(&format!("{bar}.getAttribute('aria-valuenow')")),
            now
        );
        let is_marked = format!("{bar}.classList.contains('{level}')");
        assert_eq!(browser.value(&is_marked), true, "{team}");
    }
    let verdict = browser.value("document.getElementById('verdict').innerText");
    let verdict = verdict.as_str().expect("a text");
    assert!(verdict.contains("eam-2 has spent its budget"), "{verdict}");
    for scheme in ["dark", "light"] {
        browser.prefer(scheme);
        axe_finds_nothing(browser, axe, &format!("with budgets spent, {scheme}"));
    }
    browser.value("document.getElementById('pause').click()");
}

fn picture_named(name: &str) -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .parent()
        .expect("the target directory");
    target.join(format!("console/{name}.png"))
}

fn pictures(browser: &mut Browser) {
    for (name, width, height, density, is_phone, scheme) in [
        ("light", 1280, 1000, 1.0, false, "light"),
        ("dark", 1280, 1000, 1.0, false, "dark"),
        ("phone", 390, 844, 2.0, true, "light"),
    ] {
        browser.resize(width, height, density, is_phone);
        browser.prefer(scheme);
        browser.picture(&picture_named(name));
        let overflow = browser.value("document.documentElement.scrollWidth > innerWidth");
        assert_eq!(overflow, false, "the page is wider than the window: {name}");
    }
    browser.resize(1280, 1000, 1.0, false);
    browser.prefer("light");
}

/// Once nothing runs any more, so that both speak of the same requests.
fn figures_are_those_of_the_metrics(
    browser: &mut Browser,
    runtime: &tokio::runtime::Runtime,
    gateway: &TestGateway,
) {
    let metrics = runtime.block_on(eventually("the last request", async || {
        let metrics = gateway.metrics().await;
        (metric_sum(&metrics, "gateway_inflight_requests", &[]) == 0.0).then_some(metrics)
    }));
    for number in 1..=6 {
        let team = format!("team-{number}");
        let label = format!("team=\"{team}\"");
        let requests = metric_sum(&metrics, "gateway_requests_total", &[&label]);
        let tokens = metric_sum(&metrics, "gateway_tokens_total", &[&label, "type=\"prompt\""])
            + metric_sum(&metrics, "gateway_tokens_total", &[&label, "type=\"completion\""]);
        assert!(requests > 0.0 && tokens > 0.0, "{team} had no traffic");
        for (field, expected) in [
            ("requests_total", requests),
            ("tokens_total", tokens),
            ("in_flight", 0.0),
        ] {
            let shown = format!(
                "{}.replace(/\\D/g, '') === '{expected}'",
                cell("team-table", &team, field)
            );
            browser.until(&format!("{field} of {team} to be {expected}"), &shown);
        }
    }
}

fn two_hundred_teams(browser: &mut Browser, runtime: &tokio::runtime::Runtime, axe: &str) {
    let chat = Sim::start(&["--model", "tiny", "--instant"]);
    let gateway = TestGateway::before(chat.addr, None, "");
    let load = Load::start(
        &gateway,
        &[
            "--requests",
            "2500",
            "--concurrency",
            "16",
            "--teams",
            "200",
            "--max-tokens",
            "4",
        ],
    );
    browser.open(&console(&gateway));
    load.ends();
    browser.until(
        "200 teams",
        "document.querySelectorAll('#team-table tbody tr').length === 200",
    );
    let total =
        runtime.block_on(async { metric_sum(&gateway.metrics().await, "gateway_requests_total", &[]) });
    let sum = "[...document.querySelectorAll('#team-table [data-field=requests_total]')].reduce((sum, cell) => sum + Number(cell.textContent.replace(/\\D/g, '')), 0)";
    browser.until("all requests", &format!("{sum} === {total}"));

    browser.value("document.querySelector('#team-table thead button').click()");
    let names = browser
        .value("[...document.querySelectorAll('#team-table tbody th')].map((cell) => cell.textContent)");
    let names: Vec<&str> = names
        .as_array()
        .expect("a list")
        .iter()
        .filter_map(Value::as_str)
        .collect();
    assert!(
        names.is_sorted() && names.len() == 200,
        "sorted by name: {names:?}"
    );
    assert_eq!(
        browser.value("document.querySelector('#team-table th[aria-sort=ascending]').textContent"),
        "Team"
    );

    // A snapshot that changes nothing but lines: rows stay the same nodes, where they are, and it takes no time to speak of.
    let quiet = browser.value(
        "new Promise((done) => { let moved = 0; const body = document.querySelector('#team-table tbody'); \
         const watch = new MutationObserver((changes) => { moved += changes.filter((change) => change.target === body).length; }); \
         watch.observe(body, { childList: true }); \
         const began = performance.now(); render(); const took = performance.now() - began; \
         setTimeout(() => { watch.disconnect(); done({ moved, took }); }, 3600); })",
    );
    eprintln!("200 teams: {quiet}");
    assert_eq!(quiet["moved"], 0, "{quiet}");
    assert!(quiet["took"].as_f64().expect("a number") < 50.0, "{quiet}");

    let filter = |text: &str| {
        format!(
            "(() => {{ const filter = document.getElementById('filter'); filter.value = '{text}'; filter.dispatchEvent(new Event('input')); }})()"
        )
    };
    browser.value(&filter("team-20"));
    assert_eq!(browser.value("[...document.querySelectorAll('#team-table tbody th')].map((cell) => cell.textContent).sort().join()"), "team-20,team-200");
    axe_finds_nothing(browser, axe, "filtered");
    browser.value(&filter(""));
}

fn with_a_token(browser: &mut Browser, axe: &str) {
    let chat = Sim::start(&["--model", "tiny", "--instant"]);
    let digest: String = Sha256::digest(b"the-token-of-team-1")
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let gateway = TestGateway::before(
        chat.addr,
        None,
        &format!(
            "admin: {{tokens: [{{name: one, sha256: \"{digest}\", scope: \"team:team-1\"}}]}}\nlimits: {{default: {{budget: {{usd: 7}}}}}}\n"
        ),
    );
    Load::start(
        &gateway,
        &["--requests", "60", "--teams", "4", "--max-tokens", "4"],
    )
    .ends();
    browser.open(&console(&gateway));
    browser.until(
        "the question for a token",
        "!document.getElementById('sign-in').hidden",
    );
    axe_finds_nothing(browser, axe, "asking for a token");
    let enter = |token: &str| {
        format!(
            "(() => {{ document.getElementById('token').value = '{token}'; document.querySelector('#sign-in button').click(); }})()"
        )
    };
    browser.value(&enter("wrong"));
    browser.until(
        "a refusal",
        "document.getElementById('sign-in-why').textContent.includes('does not know')",
    );
    browser.value(&enter("the-token-of-team-1"));
    browser.until(
        "the team",
        "document.querySelectorAll('#team-table tbody tr').length === 1",
    );
    let text = browser.value("document.body.innerText").to_string();
    assert!(
        text.contains("team-1") && !text.contains("team-2") && !text.contains("team-3"),
        "{text}"
    );
    assert_eq!(
        browser.value(
            "[...document.querySelectorAll('[role=meter]')].map((bar) => bar.getAttribute('aria-label'))"
        ),
        serde_json::json!(["Budget of team-1"]),
        "its own budget and nobody else's"
    );
    assert_eq!(browser.value("document.getElementById('books').hidden"), true);
    assert_eq!(
        browser.value("localStorage.length"),
        0,
        "the token is kept in this tab alone"
    );
    browser
        .complaints
        .retain(|complaint| !complaint.contains("401 (Unauthorized)"));
    assert!(browser.complaints.is_empty(), "{:?}", browser.complaints);
}

/// No rule of WCAG 2.2 A and AA, nor of good practice, that axe knows is broken.
fn axe_finds_nothing(browser: &mut Browser, axe: &str, when: &str) {
    if browser.value("typeof axe") == "undefined" {
        browser.value(&format!("{axe};0"));
    }
    let found = browser.value("axe.run(document).then((found) => ({ passes: found.passes.length, broken: found.violations.map((rule) => [rule.id, rule.help, rule.nodes.map((node) => node.html + ' ' + node.failureSummary).slice(0, 3)]) }))");
    assert_eq!(found["broken"], Value::Array(Vec::new()), "{when}: {found:#}");
    assert!(
        found["passes"].as_u64().expect("a number") > 15,
        "{when}: few rules applied: {found}"
    );
}

/// The text of axe-core; fetched once, through Python's registry, into the target directory.
fn axe() -> String {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .parent()
        .expect("the target directory");
    let folder: PathBuf = target.join("axe");
    let script = folder.join("axe_playwright_python/axe.min.js");
    if let Ok(text) = std::fs::read_to_string(&script) {
        return text;
    }
    let environment = folder.join("environment");
    run(
        Command::new("python3")
            .args(["-m", "venv", "--clear"])
            .arg(&environment),
        "making a virtual environment",
    );
    let mut pip = Command::new(environment.join("bin/python"));
    pip.args([
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        "--timeout",
        "30",
        "--retries",
        "2",
        "--no-deps",
        "--upgrade",
        "--target",
    ])
    .arg(&folder)
    .arg(AXE);
    run(&mut pip, "fetching axe-core");
    std::fs::read_to_string(&script).unwrap_or_else(|error| panic!("{}: {error}", script.display()))
}

fn run(command: &mut Command, what: &str) {
    let needs =
        format!("{what} (this test needs python3 with venv, and its registry; {SKIP}=1 leaves it out)");
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{needs}: {error}"));
    assert!(
        output.status.success(),
        "{needs}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}
