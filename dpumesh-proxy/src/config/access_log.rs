//! Access logs: where lines go, how they look, which are written.

use std::sync::Arc;

use prost_reflect::{MapKey, Value};

use super::ConfigError;
use super::route_policy::percentage;
use super::schema::At;
use super::translate::{Context, Result};
use super::translate_route;
use crate::access_log::{AccessLog, Compare, Filter, Format, How};

impl Context<'_> {
    pub(super) fn access_logs(&self, at: &At) -> Result<Vec<Arc<AccessLog>>> {
        at.messages("access_log")
            .iter()
            .map(|log| self.access_log(log))
            .collect()
    }

    fn access_log(&self, at: &At) -> Result<Arc<AccessLog>> {
        let Some(config) = at.any("typed_config")? else {
            return Err(at.refuse("typed_config", "must be given"));
        };
        let path = match config.type_name().as_str() {
            "envoy.extensions.access_loggers.file.v3.FileAccessLog" => config.required_text("path")?,
            "envoy.extensions.access_loggers.stream.v3.StdoutAccessLog" => "/dev/stdout".to_owned(),
            "envoy.extensions.access_loggers.stream.v3.StderrAccessLog" => "/dev/stderr".to_owned(),
            other => return Err(config.refuse("", format!("{other} is not an access logger this proxy has"))),
        };
        let format = format(&config)?;
        let filter = at.message("filter").map(|f| filter(&f)).transpose()?;
        let sink = self
            .sinks
            .open(&path)
            .map_err(|e| config.refuse("path", format!("cannot be opened: {e}")))?;
        Ok(Arc::new(AccessLog::new(format, filter, sink)))
    }
}

fn format(config: &At) -> Result<Format> {
    for field in ["json_format", "typed_json_format"] {
        if let Some(json) = config.message(field) {
            let json = Format::json(&json_of_struct(&json), false);
            return json.map_err(|e| config.refuse(field, e));
        }
    }
    let plain = Some(config.text("format")).filter(|f| !f.is_empty());
    let Some(log_format) = config.message("log_format") else {
        let format = Format::text(plain.as_deref(), false);
        return format.map_err(|e| config.refuse("format", e));
    };
    let omit = log_format.flag("omit_empty_values").unwrap_or(false);
    if let Some(json) = log_format.message("json_format") {
        let format = Format::json(&json_of_struct(&json), omit);
        return format.map_err(|e| log_format.refuse("json_format", e));
    }
    if let Some(source) = log_format.message("text_format_source") {
        let bytes = translate_route::data_source(&source)?;
        let text = String::from_utf8(bytes).map_err(|_| source.refuse("", "must be UTF-8"))?;
        return Format::text(Some(&text), omit).map_err(|e| ConfigError::new(source.path.clone(), e));
    }
    let text = Some(log_format.text("text_format"));
    Format::text(text.as_deref(), omit).map_err(|e| log_format.refuse("text_format", e))
}

/// A `google.protobuf.Struct` as JSON.
fn json_of_struct(at: &At) -> serde_json::Value {
    let fields = at.message.get_field_by_name("fields");
    let Some(Value::Map(map)) = fields.as_deref() else {
        return serde_json::Value::Null;
    };
    let field = |(key, value): (&MapKey, &Value)| Some((key.as_str()?.to_owned(), json_of_value(value)));
    serde_json::Value::Object(map.iter().filter_map(field).collect())
}

fn json_of_value(value: &Value) -> serde_json::Value {
    let Value::Message(message) = value else {
        return serde_json::Value::Null;
    };
    let at = At::new(message.clone(), "");
    if at.has("string_value") {
        return at.text("string_value").into();
    }
    if at.has("bool_value") {
        return at.flag("bool_value").into();
    }
    if let Some(fields) = at.message("struct_value") {
        return json_of_struct(&fields);
    }
    if let Some(list) = at.message("list_value") {
        let items = list.message.get_field_by_name("values");
        let Some(Value::List(items)) = items.as_deref() else {
            return serde_json::Value::Array(Vec::new());
        };
        return items.iter().map(json_of_value).collect();
    }
    match message.get_field_by_name("number_value").as_deref() {
        Some(Value::F64(number)) if at.has("number_value") => (*number).into(),
        _ => serde_json::Value::Null,
    }
}

fn filter(at: &At) -> Result<Filter> {
    let compared = |field: &str| match at.message(field).map(|f| f.message("comparison")) {
        None => Ok(None),
        Some(None) => Err(at.refuse(field, "comparison must be given")),
        Some(Some(comparison)) => Ok(Some(compare(&comparison))),
    };
    let all = |field: &str| -> Result<Option<Vec<Filter>>> {
        let Some(list) = at.message(field) else {
            return Ok(None);
        };
        let filters = list.messages("filters");
        if filters.len() < 2 {
            return Err(list.refuse("filters", "must be two at least"));
        }
        filters.iter().map(filter).collect::<Result<_>>().map(Some)
    };
    if let Some(compare) = compared("status_code_filter")? {
        return Ok(Filter::Status(compare));
    }
    if let Some(compare) = compared("duration_filter")? {
        return Ok(Filter::Duration(compare));
    }
    if at.has("not_health_check_filter") {
        return Ok(Filter::NotHealthCheck);
    }
    if let Some(runtime) = at.message("runtime_filter") {
        return Ok(Filter::Runtime(percentage(&runtime, "percent_sampled")?));
    }
    if let Some(all) = all("and_filter")? {
        return Ok(Filter::And(all));
    }
    if let Some(all) = all("or_filter")? {
        return Ok(Filter::Or(all));
    }
    if let Some(header) = at.message("header_filter") {
        let Some(rule) = header.message("header") else {
            return Err(header.refuse("header", "must be given"));
        };
        return Ok(Filter::Header(translate_route::header_match(&rule)?));
    }
    if let Some(flags) = at.message("response_flag_filter") {
        return Ok(Filter::Flags(flags.texts("flags")));
    }
    if let Some(grpc) = at.message("grpc_status_filter") {
        return Ok(grpc_filter(&grpc));
    }
    Err(at.refuse("", "no kind of filter is given"))
}

fn compare(at: &At) -> Compare {
    let value = at.message("value");
    Compare {
        how: match at.choice("op").as_str() {
            "GE" => How::AtLeast,
            "LE" => How::AtMost,
            "NE" => How::NotEqual,
            _ => How::Equal,
        },
        value: value.map_or(0, |v| u64::from(v.number_or("default_value", 0))),
    }
}

fn grpc_filter(at: &At) -> Filter {
    let statuses = at.message.get_field_by_name("statuses");
    let statuses = match statuses.as_deref() {
        Some(Value::List(list)) => list.iter().filter_map(Value::as_enum_number).collect(),
        _ => Vec::new(),
    };
    Filter::Grpc {
        // Its numbers are gRPC's own.
        statuses: statuses
            .into_iter()
            .filter_map(|n| u32::try_from(n).ok())
            .collect(),
        exclude: at.flag("exclude").unwrap_or(false),
    }
}
