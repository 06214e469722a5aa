//! tokenizer.json, and encodings that know which bytes of the text each token covers.

use super::pieces::Pieces;
use super::specials::Specials;
use crate::{Error, Result};
use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use tokenizers::AddedToken;
use uft_core::guard::{catch, record_places};

/// A tokenizer with the special tokens of its model directory.
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    pieces: Pieces,
    /// Ids that the tokenizer itself puts in front of and behind a text: usually BOS and nothing.
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    /// One more than the highest id.
    vocab_size: usize,
    /// The added tokens by id. Ids are a file's word, so nothing is as long as the highest of them.
    added: HashMap<u32, Entry>,
}

/// What is known of a token beside its text.
#[derive(Clone, Copy, Default)]
struct Entry {
    /// Added to the vocabulary: its text is meant literally.
    added: bool,
    special: bool,
    /// The text is cut at this token before anything else happens to it, so that what stands before
    /// it has no influence on how the text from it on is encoded.
    anchor: bool,
}

/// A text with its tokens.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Encoded {
    pub text: String,
    pub ids: Vec<u32>,
    /// For each token: the bytes of `text` that it covers. Tokens of one character overlap.
    pub spans: Vec<Range<usize>>,
}

impl Tokenizer {
    /// Reads `tokenizer.json`.
    ///
    /// # Errors
    /// A missing or broken file; a BOS or EOS token that it does not know.
    pub fn load(dir: &Path, specials: &Specials) -> Result<Self> {
        let path = dir.join("tokenizer.json");
        if !path.exists() {
            return Err(Error::data(missing(dir)));
        }
        let load = || tokenizers::Tokenizer::from_file(&path);
        let made = sound(load).and_then(|inner| Self::new(inner, specials));
        made.map_err(|e| e.at(path.display()))
    }

    /// Wraps a tokenizer.
    ///
    /// # Errors
    /// A BOS or EOS token that the tokenizer does not know; added tokens that have no place in it.
    pub fn new(inner: tokenizers::Tokenizer, specials: &Specials) -> Result<Self> {
        sound(|| Ok(Self::prepare(inner, specials)))?
    }

    fn prepare(mut inner: tokenizers::Tokenizer, specials: &Specials) -> Result<Self> {
        // A file may carry the truncation and padding of somebody's last call.
        inner.with_truncation(None).map_err(failed)?;
        inner.with_padding(None);
        add_missing(&mut inner, &specials.added)?;
        // A named token is special even where tokenizer.json holds it as an ordinary word.
        let mut named = Vec::new();
        for (name, text) in specials.iter() {
            match inner.token_to_id(text) {
                Some(id) if !inner.get_added_tokens_decoder().contains_key(&id) => {
                    named.push(AddedToken::from(text, true));
                }
                None if matches!(name, "bos_token" | "eos_token") => {
                    return Err(Error::data(format!(
                        "the {name} {text:?} of tokenizer_config.json is not in the vocabulary"
                    )));
                }
                _ => {}
            }
        }
        inner.add_special_tokens(named).map_err(failed)?;

        let (mut prefix, mut suffix) = around(&inner)?;
        let id = |name: &str| specials.get(name).and_then(|text| inner.token_to_id(text));
        if let Some(add) = specials.add_bos {
            prefix = id("bos_token").filter(|_| add).into_iter().collect();
        }
        if let Some(add) = specials.add_eos {
            suffix = id("eos_token").filter(|_| add).into_iter().collect();
        }

        let vocab_size = inner.get_vocab(true).values().max().map_or(0, |id| *id as usize + 1);
        let entry = |token: AddedToken| Entry {
            added: true,
            special: token.special,
            anchor: !token.normalized && !token.single_word,
        };
        let decoder = inner.get_added_tokens_decoder().into_iter();
        let added = decoder.map(|(id, token)| (id, entry(token))).collect();
        let pieces = Pieces::of(inner.get_decoder());
        Ok(Self { inner, pieces, prefix, suffix, vocab_size, added })
    }

    /// One more than the highest token id.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Whether an id is a special token.
    pub fn is_special(&self, id: u32) -> bool {
        self.entry(id).special
    }

    fn entry(&self, id: u32) -> Entry {
        self.added.get(&id).copied().unwrap_or_default()
    }

    /// Id of a token by its text.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// What the tokenizer puts in front of a text (BOS), unless the text already starts with it.
    pub fn prefix(&self) -> &[u32] {
        &self.prefix
    }

    /// What the tokenizer puts behind a text (EOS).
    pub fn suffix(&self) -> &[u32] {
        &self.suffix
    }

    /// Ids of a text with nothing added.
    ///
    /// # Errors
    /// Whatever the tokenizer refuses.
    pub fn ids(&self, text: &str) -> Result<Vec<u32>> {
        Ok(sound(|| self.inner.encode_fast(text, false))?.get_ids().to_vec())
    }

