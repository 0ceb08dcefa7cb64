//! A message together with the place where it stands, so that every refusal names its field.

use std::time::Duration;

use prost_reflect::{DynamicMessage, ReflectMessage, Value};

use super::{ConfigError, push_field, unpack_any};

/// A message and its path. Accessors take proto field names; asking for a field the message does not have gives "unset".
#[derive(Debug, Clone)]
pub struct At {
    /// The message.
    pub message: DynamicMessage,
    /// Where it stands.
    pub path: String,
}

impl At {
    /// A message at `path`.
    pub fn new(message: DynamicMessage, path: impl Into<String>) -> Self {
        Self {
            message,
            path: path.into(),
        }
    }

    /// Full protobuf name of the message.
    pub fn type_name(&self) -> String {
        self.message.descriptor().full_name().to_owned()
    }

    /// Whether `field` is set.
    pub fn has(&self, field: &str) -> bool {
        self.message.has_field_by_name(field)
    }

    fn value(&self, field: &str) -> Option<Value> {
        if !self.has(field) {
            return None;
        }
        self.message
            .get_field_by_name(field)
            .map(std::borrow::Cow::into_owned)
    }

    /// The path of `field`.
    pub fn path_of(&self, field: &str) -> String {
        let mut path = self.path.clone();
        push_field(&mut path, field);
        path
    }

    /// A refusal of `field`, or of the message itself when `field` is empty.
    pub fn refuse(&self, field: &str, reason: impl Into<String>) -> ConfigError {
        let path = if field.is_empty() {
            self.path.clone()
        } else {
            self.path_of(field)
        };
        ConfigError::new(path, reason)
    }

    /// A text, empty when unset.
    pub fn text(&self, field: &str) -> String {
        self.value(field)
            .and_then(|v| v.as_str().map(str::to_owned))
            .unwrap_or_default()
    }

    /// A text that must not be empty.
    ///
    /// # Errors
    /// It is.
    pub fn required_text(&self, field: &str) -> Result<String, ConfigError> {
        let text = self.text(field);
        if text.is_empty() {
            Err(self.refuse(field, "must not be empty"))
        } else {
            Ok(text)
        }
    }

    /// A list of texts.
    pub fn texts(&self, field: &str) -> Vec<String> {
        let Some(Value::List(items)) = self.value(field) else {
            return Vec::new();
        };
        items
            .iter()
            .filter_map(|v| v.as_str().map(str::to_owned))
            .collect()
    }

    /// Octets, empty when unset.
    pub fn bytes(&self, field: &str) -> Vec<u8> {
        self.value(field)
            .and_then(|v| v.as_bytes().map(|b| b.to_vec()))
            .unwrap_or_default()
    }

    /// A plain or wrapped (`google.protobuf.BoolValue`) flag; `None` when unset.
    pub fn flag(&self, field: &str) -> Option<bool> {
        unwrap_scalar(self.value(field)?).as_bool()
    }

    /// A plain or wrapped unsigned number (or a signed one that is not negative); `None` when unset.
    pub fn number(&self, field: &str) -> Option<u64> {
        match unwrap_scalar(self.value(field)?) {
            Value::U32(n) => Some(u64::from(n)),
            Value::U64(n) => Some(n),
            Value::I32(n) => u64::try_from(n).ok(),
            Value::I64(n) => u64::try_from(n).ok(),
            _ => None,
        }
    }

    /// A number, `default` when unset; `u32::MAX` stands for what is larger.
    pub fn number_or(&self, field: &str, default: u32) -> u32 {
        self.number(field)
            .map_or(default, |n| u32::try_from(n).unwrap_or(u32::MAX))
    }

    /// A signed number, 0 when unset.
    pub fn signed(&self, field: &str) -> i64 {
        self.value(field).and_then(|v| v.as_i64()).unwrap_or_default()
    }

    /// A list of numbers.
    pub fn numbers(&self, field: &str) -> Vec<u32> {
        let Some(Value::List(items)) = self.value(field) else {
            return Vec::new();
        };
        items.iter().filter_map(Value::as_u32).collect()
    }

