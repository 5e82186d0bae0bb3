//! Whether the books add up: how much of a period is booked and how final that is, whether lines and windows sum to one bill, what the config's
//! prices make of the same windows, and what the engines counted.

use super::amount;
use super::table::aligned;
use crate::command::time;
use crate::config::{Config, UpstreamConfig};
use crate::ledger::{Micros, PriceList, Span, Window};
use crate::store::figures::{ClosedMonth, LedgerFigures, Period, RulesUse, UnevenWindow, UpstreamBooks};

/// Length of a window.
const WINDOW_US: i64 = Window::LEN_US as i64;

/// What the books of a period are held against.
#[derive(Clone, Debug, Default)]
pub struct Proof {
    /// One for each upstream, in the order of their names.
    pub upstreams: Vec<UpstreamProof>,
    /// Upstreams of the config of which nothing was ever booked.
    pub unbooked: Vec<String>,
    /// Whether every window of the period is booked, of every upstream.
    pub is_complete: bool,
    /// What those who pay have.
    pub teams_nano_usd: i64,
    /// What they and the lines of nobody sum to.
    pub cost_nano_usd: i64,
    /// What all windows sum to.
    pub bill_nano_usd: i64,
    /// How many windows have rows that do not sum to them.
    pub uneven_windows: u64,
    /// The first few of them.
    pub uneven: Vec<UnevenWindow>,
    /// How the month was closed, where a month is asked for and it was.
    pub closed: Option<ClosedMonth>,
}

/// What is booked of an upstream, and what should be.
#[derive(Clone, Debug)]
pub struct UpstreamProof {
    /// What is booked.
    pub books: UpstreamBooks,
    /// Windows of the period that are over, from the opening of its account on.
    pub due: u64,
    /// What the config's prices make of the booked windows; `None` where it has no such upstream.
    pub priced_nano_usd: Option<i64>,
}

/// How many windows begin from one moment until before another.
fn windows_between(from_us: i64, to_us: i64) -> u64 {
    let first_at_or_after = |us: i64| us.saturating_add(WINDOW_US - 1).div_euclid(WINDOW_US);
    u64::try_from(first_at_or_after(to_us) - first_at_or_after(from_us)).unwrap_or(0)
}

impl Proof {
    /// Holds the ledger of `period` against itself, the clock and the config.
    pub fn of(
        ledger: &LedgerFigures,
        closed: Option<ClosedMonth>,
        period: Period,
        now_us: i64,
        config: &Config,
    ) -> Proof {
        let over_us = now_us.saturating_sub(WINDOW_US - 1).min(period.to_us());
        let priced = |books: &UpstreamBooks| {
            let known = |upstream: &&UpstreamConfig| upstream.name.as_str() == books.upstream;
            priced(config.upstreams.iter().find(known)?, &books.runs)
        };
        let upstreams: Vec<UpstreamProof> = ledger
            .upstreams
            .iter()
            .map(|books| UpstreamProof {
                due: windows_between(
                    period.from_us().max(books.opened_s.saturating_mul(1_000_000)),
                    over_us,
                ),
                priced_nano_usd: priced(books),
                books: books.clone(),
            })
            .collect();
        let is_booked = |name: &str| upstreams.iter().any(|upstream| upstream.books.upstream == name);
        let unbooked: Vec<String> = config
            .upstreams
            .iter()
            .map(|upstream| upstream.name.to_string())
            .filter(|name| !is_booked(name))
            .collect();
        let all = windows_between(period.from_us(), period.to_us());
        Proof {
            is_complete: unbooked.is_empty()
                && upstreams.iter().all(|upstream| upstream.books.windows >= all),
            upstreams,
            unbooked,
            teams_nano_usd: ledger.teams_nano_usd(),
            cost_nano_usd: ledger.cost_nano_usd(),
            bill_nano_usd: ledger.bill_nano_usd(),
            uneven_windows: ledger.uneven_windows,
            uneven: ledger.uneven.clone(),
            closed,
        }
    }

    /// What the lines have beyond the windows; 0 where the books add up.
    pub fn difference_nano_usd(&self) -> i64 {
        self.cost_nano_usd - self.bill_nano_usd
    }

    /// Begin and end of what is booked, seconds since 1970.
    pub fn booked_s(&self) -> Option<(i64, i64)> {
        let runs = || self.upstreams.iter().flat_map(|upstream| &upstream.books.runs);
        Some((runs().map(|run| run.0).min()?, runs().map(|run| run.1).max()?))
    }

