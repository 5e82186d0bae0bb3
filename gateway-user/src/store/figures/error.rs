//! What can stand in the way of figures: what was expected, what was found, what to do.

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// `store.url` is `none`.
    #[error(
        "store.url is `none`, so that no rows are kept: set it (or CLICKHOUSE_URL) to `embedded` or to a ClickHouse server"
    )]
    NoStore,
    /// Nobody answers, or not in time.
    #[error("expected ClickHouse at {url}, found that it does not answer: {found}; {remedy}")]
    NoAnswer {
        /// Where.
        url: String,
        /// What the connection says.
        found: String,
        /// What to do.
        remedy: &'static str,
    },
    /// The user is not let in, or may not read.
    #[error(
        "expected ClickHouse at {url} to let {user} read database {database}, found that it refuses ({found}): check store.username and \
         store.password (CLICKHOUSE_USERNAME, CLICKHOUSE_PASSWORD), and that the user may SELECT there"
    )]
    Refused {
        /// Where.
        url: String,
        /// Who.
        user: String,
        /// What was to be read.
        database: String,
        /// Code and name of the exception.
        found: String,
    },
    /// The database or its tables are not there.
    #[error(
        "expected database {database} with a gateway's tables at {url}, found none ({found}): check store.database (CLICKHOUSE_DATABASE); a \
         gateway that runs with this config makes it"
    )]
    NoDatabase {
        /// Where.
        url: String,
        /// What was looked for.
        database: String,
        /// Code and name of the exception.
        found: String,
    },
    /// The database has another schema than this program reads.
    #[error("expected schema version {known} in database {database}, found {found}: {remedy}")]
    OtherSchema {
        /// The database.
        database: String,
        /// Its version.
        found: u32,
        /// The version that this program reads.
        known: u32,
        /// What to do.
        remedy: &'static str,
    },
    /// ClickHouse would not answer this question.
    #[error(
        "expected figures from ClickHouse at {url}, found {found}: if it runs out of memory or time, ask for a shorter period"
    )]
    Failed {
        /// Where.
        url: String,
        /// Code and name of the exception.
        found: String,
    },
}
