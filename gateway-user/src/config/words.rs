//! The settings that are a choice between a few words.

use serde::Serialize;

/// Declares an enum whose variants have one spelling in the config, shared by parser, printer and error message.
macro_rules! keywords {
    ($(#[$meta:meta])* $name:ident { $($(#[$variant_meta:meta])* $variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$variant_meta])* $variant),+ }

        impl $name {
            /// The words that the config may say here.
            pub const WORDS: &'static [&'static str] = &[$($word),+];

            /// The word for this value.
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }

            pub(super) fn from_word(word: &str) -> Option<Self> {
                match word { $($word => Some(Self::$variant),)+ _ => None }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.as_str())
            }
        }

        impl Serialize for $name {
            fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(self.as_str())
            }
        }
    };
}

keywords! {
    /// Where requests are seen.
    Capture {
        /// The proxy, and the kernel probe too where it loads.
        Auto = "auto",
        /// The proxy alone.
        Proxy = "proxy",
        /// The proxy for identity, the kernel for timing.
        ProxyAndTap = "proxy+tap",
        /// The kernel probe alone.
        Tap = "tap",
    }
}

keywords! {
    /// How the worker threads share connections.
    RuntimeKind {
        /// One scheduler moves work between the threads.
        Shared = "shared",
        /// Each thread has a listener and a scheduler of its own, and keeps what it accepted.
        PerCore = "per_core",
    }
}

keywords! {
    /// The kind of request an upstream answers.
    Serves {
        /// Text generation: chat, completions, responses, messages, audio.
        Generate = "generate",
        /// Embeddings and the other pooling endpoints.
        Embeddings = "embeddings",
    }
}

keywords! {
    /// What becomes of a request whose body is too large, compressed or otherwise unreadable to the gateway.
    OnUninspectable {
        /// It goes to the endpoint's default upstream as it is, and is counted.
        Pass = "pass",
        /// It is refused.
        Reject = "reject",
    }
}

keywords! {
    /// What the gateway asks vLLM to report on streams. What the client did not ask for, it does not see.
    Inject {
        /// `continuous`, and `final` for models where continuous reports are slow.
        Auto = "auto",
        /// Usage on each chunk, so that an aborted stream is exact to one engine step.
        Continuous = "continuous",
        /// Usage at the end: nothing is known of an aborted stream but its chunks.
        Final = "final",
        /// Nothing.
        Off = "off",
    }
}

keywords! {
    /// What becomes of rows when the spool has reached its size.
    WhenFull {
        /// New rows are dropped: what lies in the spool stays there, whole, until it is stored.
        DropNewest = "drop_newest",
        /// The oldest file that waits to be stored is deleted to make room.
        DropOldest = "drop_oldest",
    }
}

keywords! {
    /// What the spool asks of the disk, and so what a power loss can take. A crash of the gateway takes nothing under any of them.
    Fsync {
        /// Nothing: a power loss takes what the kernel has not yet written by itself, usually half a minute.
        Off = "off",
        /// A flush at an interval: a power loss takes the rows of the last interval.
        Interval = "interval",
        /// A response ends only once its row is on the disk.
        Each = "each",
    }
}

keywords! {
    /// Who pays for a server while nobody uses it.
    IdleTo {
        /// Nobody: it has a line of its own, `__idle__`.
        Separate = "separate",
        /// The team that owns the upstream; `__idle__` where none does.
        Owner = "owner",
        /// The teams that used it in the same window, as they share its busy time; `__idle__` where there are none.
        Proportional = "proportional",
        /// The teams that used it in the same window, each the same; `__idle__` where there are none.
        Even = "even",
    }
}

keywords! {
    /// What limits do.
    LimitMode {
        /// Requests beyond them are refused.
        Enforce = "enforce",
        /// Nothing is refused; what would have been is counted.
        Observe = "observe",
    }
}

keywords! {
    /// The time that a budget is for, by the clock of UTC.
    BudgetPeriod {
        /// From midnight to midnight.
        Day = "day",
        /// From the first of a month to the first of the next.
        Month = "month",
    }
}

keywords! {
    /// What becomes of requests once a budget is spent.
    AtLimit {
        /// They are refused until the period is over.
        Refuse = "refuse",
        /// They are let in, and counted.
        Observe = "observe",
    }
}

keywords! {
    /// How much is logged.
    LogLevel {
        /// What needs somebody's attention.
        Error = "error",
        /// And what may soon.
        Warn = "warn",
        /// And what the gateway does as a whole.
        Info = "info",
        /// And what it does for each request.
        Debug = "debug",
        /// And each step of that.
        Trace = "trace",
    }
}

keywords! {
    /// How log lines are written.
    LogFormat {
        /// For people.
        Text = "text",
        /// One JSON object a line.
        Json = "json",
    }
}
