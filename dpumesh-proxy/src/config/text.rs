//! The text of a configuration file as a JSON value, for [`super::schema`] to turn into messages.

use std::path::Path;

use serde_json::Value;

use super::ConfigError;

/// Reads the text of `file` as a JSON value: `.json` as JSON, anything else as YAML (of which JSON is a part).
///
/// # Errors
/// A syntax error with its line, a duplicate key, or nesting and aliases beyond the reader's bounds.
pub(super) fn text_to_value(file: &Path, text: &str) -> Result<Value, ConfigError> {
    let json = file.extension().is_some_and(|e| e.eq_ignore_ascii_case("json"));
    if json {
        serde_json::from_str(text).map_err(|e| ConfigError::new("", e.to_string()))
    } else {
        serde_saphyr::from_str(text).map_err(|e| ConfigError::new("", e.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::schema::value_to_message;

    const BOOTSTRAP: &str = "envoy.config.bootstrap.v3.Bootstrap";

    #[test]
    fn yaml_and_json_give_the_same_message() {
        let yaml = "node: {id: a}\nstatic_resources:\n  clusters:\n  - name: c\n    connect_timeout: 0.25s\n";
        let json =
            r#"{"node":{"id":"a"},"staticResources":{"clusters":[{"name":"c","connectTimeout":"0.250s"}]}}"#;
        let read = |file: &str, text: &str| {
            value_to_message(BOOTSTRAP, &text_to_value(Path::new(file), text).unwrap(), "").unwrap()
        };
        assert_eq!(read("a.yaml", yaml), read("a.json", json));
    }
}
