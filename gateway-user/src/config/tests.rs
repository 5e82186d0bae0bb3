//! The config as a whole: what a user writes, and what they are told.

use std::{collections::HashMap, ffi::OsString, path::PathBuf, time::Duration};

use proptest::prelude::*;

use super::token::{TokenDigest, TokenScope};
use super::*;
use crate::identity::TeamId;
use crate::ledger::{Micros, Millionths, NanoUsd, PerMillion, Price, Rate};

const SHIPPED: &str = include_str!("../../../config.yaml");

fn no_env(_: &str) -> Option<OsString> {
    None
}

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse("c.yaml", text, &no_env)
}

fn with_env(text: &str, variables: &[(&str, &str)]) -> Result<Config, ConfigError> {
    let variables: HashMap<String, OsString> = variables
        .iter()
        .map(|(name, value)| ((*name).to_owned(), OsString::from(value)))
        .collect();
    Config::parse("c.yaml", text, &|name| variables.get(name).cloned())
}

/// Checks that a text is refused with one problem, whose message begins and ends as stated.
#[track_caller]
fn check_refused(text: &str, starts: &str, ends: &str) {
    let message = parse(text).expect_err("it was accepted").to_string();
    assert!(
        message.starts_with(starts) && message.ends_with(ends),
        "{text}\n gives: {message}"
    );
}

#[test]
fn nothing_said_is_the_defaults() {
    for text in [
        "",
        "# nothing\n",
        "gateway:\nproxy: ~\nupstreams:\nstore:\n  password:\n  # username: x\n",
    ] {
        assert_eq!(parse(text).unwrap(), Config::default(), "{text:?}");
    }
    assert_eq!(Config::load(None, &no_env).unwrap(), Config::default());
}

#[test]
fn the_shipped_file_states_the_defaults() {
    assert_eq!(parse(SHIPPED).unwrap(), Config::default());
}

#[test]
fn the_shipped_file_mentions_every_key_and_variable() {
    let defaults: serde_yaml::Value = serde_yaml::from_str(&effective_yaml(&Config::default())).unwrap();
    let mut section = "";
    let mut mentioned = Vec::new();
    for line in SHIPPED.lines() {
        // A key that is commented out stands behind `# ` and is followed by its value or by nothing.
        let stated = line
            .trim_start()
            .trim_start_matches("# ")
            .trim_start_matches("- ");
        if let Some((key, _)) = stated.split_once(':').filter(|(key, _)| !key.contains(' ')) {
            if !line.starts_with([' ', '#']) {
                section = key;
            }
            mentioned.push(format!("{section}.{key}"));
        }
    }
    for (section, value) in defaults.as_mapping().unwrap() {
        let section = section.as_str().unwrap();
        for key in keys_of(value).unwrap_or_else(|| vec![section.to_owned()]) {
            let key = format!("{section}.{key}");
            assert!(mentioned.contains(&key), "config.yaml does not mention {key}");
        }
    }
    for variable in env::VARIABLES {
        assert!(
            SHIPPED.contains(variable),
            "config.yaml does not mention {variable}"
        );
    }
}

fn keys_of(value: &serde_yaml::Value) -> Option<Vec<String>> {
    let map = value
        .as_mapping()
        .or_else(|| value.as_sequence()?.first()?.as_mapping())?;
    Some(map.keys().map(|key| key.as_str().unwrap().to_owned()).collect())
}

#[test]
fn every_default_is_valid_text_too() {
    // Defaults are not parsed in the program; here they are, so that none is a value that a file could not state.
    let config = Config::default();
    assert_eq!(parse(&effective_yaml(&config)).unwrap(), config);
}

