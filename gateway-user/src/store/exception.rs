//! What a failed call of ClickHouse means: for the rows, for whoever counts, and for whoever has to do something about it.

use clickhouse::error::Error;
use std::error::Error as _;

/// Codes with which ClickHouse refuses the data itself: the same bytes will be refused again. Every other code is taken to pass, since a row put aside by
/// mistake needs a person, and a retry does not. (`src/Common/ErrorCodes.cpp`)
const REFUSED_ROWS: [u32; 14] = [
    6,   // CANNOT_PARSE_TEXT
    7,   // INCORRECT_NUMBER_OF_COLUMNS
    26,  // CANNOT_PARSE_QUOTED_STRING
    27,  // CANNOT_PARSE_INPUT_ASSERTION_FAILED
    32,  // ATTEMPT_TO_READ_AFTER_EOF
    33,  // CANNOT_READ_ALL_DATA
    38,  // CANNOT_PARSE_DATE
    41,  // CANNOT_PARSE_DATETIME
    53,  // TYPE_MISMATCH
    70,  // CANNOT_CONVERT_TYPE
    72,  // CANNOT_PARSE_NUMBER
    117, // INCORRECT_DATA
    131, // TOO_LARGE_STRING_SIZE
    349, // CANNOT_INSERT_NULL_IN_ORDINARY_COLUMN
];

/// What a failed insert means for its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nobody knows whether the rows are in.
    Unknown,
    /// They are not, and will not be: the data is refused.
    Refused,
    /// They are not: the schema is missing, and is made again before the next try.
    NoSchema,
}

/// Why rows wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WaitCause {
    /// There is no connection to ClickHouse, or it broke off.
    Unreachable,
    /// No answer came in time.
    TimedOut,
    /// The user or its password is refused, or may not do what the gateway does.
    AccessDenied,
    /// The database or a table is missing.
    NoSchema,
    /// The schema is newer than this program.
    SchemaTooNew,
    /// ClickHouse's disk is full.
    DiskFull,
    /// It has too much to do, or too little memory.
    Overloaded,
    /// It takes no writes.
    ReadOnly,
    /// A replica does not have yet what another one has.
    ReplicaBehind,
    /// It refused for another reason.
    Exception,
    /// Something answered, but not as ClickHouse does.
    Answer,
    /// A file of the spool cannot be read or removed.
    SpoolFile,
}

impl WaitCause {
    /// Every cause.
    pub const ALL: [WaitCause; 12] = [
        WaitCause::Unreachable,
        WaitCause::TimedOut,
        WaitCause::AccessDenied,
        WaitCause::NoSchema,
        WaitCause::SchemaTooNew,
        WaitCause::DiskFull,
        WaitCause::Overloaded,
        WaitCause::ReadOnly,
        WaitCause::ReplicaBehind,
        WaitCause::Exception,
        WaitCause::Answer,
        WaitCause::SpoolFile,
    ];

    /// The name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            WaitCause::Unreachable => "unreachable",
            WaitCause::TimedOut => "timed_out",
            WaitCause::AccessDenied => "access_denied",
            WaitCause::NoSchema => "no_schema",
            WaitCause::SchemaTooNew => "schema_too_new",
            WaitCause::DiskFull => "disk_full",
            WaitCause::Overloaded => "overloaded",
            WaitCause::ReadOnly => "read_only",
            WaitCause::ReplicaBehind => "replica_behind",
            WaitCause::Exception => "exception",
            WaitCause::Answer => "answer",
            WaitCause::SpoolFile => "spool_file",
        }
    }

    /// What whoever reads the log can do.
    pub fn advice(self) -> &'static str {
        match self {
            WaitCause::Unreachable => {
                "see that it runs, and that store.url (CLICKHOUSE_URL) is where it listens for HTTP"
            }
            WaitCause::TimedOut => "see what keeps it busy, or what stands between it and the gateway",
            WaitCause::AccessDenied => {
                "set store.username and store.password (CLICKHOUSE_USERNAME, CLICKHOUSE_PASSWORD) to a user who may create, insert into \
                 and read the tables of store.database"
            }
            WaitCause::NoSchema => "somebody has removed the database or a table; the gateway makes it again",
            WaitCause::SchemaTooNew => {
                "start a gateway as new as the one that wrote it, or set store.database"
            }
            WaitCause::DiskFull => "free space on ClickHouse's disk, or shorten store.raw_days",
            WaitCause::Overloaded => "give it time, memory or fewer queries",
            WaitCause::ReadOnly => {
                "see whether its disk or its Keeper is gone, or the user's profile is readonly"
            }
            WaitCause::ReplicaBehind => {
                "nothing, if it passes; else see whether the replicas reach each other"
            }
            WaitCause::Exception => "look the code up, and the query in ClickHouse's own log",
            WaitCause::Answer => {
                "expected ClickHouse's HTTP interface: see what store.url (CLICKHOUSE_URL) leads to"
            }
            WaitCause::SpoolFile => "see the disk that spool.dir (SPOOL_DIR) is on",
        }
    }

    /// What an error of ClickHouse's client stands for.
    pub fn of(error: &Error) -> WaitCause {
        match (code_of(error), error) {
            (Some(60 | 81), _) => WaitCause::NoSchema,
            // REQUIRED_PASSWORD, WRONG_PASSWORD and their like, ACCESS_DENIED, AUTHENTICATION_FAILED
            (Some(192..=195 | 497 | 516), _) => WaitCause::AccessDenied,
            (Some(243), _) => WaitCause::DiskFull,
            // TIMEOUT_EXCEEDED, TOO_MANY_SIMULTANEOUS_QUERIES, MEMORY_LIMIT_EXCEEDED, TOO_MANY_PARTS
            (Some(159 | 202 | 241 | 252), _) => WaitCause::Overloaded,
            // READONLY, TABLE_IS_READ_ONLY
            (Some(164 | 242), _) => WaitCause::ReadOnly,
            // FUNCTION_THROW_IF_VALUE_IS_NON_ZERO: the gateway's own check, see `windows`.
            (Some(395), _) => WaitCause::ReplicaBehind,
            (Some(_), _) => WaitCause::Exception,
            (None, Error::Network(_)) => WaitCause::Unreachable,
            (None, Error::TimedOut) => WaitCause::TimedOut,
            (None, _) => WaitCause::Answer,
        }
    }
}

