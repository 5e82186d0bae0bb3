//! Where the statement of an INSERT ends and its data begins.
//!
//! ClickHouse's HTTP interface takes one text: the `query` parameter followed by the body. The engine must get the data of an INSERT
//! through a file (inline, it would cut them at a blank line), so the text is split here. That needs words, strings, comments and
//! parentheses, but no grammar.

use std::ops::Range;

/// An INSERT whose data follow its statement.
#[derive(Debug, PartialEq, Eq)]
pub struct InsertHead {
    /// Where `FROM INFILE '…'` belongs: before SETTINGS, FORMAT or VALUES.
    pub infile_at: usize,
    /// Where the statement ends: behind the SETTINGS, if any, before FORMAT or VALUES.
    pub head_ends: usize,
    /// The name of the data's format.
    pub format: String,
    /// Where the data begin.
    pub data_at: usize,
}

/// What a statement is.
#[derive(Debug, PartialEq, Eq)]
pub enum Statement {
    /// Nothing but blanks and comments.
    Empty,
    /// An INSERT with data behind it.
    InsertData(InsertHead),
    /// An INSERT that says itself where its rows come from.
    InsertOther,
    /// Anything else, and the name of the format that it asks for.
    Other(Option<String>),
}

/// Tells what `sql` is. Its beginning is enough, up to where the data begin.
pub fn classify(sql: &[u8]) -> Statement {
    let mut words = Words { sql, at: 0, depth: 0 };
    let Some(first) = words.next() else {
        return Statement::Empty;
    };
    if words.is(&first, "INSERT") {
        insert(words)
    } else {
        Statement::Other(last_format(words))
    }
}

/// `INSERT INTO [TABLE] name …`: goes on behind the name, so that a table may be called `values`.
fn insert(mut words: Words<'_>) -> Statement {
    let mut target = words.next();
    for optional in ["INTO", "TABLE"] {
        if target.as_ref().is_some_and(|word| words.is(word, optional)) {
            target = words.next();
        }
    }
    let into_function = target.as_ref().is_some_and(|word| words.is(word, "FUNCTION"));
    if into_function {
        words.next();
    } else {
        while words.sql[words.at..].trim_ascii_start().starts_with(b".") {
            words.next();
        }
    }
    let mut settings_at = None;
    while let Some(word) = words.next() {
        if words.depth > 0 {
            continue;
        }
        let end = settings_at.unwrap_or(word.start);
        if words.is(&word, "SETTINGS") {
            settings_at.get_or_insert(word.start);
        } else if words.is(&word, "VALUES") {
            let head = InsertHead {
                infile_at: end,
                head_ends: word.start,
                format: "Values".into(),
                data_at: word.end,
            };
            return Statement::InsertData(head);
        } else if words.is(&word, "FORMAT") {
            return format_of_data(words, end, word.start);
        } else if ["SELECT", "WITH", "FROM", "WATCH", "EXPLAIN"]
            .iter()
            .any(|other| words.is(&word, other))
        {
            return Statement::InsertOther;
        }
    }
    // Without a format, ClickHouse expects Values.
    let end = words.sql.trim_ascii_end().len();
    let head = InsertHead {
        infile_at: settings_at.unwrap_or(end),
        head_ends: end,
        format: "Values".into(),
        data_at: words.sql.len(),
    };
    Statement::InsertData(head)
}

fn format_of_data(mut words: Words<'_>, infile_at: usize, head_ends: usize) -> Statement {
    let Some(name) = words.next() else {
        return Statement::InsertOther;
    };
    let format = String::from_utf8_lossy(&words.sql[name.clone()]).into_owned();
    // ClickHouse takes what follows the blanks behind the name, or the next line.
    let rest = &words.sql[name.end..];
    let blanks = rest
        .iter()
        .take_while(|byte| matches!(byte, b' ' | b'\t' | b'\r' | 0x0b | 0x0c))
        .count();
    let mut data_at = name.end + blanks;
    if words.sql.get(data_at) == Some(&b';') {
        data_at += 1;
    }
    if words.sql.get(data_at) == Some(&b'\n') {
        data_at += 1;
    }
    Statement::InsertData(InsertHead {
        infile_at,
        head_ends,
        format,
        data_at,
    })
}

