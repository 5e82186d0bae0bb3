//! One process at a time has a data directory.

use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};

/// The file that is locked. Its content, the holder's process id, is for the message to the next one.
const FILE: &str = "gateway.lock";

/// Why the data directory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process has it.
    #[error("{} is in use by process {holder}: one embedded ClickHouse has a data directory to itself; stop that one, or choose another directory", directory.display())]
    Held {
        /// The directory.
        directory: PathBuf,
        /// The process, as far as it is known.
        holder: String,
    },
    /// It cannot be created or written.
    #[error("{} cannot be used as data directory: {source}", directory.display())]
    Io {
        /// The directory.
        directory: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// The data directory, ours until this is dropped or the process ends, however it ends.
#[derive(Debug)]
pub struct DirectoryLock {
    _file: File,
}

impl DirectoryLock {
    /// Creates `directory` if need be, and locks it.
    ///
    /// # Errors
    /// When another process has it, which is named, or it cannot be written.
    pub fn take(directory: &Path) -> Result<DirectoryLock, LockError> {
        let failed = |source| LockError::Io {
            directory: directory.to_owned(),
            source,
        };
        fs::create_dir_all(directory).map_err(failed)?;
        let options = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .clone();
        let mut file = options.open(directory.join(FILE)).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                let _ = file.read_to_string(&mut holder);
                let holder = if holder.trim().is_empty() {
                    "unknown".into()
                } else {
                    holder.trim().to_owned()
                };
                return Err(LockError::Held {
                    directory: directory.to_owned(),
                    holder,
                });
            }
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        let id = std::process::id();
        file.set_len(0)
            .and_then(|()| file.rewind())
            .and_then(|()| writeln!(file, "{id}"))
            .map_err(failed)?;
        Ok(DirectoryLock { _file: file })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_one_is_told_who_holds_it() {
        let directory = std::env::temp_dir().join(format!("gateway-lock-{}", std::process::id()));
        let first = DirectoryLock::take(&directory).unwrap();
        let error = DirectoryLock::take(&directory).unwrap_err().to_string();
        assert!(
            error.contains(&format!("in use by process {}", std::process::id())),
            "{error}"
        );
        drop(first);
        drop(DirectoryLock::take(&directory).unwrap());
        fs::remove_dir_all(&directory).unwrap();
        let error = DirectoryLock::take(Path::new("/dev/null/x"))
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("/dev/null/x cannot be used as data directory: "),
            "{error}"
        );
    }
}