#[test]
fn a_file_sets_what_it_says_and_nothing_else() {
    let text = "
gateway: { listen: '127.0.0.1:0', workers: 4, runtime: per_core, id: gw-1, secret: 0123456789abcdef }
capture: proxy+tap
identity: { team_header: X-Cost-Centre, forward_headers: true }
upstreams:
  - { name: a, url: 'http://vllm-a:8000', serves: generate, models: [llama, qwen], max_connections: 9, price: [
      { usd_per_gpu_hour: 3 }, { from: '2026-03-01T06:30:00Z', usd_per_gpu_hour: 1.999999999, gpus: 8, owner: platform }] }
proxy: { inspect_max: 64KiB, abort_drain: 0s, on_uninspectable: reject }
usage: { inject: off }
store: { url: 'https://ch:8443', password: hunter2 }
spool: { dir: /var/spool/gateway, max_bytes: 1GiB, when_full: drop_oldest, fsync: off, segment_bytes: 1MiB, seal_after: 200ms }
ledger: { theta: 0.25, weights: { kv: 0 }, idle: owner }
rates:
  - { model: llama, from: 2026-02-01, usd_per_million: { prompt: 1, completion: 3.25 } }
log: { format: json }
";
    let config = parse(text).unwrap();
    let mut expected = Config {
        capture: Capture::ProxyAndTap,
        ..Config::default()
    };
    expected.gateway.listen = "127.0.0.1:0".parse().unwrap();
    expected.gateway.workers = 4;
    expected.gateway.runtime = RuntimeKind::PerCore;
    expected.gateway.id = Some("gw-1".parse().unwrap());
    expected.gateway.secret = Some(Secret::new("0123456789abcdef"));
    expected.identity.team_header = "X-Cost-Centre".parse().unwrap();
    expected.identity.forward_headers = true;
    let mut upstream = UpstreamConfig::new(
        "a".parse().unwrap(),
        "http://vllm-a:8000".parse().unwrap(),
        Serves::Generate,
    );
    upstream.models = vec!["llama".into(), "qwen".into()];
    upstream.max_connections = 9;
    upstream.price = vec![
        Price {
            usd_per_gpu_hour: NanoUsd(3_000_000_000),
            ..Price::ASSUMED
        },
        Price {
            from: "2026-03-01T06:30:00Z".parse().unwrap(),
            usd_per_gpu_hour: NanoUsd(1_999_999_999),
            gpus: 8,
            owner: Some(TeamId::parse(b"platform").unwrap()),
        },
    ];
    expected.upstreams = vec![upstream];
    expected.proxy.inspect_max = ByteSize::from_kib(64);
    expected.proxy.abort_drain = Duration::ZERO;
    expected.proxy.on_uninspectable = OnUninspectable::Reject;
    expected.usage.inject = Inject::Off;
    expected.store.url = StoreUrl::Server("https://ch:8443".into());
    expected.store.password = Some(Secret::new("hunter2"));
    expected.spool = SpoolConfig {
        dir: PathBuf::from("/var/spool/gateway"),
        max_bytes: ByteSize::from_mib(1024),
        when_full: WhenFull::DropOldest,
        fsync: Fsync::Off,
        segment_bytes: ByteSize::from_mib(1),
        seal_after: Duration::from_millis(200),
        ..SpoolConfig::default()
    };
    expected.ledger.theta = Millionths::new(250_000);
    expected.ledger.weights.kv = Millionths::new(0);
    expected.ledger.idle = IdleTo::Owner;
    expected.rates = vec![Rate {
        model: Some("llama".to_owned()),
        from: "2026-02-01".parse().unwrap(),
        usd_per_million: PerMillion {
            prompt: NanoUsd(1_000_000_000),
            cached: NanoUsd(1_000_000_000),
            completion: NanoUsd(3_250_000_000),
        },
    }];
    expected.log.format = LogFormat::Json;
    assert_eq!(config, expected);
    assert_eq!(config.gateway.id_or_host_name().as_str(), "gw-1");
}

#[test]
fn prices_and_rates_that_cannot_be_meant_are_refused() {
    let upstream = "upstreams:\n  - name: a\n    url: http://a:1\n    serves: generate\n    price:\n";
    let one = |price: &str| format!("{upstream}      - {price}\n");
    check_refused(
        &one("{ usd_per_gpu_hour: -2 }"),
        "c.yaml:6: `upstreams[0].price[0].usd_per_gpu_hour`: expected an amount in USD such as 2.50, found `-2`",
        "not negative",
    );
    check_refused(
        &one("{ gpus: 2 }"),
        "c.yaml:6: `upstreams[0].price[0].usd_per_gpu_hour` is missing",
        "2.50",
    );
    check_refused(
        &one("{ usd_per_gpu_hour: 20000 }"),
        "c.yaml:5: `upstreams[0].price`: expected at most 10000 USD",
        "found 20000",
    );
    check_refused(
        &one("{ usd_per_gpu_hour: 2, from: 2026-02-30 }"),
        "c.yaml:6: `upstreams[0].price[0].from`: expected a date, found `2026-02-30`",
        "2026-01-31T12:30:00Z",
    );
    check_refused(
        &one("{ usd_per_gpu_hour: 2, owner: __idle__ }"),
        "c.yaml:6: `upstreams[0].price[0].owner`: expected the name of a team",
        "found \"__idle__\"",
    );
    check_refused(
        &one("{ usd_per_gpu_hour: 2 }\n      - { usd_per_gpu_hour: 3 }"),
        "c.yaml:5: `upstreams[0].price`: two prices hold from 1970-01-01",
        "leave one of them out",
    );
    check_refused(
        "ledger: { theta: 1.5 }\n",
        "c.yaml:1: `ledger.theta`: expected a share, from 0 to 1, found 1.5",
        "",
    );
    check_refused(
        "rates:\n  - { usd_per_million: { prompt: 1, completion: 1.0000000001 } }\n",
        "c.yaml:2: `rates[0].usd_per_million.completion`: expected an amount",
        "at most 9 digits behind the point",
    );
    check_refused(
        "rates:\n  - model: x\n",
        "c.yaml:2: `rates[0].usd_per_million` is missing",
        "prompt and completion",
    );
}

