//! A YAML file as a plain tree, and the line of any node in it.
//!
//! `serde_yaml` tells the place of a value only when reading it fails, and stops at the first failure. So the file is
//! first read into a tree that accepts anything, duplicate keys too; when a node turns out to be wrong, the file is read
//! once more and made to fail on purpose at that node, which yields its line. Reading twice costs something only when
//! there is an error to report.

use std::fmt;

use serde::de::{
    self, Deserialize, DeserializeSeed, Deserializer, EnumAccess, IgnoredAny, MapAccess, SeqAccess, Visitor,
};

use super::error::ConfigError;

/// Any YAML value, as far as configs go.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Node {
    Scalar(Scalar),
    List(Vec<Node>),
    /// In file order, duplicates included.
    Map(Vec<(String, Node)>),
}

/// A single value, by the type that its YAML spelling gives it.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Scalar {
    Null,
    Bool(bool),
    Integer(i128),
    Float(f64),
    Text(String),
}

/// A file's text with its tree.
pub(super) struct Document<'a> {
    file: &'a str,
    text: &'a str,
    pub(super) root: Node,
}

impl<'a> Document<'a> {
    /// Reads one YAML document. No text at all, or comments only, is a null.
    pub(super) fn parse(file: &'a str, text: &'a str) -> Result<Self, ConfigError> {
        match serde_yaml::from_str(text) {
            Ok(root) => Ok(Self { file, text, root }),
            Err(error) => Err(ConfigError::Syntax {
                file: file.to_owned(),
                line: error.location().map(|location| location.line()),
                message: error.to_string(),
            }),
        }
    }

    pub(super) fn file(&self) -> &str {
        self.file
    }

    /// The line of a node, counted from 1. `steps` lead to it from the root: at each level the number of the map's entry
    /// or the list's item. An entry's line is its key's. Line 1 if the steps lead nowhere.
    pub(super) fn line_of(&self, steps: &[usize]) -> usize {
        let failure = Seek { steps }
            .deserialize(serde_yaml::Deserializer::from_str(self.text))
            .err();
        failure
            .and_then(|error| error.location())
            .map_or(1, |location| location.line())
    }
}

