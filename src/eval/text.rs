//! From text to tokens and back: the `tokenizer.json` beside a model, without the padding and the truncation that it may ask for. A text that
//! is too long is told about, not cut unasked.

use std::path::Path;

use candle_core::{Device, Tensor};
use tokenizers::{EncodeInput, Encoding, Tokenizer};

use super::computed;
use crate::error::{Error, Result};
use crate::io::read_small;
use crate::rules;

/// Bytes of the largest tokenizer that is read.
const LIMIT: u64 = 256 << 20;

/// A tokenizer.
pub struct Text {
    tokenizer: Tokenizer,
}

impl Text {
    /// The `tokenizer.json` in `folder`, or the file itself.
    ///
    /// # Errors
    /// `U-011` if there is none, or it cannot be understood.
    pub fn open(path: &Path) -> Result<Self> {
        let file = if path.is_dir() { path.join("tokenizer.json") } else { path.to_owned() };
        let refuse = |message: String| Error::new(rules::TOKENIZER, message).file(&file);
        if !file.is_file() {
            let help =
                "save it beside the model (AutoTokenizer.save_pretrained writes tokenizer.json), or name it with --tokenizer";
            return Err(refuse("there is no tokenizer.json".to_owned()).help(help));
        }
        let bytes = read_small(&file, LIMIT)?.ok_or_else(|| refuse(format!("it is longer than {LIMIT} bytes")))?;
        let mut tokenizer = Tokenizer::from_bytes(bytes).map_err(|error| {
            refuse(format!("it is no tokenizer that is known here: {error}"))
                .help("save the tokenizer again with its own library")
        })?;
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|error| refuse(format!("its truncation cannot be switched off: {error}")))?;
        Ok(Text { tokenizer })
    }

    /// The tokens of a text, or of two, with the special ones. Offsets count characters.
    pub(super) fn encode<'s>(&self, text: impl Into<EncodeInput<'s>>) -> Result<Encoding> {
        let encoded = self.tokenizer.encode_char_offsets(text, true);
        encoded.map_err(|error| Error::new(rules::TOKENIZER, format!("the text has no tokens: {error}")))
    }

    /// The text of tokens, without special ones.
    pub(super) fn decode(&self, ids: &[u32]) -> Result<String> {
        let decoded = self.tokenizer.decode(ids, true);
        decoded.map_err(|error| Error::new(rules::TOKENIZER, format!("the tokens have no text: {error}")))
    }
}

/// One row of a batch, `(1, time)`.
pub(super) fn row(ids: &[u32]) -> Result<Tensor> {
    Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu).map_err(computed)
}
