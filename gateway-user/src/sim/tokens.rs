//! A pseudo tokenizer and a pseudo model: token counts, prefix blocks and texts, all fixed by the seed.
//!
//! A token is four bytes of the prompt. That is close to English on a real tokenizer, needs no vocabulary file,
//! and makes `/tokenize` → `/detokenize` and token-id prompts round trips. Texts are meaningless on purpose.

/// Bytes in a token: the usual figure for English text.
pub const TOKEN_BYTES: usize = 4;

/// Shortest answer of a model that is free to stop. Long enough that a small `max_tokens` ends in `length`.
const NATURAL_LEN_MIN: u64 = 48;
/// Spread of the length of free answers: 48 to 559 tokens, about 300 on average, as chat traffic has it.
const NATURAL_LEN_SPREAD: u64 = 512;

/// What the model speaks. All end up as one token, whatever their length.
const WORDS: [&str; 64] = [
    " the", " shared", " cluster", " queue", " batch", " token", " prefix", " cache", " block", " team",
    " window", " step", " a", " of", " and", " runs", " waits", " holds", " grows", " under", " load",
    " with", " memory", " slow", " fast", " first", " last", " each", " request", " stream", " model",
    " weight", " layer", " head", " key", " value", " rank", " shard", " node", " rack", " fan", " heat",
    " cost", " budget", " share", " rate", " limit", " idle", " busy", " peak", " mean", " tail", ",", ".",
    ";", ":", " é", " 漢", "\n", " \"", " 1", " 20", " 300", "ing",
];

/// A tokenised prompt, reduced to what the engine needs: no text is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Prompt {
    /// Length in tokens.
    pub tokens: u32,
    /// Fixes the answer.
    pub hash: u64,
    /// For each full block the hash of everything up to its end.
    pub blocks: Vec<u64>,
}

impl Prompt {
    /// Tokenises `bytes`; prompts with different `salt` share no prefix.
    pub fn new(bytes: &[u8], salt: u64, block_tokens: u32) -> Self {
        let block_bytes = block_tokens as usize * TOKEN_BYTES;
        let mut chain = salt;
        let mut blocks = Vec::with_capacity(bytes.len() / block_bytes);
        let mut chunks = bytes.chunks_exact(block_bytes);
        for chunk in &mut chunks {
            chain = hash_bytes(chain, chunk);
            blocks.push(chain);
        }
        let tokens = u32::try_from(bytes.len().div_ceil(TOKEN_BYTES))
            .unwrap_or(u32::MAX)
            .max(1);
        Prompt {
            tokens,
            hash: hash_bytes(chain, chunks.remainder()),
            blocks,
        }
    }
}

/// Token ids of a text.
pub fn encode(text: &[u8]) -> Vec<u32> {
    text.chunks(TOKEN_BYTES)
        .map(|chunk| {
            let mut id = [0; TOKEN_BYTES];
            id[..chunk.len()].copy_from_slice(chunk);
            u32::from_le_bytes(id)
        })
        .collect()
}

/// The bytes of token ids: the inverse of [`encode`], but for zero bytes at the end.
pub fn decode(ids: &[u32]) -> Vec<u8> {
    let mut bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    while bytes.last() == Some(&0) {
        bytes.pop();
    }
    bytes
}

/// What one choice of a request says, token by token.
#[derive(Debug, Clone)]
pub struct Voice {
    key: u64,
    /// A text the choice has to say first (a tool's arguments), one piece a token.
    script: Vec<String>,
}

impl Voice {
    /// The voice of choice `choice` of a prompt.
    pub fn new(seed: u64, prompt_hash: u64, choice: u32) -> Self {
        Voice {
            key: mix(mix(seed, prompt_hash), u64::from(choice)),
            script: Vec::new(),
        }
    }

    /// Says `text` and nothing else; beyond its end the tokens are spaces, which JSON allows.
    pub fn scripted(mut self, text: &str) -> Self {
        let mut piece = String::new();
        for letter in text.chars() {
            piece.push(letter);
            if piece.len() >= TOKEN_BYTES {
                self.script.push(std::mem::take(&mut piece));
            }
        }
        if !piece.is_empty() || self.script.is_empty() {
            self.script.push(piece);
        }
        self
    }

    /// How many tokens the choice says when nothing cuts it short.
    pub fn natural_len(&self) -> u32 {
        if self.script.is_empty() {
            // Below 560, so the conversion holds.
            (NATURAL_LEN_MIN + mix(self.key, 1) % NATURAL_LEN_SPREAD) as u32
        } else {
            u32::try_from(self.script.len()).unwrap_or(u32::MAX)
        }
    }

    /// Token `position` as text.
    pub fn token(&self, position: u32) -> &str {
        if self.script.is_empty() {
            self.alternative(position, 0)
        } else {
            self.script.get(position as usize).map_or(" ", String::as_str)
        }
    }

    /// What the model might have said instead at `position`; rank 0 is what an unscripted voice does say.
    pub fn alternative(&self, position: u32, rank: u32) -> &'static str {
        let index = mix(self.key, u64::from(position) + 2) + u64::from(rank) * 7;
        WORDS[(index % WORDS.len() as u64) as usize]
    }

    /// Tokens `from..to` joined.
    pub fn text(&self, from: u32, to: u32) -> String {
        (from..to).map(|position| self.token(position)).collect()
    }
}

/// Joins two values into one that depends on every bit of both (a folded multiply).
pub fn mix(a: u64, b: u64) -> u64 {
    // Odd constants with well-spread bits keep zero inputs from collapsing the product.
    let product =
        u128::from(a ^ 0x9e37_79b9_7f4a_7c15).wrapping_mul(u128::from(b ^ 0xd1b5_4a32_d192_ed03) | 1 << 64);
    (product as u64) ^ ((product >> 64) as u64)
}

/// Hash of `bytes`, continued from `seed`.
pub fn hash_bytes(seed: u64, bytes: &[u8]) -> u64 {
    let mut hash = mix(seed, bytes.len() as u64);
    for chunk in bytes.chunks(8) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        hash = mix(hash, u64::from_le_bytes(word));
    }
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_beginnings_share_blocks_and_salts_part_them() {
        let long = vec![b'x'; 200];
        let a = Prompt::new(&long, 0, 16);
        let b = Prompt::new(&[long.as_slice(), b"different end"].concat(), 0, 16);
        assert_eq!((a.tokens, a.blocks.len()), (50, 3));
        assert_eq!(a.blocks, b.blocks[..3]);
        assert_ne!(a.hash, b.hash);
        assert_ne!(Prompt::new(&long, 1, 16).blocks[0], a.blocks[0]);
    }

    #[test]
    fn tokens_decode_to_the_text_and_make_the_same_prompt() {
        let text = "Shared GPUs, 漢".as_bytes();
        let ids = encode(text);
        assert_eq!(decode(&ids), text);
        assert_eq!(ids.len() as u32, Prompt::new(text, 0, 16).tokens);
    }

    #[test]
    fn a_script_is_said_in_full_and_padded() {
        let voice = Voice::new(1, 2, 0).scripted(r#"{"gpus": 42}"#);
        assert_eq!(voice.text(0, voice.natural_len()), r#"{"gpus": 42}"#);
        assert_eq!(voice.token(voice.natural_len()), " ");
    }

    #[test]
    fn choices_differ_and_repeat() {
        let say = |choice| Voice::new(7, 9, choice).text(0, 20);
        assert_eq!(say(0), say(0));
        assert_ne!(say(0), say(1));
    }
}
