//! How many requests run at a time.

/// Places, of which each request takes one while it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slots {
    most: u32,
    taken: u32,
}

impl Slots {
    /// So many, all free.
    pub fn new(most: u32) -> Slots {
        Slots { most, taken: 0 }
    }

    /// How many there are.
    pub fn most(&self) -> u32 {
        self.most
    }

    /// How many are taken.
    pub fn taken(&self) -> u32 {
        self.taken
    }

    /// Whether none is free.
    pub fn is_full(&self) -> bool {
        self.taken >= self.most
    }

    /// Takes one; false when none is free.
    pub fn take(&mut self) -> bool {
        let is_free = !self.is_full();
        self.taken += u32::from(is_free);
        is_free
    }

    /// Gives back one that was taken.
    pub fn give_back(&mut self) {
        debug_assert!(self.taken > 0, "each is given back once");
        self.taken = self.taken.saturating_sub(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whoever comes and goes, there are never more than there may be, and none is left when all have gone.
        #[test]
        fn there_are_as_many_taken_as_have_not_gone(most in 1_u32..20, steps in prop::collection::vec(any::<bool>(), 0..300)) {
            let (mut slots, mut running) = (Slots::new(most), 0_u32);
            for comes in steps {
                if comes {
                    let had_room = running < most;
                    prop_assert_eq!(slots.take(), had_room);
                    running += u32::from(had_room);
                } else if running > 0 {
                    slots.give_back();
                    running -= 1;
                }
                prop_assert_eq!(slots.taken(), running);
                prop_assert!(slots.taken() <= slots.most());
            }
            for _ in 0..running {
                slots.give_back();
            }
            prop_assert_eq!(slots.taken(), 0);
        }
    }
}
