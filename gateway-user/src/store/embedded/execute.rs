//! One request on the engine, and its answer.
//!
//! Each query runs on a thread of its own, in a session of its own. Reads and inserts have separate places, so that neither waits for
//! the other; whoever finds no place waits for one, among a bounded number, for a bounded time.

use super::answer::{AnswerBody, Event, Face, summary};
use super::engine::{Counts, Engine, EngineError, Parameters, Session};
use super::format::Joiner;
use super::request::{Asked, multipart_boundary, multipart_fields, string_literal};
use super::sql::{InsertHead, Statement, classify};
use super::upload::{BodyReader, Upload, Uploads};
use bytes::{Bytes, BytesMut};
use hyper::body::Incoming;
use hyper::{Request, Response, StatusCode};
use rand::Rng;
use rand::distr::Alphanumeric;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::timeout;

/// Queries that run at a time. Each has threads of the engine; more would only take each other's processor and memory.
pub const READS_MAX: usize = 16;

/// Inserts that run at a time: the gateway sends one, others may load data.
pub const INSERTS_MAX: usize = 4;

/// Queries of either kind that wait for a place.
const WAITING_MAX: usize = 256;

/// How long one waits.
const WAIT_MAX: Duration = Duration::from_secs(30);

/// Statements are at most so long; what ClickHouse's parser takes by default (`max_query_size`).
const STATEMENT_MAX_BYTES: usize = 256 << 10;

/// Pieces of a result that wait for a slow reader. One is about a block of rows: 65,409 of them, or a megabyte from a table.
const PIECES_AHEAD: usize = 2;

/// A result that must be whole before its answer starts (`wait_end_of_query`) is held in memory; ClickHouse would use a file.
const WHOLE_MAX_BYTES: usize = 64 << 20;

/// Runs requests.
pub struct Executor {
    engine: Arc<Engine>,
    uploads: Uploads,
    reads: Places,
    inserts: Places,
    server: String,
    timezone: String,
}

/// Room for queries of one kind.
struct Places {
    running: Arc<Semaphore>,
    waiting: Semaphore,
}

impl Places {
    fn new(count: usize) -> Places {
        Places {
            running: Arc::new(Semaphore::new(count)),
            waiting: Semaphore::new(WAITING_MAX),
        }
    }

    async fn take(&self) -> Result<OwnedSemaphorePermit, EngineError> {
        let full = || {
            let message = "Too many simultaneous queries for the embedded ClickHouse: try again later";
            EngineError::new(202, "TOO_MANY_SIMULTANEOUS_QUERIES", message)
        };
        let _waiting = self.waiting.try_acquire().map_err(|_| full())?;
        let place = timeout(WAIT_MAX, Arc::clone(&self.running).acquire_owned()).await;
        place.ok().and_then(Result::ok).ok_or_else(full)
    }
}

/// A query, ready for the engine.
struct Job {
    preparation: Vec<String>,
    sql: BytesMut,
    format: String,
    parameters: Parameters,
    kind: Kind,
}

enum Kind {
    /// Its data stand in this file, which must live as long as the query.
    Insert { _upload: Option<Upload> },
    /// Its result goes out in pieces, if the engine can.
    Read,
}

impl Executor {
    /// Runs on `engine`; `uploads` is a directory for itself.
    ///
    /// # Errors
    /// When the directory cannot be used, or the engine does not answer.
    pub fn new(engine: Engine, uploads: &Path) -> anyhow::Result<Executor> {
        let engine = Arc::new(engine);
        let mut session = engine.session()?;
        let mut ask = |sql: &str| -> Result<String, EngineError> {
            let (text, _) = session.run(sql.as_bytes(), "TSVRaw", &Parameters::default())?;
            Ok(String::from_utf8_lossy(&text).trim().to_owned())
        };
        let (server, timezone) = (ask("SELECT displayName()")?, ask("SELECT timezone()")?);
        drop(session);
        let uploads = Uploads::new(uploads.to_owned())?;
        Ok(Executor {
            engine,
            uploads,
            reads: Places::new(READS_MAX),
            inserts: Places::new(INSERTS_MAX),
            server,
            timezone,
        })
    }

