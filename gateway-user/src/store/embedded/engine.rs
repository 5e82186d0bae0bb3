//! libchdb's C interface, made safe: an engine, connections to it, and results.
//!
//! As measured with the pinned version: connections to one engine are sessions of their own (settings, parameters and database stay
//! with the connection), run truly side by side, and cost 1.6 ms to open, query and close. An engine has one data directory, and a
//! process has one engine; it ends when its last connection is closed, hence one that is kept.

use bytes::Bytes;
use libloading::{Library, Symbol};
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::marker::PhantomData;
use std::path::Path;
use std::sync::Arc;

/// What the engine says when it refuses; its text starts with `Code: N. DB::Exception: `.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct EngineError {
    /// ClickHouse's number of the error.
    pub code: u32,
    /// The whole text.
    pub message: String,
}

/// `UNKNOWN_EXCEPTION`, for a text that has no number.
const CODE_UNKNOWN: u32 = 1002;

impl EngineError {
    /// An error in ClickHouse's shape that this program raises itself; `name` as in ClickHouse's list of error codes.
    pub fn new(code: u32, name: &str, message: &str) -> EngineError {
        EngineError {
            code,
            message: format!("Code: {code}. DB::Exception: {message} ({name})"),
        }
    }

    fn from_text(text: &str) -> EngineError {
        let digits = text
            .strip_prefix("Code: ")
            .and_then(|rest| rest.split('.').next());
        match digits.and_then(|digits| digits.parse().ok()) {
            Some(code) => EngineError {
                code,
                message: text.to_owned(),
            },
            None => EngineError::new(CODE_UNKNOWN, "UNKNOWN_EXCEPTION", text),
        }
    }
}

/// The engine cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The library is not one, or not for this machine, or of a version without a function that is needed.
    #[error("{path} cannot be loaded as libchdb: {source}")]
    Load {
        /// The library.
        path: String,
        /// What the loader says.
        source: libloading::Error,
    },
    /// A path that C cannot be given.
    #[error("{0:?} holds a NUL byte")]
    Path(String),
    /// It was loaded, but gives no connection.
    #[error("the engine does not open {0}: see its messages above")]
    Open(String),
}

/// `chdb_result *`.
type RawResult = *mut c_void;
/// `chdb_connection`, which is a pointer.
type RawConnection = *mut c_void;

type Query = unsafe extern "C" fn(
    RawConnection,
    *const c_char,
    usize,
    *const c_char,
    usize,
    *const *const c_char,
    *const usize,
    *const *const c_char,
    *const usize,
    usize,
) -> RawResult;

/// The functions that are used. They stay valid: the library is never unloaded, since its threads run in it.
struct Api {
    connect: unsafe extern "C" fn(c_int, *mut *mut c_char) -> *mut RawConnection,
    close: unsafe extern "C" fn(*mut RawConnection),
    query: Query,
    stream: Query,
    fetch: unsafe extern "C" fn(RawConnection, RawResult) -> RawResult,
    cancel: unsafe extern "C" fn(RawConnection, RawResult),
    destroy: unsafe extern "C" fn(RawResult),
    buffer: unsafe extern "C" fn(RawResult) -> *const u8,
    length: unsafe extern "C" fn(RawResult) -> usize,
    error: unsafe extern "C" fn(RawResult) -> *const c_char,
    rows_read: unsafe extern "C" fn(RawResult) -> u64,
    bytes_read: unsafe extern "C" fn(RawResult) -> u64,
    rows_written: unsafe extern "C" fn(RawResult) -> u64,
    bytes_written: unsafe extern "C" fn(RawResult) -> u64,
}

