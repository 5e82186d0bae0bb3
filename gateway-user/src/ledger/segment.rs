//! Cuts a request at the edges of windows: when it ran in each, and what was done for it there.
//!
//! A request runs from its scheduling until the upstream's last byte; the time before is its wait, which is told and never billed. On a stream
//! its prompt is worked on, evenly, until the first content, and what it generates comes along as it was seen to. Of one that is not
//! streamed only the sums are known, at its end: they are spread over its run.
//!
//! Every count is cut where it stands at an edge, rounded down, as a sum since the beginning. So the segments of a request sum to its
//! tokens exactly, whether they are cut all at once or window by window while it runs.

use serde::{Serialize, Serializer};

use super::facts::{Account, Segment, Work};
use super::time::{Micros, Span, Window};

/// How much of what was generated was there at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    /// The moment.
    pub at: Micros,
    /// Tokens, or what stands for them: only the proportion to [`Run::units`] counts.
    pub units: u64,
}

/// What is known of a request's run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// From its scheduling to the upstream's last byte, or to now while it goes on.
    pub span: Span,
    /// When the first content came; `None` when it is not streamed.
    pub prefilled: Option<Micros>,
    /// Prompt tokens, cached ones included.
    pub prompt_tokens: u64,
    /// Those out of the prefix cache.
    pub cached_tokens: u64,
    /// Tokens generated.
    pub completion_tokens: u64,
    /// How they came along, in order of time; the first content, and perhaps more.
    pub points: Vec<Point>,
    /// Units of all that was generated.
    pub units: u64,
}

/// What is known of how long a request waited before it ran. Means are of requests at the same upstream, of late.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wait {
    /// How long it was in the engine's queue, as the engine says of this very request.
    pub told_us: Option<u64>,
    /// How long requests are in its queue.
    pub queue_us: Option<u64>,
    /// How long it takes from there to the first token.
    pub prefill_us: Option<u64>,
    /// How long each further token takes.
    pub token_us: Option<u64>,
}

/// A part of a run within one window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slice {
    /// The window.
    pub window: Window,
    /// When it ran in it.
    pub run: Span,
    /// What was done for it meanwhile.
    pub work: Work,
}

/// Cuts one request, as it goes on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cutter {
    /// How far it is cut; `None` when nothing is.
    until: Option<Micros>,
    done: Work,
}

/// A row of `request_segments`, name for name.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SegmentRow<'a> {
    /// The window.
    #[serde(serialize_with = "in_seconds")]
    pub window_start: Window,
    /// The upstream's configured name.
    pub upstream: &'a str,
    /// The request.
    pub event_id: &'a str,
    /// Who pays.
    pub team_id: &'a str,
    /// What for; may be empty.
    pub project: &'a str,
    /// The model.
    pub model: &'a str,
    /// When it ran.
    #[serde(flatten, serialize_with = "run_columns")]
    pub run: Span,
    /// What was done for it meanwhile.
    #[serde(flatten, serialize_with = "work_columns")]
    pub work: Work,
    /// Which gateway wrote it.
    pub gateway_id: &'a str,
}

/// How many times the mean wait a wait can be by an estimate. A queue that grows or shrinks steadily has waits from none to twice their mean. So
/// where nobody waits, nobody is taken to have waited, however slow a request was.
const WAITS_MAX: u64 = 2;

/// When a request was scheduled that arrived at `span`'s beginning, and generated so many tokens.
///
/// What the engine says of it counts, up to the first content, or the end. Else it is estimated: it ran for as long as requests do, a prefill and as many
/// tokens as it has, and had waited for the rest of its time, but never for more than twice as long as requests do. Where it is not known
/// how long they run, one that is not streamed has waited as long as they do, and no more than half of its time. Where nothing is known there was
/// no wait.
pub fn scheduled(span: Span, prefilled: Option<Micros>, completion_tokens: u64, wait: Wait) -> Micros {
    let before = Span::new(span.from(), prefilled.unwrap_or(span.to()));
    let further_tokens = match prefilled {
        Some(_) => 0,
        None => completion_tokens.saturating_sub(1),
    };
    let ran_us = wait.prefill_us.and_then(|prefill_us| {
        let token_us = if further_tokens > 0 { wait.token_us? } else { 0 };
        Some(prefill_us.saturating_add(further_tokens.saturating_mul(token_us)))
    });
    let queue_us = wait.queue_us.unwrap_or(0);
    let waited_us = match (wait.told_us, ran_us) {
        (Some(told_us), _) => told_us,
        (None, Some(ran_us)) => before
            .len_us()
            .saturating_sub(ran_us)
            .min(queue_us.saturating_mul(WAITS_MAX)),
        (None, None) if prefilled.is_none() => queue_us.min(before.len_us() / 2),
        (None, None) => 0,
    };
    Micros(span.from().0 + waited_us.min(before.len_us()))
}