    /// The headers for a query.
    pub fn face(&self, asked: &Asked) -> Face {
        let random = |length| {
            rand::rng()
                .sample_iter(Alphanumeric)
                .take(length)
                .map(|byte| char::from(byte).to_ascii_lowercase())
                .collect()
        };
        Face {
            server: self.server.clone(),
            timezone: self.timezone.clone(),
            query_id: asked.query_id.clone().unwrap_or_else(|| random(32)),
            format: asked.format().to_owned(),
            compress: asked.compress,
            exception_tag: random(16),
        }
    }

    /// Runs what `asked` and the body say.
    pub async fn answer(&self, asked: Asked, request: Request<Incoming>) -> Response<AnswerBody> {
        let mut face = self.face(&asked);
        match self.try_answer(asked, request, &mut face).await {
            Ok(response) => response,
            Err(error) => face.refusal(&error),
        }
    }

    async fn try_answer(
        &self,
        asked: Asked,
        request: Request<Incoming>,
        face: &mut Face,
    ) -> Result<Response<AnswerBody>, EngineError> {
        let started = Instant::now();
        let wait_end = asked.wait_end_of_query;
        let protocol_version = asked.protocol_version;
        let job = self.job(asked, request).await?;
        face.format.clone_from(&job.format);
        if protocol_version > 0 && job.format == "Native" {
            let message = "the embedded ClickHouse writes Native of client_protocol_version 0 only: leave that parameter out, or ask for another format";
            return Err(EngineError::new(48, "NOT_IMPLEMENTED", message));
        }
        let places = if matches!(job.kind, Kind::Read) {
            &self.reads
        } else {
            &self.inserts
        };
        let place = places.take().await?;
        let (events, mut received) = mpsc::channel(PIECES_AHEAD);
        let engine = Arc::clone(&self.engine);
        tokio::task::spawn_blocking(move || {
            let end = match job.run(&engine, &events) {
                Ok(counts) => Event::Done(counts),
                Err(error) => Event::Failed(error),
            };
            // The session is closed and the file removed: only now may the next one have the place, and the client its answer.
            drop(place);
            let _ = events.blocking_send(end);
        });
        let mut held = BytesMut::new();
        loop {
            match received.recv().await {
                Some(Event::Piece(piece)) if !wait_end => {
                    let body = AnswerBody::streamed(piece, Some(received), face);
                    return Ok(face.answer(
                        StatusCode::OK,
                        &summary(&Counts::default(), started.elapsed()),
                        body,
                    ));
                }
                Some(Event::Piece(piece)) if held.len() + piece.len() <= WHOLE_MAX_BYTES => {
                    held.extend_from_slice(&piece)
                }
                Some(Event::Piece(_)) => {
                    let message = format!(
                        "the result has more than {WHOLE_MAX_BYTES} bytes: ask for it without wait_end_of_query"
                    );
                    return Err(EngineError::new(307, "TOO_MANY_BYTES", &message));
                }
                Some(Event::Done(counts)) => {
                    let body = AnswerBody::streamed(held.freeze(), None, face);
                    return Ok(face.answer(StatusCode::OK, &summary(&counts, started.elapsed()), body));
                }
                Some(Event::Failed(error)) => return Err(error),
                None => {
                    return Err(EngineError::new(
                        1002,
                        "UNKNOWN_EXCEPTION",
                        "the query's thread ended without an answer",
                    ));
                }
            }
        }
    }