impl Api {
    fn load(path: &Path) -> Result<Api, libloading::Error> {
        // SAFETY: loading runs the library's initialisers. It is the one that the operator named or that was fetched for this.
        let library: &'static Library = Box::leak(Box::new(unsafe { Library::new(path)? }));
        macro_rules! function {
            ($name:literal) => {{
                // SAFETY: the field's type is the function's signature in chdb.h.
                let symbol: Symbol<'static, _> = unsafe { library.get(concat!($name, "\0"))? };
                *symbol
            }};
        }
        let signals: unsafe extern "C" fn(c_int) = function!("chdb_set_signal_handlers_enabled");
        // SAFETY: it is called before the first connection, as chdb.h demands. The process has handlers of its own.
        unsafe { signals(0) };
        Ok(Api {
            connect: function!("chdb_connect"),
            close: function!("chdb_close_conn"),
            query: function!("chdb_query_with_params_n"),
            stream: function!("chdb_stream_query_with_params_n"),
            fetch: function!("chdb_stream_fetch_result"),
            cancel: function!("chdb_stream_cancel_query"),
            destroy: function!("chdb_destroy_query_result"),
            buffer: function!("chdb_result_buffer"),
            length: function!("chdb_result_length"),
            error: function!("chdb_result_error"),
            // Despite its name, `chdb_result_rows_read` counts the rows of the result.
            rows_read: function!("chdb_result_storage_rows_read"),
            bytes_read: function!("chdb_result_storage_bytes_read"),
            rows_written: function!("chdb_result_rows_written"),
            bytes_written: function!("chdb_result_bytes_written"),
        })
    }
}

/// The engine, open on its data directory.
pub struct Engine {
    api: Arc<Api>,
    arguments: Vec<CString>,
    keeper: *mut RawConnection,
}

// SAFETY: `keeper` is only ever closed, by the one who drops the engine; `chdb_connect` may be called by several threads.
unsafe impl Send for Engine {}
// SAFETY: as above.
unsafe impl Sync for Engine {}

impl Engine {
    /// Loads `library` and opens `data_dir`, which is created if need be.
    ///
    /// # Errors
    /// When the library cannot be loaded, or gives no connection: another engine in this process, say.
    pub fn open(library: &Path, data_dir: &Path) -> Result<Engine, StartError> {
        let path = library.display().to_string();
        let api = Api::load(library).map_err(|source| StartError::Load { path, source })?;
        let shown = data_dir.display().to_string();
        let argument = |text: String| CString::new(text.clone()).map_err(|_| StartError::Path(text));
        let arguments = vec![
            argument("clickhouse".into())?,
            argument(format!("--path={shown}"))?,
        ];
        let keeper = connect(&api, &arguments).ok_or(StartError::Open(shown))?;
        Ok(Engine {
            api: Arc::new(api),
            arguments,
            keeper,
        })
    }

    /// A new session.
    ///
    /// # Errors
    /// When the engine gives none.
    pub fn session(&self) -> Result<Session, EngineError> {
        let handle = connect(&self.api, &self.arguments).ok_or_else(|| {
            EngineError::new(
                CODE_UNKNOWN,
                "UNKNOWN_EXCEPTION",
                "the engine gives no connection",
            )
        })?;
        // SAFETY: `chdb_connect` returns a pointer to a connection, valid until it is closed.
        let connection = unsafe { *handle };
        Ok(Session {
            api: Arc::clone(&self.api),
            handle,
            connection,
        })
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // SAFETY: it is open, and closed only here.
        unsafe { (self.api.close)(self.keeper) };
    }
}

fn connect(api: &Api, arguments: &[CString]) -> Option<*mut RawConnection> {
    let mut pointers: Vec<*mut c_char> = arguments
        .iter()
        .map(|argument| argument.as_ptr().cast_mut())
        .collect();
    let count = c_int::try_from(pointers.len()).ok()?;
    // SAFETY: `count` pointers to strings that end with NUL, which are read, not kept.
    let handle = unsafe { (api.connect)(count, pointers.as_mut_ptr()) };
    // SAFETY: a handle that is not null points to a connection.
    (!handle.is_null() && !unsafe { *handle }.is_null()).then_some(handle)
}

/// A session: settings, database and temporary tables of its own. Used by one thread, one statement at a time.
pub struct Session {
    api: Arc<Api>,
    handle: *mut RawConnection,
    connection: RawConnection,
}