impl Run {
    /// What was done by `at`, counted from the beginning.
    fn done_by(&self, at: Micros) -> Work {
        if at >= self.span.to() {
            return Work {
                prompt_tokens: self.prompt_tokens,
                cached_tokens: self.cached_tokens.min(self.prompt_tokens),
                completion_tokens: self.completion_tokens,
                kv_token_us: 0,
            };
        }
        let prefill = Span::new(self.span.from(), self.prefilled.unwrap_or(self.span.to()));
        let so_far = |tokens: u64| part(tokens, at.0.saturating_sub(prefill.from().0), prefill.len_us());
        let prompt_tokens = so_far(self.prompt_tokens);
        Work {
            prompt_tokens,
            cached_tokens: so_far(self.cached_tokens).min(prompt_tokens),
            completion_tokens: part(self.completion_tokens, self.units_by(at), self.units),
            kv_token_us: 0,
        }
    }

    /// How far generation had come: along a line between the points that are known.
    fn units_by(&self, at: Micros) -> u64 {
        let begin = Point {
            at: self.prefilled.unwrap_or(self.span.from()),
            units: 0,
        };
        if at < begin.at {
            return 0;
        }
        let end = Point {
            at: self.span.to(),
            units: self.units,
        };
        let mut before = begin;
        for point in self.points.iter().copied().chain([end]) {
            let point = Point {
                units: point.units.clamp(before.units, self.units.max(before.units)),
                ..point
            };
            if point.at > at {
                let passed_us = at.0.saturating_sub(before.at.0);
                let risen = part(
                    point.units - before.units,
                    passed_us,
                    point.at.0.saturating_sub(before.at.0),
                );
                return before.units + risen;
            }
            before = point;
        }
        before.units
    }

    /// Tokens in the KV cache at a moment of which `done_by` is known. The whole prompt of a request that is not streamed is there from the
    /// beginning, since nobody can say when it was read.
    fn cached_at(&self, done: Work) -> u64 {
        let prompt_tokens = match self.prefilled {
            Some(_) => done.prompt_tokens,
            None => self.prompt_tokens,
        };
        prompt_tokens.saturating_add(done.completion_tokens)
    }

    /// Tokens times time in the KV cache, within a span: the line between its ends, and the end of the prefill where that lies between.
    fn kv_token_us(&self, span: Span) -> u64 {
        let middle = self.prefilled.unwrap_or(span.from());
        let middle = middle.clamp(span.from(), span.to());
        let under_line = |from: Micros, to: Micros| {
            let held = |at| u128::from(self.cached_at(self.done_by(at)));
            (held(from) + held(to)) * u128::from(to.0 - from.0) / 2
        };
        let sum = under_line(span.from(), middle) + under_line(middle, span.to());
        u64::try_from(sum).unwrap_or(u64::MAX)
    }
}

/// `total · passed / whole`, rounded down; all of it when there is no whole.
fn part(total: u64, passed: u64, whole: u64) -> u64 {
    let product = u128::from(total) * u128::from(passed.min(whole));
    // At most the total, which has 64 bits.
    product
        .checked_div(whole.into())
        .map_or(total, |part| part as u64)
}

impl Cutter {
    /// The windows that are over at `now`, and not cut yet, while the request goes on. What is known of the run by then must include it:
    /// tokens that are told later count as work of later windows.
    pub fn cut_finished(&mut self, run: &Run, now: Micros) -> Vec<Slice> {
        let until = Window::at(now.min(run.span.to())).start();
        self.cut(run, until)
    }

