//! What is said of a config that cannot be used: every problem at once, each with its place.

use std::{fmt, io, path::PathBuf};

/// Longest quotation of a value in a message; more would bury the message.
const QUOTE_CHARS_MAX: usize = 64;

/// Why there is no [`Config`](super::Config).
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the config file {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is no YAML, or YAML of a kind that no config needs.
    #[error("{file}{}: not a config: {message}", line.map(|line| format!(":{line}")).unwrap_or_default())]
    Syntax {
        /// The file's name.
        file: String,
        /// Where reading stopped, counted from 1, if it is known.
        line: Option<usize>,
        /// What the reader said; it quotes nothing of the file.
        message: String,
    },
    /// Keys or values that cannot be used; never empty.
    #[error("{}", Listing(.0))]
    Invalid(Vec<Problem>),
}

/// One thing to correct.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where it was said.
    pub place: Place,
    /// What was expected, what was found, and what to do.
    pub message: String,
}

/// Where a setting comes from. The order is that of a listing: the file from top to bottom, then the rest.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// A line of the file, counted from 1.
    Line {
        /// The file's name.
        file: String,
        /// The line.
        line: usize,
    },
    /// An environment variable.
    Env(&'static str),
    /// Nobody said it: a default, or an absence.
    Default,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Line { file, line } => write!(f, "{file}:{line}"),
            Self::Env(variable) => write!(f, "environment variable {variable}"),
            Self::Default => f.write_str("built-in default"),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.message)
    }
}

struct Listing<'a>(&'a [Problem]);

impl fmt::Display for Listing<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let [problem] = self.0 {
            return problem.fmt(f);
        }
        write!(f, "the config has {} problems", self.0.len())?;
        self.0.iter().try_for_each(|problem| write!(f, "\n  {problem}"))
    }
}

/// Quotes a value for a message: escaped, so that it cannot forge log lines, and cut at [`QUOTE_CHARS_MAX`].
pub(crate) fn quote(text: &str) -> String {
    let mut escaped: String = text.escape_debug().take(QUOTE_CHARS_MAX).collect();
    if text.escape_debug().nth(QUOTE_CHARS_MAX).is_some() {
        escaped.push('…');
    }
    format!("`{escaped}`")
}

/// What to say of a key that is not known: the one most likely meant, else all that would be.
pub(super) fn suggest(unknown: &str, known: &[&str]) -> String {
    // A third of the letters wrong is still recognisable as a slip; beyond that a guess would mislead.
    let distance_max = (unknown.chars().count() / 3).max(2);
    let nearest = known.iter().map(|key| (edit_distance(unknown, key), key)).min();
    match nearest {
        Some((distance, key)) if distance <= distance_max => format!("did you mean `{key}`?"),
        _ => format!("known here: {}", known.join(", ")),
    }
}

/// Levenshtein's distance, by rows. A key longer than any known one is compared by its first 64 characters.
fn edit_distance(left: &str, right: &str) -> usize {
    let right: Vec<char> = right.chars().collect();
    let mut row: Vec<usize> = (0..=right.len()).collect();
    for (i, left_char) in left.chars().take(QUOTE_CHARS_MAX).enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, right_char) in right.iter().enumerate() {
            let substituted = diagonal + usize::from(left_char != *right_char);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[right.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_are_levenshteins() {
        for (left, right, distance) in [
            ("", "abc", 3),
            ("abc", "", 3),
            ("kitten", "sitting", 3),
            ("lisen", "listen", 1),
            ("same", "same", 0),
        ] {
            assert_eq!(edit_distance(left, right), distance, "{left} {right}");
        }
    }

    #[test]
    fn a_far_key_gets_the_list_instead_of_a_guess() {
        assert_eq!(suggest("lisen", &["workers", "listen"]), "did you mean `listen`?");
        assert_eq!(
            suggest("colour", &["listen", "workers"]),
            "known here: listen, workers"
        );
    }

    #[test]
    fn quotations_are_escaped_and_cut() {
        assert_eq!(quote("a\nb\u{1b}"), "`a\\nb\\u{1b}`");
        assert_eq!(quote(&"x".repeat(100)).chars().count(), QUOTE_CHARS_MAX + 3);
        assert_eq!(quote(&"x".repeat(64)).chars().count(), QUOTE_CHARS_MAX + 2);
    }

    #[test]
    fn all_problems_are_one_message() {
        let problem = |line| Problem {
            place: Place::Line {
                file: "c.yaml".into(),
                line,
            },
            message: "bad".into(),
        };
        assert_eq!(
            ConfigError::Invalid(vec![problem(3)]).to_string(),
            "c.yaml:3: bad"
        );
        let two = ConfigError::Invalid(vec![problem(3), problem(7)]).to_string();
        assert_eq!(two, "the config has 2 problems\n  c.yaml:3: bad\n  c.yaml:7: bad");
    }
}