#[test]
fn unknown_keys_have_their_line_and_the_nearest_known_key() {
    check_refused(
        "\ngatway: {}\n",
        "c.yaml:2: unknown key `gatway`",
        "did you mean `gateway`?",
    );
    check_refused(
        "gateway:\n  workers: 1\n  lisen: x\n",
        "c.yaml:3: unknown key `gateway.lisen`",
        "`listen`?",
    );
    check_refused(
        "upstreams:\n  - name: a\n    url: http://a:1\n    serves: generate\n    model: [x]\n",
        "c.yaml:5: unknown key `upstreams[0].model`",
        "did you mean `models`?",
    );
    check_refused(
        "log:\n\n  colour: 1\n",
        "c.yaml:3: unknown key `log.colour`",
        "known here: level, format",
    );
    check_refused(
        "log: {<<: {level: info}}\n",
        "c.yaml:1: unknown key `log.<<`",
        "level, format",
    );
}

#[test]
fn rows_are_kept_for_no_longer_than_clickhouse_can_count() {
    check_refused(
        "store: {raw_days: 20001}\n",
        "c.yaml:1: `store.raw_days`: expected 1 to 20000 days, found 20001",
        "",
    );
    check_refused(
        "store: {ledger_days: 0}\n",
        "c.yaml:1: `store.ledger_days`: expected 1 to 20000 days, found 0",
        "",
    );
}

#[test]
fn a_key_given_twice_is_refused_at_the_second_place() {
    check_refused(
        "capture: auto\nlog: {}\ncapture: proxy\n",
        "c.yaml:3: key `capture`",
        "c.yaml:1: remove one",
    );
    check_refused(
        "proxy:\n  max_head: 1KiB\n  max_head: 2KiB\n",
        "c.yaml:3: key `proxy.max_head` was already given at c.yaml:2",
        "",
    );
}

#[test]
fn bad_values_have_their_line_what_was_expected_and_what_was_found() {
    check_refused(
        "proxy:\n  head_timeout: 30\n",
        "c.yaml:2: `proxy.head_timeout`: expected a duration such as 200ms, 15s, 5m or 1h, found `30`: ",
        "a number needs its unit, for example \"15s\"",
    );
    check_refused(
        "proxy:\n\n  max_body: 4096\n",
        "c.yaml:3: `proxy.max_body`: expected a size",
        "\"4MiB\"",
    );
    check_refused(
        "proxy: {max_body: 4MB}",
        "c.yaml:1: ",
        "found `4MB`: the units are B, KiB, MiB, GiB, TiB",
    );
    check_refused(
        "gateway:\n  workers: many\n",
        "c.yaml:2: `gateway.workers`",
        "from 0 to 4294967295",
    );
    check_refused(
        "gateway:\n  workers: -1\n",
        "c.yaml:2: `gateway.workers`",
        "from 0 to 4294967295",
    );
    check_refused(
        "gateway:\n  workers: '4'\n",
        "c.yaml:2: `gateway.workers`",
        "write it without quotes",
    );
    check_refused(
        "gateway:\n  id: 12\n",
        "c.yaml:2: `gateway.id`: expected a name, found `12`",
        "put it in quotes",
    );
    check_refused(
        "gateway:\n  listen: 8080\n",
        "c.yaml:2: `gateway.listen`",
        "put it in quotes",
    );
    check_refused(
        "gateway:\n  listen: localhost:8080\n",
        "c.yaml:2: `gateway.listen`",
        "cannot be left out",
    );
    check_refused(
        "identity:\n  forward_headers: yes\n",
        "c.yaml:2: ",
        "found `yes`: no other word is understood",
    );
    check_refused(
        "capture: proxi\n",
        "c.yaml:1: `capture`: expected one of auto, proxy,",
        "did you mean `proxy`?",
    );
    check_refused(
        "capture: [auto]\n",
        "c.yaml:1: `capture`: expected one of",
        "found a list: one value is needed",
    );
    check_refused(
        "gateway: 1\n",
        "c.yaml:1: `gateway`: expected a section",
        "found `1`",
    );
    check_refused("- a\n", "c.yaml:1: the file: expected a section", "found a list");
    check_refused(
        "log: {}\nupstreams: {}\n",
        "c.yaml:2: `upstreams`: expected a list, found a section",
        "",
    );
}

