//! stub
use anyhow::Result;
use std::path::Path;
pub fn run(_: &Path) -> Result<()> {
    Ok(())
}
