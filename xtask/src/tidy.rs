//! Rules about the repository that no compiler checks: documents name files that exist, and code holds what it
//! should not. They run with the other tests.
#![cfg(test)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Directories that are made by tools and runs, not by us.
const GENERATED: [&str; 4] = ["target", ".git", "spool", "node_modules"];

/// Documents that must exist, and whose paths are checked.
const DOCUMENTS: [&str; 5] = [
    "README.md",
    "packaging/README.md",
    "docs/ARCHITECTURE.md",
    "docs/API.md",
    "docs/RUNBOOK.md",
];

/// Where a path in a document may start: at the root, or where the reader of the architecture stands.
const BASES: [&str; 3] = ["", "docs", "gateway-user/src"];

/// What makes a word with a slash a path, even when its first directory does not exist (any more).
const FILE_ENDINGS: [&str; 12] = [
    ".rs", ".md", ".toml", ".yaml", ".yml", ".json", ".sql", ".sh", ".py", ".html", ".js", "/",
];

/// A comment with this word, on the line or just above, says why an `unwrap` cannot fail.
const PROOF: &str = "PROOF:";

/// What the tests of a file begin with.
const TEST_MARKS: [&str; 3] = ["#[cfg(test)]", "#![cfg(test)]", "#[cfg(all(test,"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("xtask stands in the workspace")
}

/// All files of the repository, relative to its root.
fn files() -> Vec<PathBuf> {
    let (mut found, mut pending) = (Vec::new(), vec![root().to_owned()]);
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory).expect("a readable directory") {
            let path = entry.expect("an entry").path();
            let name = path.file_name().expect("a name").to_string_lossy().into_owned();
            if path.is_symlink() || GENERATED.contains(&name.as_str()) {
                continue;
            }
            if path.is_dir() {
                pending.push(path);
            } else {
                found.push(path.strip_prefix(root()).expect("below the root").to_owned());
            }
        }
    }
    found
}

/// The text of a file, if it is text.
fn text(path: &Path) -> Option<String> {
    fs::read(root().join(path))
        .ok()
        .and_then(|bytes| String::from_utf8(bytes).ok())
}

/// What stands between backticks outside of code blocks, and what relative links point to.
fn mentions(document: &str) -> BTreeSet<&str> {
    let mut found = BTreeSet::new();
    let mut fenced = false;
    for line in document.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        } else if !fenced {
            found.extend(line.split('`').skip(1).step_by(2));
            let links = line
                .split("](")
                .skip(1)
                .filter_map(|rest| rest.split([')', '#']).next());
            found.extend(links.filter(|link| !link.is_empty() && !link.contains(':')));
        }
    }
    found
}

/// Whether a mention is meant as a path in this repository whose top holds these directories.
fn is_path(mention: &str, top: &BTreeSet<String>) -> bool {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
    let Some((first, _)) = mention.split_once('/') else {
        return false;
    };
    // `/v1/models` is a route; `target/…` is there only after a build.
    if first.is_empty() || !mention.chars().all(plain) || GENERATED.contains(&first) {
        return false;
    }
    top.contains(first) || FILE_ENDINGS.iter().any(|ending| mention.ends_with(ending))
}

/// The paths that a document names and `exists` does not find.
fn missing<'a>(document: &'a str, top: &BTreeSet<String>, exists: impl Fn(&Path) -> bool) -> Vec<&'a str> {
    let paths = mentions(document)
        .into_iter()
        .filter(|mention| is_path(mention, top));
    paths
        .filter(|path| !BASES.iter().any(|base| exists(&Path::new(base).join(path))))
        .collect()
}

/// The numbers of the lines, before the tests of a file, that unwrap without a proof.
fn unproven_unwraps(source: &str) -> Vec<usize> {
    let lines: Vec<_> = source.lines().map(str::trim).collect();
    let tests = lines
        .iter()
        .position(|line| TEST_MARKS.iter().any(|mark| line.starts_with(mark)));
    let code = &lines[..tests.unwrap_or(lines.len())];
    let proven = |number: usize| {
        let comment_above = number
            .checked_sub(1)
            .map(|above| code[above])
            .filter(|line| line.starts_with("//"));
        code[number].contains(PROOF) || comment_above.is_some_and(|line| line.contains(PROOF))
    };
    let unwraps = (0..code.len()).filter(|n| code[*n].contains(".unwrap()") && !code[*n].starts_with("//"));
    unwraps
        .filter(|number| !proven(*number))
        .map(|number| number + 1)
        .collect()
}