/// The name in a `FORMAT name` at the end, or before the SETTINGS: elsewhere `format` is a column.
fn last_format(mut words: Words<'_>) -> Option<String> {
    let mut outer = Vec::new();
    while let Some(word) = words.next() {
        if words.depth == 0 {
            outer.push(word);
        }
    }
    let is_end = |at: usize| outer.get(at).is_none_or(|word| words.is(word, "SETTINGS"));
    let found = (0..outer.len().saturating_sub(1))
        .rev()
        .find(|at| words.is(&outer[*at], "FORMAT") && is_end(at + 2))?;
    Some(String::from_utf8_lossy(&words.sql[outer[found + 1].clone()]).into_owned())
}

/// The words of a statement. Strings, quoted names and comments are passed over; `depth` counts open parentheses.
struct Words<'a> {
    sql: &'a [u8],
    at: usize,
    depth: usize,
}

impl Words<'_> {
    fn is(&self, word: &Range<usize>, keyword: &str) -> bool {
        self.sql[word.clone()].eq_ignore_ascii_case(keyword.as_bytes())
    }

    /// Passes over a string or quoted name that starts here. A backslash or a doubled quote does not end it.
    fn skip_quoted(&mut self, quote: u8) {
        self.at += 1;
        while let Some(&byte) = self.sql.get(self.at) {
            self.at += if byte == b'\\' { 2 } else { 1 };
            if byte == quote {
                break;
            }
        }
        self.at = self.at.min(self.sql.len());
    }

    /// Passes over `$tag$ text $tag$`, or a lone dollar.
    fn skip_heredoc(&mut self) {
        let rest = &self.sql[self.at + 1..];
        let tag = rest
            .iter()
            .take_while(|byte| byte.is_ascii_alphanumeric() || **byte == b'_')
            .count();
        let opening = &self.sql[self.at..(self.at + tag + 2).min(self.sql.len())];
        if opening.len() < 2 || !opening.ends_with(b"$") {
            self.at += 1;
            return;
        }
        self.at += opening.len();
        self.skip_until(opening);
    }

    fn skip_until(&mut self, end: &[u8]) {
        let found = memchr::memmem::find(&self.sql[self.at..], end);
        self.at = found.map_or(self.sql.len(), |offset| self.at + offset + end.len());
    }
}

