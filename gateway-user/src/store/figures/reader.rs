//! The connection, what can go wrong with it, and the query for the figures of requests.

use super::error::ReadError;
use super::{Dimension, Figures, Group, GroupedFigures, Percentiles, Period};
use crate::config::{StoreConfig, StoreUrl};
use crate::store::exception::{WaitCause, code_of, reason_of};
use crate::store::migrate;
use crate::store::sender;
use crate::store::service::url_of;
use crate::wire::endpoint::{Endpoint, Purpose};
use clickhouse::error::Error;
use clickhouse::{Client, Row, RowOwned, RowRead};
use serde::Deserialize;
use std::time::Duration;
use tokio::time::timeout;

/// How long ClickHouse may take to say which schema it has: one row of a small table.
const FIRST_ANSWER_MAX: Duration = Duration::from_secs(10);

/// How long it may take over the figures themselves.
pub(super) const FIGURES_MAX: Duration = Duration::from_secs(300);

/// Codes with which ClickHouse refuses the user. (`src/Common/ErrorCodes.cpp`)
const REFUSED_USER: [u32; 5] = [
    192, // UNKNOWN_USER
    193, // WRONG_PASSWORD
    194, // REQUIRED_PASSWORD
    497, // ACCESS_DENIED
    516, // AUTHENTICATION_FAILED
];

/// Reads from the ClickHouse of a config.
pub struct FiguresReader {
    pub(super) client: Client,
    url: String,
    config: StoreConfig,
}

impl FiguresReader {
    /// A reader of the ClickHouse that `config` names. Nothing is asked yet.
    ///
    /// # Errors
    /// [`ReadError::NoStore`].
    pub fn new(config: &StoreConfig) -> Result<FiguresReader, ReadError> {
        let url = url_of(config).ok_or(ReadError::NoStore)?;
        Ok(FiguresReader {
            client: sender::client(config, &url).with_database(&config.database),
            url,
            config: config.clone(),
        })
    }

    /// The figures of `period`, grouped by `by`, which must not be empty.
    ///
    /// # Errors
    /// [`ReadError`].
    pub async fn read(&self, period: Period, by: &[Dimension]) -> Result<GroupedFigures, ReadError> {
        self.check_schema().await?;
        let parameters = [
            ("generating", endpoints_of(Purpose::Generate)),
            ("pooling", endpoints_of(Purpose::Pool)),
        ];
        let rows: Vec<FiguresRow> = self.rows_with(&statement(by), period, parameters).await?;
        let mut grouped = GroupedFigures::default();
        for row in rows {
            // The total's array is the only one without elements.
            if row.keys.is_empty() {
                grouped.total = row.figures();
            } else {
                let figures = row.figures();
                grouped.groups.push(Group {
                    keys: row.keys,
                    figures,
                });
            }
        }
        Ok(grouped)
    }

    /// The rows of a statement about a period.
    pub(super) async fn rows<T: RowOwned + RowRead>(
        &self,
        statement: &str,
        period: Period,
    ) -> Result<Vec<T>, ReadError> {
        self.rows_with(statement, period, []).await
    }