/// How much a statement did.
#[derive(Debug, Clone, Copy, Default)]
pub struct Counts {
    /// Rows read from tables.
    pub rows_read: u64,
    /// And their bytes.
    pub bytes_read: u64,
    /// Rows written, those of materialized views included.
    pub rows_written: u64,
    /// And their bytes.
    pub bytes_written: u64,
}

impl Session {
    /// Runs one or several statements; returns what they print in `format`, unless they name one, held whole.
    ///
    /// # Errors
    /// When the engine refuses one.
    pub fn run(
        &mut self,
        sql: &[u8],
        format: &str,
        parameters: &Parameters,
    ) -> Result<(Bytes, Counts), EngineError> {
        let result = self.call(self.api.query, sql, format, parameters);
        result.check()?;
        Ok((result.bytes(), result.counts()))
    }

    /// Starts a SELECT, whose result comes in pieces of about a block of rows.
    ///
    /// # Errors
    /// When the engine refuses it; see [`Session::streams`].
    pub fn stream<'a>(
        &'a mut self,
        sql: &[u8],
        format: &str,
        parameters: &Parameters,
    ) -> Result<Stream<'a>, EngineError> {
        let result = self.call(self.api.stream, sql, format, parameters);
        result.check()?;
        Ok(Stream {
            connection: self.connection,
            result,
            pieces: 0,
            ended: false,
            session: PhantomData,
        })
    }

    /// Whether this error of [`Session::stream`] only says that the statement is of a kind that prints no rows in pieces: nothing of
    /// it has run, and [`Session::run`] is the way.
    pub fn streams(error: &EngineError) -> bool {
        !error
            .message
            .contains("Streaming query is not supported for query")
    }

    fn call(&self, function: Query, sql: &[u8], format: &str, parameters: &Parameters) -> RawHandle {
        let pairs = &parameters.0;
        let (names, values) = (
            Slices::of(pairs, |pair| &pair.0),
            Slices::of(pairs, |pair| &pair.1),
        );
        // SAFETY: the connection is open and ours alone (`&mut self` in the callers); all pointers come with their lengths, and
        // are read before the call returns.
        let raw = unsafe {
            function(
                self.connection,
                sql.as_ptr().cast(),
                sql.len(),
                format.as_ptr().cast(),
                format.len(),
                names.pointers.as_ptr(),
                names.lengths.as_ptr(),
                values.pointers.as_ptr(),
                values.lengths.as_ptr(),
                pairs.len(),
            )
        };
        RawHandle {
            api: Arc::clone(&self.api),
            raw,
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // SAFETY: it is open, closed only here, and no stream borrows it any more.
        unsafe { (self.api.close)(self.handle) };
    }
}

/// Values for `{name:Type}` in a statement, by name, in ClickHouse's escaped text.
#[derive(Debug, Clone, Default)]
pub struct Parameters(pub Vec<(String, String)>);

/// Strings as C wants them.
struct Slices {
    pointers: Vec<*const c_char>,
    lengths: Vec<usize>,
}

impl Slices {
    fn of(pairs: &[(String, String)], part: impl Fn(&(String, String)) -> &String) -> Slices {
        let pointers = pairs.iter().map(|pair| part(pair).as_ptr().cast()).collect();
        Slices {
            pointers,
            lengths: pairs.iter().map(|pair| part(pair).len()).collect(),
        }
    }
}

/// A result that is destroyed with this.
struct RawHandle {
    api: Arc<Api>,
    raw: RawResult,
}

impl RawHandle {
    fn check(&self) -> Result<(), EngineError> {
        if self.raw.is_null() {
            return Err(EngineError::new(
                CODE_UNKNOWN,
                "UNKNOWN_EXCEPTION",
                "the engine returned no result",
            ));
        }
        // SAFETY: the result is valid until it is destroyed.
        let error = unsafe { (self.api.error)(self.raw) };
        if error.is_null() {
            return Ok(());
        }
        // SAFETY: not null means a string that ends with NUL and lives as long as the result.
        let text = unsafe { CStr::from_ptr(error) }.to_string_lossy();
        if text.is_empty() {
            Ok(())
        } else {
            Err(EngineError::from_text(&text))
        }
    }