#[test]
fn bad_values_deep_in_a_list_have_their_line() {
    let upstream = "upstreams:\n  - {name: a, url: 'http://a:1', serves: generate}\n  - name: b\n";
    check_refused(
        &format!("{upstream}    url: https://b:1\n    serves: generate\n"),
        "c.yaml:4: `upstreams[1].url`: expected an address such as http://127.0.0.1:8000, found `https://b:1`: TLS",
        "give its http:// address",
    );
    check_refused(
        &format!("{upstream}    url: http://b:1/v1\n    serves: embeddings\n"),
        "c.yaml:4: `upstreams[1].url`",
        "the path is taken from each request",
    );
    check_refused(
        &format!("{upstream}    url: http://b:1\n    serves: generate\n    models:\n      - x\n      - 3\n"),
        "c.yaml:8: `upstreams[1].models[1]`: expected a text, found `3`",
        "put it in quotes",
    );
    check_refused(
        &format!("{upstream}    serves: generate\n"),
        "c.yaml:3: `upstreams[1].url` is missing: expected an address",
        "8000",
    );
    check_refused(
        "upstreams:\n  - a\n",
        "c.yaml:2: `upstreams[0]`: expected a section",
        "found `a`",
    );
}

#[test]
fn settings_that_do_not_fit_each_other_are_refused_at_the_line_that_says_so() {
    check_refused(
        "proxy:\n  max_body: 1MiB\n  inspect_max: 2MiB\n",
        "c.yaml:3: `proxy.inspect_max`: expected at most proxy.max_body, 1MiB, found 2MiB",
        "",
    );
    check_refused(
        "proxy:\n  max_body: 1MiB\n",
        "built-in default: `proxy.inspect_max`",
        "found 4MiB",
    );
    check_refused(
        "proxy:\n  idle_timeout: 0s\n",
        "c.yaml:2: `proxy.idle_timeout`",
        "found 0s",
    );
    check_refused(
        "metrics:\n  emit_interval: 0ms\n",
        "c.yaml:2: `metrics.emit_interval`",
        "found 0s",
    );
    check_refused(
        "metrics:\n  max_teams: 0\n",
        "c.yaml:2: `metrics.max_teams`",
        "found 0",
    );
    check_refused(
        "proxy:\n  max_head: 100B\n",
        "c.yaml:2: `proxy.max_head`: expected 1KiB to 1MiB, found 100B",
        "",
    );
    check_refused(
        "proxy:\n  max_connections: 0\n",
        "c.yaml:2: `proxy.max_connections`",
        "nobody could connect",
    );
    check_refused(
        "gateway:\n  workers: 5000\n",
        "c.yaml:2: `gateway.workers`",
        "0 is one a core",
    );
    check_refused(
        "admin:\n  listen: 127.0.0.1:8080\n",
        "c.yaml:2: `admin.listen`",
        "another port",
    );
    check_refused(
        "upstreams: []\n",
        "c.yaml:1: `upstreams`: expected at least one",
        "default ones",
    );
    check_refused(
        "store:\n  database: a-b\n",
        "c.yaml:2: `store.database`",
        "found `a-b`",
    );
    check_refused(
        "identity:\n  trust_headers: false\n",
        "c.yaml:2: `identity.trust_headers`: false",
        "leave it true",
    );
    check_refused(
        "identity:\n  user_header: x-team-id\n",
        "c.yaml:2: `identity.user_header`",
        "its own header",
    );
    check_refused(
        "identity:\n  team_header: Connection\n",
        "c.yaml:2: `identity.team_header`",
        "another header",
    );
    check_refused(
        "identity:\n  team_header: X-Gateway-Request-Id\n",
        "c.yaml:2: ",
        "another header",
    );
    check_refused(
        "identity:\n  team_header: X Team\n",
        "c.yaml:2: ",
        "a header name is letters, digits and any of !#$%&'*+-.^_`|~",
    );
}

