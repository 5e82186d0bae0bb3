//! Whether traffic should be sent here, and why not.

use std::sync::Arc;
use tokio::sync::watch;

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
    state: Arc<watch::Sender<State>>,
}

impl Default for Readiness {
    fn default() -> Readiness {
        Readiness {
            state: Arc::new(watch::Sender::new(State::Starting("listeners are not up yet"))),
        }
    }
}

impl Readiness {
    /// Changes the state. Draining is final: what comes late from the start of a part does not make the gateway ready again.
    pub fn set(&self, next: State) {
        self.state.send_if_modified(|state| {
            let changes = *state != State::Draining && *state != next;
            if changes {
                *state = next;
            }
            changes
        });
    }

    /// The state now.
    pub fn get(&self) -> State {
        *self.state.borrow()
    }

    /// Tells of every change.
    pub fn subscribe(&self) -> watch::Receiver<State> {
        self.state.subscribe()
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
