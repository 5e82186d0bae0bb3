//! Where facts are kept: ClickHouse, as a server or embedded.

pub mod embedded;
