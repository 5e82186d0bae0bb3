//! Answers: status, headers and bodies as ClickHouse's HTTP interface sends them.

use super::engine::{Counts, EngineError};
use super::lz4;
use bytes::Bytes;
use hyper::body::{Body, Frame};
use hyper::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::{Response, StatusCode};
use std::fmt::Write as _;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::mpsc;

/// What a query sends while it runs.
#[derive(Debug)]
pub enum Event {
    /// The next bytes of the result.
    Piece(Bytes),
    /// The end.
    Done(Counts),
    /// The end, with an error.
    Failed(EngineError),
}

/// The headers that every answer of a query has.
#[derive(Debug, Clone)]
pub struct Face {
    /// The host's name.
    pub server: String,
    /// The engine's time zone, which clients read times with.
    pub timezone: String,
    /// The query's id.
    pub query_id: String,
    /// The result's format.
    pub format: String,
    /// The result goes out in compressed blocks.
    pub compress: bool,
    /// Marks an exception in mid-stream, so that data cannot be taken for one.
    pub exception_tag: String,
}

impl Face {
    /// An answer with these headers.
    pub fn answer(&self, status: StatusCode, summary: &str, body: AnswerBody) -> Response<AnswerBody> {
        let mut response = Response::new(body);
        *response.status_mut() = status;
        let mut header = |name: &'static str, value: &str| {
            // What no header can hold (a query id with a line break, say) is left out.
            if let Ok(value) = HeaderValue::from_str(value) {
                response
                    .headers_mut()
                    .insert(HeaderName::from_static(name), value);
            }
        };
        header("x-clickhouse-server-display-name", &self.server);
        header("x-clickhouse-query-id", &self.query_id);
        header("x-clickhouse-format", &self.format);
        header("x-clickhouse-timezone", &self.timezone);
        header("x-clickhouse-summary", summary);
        header("x-clickhouse-exception-tag", &self.exception_tag);
        response
            .headers_mut()
            .insert(CONTENT_TYPE, HeaderValue::from_static(content_type(&self.format)));
        response
    }

    /// The answer for an error before the first byte of a result.
    pub fn refusal(&self, error: &EngineError) -> Response<AnswerBody> {
        let body = AnswerBody::whole(format!("{}\n", error.message));
        let mut response = self.answer(
            status_of(error.code),
            &summary(&Counts::default(), Duration::ZERO),
            body,
        );
        response.headers_mut().insert(
            CONTENT_TYPE,
            HeaderValue::from_static("text/plain; charset=UTF-8"),
        );
        response
            .headers_mut()
            .insert("x-clickhouse-exception-code", HeaderValue::from(error.code));
        response
    }
}

/// `X-ClickHouse-Summary`: numbers as strings.
pub fn summary(counts: &Counts, elapsed: Duration) -> String {
    let Counts {
        rows_read,
        bytes_read,
        rows_written,
        bytes_written,
    } = counts;
    format!(
        r#"{{"read_rows":"{rows_read}","read_bytes":"{bytes_read}","written_rows":"{rows_written}","written_bytes":"{bytes_written}","total_rows_to_read":"0","result_rows":"{rows_written}","result_bytes":"{bytes_written}","elapsed_ns":"{}"}}"#,
        elapsed.as_nanos()
    )
}

fn content_type(format: &str) -> &'static str {
    match format {
        "JSON" | "JSONCompact" | "JSONStrings" | "JSONColumns" | "JSONColumnsWithMetadata" => {
            "application/json; charset=UTF-8"
        }
        "JSONEachRow" | "JSONLines" | "NDJSON" | "JSONCompactEachRow" | "JSONStringsEachRow" => {
            "application/x-ndjson; charset=UTF-8"
        }
        "CSV" | "CSVWithNames" | "CSVWithNamesAndTypes" => "text/csv; charset=UTF-8; header=absent",
        format if format.starts_with("TabSeparated") || format.starts_with("TSV") => {
            "text/tab-separated-values; charset=UTF-8"
        }
        "Native"
        | "RowBinary"
        | "RowBinaryWithNames"
        | "RowBinaryWithNamesAndTypes"
        | "Parquet"
        | "Arrow"
        | "ArrowStream"
        | "ORC" => "application/octet-stream",
        _ => "text/plain; charset=UTF-8",
    }
}