    /// The name of an enum's value, `""` for one the descriptor does not know.
    pub fn choice(&self, field: &str) -> String {
        let Some(descriptor) = self.message.descriptor().get_field_by_name(field) else {
            return String::new();
        };
        let number = self
            .message
            .get_field(&descriptor)
            .as_enum_number()
            .unwrap_or_default();
        let kind = descriptor.kind();
        let Some(kind) = kind.as_enum() else {
            return String::new();
        };
        kind.get_value(number)
            .map(|v| v.name().to_owned())
            .unwrap_or_default()
    }

    /// A duration; `None` when unset.
    ///
    /// # Errors
    /// It is negative or beyond a hundred years.
    pub fn duration(&self, field: &str) -> Result<Option<Duration>, ConfigError> {
        let Some(Value::Message(message)) = self.value(field) else {
            return Ok(None);
        };
        let part = |name| message.get_field_by_name(name);
        let seconds = part("seconds").and_then(|v| v.as_i64()).unwrap_or_default();
        let nanos = part("nanos").and_then(|v| v.as_i32()).unwrap_or_default();
        let (Ok(seconds), Ok(nanos)) = (u64::try_from(seconds), u32::try_from(nanos)) else {
            return Err(self.refuse(field, "a duration must not be negative"));
        };
        if seconds > 100 * 366 * 86_400 || nanos > 999_999_999 {
            return Err(self.refuse(field, "a duration beyond a hundred years"));
        }
        Ok(Some(Duration::new(seconds, nanos)))
    }

    /// The message in `field`; `None` when unset.
    pub fn message(&self, field: &str) -> Option<Self> {
        match self.value(field)? {
            Value::Message(message) => Some(Self::new(message, self.path_of(field))),
            _ => None,
        }
    }

    /// The messages in a repeated field, each with its place.
    pub fn messages(&self, field: &str) -> Vec<Self> {
        let Some(Value::List(items)) = self.value(field) else {
            return Vec::new();
        };
        let path = self.path_of(field);
        let item = |(index, value): (usize, Value)| match value {
            Value::Message(message) => Some(Self::new(message, format!("{path}[{index}]"))),
            _ => None,
        };
        items.into_iter().enumerate().filter_map(item).collect()
    }

    /// The message inside an `Any` field; `None` when the field is unset.
    ///
    /// # Errors
    /// Its type is unknown or its bytes are not of it.
    pub fn any(&self, field: &str) -> Result<Option<Self>, ConfigError> {
        let Some(any) = self.message(field) else {
            return Ok(None);
        };
        let inner = unpack_any(&any.message, &any.path)?;
        Ok(Some(Self::new(inner, any.path)))
    }

    /// The messages inside a `map<string, Any>` field, with their keys.
    ///
    /// # Errors
    /// As [`Self::any`].
    pub fn any_map(&self, field: &str) -> Result<Vec<(String, Self)>, ConfigError> {
        let Some(Value::Map(items)) = self.value(field) else {
            return Ok(Vec::new());
        };
        let mut inner = Vec::new();
        for (key, value) in items {
            let (Some(key), Value::Message(any)) = (key.as_str(), value) else {
                continue;
            };
            let path = format!("{}[{key}]", self.path_of(field));
            inner.push((key.to_owned(), Self::new(unpack_any(&any, &path)?, path)));
        }
        Ok(inner)
    }

    /// The pairs of a `map<string, string>` field, by key.
    pub fn text_map(&self, field: &str) -> Vec<(String, String)> {
        let Some(Value::Map(items)) = self.value(field) else {
            return Vec::new();
        };
        let pairs = items.iter();
        let pairs = pairs.filter_map(|(k, v)| Some((k.as_str()?.to_owned(), v.as_str()?.to_owned())));
        let mut pairs: Vec<_> = pairs.collect();
        pairs.sort();
        pairs
    }
}

/// Takes the value out of a `google.protobuf.*Value` wrapper; anything else stays as it is.
fn unwrap_scalar(value: Value) -> Value {
    match value {
        Value::Message(message) => message
            .get_field_by_name("value")
            .map_or(Value::Bool(false), |v| v.into_owned()),
        value => value,
    }
}
