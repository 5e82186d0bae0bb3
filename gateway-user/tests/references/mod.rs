//! The pages, one a module.

pub mod config;
pub mod metrics;
pub mod tables;

/// How a page begins. It is made, so that whoever wants to mend it must know where.
fn beginning(title: &str, sources: &str) -> String {
    format!(
        "# {title}\n\nMade by `cargo xtask reference` out of {sources}; a test fails when it is out of date.\n"
    )
}

/// Text in a cell of a table: a bar would end the cell.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}