/// The status that ClickHouse gives an error code.
pub fn status_of(code: u32) -> StatusCode {
    match code {
        // REQUIRED_PASSWORD
        194 => StatusCode::UNAUTHORIZED,
        // UNKNOWN_USER, WRONG_PASSWORD, ACCESS_DENIED, SET_NON_GRANTED_ROLE, AUTHENTICATION_FAILED
        192 | 193 | 497 | 512 | 516 => StatusCode::FORBIDDEN,
        // What cannot be parsed or does not fit its type: the texts (6, 25, 26, 38, 41, 72, 27, 376, 675 to 677), columns (8, 15, 44),
        // values (36, 53, 69, 117, 321, 427), and statements (56, 62, 167, 168, 223).
        6
        | 8
        | 15
        | 25
        | 26
        | 27
        | 36
        | 38
        | 41
        | 44
        | 53
        | 56
        | 62
        | 69
        | 72
        | 117
        | 167
        | 168
        | 223
        | 321
        | 376
        | 427
        | 675..=677 => StatusCode::BAD_REQUEST,
        // UNKNOWN_ function, identifier, type, storage, table, aggregate function, format, type of query, database, direction of
        // sorting, setting, database engine, role
        46 | 47 | 50 | 56..=60 | 63 | 73 | 78 | 81 | 106 | 115 | 336 | 511 => StatusCode::NOT_FOUND,
        // TIMEOUT_EXCEEDED
        159 => StatusCode::REQUEST_TIMEOUT,
        // QUERY_IS_TOO_LARGE
        66 => StatusCode::PAYLOAD_TOO_LARGE,
        // NOT_IMPLEMENTED
        48 => StatusCode::NOT_IMPLEMENTED,
        // SOCKET_TIMEOUT, CANNOT_OPEN_FILE, CANNOT_SCHEDULE_TASK
        209 | 76 | 439 => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// The end of a result that failed on its way, as ClickHouse 25.11 and later write it and as clients find it.
fn exception_block(error: &EngineError, tag: &str) -> Bytes {
    let message = format!("{}\n", error.message);
    let mut block = format!("\r\n__exception__\r\n{tag}\r\n{message}");
    // Writing to a string cannot fail.
    let _ = write!(block, "{} {tag}\r\n__exception__\r\n", message.len());
    block.into()
}

/// A body: whole, or as the query gives it.
#[derive(Debug)]
pub struct AnswerBody {
    first: Option<Bytes>,
    rest: Option<mpsc::Receiver<Event>>,
    compress: bool,
    exception_tag: String,
    ending: Ending,
}

/// How far a result is.
#[derive(Debug, PartialEq, Eq)]
enum Ending {
    /// Going on.
    No,
    /// It failed, and the exception is on its way.
    Failed,
    /// The exception has left: the connection is cut, so that nobody takes the result for whole.
    Cut,
}

impl AnswerBody {
    /// All there is.
    pub fn whole(bytes: impl Into<Bytes>) -> AnswerBody {
        let first = Some(bytes.into()).filter(|bytes| !bytes.is_empty());
        AnswerBody {
            first,
            rest: None,
            compress: false,
            exception_tag: String::new(),
            ending: Ending::No,
        }
    }

    /// `first`, and then what comes.
    pub fn streamed(first: Bytes, rest: Option<mpsc::Receiver<Event>>, face: &Face) -> AnswerBody {
        let first = if face.compress && !first.is_empty() {
            lz4::encode(&first)
        } else {
            first
        };
        let first = Some(first).filter(|bytes| !bytes.is_empty());
        AnswerBody {
            first,
            rest,
            compress: face.compress,
            exception_tag: face.exception_tag.clone(),
            ending: Ending::No,
        }
    }

    fn packed(&self, bytes: Bytes) -> Bytes {
        if self.compress { lz4::encode(&bytes) } else { bytes }
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(Frame::data(first))));
        }
        match self.ending {
            Ending::No => {}
            Ending::Failed => {
                // hyper flushes what it has when a body is not ready; an error at once would throw the exception away.
                self.ending = Ending::Cut;
                context.waker().wake_by_ref();
                return Poll::Pending;
            }
            Ending::Cut => return Poll::Ready(Some(Err(io::Error::other("the query failed on its way")))),
        }
        let Some(rest) = &mut self.rest else {
            return Poll::Ready(None);
        };
        let event = std::task::ready!(rest.poll_recv(context));
        let failure = match event {
            Some(Event::Piece(bytes)) => return Poll::Ready(Some(Ok(Frame::data(self.packed(bytes))))),
            Some(Event::Done(_)) => {
                self.rest = None;
                return Poll::Ready(None);
            }
            Some(Event::Failed(error)) => error,
            None => EngineError::new(1002, "UNKNOWN_EXCEPTION", "the query ended without a word"),
        };
        self.ending = Ending::Failed;
        self.rest = None;
        let block = exception_block(&failure, &self.exception_tag);
        Poll::Ready(Some(Ok(Frame::data(self.packed(block)))))
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_none() && self.rest.is_none() && self.ending == Ending::No
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        match (&self.first, &self.rest, &self.ending) {
            (first, None, Ending::No) => {
                hyper::body::SizeHint::with_exact(first.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            _ => hyper::body::SizeHint::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_have_the_status_that_clickhouse_gives_them() {
        let cases = [
            (62, 400),
            (36, 400),
            (27, 400),
            (60, 404),
            (81, 404),
            (115, 404),
            (73, 404),
            (516, 403),
            (194, 401),
            (159, 408),
            (48, 501),
            (241, 500),
        ];
        for (code, status) in cases {
            assert_eq!(status_of(code).as_u16(), status, "{code}");
        }
    }

    #[test]
    fn the_exception_block_counts_its_message() {
        let block = exception_block(&EngineError::new(1, "X", "é"), "tag");
        let message = "Code: 1. DB::Exception: é (X)\n";
        let expected = format!(
            "\r\n__exception__\r\ntag\r\n{message}{} tag\r\n__exception__\r\n",
            message.len()
        );
        assert_eq!(block, expected.as_bytes());
    }

    #[test]
    fn the_summary_is_json_with_strings() {
        let counts = Counts {
            rows_read: 1,
            bytes_read: 2,
            rows_written: 3,
            bytes_written: 4,
        };
        let value: serde_json::Value =
            serde_json::from_str(&summary(&counts, Duration::from_micros(5))).unwrap();
        assert_eq!(
            (&value["written_rows"], &value["read_bytes"], &value["elapsed_ns"]),
            (&"3".into(), &"2".into(), &"5000".into())
        );
    }
}