    /// The same, with lists of names as further parameters.
    pub(super) async fn rows_with<T: RowOwned + RowRead, const N: usize>(
        &self,
        statement: &str,
        period: Period,
        lists: [(&str, Vec<&'static str>); N],
    ) -> Result<Vec<T>, ReadError> {
        let query = self.client.query(statement);
        let query = query
            .param("from_us", period.from_us)
            .param("to_us", period.to_us);
        let query = lists
            .into_iter()
            .fold(query, |query, (name, list)| query.param(name, list));
        self.answer(FIGURES_MAX, query.fetch_all()).await
    }

    /// Checks that the tables are those that this program reads.
    ///
    /// # Errors
    /// [`ReadError`].
    pub(crate) async fn check_schema(&self) -> Result<(), ReadError> {
        let found = self
            .answer(FIRST_ANSWER_MAX, migrate::version(&self.client))
            .await?;
        let known = migrate::known_version();
        let remedy = match found.cmp(&known) {
            std::cmp::Ordering::Equal => return Ok(()),
            std::cmp::Ordering::Less => {
                "the database is older than this program; start a gateway of this program with this config, which brings it up to date"
            }
            std::cmp::Ordering::Greater => {
                "the database is newer than this program; use a vllm-gateway at least as new as the one that wrote it"
            }
        };
        Err(ReadError::OtherSchema {
            database: self.config.database.clone(),
            found,
            known,
            remedy,
        })
    }

    pub(super) async fn answer<T>(
        &self,
        limit: Duration,
        question: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, ReadError> {
        match timeout(limit, question).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => Err(self.explain(&error)),
            Err(_) => Err(self.no_answer(format!("nothing within {} s", limit.as_secs()))),
        }
    }

    /// What stands in the way, in the words of a report.
    pub(crate) fn explain(&self, error: &Error) -> ReadError {
        let (url, found) = (self.url.clone(), reason_of(error));
        let database = self.config.database.clone();
        match (code_of(error), error) {
            (Some(code), _) if REFUSED_USER.contains(&code) => {
                let user = match &self.config.username {
                    Some(user) => format!("user {user}"),
                    None => "the default user".to_owned(),
                };
                ReadError::Refused {
                    url,
                    user,
                    database,
                    found,
                }
            }
            _ if WaitCause::of(error) == WaitCause::NoSchema => {
                ReadError::NoDatabase { url, database, found }
            }
            (_, Error::Network(_) | Error::TimedOut) => self.no_answer(innermost(error)),
            _ => ReadError::Failed { url, found },
        }
    }

    fn no_answer(&self, found: String) -> ReadError {
        let remedy = match self.config.url {
            StoreUrl::Embedded => {
                "the embedded engine runs while the gateway does: start `vllm-gateway run` with this config, or check store.embedded_listen \
                 (CLICKHOUSE_LISTEN_ADDR)"
            }
            _ => "start the server, or check store.url (CLICKHOUSE_URL)",
        };
        ReadError::NoAnswer {
            url: self.url.clone(),
            found,
            remedy,
        }
    }
}

/// The names of the routes that are there for something.
pub(super) fn endpoints_of(purpose: Purpose) -> Vec<&'static str> {
    let known = Endpoint::ALL.iter();
    known
        .filter(|endpoint| endpoint.purpose() == purpose)
        .map(|endpoint| endpoint.name())
        .collect()
}

/// What lies at the bottom of an error: above it stands only which layer passed it on.
fn innermost(error: &Error) -> String {
    let mut inner: &dyn std::error::Error = error;
    while let Some(source) = inner.source() {
        inner = source;
    }
    inner.to_string()
}

#[derive(Debug, Row, Deserialize)]
struct FiguresRow {
    keys: Vec<String>,
    requests: u64,
    ok: u64,
    errors: u64,
    aborted: u64,
    refused: u64,
    prompt: Option<u64>,
    cached: Option<u64>,
    completion: Option<u64>,
    reasoning: Option<u64>,
    unknown: u64,
    charge: i64,
    ttft: Vec<f32>,
    itl: Vec<f32>,
    e2e: Vec<f32>,
}

impl FiguresRow {
    fn figures(&self) -> Figures {
        Figures {
            requests: self.requests,
            ok: self.ok,
            errors: self.errors,
            aborted: self.aborted,
            refused: self.refused,
            prompt_tokens: self.prompt,
            cached_tokens: self.cached,
            completion_tokens: self.completion,
            reasoning_tokens: self.reasoning,
            unknown_token_requests: self.unknown,
            charge_nano_usd: self.charge,
            ttft: percentiles(&self.ttft),
            itl: percentiles(&self.itl),
            e2e: percentiles(&self.e2e),
        }
    }
}

/// ClickHouse says NaN where nothing was measured.
fn percentiles(found: &[f32]) -> Percentiles {
    let at = |index: usize| {
        let value = found.get(index).copied().filter(|value| value.is_finite());
        // Durations are not negative, and 2^64 µs are beyond any.
        value.map(|value| value.round() as u64)
    };
    Percentiles {
        p50_us: at(0),
        p95_us: at(1),
    }
}

/// The query for these groups. What a user says goes in as parameters, and a dimension is a column's name out of this file.
///
/// The table is in the order of when requests started. None that ended in the period can have started before it by more than the longest request
/// took, and that is known from one narrow column: so a day's report does not read a quarter's rows. (`started_at` is the same in every row of an
/// event, so that a condition on it may act before `FINAL` does.)
fn statement(by: &[Dimension]) -> String {
    let keys = by
        .iter()
        .map(|dimension| dimension.sql())
        .collect::<Vec<_>>()
        .join(", ");
    format!(
        "WITH (SELECT max(duration_us) FROM request_events WHERE started_at < fromUnixTimestamp64Micro({{to_us:Int64}}, 'UTC')) AS longest_us
        SELECT
            [{keys}] AS keys,
            count() AS requests,
            countIf(outcome = 'completed') AS ok,
            countIf(outcome NOT IN ('completed', 'aborted', 'refused')) AS errors,
            countIf(outcome = 'aborted') AS aborted,
            countIf(outcome = 'refused') AS refused,
            sum(prompt_tokens) AS prompt,
            sum(cached_tokens) AS cached,
            sum(completion_tokens) AS completion,
            sum(reasoning_tokens) AS reasoning,
            countIf(
                outcome NOT IN ('refused', 'unreachable', 'client_error')
                AND ((has({{generating:Array(String)}}, toString(endpoint)) AND (prompt_tokens IS NULL OR completion_tokens IS NULL))
                    OR (has({{pooling:Array(String)}}, toString(endpoint)) AND prompt_tokens IS NULL))
            ) AS unknown,
            sum(charge_nano_usd) AS charge,
            quantilesTDigest(0.5, 0.95)(ttft_us) AS ttft,
            quantilesTDigest(0.5, 0.95)(itl_mean_us) AS itl,
            quantilesTDigestIf(0.5, 0.95)(duration_us, outcome = 'completed') AS e2e
        FROM request_events FINAL
        WHERE ended_at >= fromUnixTimestamp64Micro({{from_us:Int64}}, 'UTC') AND ended_at < fromUnixTimestamp64Micro({{to_us:Int64}}, 'UTC')
            AND started_at >= fromUnixTimestamp64Micro({{from_us:Int64}} - toInt64(longest_us), 'UTC')
            AND started_at < fromUnixTimestamp64Micro({{to_us:Int64}}, 'UTC')
        GROUP BY GROUPING SETS ((keys), ())
        ORDER BY keys"
    )
}
