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
        let slot = match member {
            Member::Prompt => &mut self.prompt,
            Member::Completion => &mut self.completion,
            Member::Total => &mut self.total,
            Member::CacheRead => &mut self.cache_read,
            Member::CacheCreation => &mut self.cache_creation,
            Member::Cached => &mut self.cached,
            Member::Reasoning => &mut self.reasoning,
            Member::PromptDetails | Member::CompletionDetails => return,
        };
        *slot = count;
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

    fn cached(&self) -> Option<u64> {
        self.cached.or(self.cache_read)
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
            cached: self.cached(),
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
            cached: first.filter(|_| is_one_prompt).and_then(Usage::cached),
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
