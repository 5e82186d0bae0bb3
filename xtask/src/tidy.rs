//! Rules about the repository that no compiler checks: documents name files, headings and commands that exist, every source of the gateway is in the
//! code map, and code does not hold what it should not. They run with the other tests.
#![cfg(test)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Directories that are made by tools and runs, not by us.
const GENERATED: [&str; 4] = ["target", ".git", "spool", "node_modules"];

/// Documents that must exist. Whatever else in Markdown stands beside them is checked with them.
const DOCUMENTS: [&str; 12] = [
    "README.md",
    "CHANGELOG.md",
    "docs/API.md",
    "docs/ARCHITECTURE.md",
    "docs/BILLING.md",
    "docs/CONFIG.md",
    "docs/DEVELOPING.md",
    "docs/METRICS.md",
    "docs/OPERATIONS.md",
    "docs/RUNBOOK.md",
    "docs/TABLES.md",
    "packaging/README.md",
];

/// Where the sources of the gateway are, and the document that has a map of them.
const SOURCES: &str = "gateway-user/src";
const MAP: &str = "docs/ARCHITECTURE.md";

/// Where the gateway's own commands are listed.
const COMMAND_LINE: &str = "gateway-user/src/cli.rs";

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

/// The documents, by their paths.
fn documents() -> Vec<(String, String)> {
    let is_document = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "md");
    let found: Vec<_> = files().into_iter().filter(is_document).collect();
    let read = |path: PathBuf| {
        (
            path.display().to_string(),
            text(&path).expect("a document is UTF-8"),
        )
    };
    found.into_iter().map(read).collect()
}

/// The relative links of a document that lead nowhere. `read` gives the text of another document, or nothing where there is no such file.
fn dead_links(document: &str, read: impl Fn(&str) -> Option<String>) -> Vec<&str> {
    let mut fenced = false;
    let prose = document.lines().filter(|line| {
        let is_fence = line.trim_start().starts_with("```");
        fenced ^= is_fence;
        !fenced && !is_fence
    });
    let links = prose.flat_map(|line| line.split("](").skip(1).filter_map(|rest| rest.split(')').next()));
    let leads_nowhere = |link: &&str| {
        let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
        let target = if path.is_empty() {
            Some(document.to_owned())
        } else {
            read(path)
        };
        target.is_none_or(|text| !anchor.is_empty() && !anchors(&text).contains(anchor))
    };
    links
        .filter(|link| !link.contains(':'))
        .filter(leads_nowhere)
        .collect()
}

/// What headings are called in links: in lower case, without punctuation, with a dash for each blank.
fn anchors(document: &str) -> BTreeSet<String> {
    let headings = document.lines().filter(|line| line.starts_with('#'));
    let slug = |heading: &str| -> String {
        let letters = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = letters
            .chars()
            .filter(|c| c.is_alphanumeric() || "-_ ".contains(*c));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    headings.map(slug).collect()
}

/// The sources that a map does not name: neither themselves, nor a folder around them (`live/`), nor the module that they are parts of
/// (`proxy/inject.rs` for what is in `proxy/inject/`).
fn unmapped<'a>(map: &str, sources: &[&'a str]) -> Vec<&'a str> {
    // Rows of its tables: in a sentence a folder is named for other reasons.
    let rows: Vec<&str> = map.lines().filter(|line| line.starts_with('|')).collect();
    let rows = rows.join("\n");
    let named = mentions(&rows);
    let is_named = |source: &str| {
        named.contains(source)
            || source.match_indices('/').any(|(at, _)| {
                named.contains(&source[..=at]) || named.contains(&*format!("{}.rs", &source[..at]))
            })
    };
    sources
        .iter()
        .filter(|source| !is_named(source))
        .copied()
        .collect()
}

