//! The option values that describe a mix: length distributions, weights, endpoints, fractions.

use std::str::FromStr;

use crate::draws::Draws;

/// The longest prompt or output that is ever drawn: the context of the largest models in common use. It bounds
/// what the tail of a log-normal distribution can ask for, and so the memory of a request (4 bytes a token).
const LENGTH_MAX_TOKENS: u32 = 131_072;

/// How long prompts or outputs are, in tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Lengths {
    /// Every length from `min` to `max` is as likely.
    Uniform {
        /// The shortest, at least 1.
        min: u32,
        /// The longest.
        max: u32,
    },
    /// The logarithm is normal: many short ones and a long tail, which is what users send.
    LogNormal {
        /// Half are shorter.
        median: f64,
        /// The standard deviation of the logarithm.
        sigma: f64,
    },
}

impl Lengths {
    /// Draws a length, at least 1.
    pub fn draw(&self, draws: &mut Draws) -> u32 {
        match *self {
            Self::Uniform { min, max } => draws.within(min..=max),
            Self::LogNormal { median, sigma } => {
                let drawn = median * (sigma * draws.normal()).exp();
                // A float cast saturates, so an infinite draw becomes the largest length.
                (drawn.round() as u32).clamp(1, LENGTH_MAX_TOKENS)
            }
        }
    }
}

impl FromStr for Lengths {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || {
            format!(
                "expected N, MIN..MAX or lognormal:MEDIAN,SIGMA in tokens (1 to {LENGTH_MAX_TOKENS}), found `{text}`"
            )
        };
        if let Some(parameters) = text.strip_prefix("lognormal:") {
            let (median, sigma) = parameters.split_once(',').ok_or_else(expected)?;
            let median: f64 = median.trim().parse().map_err(|_| expected())?;
            let sigma: f64 = sigma.trim().parse().map_err(|_| expected())?;
            let fits =
                (1.0..=f64::from(LENGTH_MAX_TOKENS)).contains(&median) && (0.0..=10.0).contains(&sigma);
            return if fits {
                Ok(Self::LogNormal { median, sigma })
            } else {
                Err(expected())
            };
        }
        let (min, max) = text.split_once("..").unwrap_or((text, text));
        let min: u32 = min.trim().parse().map_err(|_| expected())?;
        let max: u32 = max.trim().parse().map_err(|_| expected())?;
        if min < 1 || max < min || max > LENGTH_MAX_TOKENS {
            return Err(expected());
        }
        Ok(Self::Uniform { min, max })
    }
}

/// A choice between several things by weight.
#[derive(Clone, Debug, PartialEq)]
pub struct Weights {
    /// Running sums divided by the total; the last is 1.
    cumulative: Vec<f64>,
}

impl Weights {
    /// Weights that are finite, not negative, and not all zero; otherwise `None`.
    pub fn new(weights: &[f64]) -> Option<Self> {
        let total: f64 = weights.iter().sum();
        let sound = weights.iter().all(|weight| weight.is_finite() && *weight >= 0.0);
        if !sound || !total.is_finite() || total <= 0.0 {
            return None;
        }
        let mut sum = 0.0;
        let cumulative = weights
            .iter()
            .map(|weight| {
                sum += weight;
                sum / total
            })
            .collect();
        Some(Self { cumulative })
    }

    /// All of `count` things are as likely; at least one.
    pub fn equal(count: u32) -> Self {
        let count = count.max(1);
        Self {
            cumulative: (1..=count).map(|i| f64::from(i) / f64::from(count)).collect(),
        }
    }

    /// How many things there are.
    pub fn len(&self) -> usize {
        self.cumulative.len()
    }

    /// The probability of thing `index`.
    pub fn share(&self, index: usize) -> f64 {
        let before = index
            .checked_sub(1)
            .map_or(0.0, |previous| self.cumulative[previous]);
        self.cumulative[index] - before
    }

    /// Draws the index of a thing; one of weight zero is never drawn.
    pub fn draw(&self, draws: &mut Draws) -> usize {
        let point = draws.unit();
        self.cumulative
            .partition_point(|sum| *sum <= point)
            .min(self.cumulative.len() - 1)
    }
}

/// The endpoints that the generator knows how to call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Endpoint {
    /// `POST /v1/chat/completions`.
    Chat,
    /// `POST /v1/completions`.
    Completions,
    /// `POST /v1/embeddings`, which never streams.
    Embeddings,
    /// `POST /v1/responses`.
    Responses,
    /// `POST /v1/messages`.
    Messages,
}

impl Endpoint {
    /// Every endpoint, in the order of their weights.
    pub const ALL: [Self; 5] = [
        Self::Chat,
        Self::Completions,
        Self::Embeddings,
        Self::Responses,
        Self::Messages,
    ];

    /// The name in options and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Chat => "chat",
            Self::Completions => "completions",
            Self::Embeddings => "embeddings",
            Self::Responses => "responses",
            Self::Messages => "messages",
        }
    }

    /// The path below the server's URL.
    pub fn path(self) -> &'static str {
        match self {
            Self::Chat => "/v1/chat/completions",
            Self::Completions => "/v1/completions",
            Self::Embeddings => "/v1/embeddings",
            Self::Responses => "/v1/responses",
            Self::Messages => "/v1/messages",
        }
    }

    /// Whether a response can be streamed.
    pub fn streams(self) -> bool {
        self != Self::Embeddings
    }
}