fn is_rust_outside_tests(path: &Path) -> bool {
    let in_tests = path
        .components()
        .any(|part| ["tests", "benches"].iter().any(|name| part.as_os_str() == *name));
    let is_tests = path.file_name().is_some_and(|name| name == "tests.rs");
    path.extension().is_some_and(|extension| extension == "rs") && !in_tests && !is_tests
}

#[test]
fn documents_name_only_files_that_exist() {
    let entries = fs::read_dir(root()).expect("a readable root");
    let top = entries
        .map(|entry| {
            entry
                .expect("an entry")
                .file_name()
                .to_string_lossy()
                .into_owned()
        })
        .collect();
    for document in DOCUMENTS {
        let text = text(Path::new(document)).unwrap_or_else(|| panic!("{document} is missing"));
        let missing = missing(&text, &top, |path| root().join(path).exists());
        assert!(
            missing.is_empty(),
            "{document} names what does not exist: {missing:?}"
        );
    }
}

#[test]
fn no_code_outside_tests_unwraps_without_a_proof() {
    let sources: Vec<_> = files()
        .into_iter()
        .filter(|path| is_rust_outside_tests(path))
        .collect();
    assert!(
        sources.len() > 5,
        "only {} sources were found: is the walk broken?",
        sources.len()
    );
    let mut found = Vec::new();
    for path in sources {
        let text = text(&path).unwrap_or_else(|| panic!("{} is not UTF-8", path.display()));
        found.extend(
            unproven_unwraps(&text)
                .into_iter()
                .map(|line| format!("{}:{line}", path.display())),
        );
    }
    assert!(
        found.is_empty(),
        "return an error, or prove it with `// {PROOF} …`: {found:#?}"
    );
}

#[test]
fn no_file_holds_unfinished_code() {
    // Split, so that this file does not hold it.
    let marker = concat!("todo", "!(");
    let holds = |path: &PathBuf| text(path).is_some_and(|text| text.contains(marker));
    let found: Vec<_> = files().into_iter().filter(holds).collect();
    assert!(found.is_empty(), "`{marker}` stands in {found:?}");
}

#[test]
fn the_path_check_finds_what_is_wrong_and_nothing_else() {
    let top = ["docs".to_owned(), "sql".to_owned()].into();
    let document = "See `docs/gone.md`, `wire/gone.rs` and [this](docs/lost.md#part), `sql/`.\n\
                    Not `/v1/models`, `application/json`, `a b/c.rs`, `target/x.rs`, `docs/*.md` or [web](https://x/y.md).\n\
                    ```\n`docs/in-a-block.md`\n```\n`wire/here.rs`";
    let exists = |path: &Path| {
        ["sql", "gateway-user/src/wire/here.rs"]
            .iter()
            .any(|known| path == Path::new(known))
    };
    assert_eq!(
        missing(document, &top, exists),
        ["docs/gone.md", "docs/lost.md", "wire/gone.rs"]
    );
}

#[test]
fn the_unwrap_check_finds_what_is_wrong_and_nothing_else() {
    let source = "a.unwrap();\n// PROOF: it is not empty.\nb.unwrap();\nc.unwrap(); // PROOF: so.\n\
                  /// d.unwrap()\ne.unwrap_or(1);\n f.unwrap();\n#[cfg(test)]\ng.unwrap();";
    assert_eq!(unproven_unwraps(source), [1, 7]);
    assert!(is_rust_outside_tests(Path::new("xtask/src/main.rs")));
    assert!(!is_rust_outside_tests(Path::new("gateway-user/tests/a.rs")));
    assert!(!is_rust_outside_tests(Path::new(
        "gateway-user/src/wire/tests.rs"
    )));
}