    /// A text with its tokens, nothing added.
    ///
    /// # Errors
    /// Whatever the tokenizer refuses.
    pub fn encode(&self, text: impl Into<String>) -> Result<Encoded> {
        self.extend(&Encoded::default(), text.into())
    }

    /// The encoding of `text`, taking over the tokens of `known` as far as they cannot change:
    /// up to the last special token in the common part. The result is that of [`Self::encode`].
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn extend(&self, known: &Encoded, text: String) -> Result<Encoded> {
        let common = if text.starts_with(&known.text) { known.text.len() } else { 0 };
        let (kept, start) = self.anchor_before(known, common);
        let encoding = sound(|| self.inner.encode(&text[start..], false))?;
        let mut ids = known.ids[..kept].to_vec();
        let mut spans = known.spans[..kept].to_vec();
        ids.extend_from_slice(encoding.get_ids());
        spans.extend(encoding.get_offsets().iter().map(|(a, b)| start + a..start + b));
        Ok(Encoded { text, ids, spans })
    }

    /// How many tokens of `full` encode its first `end` bytes, if the encoding of these bytes alone
    /// is a prefix of `full`.
    ///
    /// # Errors
    /// As [`Self::encode`].
    pub fn prefix_tokens(&self, full: &Encoded, end: usize) -> Result<Option<usize>> {
        let (kept, start) = self.anchor_before(full, end);
        let tail = self.ids(&full.text[start..end])?;
        Ok(full.ids[kept..].starts_with(&tail).then_some(kept + tail.len()))
    }

    /// Index and first byte of the last token within the first `end` bytes that cuts the text.
    fn anchor_before(&self, encoded: &Encoded, end: usize) -> (usize, usize) {
        let cuts = |i: &usize| encoded.spans[*i].end <= end && self.entry(encoded.ids[*i]).anchor;
        (0..encoded.ids.len()).rev().find(cuts).map_or((0, 0), |i| (i, encoded.spans[i].start))
    }

    /// Text of a sequence of ids.
    ///
    /// # Errors
    /// Whatever the tokenizer's decoder refuses.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        sound(|| self.inner.decode(ids, skip_special))
    }

    /// The bytes that a token stands for; not always whole characters. Empty for an unknown id.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        match self.inner.id_to_token(id) {
            Some(text) if self.entry(id).added => text.into_bytes(),
            Some(text) => self.pieces.bytes(&text),
            None => Vec::new(),
        }
    }
}

/// Adds the tokens of tokenizer_config.json that tokenizer.json lacks.
fn add_missing(inner: &mut tokenizers::Tokenizer, added: &[(u32, AddedToken)]) -> Result<()> {
    let lacks =
        |t: &tokenizers::Tokenizer, token: &AddedToken| t.token_to_id(&token.content).is_none();
    let missing: Vec<_> = added.iter().filter(|(_, token)| lacks(inner, token)).collect();
    let tokens = missing.iter().map(|(_, token)| token.clone());
    inner.add_tokens(tokens).map_err(failed)?;
    match missing.iter().find(|(id, token)| inner.token_to_id(&token.content) != Some(*id)) {
        None => Ok(()),
        Some((id, token)) => Err(Error::data(format!(
            "tokenizer_config.json has {:?} as token {id}, but it is missing here and its id is not \
             the next free one",
            token.content
        ))),
    }
}

/// The ids in front of and behind a text that is encoded with special tokens.
fn around(inner: &tokenizers::Tokenizer) -> Result<(Vec<u32>, Vec<u32>)> {
    let plain = inner.encode_fast("a", false).map_err(failed)?.get_ids().to_vec();
    let full = inner.encode_fast("a", true).map_err(failed)?.get_ids().to_vec();
    let start = (0..=full.len().saturating_sub(plain.len()))
        .find(|i| full[*i..].starts_with(&plain))
        .ok_or_else(|| Error::data("its post-processor does not only add tokens around a text"))?;
    Ok((full[..start].to_vec(), full[start + plain.len()..].to_vec()))
}

/// What to do about a directory without tokenizer.json.
fn missing(dir: &Path) -> String {
    let other = ["tokenizer.model", "vocab.json", "tekken.json", "tiktoken.model"]
        .into_iter()
        .find(|file| dir.join(file).exists());
    match other {
        Some(file) => format!(
            "{}: there is {file}, but uft reads tokenizer.json; make one with transformers: \
             AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)",
            dir.display()
        ),
        None => format!("{}: there is no tokenizer.json", dir.display()),
    }
}

/// Calls the tokenizers library, which panics on some files where it should refuse them.
fn sound<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    record_places();
    let damaged = |what| Error::data(format!("the tokenizer {what}; its file is damaged"));
    catch(call).map_err(damaged)?.map_err(failed)
}

fn failed(error: tokenizers::Error) -> Error {
    Error::data(format!("the tokenizer fails: {error}"))
}
