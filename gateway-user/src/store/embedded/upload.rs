//! Bodies of requests, and those of inserts on their way to the engine through a file.
//!
//! The file stands in the data directory, on the disk where the rows will be; it is written whole before the engine sees it, so that
//! a body that breaks off inserts nothing.

use super::engine::EngineError;
use super::lz4::{self, BlockError};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::fs::File;
use tokio::io::AsyncWriteExt;

/// One insert. The gateway's batches are below a hundred megabytes; a disk must not be filled by one client.
const UPLOAD_MAX_BYTES: u64 = 4 << 30;

/// Frees the way for inserted data: reads a body, takes it out of its compressed blocks.
pub struct BodyReader {
    body: Incoming,
    /// What is not yet a whole block, when the body is in blocks.
    blocks: Option<BytesMut>,
}

impl BodyReader {
    /// A reader of `body`, which is in ClickHouse's compressed blocks if `decompress`.
    pub fn new(body: Incoming, decompress: bool) -> BodyReader {
        BodyReader {
            body,
            blocks: decompress.then(BytesMut::new),
        }
    }

    /// The next bytes, or `None` at the end.
    ///
    /// # Errors
    /// When the body breaks off, or is not in blocks as it should be.
    pub async fn next(&mut self) -> Result<Option<Bytes>, EngineError> {
        loop {
            if let Some(blocks) = &mut self.blocks
                && let Some(plain) = lz4::decode(blocks).map_err(|error| refused_block(&error))?
            {
                return Ok(Some(plain));
            }
            let Some(frame) = self.body.frame().await else {
                break;
            };
            let frame = frame.map_err(|error| {
                EngineError::new(
                    210,
                    "NETWORK_ERROR",
                    &format!("the request's body broke off: {error}; nothing was inserted"),
                )
            })?;
            let Ok(data) = frame.into_data() else { continue };
            match &mut self.blocks {
                Some(blocks) => blocks.extend_from_slice(&data),
                None => return Ok(Some(data)),
            }
        }
        match &self.blocks {
            Some(blocks) if !blocks.is_empty() => Err(refused_block(&BlockError::Truncated)),
            _ => Ok(None),
        }
    }

    /// All bytes, or the first ones: at least `enough`, if there are so many. The flag says whether these are all.
    ///
    /// # Errors
    /// As [`BodyReader::next`].
    pub async fn beginning(&mut self, enough: usize) -> Result<(BytesMut, bool), EngineError> {
        let mut bytes = BytesMut::new();
        while bytes.len() < enough {
            match self.next().await? {
                Some(more) => bytes.extend_from_slice(&more),
                None => return Ok((bytes, true)),
            }
        }
        Ok((bytes, false))
    }
}

fn refused_block(error: &BlockError) -> EngineError {
    let (code, name) = match error {
        BlockError::Checksum => (40, "CHECKSUM_DOESNT_MATCH"),
        BlockError::Method(_) => (89, "UNKNOWN_COMPRESSION_METHOD"),
        BlockError::Length(_) => (131, "TOO_LARGE_STRING_SIZE"),
        BlockError::Lz4(_) | BlockError::Truncated => (271, "CANNOT_DECOMPRESS"),
    };
    EngineError::new(code, name, &error.to_string())
}

/// Where uploads stand while they wait.
#[derive(Debug)]
pub struct Uploads {
    directory: PathBuf,
    next: AtomicU64,
}

impl Uploads {
    /// Makes `directory`, and empties it of what an earlier process has left.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn new(directory: PathBuf) -> io::Result<Uploads> {
        match std::fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => std::fs::create_dir_all(&directory)?,
        }
        Ok(Uploads {
            directory,
            next: AtomicU64::new(0),
        })
    }

    /// Writes `first` and the rest of `body` to a file.
    ///
    /// # Errors
    /// When the body breaks off or is too long, or the disk is full.
    pub async fn store(&self, first: &[u8], body: &mut BodyReader) -> Result<Upload, EngineError> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let upload = Upload {
            path: self.directory.join(number.to_string()),
        };
        let failed = |error: io::Error| {
            EngineError::new(
                75,
                "CANNOT_WRITE_TO_FILE_DESCRIPTOR",
                &format!("the insert cannot be written to disk: {error}"),
            )
        };
        let mut file = File::create_new(&upload.path).await.map_err(failed)?;
        file.write_all(first).await.map_err(failed)?;
        let mut length = first.len() as u64;
        while let Some(bytes) = body.next().await? {
            length += bytes.len() as u64;
            if length > UPLOAD_MAX_BYTES {
                let message = format!("an insert has more than {UPLOAD_MAX_BYTES} bytes: send it in parts");
                return Err(EngineError::new(307, "TOO_MANY_BYTES", &message));
            }
            file.write_all(&bytes).await.map_err(failed)?;
        }
        file.flush().await.map_err(failed)?;
        Ok(upload)
    }
}

/// A file that is removed with this.
#[derive(Debug)]
pub struct Upload {
    path: PathBuf,
}

impl Upload {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Upload {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "an insert's file cannot be removed; the next start removes it");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_removes_what_was_left_and_an_upload_removes_itself() {
        let directory = std::env::temp_dir().join(format!("gateway-uploads-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join("7"), "left").unwrap();
        let uploads = Uploads::new(directory.clone()).unwrap();
        assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 0);
        let upload = Upload {
            path: uploads.directory.join("1"),
        };
        std::fs::write(upload.path(), "x").unwrap();
        drop(upload);
        assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 0);
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
