//! What each window of each upstream cost whom: money as a pure function of stored facts.
//!
//! * [`time`] and [`money`] hold the units: whole microseconds, whole nano-USD.
//! * [`segment`] cuts a request at the edges of windows.
//! * [`engine`] makes what an engine said at its scrapes a view of each window.
//! * [`price`] says what an upstream costs at each moment; [`method`] by which rules that is shared out.
//! * `share` divides the time of an upstream between the requests that ran on it.
//! * [`facts`] is what is known of one window of one upstream, and [`allocate()`] makes the rows of `cost_ledger` ([`row`]) out of it.
//! * [`reconcile`] holds what engines counted against what requests are known to have used, and says what a gap may come from.
//! * [`observers`], [`gap`] and [`inputs`] say what is known of each window, out of several gateways' scrapes and all segments.
//! * [`head`] decides when a window's statement is made anew, and [`due`] holds the spans of windows that are looked at.
//! * [`hour`] is what the last hour of an upstream cost, by what it was for.
//! * [`rates`] is the other amount: what a request is charged by its tokens alone.
//!
//! Promises: the rows of a window sum to the window's bill to the nano-USD, and the bills of adjoining windows to the bill of the span
//! that they cover; no row is negative; the same facts give the same rows, whoever computes them and in whatever order they came. No
//! float touches an amount, and there is neither a clock nor any I/O in here.
//!
//! Left out: where the facts come from, and when anybody looks at them (see [`bookkeeper`](crate::bookkeeper)).

mod allocate;
pub mod due;
pub mod engine;
pub mod facts;
pub mod gap;
pub mod head;
pub mod hour;
pub mod inputs;
pub mod method;
pub mod money;
pub mod observers;
pub mod price;
pub mod rates;
pub mod reconcile;
pub mod row;
pub mod segment;
mod share;
pub mod time;

pub use allocate::{allocate, itemize};
pub use due::{Bounds, Month};
pub use engine::{Scrape, Totals, settle, view};
pub use facts::{Account, Condition, EngineSpan, EngineView, Segment, WindowFacts, Work};
pub use gap::Difference;
pub use head::{Clock, Head, Inputs, Recompute, Standing, Tally};
pub use hour::{HourCost, Line};
pub use method::{Method, Millionths, Weights};
pub use money::NanoUsd;
pub use observers::{Look, Observers};
pub use price::{Price, PriceError, PriceList};
pub use rates::{PerMillion, Rate, RateCard, Usage};
pub use reconcile::{Cause, Evidence, Gap, History, Interval, likely_causes};
pub use row::{CostRow, Edition, SegmentCost, State, Statement};
pub use segment::{Cutter, Point, Run, SegmentRow, Slice, Wait, scheduled};
pub use time::{Micros, Span, Window};

#[cfg(test)]
pub(crate) mod tests;