impl fmt::Display for Scalar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("null"),
            Self::Bool(value) => value.fmt(f),
            Self::Integer(value) => value.fmt(f),
            Self::Float(value) => value.fmt(f),
            Self::Text(value) => f.write_str(value),
        }
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a plain value, a list or a section, without a tag")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Node, E> {
        Ok(Node::Scalar(Scalar::Null))
    }

    // What `serde_yaml` calls for a file without a document.
    fn visit_none<E: de::Error>(self) -> Result<Node, E> {
        self.visit_unit()
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Node, E> {
        Ok(Node::Scalar(Scalar::Bool(value)))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Node, E> {
        Ok(Node::Scalar(Scalar::Integer(value.into())))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Node, E> {
        Ok(Node::Scalar(Scalar::Integer(value.into())))
    }

    fn visit_i128<E: de::Error>(self, value: i128) -> Result<Node, E> {
        Ok(Node::Scalar(Scalar::Integer(value)))
    }

    fn visit_u128<E: de::Error>(self, value: u128) -> Result<Node, E> {
        // No setting is that large: all that matters is that it is refused as a number.
        Ok(Node::Scalar(Scalar::Integer(
            i128::try_from(value).unwrap_or(i128::MAX),
        )))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Node, E> {
        Ok(Node::Scalar(Scalar::Float(value)))
    }

    fn visit_str<E: de::Error>(self, value: &str) -> Result<Node, E> {
        Ok(Node::Scalar(Scalar::Text(value.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Node, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Node::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = map.next_key::<Node>()? {
            let key = match key {
                Node::Scalar(key) => key.to_string(),
                // No setting is called so, and as an unknown key it is refused with its own line.
                Node::List(_) => "[…]".to_owned(),
                Node::Map(_) => "{…}".to_owned(),
            };
            entries.push((key, map.next_value()?));
        }
        Ok(Node::Map(entries))
    }
}

/// Walks to a node and fails there. It reads what it passes exactly as [`Node`] does, so that both count alike.
struct Seek<'a> {
    steps: &'a [usize],
}

impl<'de> DeserializeSeed<'de> for Seek<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl Seek<'_> {
    fn arrive<E: de::Error>(&self) -> Result<(), E> {
        if self.steps.is_empty() {
            Err(E::custom("here"))
        } else {
            Ok(())
        }
    }
}

impl<'de> Visitor<'de> for Seek<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a node")
    }

    fn visit_unit<E: de::Error>(self) -> Result<(), E> {
        self.arrive()
    }

    fn visit_none<E: de::Error>(self) -> Result<(), E> {
        self.arrive()
    }

    fn visit_bool<E: de::Error>(self, _: bool) -> Result<(), E> {
        self.arrive()
    }

    fn visit_i64<E: de::Error>(self, _: i64) -> Result<(), E> {
        self.arrive()
    }

    fn visit_u64<E: de::Error>(self, _: u64) -> Result<(), E> {
        self.arrive()
    }

    fn visit_f64<E: de::Error>(self, _: f64) -> Result<(), E> {
        self.arrive()
    }

    fn visit_str<E: de::Error>(self, _: &str) -> Result<(), E> {
        self.arrive()
    }

    fn visit_enum<A: EnumAccess<'de>>(self, _: A) -> Result<(), A::Error> {
        Err(de::Error::custom("here"))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let Some((first, rest)) = self.steps.split_first() else {
            return self.arrive();
        };
        for _ in 0..*first {
            seq.next_element::<IgnoredAny>()?;
        }
        seq.next_element_seed(Seek { steps: rest })?;
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Some((first, rest)) = self.steps.split_first() else {
            return self.arrive();
        };
        for _ in 0..*first {
            map.next_entry::<IgnoredAny, IgnoredAny>()?;
        }
        if rest.is_empty() {
            map.next_key_seed(Seek { steps: rest })?;
        } else if map.next_key::<IgnoredAny>()?.is_some() {
            map.next_value_seed(Seek { steps: rest })?;
        }
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = "\
# A comment
a: 1
b:

  c: &anchor
    d: [x,
      y]
  # between
  c: twice
list:
  - one
  - k: v
    long: |
      text
      more: text
    ? complex
    : 2
  - *anchor
z: ~
";

    #[test]
    fn every_node_has_its_line() {
        let document = Document::parse("f", FILE).unwrap();
        for (steps, line) in [
            (&[0][..], 2),
            (&[1], 3),
            (&[1, 0], 5),
            (&[1, 0, 0], 6),
            (&[1, 0, 0, 1], 7),
            (&[1, 1], 9),
            (&[2], 10),
            (&[2, 0], 11),
            (&[2, 1], 12),
            (&[2, 1, 1], 13),
            (&[2, 1, 2], 16),
            (&[3], 19),
        ] {
            assert_eq!(document.line_of(steps), line, "{steps:?}");
        }
    }

    #[test]
    fn steps_that_lead_nowhere_do_not_fail() {
        let document = Document::parse("f", FILE).unwrap();
        for steps in [&[9][..], &[0, 1, 2], &[2, 7, 1]] {
            assert_eq!(document.line_of(steps), 1, "{steps:?}");
        }
    }

    #[test]
    fn a_file_without_a_value_is_null() {
        for text in ["", "\n\n", "# only a comment\n", "---\n", "~", "\u{feff}"] {
            let document = Document::parse("f", text).unwrap();
            assert_eq!(document.root, Node::Scalar(Scalar::Null), "{text:?}");
        }
    }

    #[test]
    fn what_is_no_config_names_its_line() {
        for (text, line) in [
            ("a: 1\nb: [\n", 3),
            ("a: 1\n  b: 2\n", 2),
            ("a:\n  - !tag x\n", 2),
        ] {
            match Document::parse("c.yaml", text).err() {
                Some(ConfigError::Syntax { line: found, .. }) => assert_eq!(found, Some(line), "{text:?}"),
                other => panic!("{text:?}: {other:?}"),
            }
        }
        assert!(Document::parse("c.yaml", "a: 1\n---\nb: 2\n").is_err());
    }

    #[test]
    fn aliases_cannot_blow_up_memory() {
        let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for level in 1..20 {
            let previous = vec![format!("*a{}", level - 1); 10].join(", ");
            text.push_str(&format!("a{level}: &a{level} [{previous}]\n"));
        }
        assert!(Document::parse("c.yaml", &text).is_err());
    }
}
