//! Fills the typed [`Config`] from a file's tree and remembers where each value was said.

use std::collections::BTreeMap;

use super::{
    error::{Place, Problem, quote, suggest},
    limits::{BudgetConfig, TeamEntry, TeamLimits},
    schema::{
        AdminToken, Config, GatewayConfig, IdentityConfig, LedgerConfig, ProxyConfig, SpoolConfig,
        UpstreamConfig,
    },
    setting::Setting,
    tap::TapConfig,
    values::{Name, UpstreamUrl},
    words::{AtLimit, BudgetPeriod, Serves},
    yaml::{Document, Node, Scalar},
};
use crate::ledger::{Micros, NanoUsd, PerMillion, Price, Rate};

/// Where settings were said, and what is wrong with them.
pub(super) struct Findings<'a> {
    document: &'a Document<'a>,
    pub(super) problems: Vec<Problem>,
    /// By dotted path, as in `upstreams[0].url`.
    places: BTreeMap<String, Said>,
}

enum Said {
    InFile(Vec<usize>),
    InEnv(&'static str),
}

impl<'a> Findings<'a> {
    pub(super) fn new(document: &'a Document<'a>) -> Self {
        Self {
            document,
            problems: Vec::new(),
            places: BTreeMap::new(),
        }
    }

    /// Reports what is wrong with the setting at a dotted path.
    pub(super) fn refuse(&mut self, path: &str, message: String) {
        let place = match self.places.get(path) {
            Some(Said::InFile(steps)) => self.line(steps),
            Some(Said::InEnv(variable)) => Place::Env(variable),
            None => Place::Default,
        };
        self.problems.push(Problem {
            place,
            message: format!("`{path}`: {message}"),
        });
    }

    /// Reads an environment variable's text into a setting, and reports what cannot be read.
    pub(super) fn read_text<T: Setting>(
        &mut self,
        variable: &'static str,
        path: &str,
        text: &str,
    ) -> Option<T> {
        self.places.insert(path.to_owned(), Said::InEnv(variable));
        match T::from_text(text) {
            Ok(value) => Some(value),
            Err(reason) => {
                let found = if T::may_be_shown(text) {
                    quote(text)
                } else {
                    "a value that is not shown".to_owned()
                };
                self.refuse(
                    path,
                    format!("expected {}, found {found}: {reason}", T::expected()),
                );
                None
            }
        }
    }

