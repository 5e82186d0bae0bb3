//! Section `limits`: how much each team may take.

use serde::{Serialize, Serializer};

use super::error::quote;
use super::read::Findings;
use super::schema::Config;
use super::words::{AtLimit, BudgetPeriod, LimitMode};
use crate::identity::TeamId;
use crate::ledger::NanoUsd;

/// Section `limits`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LimitsConfig {
    /// Whether limits are enforced, or only counted. Default `enforce`; without any limit it makes no difference.
    pub mode: LimitMode,
    /// What each team without an entry may take, by itself. Default: as much as it likes.
    pub default: TeamLimits,
    /// Teams with limits of their own, which stand in place of the default as a whole.
    pub teams: Vec<TeamEntry>,
}

/// One entry of `limits.teams`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TeamEntry {
    /// Whose.
    #[serde(serialize_with = "serialize_team")]
    pub team: TeamId,
    /// What it may take.
    #[serde(flatten)]
    pub limits: TeamLimits,
}

/// What one team may take; what is not said is not limited.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct TeamLimits {
    /// Requests that are let in, a minute; as many may come at once after a quiet minute.
    pub requests_per_minute: Option<u32>,
    /// Prompt and completion tokens, a minute; as many may be used at once after a quiet minute.
    pub tokens_per_minute: Option<u32>,
    /// Requests at a time.
    pub concurrent_requests: Option<u32>,
    /// What its requests may be charged by the rate card.
    pub budget: Option<BudgetConfig>,
}

/// What a team's requests may be charged in a period, over all gateways.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct BudgetConfig {
    /// How much.
    pub usd: NanoUsd,
    /// In which time. Default `month`.
    pub period: BudgetPeriod,
    /// What becomes of requests once it is spent. Default `refuse`.
    pub at_limit: AtLimit,
}

impl LimitsConfig {
    /// Most requests a minute: more than a million a second are no limit to anybody.
    pub const REQUESTS_MAX: u32 = 60_000_000;

    /// Most tokens a minute: more than fifty million a second are none either.
    pub const TOKENS_MAX: u32 = 3_000_000_000;

    /// Largest budget. It leaves room in an amount of 64 bits for what is spent beyond it.
    pub const BUDGET_MAX: NanoUsd = NanoUsd(1_000_000_000 * NanoUsd::USD);

    /// Every set of limits, with its path.
    fn all(&self) -> impl Iterator<Item = (String, &TeamLimits)> {
        let teams = self.teams.iter().enumerate();
        let teams = teams.map(|(index, entry)| (format!("limits.teams[{index}]"), &entry.limits));
        std::iter::once(("limits.default".to_owned(), &self.default)).chain(teams)
    }

    /// The budgets in it.
    pub fn budgets(&self) -> impl Iterator<Item = BudgetConfig> {
        self.all().filter_map(|(_, limits)| limits.budget)
    }
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            mode: LimitMode::Enforce,
            default: TeamLimits::default(),
            teams: Vec::new(),
        }
    }
}

impl TeamLimits {
    /// Whether nothing is limited.
    pub fn is_empty(&self) -> bool {
        *self == TeamLimits::default()
    }
}

/// Reports limits that nobody can mean.
pub(super) fn validate(config: &Config, findings: &mut Findings<'_>) {
    let limits = &config.limits;
    for (index, entry) in limits.teams.iter().enumerate() {
        if let Some(first) = limits.teams[..index]
            .iter()
            .position(|other| other.team == entry.team)
        {
            let message = format!(
                "{} has an entry already, limits.teams[{first}]: join the two",
                quote(entry.team.as_str())
            );
            findings.refuse(&format!("limits.teams[{index}].team"), message);
        }
    }
    for (path, of_team) in limits.all() {
        let counts = [
            (
                "requests_per_minute",
                of_team.requests_per_minute,
                LimitsConfig::REQUESTS_MAX,
            ),
            (
                "tokens_per_minute",
                of_team.tokens_per_minute,
                LimitsConfig::TOKENS_MAX,
            ),
            (
                "concurrent_requests",
                of_team.concurrent_requests,
                config.proxy.max_connections,
            ),
        ];
        for (key, count, most) in counts {
            let Some(count) = count else { continue };
            if let Some(message) = why_not(key, count, most) {
                findings.refuse(&format!("{path}.{key}"), message);
            }
        }
        if let Some(budget) = &of_team.budget {
            validate_budget(config, &path, budget, findings);
        }
    }
}

fn why_not(key: &str, count: u32, most: u32) -> Option<String> {
    if count == 0 {
        return Some("expected at least 1, found 0: leave the key out for no limit".to_owned());
    }
    if count <= most {
        return None;
    }
    let bound = match key {
        "concurrent_requests" => format!("proxy.max_connections, {most}"),
        _ => most.to_string(),
    };
    Some(format!(
        "expected at most {bound}, found {count}: it would never be reached; leave the key out for no limit"
    ))
}

