//! Whether traffic should be sent here, and why not.

use std::sync::{Arc, Mutex, PoisonError};

/// How far the gateway is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Not serving yet; what is being waited for.
    Starting(&'static str),
    /// Serving.
    Ready,
    /// Ending: requests that run are finished, new ones should go elsewhere.
    Draining,
}

/// The state, shared between whoever changes it and whoever reports it.
#[derive(Clone, Debug)]
pub struct Readiness {
    state: Arc<Mutex<State>>,
}

impl Default for Readiness {
    fn default() -> Readiness {
        Readiness {
            state: Arc::new(Mutex::new(State::Starting("listeners are not up yet"))),
        }
    }
}

impl Readiness {
    /// Changes the state. Draining is final: what comes late from the start of a part does not make the gateway ready again.
    pub fn set(&self, next: State) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if *state != State::Draining {
            *state = next;
        }
    }

    /// The state now.
    pub fn get(&self) -> State {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draining_is_final() {
        let readiness = Readiness::default();
        assert!(matches!(readiness.get(), State::Starting(_)));
        readiness.set(State::Ready);
        readiness.set(State::Starting("an upstream"));
        assert_eq!(readiness.get(), State::Starting("an upstream"));
        readiness.set(State::Draining);
        readiness.set(State::Ready);
        assert_eq!(readiness.get(), State::Draining);
    }
}