/// The words behind each call of a program in a document, in code and in prose.
fn calls<'a>(document: &'a str, program: &str) -> Vec<Vec<&'a str>> {
    let mut found = Vec::new();
    for line in document.lines() {
        for (at, _) in line.match_indices(program) {
            let rest = &line[at + program.len()..];
            // A word of its own: `vllm-gateway-ebpf` is another one, and so is the path of a file.
            let is_start = !line[..at].ends_with(|c: char| c.is_ascii_alphanumeric() || "-_.".contains(c));
            if rest.starts_with(' ') && is_start {
                let call = rest
                    .split(['`', '|', ';', '&', '#', '(', ')', ','])
                    .next()
                    .unwrap_or_default();
                found.push(
                    call.split_whitespace()
                        .take_while(|word| !word.starts_with('<'))
                        .collect(),
                );
            }
        }
    }
    found
}

/// What a call names that a command does not have: a command below it, or an option.
fn unknown_word<'w>(call: &[&'w str], command: &clap::Command) -> Option<&'w str> {
    let (&first, rest) = call.split_first()?;
    let plain = |word: &str| word.trim_end_matches(['.', ':', ',']).to_owned();
    if let Some(option) = first.strip_prefix("--") {
        let option = plain(option.split('=').next().unwrap_or(option));
        let is_known = command
            .get_arguments()
            .any(|argument| argument.get_long() == Some(option.as_str()));
        return if is_known || option == "help" {
            unknown_word(rest, command)
        } else {
            Some(first)
        };
    }
    match command.find_subcommand(plain(first)) {
        Some(inner) => unknown_word(rest, inner),
        // Values of options, and prose that goes on.
        None if command.is_subcommand_required_set() => Some(first),
        None => unknown_word(rest, command),
    }
}

/// The gateway's commands, by the variants of its enum: to depend on the library for them would make each command of xtask wait for it.
fn gateway_commands(source: &str) -> BTreeSet<String> {
    let inside = source
        .split_once("enum Command {")
        .and_then(|(_, rest)| rest.split_once("\n}"));
    let (variants, _) = inside.expect("cli.rs has the enum of commands");
    let lines = variants
        .lines()
        .map(str::trim)
        .filter(|line| line.starts_with(|c: char| c.is_ascii_uppercase()));
    let kebab = |line: &str| {
        let name = line.split(['(', ',', ' ']).next().unwrap_or_default();
        let mut text = String::new();
        for c in name.chars() {
            if c.is_ascii_uppercase() && !text.is_empty() {
                text.push('-');
            }
            text.push(c.to_ascii_lowercase());
        }
        text
    };
    lines.map(kebab).collect()
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
    let documents = documents();
    for expected in DOCUMENTS {
        assert!(
            documents.iter().any(|(path, _)| path == expected),
            "{expected} is missing"
        );
    }
    for (document, text) in &documents {
        let beside = root().join(document);
        let beside = beside.parent().expect("a document is in a directory");
        let missing = missing(text, &top, |path| {
            root().join(path).exists() || beside.join(path).exists()
        });
        assert!(
            missing.is_empty(),
            "{document} names what does not exist: {missing:?}"
        );
    }
}

#[test]
fn links_between_documents_lead_somewhere() {
    for (document, text) in documents() {
        let beside = root().join(&document);
        let beside = beside.parent().expect("a document is in a directory");
        let read = |path: &str| {
            let path = beside.join(path);
            path.exists()
                .then(|| fs::read_to_string(&path).unwrap_or_default())
        };
        let dead = dead_links(&text, read);
        assert!(
            dead.is_empty(),
            "{document} has links that lead nowhere: {dead:?}"
        );
    }
}

#[test]
fn every_source_of_the_gateway_is_in_the_code_map() {
    let map = text(Path::new(MAP)).expect("the map");
    let paths: Vec<String> = files().iter().map(|path| path.display().to_string()).collect();
    let below = paths
        .iter()
        .filter_map(|path| path.strip_prefix(SOURCES)?.strip_prefix('/'));
    let is_part = |path: &&str| {
        let name = path.rsplit('/').next().unwrap_or(path);
        // What joins a folder, and tests, are where the folder is.
        path.ends_with(".rs") && !["lib.rs", "mod.rs", "tests.rs"].contains(&name)
    };
    // The simulator and the load generator are programs of their own, and have a place in the text.
    let sources: Vec<&str> = below
        .filter(is_part)
        .filter(|path| !path.starts_with("bin/"))
        .collect();
    assert!(
        sources.len() > 100,
        "only {} sources were found: is the walk broken?",
        sources.len()
    );
    let unmapped = unmapped(&map, &sources);
    assert!(
        unmapped.is_empty(),
        "{MAP} does not say what these are: {unmapped:#?}"
    );
}

