//! Exit codes, one meaning each in all commands. From 64 on they are those of BSD's `sysexits.h`.

use crate::store::figures::ReadError;

/// The arguments are wrong; what clap itself exits with then.
pub const USAGE: u8 = 2;
/// The database is not there, or not one that this program reads (`EX_DATAERR`).
pub const DATABASE: u8 = 65;
/// ClickHouse does not answer, or not this question (`EX_UNAVAILABLE`).
pub const UNAVAILABLE: u8 = 69;
/// The ledger's lines do not sum to its bill (`EX_SOFTWARE`).
pub const UNEVEN: u8 = 70;
/// The system lacks what it takes (`EX_OSERR`).
pub const OS: u8 = 71;
/// The spool cannot be read (`EX_IOERR`).
pub const SPOOL: u8 = 74;
/// It cannot be done yet (`EX_TEMPFAIL`).
pub const NOT_YET: u8 = 75;
/// ClickHouse refuses the user (`EX_NOPERM`).
pub const REFUSED: u8 = 77;
/// The config cannot be used (`EX_CONFIG`), which supervisors can tell from a crash.
pub const CONFIG: u8 = 78;

/// How a command ends that cannot read from ClickHouse.
pub fn of_read(error: &ReadError) -> u8 {
    match error {
        ReadError::NoStore => CONFIG,
        ReadError::NoAnswer { .. } | ReadError::Failed { .. } => UNAVAILABLE,
        ReadError::Refused { .. } => REFUSED,
        ReadError::NoDatabase { .. } | ReadError::OtherSchema { .. } => DATABASE,
    }
}