    /// Reads the body, and makes a query of it.
    async fn job(&self, mut asked: Asked, request: Request<Incoming>) -> Result<Job, EngineError> {
        let boundary = multipart_boundary(request.headers());
        let mut body = BodyReader::new(request.into_body(), asked.decompress);
        let (mut beginning, mut is_all) = body.beginning(STATEMENT_MAX_BYTES).await?;
        if let Some(boundary) = boundary {
            if !is_all {
                return Err(statement_too_long());
            }
            for (name, value) in multipart_fields(&beginning, &boundary)? {
                asked.set(name, value)?;
            }
            (beginning, is_all) = (BytesMut::new(), true);
        }
        let mut sql = BytesMut::from(asked.query.as_bytes());
        if !sql.is_empty() && !sql.ends_with(b"\n") {
            sql.extend_from_slice(b"\n");
        }
        sql.extend_from_slice(&beginning);
        let (preparation, format) = (asked.preparation()?, asked.format().to_owned());
        let (sql, format, kind) = match classify(&sql) {
            Statement::Empty => return Err(EngineError::new(62, "SYNTAX_ERROR", "Empty query")),
            Statement::InsertData(head) => {
                let upload = self.uploads.store(&sql[head.data_at..], &mut body).await?;
                (
                    insert_from(&sql, &head, upload.path()),
                    format,
                    Kind::Insert {
                        _upload: Some(upload),
                    },
                )
            }
            _ if !is_all => return Err(statement_too_long()),
            Statement::InsertOther => (sql, format, Kind::Insert { _upload: None }),
            Statement::Other(named) => (sql, named.unwrap_or(format), Kind::Read),
        };
        Ok(Job {
            preparation,
            sql,
            format,
            parameters: asked.parameters,
            kind,
        })
    }
}

fn statement_too_long() -> EngineError {
    let message = format!("Max query size exceeded: a statement has at most {STATEMENT_MAX_BYTES} bytes");
    EngineError::new(62, "SYNTAX_ERROR", &message)
}

/// The statement that takes its data from the file.
fn insert_from(sql: &[u8], head: &InsertHead, file: &Path) -> BytesMut {
    let mut statement = BytesMut::from(&sql[..head.infile_at]);
    // Line breaks, since a comment may stand before.
    let infile = format!("\nFROM INFILE {} ", string_literal(&file.display().to_string()));
    statement.extend_from_slice(infile.as_bytes());
    statement.extend_from_slice(&sql[head.infile_at..head.head_ends]);
    statement.extend_from_slice(format!("\nFORMAT {}", head.format).as_bytes());
    statement
}

impl Job {
    /// Runs it; what it prints goes to `events`.
    fn run(self, engine: &Engine, events: &mpsc::Sender<Event>) -> Result<Counts, EngineError> {
        let mut session = engine.session()?;
        for statement in &self.preparation {
            session.run(statement.as_bytes(), "Null", &Parameters::default())?;
        }
        let joiner = if matches!(self.kind, Kind::Read) {
            Joiner::new(&self.format)
        } else {
            None
        };
        if let Some(joiner) = joiner {
            match self.stream(&mut session, joiner, events) {
                Err(error) if !Session::streams(&error) => {}
                ended => return ended,
            }
        }
        let (printed, counts) = session.run(&self.sql, &self.format, &self.parameters)?;
        send(events, printed)?;
        Ok(counts)
    }

    fn stream(
        &self,
        session: &mut Session,
        mut joiner: Joiner,
        events: &mpsc::Sender<Event>,
    ) -> Result<Counts, EngineError> {
        let mut stream = session.stream(&self.sql, &self.format, &self.parameters)?;
        while let Some(piece) = stream.next()? {
            send(events, joiner.add(piece)?)?;
        }
        Ok(Counts::default())
    }
}

/// Hands bytes over; an error means that nobody reads them any more, which stops the query.
fn send(events: &mpsc::Sender<Event>, bytes: Bytes) -> Result<(), EngineError> {
    if bytes.is_empty() {
        return Ok(());
    }
    let gone = |_| EngineError::new(394, "QUERY_WAS_CANCELLED", "the client has gone");
    events.blocking_send(Event::Piece(bytes)).map_err(gone)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_insert_takes_its_data_from_the_file() {
        let sql = b"INSERT INTO t (a) -- why\nSETTINGS b=1 FORMAT CSV\n1";
        let Statement::InsertData(head) = classify(sql) else {
            panic!("an insert")
        };
        let statement = insert_from(sql, &head, Path::new("/a'b/1"));
        assert_eq!(
            str::from_utf8(&statement).unwrap(),
            "INSERT INTO t (a) -- why\n\nFROM INFILE '/a\\'b/1' SETTINGS b=1 \nFORMAT CSV"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn who_finds_no_place_waits_and_is_then_refused() {
        let places = Places::new(1);
        let first = places.take().await.unwrap();
        assert_eq!(places.take().await.unwrap_err().code, 202);
        drop(first);
        drop(places.take().await.unwrap());
    }
}
