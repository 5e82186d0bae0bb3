//! Closing a month: its bill is said once more, and nothing is written to its windows from then on.

use super::desk::count;
use super::{Rules, Upstream};
use crate::ledger::{Micros, Month, NanoUsd, Span, Window};
use crate::store::ledger::{ClosedMonth, LedgerError, LedgerStore, MonthOfUpstream};
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Closes months.
pub(super) struct Closing<'a> {
    pub(super) store: &'a LedgerStore,
    pub(super) rules: &'a Rules,
    pub(super) upstreams: &'a [Upstream],
    pub(super) closed_by: &'a str,
    pub(super) now: Micros,
    pub(super) writes: bool,
}

/// Why a month cannot be closed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum CloseError {
    #[error(
        "expected a month that is over and settled, found {month}, whose last windows settle at {at}: close it then"
    )]
    NotOver { month: Month, at: Micros },
    #[error(
        "expected every window of {month} to be booked, found {missing} of {upstream} that are not: {remedy}"
    )]
    Missing {
        month: Month,
        upstream: String,
        missing: u64,
        remedy: &'static str,
    },
    #[error(
        "expected every window of {month} to be settled, found {provisional} of {upstream} that are provisional: let a gateway run until they are, or run \
         `vllm-gateway ledger --from {month}-01`"
    )]
    Provisional {
        month: Month,
        upstream: String,
        provisional: u64,
    },
    #[error(
        "expected the rows of {month} to sum to the bill, found {rows} USD in rows and {bill} USD in windows of {upstream}: run `vllm-gateway ledger \
         --from {month}-01`, which writes anew what does not fit"
    )]
    Unequal {
        month: Month,
        upstream: String,
        rows: NanoUsd,
        bill: NanoUsd,
    },
}

/// What to do about windows that are missing.
const LET_IT_RUN: &str = "let a gateway run until it has caught up";

impl Closing<'_> {
    /// Closes `month`, or says why it cannot be. Returns what there is to tell.
    pub(super) async fn close(&self, month: Month) -> Result<Result<String, CloseError>, LedgerError> {
        let settled = Micros(month.span().to().0.saturating_add(self.rules.settle_us));
        if self.now < settled {
            return Ok(Err(CloseError::NotOver { month, at: settled }));
        }
        let is_closed = self.store.closed_months().await?.contains(&month);
        let booked = self.store.month(month).await?;
        if !is_closed && let Err(error) = self.check(month, &booked).await? {
            return Ok(Err(error));
        }
        let bill = booked.values().map(|of| of.bill).sum();
        let windows = booked.values().map(|of| of.windows).sum();
        let said = match (is_closed, self.writes) {
            (true, _) => "was closed before",
            (false, true) => "is closed",
            (false, false) => "can be closed",
        };
        if self.writes && !is_closed {
            let closed = ClosedMonth {
                month,
                bill,
                windows,
                closed_by: self.closed_by.into(),
            };
            self.store.close(&closed).await?;
        }
        // Writing into a string cannot fail.
        let mut text = format!("{month} {said}: {bill} USD, {windows} windows\n");
        for (upstream, of) in &booked {
            let _ = writeln!(text, "  {upstream}: {} USD, {} windows", of.bill, of.windows);
        }
        Ok(Ok(text))
    }

    async fn check(
        &self,
        month: Month,
        booked: &BTreeMap<String, MonthOfUpstream>,
    ) -> Result<Result<(), CloseError>, LedgerError> {
        for upstream in self.upstreams {
            let Some(first) = self.store.first_fact(&upstream.name).await? else {
                continue;
            };
            let span = month.span();
            let due = count(Span::new(span.from().max(Window::at(first).start()), span.to()));
            let there = booked.get(&*upstream.name).map_or(0, |of| of.windows);
            if there < due {
                return Ok(Err(CloseError::Missing {
                    month,
                    upstream: upstream.name.to_string(),
                    missing: due - there,
                    remedy: LET_IT_RUN,
                }));
            }
        }
        for (upstream, of) in booked {
            let upstream = upstream.clone();
            if of.provisional > 0 {
                return Ok(Err(CloseError::Provisional {
                    month,
                    upstream,
                    provisional: of.provisional,
                }));
            }
            if of.rows != of.bill {
                return Ok(Err(CloseError::Unequal {
                    month,
                    upstream,
                    rows: of.rows,
                    bill: of.bill,
                }));
            }
        }
        Ok(Ok(()))
    }
}
