//! Vocabulary entries as the bytes that they stand for, for displays.

use tokenizers::DecoderWrapper;

/// How a vocabulary spells its entries.
pub enum Pieces {
    /// GPT-2's alphabet: one printable character for each byte.
    ByteLevel(Box<[Option<u8>]>),
    /// Sentencepiece's: "▁" is a space, `<0x0A>` a byte.
    Sentencepiece,
    /// As it is.
    Plain,
}

impl Pieces {
    /// Reads the spelling off the tokenizer's decoder.
    pub fn of(decoder: Option<&DecoderWrapper>) -> Self {
        match decoder {
            Some(DecoderWrapper::ByteLevel(_)) => Self::ByteLevel(byte_level_alphabet()),
            Some(DecoderWrapper::Metaspace(_) | DecoderWrapper::ByteFallback(_)) => {
                Self::Sentencepiece
            }
            Some(DecoderWrapper::Sequence(steps)) => steps
                .get_decoders()
                .iter()
                .map(|step| Self::of(Some(step)))
                .find(|pieces| !matches!(pieces, Self::Plain))
                .unwrap_or(Self::Plain),
            _ => Self::Plain,
        }
    }

    /// The bytes of an entry of the vocabulary.
    pub fn bytes(&self, entry: &str) -> Vec<u8> {
        match self {
            Self::Plain => entry.as_bytes().to_vec(),
            Self::Sentencepiece => match byte_entry(entry) {
                Some(byte) => vec![byte],
                None => entry.replace('▁', " ").into_bytes(),
            },
            Self::ByteLevel(alphabet) => {
                let byte = |c: char| alphabet.get(c as usize).copied().flatten();
                // An entry outside the alphabet was added by hand and is meant literally.
                entry.chars().map(byte).collect::<Option<_>>().unwrap_or_else(|| entry.into())
            }
        }
    }
}

/// `<0x0A>`: 10.
fn byte_entry(entry: &str) -> Option<u8> {
    u8::from_str_radix(entry.strip_prefix("<0x")?.strip_suffix('>')?, 16).ok()
}

/// By code point: the byte it stands for. Printable Latin-1 characters stand for themselves, the
/// other bytes, in rising order, are the characters from U+0100 on.
fn byte_level_alphabet() -> Box<[Option<u8>]> {
    let mut alphabet = vec![None; 0x100 + 68];
    let mut next = 0x100;
    for byte in 0..=255u8 {
        let printable = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let point = if printable { byte as usize } else { next };
        next += usize::from(!printable);
        alphabet[point] = Some(byte);
    }
    alphabet.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_level_alphabet_covers_every_byte_once() {
        let alphabet = byte_level_alphabet();
        let mut bytes: Vec<u8> = alphabet.iter().flatten().copied().collect();
        bytes.sort_unstable();
        assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
    }

    #[test]
    fn entries_become_bytes() {
        let byte_level = Pieces::ByteLevel(byte_level_alphabet());
        assert_eq!(byte_level.bytes("Ġthe"), b" the");
        assert_eq!(byte_level.bytes("Ċ"), b"\n");
        assert_eq!(byte_level.bytes("Ã©"), "é".as_bytes());
        assert_eq!(byte_level.bytes("日本"), "日本".as_bytes());
        assert_eq!(Pieces::Sentencepiece.bytes("▁the"), b" the");
        assert_eq!(Pieces::Sentencepiece.bytes("<0x0A>"), b"\n");
        assert_eq!(Pieces::Plain.bytes("▁"), "▁".as_bytes());
    }
}
