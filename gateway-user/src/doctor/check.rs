//! What a check found, and what the checks together mean.

use serde::Serialize;

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Ok,
    /// It runs, and not as well as it could.
    Warning,
    /// Something does not work.
    Problem,
    /// It could not be found out, or was not to be tried.
    Unknown,
}

impl State {
    /// The word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            State::Ok => "ok",
            State::Warning => "warning",
            State::Problem => "problem",
            State::Unknown => "unknown",
        }
    }
}

/// A part of the gateway that can run or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Part {
    /// What forwards requests.
    Proxy,
    /// The kernel probe.
    Tap,
}

/// One line of the table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What it is about: `host`, `kernel`, `upstream chat`, …
    pub group: String,
    /// What was looked at.
    pub name: &'static str,
    /// How it came out.
    pub state: State,
    /// What was found. It never holds a secret; what a server said is escaped and cut.
    pub found: String,
    /// What to do about it; empty when nothing is to be done.
    pub advice: String,
    /// The part that cannot run because of it.
    pub stops: Option<Part>,
}

impl Check {
    /// As it should be.
    pub fn ok(group: &str, name: &'static str, found: impl Into<String>) -> Check {
        Check::new(State::Ok, group, name, found)
    }

    /// It runs, and not as well as it could.
    pub fn warning(group: &str, name: &'static str, found: impl Into<String>) -> Check {
        Check::new(State::Warning, group, name, found)
    }

    /// Something does not work.
    pub fn problem(group: &str, name: &'static str, found: impl Into<String>) -> Check {
        Check::new(State::Problem, group, name, found)
    }

    /// It could not be found out.
    pub fn unknown(group: &str, name: &'static str, found: impl Into<String>) -> Check {
        Check::new(State::Unknown, group, name, found)
    }

    fn new(state: State, group: &str, name: &'static str, found: impl Into<String>) -> Check {
        Check {
            group: group.to_owned(),
            name,
            state,
            found: found.into(),
            advice: String::new(),
            stops: None,
        }
    }

    /// What to do about it.
    pub fn advise(mut self, advice: impl Into<String>) -> Check {
        self.advice = advice.into();
        self
    }

    /// The part that cannot run because of it.
    pub fn stops(mut self, part: Part) -> Check {
        self.stops = Some(part);
        self
    }
}

/// Whether a part can run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// Nothing was found that stops it.
    pub can_run: bool,
    /// What stops it, a sentence each.
    pub because: Vec<String>,
}

impl Verdict {
    /// What the checks mean for a part.
    pub fn of(part: Part, checks: &[Check]) -> Verdict {
        let because: Vec<String> = checks
            .iter()
            .filter(|check| check.stops == Some(part))
            .map(|check| format!("{}, {}: {}", check.group, check.name, check.found))
            .collect();
        Verdict {
            can_run: because.is_empty(),
            because,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_stopped_by_what_stops_it_and_by_nothing_else() {
        let checks = [
            Check::problem("store", "clickhouse", "it is down"),
            Check::problem("kernel", "capabilities", "none").stops(Part::Tap),
        ];
        assert_eq!(
            Verdict::of(Part::Proxy, &checks),
            Verdict {
                can_run: true,
                because: Vec::new()
            }
        );
        assert_eq!(
            Verdict::of(Part::Tap, &checks).because,
            ["kernel, capabilities: none"]
        );
    }
}
