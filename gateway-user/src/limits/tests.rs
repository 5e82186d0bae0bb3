//! The limits of all teams together.