/// The code of an exception, if ClickHouse sent one.
pub fn code_of(error: &Error) -> Option<u32> {
    let Error::BadResponse(text) = error else {
        return None;
    };
    let digits = text.split("Code: ").nth(1)?;
    digits.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// What a failed insert means for its rows.
pub fn verdict(error: &Error) -> Verdict {
    match code_of(error) {
        Some(code) if REFUSED_ROWS.contains(&code) => Verdict::Refused,
        _ if WaitCause::of(error) == WaitCause::NoSchema => Verdict::NoSchema,
        _ => Verdict::Unknown,
    }
}

/// What may be logged of an error: its code and name. Its text quotes the data.
pub fn reason_of(error: &Error) -> String {
    let text = match error {
        Error::BadResponse(text) => text,
        other => return with_sources(other),
    };
    let Some(code) = code_of(error) else {
        return "an answer that is no exception of ClickHouse".to_owned();
    };
    let name = text.rsplit('(').find_map(|part| {
        let name = part.split(')').next()?;
        let is_name = name.len() > 3
            && name
                .bytes()
                .all(|byte| byte.is_ascii_uppercase() || byte == b'_' || byte.is_ascii_digit());
        is_name.then_some(name)
    });
    format!("code {code} {}", name.unwrap_or_default())
}

/// An error with what is behind it: "client error (Connect)" alone says nothing.
pub fn with_sources(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        // Some errors repeat their source's text.
        if !text.contains(&cause_text) {
            text += ": ";
            text += &cause_text;
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exception(text: &str) -> Error {
        Error::BadResponse(text.to_owned())
    }

    #[test]
    fn only_what_will_always_be_refused_is_put_aside() {
        let parse = exception(
            "Code: 27. DB::Exception: Cannot parse input: expected '\"' before: 'my secret' (CANNOT_PARSE_INPUT_ASSERTION_FAILED)",
        );
        assert_eq!(verdict(&parse), Verdict::Refused);
        for text in [
            "Code: 243. DB::Exception: Cannot reserve (NOT_ENOUGH_SPACE)",
            "Code: 516. DB::Exception: (AUTHENTICATION_FAILED)",
            "upstream connect error",
        ] {
            assert_eq!(verdict(&exception(text)), Verdict::Unknown, "{text}");
        }
        assert_eq!(
            verdict(&exception(
                "Code: 60. DB::Exception: Unknown table (UNKNOWN_TABLE)"
            )),
            Verdict::NoSchema
        );
        let reason = reason_of(&parse);
        assert_eq!(reason, "code 27 CANNOT_PARSE_INPUT_ASSERTION_FAILED");
        assert!(!reason.contains("secret"), "an exception quotes the data");
    }

    #[test]
    fn each_cause_has_a_place_and_a_name_of_its_own() {
        for (index, cause) in WaitCause::ALL.into_iter().enumerate() {
            assert_eq!(cause as usize, index);
            let namesakes = WaitCause::ALL.iter().filter(|other| other.name() == cause.name());
            assert_eq!(namesakes.count(), 1);
        }
    }

    #[test]
    fn a_cause_is_known_by_the_code_or_the_kind_of_failure() {
        for (error, cause) in [
            (
                exception("Code: 243. DB::Exception: x (NOT_ENOUGH_SPACE)"),
                WaitCause::DiskFull,
            ),
            (
                exception("Code: 516. DB::Exception: x (AUTHENTICATION_FAILED)"),
                WaitCause::AccessDenied,
            ),
            (
                exception("Code: 81. DB::Exception: x (UNKNOWN_DATABASE)"),
                WaitCause::NoSchema,
            ),
            (
                exception("Code: 1002. DB::Exception: x (UNKNOWN_EXCEPTION)"),
                WaitCause::Exception,
            ),
            (exception("<html>502 Bad Gateway</html>"), WaitCause::Answer),
            (Error::TimedOut, WaitCause::TimedOut),
            (
                Error::Network("connection refused".into()),
                WaitCause::Unreachable,
            ),
        ] {
            assert_eq!(WaitCause::of(&error), cause, "{error}");
        }
    }
}
