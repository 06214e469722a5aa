//! Reading the keys of a JSON object, with errors that name file, key and value.

use crate::{Error, Result};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// One JSON object of a file. A key whose value is `null` counts as absent, as in Python.
#[derive(Clone, Debug)]
pub struct Keys {
    file: PathBuf,
    map: Map<String, Value>,
}

impl Keys {
    /// Reads a file that holds one object.
    pub fn read(file: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(file).map_err(|e| model_error(file, e.to_string()))?;
        match serde_json::from_str(&text) {
            Ok(Value::Object(map)) => Ok(Self::new(file, map)),
            Ok(_) => Err(model_error(file, "not a JSON object")),
            Err(e) => Err(model_error(file, format!("not JSON: {e}"))),
        }
    }

    /// An object that is part of `file`.
    pub fn new(file: &Path, map: Map<String, Value>) -> Self {
        Self { file: file.to_path_buf(), map }
    }

    /// The file that the keys come from.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// All keys in file order, those with `null` too.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.map.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// Whether the key is there, `null` or not.
    pub fn has(&self, key: &str) -> bool {
        self.map.contains_key(key)
    }

    /// The value of a key, unless it is absent or `null`.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    pub fn bool(&self, key: &str) -> Result<Option<bool>> {
        self.typed(key, "it must be true or false", Value::as_bool)
    }

    pub fn number(&self, key: &str) -> Result<Option<f64>> {
        self.typed(key, "it must be a number", Value::as_f64)
    }

    /// A whole number from 0.
    pub fn count(&self, key: &str) -> Result<Option<usize>> {
        let count = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok());
        self.typed(key, "it must be a whole number", count)
    }

    pub fn string(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.refuse(key, "it must be a string")),
        }
    }

    pub fn object(&self, key: &str) -> Result<Option<&Map<String, Value>>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(map)),
            Some(_) => Err(self.refuse(key, "it must be an object")),
        }
    }

    pub fn optional_positive(&self, key: &str) -> Result<Option<usize>> {
        match self.count(key)? {
            Some(0) => Err(self.refuse(key, "it must be at least 1")),
            // Far beyond any model; keeps products of two dimensions inside usize.
            Some(n) if n > 1 << 30 => Err(self.refuse(key, "it is too large")),
            other => Ok(other),
        }
    }

    pub fn positive(&self, key: &str) -> Result<usize> {
        self.optional_positive(key)?.ok_or_else(|| self.missing(key))
    }

    pub fn required_string(&self, key: &str) -> Result<&str> {
        self.string(key)?.ok_or_else(|| self.missing(key))
    }

    fn typed<T>(
        &self,
        key: &str,
        wanted: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| self.refuse(key, wanted)),
        }
    }

    /// `file: key is missing`.
    pub fn missing(&self, key: &str) -> Error {
        model_error(&self.file, format!("{key} is missing"))
    }

    /// `file: key = value: why`.
    pub fn refuse(&self, key: &str, why: &str) -> Error {
        let value = self.map.get(key).unwrap_or(&Value::Null);
        model_error(&self.file, format!("{key} = {value}: {why}"))
    }

    /// `file: key: message`, for a value that is shown in the message.
    pub fn error(&self, key: &str, message: impl std::fmt::Display) -> Error {
        model_error(&self.file, format!("{key}: {message}"))
    }
}

/// The error of a model directory: `file: message`.
pub(crate) fn model_error(file: &Path, message: impl Into<String>) -> Error {
    Error::model(message).at(file.display())
}
