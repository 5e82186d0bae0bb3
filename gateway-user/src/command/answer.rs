//! How a command ends: what it prints where, and its exit code.

use std::fmt::Display;
use std::io::{self, Write};

use super::exit;
use crate::config::ConfigError;

/// What a command that could do its work has to say.
#[derive(Debug, Default)]
pub struct Answer {
    /// For standard output.
    pub text: String,
    /// For standard error, whole lines: what a reader should know beside it.
    pub notes: String,
    /// The exit code.
    pub code: u8,
}

impl Answer {
    /// An answer with nothing beside it.
    pub fn of(text: String) -> Answer {
        Answer {
            text,
            ..Answer::default()
        }
    }
}

/// Why a command could not do its work.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    message: String,
    code: u8,
}

impl Failure {
    /// What stood in the way, and the exit code for it.
    pub fn new(why: impl Display, code: u8) -> Failure {
        Failure {
            message: why.to_string(),
            code,
        }
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Failure {
        Failure::new(error, exit::CONFIG)
    }
}

/// Writes an answer to `out` and its notes to `err`, or a failure to `err`. Returns the exit code.
///
/// # Errors
/// When it cannot be written. A reader that has seen enough (`| head`) is none.
pub fn end(done: Result<Answer, Failure>, out: &mut dyn Write, err: &mut dyn Write) -> io::Result<u8> {
    let answer = match done {
        Ok(answer) => answer,
        Err(failure) => {
            writeln!(err, "{failure}")?;
            return Ok(failure.code);
        }
    };
    err.write_all(answer.notes.as_bytes())?;
    match out.write_all(answer.text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
        _ => Ok(answer.code),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Closed(io::ErrorKind);

    impl Write for Closed {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(self.0.into())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn answer() -> Answer {
        Answer {
            text: "figures\n".to_owned(),
            notes: "a doubt\n".to_owned(),
            code: exit::UNEVEN,
        }
    }

    #[test]
    fn figures_and_what_is_said_of_them_go_to_two_places() {
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let code = end(Ok(answer()), &mut out, &mut err).expect("it is written");
        assert_eq!(
            (code, &out[..], &err[..]),
            (70, &b"figures\n"[..], &b"a doubt\n"[..])
        );
        let failure = Failure::new("nobody answers", exit::UNAVAILABLE);
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let code = end(Err(failure), &mut out, &mut err).expect("it is written");
        assert_eq!(
            (code, &out[..], &err[..]),
            (69, &b""[..], &b"nobody answers\n"[..])
        );
    }

    #[test]
    fn a_reader_that_has_seen_enough_is_no_error_and_a_full_disk_is() {
        let mut err = Vec::new();
        let gone = end(Ok(answer()), &mut Closed(io::ErrorKind::BrokenPipe), &mut err);
        assert_eq!(gone.expect("no error"), 70);
        let full = end(Ok(answer()), &mut Closed(io::ErrorKind::StorageFull), &mut err);
        assert_eq!(
            full.expect_err("figures are missing").kind(),
            io::ErrorKind::StorageFull
        );
    }
}