#[test]
fn upstreams_that_do_not_fit_each_other_are_refused() {
    let list = |items: &[&str]| format!("upstreams:\n  - {}\n", items.join("\n  - "));
    let first = "{name: a, url: 'http://a:1', serves: generate}";
    let same_name = list(&[first, "{name: a, url: 'http://b:1', serves: generate}"]);
    check_refused(
        &same_name,
        "c.yaml:3: `upstreams[1].name`: `a` is the name of an earlier upstream",
        "",
    );
    let same_url = list(&[first, "{name: b, url: 'http://a:1/', serves: generate}"]);
    check_refused(
        &same_url,
        "c.yaml:3: `upstreams[1].url`: http://a:1 is upstream `a` already",
        "",
    );
    let looping = list(&["{name: a, url: 'http://localhost:8080', serves: generate}"]);
    check_refused(
        &looping,
        "c.yaml:2: `upstreams[0].url`: http://localhost:8080 leads back",
        "(gateway.listen)",
    );
    let health = list(&["{name: a, url: 'http://a:1', serves: generate, health_path: health}"]);
    check_refused(&health, "c.yaml:2: `upstreams[0].health_path`", "found `health`");
    let models = list(&["{name: a, url: 'http://a:1', serves: generate, models: [x, x]}"]);
    check_refused(
        &models,
        "c.yaml:2: `upstreams[0].models[1]`: `x` stands",
        "already",
    );
    // One server may do both, as the simulator does.
    assert!(
        parse(&list(&[
            first,
            "{name: b, url: 'http://a:1', serves: embeddings}"
        ]))
        .is_ok()
    );
}

#[test]
fn all_problems_come_at_once_in_the_files_order() {
    let Err(ConfigError::Invalid(problems)) = with_env(
        "capture: x\nproxy:\n  foo: 2\n  max_body: 1\n",
        &[("GATEWAY_WORKERS", "x")],
    ) else {
        panic!("it was accepted");
    };
    let places: Vec<String> = problems.iter().map(|problem| problem.place.to_string()).collect();
    assert_eq!(
        places,
        [
            "c.yaml:1",
            "c.yaml:3",
            "c.yaml:4",
            "environment variable GATEWAY_WORKERS"
        ]
    );
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let missing = PathBuf::from("no/such/config.yaml");
    let message = Config::load(Some(&missing), &no_env).unwrap_err().to_string();
    assert!(
        message.starts_with("cannot read the config file no/such/config.yaml: "),
        "{message}"
    );
    check_refused("a: [\n", "c.yaml:2: not a config: ", "");
}

#[test]
fn the_environment_wins_over_the_file() {
    let text = "gateway: {workers: 2, listen: '127.0.0.1:1'}\nstore: {url: 'http://a:1', username: b}\n";
    let config = with_env(
        text,
        &[
            ("GATEWAY_LISTEN_ADDR", ":8081"),
            ("GATEWAY_ADMIN_ADDR", "[::1]:9000"),
            ("GATEWAY_WORKERS", "7"),
            ("GATEWAY_CAPTURE", "proxy"),
            ("GATEWAY_SECRET", "0123456789abcdef"),
            ("SPOOL_DIR", "/data/spool"),
            ("VLLM_METRICS_SCRAPE_INTERVAL", "5s"),
            ("CLICKHOUSE_URL", "http://ch:8123"),
            ("CLICKHOUSE_DATABASE", "db"),
            ("CLICKHOUSE_USERNAME", ""),
            ("CLICKHOUSE_PASSWORD", "hunter2"),
            ("METRICS_EMIT_INTERVAL", "1m"),
        ],
    )
    .unwrap();
    let mut expected = Config {
        capture: Capture::Proxy,
        ..Config::default()
    };
    expected.gateway.listen = "0.0.0.0:8081".parse().unwrap();
    expected.admin.listen = "[::1]:9000".parse().unwrap();
    expected.gateway.workers = 7;
    expected.gateway.secret = Some(Secret::new("0123456789abcdef"));
    expected.spool.dir = PathBuf::from("/data/spool");
    expected.vllm.scrape_interval = Duration::from_secs(5);
    expected.store.url = StoreUrl::Server("http://ch:8123".into());
    expected.store.database = "db".into();
    expected.store.username = Some("b".into());
    expected.store.password = Some(Secret::new("hunter2"));
    expected.metrics.emit_interval = Duration::from_secs(60);
    assert_eq!(config, expected);
}

