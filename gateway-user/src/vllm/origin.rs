//! Whether the pages at one address are all of one process.
//!
//! Several that answer in turn cannot be told from one that was restarted by two pages alone. By more they can: a process that has ended does
//! not come back.

use super::delta::Growth;
use super::page::Page;
use std::collections::VecDeque;

/// Pages that are looked back on: two processes that are drawn from at random are told after a few.
const PAGES_MAX: usize = 8;

/// Of these, so many whose counters do not follow from the page before are no restarts any more, where pages tell no process: a server takes
/// longer to load its model than a look takes to come.
const BREAKS_MAX: usize = 3;

/// The last pages of one address.
#[derive(Clone, Debug, Default)]
pub struct Origins(VecDeque<Origin>);

#[derive(Clone, Copy, Debug)]
struct Origin {
    /// When the process started, if the page says so.
    start_s: Option<f64>,
    /// Whether its counters follow from the page before.
    follows: bool,
}

impl Origins {
    /// Takes note of a page; `follows` says whether its counters can be later ones of the page before.
    pub fn note(&mut self, start_s: Option<f64>, follows: bool) {
        if self.0.len() == PAGES_MAX {
            self.0.pop_front();
        }
        self.0.push_back(Origin { start_s, follows });
    }

    /// Whether several processes answer in turn: one comes back, or one that started earlier comes after another.
    pub fn are_several(&self) -> bool {
        let starts: Vec<f64> = self.0.iter().filter_map(|origin| origin.start_s).collect();
        let comes_back = starts.windows(2).any(|pair| pair[1] < pair[0]);
        let untold = |origin: &&Origin| origin.start_s.is_none() && !origin.follows;
        comes_back || self.0.iter().filter(untold).count() >= BREAKS_MAX
    }
}

/// Whether `after` can be a later page of the process that said `before`.
pub fn follows(before: &Page, after: &Page) -> bool {
    before.models.iter().all(|(name, model)| {
        let later = after.models.get(name);
        later.is_some_and(|later| Growth::between(model, later).is_some())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn several(starts: &[Option<f64>], follow: bool) -> bool {
        let mut origins = Origins::default();
        starts.iter().for_each(|start| origins.note(*start, follow));
        origins.are_several()
    }

    #[test]
    fn a_process_that_comes_back_was_never_gone() {
        let (a, b) = (Some(1.0), Some(2.0));
        assert!(!several(&[a, a, a], true));
        assert!(!several(&[a, a, b, b], false), "a restart");
        assert!(several(&[a, b, a], false));
        assert!(several(&[b, a], false));
    }

    #[test]
    fn pages_that_tell_no_process_are_told_by_counters_that_keep_going_back() {
        assert!(!several(&[None; 8], true));
        assert!(!several(&[None, None], false));
        assert!(several(&[None, None, None], false));
    }

    #[test]
    fn old_pages_are_forgotten() {
        let mut starts = vec![Some(2.0), Some(1.0)];
        starts.extend([Some(1.0); PAGES_MAX - 1]);
        assert!(!several(&starts, true));
    }
}
