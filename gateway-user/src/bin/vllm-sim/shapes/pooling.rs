//! `/v1/embeddings`, `/pooling`, `/score`, `/rerank`.

use super::Stamp;
use super::json::{Js, List};
use crate::tokens::mix;

/// A unit vector fixed by `key`.
pub fn vector(key: u64, size: u32) -> Vec<f32> {
    let raw: Vec<f64> = (0..u64::from(size))
        .map(|index| mix(key, index) as f64 / u64::MAX as f64 - 0.5)
        .collect();
    let length = raw
        .iter()
        .map(|x| x * x)
        .sum::<f64>()
        .sqrt()
        .max(f64::MIN_POSITIVE);
    raw.iter().map(|x| (x / length) as f32).collect()
}

/// A score from 0 to 1 fixed by `key`.
pub fn score(key: u64) -> f64 {
    // 53 bits are what a double holds.
    (mix(key, 3) >> 11) as f64 / (1u64 << 53) as f64
}

fn numbers(vector: &[f32]) -> String {
    // Python prints the double that a float widens to.
    List(vector.iter().map(|x| format!("{:?}", f64::from(*x)))).to_string()
}

fn usage(prompt_tokens: u32) -> String {
    format!(
        r#"{{"prompt_tokens":{prompt_tokens},"total_tokens":{prompt_tokens},"completion_tokens":0,"prompt_tokens_details":null,"completion_tokens_details":null}}"#
    )
}

/// Answers that list one entry an input.
fn list(
    prefix: &str,
    stamp: &Stamp,
    model: &str,
    data: impl Iterator<Item = String> + Clone,
    tokens: u32,
) -> String {
    format!(
        r#"{{"id":"{prefix}-{}","object":"list","created":{},"model":{},"data":{},"usage":{}}}"#,
        stamp.id,
        stamp.created,
        Js(model),
        List(data),
        usage(tokens)
    )
}

/// `/v1/embeddings`: numbers, or base64 of little-endian floats.
pub fn embeddings(stamp: &Stamp, model: &str, vectors: &[Vec<f32>], as_base64: bool, tokens: u32) -> String {
    let data = vectors.iter().enumerate().map(|(index, vector)| {
        let embedding = if as_base64 {
            format!("\"{}\"", base64(vector))
        } else {
            numbers(vector)
        };
        format!(r#"{{"index":{index},"object":"embedding","embedding":{embedding}}}"#)
    });
    list("embd", stamp, model, data, tokens)
}

/// `/pooling`.
pub fn pooling(stamp: &Stamp, model: &str, vectors: &[Vec<f32>], as_base64: bool, tokens: u32) -> String {
    let data = vectors.iter().enumerate().map(|(index, vector)| {
        let pooled = if as_base64 {
            format!("\"{}\"", base64(vector))
        } else {
            numbers(vector)
        };
        format!(r#"{{"index":{index},"object":"pooling","data":{pooled}}}"#)
    });
    list("pool", stamp, model, data, tokens)
}

/// `/score`.
pub fn scores(stamp: &Stamp, model: &str, scores: &[f64], tokens: u32) -> String {
    let data = scores
        .iter()
        .enumerate()
        .map(|(index, score)| format!(r#"{{"index":{index},"object":"score","score":{score:?}}}"#));
    list("score", stamp, model, data, tokens)
}

/// `/rerank`: best first.
pub fn rerank(stamp: &Stamp, model: &str, ranked: &[(usize, &str, f64)], tokens: u32) -> String {
    let results = ranked.iter().map(|(index, text, score)| {
        format!(
            r#"{{"index":{index},"document":{{"text":{},"multi_modal":null}},"relevance_score":{score:?}}}"#,
            Js(text)
        )
    });
    format!(
        r#"{{"id":"rerank-{}","model":{},"usage":{{"prompt_tokens":{tokens},"total_tokens":{tokens}}},"results":{}}}"#,
        stamp.id,
        Js(model),
        List(results)
    )
}

fn base64(vector: &[f32]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
    let mut out = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let word =
            group.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
        for digit in 0..4 {
            let index = (word >> (18 - 6 * digit)) & 63;
            out.push(if digit <= group.len() {
                char::from(ALPHABET[index as usize])
            } else {
                '='
            });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_pads_as_the_standard_does() {
        assert_eq!(base64(&[1.0]), "AACAPw==");
        assert_eq!(base64(&[1.0, 2.0]), "AACAPwAAAEA=");
        assert_eq!(base64(&[1.0, 2.0, -0.5]), "AACAPwAAAEAAAAC/");
    }

    #[test]
    fn vectors_have_length_one() {
        let length: f32 = vector(5, 128).iter().map(|x| x * x).sum();
        assert!((length - 1.0).abs() < 1e-5, "{length}");
    }
}