    /// All that is left of a request that has ended. The slices of a request, taken together, sum to its tokens; only when it ended with fewer
    /// than it had told of before, what was cut stays as it is.
    pub fn cut_rest(&mut self, run: &Run) -> Vec<Slice> {
        let mut slices = self.cut(run, run.span.to());
        let left = run.done_by(run.span.to()).beyond(self.done);
        if left != Work::default() || (slices.is_empty() && self.until.is_none()) {
            // A run without time, or one that told of more at an edge at which it had been cut.
            let at = self.until.unwrap_or(run.span.from());
            slices.push(self.slice(run, Span::new(at, at)));
        }
        slices
    }

    fn cut(&mut self, run: &Run, until: Micros) -> Vec<Slice> {
        let mut slices = Vec::new();
        let mut from = self.until.unwrap_or(run.span.from()).max(run.span.from());
        while from < until {
            let to = Window::at(from).span().to().min(until);
            slices.push(self.slice(run, Span::new(from, to)));
            from = to;
        }
        slices
    }

    fn slice(&mut self, run: &Run, span: Span) -> Slice {
        let done = run.done_by(span.to());
        let work = Work {
            kv_token_us: run.kv_token_us(span),
            ..done.beyond(self.done)
        };
        self.done = self.done.at_least(done);
        self.until = Some(span.to());
        Slice {
            window: Window::at(span.from()),
            run: span,
            work,
        }
    }
}

impl SegmentRow<'_> {
    /// What the ledger computes with.
    pub fn to_segment(&self) -> Segment {
        Segment {
            event_id: self.event_id.into(),
            account: Account {
                team_id: self.team_id.into(),
                project: self.project.into(),
                model: self.model.into(),
            },
            run: self.run,
            work: self.work,
        }
    }
}

/// Microseconds of a second, which the column is in. As a float it still holds whole microseconds: tokens times microseconds in a window are far
/// below 2^53.
const SECOND_US: f64 = 1e6;

/// The column `kv_token_seconds` of so many token-microseconds.
pub fn kv_token_seconds(kv_token_us: u64) -> f64 {
    kv_token_us as f64 / SECOND_US
}

/// Token-microseconds out of the column `kv_token_seconds`; what is no such number is 0.
pub fn kv_token_us(kv_token_seconds: f64) -> u64 {
    (kv_token_seconds * SECOND_US).round() as u64
}

fn in_seconds<S: Serializer>(window: &Window, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(window.start().0 / 1_000_000)
}

fn run_columns<S: Serializer>(run: &Span, serializer: S) -> Result<S::Ok, S::Error> {
    use serde::ser::SerializeMap;
    let mut map = serializer.serialize_map(Some(2))?;
    map.serialize_entry("run_start", &run.from().0)?;
    map.serialize_entry("run_end", &run.to().0)?;
    map.end()
}

