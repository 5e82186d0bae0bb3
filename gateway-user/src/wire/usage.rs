//! Token counts, in every shape that vLLM's routes report them.
//!
//! OpenAI's chat and completions have `prompt_tokens` and `completion_tokens`, Responses `input_tokens` and `output_tokens`, with the
//! cached part inside the prompt. Anthropic's Messages have `input_tokens` *without* what was read from or written to the cache, so
//! that the prompt is the sum of three. Old rerank routes have only `total_tokens`.

use super::facts::Tokens;

/// Choices whose own counts are remembered while a stream runs. vLLM's `n` is rarely above 10; with more choices than this a stream
/// that breaks off has unknown counts.
const MAX_CHOICES: usize = 128;

/// A member of a `usage` object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Member {
    Prompt,
    Completion,
    Total,
    CacheRead,
    CacheCreation,
    Cached,
    Reasoning,
    PromptDetails,
    CompletionDetails,
}

impl Member {
    /// The member of `usage` with this name.
    pub(super) fn of_usage(key: &[u8]) -> Option<Member> {
        Some(match key {
            b"prompt_tokens" | b"input_tokens" => Member::Prompt,
            b"completion_tokens" | b"output_tokens" => Member::Completion,
            b"total_tokens" => Member::Total,
            b"cache_read_input_tokens" => Member::CacheRead,
            b"cache_creation_input_tokens" => Member::CacheCreation,
            b"prompt_tokens_details" | b"input_tokens_details" => Member::PromptDetails,
            b"completion_tokens_details" | b"output_tokens_details" => Member::CompletionDetails,
            _ => return None,
        })
    }

    /// The member with this name of an object within `usage`.
    pub(super) fn of_details(self, key: &[u8]) -> Option<Member> {
        match (self, key) {
            (Member::PromptDetails, b"cached_tokens") => Some(Member::Cached),
            (Member::CompletionDetails, b"reasoning_tokens") => Some(Member::Reasoning),
            _ => None,
        }
    }
}

/// One `usage` object.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Usage {
    prompt: Option<u64>,
    completion: Option<u64>,
    total: Option<u64>,
    cache_read: Option<u64>,
    cache_creation: Option<u64>,
    cached: Option<u64>,
    reasoning: Option<u64>,
}

impl Usage {
    pub(super) fn set(&mut self, member: Member, count: Option<u64>) {
        match member {
            Member::Prompt => self.prompt = count,
            Member::Completion => self.completion = count,
            Member::Total => self.total = count,
            Member::CacheRead => {
                self.cache_read = count;
                self.cached = count;
            }
            Member::CacheCreation => self.cache_creation = count,
            Member::Cached => self.cached = count,
            Member::Reasoning => self.reasoning = count,
            Member::PromptDetails | Member::CompletionDetails => {}
        }
    }

    /// Everything that the prompt had, whether cached or not.
    fn prompt(&self) -> Option<u64> {
        if self.prompt.is_none() && self.completion.is_none() {
            return self.total;
        }
        let beside = self
            .cache_read
            .unwrap_or(0)
            .checked_add(self.cache_creation.unwrap_or(0))?;
        self.prompt?.checked_add(beside)
    }

    /// Whether it says anything about tokens (audio may report seconds instead).
    pub(super) fn is_empty(&self) -> bool {
        *self == Usage::default()
    }

    /// The input side of `start` where this one has none: Anthropic's last usage may tell the output alone.
    pub(super) fn with_input_of(self, start: Option<Usage>) -> Usage {
        match start {
            Some(start) if self.prompt.is_none() => Usage {
                completion: self.completion,
                reasoning: self.reasoning,
                ..start
            },
            _ => self,
        }
    }

    /// Without the output side, which was told before anything was generated.
    pub(super) fn input_only(self) -> Usage {
        Usage {
            completion: None,
            reasoning: None,
            ..self
        }
    }

    /// The counts of an exchange whose prompts ran `times` over in the engine (once for each choice), if that is known.
    pub(super) fn tokens(&self, times: Option<u32>) -> Tokens {
        let prompt = self.prompt();
        Tokens {
            prompt,
            cached: self.cached,
            completion: self.completion,
            reasoning: self.reasoning,
            engine_prompt: times_over(prompt, times),
            engine_completion: self.completion,
        }
    }
}

fn times_over(prompt: Option<u64>, times: Option<u32>) -> Option<u64> {
    prompt?.checked_mul(u64::from(times?))
}

/// How many choices there are to each prompt, and how many prompts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Spread {
    pub(super) choices: u32,
    pub(super) prompts: u32,
}

/// The last usage of each choice, for streams that carry usage on every chunk and then break off.
#[derive(Clone, Debug, Default)]
pub(super) struct Running {
    first: Option<Usage>,
    /// Of the choices from the second on; nothing is allocated while there is one.
    others: Vec<Option<Usage>>,
    /// Something was missed or could not be placed, so that a sum would be wrong.
    is_unknown: bool,
}