    fn bytes(&self) -> Bytes {
        // SAFETY: the result is valid until it is destroyed.
        let (start, length) = unsafe { ((self.api.buffer)(self.raw), (self.api.length)(self.raw)) };
        if start.is_null() || length == 0 {
            return Bytes::new();
        }
        // SAFETY: the buffer holds `length` bytes and lives as long as the result.
        Bytes::copy_from_slice(unsafe { std::slice::from_raw_parts(start, length) })
    }

    /// Only to be asked of a result that is no error: else the engine leaves them unset.
    fn counts(&self) -> Counts {
        // SAFETY: the result is valid until it is destroyed.
        unsafe {
            Counts {
                rows_read: (self.api.rows_read)(self.raw),
                bytes_read: (self.api.bytes_read)(self.raw),
                rows_written: (self.api.rows_written)(self.raw),
                bytes_written: (self.api.bytes_written)(self.raw),
            }
        }
    }
}

impl Drop for RawHandle {
    fn drop(&mut self) {
        if !self.raw.is_null() {
            // SAFETY: it is valid, and destroyed only here.
            unsafe { (self.api.destroy)(self.raw) };
        }
    }
}

/// A result that comes in pieces. Dropping it before its end stops the query.
pub struct Stream<'a> {
    connection: RawConnection,
    result: RawHandle,
    pieces: usize,
    ended: bool,
    session: PhantomData<&'a mut Session>,
}

impl Stream<'_> {
    /// The next piece, or `None` at the end.
    ///
    /// # Errors
    /// When the query fails on its way.
    pub fn next(&mut self) -> Result<Option<Bytes>, EngineError> {
        if self.ended {
            return Ok(None);
        }
        // SAFETY: connection and stream are open and ours alone.
        let raw = unsafe { (self.result.api.fetch)(self.connection, self.result.raw) };
        let piece = RawHandle {
            api: Arc::clone(&self.result.api),
            raw,
        };
        let piece = match piece.check() {
            Ok(()) => piece.bytes(),
            // A result without rows ends with its first piece, and asking for more is an error of the engine's own kind.
            Err(error) if self.pieces > 0 && error.message.contains("No active streaming query") => {
                Bytes::new()
            }
            Err(error) => {
                self.ended = true;
                return Err(error);
            }
        };
        self.pieces += 1;
        self.ended = piece.is_empty();
        Ok((!self.ended).then_some(piece))
    }
}

impl Drop for Stream<'_> {
    fn drop(&mut self) {
        if !self.ended {
            // SAFETY: connection and stream are open and ours alone.
            unsafe { (self.result.api.cancel)(self.connection, self.result.raw) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_code_of_an_error_is_read_from_its_text() {
        let error = EngineError::from_text("Code: 60. DB::Exception: Unknown table. (UNKNOWN_TABLE)");
        assert_eq!(
            (error.code, error.message.as_str()),
            (60, "Code: 60. DB::Exception: Unknown table. (UNKNOWN_TABLE)")
        );
        let error = EngineError::from_text("out of luck");
        assert_eq!(
            error.to_string(),
            "Code: 1002. DB::Exception: out of luck (UNKNOWN_EXCEPTION)"
        );
    }

    #[test]
    fn only_the_refusal_to_stream_is_taken_for_one() {
        let refusal = EngineError::from_text(
            "Code: 36. DB::Exception: Streaming query is not supported for query: SHOW TABLES.",
        );
        assert!(!Session::streams(&refusal));
        assert!(Session::streams(&EngineError::new(
            36,
            "BAD_ARGUMENTS",
            "something else"
        )));
    }

    #[test]
    fn what_is_no_library_is_refused_by_name() {
        let error = Api::load(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml").as_path()).err();
        assert!(error.is_some_and(|error| !error.to_string().is_empty()));
    }
}