fn work_columns<S: Serializer>(work: &Work, serializer: S) -> Result<S::Ok, S::Error> {
    use serde::ser::SerializeMap;
    let mut map = serializer.serialize_map(Some(4))?;
    map.serialize_entry("prompt_tokens", &work.prompt_tokens)?;
    map.serialize_entry("cached_tokens", &work.cached_tokens)?;
    map.serialize_entry("completion_tokens", &work.completion_tokens)?;
    map.serialize_entry("kv_token_seconds", &kv_token_seconds(work.kv_token_us))?;
    map.end()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: u64 = 1_000_000;

    /// Start of a window.
    const START: u64 = 1_780_000_005 * SECOND;

    fn at(seconds: u64) -> Micros {
        Micros(START + seconds * SECOND)
    }

    fn span(from_s: u64, to_s: u64) -> Span {
        Span::new(at(from_s), at(to_s))
    }

    fn run(span: Span, prefilled: Option<Micros>, prompt_tokens: u64, completion_tokens: u64) -> Run {
        Run {
            span,
            prefilled,
            prompt_tokens,
            cached_tokens: prompt_tokens / 2,
            completion_tokens,
            points: Vec::new(),
            units: completion_tokens,
        }
    }

    fn tokens(slices: &[Slice]) -> Vec<(u64, u64, u64)> {
        let of = |work: Work| (work.prompt_tokens, work.cached_tokens, work.completion_tokens);
        slices.iter().map(|slice| of(slice.work)).collect()
    }

    fn all(run: &Run) -> Vec<Slice> {
        Cutter::default().cut_rest(run)
    }

    #[test]
    fn a_request_within_a_window_is_one_slice_with_all_its_tokens() {
        let slices = all(&run(span(1, 9), Some(at(2)), 100, 50));
        assert_eq!(tokens(&slices), [(100, 50, 50)]);
        assert_eq!((slices[0].window, slices[0].run), (Window::at(at(0)), span(1, 9)));
    }

    #[test]
    fn what_is_not_streamed_is_spread_evenly_over_its_run() {
        let slices = all(&run(span(10, 40), None, 300, 60));
        assert_eq!(tokens(&slices), [(50, 25, 10), (150, 75, 30), (100, 50, 20)]);
        assert!(
            slices
                .iter()
                .all(|slice| slice.run.within(slice.window.span()) == slice.run)
        );
    }

    #[test]
    fn a_prompt_is_worked_on_until_the_first_content_and_the_rest_as_it_came() {
        let mut run = run(span(10, 60), Some(at(20)), 1_000, 100);
        run.points = vec![
            Point {
                at: at(20),
                units: 10,
            },
            Point {
                at: at(30),
                units: 60,
            },
            Point {
                at: at(45),
                units: 60,
            },
        ];
        let slices = all(&run);
        assert_eq!(
            tokens(&slices),
            [(500, 250, 0), (500, 250, 60), (0, 0, 0), (0, 0, 40)]
        );
    }

    #[test]
    fn the_cache_holds_the_prompt_once_it_is_read_and_then_ever_more() {
        // 2 s of a prompt that grows to 1000 tokens, then 10 s from there to 1100.
        let slices = all(&run(span(1, 13), Some(at(3)), 1_000, 100));
        assert_eq!(slices[0].work.kv_token_us, (1_000 + 10_500) * SECOND);
        let slices = all(&run(span(1, 11), None, 1_000, 100));
        assert_eq!(slices[0].work.kv_token_us, 10_500 * SECOND);
    }

    #[test]
    fn a_run_without_time_still_has_its_tokens() {
        let slices = all(&run(span(15, 15), None, 7, 0));
        assert_eq!(tokens(&slices), [(7, 3, 0)]);
        assert_eq!(slices[0].window, Window::at(at(15)));
        assert_eq!(all(&run(span(3, 3), None, 0, 0)).len(), 1, "it was there");
    }

    #[test]
    fn while_it_goes_on_only_windows_that_are_over_are_cut() {
        let mut cutter = Cutter::default();
        let mut run = run(span(1, 20), Some(at(2)), 100, 19);
        run.points = vec![
            Point { at: at(2), units: 1 },
            Point {
                at: at(20),
                units: 19,
            },
        ];
        assert_eq!(tokens(&cutter.cut_finished(&run, at(20))), [(100, 50, 14)]);
        assert!(cutter.cut_finished(&run, at(20)).is_empty());
        run.span = span(1, 30);
        run.completion_tokens = 25;
        run.units = 25;
        assert_eq!(tokens(&cutter.cut_rest(&run)), [(0, 0, 11)]);
        // It ends at an edge up to which it was cut, and tells of one more token.
        run.completion_tokens = 26;
        let late = cutter.cut_rest(&run);
        assert_eq!(
            (tokens(&late), late[0].window),
            (vec![(0, 0, 1)], Window::at(at(30)))
        );
    }

    #[test]
    fn what_the_engine_says_of_a_wait_counts_before_what_is_likely() {
        let told = Wait {
            told_us: Some(3 * SECOND),
            queue_us: Some(4 * SECOND),
            prefill_us: Some(SECOND),
            token_us: Some(SECOND / 10),
        };
        let first = Some(at(5));
        assert_eq!(scheduled(span(0, 9), first, 20, told), at(3));
        let beyond = Wait {
            told_us: Some(99 * SECOND),
            ..told
        };
        assert_eq!(scheduled(span(0, 9), first, 20, beyond), at(5));
        let likely = Wait {
            told_us: None,
            ..told
        };
        assert_eq!(
            scheduled(span(0, 9), first, 20, likely),
            at(4),
            "a prefill before the first content"
        );
        assert_eq!(
            scheduled(span(0, 9), None, 21, likely),
            at(6),
            "a prefill and 20 tokens before the end"
        );
        assert_eq!(
            scheduled(span(0, 2), None, 21, likely),
            at(0),
            "it ran for all of its time"
        );
        assert_eq!(
            scheduled(span(0, 30), Some(at(30)), 1, likely),
            at(8),
            "nobody waits for so long"
        );
        assert_eq!(scheduled(span(0, 9), first, 20, Wait::default()), at(0));
    }

    #[test]
    fn where_it_is_not_known_how_long_requests_run_they_waited_as_long_as_they_do() {
        let queue = Wait {
            queue_us: Some(SECOND),
            ..Wait::default()
        };
        assert_eq!(scheduled(span(0, 9), None, 20, queue), at(1));
        let half = Micros(START + SECOND / 2);
        assert_eq!(
            scheduled(Span::new(at(0), at(1)), None, 20, queue),
            half,
            "half of the time at most"
        );
        assert_eq!(scheduled(span(0, 9), Some(at(5)), 20, queue), at(0));
        // A prompt alone, as for an embedding, has no further tokens.
        let prefill = Wait {
            prefill_us: Some(SECOND),
            ..queue
        };
        assert_eq!(scheduled(span(0, 2), None, 0, prefill), at(1));
    }

    #[test]
    fn a_row_has_the_tables_columns() {
        let slice = all(&run(span(1, 11), None, 1_000, 100))[0];
        let row = SegmentRow {
            window_start: slice.window,
            upstream: "chat",
            event_id: "gw-1",
            team_id: "search",
            project: "",
            model: "m",
            run: slice.run,
            work: slice.work,
            gateway_id: "gw",
        };
        let json = serde_json::to_value(&row).unwrap();
        assert_eq!(json["run_start"], START + SECOND);
        assert_eq!(json["kv_token_seconds"], 10_500.0);
        let sql = include_str!("../../../sql/0004_segments_and_ledger.sql");
        let table = sql.split("request_segments{on_cluster}").nth(1).unwrap();
        let table = table.split("ENGINE").next().unwrap();
        let columns = table
            .lines()
            .filter_map(|line| line.strip_prefix("    ")?.split(' ').next());
        // The batch is the spool's to add.
        let mut columns: Vec<&str> = columns.filter(|column| *column != "batch").collect();
        let mut fields: Vec<&String> = json.as_object().unwrap().keys().collect();
        columns.sort_unstable();
        fields.sort_unstable();
        assert_eq!(fields, columns);
    }

    prop_compose! {
        fn any_run()(
            start_us in 0..60 * SECOND,
            length_us in prop_oneof![Just(0), 0..200 * SECOND, Just(15 * SECOND)],
            prefill_us in prop::option::of(0..100 * SECOND),
            (prompt_tokens, cached_tokens, completion_tokens) in (0_u64..100_000, 0_u64..100_000, 0_u64..10_000),
            steps in prop::collection::vec((0..20 * SECOND, 0_u64..900), 0..12),
            units in prop_oneof![Just(None), (0_u64..20_000).prop_map(Some)],
        ) -> Run {
            let span = Span::new(Micros(START + start_us), Micros(START + start_us + length_us));
            let prefilled = prefill_us.map(|prefill_us| Micros((span.from().0 + prefill_us).min(span.to().0)));
            let mut point = Point { at: prefilled.unwrap_or(span.from()), units: 0 };
            let points = steps.into_iter().map(|(us, units)| {
                point = Point { at: Micros(point.at.0 + us), units: point.units + units };
                point
            });
            Run {
                span,
                prefilled,
                prompt_tokens,
                cached_tokens: cached_tokens.min(prompt_tokens),
                completion_tokens,
                points: points.filter(|_| prefilled.is_some()).collect(),
                units: units.unwrap_or(completion_tokens),
            }
        }
    }

    fn sum(slices: &[Slice]) -> Work {
        slices
            .iter()
            .fold(Work::default(), |sum, slice| sum.plus(slice.work))
    }

    proptest! {
        #[test]
        fn the_slices_of_a_request_sum_to_its_tokens_and_cover_its_run(run in any_run()) {
            let slices = all(&run);
            let sum = sum(&slices);
            prop_assert_eq!(
                (sum.prompt_tokens, sum.cached_tokens, sum.completion_tokens),
                (run.prompt_tokens, run.cached_tokens, run.completion_tokens)
            );
            prop_assert_eq!(slices[0].run.from(), run.span.from());
            prop_assert_eq!(slices[slices.len() - 1].run.to(), run.span.to());
            for pair in slices.windows(2) {
                prop_assert_eq!(pair[0].run.to(), pair[1].run.from());
                prop_assert_eq!(pair[0].window.next(), pair[1].window);
            }
            for slice in &slices {
                prop_assert_eq!(slice.run.within(slice.window.span()), slice.run);
                prop_assert!(slice.work.cached_tokens <= slice.work.prompt_tokens.max(1));
            }
        }

        #[test]
        fn nothing_is_in_the_cache_that_is_not_the_requests(run in any_run()) {
            let most = u128::from(run.prompt_tokens + run.completion_tokens) * u128::from(run.span.len_us());
            let slices = all(&run);
            let held: u128 = slices.iter().map(|slice| u128::from(slice.work.kv_token_us)).sum();
            prop_assert!(held <= most);
            for slice in &slices {
                prop_assert_eq!(kv_token_us(kv_token_seconds(slice.work.kv_token_us)), slice.work.kv_token_us);
            }
        }

        #[test]
        fn cut_as_it_goes_on_it_is_cut_as_afterwards(
            run in any_run(),
            mut looks in prop::collection::vec(0..260 * SECOND, 0..6),
        ) {
            looks.sort_unstable();
            let mut cutter = Cutter::default();
            let mut slices = Vec::new();
            for look in looks {
                slices.extend(cutter.cut_finished(&run, Micros(START + look)));
            }
            slices.extend(cutter.cut_rest(&run));
            let afterwards = all(&run);
            prop_assert_eq!(slices, afterwards);
        }

        #[test]
        fn a_stream_that_tells_ever_more_sums_to_what_it_told_at_last(
            steps in prop::collection::vec((1..20 * SECOND, 0_u64..500), 1..20),
            prompt_tokens in 0_u64..10_000,
            late in 0_u64..5,
        ) {
            let begun = Micros(START + SECOND);
            let mut run = run(Span::new(begun, begun), Some(begun), prompt_tokens, 0);
            let mut cutter = Cutter::default();
            let mut slices = Vec::new();
            for (us, tokens) in steps {
                let now = Micros(run.span.to().0 + us);
                run.span = Span::new(begun, now);
                run.completion_tokens += tokens;
                run.units = run.completion_tokens;
                run.points.push(Point { at: now, units: run.units });
                slices.extend(cutter.cut_finished(&run, now));
            }
            run.completion_tokens += late;
            run.units += late;
            slices.extend(cutter.cut_rest(&run));
            let sum = sum(&slices);
            prop_assert_eq!((sum.prompt_tokens, sum.completion_tokens), (prompt_tokens, run.completion_tokens));
            let mut windows: Vec<Window> = slices.iter().map(|slice| slice.window).collect();
            let count = windows.len();
            windows.dedup();
            prop_assert_eq!(windows.len(), count, "a window has one row of a request");
        }

        #[test]
        fn a_wait_lies_within_the_request(
            from in 0..60 * SECOND,
            length in 0..60 * SECOND,
            prefill in prop::option::of(0..60 * SECOND),
            told in prop::option::of(any::<u64>()),
            queue in prop::option::of(any::<u64>()),
            usual in prop::option::of(any::<u64>()),
            (tokens, token) in (any::<u64>(), prop::option::of(any::<u64>())),
        ) {
            let span = Span::new(Micros(START + from), Micros(START + from + length));
            let prefilled = prefill.map(|us| Micros((span.from().0 + us).min(span.to().0)));
            let wait = Wait { told_us: told, queue_us: queue, prefill_us: usual, token_us: token };
            let start = scheduled(span, prefilled, tokens, wait);
            prop_assert!(start >= span.from() && start <= prefilled.unwrap_or(span.to()));
        }
    }
}
