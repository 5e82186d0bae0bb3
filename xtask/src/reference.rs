//! `cargo xtask reference`: the pages of `docs/` that are made of the program.
//!
//! A test of the gateway makes them (`gateway-user/tests/reference.rs`), since they are made of the library itself, which xtask does not depend on. Without
//! the variable below the same test holds them against what is there.

use std::path::Path;

use anyhow::Result;

use crate::{clickhouse, stage};

/// Writes the pages in the repository at `root`.
///
/// # Errors
/// When something has no description, or the tests cannot be built or run.
pub fn write(root: &Path) -> Result<()> {
    clickhouse::get()?;
    let mut command = stage::cargo(root);
    command.args([
        "test",
        "--locked",
        "--package",
        "gateway-user",
        "--test",
        "reference",
    ]);
    stage::run(command.env("VLLM_GATEWAY_REFERENCE", "write"))
}
