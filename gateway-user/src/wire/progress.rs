//! How a response came along: how much of it was there when, in constant memory, however long it runs.
//!
//! What was generated within a stretch of time is needed once it is known in which stretches time is cut, which is the reader's affair: a stream
//! can outlast many of them, and their edges lie on another clock. So totals are kept at a few moments ([`Mark`]), and what lies between two of
//! them counts as evenly spread. Marks are taken two seconds apart at first. When there is no room, every other one is given up and the
//! distance doubles: early parts of a long stream are known less finely than late ones, and no part is ever lost.

use super::At;

/// Most marks that are kept: a quarter of a minute at full resolution, which is what a reader that forgets each window needs. Every stream that
/// runs holds them.
const MARKS_MAX: usize = 8;

/// Time between two marks at first.
const STEP_MS: u32 = 2_000;

const MILLISECOND_NS: u64 = 1_000_000;

/// How much was there at a moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    /// The moment, to the millisecond below.
    pub at: At,
    /// Chunks with generated content so far.
    pub chunks: u32,
    /// Tokens generated so far, over all choices, where the stream tells; `None` where it does not.
    pub completion_tokens: Option<u32>,
}

/// A mark in little room.
#[derive(Clone, Copy, Debug, Default)]
struct Packed {
    /// Since the first content; seven weeks at most.
    after_ms: u32,
    chunks: u32,
    /// [`UNKNOWN`] where the stream does not tell.
    completion_tokens: u32,
}

/// More tokens than any stream has.
const UNKNOWN: u32 = u32::MAX;

/// Totals at a few moments, in order of time.
#[derive(Clone, Debug)]
pub struct Progress {
    /// Means something once there are marks.
    first_at: At,
    marks: [Packed; MARKS_MAX],
    len: u8,
    /// Time between two marks, in steps at first.
    stride: u32,
}

impl Default for Progress {
    fn default() -> Progress {
        Progress {
            first_at: At(0),
            marks: [Packed::default(); MARKS_MAX],
            len: 0,
            stride: 1,
        }
    }
}

impl Progress {
    /// When the first chunk with generated content came.
    pub fn first_at(&self) -> Option<At> {
        (self.len > 0).then_some(self.first_at)
    }

    /// The moments, at most eight. The first chunk is among them until it is forgotten.
    pub fn marks(&self) -> impl ExactSizeIterator<Item = Mark> + '_ {
        self.packed().iter().map(|mark| Mark {
            at: self.moment(*mark),
            chunks: mark.chunks,
            completion_tokens: Some(mark.completion_tokens).filter(|tokens| *tokens != UNKNOWN),
        })
    }

    fn packed(&self) -> &[Packed] {
        &self.marks[..usize::from(self.len)]
    }

    fn after_ms(&self, at: At) -> u32 {
        let ms = at.0.saturating_sub(self.first_at.0) / MILLISECOND_NS;
        u32::try_from(ms).unwrap_or(u32::MAX)
    }

    fn moment(&self, mark: Packed) -> At {
        At(self.first_at.0 + u64::from(mark.after_ms) * MILLISECOND_NS)
    }

    /// Whether enough time has passed for another mark.
    pub(super) fn is_due(&self, at: At) -> bool {
        let step_ms = STEP_MS.saturating_mul(self.stride);
        let last = self.packed().last();
        last.is_none_or(|last| self.after_ms(at).saturating_sub(last.after_ms) >= step_ms)
    }

    /// Notes the totals at a moment that is not before the last one.
    pub(super) fn mark(&mut self, mark: Mark) {
        if self.len == 0 {
            self.first_at = mark.at;
        }
        let packed = Packed {
            after_ms: self.after_ms(mark.at),
            chunks: mark.chunks,
            completion_tokens: mark.completion_tokens.unwrap_or(UNKNOWN),
        };
        let is_again = self
            .packed()
            .last()
            .is_some_and(|last| last.after_ms == packed.after_ms);
        if usize::from(self.len) == MARKS_MAX && !is_again {
            self.thin();
        }
        let index = usize::from(self.len) - usize::from(is_again);
        self.marks[index] = packed;
        self.len += u8::from(!is_again);
    }

    /// Gives up every other mark, but not the first.
    fn thin(&mut self) {
        self.stride = self.stride.saturating_mul(2);
        self.len = self.len.div_ceil(2);
        for index in 0..usize::from(self.len) {
            self.marks[index] = self.marks[2 * index];
        }
    }

    /// Forgets what lies before `at`, but for the last mark there, from which the next stretch begins. What comes now is known finely again.
    pub(super) fn forget_before(&mut self, at: At) {
        let passed = self.marks().filter(|mark| mark.at <= at).count();
        let from = passed.saturating_sub(1);
        self.marks.copy_within(from..usize::from(self.len), 0);
        // At most the length.
        self.len -= from as u8;
        self.stride = 1;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn progress(moments_ms: impl IntoIterator<Item = u64>) -> Progress {
        let mut progress = Progress::default();
        for (chunks, at_ms) in (1..).zip(moments_ms) {
            let at = At(at_ms * 1_000_000);
            if progress.is_due(at) {
                progress.mark(Mark {
                    at,
                    chunks,
                    completion_tokens: None,
                });
            }
        }
        progress
    }

    #[test]
    fn a_short_stream_has_a_mark_every_other_second() {
        let progress = progress((0..5_000).step_by(20));
        let chunks: Vec<u32> = progress.marks().map(|mark| mark.chunks).collect();
        assert_eq!(chunks, [1, 101, 201]);
    }

    #[test]
    fn a_long_stream_keeps_its_first_mark_and_equal_distances() {
        let progress = progress((0..7_200_000).step_by(50));
        let marks: Vec<Mark> = progress.marks().collect();
        assert_eq!(marks[0].at, At(0));
        assert!(marks.len() >= MARKS_MAX / 2);
        let gaps: Vec<u64> = marks.windows(2).map(|pair| pair[1].at.0 - pair[0].at.0).collect();
        let (least, most) = (gaps.iter().min().unwrap(), gaps.iter().max().unwrap());
        assert!(most <= &(2 * least), "{gaps:?}");
    }

    #[test]
    fn who_forgets_windows_sees_the_next_ones_as_finely() {
        let mut progress = Progress::default();
        for step in 0..3_500_u32 {
            let at = At(u64::from(step * STEP_MS) * MILLISECOND_NS);
            assert!(progress.is_due(at), "step {step}");
            progress.mark(Mark {
                at,
                chunks: step + 1,
                completion_tokens: Some(step),
            });
            if step % 7 == 6 {
                progress.forget_before(at);
            }
        }
        assert_eq!(progress.first_at(), Some(At(0)));
        assert_eq!(progress.marks().len(), 1);
    }

    proptest! {
        #[test]
        fn marks_are_in_order_and_few_whatever_comes(
            gaps_ms in prop::collection::vec(0_u64..5_000, 0..300),
            forgotten_ms in prop::collection::vec(0_u64..500_000, 0..4),
        ) {
            let mut now_ms = 0;
            let mut progress = progress(gaps_ms.iter().map(|gap_ms| {
                now_ms += gap_ms;
                now_ms
            }));
            for at_ms in forgotten_ms {
                let last = progress.marks().last();
                progress.forget_before(At(at_ms * 1_000_000));
                prop_assert_eq!(progress.marks().last(), last);
            }
            prop_assert!(progress.marks().len() <= MARKS_MAX);
            prop_assert!(progress.marks().is_sorted_by(|one, other| one.at < other.at && one.chunks < other.chunks));
        }
    }
}