#[test]
fn documents_name_only_commands_that_exist() {
    let xtask = <crate::Cli as clap::CommandFactory>::command();
    let gateway = gateway_commands(&text(Path::new(COMMAND_LINE)).expect("cli.rs"));
    assert!(
        gateway.contains("check-config") && gateway.len() > 5,
        "{gateway:?}"
    );
    let mut seen = 0;
    for (document, text) in documents() {
        for call in calls(&text, "cargo xtask") {
            seen += 1;
            let unknown = unknown_word(&call, &xtask);
            assert_eq!(unknown, None, "{document}: `cargo xtask {}`", call.join(" "));
        }
        // In code alone: in prose the program's name is followed by any word.
        let code = text
            .lines()
            .filter(|line| line.starts_with("$ "))
            .collect::<Vec<_>>()
            .join("\n");
        for call in calls(&code, "vllm-gateway") {
            let Some(command) = call
                .first()
                .filter(|command| command.starts_with(|c: char| c.is_ascii_lowercase()))
            else {
                continue;
            };
            // `helm install vllm-gateway packaging/…`, `systemctl enable vllm-gateway`.
            if command.contains('/') {
                continue;
            }
            seen += 1;
            assert!(
                gateway.contains(*command),
                "{document}: `vllm-gateway {}`",
                call.join(" ")
            );
        }
    }
    assert!(seen > 20, "only {seen} calls were found: is the search broken?");
}

#[test]
fn the_link_check_finds_what_is_wrong_and_nothing_else() {
    let document = "# One\n[a](here.md) [b](here.md#two-things-at-once) [c](here.md#three) [d](gone.md)\n[e](#one) [f](#two) [g](https://x/y)\n\
                    ```\n[h](gone.md)\n```\n";
    let read = |path: &str| (path == "here.md").then(|| "# Two things, at once\n".to_owned());
    assert_eq!(dead_links(document, read), ["here.md#three", "gone.md", "#two"]);
}

#[test]
fn the_map_check_finds_what_is_wrong_and_nothing_else() {
    let map = "| `main.rs`, `wire/` | a |\n| `proxy/inject.rs` | b |";
    let sources = [
        "main.rs",
        "wire/sse.rs",
        "proxy/inject.rs",
        "proxy/inject/chunk.rs",
        "proxy/buffer.rs",
        "cli.rs",
    ];
    assert_eq!(unmapped(map, &sources), ["proxy/buffer.rs", "cli.rs"]);
}

#[test]
fn the_command_check_finds_what_is_wrong_and_nothing_else() {
    let xtask = <crate::Cli as clap::CommandFactory>::command();
    let unknown = |text: &'static str| {
        calls(text, "cargo xtask")
            .into_iter()
            .find_map(|call| unknown_word(&call, &xtask))
    };
    assert_eq!(
        unknown("`cargo xtask dev --tap`, `cargo xtask bench proxy`, and `cargo xtask test`."),
        None
    );
    assert_eq!(unknown("$ cargo xtask dev --for 40s   # a while"), None);
    assert_eq!(unknown("`cargo xtask deploy`"), Some("deploy"));
    assert_eq!(unknown("`cargo xtask dev --tapp`"), Some("--tapp"));
    assert_eq!(unknown("`cargo xtask bench proxies`"), Some("proxies"));
    let source = "pub enum Command {\n    /// A.\n    Run(X),\n    CheckConfig(Y),\n    #[command(hide = true)]\n    TapAttacher,\n}\n";
    let expected = ["run", "check-config", "tap-attacher"].map(str::to_owned);
    assert_eq!(gateway_commands(source), expected.into());
    assert_eq!(
        calls(
            "./target/release/vllm-gateway run\nvllm-gateway-ebpf x",
            "vllm-gateway"
        ),
        [["run"]]
    );
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
