//! Why a request did not get a whole response. Every failure is counted under its name; none ends the run.

use std::io;

/// What went wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// Nobody listens there.
    ConnectRefused,
    /// The process or the machine is out of descriptors or ports.
    ConnectNoResources,
    /// Another way in which connecting failed.
    Connect,
    /// The server closed or reset the connection before it answered.
    ClosedBeforeResponse,
    /// The connection ended within the body.
    ClosedInBody,
    /// What came is not the head of an HTTP/1.1 response, or a head too long.
    BadHead,
    /// The body's chunks are malformed.
    BadFraming,
    /// The body ended properly, but the stream's last event is not its terminal one.
    NoTerminalEvent,
    /// The stream carried an error.
    ErrorEvent,
}

impl Failure {
    /// The name under which it is counted.
    pub fn name(self) -> &'static str {
        match self {
            Self::ConnectRefused => "connect_refused",
            Self::ConnectNoResources => "connect_no_resources",
            Self::Connect => "connect",
            Self::ClosedBeforeResponse => "closed_before_response",
            Self::ClosedInBody => "closed_in_body",
            Self::BadHead => "bad_head",
            Self::BadFraming => "bad_framing",
            Self::NoTerminalEvent => "no_terminal_event",
            Self::ErrorEvent => "error_event",
        }
    }

    /// Tells apart what a failed connect means for the reader of the summary.
    pub fn of_connect(error: &io::Error) -> Self {
        // EMFILE and ENFILE have no `ErrorKind`; the numbers are the same on Linux and macOS.
        const ENFILE: i32 = 23;
        const EMFILE: i32 = 24;
        match error.kind() {
            io::ErrorKind::ConnectionRefused => Self::ConnectRefused,
            io::ErrorKind::AddrNotAvailable => Self::ConnectNoResources,
            _ if matches!(error.raw_os_error(), Some(ENFILE | EMFILE)) => Self::ConnectNoResources,
            _ => Self::Connect,
        }
    }

    /// Whether no connection came about.
    pub fn is_connect(self) -> bool {
        matches!(
            self,
            Self::ConnectRefused | Self::ConnectNoResources | Self::Connect
        )
    }
}

/// How a request ended, seen from the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// A whole response with a status of 200 to 299.
    Ok,
    /// We closed the socket, by plan or because the run was interrupted.
    Aborted,
    /// A whole response with another status.
    HttpError,
    /// A whole response of status 200 whose stream carried an error.
    StreamError,
    /// No response, or one that is not HTTP.
    TransportError,
    /// We waited no longer.
    Timeout,
    /// The response began and did not end as it should.
    Truncated,
}

impl Outcome {
    /// Every outcome, in the order of reports.
    pub const ALL: [Self; 7] = [
        Self::Ok,
        Self::Aborted,
        Self::HttpError,
        Self::StreamError,
        Self::TransportError,
        Self::Timeout,
        Self::Truncated,
    ];

    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Aborted => "aborted",
            Self::HttpError => "http_error",
            Self::StreamError => "stream_error",
            Self::TransportError => "transport_error",
            Self::Timeout => "timeout",
            Self::Truncated => "truncated",
        }
    }
}