#[test]
fn the_environment_adds_a_token_to_those_of_the_file() {
    let digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
    let text = format!("admin: {{tokens: [{{name: a, sha256: {digest}, scope: 'team:a'}}]}}");
    let token = "0123456789abcdef";
    let tokens = with_env(&text, &[("GATEWAY_ADMIN_TOKEN", token)])
        .unwrap()
        .admin
        .tokens;
    assert_eq!(tokens.len(), 2);
    assert_eq!(tokens[1].sha256, TokenDigest::of(token.as_bytes()));
    assert_eq!(tokens[1].scope, TokenScope::Admin);
    assert!(
        with_env("", &[("GATEWAY_ADMIN_TOKEN", "")])
            .unwrap()
            .admin
            .tokens
            .is_empty()
    );
    for wrong in ["0123456789abcde", "0123456789 abcdef", "0123456789abcdeü"] {
        let error = with_env("", &[("GATEWAY_ADMIN_TOKEN", wrong)]).unwrap_err();
        let message = error.to_string();
        assert!(
            message.starts_with("environment variable GATEWAY_ADMIN_TOKEN: ") && message.contains("openssl"),
            "{message}"
        );
        assert!(!format!("{message} {error:?}").contains(wrong), "{message}");
    }
    let twice = with_env(
        &text.replace(
            digest,
            "9f9f5111f7b27a781f1f1ddde5ebc2dd2b796bfc7365c9c28b548e564176929f",
        ),
        &[("GATEWAY_ADMIN_TOKEN", token)],
    );
    let message = twice.unwrap_err().to_string();
    assert!(message.contains("already"), "{message}");
}

#[test]
fn the_program_asks_for_the_documented_variables_and_no_others() {
    let asked = std::cell::RefCell::new(Vec::new());
    let note = |name: &str| {
        asked.borrow_mut().push(name.to_owned());
        None
    };
    Config::parse("c.yaml", "", &note).unwrap();
    assert_eq!(asked.into_inner(), env::VARIABLES);
}

#[test]
fn the_tap_is_told_what_to_watch() {
    let text = "tap: {ports: [8000, 9000], cgroup: 'unit:vllm.service', ring_bytes: 1MiB, ingress_prefix_bytes: 4KiB, reattach: false, \
                poll_interval: 1ms}";
    let expected = TapConfig {
        ports: vec![8000, 9000],
        cgroup: CgroupChoice::Unit("vllm.service".into()),
        ring_bytes: ByteSize::from_mib(1),
        ingress_prefix_bytes: ByteSize::from_kib(4),
        reattach: false,
        poll_interval: Duration::from_millis(1),
    };
    assert_eq!(parse(text).unwrap().tap, expected);
    let config = with_env(text, &[("GATEWAY_TAP_CGROUP", "/vllm.slice")]).unwrap();
    assert_eq!(config.tap.cgroup, CgroupChoice::Path("/vllm.slice".into()));
}

#[test]
fn a_tap_that_could_not_work_is_refused() {
    for (setting, reason) in [
        ("ports: [0]", "it must be from 1 to 65535"),
        ("ports: ['80']", "write it without quotes"),
        ("ports: [70000]", "it must be from 1 to 65535"),
        (
            "ring_bytes: 3MiB",
            "expected a power of two from 64KiB to 1GiB, found 3MiB",
        ),
        (
            "ring_bytes: 32KiB",
            "expected a power of two from 64KiB to 1GiB, found 32KiB",
        ),
        ("ingress_prefix_bytes: 100B", "a request's head must fit"),
        ("poll_interval: 0s", "expected more than 0s, found 0s"),
        ("poll_interval: 1s", "the ring would fill up meanwhile"),
    ] {
        let (key, _) = setting.split_once(':').unwrap();
        check_refused(
            &format!("tap: {{{setting}}}"),
            &format!("c.yaml:1: `tap.{key}"),
            reason,
        );
    }
}

fn summary(config: &Config) -> Vec<String> {
    config
        .upstreams
        .iter()
        .map(|up| format!("{} {} {}", up.name, up.url, up.serves))
        .collect()
}

#[test]
fn several_addresses_make_replicas_of_the_first_upstream_of_their_kind() {
    let addresses = [
        ("VLLM_URL", "http://a:1, http://b:2,http://c:3"),
        ("VLLM_EMBEDDINGS_URL", "http://e:1"),
    ];
    let expected = [
        "chat http://a:1 generate",
        "embeddings http://e:1 embeddings",
        "chat-2 http://b:2 generate",
        "chat-3 http://c:3 generate",
    ];
    assert_eq!(summary(&with_env("", &addresses).unwrap()), expected);
}