    /// A sum over all upstreams.
    pub fn sum(&self, of: impl Fn(&UpstreamProof) -> u64) -> u64 {
        self.upstreams.iter().map(of).sum()
    }

    /// What is wrong with the books, so that nobody should be billed by them; nothing where they add up.
    pub fn wrong(&self) -> Vec<String> {
        let mut wrong = Vec::new();
        if self.difference_nano_usd() != 0 || self.uneven_windows > 0 {
            let named: Vec<String> = self.uneven.iter().map(named).collect();
            wrong.push(format!(
                "expected the ledger's lines to sum to the bills of its windows, {} USD, found {} USD, a difference of {} USD; windows whose lines do \
                 not sum to their bill: {}{}: let the ledger compute them anew",
                amount::exact(self.bill_nano_usd),
                amount::exact(self.cost_nano_usd),
                amount::exact(self.difference_nano_usd()),
                self.uneven_windows,
                if named.is_empty() { String::new() } else { format!(" ({})", named.join("; ")) },
            ));
        }
        if let Some(closed) = &self.closed
            && (closed.bill_nano_usd, closed.windows)
                != (self.bill_nano_usd, self.sum(|upstream| upstream.books.windows))
        {
            wrong.push(format!(
                "expected the bill with which the month was closed at {} by {}, {} USD over {} windows, found {} USD over {}: somebody wrote to a closed \
                 month",
                time::format(closed.closed_at_us),
                closed.closed_by,
                amount::exact(closed.bill_nano_usd),
                closed.windows,
                amount::exact(self.bill_nano_usd),
                self.sum(|upstream| upstream.books.windows),
            ));
        }
        wrong
    }

    /// How much is booked, and how final that is.
    pub fn coverage(&self) -> String {
        let Some((from_s, to_s)) = self.booked_s() else {
            return "Nothing of the period is booked yet, so that no cost of it is known.".to_owned();
        };
        let (booked, due) = (
            self.sum(|upstream| upstream.books.windows),
            self.sum(|upstream| upstream.due),
        );
        let settled = self.sum(|upstream| upstream.books.settled + upstream.books.restated);
        format!(
            "Booked from {} until {}: {booked} of {due} windows of 15 s ({}) that are over since the accounts were opened; of these settled: {settled} ({}), \
             provisional: {}, restated among the settled: {}.",
            time::format(from_s * 1_000_000),
            time::format(to_s * 1_000_000),
            percent(booked, due),
            percent(settled, booked),
            self.sum(|upstream| upstream.books.provisional),
            self.sum(|upstream| upstream.books.restated),
        )
    }

    /// Whether lines and windows make one bill.
    pub fn verdict(&self) -> String {
        format!(
            "Price times time of the booked windows is {} USD; those who pay have {} USD, the lines of nobody {} USD, together {} USD: the difference is \
             {} USD.",
            amount::exact(self.bill_nano_usd),
            amount::exact(self.teams_nano_usd),
            amount::exact(self.cost_nano_usd - self.teams_nano_usd),
            amount::exact(self.cost_nano_usd),
            match self.difference_nano_usd() {
                0 => "0".to_owned(),
                difference => amount::exact(difference),
            },
        )
    }

    /// Each upstream against its engine and its price, and what explains what is found.
    pub fn reconciliation(&self) -> String {
        if self.upstreams.is_empty() {
            return String::new();
        }
        let head = [
            ["upstream", ""],
            ["windows", ""],
            ["not", "booked"],
            ["provi-", "sional"],
            ["bill", "USD"],
            ["by this config", "USD"],
            ["engine's", "tokens"],
            ["known", "tokens"],
            ["unattributed", "tokens"],
        ];
        let mut rows: Vec<Vec<String>> = [0, 1]
            .map(|row| head.iter().map(|cell| cell[row].to_owned()).collect())
            .into();
        rows.extend(self.upstreams.iter().map(UpstreamProof::cells));
        let notes = self.upstreams.iter().flat_map(UpstreamProof::notes);
        let notes: Vec<String> = notes.map(|note| note + "\n").collect();
        aligned(&rows, 1) + &notes.concat()
    }

    /// What a reader of the costs must know besides.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = Vec::new();
        if !self.unbooked.is_empty() {
            notes.push(format!(
                "Nothing was ever booked of these upstreams of this config: {}.",
                self.unbooked.join(", ")
            ));
        }
        notes
    }
}