impl Running {
    /// The usage of a chunk that belongs to the choice at `index`.
    pub(super) fn set(&mut self, index: u64, usage: Usage) {
        if index == 0 {
            self.first = Some(usage);
            return;
        }
        let Some(at) = usize::try_from(index - 1).ok().filter(|at| *at < MAX_CHOICES - 1) else {
            self.is_unknown = true;
            return;
        };
        if self.others.len() <= at {
            self.others.resize(at + 1, None);
        }
        self.others[at] = Some(usage);
    }

    /// A usage that cannot be told to belong to one choice.
    pub(super) fn set_unplaced(&mut self) {
        self.is_unknown = true;
    }

    /// Bytes are missing: what came before may be stale.
    pub(super) fn lose(&mut self) {
        self.is_unknown |= !self.others.is_empty();
        self.first = None;
    }

    fn of(&self, index: usize) -> Option<&Usage> {
        match index.checked_sub(1) {
            None => self.first.as_ref(),
            Some(at) => self.others.get(at)?.as_ref(),
        }
    }

    /// The counts so far, as far as they follow. `spread` is `None` when it is not known how choices divide into prompts.
    pub(super) fn tokens(&self, spread: Option<Spread>) -> Tokens {
        if self.is_unknown || (self.first.is_none() && self.others.is_empty()) {
            return Tokens::default();
        }
        let seen = self.first.iter().chain(self.others.iter().flatten());
        let completion = seen
            .map(|usage| usage.completion)
            .try_fold(0_u64, |sum, count| sum.checked_add(count?));
        let prompt = spread.and_then(|spread| self.prompt(spread));
        // Parts of the counts are told for one choice or one prompt only; sums of them would be wrong with more.
        let first = self.first.as_ref();
        let is_one_prompt = spread.is_some_and(|spread| spread.prompts == 1);
        Tokens {
            prompt,
            cached: first.filter(|_| is_one_prompt).and_then(|usage| usage.cached),
            completion,
            reasoning: first
                .filter(|_| self.others.is_empty())
                .and_then(|usage| usage.reasoning),
            engine_prompt: times_over(prompt, spread.map(|spread| spread.choices)),
            engine_completion: completion,
        }
    }

    /// The sum over the prompts, each of which its choices repeat. Unknown while a prompt has not been heard of.
    fn prompt(&self, spread: Spread) -> Option<u64> {
        let (choices, prompts) = (spread.choices as usize, spread.prompts as usize);
        if prompts.checked_mul(choices)? > MAX_CHOICES {
            return None;
        }
        (0..prompts).try_fold(0_u64, |sum, prompt| {
            let usage = (0..choices).find_map(|choice| self.of(prompt * choices + choice))?;
            sum.checked_add(usage.prompt()?)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn usage(prompt: u64, completion: u64) -> Usage {
        let mut usage = Usage::default();
        usage.set(Member::Prompt, Some(prompt));
        usage.set(Member::Completion, Some(completion));
        usage
    }

    #[test]
    fn billed_and_engine_prompts_differ_by_the_choices() {
        let tokens = usage(19, 16).tokens(Some(2));
        assert_eq!((tokens.prompt, tokens.engine_prompt), (Some(19), Some(38)));
        assert_eq!(
            (tokens.completion, tokens.engine_completion),
            (Some(16), Some(16))
        );
        assert_eq!(usage(19, 16).tokens(None).engine_prompt, None);
    }

    #[test]
    fn sums_that_overflow_are_unknown() {
        assert_eq!(usage(u64::MAX, 1).tokens(Some(2)).engine_prompt, None);
        let mut read = usage(u64::MAX, 1);
        read.set(Member::CacheRead, Some(1));
        assert_eq!(read.tokens(Some(1)).prompt, None);
    }

    #[test]
    fn what_is_told_of_one_choice_only_is_not_summed() {
        let mut first = usage(4, 1);
        first.set(Member::Cached, Some(3));
        first.set(Member::Reasoning, Some(1));
        let spread = |choices, prompts| Some(Spread { choices, prompts });
        let mut running = Running::default();
        assert_eq!(running.tokens(spread(1, 1)), Tokens::default());
        running.set(0, first);
        let alone = running.tokens(spread(1, 1));
        assert_eq!((alone.cached, alone.reasoning), (Some(3), Some(1)));
        running.set(1, usage(4, 2));
        let both = running.tokens(spread(2, 1));
        assert_eq!(
            (both.cached, both.reasoning, both.completion),
            (Some(3), None, Some(3))
        );
        assert_eq!(running.tokens(spread(1, 2)).cached, None);
    }

    #[test]
    fn after_a_loss_only_a_single_choice_can_be_known_again() {
        let spread = Some(Spread {
            choices: 1,
            prompts: 1,
        });
        let mut single = Running::default();
        single.set(0, usage(4, 1));
        single.lose();
        assert_eq!(single.tokens(spread), Tokens::default());
        single.set(0, usage(4, 9));
        assert_eq!(single.tokens(spread).completion, Some(9));
        let mut several = Running::default();
        several.set(1, usage(4, 1));
        several.lose();
        several.set(0, usage(4, 9));
        assert_eq!(several.tokens(spread), Tokens::default());
    }
}