#[test]
fn replicas_take_over_the_settings_of_their_pattern() {
    let text = "upstreams: [{name: x, url: 'http://x:1', serves: generate, models: [m], max_connections: 5}]";
    let config = with_env(
        text,
        &[
            ("VLLM_URL", "http://a:1,http://b:2"),
            ("VLLM_EMBEDDINGS_URL", "http://e:1"),
        ],
    )
    .unwrap();
    let expected = [
        "x http://a:1 generate",
        "x-2 http://b:2 generate",
        "embeddings http://e:1 embeddings",
    ];
    assert_eq!(summary(&config), expected);
    assert_eq!(
        (
            config.upstreams[1].models.as_slice(),
            config.upstreams[1].max_connections
        ),
        (&["m".to_owned()][..], 5)
    );
    assert!(config.upstreams[2].models.is_empty());
}

#[test]
fn a_bad_variable_is_named() {
    for (variable, value, reason) in [
        ("GATEWAY_LISTEN_ADDR", ":", "expected an IP address"),
        ("GATEWAY_WORKERS", "+4", "expected a whole number, found `+4`"),
        ("VLLM_URL", "http://a:1,", "expected an address"),
        ("VLLM_URL", "http://a:1,http://a:1", "is upstream `chat` already"),
        ("METRICS_EMIT_INTERVAL", "15", "needs its unit"),
        ("METRICS_EMIT_INTERVAL", "0s", "more than 0s"),
        ("GATEWAY_CAPTURE", "ebpf", "expected one of auto"),
    ] {
        let message = with_env("", &[(variable, value)]).unwrap_err().to_string();
        assert!(
            message.starts_with(&format!("environment variable {variable}: ")),
            "{message}"
        );
        assert!(message.contains(reason), "{message}");
    }
}

#[cfg(unix)]
#[test]
fn a_variable_that_is_not_text_is_refused_rather_than_ignored() {
    use std::os::unix::ffi::OsStringExt;
    let env = |name: &str| (name == "SPOOL_DIR").then(|| OsString::from_vec(vec![b'/', 0xff]));
    let message = Config::parse("c.yaml", "", &env).unwrap_err().to_string();
    assert_eq!(
        message,
        "environment variable SPOOL_DIR: expected text in UTF-8, found other bytes"
    );
}

#[test]
fn secrets_are_in_no_output_and_no_message() {
    let text = "gateway: {secret: hunter2-hunter2-hunter2}\nstore: {password: hunter2}\n";
    let config = parse(text).unwrap();
    assert!(!format!("{config:?}{}", effective_yaml(&config)).contains("hunter2"));
    for text in [
        "gateway: {secret: hunter2}",
        "gateway: {secret: [hunter2]}",
        "gateway: {secret: {hunter2: x}}",
        "store: {password: \"hunter2\\n\"}",
        "store: {url: 'http://me:hunter2@ch:8123'}",
        "store: {url: 'http://ch:8123?password=hunter2'}",
        "upstreams: [{name: a, url: 'http://me:hunter2@a:1', serves: generate}]",
    ] {
        let error = parse(text).unwrap_err();
        assert!(!format!("{error} {error:?}").contains("hunter2"), "{error}");
    }
    let error = parse("store: {password: 20240131}").unwrap_err();
    assert!(!error.to_string().contains("20240131"), "{error}");
    for variable in ["GATEWAY_SECRET", "GATEWAY_ADMIN_TOKEN", "CLICKHOUSE_PASSWORD"] {
        let error = with_env("", &[(variable, "hunter2\n")]).unwrap_err();
        assert!(!format!("{error} {error:?}").contains("hunter2"), "{error}");
    }
}

#[test]
fn a_printed_mask_is_not_taken_for_a_secret() {
    let config = parse("store: {password: hunter2}").unwrap();
    let message = parse(&effective_yaml(&config)).unwrap_err().to_string();
    assert!(
        message.contains("`store.password`") && message.contains("the mask"),
        "{message}"
    );
    // But for the secret, it reads back.
    let unmasked = effective_yaml(&config).replace("'***'", "hunter2");
    assert_eq!(parse(&unmasked).unwrap(), config);
}

prop_compose! {
    fn any_upstream()(
        host in "[a-z][a-z0-9-]{0,9}", port in 1u16.., is_generate: bool,
        models in prop::collection::btree_set("[!-~]{1,9}|true|1e3|~|00", 0..4), max_connections: u32,
    ) -> UpstreamConfig {
        let url = format!("http://{host}.test:{port}").parse().unwrap();
        let serves = if is_generate { Serves::Generate } else { Serves::Embeddings };
        let mut upstream = UpstreamConfig::new("replaced".parse().unwrap(), url, serves);
        upstream.models = models.into_iter().collect();
        upstream.max_connections = max_connections;
        upstream
    }
}