fn validate_budget(config: &Config, path: &str, budget: &BudgetConfig, findings: &mut Findings<'_>) {
    let path = format!("{path}.budget.usd");
    if budget.usd == NanoUsd(0) {
        let message = "expected more than 0 USD, found 0: leave the budget out for none";
        findings.refuse(&path, message.to_owned());
    } else if budget.usd > LimitsConfig::BUDGET_MAX {
        let message = format!(
            "expected at most {} USD, found {}",
            LimitsConfig::BUDGET_MAX,
            budget.usd
        );
        findings.refuse(&path, message);
    } else if config.store.raw_days < kept_days(budget.period) {
        let message = format!(
            "a budget by the {} is read from rows that are kept for store.raw_days: expected at least {} there, found {}",
            budget.period,
            kept_days(budget.period),
            config.store.raw_days
        );
        findings.refuse(&path, message);
    } else if config.rates.is_empty() {
        let message = "a budget goes by what requests are charged, and `rates` is empty: give a rate, or leave the budget out";
        findings.refuse(&path, message.to_owned());
    }
}

/// Days that rows must be kept for the longest period, and one more for what is late.
fn kept_days(period: BudgetPeriod) -> u32 {
    match period {
        BudgetPeriod::Day => 2,
        BudgetPeriod::Month => 32,
    }
}

fn serialize_team<S: Serializer>(team: &TeamId, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(team.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::effective_yaml;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse("c.yaml", text, &|_| None).map_err(|error| error.to_string())
    }

    const LIMITS: &str = "
limits:
  mode: observe
  default: { requests_per_minute: 60 }
  teams:
    - team: search
      tokens_per_minute: 100000
      concurrent_requests: 20
      budget: { usd: 499.50, period: day, at_limit: observe }
    - { team: free }
    - { team: ads, budget: { usd: 5 } }
";

    #[test]
    fn an_entry_says_all_that_holds_for_its_team() {
        let config = parse(LIMITS).unwrap();
        assert_eq!(config.limits.mode, LimitMode::Observe);
        assert_eq!(config.limits.default.requests_per_minute, Some(60));
        let [search, free, ads] = &config.limits.teams[..] else {
            panic!("{:?}", config.limits)
        };
        let budget = BudgetConfig {
            usd: NanoUsd(499_500_000_000),
            period: BudgetPeriod::Day,
            at_limit: AtLimit::Observe,
        };
        let expected = TeamLimits {
            requests_per_minute: None,
            tokens_per_minute: Some(100_000),
            concurrent_requests: Some(20),
            budget: Some(budget),
        };
        assert_eq!((search.team.as_str(), &search.limits), ("search", &expected));
        assert!(free.limits.is_empty());
        let budget = ads.limits.budget.unwrap();
        assert_eq!(
            (budget.period, budget.at_limit),
            (BudgetPeriod::Month, AtLimit::Refuse)
        );
        assert_eq!(config.limits.budgets().count(), 2);
        assert_eq!(parse(&effective_yaml(&config)).unwrap(), config);
    }

    #[test]
    fn limits_that_nobody_can_mean_are_refused_at_their_line() {
        for (text, line, said) in [
            (
                "limits:\n  default:\n    requests_per_minute: 0",
                3,
                "`limits.default.requests_per_minute`: expected at least 1, found 0: leave the key out for no limit",
            ),
            (
                "limits:\n  default: {tokens_per_minute: 3000000001}",
                2,
                "expected at most 3000000000, found 3000000001",
            ),
            (
                "limits:\n  teams:\n    - team: a\n      concurrent_requests: 20001",
                4,
                "`limits.teams[0].concurrent_requests`: expected at most proxy.max_connections, 20000, found 20001",
            ),
            (
                "limits:\n  teams:\n    - team: a\n      requests_per_minute: -1",
                4,
                "expected a whole number, found `-1`",
            ),
            (
                "limits:\n  teams:\n    - {team: a}\n    - {team: b}\n    - {team: a}",
                5,
                "`limits.teams[2].team`: `a` has an entry already, limits.teams[0]: join the two",
            ),
            (
                "limits:\n  teams:\n    - requests_per_minute: 1",
                3,
                "`limits.teams[0].team` is missing: expected the name of a team",
            ),
            ("limits:\n  teams:\n    - {team: __other__}", 3, "reserved"),
            (
                "limits:\n  default:\n    budget: {usd: 0}",
                3,
                "`limits.default.budget.usd`: expected more than 0 USD, found 0",
            ),
            (
                "limits:\n  default:\n    budget: {usd: 1000000001}",
                3,
                "expected at most 1000000000 USD, found 1000000001",
            ),
            (
                "limits:\n  default:\n    budget: {period: day}",
                3,
                "`limits.default.budget.usd` is missing",
            ),
            (
                "limits:\n  default:\n    budget: {usd: 1, period: week}",
                3,
                "expected one of day, month, found `week`",
            ),
            (
                "rates: []\nlimits:\n  default:\n    budget: {usd: 1}",
                4,
                "`rates` is empty",
            ),
            (
                "store: {raw_days: 31}\nlimits:\n  default:\n    budget: {usd: 1}",
                4,
                "kept for store.raw_days: expected at least 32 there, found 31",
            ),
            (
                "limits:\n  mode: warn",
                2,
                "expected one of enforce, observe, found `warn`",
            ),
            (
                "limits:\n  default: {request_per_minute: 1}",
                2,
                "requests_per_minute",
            ),
        ] {
            let message = parse(text).unwrap_err();
            assert!(
                message.contains(&format!("c.yaml:{line}: ")) && message.contains(said),
                "{text}\n gives: {message}"
            );
        }
    }
}