    fn line(&self, steps: &[usize]) -> Place {
        Place::Line {
            file: self.document.file().to_owned(),
            line: self.document.line_of(steps),
        }
    }
}

/// Reads the whole file over the defaults.
pub(super) fn read_file(findings: &mut Findings<'_>, config: &mut Config) {
    let root = &findings.document.root;
    if let Some(mut top) = Section::open(findings, String::new(), Vec::new(), root) {
        top.section("gateway", |section| read_gateway(section, &mut config.gateway));
        top.read("capture", &mut config.capture);
        top.section("admin", |section| {
            section.read("listen", &mut config.admin.listen);
            section.sections("tokens", &mut config.admin.tokens, read_token);
        });
        top.section("tap", |section| read_tap(section, &mut config.tap));
        top.section("identity", |section| read_identity(section, &mut config.identity));
        top.sections("upstreams", &mut config.upstreams, read_upstream);
        top.section("proxy", |section| read_proxy(section, &mut config.proxy));
        top.section("usage", |section| {
            section.read("inject", &mut config.usage.inject)
        });
        top.section("metrics", |section| {
            section.read("max_teams", &mut config.metrics.max_teams);
            section.read("emit_interval", &mut config.metrics.emit_interval);
        });
        top.section("vllm", |section| {
            section.read("scrape_interval", &mut config.vllm.scrape_interval)
        });
        top.section("store", |section| {
            section.read("url", &mut config.store.url);
            section.read("database", &mut config.store.database);
            section.read("username", &mut config.store.username);
            section.read("password", &mut config.store.password);
            section.read("cluster", &mut config.store.cluster);
            section.read("raw_days", &mut config.store.raw_days);
            section.read("ledger_days", &mut config.store.ledger_days);
            section.read("embedded_listen", &mut config.store.embedded_listen);
            section.read("embedded_dir", &mut config.store.embedded_dir);
        });
        top.section("spool", |section| read_spool(section, &mut config.spool));
        top.section("ledger", |section| read_ledger(section, &mut config.ledger));
        top.section("reconciliation", |section| {
            section.read("gap_share", &mut config.reconciliation.gap_share);
            section.read("gap_tokens", &mut config.reconciliation.gap_tokens);
            section.read("window", &mut config.reconciliation.window);
        });
        top.sections("rates", &mut config.rates, read_rate);
        top.section("limits", |section| {
            section.read("mode", &mut config.limits.mode);
            section.section("default", |section| {
                config.limits.default = read_limits(section);
            });
            section.sections("teams", &mut config.limits.teams, read_team);
        });
        top.section("log", |section| {
            section.read("level", &mut config.log.level);
            section.read("format", &mut config.log.format);
        });
        top.close();
    }
}

fn read_gateway(section: &mut Section<'_, '_>, gateway: &mut GatewayConfig) {
    section.read("listen", &mut gateway.listen);
    section.read("workers", &mut gateway.workers);
    section.read("runtime", &mut gateway.runtime);
    section.read("id", &mut gateway.id);
    section.read("secret", &mut gateway.secret);
    section.read("drain_timeout", &mut gateway.drain_timeout);
}

fn read_token(section: &mut Section<'_, '_>) -> Option<AdminToken> {
    let (mut name, mut sha256, mut scope) = (None, None, None);
    section.read_required("name", &mut name);
    section.read_required("sha256", &mut sha256);
    section.read_required("scope", &mut scope);
    Some(AdminToken {
        name: name?,
        sha256: sha256?,
        scope: scope?,
    })
}

fn read_tap(section: &mut Section<'_, '_>, tap: &mut TapConfig) {
    section.read_list("ports", &mut tap.ports);
    section.read("cgroup", &mut tap.cgroup);
    section.read("ring_bytes", &mut tap.ring_bytes);
    section.read("ingress_prefix_bytes", &mut tap.ingress_prefix_bytes);
    section.read("reattach", &mut tap.reattach);
    section.read("poll_interval", &mut tap.poll_interval);
}

fn read_identity(section: &mut Section<'_, '_>, identity: &mut IdentityConfig) {
    section.read("team_header", &mut identity.team_header);
    section.read("project_header", &mut identity.project_header);
    section.read("user_header", &mut identity.user_header);
    section.read("trust_headers", &mut identity.trust_headers);
    section.read("forward_headers", &mut identity.forward_headers);
}

fn read_upstream(section: &mut Section<'_, '_>) -> Option<UpstreamConfig> {
    let mut name: Option<Name> = None;
    let mut url: Option<UpstreamUrl> = None;
    let mut serves: Option<Serves> = None;
    section.read_required("name", &mut name);
    section.read_required("url", &mut url);
    section.read_required("serves", &mut serves);
    let (mut models, mut health_path, mut max_connections) = (Vec::new(), None, 0);
    section.read_list("models", &mut models);
    section.read("health_path", &mut health_path);
    section.read("max_connections", &mut max_connections);
    let (mut scale_to_zero, mut external_kv_is_cache) = (false, false);
    section.read("scale_to_zero", &mut scale_to_zero);
    section.read("external_kv_is_cache", &mut external_kv_is_cache);
    let mut price = vec![Price::ASSUMED];
    section.sections("price", &mut price, read_price);
    let mut upstream = UpstreamConfig {
        models,
        max_connections,
        scale_to_zero,
        external_kv_is_cache,
        price,
        ..UpstreamConfig::new(name?, url?, serves?)
    };
    if let Some(path) = health_path {
        upstream.health_path = path;
    }
    Some(upstream)
}

fn read_proxy(section: &mut Section<'_, '_>, proxy: &mut ProxyConfig) {
    section.read("inspect_max", &mut proxy.inspect_max);
    section.read("on_uninspectable", &mut proxy.on_uninspectable);
    section.read("max_body", &mut proxy.max_body);
    section.read("max_head", &mut proxy.max_head);
    section.read("head_timeout", &mut proxy.head_timeout);
    section.read("idle_timeout", &mut proxy.idle_timeout);
    section.read("connect_timeout", &mut proxy.connect_timeout);
    section.read("response_head_timeout", &mut proxy.response_head_timeout);
    section.read("stream_idle_timeout", &mut proxy.stream_idle_timeout);
    section.read("client_write_timeout", &mut proxy.client_write_timeout);
    section.read("upstream_idle", &mut proxy.upstream_idle);
    section.read("abort_drain", &mut proxy.abort_drain);
    section.read("max_connections", &mut proxy.max_connections);
    section.read("allow_admin_routes", &mut proxy.allow_admin_routes);
    section.read("health_interval", &mut proxy.health_interval);
}

fn read_spool(section: &mut Section<'_, '_>, spool: &mut SpoolConfig) {
    section.read("dir", &mut spool.dir);
    section.read("max_bytes", &mut spool.max_bytes);
    section.read("when_full", &mut spool.when_full);
    section.read("fsync", &mut spool.fsync);
    section.read("fsync_interval", &mut spool.fsync_interval);
    section.read("segment_bytes", &mut spool.segment_bytes);
    section.read("seal_after", &mut spool.seal_after);
}

fn read_price(section: &mut Section<'_, '_>) -> Option<Price> {
    let mut price = Price::ASSUMED;
    let mut usd_per_gpu_hour: Option<NanoUsd> = None;
    section.read("from", &mut price.from);
    section.read_required("usd_per_gpu_hour", &mut usd_per_gpu_hour);
    section.read("gpus", &mut price.gpus);
    section.read("owner", &mut price.owner);
    price.usd_per_gpu_hour = usd_per_gpu_hour?;
    Some(price)
}

fn read_ledger(section: &mut Section<'_, '_>, ledger: &mut LedgerConfig) {
    section.read("theta", &mut ledger.theta);
    section.section("weights", |section| {
        section.read("prompt", &mut ledger.weights.prompt);
        section.read("completion", &mut ledger.weights.completion);
        section.read("kv", &mut ledger.weights.kv);
    });
    section.read("idle", &mut ledger.idle);
    section.read("settle_after", &mut ledger.settle_after);
}

fn read_rate(section: &mut Section<'_, '_>) -> Option<Rate> {
    let (mut model, mut from) = (None, Micros(0));
    section.read("model", &mut model);
    section.read("from", &mut from);
    let (mut prompt, mut cached, mut completion): (Option<NanoUsd>, Option<NanoUsd>, Option<NanoUsd>) =
        (None, None, None);
    section.require("usd_per_million", "a section with prompt and completion");
    section.section("usd_per_million", |section| {
        section.read_required("prompt", &mut prompt);
        section.read("cached", &mut cached);
        section.read_required("completion", &mut completion);
    });
    let usd_per_million = PerMillion {
        prompt: prompt?,
        // Who does not say that cached tokens are cheaper charges them like the others.
        cached: cached.or(prompt)?,
        completion: completion?,
    };
    Some(Rate {
        model,
        from,
        usd_per_million,
    })
}

fn read_team(section: &mut Section<'_, '_>) -> Option<TeamEntry> {
    let mut team = None;
    section.read_required("team", &mut team);
    let limits = read_limits(section);
    Some(TeamEntry { team: team?, limits })
}

fn read_limits(section: &mut Section<'_, '_>) -> TeamLimits {
    let mut limits = TeamLimits::default();
    section.read("requests_per_minute", &mut limits.requests_per_minute);
    section.read("tokens_per_minute", &mut limits.tokens_per_minute);
    section.read("concurrent_requests", &mut limits.concurrent_requests);
    section.section("budget", |section| limits.budget = read_budget(section));
    limits
}

fn read_budget(section: &mut Section<'_, '_>) -> Option<BudgetConfig> {
    let (mut usd, mut period, mut at_limit) = (None, BudgetPeriod::Month, AtLimit::Refuse);
    section.read_required("usd", &mut usd);
    section.read("period", &mut period);
    section.read("at_limit", &mut at_limit);
    Some(BudgetConfig {
        usd: usd?,
        period,
        at_limit,
    })
}

/// One map of the file while it is read. Which keys are known is simply which were asked for.
struct Section<'f, 'a> {
    findings: &'f mut Findings<'a>,
    /// Dotted path of this map, empty for the whole file.
    path: String,
    steps: Vec<usize>,
    entries: &'a [(String, Node)],
    known: Vec<&'static str>,
}

impl<'f, 'a> Section<'f, 'a> {
    /// `None` where there is nothing to read: the section is empty, or no section at all, which is reported.
    fn open(findings: &'f mut Findings<'a>, path: String, steps: Vec<usize>, node: &'a Node) -> Option<Self> {
        match node {
            Node::Map(entries) => Some(Self {
                findings,
                path,
                steps,
                entries,
                known: Vec::new(),
            }),
            Node::Scalar(Scalar::Null) => None,
            other => {
                let named = if path.is_empty() {
                    "the file".to_owned()
                } else {
                    format!("`{path}`")
                };
                let message = format!(
                    "{named}: expected a section of `key: value` lines, found {}",
                    describe(other)
                );
                let place = findings.line(&steps);
                findings.problems.push(Problem { place, message });
                None
            }
        }
    }