/// How often each endpoint is called.
#[derive(Clone, Debug, PartialEq)]
pub struct EndpointMix {
    weights: Weights,
}

impl EndpointMix {
    /// Draws an endpoint.
    pub fn draw(&self, draws: &mut Draws) -> Endpoint {
        Endpoint::ALL[self.weights.draw(draws)]
    }

    /// The share of requests whose endpoint can stream.
    pub fn streaming_share(&self) -> f64 {
        let indexed = Endpoint::ALL.iter().enumerate();
        indexed
            .filter(|(_, endpoint)| endpoint.streams())
            .map(|(index, _)| self.weights.share(index))
            .sum()
    }

    /// Whether any request goes to this endpoint.
    pub fn uses(&self, endpoint: Endpoint) -> bool {
        let position = Endpoint::ALL.iter().position(|candidate| *candidate == endpoint);
        position.is_some_and(|index| self.weights.share(index) > 0.0)
    }
}

impl FromStr for EndpointMix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Endpoint::ALL.map(Endpoint::name).join(", ");
        let mut weights = [0.0; Endpoint::ALL.len()];
        for part in text.split(',') {
            let (name, weight) = part.split_once('=').unwrap_or((part, "1"));
            let index = Endpoint::ALL
                .iter()
                .position(|endpoint| endpoint.name() == name.trim())
                .ok_or_else(|| format!("no endpoint is named `{}`: the names are {known}", name.trim()))?;
            weights[index] = weight
                .trim()
                .parse()
                .map_err(|_| format!("the weight of `{name}` must be a number, found `{weight}`"))?;
        }
        let weights = Weights::new(&weights).ok_or_else(|| {
            format!("weights must not be negative, and one must be above 0, found `{text}`")
        })?;
        Ok(Self { weights })
    }
}

/// A share of the requests, from 0 to 1.
pub fn parse_fraction(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(fraction) if (0.0..=1.0).contains(&fraction) => Ok(fraction),
        _ => Err(format!("expected a share from 0 to 1, found `{text}`")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::draws::Purpose;

    fn draws(index: u64) -> Draws {
        Draws::new(3, Purpose::Request, index)
    }

    #[test]
    fn lengths_are_read_in_all_three_forms() {
        assert_eq!("20..200".parse(), Ok(Lengths::Uniform { min: 20, max: 200 }));
        assert_eq!("16".parse(), Ok(Lengths::Uniform { min: 16, max: 16 }));
        assert_eq!(
            "lognormal:120,0.8".parse(),
            Ok(Lengths::LogNormal {
                median: 120.0,
                sigma: 0.8
            })
        );
        for wrong in [
            "",
            "0..5",
            "9..3",
            "1..999999999",
            "lognormal:5",
            "lognormal:0,1",
            "lognormal:9,NaN",
            "x",
        ] {
            let message = wrong.parse::<Lengths>().expect_err(wrong);
            assert!(message.contains("lognormal:MEDIAN,SIGMA"), "{message}");
        }
    }

    #[test]
    fn a_log_normal_length_has_its_median_and_stays_in_bounds() {
        let lengths = Lengths::LogNormal {
            median: 100.0,
            sigma: 3.0,
        };
        let mut drawn: Vec<u32> = (0..20_001).map(|index| lengths.draw(&mut draws(index))).collect();
        drawn.sort_unstable();
        assert!((92..=108).contains(&drawn[10_000]), "median {}", drawn[10_000]);
        assert!(drawn[0] >= 1 && drawn[20_000] <= LENGTH_MAX_TOKENS);
    }

    #[test]
    fn weights_are_shares_and_zero_is_never_drawn() {
        let weights = Weights::new(&[5.0, 0.0, 3.0]).expect("sound weights");
        let mut counts = [0u32; 3];
        for index in 0..40_000 {
            counts[weights.draw(&mut draws(index))] += 1;
        }
        assert_eq!(counts[1], 0);
        assert!(counts[0].abs_diff(25_000) < 500, "{counts:?}");
        assert!((weights.share(2) - 0.375).abs() < 1e-12);
        assert_eq!(Weights::new(&[0.0]), None);
        assert_eq!(Weights::new(&[-1.0, 2.0]), None);
        assert_eq!(Weights::new(&[f64::INFINITY]), None);
    }

    #[test]
    fn an_endpoint_mix_names_what_is_wrong() {
        let mix: EndpointMix = "chat=6,completions=3,embeddings=1".parse().expect("a mix");
        assert!((mix.streaming_share() - 0.9).abs() < 1e-12);
        assert!(mix.uses(Endpoint::Embeddings) && !mix.uses(Endpoint::Responses));
        assert!(
            "chat=x"
                .parse::<EndpointMix>()
                .expect_err("no number")
                .contains("must be a number")
        );
        assert!(
            "chats=1"
                .parse::<EndpointMix>()
                .expect_err("a typo")
                .contains("messages")
        );
        assert!(
            "chat=0"
                .parse::<EndpointMix>()
                .expect_err("all zero")
                .contains("above 0")
        );
    }
}
