//! ClickHouse without a ClickHouse server: its engine, in a child process of the gateway, behind ClickHouse's HTTP interface.
//!
//! `store.url: embedded` must need nothing but this program, and yet be the same SQL and the same code path as a cluster. So the
//! engine's library (libchdb) runs in a process of its own, which speaks on loopback what the clients of a server speak; a crash of
//! the engine, or a query that eats the memory, takes no request down with it.
//!
//! | file | what it holds |
//! |---|---|
//! | `child` | the gateway's side: starts the process, restarts it, ends it |
//! | `command` | the process: locks the data directory, chooses the engine, listens |
//! | `server` | HTTP connections and authentication |
//! | `request` | what a request asks for: URL, headers, multipart body |
//! | `execute` | one request on the engine, and its answer |
//! | `format` | which results may go out in pieces |
//! | `upload` | bodies of inserts, on their way to the engine through a file |
//! | `sql` | where the statement of an INSERT ends and its data begins |
//! | `engine` | libchdb's C interface, made safe |
//! | `library` | where libchdb is looked for |
//! | `official` | `clickhouse server` instead of libchdb, where that is installed |
//!
//! **Held**: an insert that was answered with 200 survives a kill of the process. Statements, settings, parameters, errors and their
//! codes are the engine's own. Each request has a session of its own; reads and writes have separate places, so neither waits for
//! the other. Results in formats that are plain rows (and `RowBinaryWithNamesAndTypes`, with which the Rust client reads) are
//! streamed; those with a head or foot, such as `JSON`, are held whole, as the engine writes them. An inserted body goes through a
//! file, never through memory.
//!
//! **Left out**: sessions (`session_id`), roles, users other than the one, `KILL QUERY` by the id of an HTTP request, external
//! tables, `INSERT … SELECT … FROM input(…)`, compressed answers other than ClickHouse's own LZ4 blocks (`compress=1`), and `Native` for clients that ask for a
//! `client_protocol_version` (the engine writes version 0). Whoever may send queries may also read files as the process's user,
//! as with `clickhouse local`: it listens on loopback and should have a password where others can log in.

mod answer;
mod child;
mod command;
mod engine;
mod execute;
mod format;
mod library;
mod lock;
mod lz4;
mod official;
mod request;
mod server;
mod sql;
mod upload;

pub use child::{EmbeddedError, EmbeddedOptions, EmbeddedServer};
pub use command::{CommandError, EmbeddedArgs, run};
pub use library::{CHDB_VERSION, LibraryError, find_library};
pub use official::find_program;