    /// Reports each key that nobody asked for and each that was said twice.
    fn close(self) {
        for (number, (key, _)) in self.entries.iter().enumerate() {
            let message = if let Some(first) = self.entries[..number]
                .iter()
                .position(|(earlier, _)| earlier == key)
            {
                let first = self.findings.line(&self.steps_to(first));
                format!(
                    "key {} was already given at {first}: remove one",
                    quote(&self.path_of(key))
                )
            } else if !self.known.contains(&key.as_str()) {
                format!(
                    "unknown key {}: {}",
                    quote(&self.path_of(key)),
                    suggest(key, &self.known)
                )
            } else {
                continue;
            };
            let place = self.findings.line(&self.steps_to(number));
            self.findings.problems.push(Problem { place, message });
        }
    }

    fn section(&mut self, key: &'static str, read: impl FnOnce(&mut Section<'_, 'a>)) {
        let Some((number, node)) = self.find(key) else {
            return;
        };
        let (path, steps) = (self.path_of(key), self.steps_to(number));
        if let Some(mut section) = Section::open(self.findings, path, steps, node) {
            read(&mut section);
            section.close();
        }
    }

    /// Reads a list of sections, which takes the place of the default list.
    fn sections<T>(
        &mut self,
        key: &'static str,
        into: &mut Vec<T>,
        mut read: impl FnMut(&mut Section<'_, 'a>) -> Option<T>,
    ) {
        let Some(items) = self.items(key) else { return };
        into.clear();
        for (path, steps, node) in items {
            if let Some(mut section) = Section::open(self.findings, path, steps, node) {
                into.extend(read(&mut section));
                section.close();
            }
        }
    }