impl UpstreamProof {
    /// Windows that are over and not booked.
    pub fn missing(&self) -> u64 {
        self.due.saturating_sub(self.books.windows)
    }

    fn cells(&self) -> Vec<String> {
        let books = &self.books;
        let usd =
            |amount: i64| amount::rounded(amount, amount::places_for(books.bill_nano_usd.unsigned_abs()));
        let or_dash = |known: Option<String>| known.unwrap_or_else(|| "-".to_owned());
        vec![
            super::table::shown_key(&books.upstream),
            books.windows.to_string(),
            self.missing().to_string(),
            books.provisional.to_string(),
            usd(books.bill_nano_usd),
            or_dash(self.priced_nano_usd.map(usd)),
            or_dash(books.engine.tokens.map(|tokens| tokens.to_string())),
            books.engine.known_tokens.to_string(),
            books.unattributed_tokens.to_string(),
        ]
    }

    /// What explains the upstream's figures, a sentence each. (Likely causes of a gap to the engine's counters have a view of their own,
    /// `--reconciliation`; what is to be told of them beside a bill belongs here.)
    pub fn notes(&self) -> Vec<String> {
        let books = &self.books;
        let name = super::table::shown_key(&books.upstream);
        let mut notes = Vec::new();
        let unseen = books.windows.saturating_sub(books.engine.windows);
        if unseen > 0 {
            notes.push(format!(
                "{name}: in {unseen} of {} windows the engine's counters are unknown; tokens known of requests in all of them: {}.",
                books.windows, books.engine.known_tokens_everywhere
            ));
        }
        if self
            .priced_nano_usd
            .is_some_and(|priced| priced != books.bill_nano_usd)
        {
            let rules: Vec<String> = books.rules.iter().map(said).collect();
            notes.push(format!(
                "{name}: the prices of this config make another bill, since its windows were booked by other rules, or one of them in part: {}.",
                rules.join("; ")
            ));
        }
        notes
    }
}

fn said(rules: &RulesUse) -> String {
    format!(
        "{} ({} windows)",
        super::table::shown_key(&rules.rules),
        rules.windows
    )
}

fn named(window: &UnevenWindow) -> String {
    format!(
        "{} of {}: bill {} USD, lines {} USD",
        time::format(window.start_s.saturating_mul(1_000_000)),
        super::table::shown_key(&window.upstream),
        amount::exact(window.bill_nano_usd),
        amount::exact(window.cost_nano_usd)
    )
}

fn percent(part: u64, whole: u64) -> String {
    match whole {
        0 => "-".to_owned(),
        // Rounded down: what is not all is not 100 %.
        whole => {
            let permille = u128::from(part) * 1000 / u128::from(whole);
            format!("{}.{} %", permille / 10, permille % 10)
        }
    }
}