impl Iterator for Words<'_> {
    type Item = Range<usize>;

    fn next(&mut self) -> Option<Range<usize>> {
        let is_word = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'_' || *byte >= 0x80;
        while let Some(&byte) = self.sql.get(self.at) {
            let start = self.at;
            match byte {
                b'\'' => self.skip_quoted(byte),
                b'`' | b'"' => {
                    self.skip_quoted(byte);
                    return Some(start..self.at);
                }
                b'-' if self.sql[start..].starts_with(b"--") => self.skip_until(b"\n"),
                b'#' if self.sql[start..].starts_with(b"# ") || self.sql[start..].starts_with(b"#!") => {
                    self.skip_until(b"\n")
                }
                b'/' if self.sql[start..].starts_with(b"/*") => self.skip_until(b"*/"),
                b'$' => self.skip_heredoc(),
                b'(' | b'[' | b'{' => {
                    self.depth += 1;
                    self.at += 1;
                }
                b')' | b']' | b'}' => {
                    self.depth = self.depth.saturating_sub(1);
                    self.at += 1;
                }
                _ if is_word(&byte) => {
                    self.at += self.sql[start..].iter().take_while(|byte| is_word(byte)).count();
                    return Some(start..self.at);
                }
                _ => self.at += 1,
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Head, what stands behind the file's place, format and data.
    fn split(sql: &str) -> (&str, &str, String, &str) {
        match classify(sql.as_bytes()) {
            Statement::InsertData(head) => (
                &sql[..head.infile_at],
                &sql[head.infile_at..head.head_ends],
                head.format,
                &sql[head.data_at..],
            ),
            other => panic!("{sql}: {other:?}"),
        }
    }

    #[test]
    fn data_are_told_from_the_statement() {
        let cases = [
            (
                "INSERT INTO t FORMAT JSONEachRow",
                ("INSERT INTO t ", "", "JSONEachRow", ""),
            ),
            (
                "insert into t format CSV\n1,2\n\n3,4",
                ("insert into t ", "", "CSV", "1,2\n\n3,4"),
            ),
            (
                "INSERT INTO t FORMAT CSV 1,2",
                ("INSERT INTO t ", "", "CSV", "1,2"),
            ),
            (
                "INSERT INTO t(a, b) VALUES (1, 'FORMAT')",
                ("INSERT INTO t(a, b) ", "", "Values", " (1, 'FORMAT')"),
            ),
            (
                "INSERT INTO d.t SETTINGS a='x', b=1 FORMAT TSV\nq",
                ("INSERT INTO d.t ", "SETTINGS a='x', b=1 ", "TSV", "q"),
            ),
            (
                "INSERT INTO t SETTINGS a=1 VALUES(1)",
                ("INSERT INTO t ", "SETTINGS a=1 ", "Values", "(1)"),
            ),
            (
                "INSERT INTO `a format b` /* FORMAT */ FORMAT CSV\n",
                ("INSERT INTO `a format b` /* FORMAT */ ", "", "CSV", ""),
            ),
            (
                "INSERT INTO values (format, values) FORMAT CSV\n",
                ("INSERT INTO values (format, values) ", "", "CSV", ""),
            ),
            (
                "INSERT INTO TABLE format.values FORMAT CSV\r\n1",
                ("INSERT INTO TABLE format.values ", "", "CSV", "1"),
            ),
            (
                "-- a comment\nINSERT INTO t FORMAT CSV;\n1",
                ("-- a comment\nINSERT INTO t ", "", "CSV", "1"),
            ),
            (
                "INSERT INTO FUNCTION remote('h', 'format') FORMAT CSV\n1",
                ("INSERT INTO FUNCTION remote('h', 'format') ", "", "CSV", "1"),
            ),
            ("INSERT INTO t (a)\n", ("INSERT INTO t (a)", "", "Values", "")),
            (
                "INSERT INTO {t:Identifier} FORMAT CSV\n1",
                ("INSERT INTO {t:Identifier} ", "", "CSV", "1"),
            ),
        ];
        for (sql, (head, settings, format, data)) in cases {
            assert_eq!(split(sql), (head, settings, format.to_owned(), data), "{sql}");
        }
    }

    #[test]
    fn other_statements_are_left_alone() {
        let other = |format: &str| Statement::Other(Some(format.to_owned()));
        assert_eq!(classify(b"  -- nothing\n /* at all */ "), Statement::Empty);
        assert_eq!(
            classify(b"INSERT INTO t SELECT 1 FORMAT CSV"),
            Statement::InsertOther
        );
        assert_eq!(
            classify(b"INSERT INTO t FROM INFILE 'x' FORMAT CSV"),
            Statement::InsertOther
        );
        assert_eq!(classify(b"SELECT 'FORMAT CSV' FORMAT JSON"), other("JSON"));
        assert_eq!(
            classify(b"SELECT 'it''s \\' FORMAT CSV' -- FORMAT TSV"),
            Statement::Other(None)
        );
        assert_eq!(
            classify(b"SELECT format FROM (SELECT 1 FORMAT x)\nFORMAT Native;"),
            other("Native")
        );
        assert_eq!(
            classify(b"SELECT format FROM t SETTINGS a = 1"),
            Statement::Other(None)
        );
        assert_eq!(
            classify(b"SELECT format FORMAT JSON SETTINGS a = 1"),
            other("JSON")
        );
        assert_eq!(
            classify(b"SELECT $x$ (( FORMAT CSV $$ $x$, '$' FORMAT JSON"),
            other("JSON")
        );
        assert_eq!(classify(b"SELECT 'unclosed"), Statement::Other(None));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_classified_within_bounds(sql in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
            let text = [b"INSERT INTO ".as_slice(), &sql].concat();
            for bytes in [&sql, &text] {
                if let Statement::InsertData(head) = classify(bytes) {
                    assert!(head.infile_at <= head.head_ends && head.head_ends <= head.data_at && head.data_at <= bytes.len());
                }
            }
        }
    }
}
