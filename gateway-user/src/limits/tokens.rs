//! What a request uses of its team's tokens, taken while it tells and at its end.

use crate::wire::At;
use crate::wire::facts::Tokens;

/// Time between two looks at a stream: what it has used is known to a second, and a chunk costs a comparison.
const LOOK_NS: u64 = 1_000_000_000;

/// Counts what one request has used, each token once.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meter {
    taken: u64,
    looked: At,
}

impl Meter {
    /// That of a request which begins.
    pub fn begin(now: At) -> Meter {
        Meter {
            taken: 0,
            looked: now,
        }
    }

    /// Whether it is time for another look.
    pub fn is_due(&self, now: At) -> bool {
        now.0.saturating_sub(self.looked.0) >= LOOK_NS
    }

    /// What is to be taken now that the request is known to have used `so_far`.
    pub fn more(&mut self, so_far: Tokens, now: At) -> u64 {
        self.looked = now;
        let total = used(so_far);
        let more = total.saturating_sub(self.taken);
        self.taken = self.taken.max(total);
        more
    }
}

/// What counts: prompt tokens, cached ones included, and those that were generated. What nobody told is nothing.
pub fn used(tokens: Tokens) -> u64 {
    let (prompt, completion) = (tokens.prompt.unwrap_or(0), tokens.completion.unwrap_or(0));
    prompt.saturating_add(completion)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tokens(prompt: u64, completion: u64) -> Tokens {
        Tokens {
            prompt: Some(prompt),
            completion: Some(completion),
            ..Tokens::default()
        }
    }

    #[test]
    fn a_stream_is_looked_at_by_the_second() {
        let mut meter = Meter::begin(At(5));
        assert!(!meter.is_due(At(LOOK_NS)) && meter.is_due(At(LOOK_NS + 5)));
        assert_eq!(meter.more(tokens(10, 1), At(LOOK_NS + 5)), 11);
        assert!(!meter.is_due(At(LOOK_NS + 6)));
        assert_eq!(meter.more(Tokens::default(), At(LOOK_NS + 7)), 0);
    }

    proptest! {
        /// However often it is looked at, what was taken in the end is the most that it was known to have used.
        #[test]
        fn each_token_is_taken_once(told in prop::collection::vec((0_u64..1000, 0_u64..1000), 1..50)) {
            let mut meter = Meter::begin(At(0));
            let taken: u64 = told.iter().map(|(prompt, completion)| meter.more(tokens(*prompt, *completion), At(0))).sum();
            let most = told.iter().map(|(prompt, completion)| prompt + completion).max();
            prop_assert_eq!(Some(taken), most);
        }
    }
}