/// What an upstream costs in these spans, by its prices as they stand in the config.
fn priced(upstream: &UpstreamConfig, runs: &[(i64, i64)]) -> Option<i64> {
    let prices = PriceList::new(upstream.price.clone()).ok()?;
    let moment = |second: i64| Micros(u64::try_from(second).unwrap_or(0) * 1_000_000);
    let bills = runs
        .iter()
        .map(|(from, to)| prices.bill(Span::new(moment(*from), moment(*to))));
    Some(bills.sum::<crate::ledger::NanoUsd>().as_i64())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::figures::CostLine;

    const HOUR_S: i64 = 3600;

    fn config() -> Config {
        let mut config = Config::default();
        config.upstreams.truncate(1);
        config
    }

    /// An hour of the first upstream, at the assumed price of 2.50 USD, all idle.
    fn ledger() -> LedgerFigures {
        LedgerFigures {
            lines: vec![CostLine {
                name: "__idle__".to_owned(),
                nano_usd: 2_500_000_000,
            }],
            upstreams: vec![UpstreamBooks {
                upstream: "chat".to_owned(),
                opened_s: HOUR_S,
                runs: vec![(HOUR_S, 2 * HOUR_S)],
                windows: 240,
                provisional: 60,
                settled: 180,
                bill_nano_usd: 2_500_000_000,
                rules: vec![RulesUse {
                    rules: "2.5 an hour".to_owned(),
                    windows: 240,
                }],
                ..UpstreamBooks::default()
            }],
            ..LedgerFigures::default()
        }
    }

    fn proof(ledger: &LedgerFigures, from_s: i64, to_s: i64, now_s: i64) -> Proof {
        let period = Period::new(from_s * 1_000_000, to_s * 1_000_000).expect("a period");
        Proof::of(ledger, None, period, now_s * 1_000_000, &config())
    }

    #[test]
    fn windows_are_due_when_they_are_over_and_the_account_was_open() {
        for (from_s, to_s, now_s, due, is_complete) in [
            (HOUR_S, 2 * HOUR_S, 9 * HOUR_S, 240, true),
            // Before the opening nothing is due, and all the same not everything is booked.
            (0, 2 * HOUR_S, 9 * HOUR_S, 240, false),
            (HOUR_S, 3 * HOUR_S, 2 * HOUR_S + 29, 241, false),
            (HOUR_S, 3 * HOUR_S, 2 * HOUR_S + 30, 242, false),
            // A period that cuts windows has those that begin in it.
            (HOUR_S - 14, 2 * HOUR_S - 14, 9 * HOUR_S, 240, true),
            (HOUR_S + 1, 2 * HOUR_S - 14, 9 * HOUR_S, 239, true),
        ] {
            let proof = proof(&ledger(), from_s, to_s, now_s);
            assert_eq!(
                (proof.upstreams[0].due, proof.is_complete),
                (due, is_complete),
                "{from_s} {to_s} {now_s}"
            );
        }
    }

    #[test]
    fn a_bill_that_the_config_makes_too_needs_no_words_and_another_one_is_told_with_its_rules() {
        let mut ledger = ledger();
        let right = proof(&ledger, HOUR_S, 2 * HOUR_S, 9 * HOUR_S);
        assert_eq!(right.upstreams[0].priced_nano_usd, Some(2_500_000_000));
        assert!(
            !right.reconciliation().contains("another bill"),
            "{}",
            right.reconciliation()
        );
        ledger.upstreams[0].bill_nano_usd -= 1;
        let other = proof(&ledger, HOUR_S, 2 * HOUR_S, 9 * HOUR_S).reconciliation();
        assert!(
            other.contains("another bill") && other.contains("2.5 an hour (240 windows)"),
            "{other}"
        );
        ledger.upstreams[0].upstream = "gone".to_owned();
        let gone = proof(&ledger, HOUR_S, 2 * HOUR_S, 9 * HOUR_S);
        assert_eq!(gone.upstreams[0].priced_nano_usd, None);
        assert_eq!(gone.unbooked, ["chat"]);
    }

    #[test]
    fn books_that_do_not_add_up_are_said_to_the_nano_with_their_windows() {
        let mut ledger = ledger();
        assert!(proof(&ledger, HOUR_S, 2 * HOUR_S, 9 * HOUR_S).wrong().is_empty());
        ledger.lines[0].nano_usd += 1;
        ledger.uneven_windows = 1;
        ledger.uneven = vec![UnevenWindow {
            upstream: "chat".to_owned(),
            start_s: HOUR_S,
            bill_nano_usd: 7,
            cost_nano_usd: 8,
        }];
        let wrong = proof(&ledger, HOUR_S, 2 * HOUR_S, 9 * HOUR_S).wrong().concat();
        assert!(wrong.contains("difference of 0.000000001 USD"), "{wrong}");
        assert!(
            wrong.contains("1970-01-01T01:00:00Z of chat: bill 0.000000007 USD"),
            "{wrong}"
        );
    }

    #[test]
    fn a_closed_month_that_has_changed_since_is_wrong() {
        let mut proof = proof(&ledger(), HOUR_S, 2 * HOUR_S, 9 * HOUR_S);
        let mut closed = ClosedMonth {
            bill_nano_usd: 2_500_000_000,
            windows: 240,
            closed_by: "ops".to_owned(),
            closed_at_us: 0,
        };
        proof.closed = Some(closed.clone());
        assert!(proof.wrong().is_empty());
        closed.windows = 239;
        proof.closed = Some(closed);
        assert!(proof.wrong().concat().contains("closed"), "{:?}", proof.wrong());
    }

    #[test]
    fn almost_all_is_not_all() {
        assert_eq!(percent(9_999, 10_000), "99.9 %");
        assert_eq!(
            (percent(3, 3), percent(0, 0)),
            ("100.0 %".to_owned(), "-".to_owned())
        );
    }
}
