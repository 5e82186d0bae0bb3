//! Bounds on label values. Teams and models come from clients, and every new value costs memory here and in Prometheus for ever.

use std::collections::HashSet;
use std::sync::{PoisonError, RwLock};

/// Stands for every value past the limit.
pub(crate) const OTHER: &str = "__other__";
/// Stands for a value that a request never gave.
pub(super) const NONE: &str = "__none__";
/// Stands for a value that a client gave and no server confirmed.
pub(super) const UNKNOWN: &str = "__unknown__";

/// The values of one label, up to a limit. A value once admitted stays.
pub(super) struct Admitted {
    names: RwLock<HashSet<Box<str>>>,
    limit: usize,
}

impl Admitted {
    pub(super) fn up_to(limit: usize) -> Admitted {
        Admitted {
            names: RwLock::default(),
            limit,
        }
    }

    /// Admits `name` whatever the limit says: for names that come from the configuration, which strangers must not crowd out.
    pub(super) fn reserve(&self, name: &str) {
        let mut names = self.names.write().unwrap_or_else(PoisonError::into_inner);
        names.insert(name.into());
    }

    /// `name` if it is admitted, else [`OTHER`].
    pub(super) fn admit<'n>(&self, name: &'n str) -> &'n str {
        {
            let names = self.names.read().unwrap_or_else(PoisonError::into_inner);
            if names.contains(name) {
                return name;
            }
            if names.len() >= self.limit {
                return OTHER;
            }
        }
        let mut names = self.names.write().unwrap_or_else(PoisonError::into_inner);
        if names.len() < self.limit || names.contains(name) {
            names.insert(name.into());
            return name;
        }
        OTHER
    }

    /// Whether `name` has been admitted.
    pub(super) fn has(&self, name: &str) -> bool {
        self.names
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .contains(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn past_the_limit_a_new_name_is_other_and_a_known_one_keeps_its_own() {
        let admitted = Admitted::up_to(2);
        assert_eq!(admitted.admit("a"), "a");
        assert_eq!(admitted.admit("b"), "b");
        assert_eq!(admitted.admit("c"), OTHER);
        assert_eq!(admitted.admit("a"), "a");
        assert!(!admitted.has("c"), "a refused name must take no memory");
    }

    #[test]
    fn a_reserved_name_is_admitted_even_when_strangers_came_first() {
        let admitted = Admitted::up_to(1);
        assert_eq!(admitted.admit("stranger"), "stranger");
        admitted.reserve("configured");
        assert_eq!(admitted.admit("configured"), "configured");
        assert_eq!(admitted.admit("another"), OTHER);
    }
}