proptest! {
    #[test]
    fn what_is_printed_reads_back(
        upstreams in prop::collection::vec(any_upstream(), 1..4),
        id in prop::option::of("[A-Za-z0-9_-]{1,12}|off|1e3|0x1f|null"), dir in "[^\\p{Cc}]{1,20}",
        timeout_ms in 1u64..10_000_000, head_kib in 1u32..=1024, workers in 0u32..=1024,
        prices in prop::collection::vec((0..=Price::PER_GPU_HOUR_MAX.0, 0..=Price::GPUS_MAX), 0..3), kv: u32,
    ) {
        let mut config = Config { upstreams, ..Config::default() };
        for (index, upstream) in config.upstreams.iter_mut().enumerate() {
            upstream.name = format!("up-{index}").parse().unwrap();
            upstream.url = format!("http://{index}-{}:{}", upstream.url.host(), upstream.url.port()).parse().unwrap();
            let price = |(from, (nano, gpus))| Price {
                from: Micros(from * 1_000_000),
                usd_per_gpu_hour: NanoUsd(nano),
                gpus,
                owner: None,
            };
            upstream.price = (index as u64..).zip(prices.iter().copied()).map(price).collect();
        }
        config.gateway.id = id.map(|id| id.parse().unwrap());
        config.gateway.workers = workers;
        config.ledger.weights.kv = Millionths::new(kv);
        config.spool.dir = PathBuf::from(dir);
        config.proxy.head_timeout = Duration::from_millis(timeout_ms);
        config.proxy.max_head = ByteSize::from_kib(head_kib);
        let text = effective_yaml(&config);
        prop_assert_eq!(parse(&text).map_err(|error| format!("{error}\n{text}")), Ok(config));
    }

    #[test]
    fn no_file_panics(text in any::<String>(), lines in prop::collection::vec("(  )?(- )?(gateway|proxy|upstreams|url|x)?(: )?[\\[{\"'&*!|~a0-]?", 0..8)) {
        for text in [text, lines.join("\n")] {
            if let Err(error) = parse(&text) {
                prop_assert!(!error.to_string().is_empty());
            }
        }
    }
}

const DIGEST: &str = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

#[test]
fn tokens_are_known_by_their_digests_which_show_nowhere() {
    let text = format!(
        "admin:\n  tokens:\n    - {{ name: ops, sha256: {DIGEST}, scope: admin }}\n    - {{ name: red, sha256: '{}', scope: 'team:red' }}\n",
        DIGEST.replace('b', "c")
    );
    let config = parse(&text).unwrap();
    let scopes: Vec<String> = config
        .admin
        .tokens
        .iter()
        .map(|token| token.scope.to_string())
        .collect();
    assert_eq!(scopes, ["admin", "team:red"]);
    assert_eq!(config.admin.tokens[0].sha256, TokenDigest::of(b"abc"));
    for shown in [format!("{config:?}"), effective_yaml(&config)] {
        assert!(shown.contains(MASK) && !shown.contains("ba7816bf"), "{shown}");
    }
    let message = parse(&effective_yaml(&config)).unwrap_err().to_string();
    assert!(message.contains("that is the mask"), "{message}");
}

#[test]
fn a_token_that_would_open_the_wrong_thing_is_refused_without_being_quoted() {
    let refused = |entries: &str| {
        parse(&format!("admin:\n  tokens:\n{entries}"))
            .unwrap_err()
            .to_string()
    };
    let entry = |name: &str, sha256: &str, scope: &str| {
        format!("    - {{ name: {name}, sha256: '{sha256}', scope: '{scope}' }}\n")
    };
    let message = refused(&entry("ops", "my-plain-secret", "admin"));
    assert!(
        message.contains("sha256sum") && !message.contains("my-plain-secret"),
        "{message}"
    );
    let message = refused(&(entry("a", DIGEST, "admin") + &entry("b", &DIGEST.to_uppercase(), "team:red")));
    assert!(
        message.contains("c.yaml:4: `admin.tokens[1].sha256`") && message.contains("`a` already"),
        "{message}"
    );
    let message = refused(&(entry("a", DIGEST, "admin") + &entry("a", &DIGEST.replace('b', "c"), "admin")));
    assert!(
        message.contains("`a` is the name of an earlier token"),
        "{message}"
    );
    let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    assert!(refused(&entry("a", empty, "admin")).contains("empty token"));
    for scope in ["everything", "team:", "team:__other__"] {
        assert!(
            refused(&entry("a", DIGEST, scope)).contains("expected admin, or team:NAME"),
            "{scope}"
        );
    }
    let message = refused("    - { name: a, scope: admin }\n");
    assert!(
        message.contains("`admin.tokens[0].sha256` is missing"),
        "{message}"
    );
}