    /// Reads a list of plain values.
    fn read_list<T: Setting>(&mut self, key: &'static str, into: &mut Vec<T>) {
        let Some(items) = self.items(key) else { return };
        into.clear();
        for (path, steps, node) in items {
            into.extend(self.setting(path, steps, node));
        }
    }

    /// Reads one value. A key without a value leaves the default.
    fn read<T: Setting>(&mut self, key: &'static str, into: &mut T) {
        let Some((number, node)) = self.find(key) else {
            return;
        };
        if *node != Node::Scalar(Scalar::Null)
            && let Some(value) = self.setting(self.path_of(key), self.steps_to(number), node)
        {
            *into = value;
        }
    }

    /// Reads one value that has no default.
    fn read_required<T: Setting>(&mut self, key: &'static str, into: &mut Option<T>) {
        self.read(key, into);
        self.require(key, &T::expected());
    }

    /// Reports a key that is missing, or has no value.
    fn require(&mut self, key: &'static str, expected: &str) {
        let said = self
            .find(key)
            .is_some_and(|(_, node)| *node != Node::Scalar(Scalar::Null));
        if !said {
            let place = self.findings.line(&self.steps);
            let message = format!("`{}` is missing: expected {expected}", self.path_of(key));
            self.findings.problems.push(Problem { place, message });
        }
    }

    fn setting<T: Setting>(&mut self, path: String, steps: Vec<usize>, node: &Node) -> Option<T> {
        let (found, reason) = match node {
            Node::Scalar(scalar) => match T::from_scalar(scalar) {
                Ok(value) => {
                    self.findings.places.insert(path, Said::InFile(steps));
                    return Some(value);
                }
                Err(reason) if T::may_be_shown(&scalar.to_string()) => (quote(&scalar.to_string()), reason),
                Err(reason) => ("a value that is not shown".to_owned(), reason),
            },
            other => (describe(other), "one value is needed".to_owned()),
        };
        self.findings.places.insert(path.clone(), Said::InFile(steps));
        self.findings.refuse(
            &path,
            format!("expected {}, found {found}: {reason}", T::expected()),
        );
        None
    }

    /// The items of a list, each with its path and its steps. A key without a value leaves the default.
    fn items(&mut self, key: &'static str) -> Option<Vec<(String, Vec<usize>, &'a Node)>> {
        let (number, node) = self.find(key)?;
        let (path, steps) = (self.path_of(key), self.steps_to(number));
        self.findings
            .places
            .insert(path.clone(), Said::InFile(steps.clone()));
        match node {
            Node::Scalar(Scalar::Null) => None,
            Node::List(items) => {
                let item =
                    |(index, node)| (format!("{path}[{index}]"), [&steps[..], &[index]].concat(), node);
                Some(items.iter().enumerate().map(item).collect())
            }
            other => {
                self.findings
                    .refuse(&path, format!("expected a list, found {}", describe(other)));
                None
            }
        }
    }

    /// The first entry of that name; a second one is reported when the section closes.
    fn find(&mut self, key: &'static str) -> Option<(usize, &'a Node)> {
        if !self.known.contains(&key) {
            self.known.push(key);
        }
        let number = self.entries.iter().position(|(name, _)| name == key)?;
        Some((number, &self.entries[number].1))
    }

    fn path_of(&self, key: &str) -> String {
        if self.path.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.path)
        }
    }

    fn steps_to(&self, number: usize) -> Vec<usize> {
        [&self.steps[..], &[number]].concat()
    }
}

fn describe(node: &Node) -> String {
    match node {
        Node::Scalar(scalar) => quote(&scalar.to_string()),
        Node::List(_) => "a list".to_owned(),
        Node::Map(_) => "a section".to_owned(),
    }
}
